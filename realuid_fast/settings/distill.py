"""The settings of the command ``distill``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bounds import BELOW_ONE, BETWEEN, FINITE, POSITIVE
from ..choices import PRECISIONS
from ..objectives import DIVERGENCES
from .field import setting
from .objective import GanConfig, ObjectiveConfig, RegressionConfig
from .teacher import OptimiserConfig


@dataclass(frozen=True)
class DistillConfig:
    """The command ``distill``. An update is ``fake_turns`` steps of the fake model and one of the generator.

    On a GPU bf16 serves the fake turn, and fp16, whose seed gradient is scaled, or tf32 the generator's; bf16 is too
    coarse there once the fake model is near the teacher, which the run then says (:mod:`realuid_fast.precision`).
    """

    teacher: str = setting("digits", "a shipped teacher's name, a file, or the folder of its run")
    teacher_network: dict[str, Any] = setting(
        dict, "the network of a published checkpoint, the section network if empty"
    )
    teacher_decay: float | None = setting(
        None, "the average of a published checkpoint, 0 for its last weights, the largest if null", BELOW_ONE
    )
    start: str = setting(
        "",
        "a student's file, its run's folder or a published checkpoint that the generator goes on from (the published "
        "second stage); the teacher's weights if empty",
    )
    start_decay: float | None = setting(None, "the average of distill.start, the exported one if null", BELOW_ONE)
    guidance: float = setting(
        1.0, "the scale of the teacher's classifier-free guidance, which the student learns; 1 for none", FINITE
    )
    objective: ObjectiveConfig = setting(ObjectiveConfig, "the loss of both turns")
    gan: GanConfig = setting(GanConfig, "a discriminator beside the objective")
    divergence: str = setting(
        "reverse-kl",
        "the f-divergence that is descended. All but reverse-kl take the density ratio from a discriminator, and go "
        "with objectives whose gradient flows through the samples alone, such as dmd, and with sid (Uni-Instruct)",
        choices=DIVERGENCES,
    )
    regression: RegressionConfig = setting(RegressionConfig, "the baseline's trajectories")
    batch: int = setting(64, "samples of a turn, over all ranks", POSITIVE)
    updates: int = setting(1000, "updates of the whole run", POSITIVE)
    fake_turns: int = setting(5, "the fake model's steps in an update", POSITIVE)
    fake_precision: str = setting("float32", "the networks' precision in the fake turn", choices=PRECISIONS)
    generator_precision: str = setting("float32", "the networks' precision in the generator's turn", choices=PRECISIONS)
    teacher_precision: str = setting(
        "float32",
        "bf16 stores the teacher's weights in half the memory and computes its outputs in bf16 in both turns",
        choices=("float32", "bf16"),
    )
    t_start: float | None = setting(None, "the time that the generator starts from, the path's own if null", FINITE)
    shared_draws: bool = setting(
        True,
        "whether a real sample of the fake turn has the time and the noise of a generated one, as published",
    )
    fake_start: str = setting(
        "teacher",
        "the fake model's first weights: the teacher's or an untrained network's",
        choices=("teacher", "fresh"),
    )
    dropout: float | None = setting(
        None, "dropout in the generator and the fake model, the teacher's own if null", BELOW_ONE
    )
    labels: str = setting(
        "drawn",
        "the labels of generated samples: drawn from the training set, or those of the real batch in the same row; the "
        "generator's turn then reads a batch too",
        choices=("drawn", "batch"),
    )
    times: tuple[float, ...] = setting((), "times of the generator's further steps, none for one step", FINITE)
    steps: tuple[int, ...] = setting(
        (),
        "the number of DDIM steps of the objective regression's student, none for one step from t_start; several for a "
        "student that takes the number as a condition (SFD)",
        POSITIVE,
    )
    target_steps: int = setting(
        1,
        "the teacher's DDIM steps from x_t to the data that an objective without a fake model takes in place of its "
        "prediction (SparseFusion)",
        POSITIVE,
    )
    states: str = setting(
        "own",
        "the states that the generator's steps are trained on: its own earlier steps', real data noised to a step's "
        "time, with these data's labels (noised), or those of moment matching, from noised real data (data)",
        choices=("own", "noised", "data"),
    )
    generator: OptimiserConfig = setting(OptimiserConfig, "the generator's optimiser")
    fake: OptimiserConfig = setting(OptimiserConfig, "the fake model's optimiser")
    ema: tuple[float, ...] = setting((0.99,), "decays of the generator's averages", BETWEEN)
    ema_warmup: bool | None = setting(
        None, "whether the averages' decay rises from a small one; if null, only in a run without distill.start"
    )
    export: float = setting(
        0.99, "the decay of the average that is evaluated and saved, 0 for the last weights", BELOW_ONE
    )
