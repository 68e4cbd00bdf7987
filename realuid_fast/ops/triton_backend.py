"""Registers the Triton kernels for CUDA (and ROCm) tensors; they are imported with the first call that needs them.

There are no kernels for float64, which runs on the plain torch reference, on the same device. An optimiser step over
many separate tensors runs on the reference too, which uses torch's foreach functions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference

# For each operator: the module that launches it, and the argument whose dtype and device decide.
_HOMES = {
    "normal_like": ("noise", 1),
    "interpolate": ("interpolate", 0),
    "interpolate_grads": ("interpolate", 0),
    "mean_abs_error": ("error", 1),
    "matching": ("matching", 0),
    "fake": ("fake", 0),
    "generator": ("generator", 0),
}

# The registrations live as long as these do.
_libraries: list[torch.library.Library] = []


@functools.cache
def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"realuid_fast.kernels.{module}")


def launcher(op: str) -> Callable[..., Any]:
    """The operator ``op`` on Triton kernels, with the arguments and results of its schema.

    It also takes CPU tensors if ``TRITON_INTERPRET=1`` was set before triton was imported.
    """
    if op in _IN_PLACE:
        return _IN_PLACE[op]
    module, leading = _HOMES[op]

    def launch(*arguments: Any) -> Any:
        first: Tensor = arguments[leading]
        if first.dtype == torch.float64:
            with torch.no_grad():
                return getattr(reference, op)(*arguments)
        # Kernels read the two numbers of a noise key from neighbouring addresses.
        arguments = tuple(each.contiguous() if _is_key(each) else each for each in arguments)
        calls, results = getattr(_kernels(module), op)(*arguments)
        with _kernels("tiles").on_device_of(first):
            for call in calls:
                call.run()
        return results

    return launch


def _is_key(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype == torch.int64


def _scale_grads_(grads: list[Tensor], scale: Tensor) -> None:
    wide = [grad for grad in grads if grad.dtype == torch.float64]
    if wide:
        reference.scale_grads_(wide, scale)
    narrow = [grad for grad in grads if grad.dtype != torch.float64]
    with _kernels("tiles").on_device_of(scale):
        for call in _kernels("scale").scale_grads_(narrow, scale):
            call.run()


def _launchable(tensors: list[Tensor]) -> bool:
    """Whether the optimiser's kernels take these tensors: float32, and few of them (flat storage counts as one)."""
    return len(tensors) <= _kernels("optimiser").LAUNCHES and all(t.dtype == torch.float32 for t in tensors)


def _begin_step_(grads: list[Tensor], steps: list[Tensor], counts: Tensor) -> Tensor:
    if not steps or not _launchable(grads):
        return reference.begin_step_(grads, steps, counts)
    calls, norm = _kernels("optimiser").begin_step_(grads, steps[0], counts)
    with _kernels("tiles").on_device_of(counts):
        for call in calls:
            call.run()
    for step in steps[1:]:
        step += torch.isfinite(norm)
    return norm


def _adam_(params: list[Tensor], *rest: Any) -> None:
    if not _launchable(params):
        reference.adam_(params, *rest)
        return
    with _kernels("tiles").on_device_of(params[0]):
        for call in _kernels("optimiser").adam_(params, *rest):
            call.run()


_IN_PLACE: dict[str, Callable[..., Any]] = {"scale_grads_": _scale_grads_, "begin_step_": _begin_step_, "adam_": _adam_}


def load() -> None:
    """Register every operator for CUDA tensors; their schemas must be defined by then. A second call does nothing."""
    if _libraries:
        return
    library = torch.library.Library("realuid_fast", "IMPL")
    for op in (*_HOMES, *_IN_PLACE):
        library.impl(op, launcher(op), "CUDA")
    _libraries.append(library)
