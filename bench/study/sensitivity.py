"""Updates that RealUID needs to the distance that UID ends at, over alpha and beta.

``python -m bench.study.sensitivity`` makes the table and the plot.
Eight Gaussians in the plane, configuration ``mixture`` with the paper's five fake turns (its appendix D.1 calls fewer
than three unstable); every run takes as many updates as UID's. A run has arrived at the first evaluation from which two
in a row are at or below UID's end. UID's end is the mean of its last five evaluations over all seeds, since two
thousand samples leave one evaluation noisy. Finished runs are kept in ``--out`` and not run again. Writes
sensitivity.json, .md and .png to ``bench/results`` (``--results``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from realuid_fast import data, teachers
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.jobs.train import train

from .. import machine

ALPHAS = (0.88, 0.90, 0.92, 0.94, 0.96, 0.98)
RATIOS = (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06)
FAKE_TURNS = 5
SETTINGS = ["distill.batch=128", f"distill.fake_turns={FAKE_TURNS}", "run.tensorboard=false", "run.evaluate_every=0"]
LAST = 5  # evaluations that make an end
Curve = list[tuple[int, float]]


def run(folder: Path, alpha: float, ratio: float, seed: int, updates: int, every: int, samples: int) -> Curve:
    """Distances on the way of one student; ``alpha = 1`` is UID."""
    file = folder / f"{alpha:g}-{ratio:g}-turns{FAKE_TURNS}-seed{seed}-{updates}-{every}-{samples}.json"
    if file.is_file():
        return [(int(update), float(distance)) for update, distance in json.loads(file.read_text())]
    torch.set_num_threads(1)
    objective = ["name=uid"] if alpha == 1 else ["name=realuid", f"alpha={alpha}", f"beta={round(alpha * ratio, 6)}"]
    teacher = folder / "teacher" / "teacher.safetensors"
    changes = [f"distill.objective.{word}" for word in objective]
    changes += [f"distill.teacher={teacher}", f"distill.updates={updates}", f"run.seed={seed}"]
    config = configs.load("mixture", [*SETTINGS, *changes])
    dataset = data.load(config.data)
    trainer = trainers.distiller(config, dataset, teachers.load_teacher(teacher))
    measure, noise = Measure(dataset), evaluation_noise(dataset.shape, samples)
    curve: Curve = []
    for update in range(1, updates + 1):
        trainer.update()
        if update % every == 0:
            curve.append((update, measure(generate(trainer.sample, noise)[0]).distance))
    part = file.with_suffix(".part")
    part.write_text(json.dumps(curve))
    part.replace(file)
    return curve


def arrival(curve: Curve, target: float) -> int | None:
    """The update of the first of two evaluations in a row at or below ``target``."""
    for (update, now), (_, then) in itertools.pairwise(curve):
        if now <= target and then <= target:
            return update
    return None


def end(curve: Curve) -> float:
    return statistics.mean(distance for _, distance in curve[-LAST:])


def summary(curves: dict[tuple[float, float], list[Curve]]) -> dict[str, Any]:
    """UID's end and, for every cell, each seed's arrival and end."""
    uid = curves[1.0, 1.0]
    target = statistics.mean(end(curve) for curve in uid)
    cells = [
        {
            "alpha": alpha,
            "ratio": ratio,
            "arrivals": [arrival(curve, target) for curve in own],
            "ends": [end(curve) for curve in own],
        }
        for (alpha, ratio), own in curves.items()
    ]
    return {"target": target, "cells": cells}


def markdown(content: dict[str, Any]) -> str:
    """The paper's table: alpha down, beta / alpha across; median arrival, how many seeds arrived, mean end."""
    cells = {(cell["alpha"], cell["ratio"]): cell for cell in content["cells"]}
    uid = cells[1.0, 1.0]
    lines = [
        f"UID's end: {content['target']:.4f} (each seed: {', '.join(f'{v:.4f}' for v in uid['ends'])}), which UID "
        f"itself reaches after {_arrivals(uid)}. A cell: median updates to it (seeds that arrive), mean distance "
        f"at the end after {content['updates']:,} updates of {content['fake_turns']} fake turns, "
        f"{len(content['seeds'])} seeds. `{content['command']}`, revision {content['machine']['revision']}.",
        "",
        "| alpha \\ beta / alpha | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |",
        "|---|" + "---:|" * len(RATIOS),
    ]
    for alpha in ALPHAS:
        row = (cells[alpha, ratio] for ratio in RATIOS)
        lines.append(
            f"| {alpha:g} | " + " | ".join(f"{_arrivals(c)}, {statistics.mean(c['ends']):.3f}" for c in row) + " |"
        )
    return "\n".join(lines) + "\n"


def _arrivals(cell: dict[str, Any]) -> str:
    arrived = [value for value in cell["arrivals"] if value is not None]
    if not arrived:
        return f"never (0/{len(cell['arrivals'])})"
    return f"{statistics.median(arrived):,.0f} ({len(arrived)}/{len(cell['arrivals'])})"


def plot(content: dict[str, Any], file: Path) -> None:
    """Two heat maps: the mean arrival, runs that never arrive counting as the whole run, and the mean end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = {(cell["alpha"], cell["ratio"]): cell for cell in content["cells"]}
    whole = content["updates"]
    maps = {
        "updates to UID's end": lambda c: statistics.mean(whole if v is None else v for v in c["arrivals"]),
        "distance at the end": lambda c: statistics.mean(c["ends"]),
    }
    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, value) in enumerate(maps.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        grid = [[value(cells[alpha, ratio]) for ratio in RATIOS] for alpha in ALPHAS]
        image = axes.imshow(grid, cmap="viridis_r", aspect="auto")
        for y, row in enumerate(grid):
            for x, number in enumerate(row):
                axes.text(x, y, f"{number:.3g}", ha="center", va="center", fontsize=7, color="white")
        axes.set(title=f"{title} (UID: {value(cells[1.0, 1.0]):.3g})", xlabel="beta / alpha", ylabel="alpha")
        axes.set_xticks(range(len(RATIOS)), [f"{ratio:g}" for ratio in RATIOS])
        axes.set_yticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS])
        figure.colorbar(image)
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study.sensitivity", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"), help="the runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results", help="what is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--every", type=int, default=20, help="updates between evaluations (default: 20)")
    parser.add_argument("--samples", type=int, default=2000, help="samples of an evaluation (default: 2000)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each (default: 1)")
    options = parser.parse_args(argv)

    if not (options.out / "teacher" / "teacher.safetensors").is_file():
        train("train-teacher", configs.load("mixture", SETTINGS), options.out / "teacher", False, True, "")
    cells = [(1.0, 1.0), *((alpha, ratio) for alpha in ALPHAS for ratio in RATIOS)]
    numbers = (options.updates, options.every, options.samples)
    with ProcessPoolExecutor(options.jobs) as pool:
        # Seed by seed, so that a run that is cut short has whole tables of fewer seeds.
        futures = {
            (cell, seed): pool.submit(run, options.out, *cell, seed, *numbers)
            for seed in options.seeds
            for cell in cells
        }
        curves = {cell: [futures[cell, seed].result() for seed in options.seeds] for cell in cells}
    content = {
        "command": "python -m bench.study.sensitivity",
        "machine": machine.describe(),
        "fake_turns": FAKE_TURNS,
        "updates": options.updates,
        "every": options.every,
        "samples": options.samples,
        "seeds": options.seeds,
        **summary(curves),
        "curves": [{"alpha": alpha, "ratio": ratio, "runs": own} for (alpha, ratio), own in curves.items()],
    }
    (options.results / "sensitivity.json").write_text(json.dumps(content) + "\n")
    (options.results / "sensitivity.md").write_text(markdown(content))
    plot(content, options.results / "sensitivity.png")
    print(markdown(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
