"""Measures on this machine what the model of docs/scaling.md assumes: ``python -m bench.ranks``, a minute.

Two ranks on gloo, a thread each. The seconds of an all-reduce by its size give the latency of a message and the
bandwidth; an update of the digits network on two ranks, with as many rows on each as on one process, is then held
against the model's: compute as long as on two processes that do not talk, and an all-reduce a turn. Writes ranks.json
and ranks.md, and the page's table. Wall time: nothing else must run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from realuid_fast.jobs import trainers
from realuid_fast.train import distributed

from . import report
from .scaling import PAGE, write
from .step import PROBLEMS

RANKS, ROUNDS = 2, 7
SIZES = (4, 4 * 2**10, 2**18, 2**22, 2**25, 4 * 35_700_000)  # bytes; the last is the CIFAR-10 network's gradient


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency of a message in seconds and bandwidth in bytes a second, from the smallest and the largest all-reduce.

    Two ranks send each other half of it twice, ``size / bandwidth + 2 latency`` (:func:`bench.scaling.all_reduce`).
    """
    (_, least), (size, most) = points[0], points[-1]
    return least / 2, size / (most - least)


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser("bench.ranks", __doc__, "time of updates on one process and on two (default 20, quick 2)")
    args = parser.parse_args(argv)
    described = report.start("bench.ranks", argv, 1) | {"clock": "wall time"}
    sizes, seconds = SIZES[:3] if args.quick else SIZES, report.seconds(args, 20.0, quick=2.0)
    alone, _ = on_processes(1, sizes, seconds, joined=False)
    apart, _ = on_processes(RANKS, sizes, seconds, joined=False)
    together, reduced = on_processes(RANKS, sizes, seconds)
    found = summary(alone, apart, together, list(zip(sizes, reduced, strict=True)))
    rows = [
        {"case": "update, digits network", "way": way, "ours": s == alone, "median_ms": 1e3 * s}
        for way, s in (("one process", alone), ("two processes", apart), ("two ranks", together))
    ]
    text = table(found)
    report.write(report.Results("ranks", described, rows, {"found": found}), args.out, {"ranks": text})
    if args.out == report.RESULTS and not args.quick:
        write(PAGE, text, "ranks")
    print(text)
    return 0


def on_processes(count: int, sizes: Sequence[int], seconds: float, joined: bool = True) -> tuple[float, list[float]]:
    """Median seconds of an update with the same rows on every process, and, joined, of an all-reduce of each size."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        common = count if joined else 1, f"file://{Path(folder) / 'meeting'}", sizes, seconds, results
        others = [context.Process(target=_rank, args=(i, *common)) for i in range(count)]
        for each in others:
            each.start()
        for each in others:
            each.join()
        if any(each.exitcode for each in others):
            raise SystemExit("a rank has failed, and says why above")
        update, reduced = results.get()
    return update, reduced


def _rank(rank: int, count: int, meeting: str, sizes: Sequence[int], seconds: float, results: Any) -> None:
    torch.set_num_threads(1)
    joined = distributed.group("gloo", init_method=meeting, rank=rank, world_size=count)
    with joined if count > 1 else contextlib.nullcontext():
        base = PROBLEMS["digits"]
        problem = replace(base, distill={"batch": 64 * count})
        trainer = trainers.distiller(*problem.make())
        updates = _times(trainer.update, seconds)
        reduced = []
        for size in sizes if count > 1 else ():
            buffer = torch.zeros(max(1, size // 4))
            reduced.append(min(_times(lambda sent=buffer: dist.all_reduce(sent), 0.0)))  # type: ignore[misc]
        if rank == 0:
            results.put((median(updates), reduced))


def _times(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call after a first one that does not count; every rank makes the same number of calls."""
    call()
    taken: list[float] = []
    rounds = ROUNDS
    while len(taken) < rounds:
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
        if len(taken) == ROUNDS and seconds:
            more = torch.tensor([int(seconds / median(taken))])
            if dist.is_initialized():
                dist.all_reduce(more, dist.ReduceOp.MIN)
            rounds = max(ROUNDS, int(more))
    return taken


def summary(alone: float, apart: float, together: float, reduced: list[tuple[int, float]]) -> dict[str, Any]:
    """The measurements, the cost of a message from them, and the update on two ranks that the model expects.

    ``apart`` is the time of an update on two processes that share nothing but the machine.
    """
    latency, bandwidth = fit(reduced)
    size = 4 * sum(p.numel() for p in PROBLEMS["digits"].make()[2].net.parameters())
    turns = PROBLEMS["digits"].make()[0].distill.fake_turns + 1
    added = turns * (size / bandwidth + 2 * latency)
    return {
        "update_1": alone, "update_apart": apart, "update_2": together, "all_reduce": reduced, "latency": latency,
        "bandwidth": bandwidth, "gradient": size, "turns": turns, "expected_2": apart + added,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The measured all-reduces, and the update beside the model's."""
    lines = [(f"{size:,}", f"{1e3 * s:.3g}", f"{size / s / 1e9:.3g}") for size, s in found["all_reduce"]]
    reduced = report.markdown(["all-reduce on 2 ranks, bytes", "ms", "GB/s"], lines)
    ms = {name: f"{1e3 * found[name]:.1f} ms" for name in ("update_1", "update_apart", "update_2", "expected_2")}
    return (
        f"{reduced}\nA message takes {1e6 * found['latency']:.0f} us, the wire {found['bandwidth'] / 1e9:.2g} GB/s. An "
        f"update of the digits network takes {ms['update_1']} on one process and {ms['update_apart']} on each of two "
        f"that share nothing but the machine. With {found['turns']} all-reduces of {found['gradient']:,} bytes, none "
        f"hidden, the model expects {ms['expected_2']} of two ranks with as many rows on each; measured were "
        f"{ms['update_2']}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
