"""Convex functions of a vector's length, which may take the place of the square in a generator's loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .contracts import is_number
from .errors import UserError


class Distance(Protocol):
    """A convex function of a vector that depends on its length alone, ``d(v) = phi(||v||^2)``."""

    def gain(self, squares: Tensor) -> Tensor:
        """``2 phi'`` at the squared lengths ``(R,)``, so that the gradient of ``d`` is ``gain v``."""

    def bend(self, squares: Tensor) -> Tensor:
        """The derivative of :meth:`gain` divided by :meth:`gain`, ``(R,)``."""


@dataclass(frozen=True)
class SmoothPower:
    """``d(v) = ((||v||^2 + c^2)^(p/2) - c^p) / p``: pseudo-Huber for ``p = 1``, half the square for ``p = 2``.

    Raises:
        UserError: ``p`` below 1, where it is not convex, or a ``c`` that is negative, or 0 with ``p`` below 2.
    """

    c: float
    p: float = 1.0

    def __post_init__(self) -> None:
        if finite("p", self.p) < 1:
            raise UserError(f"p must be at least 1, got {self.p:g}: below it the distance is not convex")
        if finite("c", self.c) < 0 or (self.c == 0 and self.p < 2):
            raise UserError(f"c must be positive, got {self.c:g}: the distance has a kink at 0 without it")

    def gain(self, squares: Tensor) -> Tensor:
        return (squares + self.c**2) ** (self.p / 2 - 1)

    def bend(self, squares: Tensor) -> Tensor:
        return (self.p / 2 - 1) / (squares + self.c**2) if self.p != 2 else torch.zeros_like(squares)


def finite(name: str, value: float) -> float:
    """``value`` as a float; raises :class:`UserError` for anything but a finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value!r}")
    return float(value)
