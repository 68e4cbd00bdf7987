"""How the cost of an update grows: ``python -m bench.growth``, minutes; ``--quick`` one.

The digits network's update (batch 16, one fake turn, one average where the axis is another) is timed over batch, image
size, parameters, fake turns and averages, on one thread and on two. Each curve is fitted twice, as ``a + b n`` and as
``c n^p``, and the closer fit is stated with its largest relative error. Writes growth.json, growth.md and a plot. All
points of an axis take turns in one process (:mod:`bench.timing`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from . import machine, plots, report, timing
from .report import OURS, Row
from .step import PROBLEMS, Problem, trainer
from .timing import Case, Way

SMALL = {"batch": 16, "fake_turns": 1, "ema": (0.99,), "export": 0.0}


@dataclass(frozen=True)
class Fit:
    """``a + b n`` (``model`` "linear") or ``a n^b`` ("power"), and its largest relative error over the points."""

    model: str
    a: float
    b: float
    error: float

    def __call__(self, n: Sequence[float]) -> list[float]:
        return [self.a + self.b * x if self.model == "linear" else self.a * x**self.b for x in n]

    def __str__(self) -> str:
        return f"{self.a:.3g} ms + {self.b:.3g} ms n" if self.model == "linear" else f"{self.a:.3g} ms n^{self.b:.2f}"


def fit(n: Sequence[float], ms: Sequence[float]) -> Fit:
    """The closer of a line and a power law, each by least squares of relative errors (of logarithms for the law).

    Args:
        n: at least three different positive sizes.
        ms: positive times.
    """
    x, y = np.asarray(n, dtype=float), np.asarray(ms, dtype=float)
    # Each equation is divided by its time, so that large n do not outweigh small ones.
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)
    power, scale = np.polyfit(np.log(x), np.log(y), 1)
    fits = [Fit("linear", float(a), float(b), 0.0), Fit("power", float(np.exp(scale)), float(power), 0.0)]
    fits = [replace(f, error=float(np.max(np.abs(np.asarray(f(n)) / y - 1)))) for f in fits]
    return min(fits, key=lambda f: f.error)


def axes(quick: bool = False) -> dict[str, list[tuple[float, Problem]]]:
    """For every axis, its points: the size ``n`` and the problem to update."""
    base = replace(PROBLEMS["digits"], distill=SMALL)

    def wider(channels: int) -> Problem:
        return replace(base, network={**base.network, "num_channels": channels})

    points: dict[str, list[tuple[float, Problem]]] = {
        "batch": [(n, replace(base, distill={**SMALL, "batch": n})) for n in (8, 16, 32, 64, 128, 256)],
        "pixels of an image": [(side**2, replace(base, shape=(1, side, side))) for side in (8, 16, 24, 32)],
        "thousand parameters": [(_parameters(wider(n)) / 1000, wider(n)) for n in (8, 16, 32, 64)],
        "fake turns": [(n, replace(base, distill={**SMALL, "fake_turns": n})) for n in (1, 2, 4, 8)],
        "averages": [(n, replace(base, distill={**SMALL, "ema": _decays(n)})) for n in (1, 2, 4, 8)],
    }
    return {axis: of_axis[:3] for axis, of_axis in points.items()} if quick else points


def _parameters(problem: Problem) -> int:
    return sum(parameter.numel() for parameter in problem.make()[2].net.parameters())


def _decays(count: int) -> tuple[float, ...]:
    return tuple(1 - 0.01 / 2**i for i in range(count))


def measure(axis: str, points: Sequence[tuple[float, Problem]], seconds: float) -> tuple[list[Row], dict[str, Any]]:
    """One row a point, and the curve through them with its fit."""
    made = [
        Way(f"n = {n:,.0f}", trainer(problem, OURS).update, ours=index == 0)
        for index, (n, problem) in enumerate(points)
    ]
    rows = timing.measure(Case(f"update over {axis}", (), made), rounds=60, calls=1, seconds=seconds)
    for row, (n, _) in zip(rows, points, strict=True):
        # Every row counts as ours, so that it is compared with its own old time.
        row |= {"way": OURS, "ours": True, "shape": [round(n)]}
    sizes, ms = [n for n, _ in points], [row["median_ms"] for row in rows]
    found = fit(sizes, ms)
    threads = torch.get_num_threads()
    label = f"{threads} thread{'s' if threads > 1 else ''}: {found}"
    curve = {
        "axis": axis,
        "threads": threads,
        "n": sizes,
        "ms": ms,
        "label": label,
        "fitted": found(sizes),
        **vars(found),
    }
    return rows, curve


def table(curves: Sequence[Mapping[str, Any]], described: Mapping[str, Any]) -> str:
    """One sentence for every curve, and the machine below."""
    lines = []
    for curve in curves:
        found = Fit(*(curve[key] for key in ("model", "a", "b", "error")))
        span = f"{curve['n'][0]:,.0f} to {curve['n'][-1]:,.0f}"
        lines.append([curve["axis"], span, curve["threads"], found, f"{curve['error']:.0%}"])
    header = ["n", "from, to", "threads", "an update of n takes", "largest error"]
    return report.markdown(header, lines, words=2) + (
        f"\n`{described['command']}` on {machine.sentence(described)}. The digits network at batch {SMALL['batch']} "
        "with one fake turn and one average, where n is something else. The clock is the thread's processor time on "
        "one thread, the wall's on more.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser("bench.growth", __doc__, "time of an axis after warming up (default 25, quick 8)")
    parser.add_argument("--threads", type=report.threads, nargs="+", help="torch threads (default 1 2, quick 1)")
    args = parser.parse_args(argv)

    threads = args.threads or ([1] if args.quick else [1, 2])
    chosen = {axis: points for axis, points in axes(args.quick).items() if args.only in axis}
    if not chosen:
        parser.error(f"no axis has {args.only!r} in its name")
    described = report.start("bench.growth", argv, threads[0])
    rows: list[Row] = []
    curves = []
    for count in threads:
        torch.set_num_threads(count)
        for axis, points in chosen.items():
            print(f"{axis}, {count} thread(s)", file=sys.stderr, flush=True)
            of_axis, curve = measure(axis, points, report.seconds(args, 25.0, quick=8.0))
            rows += of_axis
            curves.append(curve)
    described["threads"] = ", ".join(map(str, threads))
    text = table(curves, described)
    report.write(report.Results("growth", described, rows, {"curves": curves}), args.out, {"growth": text})
    plots.growth(curves, args.out / "growth.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
