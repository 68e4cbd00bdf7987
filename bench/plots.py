"""The benchmarks' plots: time and share of the limit over size, a step's breakdown, growth with its fits."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import COPIES, OURS, Row, by_case, kind, share_of_copy


def times(rows: Sequence[Row], file: Path) -> None:
    """Milliseconds over elements, both logarithmic, a panel a call; float32 in the usual layout.

    A panel has our call with and without autograd, the fastest of its plain ways and of its compiled ways at every
    size, and the faster copy of the same bytes. The report's table has every way.
    """
    calls = _over_size(rows)
    figure, panels = _panels(len(calls))
    for axes, (call, cases) in zip(panels, calls.items(), strict=True):
        for index, (label, belongs) in enumerate(_LINES.items()):
            found = [(_size(ways), [row["median_ms"] for name, row in ways.items() if belongs(name)]) for ways in cases]
            points = [(size, min(times)) for size, times in found if times]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label, **_STYLES[index])
        axes.set(title=call, xlabel="elements", xscale="log", ylabel="ms", yscale="log")
        axes.grid(alpha=0.3)
    _legend_below(figure, panels[0])
    figure.savefig(file)


_LINES: dict[str, Callable[[str], bool]] = {
    "realuid_fast": lambda name: name == OURS,
    "realuid_fast, forward and backward": lambda name: name == f"{OURS}, autograd",
    "the fastest in plain torch": lambda name: name.startswith("eager"),
    "the fastest by torch.compile": lambda name: name.startswith("torch.compile"),
    "copying the same bytes": lambda name: name in COPIES,
}
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linewidth": 2},
    {"color": "C0"},
    {"color": "C3"},
    {"color": "C1"},
    {"color": "0.5", "linestyle": ":"},
)


def shares(rows: Sequence[Row], file: Path) -> None:
    """Speed of every fused call as a share of the faster copy of the same bytes, over elements.

    The normals alone, which no call needs by themselves, are in the table only.
    """
    figure, (axes,) = _panels(1)
    for call, cases in _over_size(rows).items():
        points = [(_size(ways), share) for ways in cases if (share := share_of_copy(ways)) is not None]
        if points and call != "normals":
            axes.plot(*zip(*points, strict=True), marker=".", label=call)
    axes.axhline(1.0, linestyle="--", color="0.5")
    axes.set(xlabel="elements", xscale="log", ylabel="share of the faster copy", ylim=(0, None))
    axes.grid(alpha=0.3)
    _legend_below(figure, axes)
    figure.savefig(file)


# The phases of an update as the plot joins them: each name's beginnings.
_PARTS = {
    "generate": ("generate",),
    "fake model": ("fake forward", "fake backward"),
    "frozen networks": ("frozen",),
    "generator": ("generator forward", "generator backward"),
    "losses, interpolants, data": ("fake loss", "generator loss", "interpolate", "data"),
    "optimisers": ("fake optimiser", "generator optimiser"),
}


def breakdown(rows: Sequence[Row], file: Path) -> None:
    """One bar a way, its phases from left to right, a panel a case; rows carry ``phases`` in milliseconds."""
    cases = by_case(rows)
    figure, panels = _panels(len(cases), columns=1)
    for axes, ways in zip(panels, cases, strict=True):
        ends = dict.fromkeys(ways, 0.0)
        for part, beginnings in _PARTS.items():
            widths = [
                sum(ms for name, ms in row["phases"].items() if name.startswith(beginnings)) for row in ways.values()
            ]
            axes.barh(list(ways), widths, left=list(ends.values()), label=part)
            ends = {name: end + width for (name, end), width in zip(ends.items(), widths, strict=True)}
        axes.set(title=next(iter(ways.values()))["case"], xlabel="ms an update")
        axes.invert_yaxis()
    _legend_below(figure, panels[0])
    figure.savefig(file)


def growth(curves: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Points and fitted line of every curve, a panel an axis; a curve holds ``axis, label, n, ms`` and ``fitted``.

    A label is ``threads: formula of the fit``. The legend has the threads, a panel's title the formulas.
    """
    names = list(dict.fromkeys(curve["axis"] for curve in curves))
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        own = [curve for curve in curves if curve["axis"] == name]
        for index, curve in enumerate(own):
            axes.plot(curve["n"], curve["ms"], "o", color=f"C{index}", label=curve["label"].partition(":")[0])
            axes.plot(curve["n"], curve["fitted"], "-", color=f"C{index}", linewidth=1)
        axes.set_title("\n".join(curve["label"] for curve in own), fontsize=9)
        axes.set(xlabel=name, ylabel="ms an update", xlim=(0, None), ylim=(0, 1.1 * max(max(c["ms"]) for c in own)))
        axes.grid(alpha=0.3)
    _legend_below(figure, panels[0])
    figure.savefig(file)


WINDOW = 20  # updates of the parity plot's running mean
DRAWN = 5


def parity(curves: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """Running means of the losses over updates, a panel a loss, the first way as a broad band under the others.

    Of the ways between, those that change the memory layout alone are left to the table.
    """
    ways = [way for way in curves if not way.endswith("channels_last")][:DRAWN]
    names = list(next(iter(curves.values())))
    figure, panels = _panels(len(names), columns=1)
    for axes, name in zip(panels, names, strict=True):
        for index, way in enumerate(ways):
            style: dict[str, Any] = {
                "color": f"C{index}",
                "linewidth": 1,
                "linestyle": ("-", "-", "--", ":", "-")[index],
            }
            style |= {"color": "0.75", "linewidth": 5} if index == 0 else {}
            losses = curves[way][name]
            means = [sum(losses[max(0, i - WINDOW) : i]) / min(i, WINDOW) for i in range(1, len(losses) + 1)]
            axes.plot(range(1, len(losses) + 1), means, label=way, **style)
        axes.set(xlabel="update", ylabel=f"{name}, mean of {WINDOW} updates")
        axes.grid(alpha=0.3)
    _legend_below(figure, panels[0])
    figure.savefig(file)


def _legend_below(figure: Any, axes: Any) -> None:
    """One legend for all panels, below them, so that it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if figure.get_figwidth() < 8 else 3, fontsize=8)


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


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m bench.plots [FOLDER]``: draw every plot again from the results in a folder, measuring nothing."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description="draw every plot again from its results")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "results")
    folder: Path = parser.parse_args(argv).folder

    def rows(name: str, key: str = "rows") -> Any:
        return json.loads((folder / f"{name}.json").read_text())[key]

    times(rows("micro"), folder / "micro_time.png")
    shares(rows("micro"), folder / "micro_share.png")
    breakdown(rows("step"), folder / "step_phases.png")
    growth(rows("growth", "curves"), folder / "growth.png")
    parity({found["way"]: found["curves"] for found in rows("parity")}, folder / "parity.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
