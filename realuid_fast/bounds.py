"""The intervals that numbers of settings and options of the command line lie in. This module imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import UserError

MOST = 2**31 - 1  # of whole numbers that count something


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, whole ones where ``most`` is whole; ``ends`` are the interval's brackets."""

    least: float
    most: float = MOST
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value >= self.least if self.ends[0] == "[" else value > self.least
        return above and (value <= self.most if self.ends[1] == "]" else value < self.most)

    def rule(self, value: float | None = None) -> str:
        """The bound in words, ``"be at least 1"``: all of it, or the side that ``value`` is outside of."""
        if math.isinf(self.most) and self.ends[1] == ")":
            sign = "" if math.isinf(self.least) else f" and {'not negative' if self.ends[0] == '[' else 'positive'}"
            return f"be finite{sign}"
        sided = self.most == math.inf or (isinstance(self.most, int) and (value is not None or self.most >= MOST))
        if sided and value is not None and value > self.most:
            return f"be at most {self.most}"
        if sided:
            return "not be negative" if self.least == 0 else f"be at least {self.least}"
        return f"lie in {self.ends[0]}{self.least:g}, {self.most:g}{self.ends[1]}"

    def check(self, name: str, value: float) -> None:
        """Raises :class:`UserError` where ``value``, called ``name``, is outside."""
        if value not in self:
            got = f"{value:g}" if isinstance(value, float) else shown(value)
            raise UserError(f"{name} must {self.rule(value)}, got {got}")


def shown(value: object) -> str:
    """``value`` in an error's sentence, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a longer number"
    return text if len(text) <= 80 else f"{text[:77]}..."


THREADS = Range(0, 1024)  # where the system gives it no more threads, libgomp ends the process
SEED = Range(0, 2**63 - 1)  # of NoiseStream
POSITIVE, WHOLE = Range(1), Range(0)
FINITE = Range(-math.inf, math.inf, "()")
ABOVE_ZERO, NOT_NEGATIVE = Range(0.0, math.inf, "()"), Range(0.0, math.inf, "[)")
SHARE, BELOW_ONE, BETWEEN = Range(0.0, 1.0), Range(0.0, 1.0, "[)"), Range(0.0, 1.0, "()")
