"""UID against RealUID at equal updates over several seeds, each run a process of one thread."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import data, teachers
from ..errors import UserError
from . import config as configs
from .config import Config
from .evaluate import sampler
from .logging import convergence_plot, read_csv
from .loop import Interrupted
from .measure import Measure, evaluation_noise, generate

METHODS = {"UID": "uid", "RealUID": "realuid"}
RESULTS = ("compare.json", "compare.md", "compare.png")


def compare(config: Config, folder: Path, seeds: Sequence[int], jobs: int, overwrite: bool, resume: bool) -> str:
    """Train every method with every seed in ``folder/runs``, then write JSON, Markdown and plot; the Markdown.

    Finished runs are kept with ``resume``, unfinished ones continued.

    Raises:
        UserError: no seeds, a folder with results that nobody asked to replace, or a run that failed.
        Interrupted: after SIGINT or SIGTERM, when every running process has saved.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0 on, got {list(seeds)}")
    if config.run.evaluate_every < 1:
        raise UserError("run.evaluate_every must be at least 1 to compare curves")
    for objective in METHODS.values():
        replace(config.distill.objective, name=objective).build()
    judge = _Judge(config)
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None
    existing = [name for name in RESULTS if (folder / name).exists()]
    existing += [file.name for file in (folder / "runs").iterdir()]
    if existing and not (overwrite or resume):
        raise UserError(f"{folder} holds {existing[0]} already: give --resume, --overwrite or another folder")
    plan = {
        f"{objective}-seed{seed}": [f"distill.objective.name={objective}", f"run.seed={seed}"]
        for seed in seeds
        for objective in METHODS.values()
    }
    common = folder / "runs" / "common.yaml"
    configs.save(config, common)
    settings = ["run.threads=1", "run.progress=false", "run.tensorboard=false"]
    commands: dict[str, list[str]] = {}
    for name, own in plan.items():
        out = folder / "runs" / name
        if resume and (out / "student.safetensors").is_file():
            continue
        command = [sys.executable, "-m", "realuid_fast.cli", "distill", "--config", str(common), "--out", str(out)]
        if resume and list((out / "checkpoints").glob("update-*.pt")):
            command.append("--resume")
        elif (out / "config.yaml").is_file():
            command.append("--overwrite")
        commands[name] = [*command, "--set", *settings, *own]
    run_all(commands, jobs, folder)
    return summarise(judge, config, folder, seeds)


def run_all(commands: dict[str, list[str]], jobs: int, folder: Path) -> None:
    """Run commands by name, ``jobs`` at a time with one thread each, their words in ``folder/runs/NAME.log``.

    Raises:
        UserError: a command that failed, with its last line; the others are stopped.
        Interrupted: after SIGINT or SIGTERM, when every running process has ended.
    """
    waiting, running = dict(commands), dict[str, subprocess.Popen[bytes]]()
    received: list[int] = []
    before = {s: signal.signal(s, lambda signum, _: received.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while (waiting or running) and not received:
            while waiting and len(running) < max(jobs, 1):
                name, command = next(iter(waiting.items()))
                del waiting[name]
                print(f"started {name}", flush=True)
                log = (folder / "runs" / f"{name}.log").open("wb")
                # A session of its own: a Ctrl-C in the terminal reaches it once, through us.
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=log, env=environment, start_new_session=True
                )
                log.close()
            time.sleep(0.2)
            for name, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[name]
                if code:
                    lines = (folder / "runs" / f"{name}.log").read_text().strip().splitlines()
                    raise UserError(f"run {name} failed: {lines[-1] if lines else f'exit code {code}'}")
                print(f"finished {name}", flush=True)
    finally:
        for process in running.values():
            with suppress(ProcessLookupError):
                process.terminate()
        for process in running.values():
            process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received:
        raise Interrupted(received[0], folder)


class _Judge:
    """Data, measure and teacher of a comparison; loaded first, so that what cannot be used is refused at once."""

    def __init__(self, config: Config) -> None:
        settings = config.distill
        self.dataset = data.load(config.data)
        self.measure = Measure(self.dataset)
        self.teacher = teachers.load_teacher(settings.teacher, settings.teacher_network, settings.teacher_decay)

    def teacher_distance(self, steps: int, count: int) -> float:
        noise, conditions = (
            evaluation_noise(self.dataset.shape, count),
            self.measure.conditions(self.teacher.net, count),
        )
        return self.measure(generate(sampler(self.teacher, steps), noise, *conditions)[0]).distance


def summarise(judge: _Judge, config: Config, folder: Path, seeds: Sequence[int]) -> str:
    """Results of finished runs in ``folder/runs``: writes JSON, Markdown and plot, returns the Markdown."""
    measure = judge.measure
    teacher_distance = judge.teacher_distance(100, config.run.evaluate_samples)
    floor = measure.floor().distance
    curves = {
        name: [read_csv(folder / "runs" / f"{objective}-seed{seed}" / "distances.csv") for seed in seeds]
        for name, objective in METHODS.items()
    }
    summary = {name: _summary(runs, teacher_distance) for name, runs in curves.items()}
    target = statistics.mean(summary["UID"]["final"])
    for name, runs in curves.items():
        summary[name]["updates_to_uid_final"] = [_reached(run, target) for run in runs]
    content = {
        "metric": measure.name,
        "samples": config.run.evaluate_samples,
        "updates": config.distill.updates,
        "seeds": list(seeds),
        "teacher_100_steps": teacher_distance,
        "floor": floor,
        "summary": summary,
        "curves": curves,
        "config": configs.to_mapping(config),
    }
    (folder / "compare.json").write_text(json.dumps(content, indent=1) + "\n")
    text = _markdown(content)
    (folder / "compare.md").write_text(text)
    _plot(curves, teacher_distance, floor, measure.name, folder / "compare.png")
    return text


def _summary(runs: list[list[dict[str, float]]], teacher: float) -> dict[str, Any]:
    return {
        "final": [run[-1]["distance"] for run in runs],
        "best": [min(row["distance"] for row in run) for run in runs],
        "recall": [run[-1]["recall"] for run in runs],
        "precision": [run[-1]["precision"] for run in runs],
        "updates_to_teacher": [_reached(run, teacher) for run in runs],
    }


def _reached(run: list[dict[str, float]], target: float) -> int | None:
    """The first evaluated update at or below ``target``."""
    return next((int(row["update"]) for row in run if row["distance"] <= target), None)


def _markdown(content: dict[str, Any]) -> str:
    settings = configs.ObjectiveConfig(**{**content["config"]["distill"]["objective"], "name": METHODS["RealUID"]})
    objective = settings.build()
    labels = {
        "UID": "UID (alpha = beta = 1)",
        "RealUID": f"RealUID (alpha = {objective.alpha:g}, beta = {objective.beta:g})",
    }
    lines = [
        f"| {content['updates']:,} updates, {len(content['seeds'])} seeds | {content['metric']}: mean ± standard "
        "deviation (each seed) | best on the way | updates to the teacher's distance | updates to UID's final distance "
        "| precision | recall |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, label in labels.items():
        s = content["summary"][name]
        lines.append(
            f"| {label} | {_spread(s['final'])} | {_spread(s['best'])} | {_updates(s['updates_to_teacher'])} "
            f"| {_updates(s['updates_to_uid_final'])} | {statistics.mean(s['precision']):.3f} "
            f"| {statistics.mean(s['recall']):.3f} |"
        )
    lines.append(f"| teacher, 100 Euler steps | {content['teacher_100_steps']:.3g} | | | | | |")
    lines.append(f"| real training data | {content['floor']:.3g} | | | | | |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def _updates(values: list[int | None]) -> str:
    return ", ".join("never" if v is None else f"{v:,}" for v in values)


def _plot(
    curves: dict[str, list[list[dict[str, float]]]], teacher: float, floor: float, metric: str, file: Path
) -> None:
    means: dict[str, list[tuple[float, float]]] = {}
    spread: dict[str, list[tuple[float, float]]] = {}
    for name, runs in curves.items():
        points = list(zip(*runs, strict=False))
        finite = [p for p in points if all(math.isfinite(row["distance"]) for row in p)]
        means[name] = [(p[0]["update"], statistics.mean(row["distance"] for row in p)) for p in finite]
        spread[name] = [(min(row["distance"] for row in p), max(row["distance"] for row in p)) for p in finite]
    lines = {"teacher, 100 Euler steps": teacher, "real training data": floor}
    convergence_plot(means, lines, metric, file, spread)
