"""A path with what networks predict on it and how they are compared: the one object that trainers are given for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .interpolant import Interpolant
from .paths.base import Path, Weight


@dataclass(frozen=True)
class Matching:
    """The problem that networks are trained on: a path, their prediction, the match space and the weight of a time.

    Attributes:
        path: the interpolant's path.
        predict: what the networks predict, one of :data:`~realuid_fast.paths.PREDICTIONS`.
        match: the space in which distances are taken, one of :data:`~realuid_fast.paths.MATCH_SPACES`.
        weight: the weight ``w(t)`` of the losses, from :func:`realuid_fast.paths.weight`; 1 for None.

    Raises:
        UserError: the path cannot convert the prediction into the match space.
    """

    path: Path
    predict: str = "velocity"
    match: str = "velocity"
    weight: Weight | None = None

    def __post_init__(self) -> None:
        self.path.time_range(self.match, self.predict)

    def coefficients(self, t: Tensor) -> Tensor:
        """The coefficient rows ``(R, 9)`` of the losses at the times ``t`` ``(R,)``."""
        return self.path.coefficients(t, self.match, self.predict, self.weight)

    def draw(self, x: Tensor, noise: Tensor, **given: Any) -> Interpolant:
        """:meth:`Path.draw` with this prediction, match space and weight; ``given`` are its other arguments."""
        return self.path.draw(x, noise, match=self.match, predict=self.predict, weight=self.weight, **given)
