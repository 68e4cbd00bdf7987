"""The benchmarks' plots: time and share of the limit over size, a step's breakdown, growth with its fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import COPIES, OURS, Row, by_case, kind, share_of_copy


def times(rows: Sequence[Row], file: Path) -> None:
    """Milliseconds of every way over elements, both logarithmic, a panel a call; float32 in the usual layout."""
    calls = _over_size(rows)
    figure, panels = _panels(len(calls))
    styles: dict[str, dict[str, Any]] = {OURS: {"color": "black", "linewidth": 2}}
    styles |= {name: {"color": "0.5", "linestyle": style} for name, style in zip(COPIES, (":", "--"), strict=True)}
    for axes, (call, cases) in zip(panels, calls.items(), strict=True):
        for name in dict.fromkeys(name for ways in cases for name in ways):
            points = [(_size(ways), ways[name]["median_ms"]) for ways in cases if name in ways]
            axes.plot(*zip(*points, strict=True), marker=".", label=name, **styles.get(name, {}))
        axes.set(title=call, xlabel="elements", xscale="log", ylabel="ms", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file)


def shares(rows: Sequence[Row], file: Path) -> None:
    """Speed of every call as a share of the faster copy of the same bytes, over elements."""
    figure, (axes,) = _panels(1)
    for call, cases in _over_size(rows).items():
        points = [(_size(ways), share) for ways in cases if (share := share_of_copy(ways)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=call)
    axes.axhline(1.0, linestyle="--", color="0.5", label="copying the same bytes")
    axes.set(xlabel="elements", xscale="log", ylabel="share of the faster copy", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(file)


def breakdown(rows: Sequence[Row], file: Path) -> None:
    """One bar a way, its phases from left to right, a panel a case; rows carry ``phases`` in milliseconds."""
    from matplotlib import colormaps

    cases = by_case(rows)
    figure, panels = _panels(len(cases), columns=1)
    phases = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    for axes, ways in zip(panels, cases, strict=True):
        ends = dict.fromkeys(ways, 0.0)
        for index, phase in enumerate(phases):
            widths = [row["phases"].get(phase, 0.0) for row in ways.values()]
            colour = colormaps["tab20"](index % 20)
            axes.barh(list(ways), widths, left=list(ends.values()), label=phase, color=colour)
            ends = {name: end + width for (name, end), width in zip(ends.items(), widths, strict=True)}
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
        axes.set(xlabel=name, ylabel="ms an update", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file)


def parity(curves: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """Losses over updates, a panel a loss, the first way as a broad band under the others."""
    names = list(next(iter(curves.values())))
    figure, panels = _panels(len(names), columns=1)
    for axes, name in zip(panels, names, strict=True):
        for index, (way, losses) in enumerate(curves.items()):
            style: dict[str, Any] = {
                "color": f"C{index}",
                "linewidth": 0.9,
                "linestyle": ("-", "-.", "-", "--", ":", "-")[index],
            }
            style |= {"color": "0.75", "linewidth": 5} if index == 0 else {}
            style |= {"color": "C3", "alpha": 0.35} if index == len(curves) - 1 else {}
            axes.plot(range(1, len(losses[name]) + 1), losses[name], label=way, **style)
        axes.set(xlabel="update", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file)


def _panels(count: int, columns: int = 2) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6 * columns, 4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def _over_size(rows: Sequence[Row]) -> dict[str, list[dict[str, Row]]]:
    """The float32 cases of every call in the usual layout, in order of size."""
    calls: dict[str, list[dict[str, Row]]] = {}
    for ways in sorted((ways for ways in by_case(rows) if kind(ways[OURS]) == "float32"), key=_size):
        calls.setdefault(ways[OURS]["case"], []).append(ways)
    return calls


def _size(ways: Mapping[str, Row]) -> int:
    return math.prod(ways[OURS]["shape"])
