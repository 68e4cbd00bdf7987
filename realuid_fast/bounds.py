"""The whole numbers that settings and options of the command line take. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .errors import UserError


@dataclass(frozen=True)
class Range:
    """Whole numbers from ``least`` to ``most``."""

    least: int
    most: int = 2**31 - 1

    def check(self, name: str, value: int) -> None:
        """Raises :class:`UserError` where ``value``, called ``name``, is outside."""
        if value < self.least:
            bound = "must not be negative" if self.least == 0 else f"must be at least {self.least}"
            raise UserError(f"{name} {bound}, got {shown(value)}")
        if value > self.most:
            raise UserError(f"{name} must be at most {self.most}, got {shown(value)}")


def shown(value: object) -> str:
    """``value`` in an error's sentence, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a longer number"
    return text if len(text) <= 80 else f"{text[:77]}..."


THREADS = Range(0, 1024)  # where the system gives it no more threads, libgomp ends the process
SEED = Range(0, 2**63 - 1)  # of NoiseStream
Positive = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
