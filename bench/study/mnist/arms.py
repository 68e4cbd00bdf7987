"""The runs of the study: what each arm changes in the configuration ``mnist``, and the command that makes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from realuid_fast.jobs import config as configs
from realuid_fast.train.checkpoint import files as checkpoints_in

SEEDS = (0, 1, 2)
UID = "uid"
QUIET = ("run.threads=1", "run.progress=false", "run.tensorboard=false")


@dataclass(frozen=True)
class Arm:
    """One way to train a student: its folder's name, its title in tables, and the settings that it changes."""

    name: str
    title: str
    changes: tuple[str, ...]


def _realuid(alpha: float, beta: float) -> Arm:
    objective = f"distill.objective={{name: realuid, alpha: {alpha}, beta: {beta}}}"
    return Arm(f"realuid-{alpha:g}-{beta:g}", f"RealUID ({alpha:g}, {beta:g})", (objective,))


# UID first: the others are paired with it. Every pair lies inside the paper's domain, 0 < alpha, beta <= 1.
MAIN = (
    Arm(UID, "UID (1, 1)", ("distill.objective={name: uid}",)),
    _realuid(0.92, 0.94),
    _realuid(0.98, 0.96),
    _realuid(0.92, 0.92),
    _realuid(0.8, 1.0),
)


def longer(ratio: float, extra: list[str]) -> Arm:
    """UID with as much time as the others: its updates are theirs times what an update of theirs costs, of UID's."""
    updates = round(configs.load("mnist", extra).distill.updates * ratio)
    return Arm("uid-longer", f"UID (1, 1), {updates:,} updates", (*MAIN[0].changes, f"distill.updates={updates}"))


@dataclass(frozen=True)
class Place:
    """The folders of a study: ``data`` has MNIST's four files, ``out`` all that is made."""

    data: Path
    out: Path

    @property
    def classifier(self) -> Path:
        return self.out / "classifier.safetensors"

    @property
    def teacher(self) -> Path:
        return self.out / "teacher" / "teacher.safetensors"

    def run(self, arm: Arm, seed: int) -> Path:
        """The folder of one student's run."""
        return self.out / "runs" / f"{arm.name}-seed{seed}"

    def common(self) -> list[str]:
        """Settings of every run."""
        return [*QUIET, f"data.path={self.data}", f"run.classifier={self.classifier}"]

    def settings(self, arm: Arm, seed: int, extra: list[str]) -> list[str]:
        """Everything that a student's run changes in the configuration, ``extra`` before what makes the arm."""
        return [*self.common(), f"distill.teacher={self.teacher}", f"run.seed={seed}", *extra, *arm.changes]


def classifier_command(place: Place, extra: list[str]) -> list[str]:
    """The command that trains the classifier, in whose features all distances are measured."""
    own = ["--out", str(place.classifier), "--epochs", str(EPOCHS), "--set", f"data.path={place.data}", *extra]
    return [sys.executable, "-m", "realuid_fast", "train-classifier", "--config", "mnist", *own]


EPOCHS = 8
TEACHER_SAMPLES = 2000  # of an evaluation on the teacher's way, whose samples take 100 evaluations of the network each


def teacher_command(place: Place, extra: list[str]) -> list[str]:
    """The command that trains the teacher, or goes on with it."""
    own = [*place.common(), f"run.evaluate_samples={TEACHER_SAMPLES}", *extra]
    return _command("train-teacher", place.out / "teacher", own)


def student_commands(place: Place, arms: tuple[Arm, ...], seeds: tuple[int, ...], extra: list[str]) -> Iterator[Run]:
    """The runs that are not finished, seed by seed: a study that is cut short has whole comparisons of fewer seeds."""
    for seed in seeds:
        for arm in arms:
            folder, changes = place.run(arm, seed), place.settings(arm, seed, extra)
            if not finished(folder, changes):
                yield Run(folder.name, _command("distill", folder, changes))


@dataclass(frozen=True)
class Run:
    """A command and the name of its log."""

    name: str
    command: list[str]


def finished(folder: Path, changes: list[str]) -> bool:
    """Whether the folder holds the student of this very configuration."""
    kept = folder / "config.yaml"
    done = (folder / "student.safetensors").is_file() and kept.is_file()
    return done and configs.load_kept(kept) == configs.load("mnist", changes)


def _command(job: str, folder: Path, changes: list[str]) -> list[str]:
    words = [sys.executable, "-m", "realuid_fast", job, "--config", "mnist", "--out", str(folder)]
    if checkpoints_in(folder / "checkpoints"):
        words.append("--resume")
    elif (folder / "config.yaml").is_file():
        words.append("--overwrite")
    return [*words, "--set", *changes]
