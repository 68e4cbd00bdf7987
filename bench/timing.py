"""The clock of every benchmark: all ways of computing a case in turn, round after round, so that drift slows all alike.

On one thread the clock is the thread's processor time, which waiting for a busy neighbour does not lengthen; on more it
is the wall's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

TURN = 1e-3  # seconds that short calls are repeated for, so that reading the clock does not show


@dataclass(frozen=True)
class Way:
    """One way of computing a case. The others are compared with the one that is ``ours``.

    ``times_itself``: ``run`` returns its seconds instead of being timed.
    """

    name: str
    run: Callable[[], Any]
    ours: bool = False
    times_itself: bool = False


@dataclass(frozen=True)
class Case:
    """One computation with the ways of doing it that may be compared; ``bytes`` is what it has to read and write."""

    name: str
    shape: tuple[int, ...]
    ways: list[Way]
    dtype: str = "float32"
    layout: str = "contiguous"
    bytes: int = 0


def clock() -> Callable[[], float]:
    """Seconds of the thread's processor time on one torch thread, of the wall on more."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def clock_name() -> str:
    return "processor time of the one thread" if torch.get_num_threads() == 1 else "wall time"


class Stopwatch:
    """``with watch("fake forward"):`` adds up the seconds of each name, like the trainer's phases, by this clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        now = clock()
        start = now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - start


def measure(
    case: Case, rounds: int = 60, calls: int = 3, seconds: float = float("inf"), least: int = 3
) -> list[dict[str, Any]]:
    """Times every way of a case in turn; one row a way.

    Args:
        case: what to time.
        rounds: turns of every way.
        calls: counted calls of a turn, whose median is the turn's time. They follow one that is not counted, with the
            caches as another way left them, and very short ones are repeated under one clock. With 1, for calls too
            long for either to matter, a turn is just that call.
        seconds: stop earlier once the case has taken so long by the wall...
        least: ...but not before so many rounds.

    Returns:
        ``case, shape, dtype, layout, threads, way, ours``, the median and minimum over rounds ``median_ms, min_ms``,
        ``ratio``, the median over rounds of the time divided by ours in the same round, and, where the bytes are known,
        ``GBps``: the case's bytes by the median.
    """
    repeats = [_repeats(way, calls) for way in case.ways]
    taken: list[list[float]] = [[] for _ in case.ways]
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for way, repeat, times in zip(case.ways, repeats, taken, strict=True):
            if calls > 1:
                _seconds(way, 1)
            times.append(median(_seconds(way, repeat) for _ in range(calls)))
    ours = taken[next(i for i, way in enumerate(case.ways) if way.ours)]
    return [_row(case, way, times, ours) for way, times in zip(case.ways, taken, strict=True)]


def _repeats(way: Way, calls: int) -> int:
    """How many calls to put under one clock, found while warming up."""
    way.run()
    if calls == 1 or way.times_itself:
        return 1
    taken = min(_seconds(way, 1) for _ in range(3))
    return max(1, min(200, int(TURN / max(taken, 1e-9))))


def _seconds(way: Way, repeats: int) -> float:
    """Seconds of one call, the mean of ``repeats`` under one clock."""
    if way.times_itself:
        return float(way.run())
    now = clock()
    result = None
    start = now()
    for _ in range(repeats):
        result = way.run()
    taken = now() - start
    # The last result is freed outside the clock, as a training loop frees it one step later.
    del result
    return taken / repeats


def _row(case: Case, way: Way, times: list[float], ours: list[float]) -> dict[str, Any]:
    middle = median(times)
    row = {
        "case": case.name,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "threads": torch.get_num_threads(),
        "way": way.name,
        "ours": way.ours,
        "median_ms": 1e3 * middle,
        "min_ms": 1e3 * min(times),
        "ratio": median(other / mine for other, mine in zip(times, ours, strict=True)),
    }
    if case.bytes:
        row["GBps"] = case.bytes / middle / 1e9
    return row
