"""The cost of an update of every arm, in updates of UID: all arms in one process, in turn."""

from __future__ import annotations

from typing import Any

import torch

from realuid_fast import data, teachers
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers

from ... import machine
from ...timing import Case, Way, clock_name, measure
from .arms import UID, Arm, Place

ROUNDS = 15


def costs(place: Place, arms: tuple[Arm, ...], extra: list[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of an update by arm, and their ratio to UID's."""
    torch.set_num_threads(1)
    ways, dataset = [], None
    for arm in arms:
        config = configs.load("mnist", place.settings(arm, 0, extra))
        dataset = data.load(config.data) if dataset is None else dataset
        teacher = teachers.load_teacher(place.teacher(arm.teacher))
        trainer = trainers.trainer("distill", config, dataset, teacher)
        ways.append(Way(arm.name, trainer.update, ours=arm.name == UID))
    rows = measure(Case("update", dataset.shape if dataset else (), ways), rounds=rounds, calls=1)
    return {
        "seconds": {row["way"]: row["median_ms"] / 1e3 for row in rows},
        "ratio": {row["way"]: row["ratio"] for row in rows},
        "clock": clock_name(),
        "machine": machine.describe(),
    }
