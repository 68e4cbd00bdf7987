"""Registers the Triton kernels for CUDA (and ROCm) tensors; they are imported with the first call that needs them.

There are no kernels for float64, which runs on the plain torch reference, on the same device. An optimiser step over
many separate tensors runs on the reference too, which uses torch's foreach functions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import extension, reference


class _Home(NamedTuple):
    """An operator's schema as far as its launcher has to know it."""

    module: str
    """The module of ``kernels`` that works its launches out."""
    like: int
    """The argument whose shape, layout, dtype and device all tensors of a row's size share."""
    tensors: int
    """How many arguments are tensors or None. They come first."""
    noise: int | None
    """The argument that is a noise key or a tensor of noise."""


_HOMES = {
    "normal_like": _Home("noise", 1, 2, 0),
    "interpolate": _Home("interpolate", 0, 4, 2),
    "interpolate_grads": _Home("interpolate", 0, 2, None),
    "mean_abs_error": _Home("error", 1, 6, None),
    "matching": _Home("matching", 0, 6, 4),
    "fake": _Home("fake", 0, 9, 4),
    "generator": _Home("generator", 2, 10, 5),
    "norm_silu": _Home("norm", 0, 4, None),
    "norm_silu_grads": _Home("norm", 1, 6, None),
    "group_norm": _Home("norm", 0, 3, None),
    "group_norm_grads": _Home("norm", 1, 4, None),
}
# Plans of calls, by what they follow from. Most programs use few shapes and settings; one that uses many keeps
# _MOST_PLANS of them.
PLANS: dict[Any, Any] = {}
_MOST_PLANS = 512

# Whether plans are repeated by csrc/autograd/plans.h. A call then comes here the first time alone.
_native = False
_IN_PYTHON = "realuid_fast_triton"

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
    module, place, count, noise = _HOMES[op]

    def plan_calls(*arguments: Any) -> Any:
        return getattr(_kernels(module), op)(*arguments)

    def launch(*arguments: Any) -> Any:
        like: Tensor = arguments[place]
        if like.dtype == torch.float64:
            with torch.no_grad():
                return getattr(reference, op)(*arguments)
        arguments = _with_dense_key(arguments, noise)
        key = (op, like.shape, like.stride(), *_kinds(arguments[:count]), *arguments[count:])
        return _planned(key, plan_calls, arguments, like)

    return launch


def _with_dense_key(arguments: tuple[Any, ...], noise: int | None) -> tuple[Any, ...]:
    """The arguments, with a noise key whose two numbers are neighbours, because kernels read them so."""
    if noise is None or arguments[noise].is_contiguous() or arguments[noise].dtype != torch.int64:
        return arguments
    return (*arguments[:noise], arguments[noise].contiguous(), *arguments[noise + 1 :])


def _kinds(tensors: Sequence[Tensor | None]) -> list[Any]:
    """The properties that Triton compiles for: the tensors' dtypes, and which addresses are multiples of 16."""
    kinds: list[Any] = []
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            kinds.append(None)
        else:
            kinds.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    if addresses % 16:
        kinds += [tensor is not None and tensor.data_ptr() % 16 == 0 for tensor in tensors]
    return kinds


def _planned(key: tuple[Any, ...], plan_calls: Callable[..., Any], arguments: tuple[Any, ...], like: Tensor) -> Any:
    """Repeat the call's plan, or work its launches out and keep the plan."""
    device = like.device.index
    if like.is_cuda and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _planned(key, plan_calls, arguments, like)
    key = (device, *key)
    plan = PLANS.get(key)
    if plan is not None:
        if _native:
            _kernels("plans").keep_natively(plan)
        return plan.run(arguments)
    results, plan = _kernels("plans").run_and_record(plan_calls, arguments, like)
    if plan is not None and torch.version.hip is None:
        if len(PLANS) >= _MOST_PLANS:
            PLANS.clear()
            if _native:
                torch.ops.realuid_fast_node.forget_plans()
        PLANS[key] = plan
        if _native:
            _kernels("plans").keep_natively(plan)
    return results


def _scale_grads_(grads: list[Tensor], scale: Tensor) -> None:
    wide = [grad for grad in grads if grad.dtype == torch.float64]
    if wide:
        reference.scale_grads_(wide, scale)
        grads = [grad for grad in grads if grad.dtype != torch.float64]
    tensors = (*grads, scale)
    key = ("scale_grads_", *(tensor.shape for tensor in tensors), *_kinds(tensors))
    _planned(key, _plan_scale, tensors, scale)


def _plan_scale(*tensors: Tensor) -> Any:
    return _kernels("scale").scale_grads_(tensors[:-1], tensors[-1]), ()


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


def _in_compiled_code(op: str) -> Callable[..., Any]:
    """The rule by which torch.compile sees the operator's Triton kernels on CUDA, as it does with a ``triton_op``.

    It then launches them itself and calls no Python. Elsewhere, for float64 and in an exported program the operator
    stays one opaque node.
    """
    home = _HOMES[op]

    def rule(mode: Any, function: Any, types: Any, arguments: tuple[Any, ...], options: Any) -> Any:
        like: Tensor = arguments[home.like]
        if like.device.type != "cuda" or like.dtype == torch.float64 or torch.compiler.is_exporting():
            return mode.__torch_dispatch__(function, types, arguments, options)
        with mode:
            arguments = _with_dense_key(arguments, home.noise)
            return _kernels("plans").trace(*getattr(_kernels(home.module), op)(*arguments))

    return rule


def show_to_torch_compile(library: torch.library.Library) -> None:
    """Let torch.compile see the kernels of the losses' operators and of the interpolants'."""
    # The mode in which torch.compile makes its graph; torch registers the rule of a triton_op for it too.
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    for op in _HOMES:
        rule = _in_compiled_code(op)
        torch.library.register_torch_dispatch(f"realuid_fast::{op}", FunctionalTensorMode, rule, lib=library)


def load() -> None:
    """Register every operator for CUDA tensors; their schemas must be defined by then. A second call does nothing.

    Where the nodes' library is loaded, it repeats the plans. What is new to it comes here by operators of their own.
    """
    global _native
    if _libraries:
        return
    _native = extension.why_no_nodes() is None and torch.version.cuda is not None
    library, in_python = torch.library.Library("realuid_fast", "IMPL"), torch.library.Library(_IN_PYTHON, "DEF")
    _libraries.extend((library, in_python))
    planned = [*_HOMES, "scale_grads_"] if _native else []
    for op in planned:
        in_python.define(str(getattr(torch.ops.realuid_fast, op).default._schema).partition("::")[2])
        in_python.impl(op, launcher(op), "CUDA")
    if planned:
        torch.ops.realuid_fast_node.plan_on_cuda(planned)
    for op in {*_HOMES, *_IN_PLACE} - {*planned}:
        library.impl(op, launcher(op), "CUDA")
    show_to_torch_compile(library)
