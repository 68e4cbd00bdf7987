"""The null GPU's counts: launches by name, calls of the host, and requests that CUDA would have refused."""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PRELOADED = next(
    (path for path in re.split("[ :]", os.environ.get("LD_PRELOAD", "")) if Path(path).name == "libnullgpu.so"), None
)
if PRELOADED is not None:
    _gpu = ctypes.CDLL(PRELOADED)
    _gpu.nullgpu_report.restype = _gpu.nullgpu_interned.restype = ctypes.c_char_p
    _gpu.nullgpu_interned.restype = ctypes.c_void_p
    _gpu.nullgpu_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    _demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    _demangle.restype = ctypes.c_char_p


@dataclass
class Counts:
    """Times by name since :func:`reset`.

    Attributes:
        recorded: kernels, copies and memsets that captures recorded.
        done: kernels, copies, memsets and replays that went to the device at once.
        called: other calls of the runtime: allocations, waits, events.
        violations: sentences about what CUDA would have refused, or what a replay would not repeat.
    """

    recorded: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    called: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def reset() -> None:
    """Forget what was counted."""
    _gpu.nullgpu_reset()


def counts() -> Counts:
    """Counts by name since the last reset. Kernels that differ in their types only are one."""
    found = Counts()
    for line in _gpu.nullgpu_report().decode().splitlines():
        kind, times, name = line.split("\t", 2)
        name = re.sub(r"\b_Z\w+", lambda symbol: readable(symbol[0]), name)
        if kind == "violation":
            found.violations.append(name)
        else:
            getattr(found, kind)[name] += int(times)
    return found


def violate(what: str) -> None:
    """Report what the runtime cannot see."""
    _gpu.nullgpu_violation(what.encode())


def capturing() -> bool:
    """Whether this thread has a capture under way."""
    return bool(_gpu.nullgpu_capturing())


def launcher(name: str):
    """A function of a stream's handle that counts one launch of ``name``."""
    interned = _gpu.nullgpu_interned(name.encode())
    return lambda stream: _gpu.nullgpu_launch(stream, interned)


def readable(symbol: str) -> str:
    """The name of a kernel of torch without its template arguments, but for the one that says what it computes."""
    whole = (_demangle(symbol.encode(), None, None, None) or symbol.encode()).decode()
    kernel, _, arguments = whole.replace("(anonymous namespace)::", "").removeprefix("void ").partition("<")
    kernel = kernel.partition("(")[0].rpartition("::")[2]
    functions = re.findall(r"\w*(?:[Ff]unctor|_kernel|KernelImpl|_cuda(?=_out\b|\b)|Ops|launch_)\w*", arguments)
    functions = [each for each in functions if not re.match(r"gpu_kernel_impl|(Binary|[AB]Unary)Functor$", each)]
    return f"{kernel}<{functions[0]}>" if functions else kernel
