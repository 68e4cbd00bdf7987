"""The settings of the objective and of what is added to it: a discriminator, a regression on stored pairs."""

from __future__ import annotations

import inspect
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..bounds import ABOVE_ZERO, NOT_NEGATIVE, POSITIVE, SHARE
from ..errors import UserError
from ..models.pairs import DISTANCES
from ..objectives import PRESETS, Objective
from ..sampling import SOLVERS
from .field import setting

REGRESSION = "regression"  # the objective of realuid_fast.train.regression, which is none of the presets
# A view, so that a preset that somebody adds can be named too.
_OBJECTIVES: Mapping[str, Any] = ChainMap({REGRESSION: None}, PRESETS)
_PUBLISHED = {"alpha": 0.92, "beta": 0.94, "gamma": 0.92}


@dataclass(frozen=True)
class ObjectiveConfig:
    """A preset by name and its parameters, :data:`realuid_fast.objectives.PRESETS`; null ones take their default.

    The name ``regression`` is the baseline of :mod:`realuid_fast.train.regression`, which has no parameter.
    A parameter that the preset does not have is refused.
    """

    name: str = setting("realuid", "the preset", choices=_OBJECTIVES)
    alpha: float | None = setting(None, "the weight of generated rows; 0.92 if null where a preset needs it")
    beta: float | None = setting(None, "the weight of generated targets; 0.94 if null where a preset needs it")
    gamma: float | None = setting(None, "the quadratic weight of 'general'; 0.92 if null")
    kappa: float | None = setting(None, "the parameterisation of 'general', 1 or beta; 1 if null")
    teacher_target: bool | None = setting(
        None, "whether 'general' takes the teacher's prediction in place of a real row's sampled target; false if null"
    )
    l1: float | None = setting(None, "the weight of the first term of 'fgm'; 1 if null")
    l2: float | None = setting(None, "the weight of the second term of 'fgm'; 1 if null")
    alpha_sid: float | None = setting(None, "the weight of the quadratic term of 'sid' and 'realsid'; 1 if null")
    c: float | None = setting(None, "the smoothing of the distance of 'sim', in units of the match space; 0.1 if null")
    p: float | None = setting(None, "the power of the distance of 'sim', 1 for pseudo-Huber; 1 if null")
    scaled: bool | None = setting(
        None, "whether 'sid' and 'realsid' divide by each sample's distance to the teacher; true if null"
    )

    @property
    def title(self) -> str:
        """The objective's name in tables."""
        return self.name if self.name == REGRESSION else self.build().name

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The preset's own parameters."""
        return {} if self.name == REGRESSION else dict(inspect.signature(PRESETS[self.name]).parameters)

    def of(self, name: str) -> ObjectiveConfig:
        """The objective of another name starts afresh; of the same name it is this one."""
        return self if name == self.name else ObjectiveConfig(name)

    def foreign(self) -> list[str]:
        """Those that are given and that the preset does not have."""
        return [
            f.name for f in fields(self)[1:] if getattr(self, f.name) is not None and f.name not in self.parameters()
        ]

    def build(self) -> Objective:
        """The objective; raises :class:`UserError` for ``regression``, and numbers that the preset refuses."""
        if self.name not in PRESETS:
            raise UserError(f"distill.objective.name must be one of {', '.join(PRESETS)}; got {self.name!r}")
        settings = {}
        for name, parameter in self.parameters().items():
            value = getattr(self, name, None)
            if value is None and parameter.default is parameter.empty:
                value = _PUBLISHED[name]
            if value is not None:
                settings[name] = value
        try:
            return PRESETS[self.name](**settings)
        except UserError as error:
            raise UserError(f"distill.objective: {error}") from None


@dataclass(frozen=True)
class GanConfig:
    """A discriminator, none while both weights are 0: a head on the fake model, or heads on frozen features."""

    weight_fake: float = setting(0.0, "the weight of the head's loss in the fake turn", NOT_NEGATIVE)
    weight_generator: float = setting(
        0.0, "the weight of the generator's term, 0 for a head that distill.divergence alone reads", NOT_NEGATIVE
    )
    least_share: float = setting(
        0.0, "the least share of data in an interpolant that is judged, on the linear path its time", SHARE
    )
    loss: str = setting("softplus", "the loss of both turns", choices=("softplus", "hinge"))
    features: str = setting(
        "",
        "the frozen network that judges clean samples in place of the fake model: 'digits', the shipped classifier, or "
        "a file of realuid-fast train-classifier; heads on its layers train in the fake turns, by distill.fake",
    )
    r1: float = setting(0.0, "the weight of the gradient penalty on real samples, with features alone", NOT_NEGATIVE)


@dataclass(frozen=True)
class RegressionConfig:
    """The teacher's trajectories: of the baseline ``objective: {name: regression}``, or stored, beside an objective."""

    steps: int = setting(20, "steps of the baseline's solver, in each step of its student", POSITIVE)
    solver: str = setting("euler", "the baseline's solver", choices=SOLVERS)
    pairs: str = setting(
        "",
        "a file of realuid-fast sample --pairs, to whose samples the student of another objective is fitted too (DMD)",
    )
    weight: float = setting(0.25, "the weight of distill.regression.pairs, DMD's if not given", ABOVE_ZERO)
    distance: str = setting(
        "l2", "the distance to the teacher's samples, squared, absolute or pseudo-Huber", choices=DISTANCES
    )
    previous: str = setting(
        "",
        "the file of a student that the baseline's one-step student goes on from, and whose samples it is told from "
        "(contrastive energy distillation)",
    )
    first_stage: str = setting(
        "",
        "the file of a student of several steps, whose network the baseline's student starts from, and whose states "
        "it learns in place of the teacher's (the second stage of SFD)",
    )
