"""Plain functions of the compiled library: processor report, bandwidth, Philox and the noise stream for NumPy.

:data:`realuid_fast.ops.extension.native` is this module where the library was built, and None elsewhere. The functions
are called through ctypes, which knows no version of Python: one wheel serves all.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_float, c_int, c_int64, c_uint32, c_uint64
from typing import Any

import numpy as np

from ..errors import UserError

_LEVELS = ("baseline", "avx2", "avx512")  # as csrc/cpu/isa.h numbers them
_TYPES = {"float32": c_float, "float64": c_double}
_PLACE = (c_uint64, c_uint64, c_uint64, c_int64)  # seed, offset, start, count
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "isa": (c_char_p, (POINTER(c_char_p),)),
    "supports": (c_bool, (c_int,)),
    "bandwidth": (c_bool, (c_uint64, c_int, c_int, POINTER(c_double), POINTER(c_double))),
    "keep_freed_memory": (c_bool, ()),
    "philox": (None, (POINTER(c_uint32), POINTER(c_uint32))),
    "normals_f32": (None, (*_PLACE, POINTER(c_float))),
    "normals_f64": (None, (*_PLACE, POINTER(c_double))),
}
_call: dict[str, Any] = {}


def bind(path: str) -> None:
    """Find the functions in the library at ``path``, which torch has loaded."""
    library = ctypes.CDLL(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"realuid_fast_{name}")
        function.restype, function.argtypes = result, arguments
        _call[name] = function


def isa() -> str:
    """The instruction set the kernels run on: ``avx512``, ``avx2`` or ``baseline``.

    Raises:
        RuntimeError: ``REALUID_FAST_CPU_ISA`` asks for one that this processor lacks.
    """
    reason = c_char_p()
    name = _call["isa"](byref(reason))
    if name is None:
        raise RuntimeError((reason.value or b"").decode())
    return str(name.decode())


def cpu() -> dict[str, bool]:
    """Which instruction sets this processor can run."""
    return {name: _call["supports"](level) for level, name in enumerate(_LEVELS)}


def bandwidth(megabytes: int = 256, repeats: int = 5, threads: int = 1) -> dict[str, float]:
    """Memory bandwidth in GB/s (10^9 bytes), the best of ``repeats``: ``copy`` reads and writes, ``fill`` writes."""
    if min(megabytes, repeats, threads) < 1:
        raise UserError("megabytes, repeats and threads must be positive")
    copy, fill = c_double(), c_double()
    if not _call["bandwidth"](megabytes << 20, repeats, threads, byref(copy), byref(fill)):
        raise MemoryError(f"there is no memory for two buffers of {megabytes} megabytes")
    return {"copy": copy.value, "fill": fill.value}


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory; False where it is not glibc and nothing was done."""
    return bool(_call["keep_freed_memory"]())


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10: four counter words and two key words to four words."""
    words = (c_uint32 * 4)(*counter)
    _call["philox"]((c_uint32 * 2)(*key), words)
    return tuple(words)


def normals(
    seed: int, offset: int, start: int, shape: int | Sequence[int], dtype: str = "float32"
) -> np.ndarray[Any, np.dtype[Any]]:
    """Standard normals of the elements ``start``, ``start + 1``, ... of the stream ``(seed, offset)``.

    Raises:
        UserError: a number outside ``[0, 2^64)``, a negative size, or a ``dtype`` other than float32 and float64.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    for name, value in (("seed", seed), ("offset", offset), ("start", start)):
        if not 0 <= value < 2**64:
            raise UserError(f"{name} must be in [0, 2^64), got {value}")
    if min(sizes, default=0) < 0:
        raise UserError(f"shape must have no negative size, got {sizes}")
    if dtype not in _TYPES:
        raise UserError(f"dtype must be float32 or float64, got {dtype}")
    isa()  # raises here what would end the process inside the library
    out = np.empty(sizes, dtype)
    fill = _call["normals_f32" if dtype == "float32" else "normals_f64"]
    fill(seed, offset, start, math.prod(sizes), out.ctypes.data_as(POINTER(_TYPES[dtype])))
    return out


class NoiseStream:
    """The stream of :class:`realuid_fast.NoiseStream` for NumPy: the n-th call draws what the seed's n-th key does."""

    def __init__(self, seed: int, offset: int = 0) -> None:
        self.seed, self.offset = seed, offset

    def normal(self, shape: int | Sequence[int], dtype: str = "float32") -> np.ndarray[Any, np.dtype[Any]]:
        """Standard normals of ``shape``, float32 or float64; advances the offset by one."""
        out = normals(self.seed, self.offset, 0, shape, dtype)
        self.offset += 1
        return out
