"""Runs the threads of many programs (CTAs) of a launch side by side, block by block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arithmetic  # noqa: F401  Registers its instructions.
from .instructions import UNSIGNED, Step, build
from .memory import TEBIBYTE, Array, Events, Memory, Sparse, Threads
from .program import Instruction, Program, Unsupported, register_bytes

KINDS = {size: np.dtype(kind) for size, kind in UNSIGNED.items()}
RUNNING, WAITING, ENDED = 0, 1, 2
WARP = 32


@functools.cache
def built(program: Program) -> list[list[tuple[Instruction, Step]]]:
    """The steps of each block: built once for all launches of a kernel."""
    return [[(each, build(each, program)) for each in block] for block in program.blocks]


class Machine:
    """Registers and shared memory of some programs, and the launch's global memory.

    Args:
        arguments: NumPy scalars, one a parameter; tensors as addresses into ``buffers``.
        programs: numbers of those that run, of ``grid``'s.
        order: ``together`` runs the warps side by side, ``forward`` and ``reverse`` one after another up to a barrier.
        error: -1, 0 or 1 times the documented error of each approximate instruction is added to its result.
    """

    def __init__(
        self,
        program: Program,
        arguments: Sequence[Any],
        buffers: list[Memory | Sparse],
        grid: tuple[int, int, int],
        programs: Array,
        events: Events,
        order: str = "together",
        error: int = 0,
    ):
        self.program, self.arguments, self.buffers, self.events, self.error = program, arguments, buffers, events, error
        threads, count = program.threads, len(programs)
        self.lanes = threads * count
        self.local = np.repeat(np.arange(count), threads)
        thread = np.tile(np.arange(threads, dtype=np.uint32), count)
        where = np.repeat(programs, threads)
        self.warp = thread // WARP
        self.who = Threads(where * (threads // WARP) + self.warp, where, np.zeros(self.lanes, np.int64))
        self.special = {"%tid.x": thread, "%laneid": thread % WARP, "%ntid.x": np.full(self.lanes, threads, np.uint32)}
        axes = (where % grid[0], where // grid[0] % grid[1], where // (grid[0] * grid[1]))
        for axis, at, size in zip("xyz", axes, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = at.astype(np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(self.lanes, size, np.uint32)
        # Every program has its own region, as far from the next as its alignment asks.
        self.region = -(-max(program.shared, 16) // 16) * 16
        content = np.full(self.region * count, 0xCB, np.uint8)
        self.shared = Memory("shared memory", 0, content, written=np.zeros(len(content), bool))
        self.registers: dict[str, Array] = {}
        self.order, self.executed = order, 0

    # -- registers

    def read(self, name: str) -> Array:
        found = self.registers.get(name)
        if found is None:
            self.events.add(True, "register read before any write", name)
            found = self.registers[name] = np.full(self.lanes, 0x7FC0, UNSIGNED[register_bytes(name)])
        return found

    def write(self, name: str, values: Array, active: Array | None) -> None:
        kind = KINDS[register_bytes(name)]
        if values.itemsize != kind.itemsize:
            raise Unsupported(f"{name} takes {kind.itemsize} bytes, got {values.dtype}")
        if values.shape != (self.lanes,):
            values = np.full(self.lanes, values)
        if values.dtype != kind:
            values = values.view(kind)
        if active is not None:
            before = self.registers.get(name)
            values = np.where(active, values, kind.type(0) if before is None else before)
        self.registers[name] = values

    # -- memory

    def access(
        self, space: str, address: Array, dtype: Any, values: list[Array] | int, active: Array | None, text: str
    ) -> list[Array]:
        """Load that many values from each address, or store ``values``, for the lanes that are active."""
        count = values if isinstance(values, int) else len(values)
        lanes = np.arange(self.lanes) if active is None else np.flatnonzero(active)
        if not len(lanes):  # two accesses in three, of tails that a launch does not have
            return [np.zeros(self.lanes, dtype)] * count
        address = np.broadcast_to(address, self.lanes)[lanes]
        what, width = "load" if isinstance(values, int) else "store", np.dtype(dtype).itemsize * count
        found = [np.zeros(self.lanes, dtype) for _ in range(count)]
        for memory, chosen in self._memories(space, address):
            at, good = memory.places(address[chosen], width, self.events, f"{space} {what}", text)
            mine = lanes[chosen][good]
            if not len(mine):
                continue
            if space == "shared":
                self.events.add(bool((at + width > self.program.shared).any()), f"shared {what} out of bounds", text)
                at = at % self.region + self.local[mine] * self.region
            if isinstance(values, int):
                for kept, value in zip(
                    found, memory.load(at, dtype, count, self.who[mine], self.events, text), strict=True
                ):
                    kept[mine] = value
            else:
                given = [np.broadcast_to(value, self.lanes)[mine] for value in values]
                memory.store(at, given, self.who[mine], self.events, text)
        return found

    def _memories(self, space: str, address: Array) -> list[tuple[Memory | Sparse, Array | slice]]:
        if space == "shared":
            return [(self.shared, slice(None))]
        number = (address >> np.uint64(TEBIBYTE)).astype(np.int64) - 1
        known = (number >= 0) & (number < len(self.buffers))
        self.events.add(not known.all(), "access outside every tensor", "")
        if known[0] and (number == number[0]).all():
            return [(self.buffers[number[0]], slice(None))]
        return [(self.buffers[n], number == n) for n in np.unique(number[known])]

    # -- control

    def run(self) -> None:
        """Every thread to its end."""
        steps = built(self.program)
        block, state = np.zeros(self.lanes, np.int64), np.full(self.lanes, RUNNING)
        warps = range(self.program.threads // WARP)
        groups = {
            "together": [np.ones(self.lanes, bool)],
            "forward": [self.warp == warp for warp in warps],
            "reverse": [self.warp == warp for warp in reversed(warps)],
        }[self.order]
        while (state != ENDED).any():
            for group in groups:
                while (runnable := (state == RUNNING) & group).any():
                    # Threads that parted meet again where their blocks do: the earliest block is the one that waits.
                    first = int(block[runnable].min())
                    self._block(steps[first], first, runnable & (block == first), block, state)
                    state[(state == RUNNING) & (block == len(steps))] = ENDED
            self._barrier(block, state)

    def _block(
        self, steps: list[tuple[Instruction, Step]], number: int, here: Array, block: Array, state: Array
    ) -> None:
        everyone = bool(here.all())
        block[here] = number + 1
        for instruction, step in steps:
            self.executed += 1
            active: Array | None = None if everyone else here
            if instruction.guard is not None:
                taken = self.read(instruction.guard) ^ instruction.negated
                active = taken if everyone else taken & here
                active = None if active.all() else active
            chosen = slice(None) if active is None else active
            match instruction.parts[0]:
                case "bra":
                    block[chosen] = self.program.labels[instruction.operands[0]]
                case "ret" | "exit":
                    state[chosen] = ENDED
                case "bar":
                    state[chosen] = WAITING
                case _:
                    step(self, active)

    def _barrier(self, block: Array, state: Array) -> None:
        """Let those programs go on whose threads all wait, at one barrier."""
        shape = (-1, self.program.threads)
        waiting, alive = (state == WAITING).reshape(shape), (state != ENDED).reshape(shape)
        ready = (waiting == alive).all(1) & alive.any(1)
        if not ready.any():
            if alive.any():
                raise RuntimeError("a barrier that not all threads reach")
            return
        at = block.reshape(shape)
        latest, earliest = np.where(waiting, at, -1).max(1), np.where(waiting, at, len(self.program.blocks) + 1).min(1)
        self.events.add(bool((latest != earliest)[ready].any()), "threads wait at different barriers", "bar.sync")
        gone_on = np.repeat(ready, self.program.threads)
        state[gone_on & (state == WAITING)] = RUNNING
        self.who.interval[gone_on] += 1
