"""Tables and plots of the study, from the finished runs and their scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realuid_fast.models.pictures import grid, save_png

from .arms import MAIN, UID, Arm
from .criterion import arrival, end, paired, verdict

COLUMNS = 5  # panels of a row of curves
Scored = Mapping[str, Sequence[Mapping[str, Any]]]  # by arm, every seed's scores and curve


def comparison(results: Scored, longer: str) -> dict[str, Any]:
    """The registered quantities of every arm: arrivals, and paired differences to UID and to UID with as much time.

    Args:
        results: ``scores`` and ``curve`` of every seed, by arm.
        longer: the arm of UID with as much time.
    """
    ends = [end(run["curve"]) for run in results[UID]]
    final = {name: [run["scores"]["distance"] for run in runs] for name, runs in results.items()}
    found: dict[str, Any] = {"uid_end": ends}
    of_uid: list[int] = []
    for name, runs in results.items():
        arrivals = [arrival(run["curve"], target) for run, target in zip(runs, ends, strict=True)]
        found[name] = {"arrivals": arrivals, "final": final[name]}
        at = [value for value in arrivals if value is not None]
        if name == UID:
            of_uid = at
        elif len(at) == len(of_uid) == len(runs):
            found[name]["sooner"] = paired(at, of_uid)
        for other in {UID, longer} & set(results) - {name}:
            difference = paired(final[name], final[other])
            found[name][f"less_{other}"] = {**difference, "verdict": verdict(difference)}
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """The page's tables."""
    rows, scores, longer = content["comparison"], content["results"], content["longer"]
    updates, seeds = content["updates"], content["seeds"]
    lines = [
        f"| {len(seeds)} seeds | updates to UID's end, of {updates:,}; less UID's: mean, 95 % interval "
        "| final distance (each seed) | less UID at equal updates: mean, 95 % interval "
        "| less UID at equal time: mean, 95 % interval | cost of an update |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm in content["arms"]:
        row, cost = rows[arm["name"]], content["costs"]["ratio"].get(arm["name"])
        lines.append(
            f"| {arm['title']} | {_arrivals(row)} | {_each(row['final'])} | {_apart(row, UID)} "
            f"| {_apart(row, longer)} | {'1.00' if cost is None else f'{cost:.2f}'} |"
        )
    lines += [
        "",
        "| | distance to held-out images (95 % bootstrap interval) | to training images | precision | recall | kernel "
        "distance | memorised |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, of_row in [
        ("10,000 training images", [content["floor"]]),
        *((row["title"], [row["scores"]]) for row in content["teacher"]),
        *((arm["title"], [run["scores"] for run in scores[arm["name"]]]) for arm in content["arms"]),
    ]:
        lines.append(f"| {title} | {_scores(of_row)} |")
    return "\n".join(lines) + "\n"


def group(results: Scored, arms: Sequence[Arm], costs: Mapping[str, float], updates: int) -> list[dict[str, Any]]:
    """Rows of arms: final distances, their paired difference to another arm's, cost, and distance in UID's time.

    Args:
        results: ``scores`` and ``curve`` of every seed, by arm.
        arms: the arms, with those that they are compared with.
        costs: an update's cost in updates of UID, by arm.
        updates: UID's updates, whose time is the common one.
    """
    final = {name: [run["scores"]["distance"] for run in runs] for name, runs in results.items()}
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"name": arm.name, "title": arm.title, "final": final[arm.name], "against": arm.against}
        if arm.against:
            difference = paired(final[arm.name], final[arm.against])
            row["less"] = {**difference, "verdict": verdict(difference)}
        if (cost := costs.get(arm.name)) is not None:
            row["cost"] = cost
            row["in_time"] = [_within(run["curve"], updates / cost) for run in results[arm.name]]
        rows.append(row)
    return rows


def _within(curve: Sequence[tuple[int, float]], updates: float) -> float:
    """The distance at a curve's last point up to a number of updates."""
    return [distance for update, distance in curve if update <= updates][-1]


def group_markdown(rows: Sequence[Mapping[str, Any]], updates: int) -> str:
    """The table of :func:`group`."""
    titles = {row["name"]: row["title"] for row in rows}
    lines = [
        "| | final distance (each seed) | less another arm's: mean, 95 % interval | cost of an update | distance on "
        f"the way, when {updates:,} updates of UID would be over |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        less = ""
        if (found := row.get("less")) is not None:
            less = f"{titles[row['against']]}: {_interval(found)}"
        cost = f"{row['cost']:.2f} | {_each(row['in_time'])}" if "cost" in row else " | "
        lines.append(f"| {row['title']} | {_each(row['final'])} | {less} | {cost} |")
    return "\n".join(lines) + "\n"


def _arrivals(row: Mapping[str, Any]) -> str:
    each = ", ".join("never" if value is None else f"{value:,}" for value in row["arrivals"])
    if (found := row.get("sooner")) is None:
        return each
    low, high = found["interval"]
    return f"{each}; {found['mean']:+,.0f}{'' if math.isnan(low) else f', {low:+,.0f} to {high:+,.0f}'}"


def _each(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def _apart(row: Mapping[str, Any], other: str) -> str:
    if (found := row.get(f"less_{other}")) is None:
        return ""
    return _interval(found)


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean']:+.2f}{'' if math.isnan(low) else f', {low:+.2f} to {high:+.2f}'}: {found['verdict']}"


def _scores(runs: Sequence[Mapping[str, Any]]) -> str:
    def mean(name: str) -> float:
        return statistics.mean(run[name] for run in runs)

    spread = ", ".join(f"{run['distance']:.2f} ({run['interval'][0]:.2f} to {run['interval'][1]:.2f})" for run in runs)
    return (
        f"{spread} | {mean('to_train'):.2f} | {mean('precision'):.3f} | {mean('recall'):.3f} "
        f"| {mean('kernel'):.1f} | {mean('memorised'):.3f}"
    )


def curves(results: Scored, arms: Sequence[Arm], teacher: float, floor: float, file: Path) -> None:
    """One panel an arm: its seeds' curves beside those of the arm that it is compared with, UID if none is named.

    An arm whose other has no results, such as a group's first, has no panel. The teacher and the training images are
    lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [(arm, arm.against or UID) for arm in arms if arm.name != UID]
    shown = [(arm, other) for arm, other in pairs if other in results]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.1 * min(COLUMNS, len(shown)), 3.4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    titles = {arm.name: arm.title for arm in (*MAIN, *arms)}
    for index, (arm, other) in enumerate(shown):
        axes = figure.add_subplot(rows, min(COLUMNS, len(shown)), index + 1)
        for name, colour in ((other, "0.35"), (arm.name, "C1")):
            for run in results[name]:
                points = [point for point in run["curve"] if point[0]]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1)
        axes.axhline(teacher, linestyle="--", color="C0", linewidth=1)
        axes.axhline(floor, linestyle=":", color="C2", linewidth=1)
        axes.set(title=f"{arm.title}\norange; grey: {titles[other]}", xlabel="updates", yscale="log")
        axes.title.set_fontsize(9 if len(arm.title) < 30 else 6)
        if index % COLUMNS == 0:
            axes.set_ylabel("Fréchet distance to held-out images\nteacher dashed, training images dotted", fontsize=8)
    figure.savefig(file, format="png")


def samples(rows: Sequence[Tensor], file: Path, columns: int = 24) -> None:
    """The first samples of several sources, one source a row; generated ones are from the same noise."""
    save_png(grid(torch.cat([row[:columns] for row in rows]), columns, enlarge=2), file)
