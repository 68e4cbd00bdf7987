"""UID against RealUID at equal updates over several seeds: ``python -m bench.study.compare --out FOLDER``.

Each run is a process of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from realuid_fast import data, teachers
from realuid_fast.cli.parser import SHIPPED, add_folder, add_settings
from realuid_fast.cli.run import run
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.evaluate.table import sampler
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import free_cores
from realuid_fast.models.pictures import convergence_plot
from realuid_fast.settings import Config
from realuid_fast.streams import guarded
from realuid_fast.teachers import Model
from realuid_fast.train.checkpoint import files as checkpoints_in
from realuid_fast.train.hooks import Interrupted, stopping
from realuid_fast.train.logging import read_csv

METHODS = {"UID": "uid", "RealUID": "realuid"}
DISTANCES = ("distance", "distance_to_train", "distance_to_teacher")  # to the held-out data, the first
RESULTS = ("compare.json", "compare.md", "compare.png")


def compare(
    config: Config,
    folder: Path,
    seeds: Sequence[int],
    jobs: int,
    overwrite: bool,
    resume: bool,
    second: Config | None = None,
    samples: int = 0,
    common: bool = False,
) -> str:
    """Train every method with every seed in ``folder/runs``, then write JSON, Markdown and plot; returns the Markdown.

    With ``second`` every run has a second stage, which starts from the run's student and takes ``second`` as its
    configuration and the same method. With ``common`` both methods' second stages start from UID's student, so that a
    seed's two runs differ in the second stage alone.

    With ``resume`` finished runs are kept and unfinished ones continued. A point of a curve has
    ``run.evaluate_samples`` samples; the table's distances have ``samples`` (0: as many as a point). The table needs
    more, because with a few thousand samples one draw of the noise moves a distance by more than the methods differ.

    Raises:
        UserError: no seeds, ``common`` without a second stage, results in the folder without ``overwrite`` or
            ``resume``, or a run that failed.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, when every running process has saved.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0 on, got {list(seeds)}")
    if common and second is None:
        raise UserError("--common needs a second stage: give --then")
    stages = [config] if second is None else [config, second]
    for stage in stages:
        if stage.run.evaluate_every < 1:
            raise UserError("run.evaluate_every must be at least 1 to compare curves")
        for objective in METHODS.values():
            stage.distill.objective.of(objective).build()
    judge = _Judge(config, samples or config.run.evaluate_samples)
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None
    existing = [name for name in RESULTS if (folder / name).exists()]
    existing += [file.name for file in (folder / "runs").iterdir()]
    if existing and not (overwrite or resume):
        raise UserError(f"{folder} holds {existing[0]} already: give --resume, --overwrite or another folder")
    for number, stage in enumerate(stages):
        file = folder / "runs" / f"stage{number + 1}.yaml"
        configs.save(stage, file)
        commands: dict[str, list[str]] = {}
        for seed in seeds:
            for objective in _methods(number, common).values():
                out = _folder(folder, objective, seed, number)
                own = [f"distill.objective.name={objective}", f"run.seed={seed}"]
                if number:
                    first = METHODS["UID"] if common else objective
                    own.append(f"distill.start={_folder(folder, first, seed, number - 1)}")
                if not (resume and (out / "student.safetensors").is_file()):
                    commands[out.name] = _command(file, out, own, resume)
        run_all(commands, jobs, folder)
    return summarise(judge, stages, folder, seeds, common)


def _methods(stage: int, common: bool) -> dict[str, str]:
    """The methods that are trained in a stage."""
    return METHODS if stage or not common else {"UID": METHODS["UID"]}


def _folder(folder: Path, objective: str, seed: int, stage: int) -> Path:
    return folder / "runs" / (f"{objective}-seed{seed}" + ("-tuned" if stage else ""))


def _command(common: Path, out: Path, own: list[str], resume: bool) -> list[str]:
    command = [sys.executable, "-m", "realuid_fast", "distill", "--config", str(common), "--out", str(out)]
    if resume and checkpoints_in(out / "checkpoints"):
        command.append("--resume")
    elif (out / "config.yaml").is_file():
        command.append("--overwrite")
    # The teacher is measured once, for the table.
    quiet = ["run.threads=1", "run.progress=false", "run.tensorboard=false", "run.teacher_steps=0"]
    return [*command, "--set", *quiet, *own]


def run_all(
    commands: dict[str, list[str]], jobs: int, folder: Path, done: Callable[[str], None] = lambda name: None
) -> None:
    """Run commands by name, ``jobs`` at a time with one thread each; their output is in ``folder/runs/NAME.log``.

    ``done`` is called with the name of each command that has ended well.

    Raises:
        UserError: a command that failed, with its last line; the others are stopped.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, when every running process has ended.
    """
    waiting, running = dict(commands), dict[str, subprocess.Popen[bytes]]()
    received: list[int] = []
    before = {s: signal.signal(s, lambda signum, _: received.append(signum)) for s in stopping()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while (waiting or running) and not received:
            while waiting and len(running) < max(jobs, 1):
                name, command = next(iter(waiting.items()))
                del waiting[name]
                print(f"started {name}", flush=True)
                log = (folder / "runs" / f"{name}.log").open("wb")
                # A session of its own, so that a Ctrl-C in the terminal reaches the run only once, from this process.
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
                done(name)
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
    """Data, measure and teacher of a comparison. They are loaded first, so that bad ones are refused at once."""

    def __init__(self, config: Config, samples: int) -> None:
        settings = config.distill
        self.samples = samples
        self.dataset = data.load(config.data)
        self.measure = Measure(self.dataset)
        self.teacher = teachers.load_teacher(settings.teacher, config.teachers_network(), settings.teacher_decay)

    def __call__(self, model: Model, steps: int = 1, count: int = 0) -> Tensor:
        """Samples of a model from the noise of evaluations: ``count``, or as many as the table's distances have."""
        count = count or self.samples
        noise, conditions = evaluation_noise(self.dataset.shape, count), self.measure.conditions(model.net, count)
        return generate(sampler(model, steps), noise, *conditions)[0]


def summarise(judge: _Judge, stages: Sequence[Config], folder: Path, seeds: Sequence[int], common: bool = False) -> str:
    """Results of finished runs in ``folder/runs``: writes JSON, Markdown and plot, returns the Markdown."""
    count = stages[0].run.evaluate_samples
    measure = judge.measure
    # The training data's own distance is compared with a teacher's at as many samples: with fewer, any distance grows.
    floor_samples = len(measure.train)
    # Draw the largest number once: the noise and labels of a smaller number are the first ones of it.
    counts = {count, judge.samples, floor_samples}
    teacher = judge(judge.teacher, 100, max(counts))
    of_teacher = {number: measure(teacher[:number]).distance for number in counts}
    teacher_curve = of_teacher[count]
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[list[dict[str, float]]]] = {name: [[] for _ in seeds] for name in METHODS}
    before = 0
    for number, stage in enumerate(stages):
        trained = _methods(number, common)
        for name in METHODS:
            objective = trained.get(name, METHODS["UID"])
            folders = [_folder(folder, objective, seed, number) for seed in seeds]
            for curve, own in zip(curves[name], folders, strict=True):
                points = read_csv(own / "distances.csv")
                # A second stage's first point is the first stage's last.
                curve += [
                    {**point, "update": before + point["update"]} for point in points if not before or point["update"]
                ]
            if name not in trained:
                continue
            made = [judge(teachers.load(run / "student.safetensors", role="student")) for run in folders]
            ends = [measure(samples) for samples in made]
            setting = stage.distill.objective.of(objective).build()
            rows.append(
                {
                    "method": name,
                    "alpha": setting.alpha,
                    "beta": setting.beta,
                    "updates": before + stage.distill.updates,
                    "distance": [end.distance for end in ends],
                    "distance_to_train": [measure.to_train(samples) for samples in made],
                    "distance_to_teacher": [measure.between(samples, teacher[: len(samples)]) for samples in made],
                    "precision": [end.precision for end in ends],
                    "recall": [end.recall for end in ends],
                    "curve_end": [curve[-1]["distance"] for curve in curves[name]],
                }
            )
        before += stage.distill.updates
    target = statistics.mean(next(row for row in reversed(rows) if row["method"] == "UID")["curve_end"])
    content: dict[str, Any] = {
        "metric": measure.name,
        "samples": judge.samples,
        "curve_samples": count,
        "seeds": list(seeds),
        "common": common,
        "teacher_100_steps": of_teacher[judge.samples],
        "teacher_100_steps_to_train": measure.to_train(teacher[: judge.samples]),
        "teacher_100_steps_curve": teacher_curve,
        "floor": measure.floor().distance,
        "floor_samples": floor_samples,
        "teacher_100_steps_floor": of_teacher[floor_samples],
        "rows": rows,
        "updates_to": {
            name: {
                "teacher": [_reached(run, teacher_curve) for run in runs],
                "uid_end": [_reached(run, target) for run in runs],
            }
            for name, runs in curves.items()
        },
        "curves": curves,
        "config": [configs.to_mapping(stage) for stage in stages],
    }
    (folder / "compare.json").write_text(json.dumps(content, indent=1) + "\n")
    text = _markdown(content)
    (folder / "compare.md").write_text(text)
    _plot(curves, teacher_curve, content["floor"], judge.measure.name, folder / "compare.png")
    return text


def _reached(run: list[dict[str, float]], target: float) -> int | None:
    """The first evaluated update at or below ``target``."""
    return next((int(row["update"]) for row in run if row["distance"] <= target), None)


def _markdown(content: dict[str, Any]) -> str:
    lines = [
        f"| {len(content['seeds'])} seeds, {content['samples']:,} samples | updates | {content['metric']}: mean ± "
        "standard deviation (each seed) | to the training data | to the teacher's samples | precision | recall |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in content["rows"]:
        spreads = " | ".join(_spread(row[kind]) for kind in DISTANCES)
        lines.append(
            f"| {row['method']} (alpha = {row['alpha']:g}, beta = {row['beta']:g}{_outside(row['beta'])}) "
            f"| {row['updates']:,} "
            f"| {spreads} | {statistics.mean(row['precision']):.3f} | {statistics.mean(row['recall']):.3f} |"
        )
    held, train = content["teacher_100_steps"], content["teacher_100_steps_to_train"]
    lines.append(f"| teacher, 100 Euler steps | | {held:.3g} | {train:.3g} | 0 | | |")
    if content["common"]:
        uid, real = content["rows"][-2:]
        apart = " | ".join(_apart(uid[kind], real[kind]) for kind in DISTANCES)
        lines.append(f"| RealUID less UID after a common first stage | | {apart} | | |")
    number = f"{content['floor_samples']:,} samples"
    lines.append(f"| teacher, 100 Euler steps, {number} | | {content['teacher_100_steps_floor']:.3g} | | | | |")
    lines.append(f"| real training data, {number} | | {content['floor']:.3g} | 0 | | | |")
    lines += [
        "",
        f"| on the curve ({content['curve_samples']:,} samples a point) | updates to the teacher's distance "
        f"({content['teacher_100_steps_curve']:.3g} at as many) | updates to UID's final distance |",
        "|---|---:|---:|",
    ]
    for name, reached in content["updates_to"].items():
        lines.append(f"| {name} | {_updates(reached['teacher'])} | {_updates(reached['uid_end'])} |")
    return "\n".join(lines) + "\n"


def _outside(beta: float) -> str:
    """A remark for the table about a beta outside the paper's range, which is (0, 1]."""
    return ", outside the paper's (0, 1]" if beta > 1 else ""


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def _apart(uid: list[float], real: list[float]) -> str:
    """The mean difference of pairs, RealUID less UID, with its standard error."""
    values = [b - a for a, b in zip(uid, real, strict=True)]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    each = ", ".join(f"{v:.2f}" for v in values)
    return f"{statistics.mean(values):.2f}, standard error {error:.2f} ({each})"


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


def _compare(arguments: argparse.Namespace) -> None:
    config = configs.load(arguments.config or "digits", arguments.set)
    # Runs on one GPU share its memory: how many fit, only whoever asks for them knows.
    alone = config.run.device.startswith("cuda")
    jobs = (1 if alone else free_cores()) if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if arguments.samples < 0:
        raise UserError(f"--samples must not be negative, got {arguments.samples}")
    second = configs.load(arguments.then, arguments.set) if arguments.then else None
    text = compare(
        config, arguments.out, arguments.seeds, jobs, arguments.overwrite, arguments.resume, second, arguments.samples,
        arguments.common,
    )  # fmt: skip
    print("\n" + text)
    print(f"written to {arguments.out}: compare.json, compare.md, compare.png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit codes are those of ``realuid-fast``."""
    command = argparse.ArgumentParser(
        prog="python -m bench.study.compare", description=(__doc__ or "").partition("\n")[0]
    )
    command.add_argument("--config", help=f"a YAML file or one of: {SHIPPED} (default: digits)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    command.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: free cores; 1 on a GPU)")
    command.add_argument("--then", metavar="CONFIG", help="a second stage from every student, e.g. digits_tune")
    text = "the second stage of both methods from UID's student, so that a seed's pair differs in that stage alone"
    command.add_argument("--common", action="store_true", help=text)
    command.add_argument(
        "--samples", type=int, default=0, help="samples of the table's distances (default: the curve's)"
    )
    add_settings(command)
    add_folder(command)
    return guarded(lambda: run(command.parse_args(argv), _compare))


if __name__ == "__main__":
    raise SystemExit(main())
