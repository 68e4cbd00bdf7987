"""Each fused call against the copy bandwidth, the plain formulas and torch.compile of them; and over tile sizes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import realuid_fast as rf
from realuid_fast import backends
from realuid_fast.noise import normal
from realuid_fast.ops import triton_backend

from .. import peers
from ..report import OURS, Row
from .device import Deadline, Device, Function, Times, reason

# The first two are measured before all others: one fills the GPU many times over, one is CIFAR-10's batch.
SHAPES = ((16384, 4, 32, 32), (256, 3, 32, 32), (2048, 3, 32, 32), (64, 4, 128, 128), (16, 16, 21, 60, 104))
DRY_SHAPES = ((2, 4, 3, 4, 4), (4, 3, 8, 8))
DTYPES = (torch.bfloat16, torch.float32)
COPY_BYTES = 1 << 31
BACKEND = "inductor"
GIVEN = f"{OURS}, noise given"
EAGER, COMPILED, BY_HAND = "eager, autograd", "torch.compile, autograd", "torch.compile, gradients by hand"


@dataclass(frozen=True)
class Way:
    """One way of computing a call; ``reads`` counts the noise too where that is a tensor."""

    name: str
    run: Function
    compiles: bool = False
    reads: float = 0


@dataclass(frozen=True)
class Call:
    """A fused call at one size: the tensors it has to read and write, and the ways of computing it."""

    name: str
    reads: int
    writes: int
    ways: list[Way]


class Inputs:
    """Tensors of one shape and type; half of the rows of a fake turn are real."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        def tensor() -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

        self.x, self.out, self.other, self.noise = tensor(), tensor(), tensor(), tensor()
        self.shared = self.noise[: shape[0] // 2].contiguous()
        self.half = shape[0] // 2
        path = rf.paths.Linear()
        self.t = path.sample_time(shape[0], device=device)
        self.coef = path.coefficients(self.t)
        self.key = rf.NoiseStream(0, device).next_key()
        self.objective = rf.objectives.RealUID(peers.ALPHA, peers.BETA)


def calls(i: Inputs) -> Iterator[Call]:
    """The calls, each with its peers: those draw noise once, for the interpolant, and read it again for the loss."""

    def generator(noise: Tensor) -> Function:
        return lambda: rf.functional.generator_grads(
            i.objective, teacher_out=i.out, fake_out=i.other, x=i.x, x_t=None, coef=i.coef, noise=noise
        )

    def fake(noise: Tensor) -> Function:
        return lambda: rf.functional.fake_grads(
            i.objective, fake_out=i.out, x=i.x, x_t=None, coef=i.coef, noise=noise, n_real=i.half, noise_rows=i.half
        )

    def matching(noise: Tensor) -> Function:
        return lambda: rf.functional.matching_grads(out=i.out, x=i.x, x_t=None, coef=i.coef, noise=noise)

    def with_noise(interpolate: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: interpolate(x, t, torch.randn_like(x))

    plain: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
        "generator": (peers.generator_written_out, (i.out, i.other, i.x, i.noise), 3),
        "fake": (peers.fake_published, (i.out, i.x, i.shared), 1),
        "matching": (peers.matching_published, (i.out, i.x, i.noise), 1),
    }
    by_hand: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "generator": peers.generator_by_hand,
        "fake": peers.fake_by_hand,
        "matching": peers.matching_by_hand,
    }
    for name, ours, reads, writes in (
        ("generator", generator, 3, 3),
        ("fake", fake, 2, 1),
        ("matching", matching, 2, 1),
    ):
        function, arguments, wanted = plain[name]
        # Half of a fake turn's rows have noise of their own.
        given, more = (i.shared, reads + 0.5) if name == "fake" else (i.noise, reads + 1.0)
        ways = [
            Way(OURS, ours(i.key), reads=reads),
            Way(GIVEN, ours(given), reads=more),
            Way(EAGER, _with_gradients(function, arguments, wanted), reads=more),
            Way(BY_HAND, _compiled(by_hand[name], arguments), compiles=True, reads=more),
            Way(COMPILED, _with_gradients(_lazily(function), arguments, wanted), compiles=True, reads=more),
        ]
        yield Call(f"{name} loss and gradients", reads, writes, ways)
    interpolates = [
        Way(OURS, lambda: rf.interpolate(i.x, i.coef, i.key), reads=1),
        Way(GIVEN, lambda: rf.interpolate(i.x, i.coef, i.noise), reads=2),
        Way("eager", lambda: with_noise(peers.interpolate_lerp)(i.x, i.t), reads=1),
        Way("torch.compile", _compiled(with_noise(peers.interpolate), (i.x, i.t)), compiles=True, reads=1),
    ]
    yield Call("interpolate", 1, 1, interpolates)
    normals = [Way(OURS, lambda: normal(i.key, i.x)), Way("torch.randn_like", lambda: torch.randn_like(i.x))]
    yield Call("normals", 0, 1, normals)


def _with_gradients(function: Callable[..., Tensor], arguments: tuple[Tensor, ...], wanted: int) -> Function:
    leaves = tuple(a.detach().requires_grad_(k < wanted) for k, a in enumerate(arguments))
    return lambda: torch.autograd.grad(function(*leaves), leaves[:wanted])


def _lazily(function: Callable[..., Any]) -> Callable[..., Any]:
    # torch.compile of one function counts its variants over all shapes: each case compiles a copy of its own.
    made: list[Callable[..., Any]] = []

    def call(*arguments: Tensor) -> Any:
        if not made:
            torch.compiler.reset()
            made.append(torch.compile(function, dynamic=False, backend=BACKEND))
        return made[0](*arguments)

    return call


def _compiled(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Function:
    call = _lazily(function)
    return lambda: call(*arguments)


def _copy_bytes(dry: bool) -> int:
    return 1 << 12 if dry else COPY_BYTES


def copy(device: Device) -> Row:
    """The bandwidth of a large copy, which every kernel is held against."""
    size = _copy_bytes(device.dry)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    times = device.time(lambda: target.copy_(source))
    return _row("copy", (size,), torch.uint8, "Tensor.copy_", False, times, 2 * size)


def _passes(dry: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, str | None]]:
    """Shape, type and what is compiled, in the order of measuring.

    Two sizes come first without what compiles, then the compiled ways of the largest, then the other sizes, and what
    has to be compiled for them.
    """
    first, second, *others = DRY_SHAPES if dry else SHAPES
    compiling = (BY_HAND, COMPILED, "torch.compile")
    yield from ((shape, dtype, None) for shape in (first, second) for dtype in DTYPES)
    yield from ((first, DTYPES[0], name) for name in compiling)
    yield from ((shape, dtype, None) for shape in others for dtype in DTYPES)
    later = [(first, DTYPES[1]), *((shape, dtype) for shape in (second, *others) for dtype in DTYPES)]
    yield from ((shape, dtype, name) for name in compiling for shape, dtype in later)


def _in_pass(call: Call, compiled: str | None) -> list[Way]:
    return [way for way in call.ways if (way.name == compiled if way.compiles else compiled is None)]


def planned(dry: bool) -> Iterator[Row]:
    """The rows of :func:`measure` in their order, without figures."""
    none = Times(None, None, None)
    yield _row("copy", (_copy_bytes(dry),), torch.uint8, "Tensor.copy_", False, none, 0)
    named = list(calls(Inputs(DRY_SHAPES[0], torch.float32, torch.device("cpu"))))
    for shape, dtype, compiled in _passes(dry):
        for call in named:
            for way in _in_pass(call, compiled):
                yield _row(call.name, shape, dtype, way.name, way.name == OURS, none, 0)


def measure(device: Device, deadline: Deadline, write: Callable[[Row], None]) -> None:
    """Every call at every size, in the order of :func:`_passes`, until the time is over."""
    copied = copy(device)
    write(copied)
    ours: dict[tuple[Any, ...], float | None] = {}
    for shape, dtype, compiled in _passes(device.dry):
        if deadline.left < 0:
            return
        size = math.prod(shape) * dtype.itemsize
        for call in calls(Inputs(shape, dtype, device.device)):
            for way in _in_pass(call, compiled):
                if deadline.left < 0:
                    return
                left_out = None
                try:
                    times = device.time(way.run)
                except Exception as error:
                    # One way that does not run must not cost the others.
                    left_out, times = reason(error), Times(None, None, None)
                if way.name == OURS:
                    ours[call.name, shape, dtype] = times.device_ms
                moved = size * (way.reads + call.writes)
                row = _row(call.name, shape, dtype, way.name, way.name == OURS, times, moved)
                mine = ours.get((call.name, shape, dtype))
                row["ratio"] = times.device_ms / mine if times.device_ms and mine else None
                if left_out is not None:
                    row["left_out"] = left_out
                if row["GBps"] and copied["GBps"]:
                    row["share_of_copy"] = row["GBps"] / copied["GBps"]
                write(row)


def _row(
    case: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    way: str,
    ours: bool,
    times: Times,
    size: float,
) -> Row:
    return {
        "case": case,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "way": way,
        "ours": ours,
        "median_ms": times.device_ms,
        "min_ms": times.min_ms,
        "call_ms": times.call_ms,
        "ratio": None,
        "GBps": size / times.device_ms / 1e6 if times.device_ms else None,
    }


def tune(device: Device, deadline: Deadline, write: Callable[[Row], None]) -> None:
    """The generator's and the fake model's kernels over tile sizes, to check the closed-form rule of the tiling."""
    if backends.report()[-1].why_not is not None:
        return
    tiles = importlib.import_module("realuid_fast.kernels.tiles")
    for dtype in DTYPES:
        inputs = Inputs(SHAPES[0], dtype, device.device)
        for call in list(calls(inputs))[:2]:
            module = importlib.import_module(f"realuid_fast.kernels.{call.name.split()[0]}")
            for block in (1024, 2048, 4096):
                for per_thread in (4, 8, 16, 32):
                    if deadline.left < 0:
                        return

                    def cut(rows: int, dim: int, block: int = block, per_thread: int = per_thread) -> Any:
                        constants = {"ALIGN": math.gcd(dim, 16), "ROWS": 1, "BLOCK_D": block, "EVEN": dim % block == 0}
                        blocks = -(-dim // block)
                        return tiles.Tiling((blocks, rows, 1), constants, block // (32 * per_thread), blocks)

                    # A plan that was kept from another tiling would be repeated.
                    triton_backend.PLANS.clear()
                    with mock.patch.object(module, "tiling", cut):
                        times = device.time(call.ways[0].run)
                    triton_backend.PLANS.clear()
                    size = math.prod(SHAPES[0]) * dtype.itemsize * (call.reads + call.writes)
                    way = f"tile {block}, {per_thread} a thread"
                    write(_row(call.name, SHAPES[0], dtype, way, False, times, size))
