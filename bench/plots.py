"""The benchmarks' plots: time and share of the limit over size, a step's breakdown, growth with its fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import COPIES, OURS, Row, by_case, kind, share_of_copy


def _panels(count: int, columns: int = 2) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6 * columns, 4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)[:count]


def _over_size(rows: Sequence[Row], draw: Callable[[Any, list[dict[str, Row]]], None], label: str, file: Path) -> None:
    """One panel a call, its float32 cases in order of size."""
    cases = [ways for ways in by_case(rows) if OURS in ways and kind(ways[OURS]) == "float32"]
    calls = list(dict.fromkeys(ways[OURS]["case"] for ways in cases))
    figure, panels = _panels(len(calls))
    for axes, call in zip(panels, calls, strict=True):
        draw(axes, sorted((ways for ways in cases if ways[OURS]["case"] == call), key=lambda ways: _size(ways[OURS])))
        axes.set(title=call, xlabel="elements", xscale="log", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file)


def _size(row: Row) -> int:
    return math.prod(row["shape"])


def times(rows: Sequence[Row], file: Path) -> None:
    """Milliseconds of every way over elements, both logarithmic."""

    def draw(axes: Any, cases: list[dict[str, Row]]) -> None:
        styles: dict[str, dict[str, Any]] = {OURS: {"color": "black", "linewidth": 2}}
        styles |= {name: {"color": "0.5", "linestyle": style} for name, style in zip(COPIES, (":", "--"), strict=True)}
        for name in dict.fromkeys(name for ways in cases for name in ways):
            points = [(_size(ways[name]), ways[name]["median_ms"]) for ways in cases if name in ways]
            axes.plot(*zip(*points, strict=True), marker=".", label=name, **styles.get(name, {}))
        axes.set_yscale("log")

    _over_size(rows, draw, "ms", file)


def shares(rows: Sequence[Row], file: Path) -> None:
    """Speed as a share of the faster copy of the same bytes, over elements."""

    def draw(axes: Any, cases: list[dict[str, Row]]) -> None:
        points = [(_size(ways[OURS]), share) for ways in cases if (share := share_of_copy(ways)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", color="black", label=OURS)
        axes.axhline(1.0, linestyle="--", color="0.5", label="copying the same bytes")
        axes.set_ylim(bottom=0)

    _over_size(rows, draw, "share of copy", file)


def breakdown(rows: Sequence[Row], file: Path) -> None:
    """One bar a way, its phases from left to right, a panel a case; rows carry ``phases`` in milliseconds."""
    cases = by_case(rows)
    figure, panels = _panels(len(cases), columns=1)
    phases = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    colours = [f"C{index % 10}" for index in range(len(phases))]
    for axes, ways in zip(panels, cases, strict=True):
        ends = dict.fromkeys(ways, 0.0)
        for index, phase in enumerate(phases):
            widths = {name: row["phases"].get(phase, 0.0) for name, row in ways.items()}
            hatch = "//" if index >= 10 else None
            axes.barh(
                list(ways),
                list(widths.values()),
                left=list(ends.values()),
                label=phase,
                color=colours[index],
                hatch=hatch,
            )
            ends = {name: ends[name] + width for name, width in widths.items()}
        axes.set(title=next(iter(ways.values()))["case"], xlabel="ms an update")
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file)


def growth(curves: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Points and fitted line of every curve, a panel an axis; a curve holds ``axis, label, n, ms`` and ``fitted``."""
    names = list(dict.fromkeys(curve["axis"] for curve in curves))
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        for index, curve in enumerate(c for c in curves if c["axis"] == name):
            axes.plot(curve["n"], curve["ms"], "o", color=f"C{index}", label=curve["label"])
            axes.plot(curve["n"], curve["fitted"], "-", color=f"C{index}", linewidth=1)
        axes.set(xlabel=name, ylabel="ms", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.savefig(file)
