"""Which implementation runs: by the tensors' device, unless the user asks for one by name."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import UserError
from . import extension

NAMES = ("torch", "cpp", "triton")
_SERVES = {"cpp": "cpu", "triton": "cuda"}
_CUDA_ALONE = ("group_norm", "shifts", "casts")
_CUDA_LAYERS = ("norm_silu", "conv1x1", *_CUDA_ALONE)
_HAS_TRITON = importlib.util.find_spec("triton") is not None

# A plain global: torch.compile guards on it, which it cannot do on a context variable.
_chosen: str | None = os.environ.get("REALUID_FAST_BACKEND") or None
_checked: set[str] = set()


@dataclass(frozen=True)
class Backend:
    """One line of ``realuid-fast info``: a backend, its devices, its calls, and the reason if it cannot run here."""

    name: str
    devices: str
    why_not: str | None
    runs: str = ""


def report() -> list[Backend]:
    """Every backend with the devices it serves and what keeps it from running here."""
    return [
        Backend("torch", "any", None, "every call, every type; the plain reference"),
        Backend("cpp", "cpu", _why_no_cpp(), "every call, every type"),
        Backend("triton", "cuda", _why_no_triton(), "every call in float32, bfloat16, float16; float64 by torch"),
    ]


def _why_no_cpp() -> str | None:
    return extension.why_missing()


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


def check(name: str) -> None:
    """Refuse a backend that does not exist or cannot run here."""
    if name not in NAMES:
        raise UserError(f"backend must be one of {', '.join(NAMES)}, not {name!r}")
    why_not = next(row.why_not for row in report() if row.name == name)
    if why_not is not None:
        raise UserError(f"backend {name!r} cannot run here: {why_not}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the fused calls inside the block on one backend: ``"torch"``, ``"cpp"`` or ``"triton"``.

    The choice holds for the whole process while the block runs, for its other threads too.

    Raises:
        UserError: an unknown name, or a backend that cannot run here, with what is missing.
    """
    global _chosen
    check(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen() -> str | None:
    """The backend asked for by name, or None where the tensors' device decides."""
    return _chosen


def select(device: torch.device) -> str | None:
    """The backend asked for, checked against ``device``. Without a request, warn once if only the reference runs."""
    name, where = _chosen, device.type
    # torch.compile answers the first question by itself. So its code has no guard on `_checked`.
    if not torch.compiler.is_compiling() and (name or where) not in _checked:
        if name is None:
            _warn_if_slow(where)
        else:
            check(name)
        _checked.add(name or where)
    if name is not None and name != "torch" and where != _SERVES[name]:
        raise UserError(f"backend {name!r} runs on {_SERVES[name]} tensors, these are on {device}")
    return name


def compiled(device: torch.device, layer: str = "") -> bool:
    """Whether the networks compute a layer their own way on ``device``. Otherwise the layer is torch's."""
    if _chosen == "torch":
        return False
    if device.type == "cuda":
        return layer in _CUDA_LAYERS and _HAS_TRITON
    return device.type == "cpu" and layer not in _CUDA_ALONE and extension.why_missing() is None


def load() -> None:
    """Register the compiled operators, if they were built, and the Triton kernels, if this torch supports GPUs."""
    extension.load()
    if (torch.version.cuda or torch.version.hip) and importlib.util.find_spec("triton") is not None:
        from . import triton_backend

        triton_backend.load()


def _warn_if_slow(device_type: str) -> None:
    why_not = {"cpu": _why_no_cpp, "cuda": _why_no_triton}.get(device_type, lambda: None)()
    if why_not is not None:
        warnings.warn(
            f"realuid_fast runs its plain torch reference on {device_type}, several times slower: {why_not}",
            RuntimeWarning,
            stacklevel=5,
        )
