"""The runs of the study: what each arm changes in the configuration ``mnist``, and the command that makes it.

``registered.md`` says of the main comparison, and ``registered_more.md`` of the other groups, what is asked and why.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from realuid_fast import choices
from realuid_fast.jobs import config as configs
from realuid_fast.train.checkpoint import files as checkpoints_in

from ..family import FAMILY

SEEDS = (0, 1, 2)
UID = "uid"
QUIET = ("run.threads=1", "run.progress=false", "run.tensorboard=false")


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
        name: the name of its folders.
        title: its name in tables.
        changes: the settings that it changes.
        teacher: the teacher that it is distilled from, one of :data:`TEACHERS`.
        start: the arm whose student of the same seed the generator goes on from; empty for the teacher's weights.
        against: the arm that it is compared with.
    """

    name: str
    title: str
    changes: tuple[str, ...]
    teacher: str = "teacher"
    start: str = ""
    against: str = ""


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


# The teachers by name, with what each changes: the study's own, one that saw half of the digits, one stopped early.
TEACHERS: dict[str, tuple[str, ...]] = {
    "teacher": (),
    "half": ("data.classes=[0,1,2,3,4]",),
    "early": ("teacher.updates=500",),
}
DAMAGED = {"half": "teacher of digits 0 to 4", "early": "teacher of 500 updates"}
# A second stage as the paper fine-tunes: a fifth of the updates, a third of the rate, the fake model from the teacher.
SECOND = (
    "distill.updates=500",
    "distill.generator.lr=1.667e-4",
    "distill.fake.lr=1.667e-4",
    "distill.fake_start=teacher",
)


def ablations(best: Arm) -> tuple[Arm, ...]:
    """One thing changed at a time in the best arm of the main comparison, and damaged teachers."""
    changed = (
        ("fake-at-teacher", "fake model from the teacher's weights", "distill.fake_start=teacher"),
        ("one-fake-turn", "one fake turn", "distill.fake_turns=1"),
        ("three-fake-turns", "three fake turns", "distill.fake_turns=3"),
        ("draws-apart", "real samples with times and noise of their own", "distill.shared_draws=false"),
    )
    arms = [
        Arm(name, f"{best.title}, {title}", (*best.changes, change), against=best.name)
        for name, title, change in changed
    ]
    uid, repairs = MAIN[0], (_realuid(0.8, 1.0), _realuid(0.5, 1.0))
    arms += [
        Arm("then-uid", "UID's student, then UID", (*uid.changes, *SECOND), start=UID, against=UID),
        Arm("then-real", f"UID's student, then {best.title}", (*best.changes, *SECOND), start=UID, against="then-uid"),
    ]
    for teacher, title in DAMAGED.items():
        for arm in dict.fromkeys((uid, best, *repairs)):
            against = "" if arm is uid else f"{UID}-{teacher}"
            own = replace(arm, name=f"{arm.name}-{teacher}", title=f"{arm.title}, {title}", teacher=teacher)
            arms.append(replace(own, against=against))
    return tuple(arms)


def _objective(name: str, title: str, *changes: str, **settings: float) -> Arm:
    numbers = "".join(f", {key}: {value}" for key, value in settings.items())
    return Arm(name, title, (f"distill.objective={{name: {name}{numbers}}}", *changes), against=UID)


# Other systems on the same networks, at five fake turns where they have a fake model.
OTHERS = (
    _objective("sid", "SiD (1)", "path.match=x0", alpha_sid=1.0),
    _objective("dmd", "DMD", "path.match=x0", "path.weight=scale"),
    _objective("diff-instruct", "Diff-Instruct", "path.match=x0"),
    _objective("moment-matching", "moment matching", "path.match=x0"),
    replace(
        _objective(UID, "UID with a discriminator (0.3, 1)", "distill.gan={weight_generator: 0.3, weight_fake: 1.0}"),
        name="gan",
    ),
    _objective("regression", "regression of 20 Euler steps"),
)


SYSTEM_UPDATES = 500
# Settings that all systems share here; a preset's own are for the digits' teacher.
SHARED = ("updates", "fake_turns", "generator", "fake")


def systems() -> tuple[Arm, ...]:
    """Every preset for a teacher of images on the linear path, the preset ``uid`` first.

    An arm changes here what its preset changes in the preset ``uid``. Presets that need a file of their own, of pairs
    or of an earlier student, are left out.
    """
    titles = {preset: system.name for system in FAMILY for preset in system.presets}
    presets = {name: configs.to_mapping(configs.load(configs.preset(name))) for name in configs.presets()}
    base, arms = presets[UID], []
    for name in sorted(presets, key=lambda name: (name != UID, name)):
        own = presets[name]
        alike = all(own[section] == base[section] for section in ("data", "network"))
        files = any(own["distill"]["regression"][key] for key in ("pairs", "previous", "first_stage"))
        if not alike or files or any(own["path"][key] != base["path"][key] for key in ("name", "predict")):
            continue
        changes = {
            f"{section}.{key}": value
            for section in ("path", "distill")
            for key, value in own[section].items()
            if key not in SHARED and (value != base[section][key] or key == "objective")
        }
        changes["distill.objective"] = {k: v for k, v in changes["distill.objective"].items() if v is not None}
        if (gan := changes.get("distill.gan")) and gan["features"]:
            changes["distill.gan"] = {**gan, "features": "mnist"}
        if changes["distill.objective"]["name"] == "parameter-moments":
            # It has no fake model, and refuses settings of one.
            changes |= {"distill.fake_turns": 1, "distill.fake_start": "teacher"}
        words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        title = f"{titles[name]} (`{name}`)"
        against = "" if name == UID else f"family-{UID}"
        words.append(f"distill.updates={SYSTEM_UPDATES}")
        arms.append(Arm(f"family-{name}", title, tuple(words), against=against))
    return tuple(arms)


def longer(ratio: float, extra: list[str]) -> Arm:
    """UID with as much time as the others: its updates are theirs times what an update of theirs costs, of UID's."""
    updates = round(configs.load("mnist", extra).distill.updates * ratio)
    return Arm("uid-longer", f"UID (1, 1), {updates:,} updates", (*MAIN[0].changes, f"distill.updates={updates}"))


@dataclass(frozen=True)
class Place:
    """The folders of a study: ``data`` has MNIST's four files, ``out`` all that is made.

    With ``shipped`` the classifier and the study's own teacher are the package's.
    """

    data: Path
    out: Path
    shipped: bool = False

    @property
    def classifier(self) -> Path:
        return choices.CLASSIFIERS["mnist"] if self.shipped else self.out / "classifier.safetensors"

    def teacher(self, name: str = "teacher") -> Path:
        """The file of a teacher of :data:`TEACHERS`."""
        if self.shipped and name == "teacher":
            return choices.TEACHERS["mnist-teacher"]
        return self.out / (name if name == "teacher" else f"teacher-{name}") / "teacher.safetensors"

    def run(self, arm: Arm, seed: int) -> Path:
        """The folder of one student's run."""
        return self.out / "runs" / f"{arm.name}-seed{seed}"

    def start(self, arm: Arm, seed: int) -> Path:
        """The folder of the run whose student the arm goes on from."""
        return self.out / "runs" / f"{arm.start}-seed{seed}"

    def common(self) -> list[str]:
        """Settings of every run."""
        return [*QUIET, f"data.path={self.data}", f"run.classifier={self.classifier}"]

    def settings(self, arm: Arm, seed: int, extra: list[str]) -> list[str]:
        """Everything that a student's run changes in the configuration, ``extra`` before what makes the arm."""
        own = [f"distill.teacher={self.teacher(arm.teacher)}", f"run.seed={seed}"]
        if arm.start:
            own.append(f"distill.start={self.start(arm, seed) / 'student.safetensors'}")
        return [*self.common(), *own, *extra, *arm.changes]


def classifier_command(place: Place, extra: list[str]) -> list[str]:
    """The command that trains the classifier, in whose features all distances are measured."""
    own = ["--out", str(place.classifier), "--epochs", str(EPOCHS), "--set", f"data.path={place.data}", *extra]
    return [sys.executable, "-m", "realuid_fast", "train-classifier", "--config", "mnist", *own]


EPOCHS = 8
TEACHER_SAMPLES = 2000  # of an evaluation on the teacher's way, whose samples take 100 evaluations of the network each


def teacher_command(place: Place, name: str, extra: list[str]) -> list[str]:
    """The command that trains a teacher, or goes on with it."""
    own = [*place.common(), f"run.evaluate_samples={TEACHER_SAMPLES}", *extra, *TEACHERS[name]]
    return _command("train-teacher", place.teacher(name).parent, own)


def student_command(place: Place, arm: Arm, seed: int, extra: list[str]) -> list[str]:
    """The command that trains a student, or goes on with it."""
    return _command("distill", place.run(arm, seed), place.settings(arm, seed, extra))


def finished(folder: Path, changes: list[str]) -> bool:
    """Whether the folder holds the student of this very configuration."""
    kept = folder / "config.yaml"
    done = (folder / "student.safetensors").is_file() and kept.is_file()
    asked = configs.load("mnist", changes)
    # A student's run is kept with its teacher's network.
    return done and replace(configs.load_kept(kept), network=asked.network) == asked


def _command(job: str, folder: Path, changes: list[str]) -> list[str]:
    words = [sys.executable, "-m", "realuid_fast", job, "--config", "mnist", "--out", str(folder)]
    if checkpoints_in(folder / "checkpoints"):
        words.append("--resume")
    elif (folder / "config.yaml").is_file():
        words.append("--overwrite")
    return [*words, "--set", *changes]
