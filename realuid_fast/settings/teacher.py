"""The settings of an optimiser, and those of the command ``train-teacher``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import paths
from ..bounds import ABOVE_ZERO, BELOW_ONE, BETWEEN, FINITE, POSITIVE, SHARE, WHOLE, Range
from ..optim import DECAYS
from .field import setting
from .path import SAMPLERS


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam with a schedule of its learning rate, :class:`realuid_fast.optim.Optimiser`."""

    lr: float = setting(1e-3, "the learning rate after its warm-up", ABOVE_ZERO)
    betas: tuple[float, float] = setting((0.0, 0.999), "the decays of Adam's first and second moments", BELOW_ONE)
    clip: float = setting(1.0, "the largest norm of a gradient, 0 for any", Range(0.0, math.inf))
    warmup: int = setting(0, "steps over which the learning rate rises", WHOLE)
    warmup_from_zero: bool = setting(False, "whether the first step has the learning rate 0")
    decay: str = setting("constant", "how the learning rate falls over the run", choices=DECAYS)
    floor: float = setting(0.0, "the share of the learning rate that is left at the run's end", SHARE)


@dataclass(frozen=True)
class TeacherConfig:
    """The command ``train-teacher``, which takes one batch an update."""

    sampler: str | None = setting(None, "as path.sampler, which holds if this is null", choices=SAMPLERS)
    sampler_settings: dict[str, Any] = setting(dict, "the numbers of teacher.sampler")
    match: str | None = setting(None, "as path.match, which holds if this is null", choices=paths.MATCH_SPACES)
    weight: str | None = setting(None, "as path.weight, which holds if this is null", choices=paths.WEIGHTS)
    batch: int = setting(64, "samples of an update, over all ranks", POSITIVE)
    updates: int = setting(10_000, "updates of the whole run", POSITIVE)
    optimiser: OptimiserConfig = setting(lambda: OptimiserConfig(betas=(0.9, 0.999)), "the teacher's optimiser")
    label_dropout: float = setting(
        0.0,
        "the share of labels replaced by 'no label', for classifier-free guidance (Ho and Salimans, 2207.12598); the "
        "network then has such a label",
        BELOW_ONE,
    )
    reduction: str = setting(
        "sum",
        "what the loss does over a sample's elements; Adam does not see the factor between them, the clip does",
        choices=("sum", "mean"),
    )
    guided: str = setting(
        "",
        "the file of a teacher with a null label, whose guided prediction takes the place of the data's targets; the "
        "network takes the scale (guided distillation)",
    )
    scales: tuple[float, float] = setting((1.0, 4.0), "the scales of a guided network, drawn uniformly", FINITE)
    halved: str = setting(
        "",
        "the file of a teacher whose DDIM steps, two by two, take the place of the data's targets; the network starts "
        "at its weights (progressive halving)",
    )
    steps: int = setting(8, "the steps of the network that learns from teacher.halved, half of that one's", POSITIVE)
    coupling: bool = setting(
        False,
        "whether optimal transport pairs each batch with its noise, or with its endpoints where those are not the "
        "samples' own; inside classes where the network sees them (realuid_fast.couplings)",
    )
    ema: tuple[float, ...] = setting((0.999,), "decays of the weights' averages", BETWEEN)
    ema_warmup: bool = setting(True, "whether the averages' decay rises from a small one")
    export: float = setting(0.999, "the decay of the average that is saved, 0 for the last weights", BELOW_ONE)
    evaluate_every: int | None = setting(
        None,
        "as run.evaluate_every, which holds if this is null; a teacher's samples take many evaluations of its network",
        WHOLE,
    )
