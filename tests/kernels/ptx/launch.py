"""Compiles a launch as a GPU would and executes it on CPU tensors, on guarded memory."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.compiler.compiler import make_backend

from bench.ahead_of_time import TARGETS, specialise

from .machine import Machine
from .memory import TEBIBYTE, Events, Memory, Sparse
from .program import Program, parse

# Lanes that run side by side: more do not make NumPy faster, and take memory.
LANES = 16384
# A barrier orders what one program does; no more is needed for a norm whose every part reads one number first.
ALLOWED: dict[str, set[str]] = {}


class Failure(Exception):
    """The kernel did something that no kernel may do."""


@dataclass
class Executor:
    """Runs launches; give :meth:`run` in place of ``Call.run``.

    Attributes:
        target: ``sm_80``, ``sm_90`` or ``sm_100``.
        order, error: as of :class:`Machine`.
        change: what is done to the PTX before it runs, to see that a wrong kernel is found.
        kernels, counts: what has run: texts, and launches, programs and instructions.
    """

    target: str = "sm_90"
    order: str = "together"
    error: int = 0
    change: Callable[[str], str] = str
    kernels: dict[str, Program] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    texts: dict[str, tuple[str, int]] = field(default_factory=dict)

    def run(self, call: Any, programs: Sequence[int] | None = None, sparse: dict[str, Any] | None = None) -> list[Any]:
        """Execute ``call``, all its programs or those given, and put what it stored into its tensors.

        Args:
            sparse: for arguments that no memory holds (meta tensors), what their elements read as.

        Returns:
            The buffers of the tensors, in the order of the arguments.

        Raises:
            Failure: with everything that the launch did wrong.
        """
        program, names, bound = self.compile(call)
        arguments, buffers = _placed(names, bound, sparse or {})
        grid = (*call.grid, 1, 1)[:3]
        chosen = np.arange(np.prod(grid)) if programs is None else np.asarray(programs)
        events, at_once = Events(), max(1, LANES // program.threads)
        for first in range(0, len(chosen), at_once):
            some = chosen[first : first + at_once]
            machine = Machine(
                program, arguments, [b for b, _ in buffers], grid, some, events, order=self.order, error=self.error
            )
            machine.run()
            self.counts["instructions"] += machine.executed * program.threads * len(some)
        self.counts.update(launches=1, programs=len(chosen))
        for buffer, tensor in buffers:
            if isinstance(buffer, Memory) and buffer.stored.any():
                _bytes(tensor)[:] = buffer.content
                _mark(tensor, buffer.stored_bytes)
        wrong = {event: n for event, n in events.items() if not self.allowed(program.name, event[0])}
        if wrong:
            raise Failure(f"{program.name}: " + "; ".join(f"{kind} ({n}x): {at}" for (kind, at), n in wrong.items()))
        return [buffer for buffer, _ in buffers]

    def allowed(self, kernel: str, event: str) -> bool:
        """Events that harm nothing, with the reason."""
        if event == "register read before any write":
            # LLVM pairs floats for the f32x2 instructions of sm_100 with a half that nobody wrote and nobody uses.
            return self.target == "sm_100"
        # All warps load the optimiser's counters; one thread alone uses what it loaded, and stores them.
        races = ("race: store to what another warp read", "race: load of what another warp wrote")
        return kernel == "_norm_kernel" and event in races

    def compile(self, call: Any) -> tuple[Program, list[str], dict[str, Any]]:
        """The program of a launch; names of its parameters that are no constants, and all its arguments."""
        source, options, _ = specialise(call, self.target)
        names = [name for name, kind in source.signature.items() if kind != "constexpr"]
        key = repr((call.kernel.cache_key, source.hash(), call.warps, self.target))
        if key not in self.texts:
            self.texts[key] = ptx(source, options, self.target)
        text, shared = self.texts[key]
        text = self.change(text)
        if text not in self.kernels:
            self.kernels[text] = parse(text, shared)
        return self.kernels[text], names, {**call.arguments, **call.constants}


def ptx(source: Any, options: dict[str, Any], target: str) -> tuple[str, int]:
    """The compiler's PTX, without its way on to machine code, and the bytes of shared memory that it takes."""
    backend, context = _backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    asked = backend.parse_options(options)
    metadata = {"hash": "", "target": TARGETS[target], **asked.__dict__, **get_cache_invalidating_env_vars()}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, asked, source.language)
    made = source.make_ir(
        TARGETS[target], asked, backend.get_codegen_implementation(asked), backend.get_module_map(), context
    )
    for name, stage in stages.items():
        made = stage(made, metadata)
        if name == "ptx":
            break
    return made, metadata["shared"]


@functools.cache
def _backend(target: str) -> Any:
    return make_backend(TARGETS[target])


def _placed(
    names: list[str], bound: dict[str, Any], sparse: dict[str, Any]
) -> tuple[list[Any], list[tuple[Memory | Sparse, Tensor]]]:
    """Arguments as numbers, tensors as addresses of buffers; one tensor given twice is one buffer."""
    arguments, buffers, known = [], [], {}
    for name in names:
        value = bound[name]
        if isinstance(value, Tensor) and value.numel():
            key = (name,) if value.is_meta else (value.data_ptr(), _span(value))
            if key not in known:
                known[key] = buffer = _buffer(name, value, len(buffers), sparse)
                buffers.append((buffer, value))
            arguments.append(np.uint64(known[key].base))
        elif isinstance(value, Tensor):
            arguments.append(np.uint64(0))
        elif isinstance(value, float):
            arguments.append(np.float32(value))
        else:
            arguments.append(np.int32(value) if -(2**31) <= value < 2**31 else np.int64(value))
    # Triton's own two pointers to scratch memory, which no kernel of ours asks for.
    return [*arguments, np.uint64(0), np.uint64(0)], buffers


def _buffer(name: str, value: Tensor, number: int, sparse: dict[str, Any]) -> Memory | Sparse:
    base = (number + 1 << TEBIBYTE) + (1 << 20) + (0 if value.is_meta else value.data_ptr() % 4096)
    if value.is_meta:
        return Sparse(name, base, value.numel() * value.element_size(), value.element_size(), sparse[name])
    inside = None
    if _span(value) != value.numel() * value.element_size():
        mark = torch.zeros(_span(value) // value.element_size(), dtype=torch.bool)
        torch.as_strided(mark, value.shape, value.stride()).fill_(True)
        inside = np.repeat(mark.numpy(), value.element_size())
    unwritten = _unwritten.get(value.data_ptr())
    return Memory(name, base, _bytes(value), None if unwritten is None else ~unwritten[1][: _span(value)], inside)


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _bytes(tensor: Tensor) -> Any:
    raw = torch.tensor([], dtype=torch.uint8)
    first = tensor.storage_offset() * tensor.element_size()
    return raw.set_(tensor.untyped_storage(), first, (_span(tensor),)).numpy()


# Tensors that a launch allocated, by address: the tensor, kept alive, and which of its bytes nobody has written.
_unwritten: dict[int, tuple[Tensor, Any]] = {}


def _mark(tensor: Tensor, stored: Any) -> None:
    if tensor.data_ptr() in _unwritten:
        _unwritten[tensor.data_ptr()][1][: len(stored)] &= ~stored


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Memory allocated inside the block starts as NaN that no kernel wrote; at the end all of it must be written.

    Raises:
        Failure: an element was never written.
    """
    made = {torch: ("empty", "empty_like"), Tensor: ("new_empty",)}
    before = [(place, name, getattr(place, name)) for place, names in made.items() for name in names]
    _unwritten.clear()

    def watch(allocate: Any) -> Any:
        def fresh(*arguments: Any, **options: Any) -> Tensor:
            tensor: Tensor = allocate(*arguments, **options)
            if tensor.numel() and not tensor.is_meta:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
                _unwritten[tensor.data_ptr()] = tensor, np.ones(_span(tensor), bool)
            return tensor

        return fresh

    try:
        for place, name, allocate in before:
            setattr(place, name, watch(allocate))
        yield
    finally:
        for place, name, allocate in before:
            setattr(place, name, allocate)
        made_here = list(_unwritten.values())
        _unwritten.clear()
    for tensor, missing in made_here:
        if missing.any():
            raise Failure(
                f"{int(missing.sum())} of {len(missing)} bytes of an output like {tuple(tensor.shape)} never written"
            )
