"""The settings of a run, a module a section: each field of these dataclasses says its meaning, bounds and choices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import parity
from .distill import DistillConfig
from .field import setting
from .objective import REGRESSION, GanConfig, ObjectiveConfig, RegressionConfig
from .path import LawConfig, PathConfig
from .run import RunConfig
from .teacher import OptimiserConfig, TeacherConfig

__all__ = [
    "PARITY",
    "PARITY_OBJECTIVES",
    "REGRESSION",
    "Config",
    "DistillConfig",
    "GanConfig",
    "LawConfig",
    "ObjectiveConfig",
    "OptimiserConfig",
    "PathConfig",
    "RegressionConfig",
    "RunConfig",
    "TeacherConfig",
    "setting",
]

PARITY, PARITY_OBJECTIVES = parity.PARITY, parity.PARITY_OBJECTIVES


@dataclass(frozen=True)
class Config:
    """A whole run.

    ``data`` goes to :func:`realuid_fast.data.load`, ``network`` to :func:`realuid_fast.networks.build`.
    """

    data: dict[str, Any] = setting(lambda: {"name": "digits"}, "the data set by its name, with its own settings")
    network: dict[str, Any] = setting(dict, "the network by its kind, with its own settings")
    path: PathConfig = setting(PathConfig, "the path from noise to data")
    teacher: TeacherConfig = setting(TeacherConfig, "the command train-teacher")
    distill: DistillConfig = setting(DistillConfig, "the command distill")
    run: RunConfig = setting(RunConfig, "all besides training")

    def teachers_network(self) -> dict[str, Any]:
        """The network of a published checkpoint: ``distill.teacher_network``, or else the section ``network``."""
        return self.distill.teacher_network or self.network

    def teachers_path(self) -> PathConfig:
        """The section ``path`` with what ``teacher`` sets apart."""
        own = self.teacher
        apart: dict[str, Any] = {k: v for k in ("match", "weight") if (v := getattr(own, k)) is not None}
        if own.sampler is not None:
            apart |= {"sampler": own.sampler, "sampler_settings": own.sampler_settings}
        return replace(self.path, **apart)
