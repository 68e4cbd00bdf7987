"""Variance preserving diffusion on numbered steps, as in denoising diffusion models, made continuous in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..extras import extra
from .checks import check_number
from .facts import fact
from .one_sided import OneSidedPath, Pair

NEWTON_STEPS = 12


def _linear(first: float, last: float, steps: int) -> np.ndarray:
    return np.linspace(first, last, steps)


def _scaled_linear(first: float, last: float, steps: int) -> np.ndarray:
    return np.linspace(first**0.5, last**0.5, steps) ** 2


def _cosine(first: float, last: float, steps: int) -> np.ndarray:
    share = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - share[1:] / share[:-1], 0.999)


# The schedules by the names that diffusers' schedulers have for them.
SCHEDULES: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


@dataclass(frozen=True)
class DiscreteVP(OneSidedPath):
    """Diffusion on numbered steps ``k = 0 .. steps - 1``: ``x_k = sqrt(A_k) x + sqrt(1 - A_k) n``, data at ``t = 0``.

    ``A_k`` is the product of ``1 - beta_j`` up to ``k`` with ``beta_j`` from ``beta_start`` to ``beta_end`` by the
    ``schedule``: ``linear``, ``scaled_linear`` (linear in the root) or ``squaredcos_cap_v2`` (the cosine schedule,
    which reads neither); or ``alphas_cumprod`` itself, a table that falls strictly inside (0, 1). The time is
    ``t = k / (steps - 1)`` in [0, 1], and the network is called with ``k = (steps - 1) t``.

    Between steps ``ln(A / (1 - A))`` is a monotone cubic of the time (Fritsch and Carlson, 1980) through the table's
    values, so that scales and rates are continuous and at every step exactly the table's. Both stay away from zero:
    nothing diverges. Source: Ho et al., DDPM (2006.11239), equation 4; Nichol and Dhariwal (2102.09672), equation 17;
    Rombach et al. (2112.10752) for ``scaled_linear``.
    """

    schedule: str = field(default="linear", kw_only=True)
    beta_start: float = field(default=1e-4, kw_only=True)
    beta_end: float = field(default=0.02, kw_only=True)
    steps: int = field(default=1000, kw_only=True)
    alphas_cumprod: tuple[float, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alphas_cumprod:
            try:
                object.__setattr__(self, "alphas_cumprod", tuple(map(float, self.alphas_cumprod)))
            except (TypeError, ValueError):
                raise UserError(f"alphas_cumprod must hold numbers, got {self.alphas_cumprod!r:.60}") from None
            object.__setattr__(self, "steps", len(self.alphas_cumprod))
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or not 3 <= self.steps <= 100_000:
            raise UserError(f"steps must be a whole number from 3 to 100000, got {self.steps!r}")
        check_number("beta_start", self.beta_start, above=0, below=1)
        check_number("beta_end", self.beta_end, above=0, below=1)
        table = self.table()
        if not (np.isfinite(table).all() and table[0] < 1 and table[-1] > 0 and (np.diff(table) < 0).all()):
            raise UserError("alphas_cumprod must fall strictly from step to step and stay inside (0, 1)")

    def table(self) -> np.ndarray:
        """``A_k`` of every step, float64."""
        if self.alphas_cumprod:
            return np.array(self.alphas_cumprod)
        return np.cumprod(1 - SCHEDULES[self.schedule](self.beta_start, self.beta_end, self.steps))

    @property
    def variance_preserving(self) -> bool:
        return True

    @property
    def own_time_scale(self) -> float:
        return float(self.steps - 1)

    def scales(self, t: Tensor) -> Pair:
        a, c = _scales(self._log_ratio(t)[0])
        return a.to(t.dtype), c.to(t.dtype)

    def rates(self, t: Tensor) -> Pair:
        ratio, slope = self._log_ratio(t)
        a, c = _scales(ratio)
        return (a * c**2 * slope / 2).to(t.dtype), (-c * a**2 * slope / 2).to(t.dtype)

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        # Solve ln(A / (1 - A)) = -2 ln sigma by Newton's method inside the table's interval.
        values, _ = _cubics(self, sigma.device)
        wanted = (-2 * torch.log(sigma.double())).clamp(values[-1], values[0])
        steps = self.steps - 1
        after = torch.searchsorted(-values, -wanted).clamp(1, steps)
        low, high = (after - 1).float() / steps, after.float() / steps
        left, right = values[after - 1], values[after]
        t = low + (high - low) * (left - wanted) / (left - right)
        for _ in range(NEWTON_STEPS):
            ratio, slope = self._log_ratio(t)
            t = torch.minimum(torch.maximum(t - (ratio - wanted) / slope, low), high)
        return t.to(sigma.dtype)

    def _log_ratio(self, t: Tensor) -> Pair:
        """``ln(A / (1 - A))`` at ``t`` and its derivative; in float64, since float32 has few digits left for a step."""
        values, slopes = _cubics(self, t.device)
        steps = self.steps - 1
        k = t.double() * steps
        before = k.detach().floor().clamp(0, steps - 1).long()
        u = k - before
        left, right = values[before], values[before + 1]
        out, into = slopes[before], slopes[before + 1]
        rise = right - left
        # The cubic with these values and slopes at both ends of the interval, by powers of u.
        square, cube = 3 * rise - 2 * out - into, out + into - 2 * rise
        ratio = left + u * (out + u * (square + u * cube))
        return ratio, steps * (out + u * (2 * square + u * 3 * cube))


def _scales(ratio: Tensor) -> Pair:
    return torch.sqrt(torch.sigmoid(ratio)), torch.sqrt(torch.sigmoid(-ratio))


@fact
def _cubics(path: DiscreteVP, device: torch.device) -> Pair:
    """``ln(A / (1 - A))`` of every step and its slope per step, copied to the device once."""
    with extra():
        from scipy.interpolate import PchipInterpolator

    table = path.table()
    values = np.log(table) - np.log1p(-table)
    steps = np.arange(len(table))
    slopes = PchipInterpolator(steps, values).derivative()(steps)
    return torch.tensor(values, device=device), torch.tensor(slopes, device=device)
