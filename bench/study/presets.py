"""Every preset's student beside its teacher, at equal updates over several seeds: ``python -m bench.study.presets``.

Trains the teachers that are not shipped, then one student for each preset and seed, each a process of one thread; a
shared teacher is trained once. What a finished run left in the working folder is used again where its configuration is
still the same, so an interrupted command goes on where it was. Writes bench/results/presets.json, in which rows of
presets that were not asked for stay as they are, and from it docs/presets.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from realuid_fast import cli, data, teachers
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.evaluate.table import sampler
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import free_cores
from realuid_fast.settings import Config
from realuid_fast.train.hooks import Interrupted
from realuid_fast.train.logging import read_csv

from .. import machine
from . import family
from .compare import run_all

ROOT = Path(__file__).resolve().parent.parent.parent
UPDATES = {"digits": 400, "digit_pairs": 400}  # of a student; else POINTS
POINTS = 2000
STEPS = 100  # of the teachers
QUIET = [
    *("run.threads=1", "run.progress=false", "run.tensorboard=false"),
    *("run.sample_every=0", "run.checkpoint_every=0", "run.teacher_steps=0"),
]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 for input that cannot be used, or 128 and a signal's number."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = _parser().parse_args(words)
    if asked.page:
        asked.docs.write_text(page(json.loads(asked.out.read_text())))
        return 0
    try:
        run(asked, shlex.join(["python", "-m", "bench.study.presets", *words]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"{stop}; the same command goes on", file=sys.stderr)
        return stop.code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.study.presets", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these presets (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: the free cores)")
    parser.add_argument(
        "--updates", type=int, help=f"updates of every student (default: {POINTS} on points, {UPDATES['digits']} else)"
    )
    parser.add_argument("--teacher-updates", type=int, help="updates of every teacher (default: its preset's)")
    parser.add_argument("--samples", type=int, help="samples of every distance (default: the preset's)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-presets"), help="working folder")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "presets.json", help="JSON file")
    parser.add_argument("--page", action="store_true", help="train nothing: write the page from the JSON file")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "presets.md", help="generated table")
    return parser


def run(asked: argparse.Namespace, command: str) -> None:
    """Train what is missing, then measure and write.

    Raises:
        UserError: an unknown preset, numbers out of range, or a run that failed.
        Interrupted: after a signal.
    """
    names = list(configs.presets()) if asked.only is None else asked.only
    jobs = free_cores() if asked.jobs is None else asked.jobs
    if jobs < 1 or not asked.seeds or min(asked.seeds) < 0:
        raise UserError("--jobs must be at least 1 and --seeds numbers from 0 on")
    students = {name: {seed: Student(name, seed, asked) for seed in asked.seeds} for name in names}
    every = [student for seeds in students.values() for student in seeds.values()]
    (asked.work / "runs").mkdir(parents=True, exist_ok=True)
    for found in ([student.source for student in every], [student.teacher for student in every]):
        run_all({run.name: run.command for run in found if run is not None and not run.finished}, jobs, asked.work)
    for student in every:
        student.make_pairs()
    run_all({run.name: run.command for run in every if not run.finished}, jobs, asked.work)
    judge = Judge()
    # Rows of other calls stay in the file; each row names the command that made it.
    source = {"command": command, "machine": machine.describe()}
    rows = {name: {**judge.row(name, list(seeds.values())), **source} for name, seeds in students.items()}
    kept = {row["preset"]: row for row in json.loads(asked.out.read_text())["rows"]} if asked.out.is_file() else {}
    merged = {**kept, **rows}
    content = {
        "format": 1,
        "benchmark": "presets",
        "rows": [merged[name] for name in sorted(merged)],
    }
    asked.out.write_text(json.dumps(content, indent=1) + "\n")
    asked.docs.write_text(page(content))
    print(f"written to {asked.out} and {asked.docs}")


class Run:
    """One training in the working folder; ``config`` is what it resolves to."""

    role = "teacher"

    def __init__(self, name: str, preset: str, overrides: list[str], work: Path) -> None:
        self.name, self.folder = name, work / "runs" / name
        self.file = self.folder / f"{self.role}.safetensors"
        self.config: Config = configs.load(configs.preset(preset), overrides)
        job = "distill" if self.role == "student" else "train-teacher"
        words = [sys.executable, "-m", "realuid_fast", job, "--preset", preset, "--out", str(self.folder)]
        again = ["--overwrite"] if (self.folder / "config.yaml").is_file() else []
        self.command = [*words, *again, "--set", *overrides]

    @property
    def finished(self) -> bool:
        """Whether the folder holds the result of this very configuration."""
        kept = self.folder / "config.yaml"
        if not (self.file.is_file() and kept.is_file()):
            return False
        found = configs.load_kept(kept)
        # A student's run is kept with its teacher's network.
        return (replace(found, network=self.config.network) if self.role == "student" else found) == self.config


class Student(Run):
    """One student; its :attr:`teacher` is the run that makes it, None for a shipped one."""

    role = "student"

    def __init__(self, preset: str, seed: int, asked: argparse.Namespace) -> None:
        config = configs.load(configs.preset(preset))
        samples = [] if asked.samples is None else [f"run.evaluate_samples={asked.samples}"]
        updates = asked.updates or UPDATES.get(config.data["name"], POINTS)
        own = [f"run.seed={seed}", f"distill.updates={updates}", f"run.evaluate_every={updates}", *samples]
        self.preset, self.seed = preset, seed
        self.teacher: Run | None = None
        self.source: Run | None = None  # the teacher that the teacher learns from
        if config.distill.teacher not in teachers.SHIPPED:
            # runs/presets/NAME/teacher.safetensors: the preset that trains it.
            maker = Path(config.distill.teacher).parent.name
            teaching = [] if asked.teacher_updates is None else [f"teacher.updates={asked.teacher_updates}"]
            teaching += [*QUIET, "run.evaluate_every=0"]
            if guided := configs.load(configs.preset(maker)).teacher.guided:
                first = Path(guided).parent.name
                self.source = Run(f"teacher-{first}", first, teaching, asked.work)
                teaching = [*teaching, f"teacher.guided={self.source.file}"]
            self.teacher = Run(f"teacher-{maker}", maker, teaching, asked.work)
            own.append(f"distill.teacher={self.teacher.file}")
        self._pairs = None
        if config.distill.regression.pairs:
            self._pairs = asked.work / Path(config.distill.regression.pairs).name
            own.append(f"distill.regression.pairs={self._pairs}")
        self._before: Path | None = None
        self._making: list[str] = []
        made_by = {"previous": ["regression", "distill.regression.distance=huber"], "first_stage": ["sfd"]}
        for key, making in made_by.items():
            if getattr(config.distill.regression, key):
                self._before = asked.work / "runs" / f"{preset}-before-seed{seed}" / "student.safetensors"
                self._making = making
                own.append(f"distill.regression.{key}={self._before}")
        super().__init__(f"{preset}-seed{seed}", preset, [*QUIET, *own], asked.work)

    def make_pairs(self) -> None:
        """Make the pairs and the earlier student that the preset reads, where they are not there, as its file says."""
        if self._before is not None and not self._before.is_file():
            maker, *changed = self._making
            words = ["distill", "--preset", maker, "--out", str(self._before.parent), "--overwrite", "--set"]
            settings = [*QUIET, f"run.seed={self.seed}", f"distill.updates={self.config.distill.updates}"]
            settings += [*changed, "run.evaluate_every=0"]
            if cli.main([*words, *settings]):
                raise UserError(f"the earlier student {self._before} could not be made")
        if self._pairs is not None and not self._pairs.is_file():
            words = ["sample", "--model", self.config.distill.teacher, "--count", "2000", "--steps", "20", "--pairs"]
            if cli.main([*words, "--out", str(self._pairs)]):
                raise UserError(f"the pairs {self._pairs} could not be made")


class Judge:
    """Makes a preset's row; data sets and teachers that presets share are measured once."""

    def __init__(self) -> None:
        self._measures: dict[str, Measure] = {}
        self._teachers: dict[tuple[str, int], dict[str, float]] = {}

    def row(self, preset: str, students: Sequence[Student]) -> Row:
        """The table's row of a preset."""
        config = students[0].config
        measure = self._measure(config)
        last = [read_csv(student.folder / "distances.csv")[-1] for student in students]
        described = teachers.load(students[0].file).description
        return {
            "preset": preset,
            "data": config.data["name"],
            "metric": measure.name,
            "path": described.path,
            "predict": described.predict,
            "match": config.path.match,
            "objective": config.distill.objective.title,
            "updates": config.distill.updates,
            "fake_turns": config.distill.fake_turns,
            "samples": config.run.evaluate_samples,
            "seeds": [student.seed for student in students],
            "teacher_steps": STEPS,
            "teacher": self._teacher(config),
            "floor": measure.floor().as_dict(),
            "student": {name: [row[name] for row in last] for name in measure.columns},
        }

    def _measure(self, config: Config) -> Measure:
        key = json.dumps(config.data, sort_keys=True)
        if key not in self._measures:
            self._measures[key] = Measure(data.load(config.data))
        return self._measures[key]

    def _teacher(self, config: Config) -> dict[str, float]:
        key = (config.distill.teacher, config.run.evaluate_samples)
        if key not in self._teachers:
            model, measure = teachers.load_teacher(key[0]), self._measure(config)
            noise = evaluation_noise(measure.heldout.shape[1:], key[1])
            made, _ = generate(sampler(model, STEPS), noise, *measure.conditions(model.net, len(noise)))
            self._teachers[key] = measure(made).as_dict()
        return self._teachers[key]


def page(content: dict[str, Any]) -> str:
    """``docs/presets.md``."""
    lines = [
        "# The presets",
        "",
        "Every family of inverse distillation as one configuration: `realuid-fast distill --preset NAME`. Where the",
        "teacher is not shipped, `realuid-fast train-teacher --preset NAME` trains it; the preset's file says how",
        "(`realuid_fast/configs/presets/`).",
        "",
        "Generated by `python -m bench.study.presets`; below the tables, what made which rows. Distances to",
        f"held-out data: of the teacher after {STEPS} steps, and of the one-step student as mean ± standard deviation",
        "over seeds.",
        "Those of different data do not compare, and so few updates rank no method: they show that each one trains.",
        "",
        "## The family tree",
        "",
        r"With $\Delta = f^* - f$. Sums run over a sample's elements, means over the batch",
        "([the symbols](mathematics.md)). A system with a formula beside it has no public code that it was compared",
        "with: a test holds value and gradient to the formula, written out in float64. The tests of decoupled DMD and",
        "of guided distillation go through the trainer instead, in float32. A system without a preset is a setting of",
        "another's.",
        "",
        *family.table(_on_mnist()),
        "",
        *_of_mnist(),
    ]
    rows = content["rows"]
    for name in sorted({row["data"] for row in rows}):
        of_data = [row for row in rows if row["data"] == name]
        paired = "pair_error" in of_data[0]["student"]
        lines += [
            f"## {name}",
            "",
            f"{of_data[0]['metric']}; {of_data[0]['floor']['distance']:.3g} for the training data itself."
            + (" In brackets the error a pair, root of the mean square over pixels." if paired else ""),
            "",
            "| preset | path, prediction | match space | teacher | student | updates | command |",
            "|---|---|---|---:|---:|---:|---|",
            *(_line(row, paired) for row in of_data),
            "",
        ]
    for command, described in {row["command"]: row["machine"] for row in rows}.items():
        names = ", ".join(row["preset"] for row in rows if row["command"] == command)
        lines += [f"`{command}` on {machine.sentence(described)}: {names}.", ""]
    return "\n".join(lines)


def _family() -> dict[str, Any]:
    """The results of ``python -m bench.study.mnist --group family``; empty where there are none."""
    file = ROOT / "bench" / "results" / "mnist" / "family.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _on_mnist() -> dict[str, float]:
    return {row["name"].removeprefix("family-"): row["final"][0] for row in _family().get("rows", [])}


def _of_mnist() -> list[str]:
    """The lines that explain the column of MNIST's distances."""
    if not (found := _family()):
        return []
    teacher = found["teachers"]["teacher"]["distance"]
    return [
        f"MNIST: distance to the held-out images at 16x16 after {found['updates']} updates, one seed, with the",
        f"networks, rates and five fake turns of the configuration `mnist` (`{found['command']}`). Its teacher is at",
        f"{teacher:.1f} after 100 Euler steps. Students are of one step, but those of `add`, `dmd2` and the moments in",
        "several steps have four, and that of `sfd` has five. So few updates rank no method.",
        "",
    ]


def _line(row: Row, paired: bool) -> str:
    def spread(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3g} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2g}"

    teacher, student = f"{row['teacher']['distance']:.3g}", spread(row["student"]["distance"])
    if paired:
        teacher += f" ({row['teacher']['pair_error']:.3f})"
        student += f" ({statistics.mean(row['student']['pair_error']):.3f})"
    cells = [row["preset"], f"{row['path']}, {row['predict']}", row["match"], teacher, student]
    command = f"`realuid-fast distill --preset {row['preset']} --set distill.updates={row['updates']} --out FOLDER`"
    return f"| {' | '.join(cells)} | {row['updates']:,} | {command} |"


if __name__ == "__main__":
    sys.exit(main())
