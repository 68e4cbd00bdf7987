"""Loads the compiled operators and the torch-free native module, if they were built; builds nothing itself."""

from __future__ import annotations

import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

import torch

_loaded = False
_reason: str | None = "the C++ extension has not been loaded"

native: ModuleType | None
"""The pybind11 module (processor report, bandwidth probe, noise for NumPy), or None where it was not built."""
try:
    native = importlib.import_module("._native", __package__)
except ImportError:
    native = None


def _library() -> Path | None:
    folder = Path(__file__).parent
    suffixes = [suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES if "abi3" in suffix]
    candidates = [folder / f"_C{suffix}" for suffix in suffixes + importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.exists()), None)


def load() -> bool:
    """Register the compiled operators for CPU tensors; their schemas must be defined by then.

    Returns:
        Whether the operators are there. Never raises: :func:`why_missing` has the reason.
    """
    global _loaded, _reason
    if _loaded:
        return True
    path = _library()
    if path is None:
        _reason = "the C++ extension was not built; install again with torch and a C++ compiler in place"
        return False
    try:
        torch.ops.load_library(str(path))
        # A wrong REALUID_FAST_CPU_ISA shows here rather than in the middle of a run.
        if native is not None:
            native.isa()
    except (OSError, RuntimeError) as error:
        _reason = f"the C++ extension does not load: {str(error).splitlines()[0]}"
        return False
    _loaded, _reason = True, None
    return True


def why_missing() -> str | None:
    """Why the compiled operators are not there, in one sentence, or None where they are."""
    return _reason


def isa() -> str | None:
    """The instruction set the operators run on (``avx512``, ``avx2``, ``baseline``), or None without the native module.

    Raises:
        RuntimeError: ``REALUID_FAST_CPU_ISA`` asks for one that this processor lacks.
    """
    return None if native is None else str(native.isa())


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation, for the rest of the process.

    For programs that allocate the same large tensors every step: glibc gives buffers above some megabytes back to the
    system and pays for fresh pages each time, which at 25 MB a tensor takes several times longer than the kernels. The
    process keeps its peak size.

    Returns:
        Whether anything was done: False without the native module or on another C library.
    """
    return native is not None and bool(native.keep_freed_memory())
