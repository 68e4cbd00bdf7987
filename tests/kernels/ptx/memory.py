"""Guarded memory: every access is held to bounds, alignment, initialisation and the order that barriers give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# A global buffer of number i begins in the tebibyte i + 1, so an address says which tensor it was meant for.
TEBIBYTE = 40
NOBODY, SEVERAL = -1, -2


class Events(Counter[tuple[str, str]]):
    """The failures of an execution: the kind of each, and the instruction or the buffer where it happened."""

    def add(self, happened: bool, kind: str, where: str) -> None:
        if happened:
            self[kind, where] += 1


@dataclass
class Threads:
    """For each lane its warp and program (CTA) in the launch, and how many barriers the program has passed."""

    warp: Array
    program: Array
    interval: Array

    def __getitem__(self, chosen: Any) -> Threads:
        return Threads(self.warp[chosen], self.program[chosen], self.interval[chosen])


class Trace:
    """For each byte who accessed it last, or that several did, and when."""

    def __init__(self, size: int):
        self.last = Threads(*(np.full(size, NOBODY, np.int64) for _ in range(3)))

    def unordered(self, at: Array, by: Threads) -> bool:
        """Whether somebody else's access to ``at`` has no barrier between itself and this one of ``by``."""
        last = self.last[at]
        ordered = (last.program == by.program) & (last.interval < by.interval)
        return bool(((last.warp != NOBODY) & (last.warp != by.warp) & ~ordered).any())

    def note(self, at: Array, by: Threads) -> None:
        # An access that a barrier separates from this one is done: later ones need an order to this one only.
        done = (self.last.program[at] == by.program) & (self.last.interval[at] < by.interval)
        for mine, kept in ((by.warp, self.last.warp), (by.program, self.last.program)):
            before = np.where(done, NOBODY, kept[at])
            kept[at] = np.where((before == NOBODY) | (before == mine), mine, SEVERAL)
            kept[at[kept[at] != mine]] = SEVERAL
        self.last.interval[at] = by.interval


class Memory:
    """``size`` bytes from address ``base`` on; its first byte is as aligned as the real one's.

    ``written`` says which bytes hold something, ``inside`` which belong to the tensor and not to its gaps.
    """

    def __init__(self, name: str, base: int, content: Array, written: Array | None = None, inside: Array | None = None):
        self.name, self.base, self.size = name, base, len(content)
        self.before = base % 16
        room = -(-(self.before + self.size) // 16) * 16
        self.bytes = np.full(room, 0xA5, np.uint8)
        self.bytes[self.before : self.before + self.size] = content
        self.known = np.ones(room, bool)
        self.inside = np.ones(room, bool)
        for flags, given in ((self.known, written), (self.inside, inside)):
            if given is not None:
                flags[self.before : self.before + self.size] = given
        self.stored = np.zeros(room, bool)
        self.readers, self.writers = Trace(room), Trace(room)

    @property
    def content(self) -> Array:
        return self.bytes[self.before : self.before + self.size]

    @property
    def stored_bytes(self) -> Array:
        return self.stored[self.before : self.before + self.size]

    def places(self, address: Array, width: int, events: Events, what: str, text: str) -> tuple[Array, Array]:
        """Offsets of the accesses that are allowed, and which ones those are."""
        at = address.astype(np.int64) - self.base
        outside, crooked = (at < 0) | (at + width > self.size), (address.astype(np.int64) % width) != 0
        events.add(bool(outside.any()), f"{what} out of bounds", text)
        events.add(bool(crooked.any()), f"{what} misaligned", text)
        good = ~(outside | crooked)
        return at[good] + self.before, good

    def load(self, at: Array, dtype: Any, count: int, by: Threads, events: Events, text: str) -> list[Array]:
        size = np.dtype(dtype).itemsize
        units, who = self._units(at, size * count, by)
        events.add(not self.known[units].all(), "load of what nobody wrote", text)
        events.add(not self.inside[units].all(), "load from a gap of a tensor", text)
        events.add(self.writers.unordered(units, who), "race: load of what another warp wrote", text)
        self.readers.note(units, who)
        view = self.bytes.view(dtype)
        return [view[at // size + i] for i in range(count)]

    def store(self, at: Array, values: list[Array], by: Threads, events: Events, text: str) -> None:
        size = values[0].dtype.itemsize
        units, who = self._units(at, size * len(values), by)
        events.add(not self.inside[units].all(), "store into a gap of a tensor", text)
        events.add(self.readers.unordered(units, who), "race: store to what another warp read", text)
        view = self.bytes.view(values[0].dtype)
        for i, value in enumerate(values):
            k = at // size + i
            # Writing the same number twice does no harm; another number is a race, even within one instruction.
            contested = self.writers.unordered(*self._units(at + i * size, size, by))
            events.add(contested and bool((view[k] != value).any()), "race: two stores of different values", text)
            view[k] = value
            events.add(bool((view[k] != value).any()), "race: two stores of different values", text)
        self.writers.note(units, who)
        self.known[units] = self.stored[units] = True

    def _units(self, at: Array, width: int, by: Threads) -> tuple[Array, Threads]:
        """The bytes of all accesses, and who makes each."""
        return (at[:, None] + np.arange(width)).reshape(-1), by[np.repeat(np.arange(len(at)), width)]


class Sparse:
    """A tensor too large to hold: ``fill`` gives what elements read as, as bits; ``found`` keeps what was stored."""

    def __init__(self, name: str, base: int, size: int, itemsize: int, fill: Callable[[Array], Array]):
        self.name, self.base, self.size, self.before, self.fill = name, base, size, 0, fill
        self.bits = np.dtype(f"u{itemsize}")
        self.found: dict[int, int] = {}

    places = Memory.places

    def load(self, at: Array, dtype: Any, count: int, by: Threads, events: Events, text: str) -> list[Array]:
        size = np.dtype(dtype).itemsize
        steps = np.arange(size // self.bits.itemsize)
        elements = [(at + i * size)[:, None] // self.bits.itemsize + steps for i in range(count)]
        return [np.ascontiguousarray(self.fill(some)).view(dtype).reshape(-1) for some in elements]

    def store(self, at: Array, values: list[Array], by: Threads, events: Events, text: str) -> None:
        for i, value in enumerate(values):
            bits = np.ascontiguousarray(value).view(self.bits).reshape(len(at), -1)
            first = (at + i * value.dtype.itemsize) // self.bits.itemsize
            for k, numbers in zip(first.tolist(), bits.tolist(), strict=True):
                for j, number in enumerate(numbers):
                    events.add(self.found.get(k + j, number) != number, "race: two stores of different values", text)
                    self.found[k + j] = number
