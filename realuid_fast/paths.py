"""Interpolant paths: how a sample, an endpoint and noise mix at time t, as rows of nine coefficients.

A path is a handful of scalar functions of time. Everything else, the conditional target in any match space and the
conversion of any native prediction into it, follows from them, so a new path is one small class and no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .contracts import host_checks_allowed
from .errors import UserError

COLUMNS = ("a", "b", "c", "p", "q", "s", "k_out", "k_x", "w")
MATCH_SPACES = ("velocity", "x0", "noise")
PREDICTIONS = ("velocity", "x0", "noise", "score")

Weight = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OneSidedPath:
    """A path from data to Gaussian noise, ``x_t = a(t) x + c(t) n`` with ``n ~ N(0, I)``.

    Subclasses give ``scales(t) -> (a, c)`` and ``rates(t) -> (a', c')``. With ``W = a c' - a' c`` the quantities a
    network may predict are one another's linear images at a known ``x_t``::

        x0 = (c' x_t - c v) / W        n = (a v - a' x_t) / W        v = a' x0 + c' n        score = -n / c

    Source: Albergo and Vanden-Eijnden, Stochastic Interpolants (2303.08797), section 2; Lipman et al., Flow Matching
    (2210.02747), section 4.
    """

    sampler: str = "uniform"

    t_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    noise_end: ClassVar[float] = 0.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(a(t), c(t))``, each shaped like ``t``."""
        raise TypeError(f"{type(self).__name__} gives no scales(t)")

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(a'(t), c'(t))``, each shaped like ``t``."""
        raise TypeError(f"{type(self).__name__} gives no rates(t)")

    def network_time(self, t: Tensor) -> Tensor:
        """The time tensor the network is called with at path time ``t``."""
        return t

    def sample_time(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw ``n`` path times in ``t_range``, float32, on ``device``.

        ``sampler`` is ``"uniform"`` or ``"stratified"`` (one uniform draw in each of ``n`` equal bins, in random order:
        same law for one row, less variance for the batch mean).
        """
        low, high = self.t_range
        u = torch.rand(n, generator=generator, device=device)
        if self.sampler == "stratified":
            u = (torch.randperm(n, generator=generator, device=device) + u) / n
        elif self.sampler != "uniform":
            raise UserError(f"sampler must be 'uniform' or 'stratified', not {self.sampler!r}")
        return low + (high - low) * u

    def reads_x_t(self, match: str = "velocity", predict: str = "velocity") -> bool:
        """Whether ``k_x`` can differ from zero, that is, whether the losses need ``x_t``."""
        _check_choice("match", match, MATCH_SPACES)
        _check_choice("predict", predict, PREDICTIONS)
        return match != predict and (match, predict) != ("noise", "score")

    def coefficients(
        self, t: Tensor, match: str = "velocity", predict: str = "velocity", weight: Weight | None = None
    ) -> Tensor:
        """The nine coefficients of every row.

        Args:
            t: path times, shape ``(R,)``, floating, inside ``t_range``.
            match: match space of the distance: ``"velocity"``, ``"x0"`` or ``"noise"``.
            predict: the network's native prediction: ``"velocity"``, ``"x0"``, ``"noise"`` or ``"score"``.
            weight: the time weight ``w(t)``, a function from ``(R,)`` to ``(R,)``; one when not given.

        Returns:
            ``(R, 9)`` float32 (float64 for float64 ``t``) on ``t``'s device, columns ``a b c p q s k_out k_x w`` of
            ``x_t = a x + b y + c n``, ``tgt = p x + q y + s n`` and ``f = k_out F + k_x x_t``.

        Raises:
            UserError: an unknown ``match`` or ``predict``, a ``t`` of the wrong shape or dtype, or (on CPU; elsewhere
                with ``REALUID_FAST_CONTRACTS=1``, since reading ``t`` stalls the device) a ``t`` outside ``t_range``.
        """
        _check_choice("match", match, MATCH_SPACES)
        _check_choice("predict", predict, PREDICTIONS)
        check_times(t, self.t_range)
        t = t if t.dtype == torch.float64 else t.float()
        a, c = self.scales(t)
        da, dc = self.rates(t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        p, s = {"velocity": (da, dc), "x0": (one, zero), "noise": (zero, one)}[match]
        k_out, k_x = _conversion(match, predict, a, c, da, dc)
        w = one if weight is None else weight(t).to(t.dtype)
        if w.shape != t.shape:
            raise UserError(f"weight must return one value a row, shape {tuple(t.shape)}, not {tuple(w.shape)}")
        return torch.stack((a, zero, c, p, zero, s, k_out, k_x, w), dim=-1)


def _conversion(match: str, predict: str, a: Tensor, c: Tensor, da: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
    """``(k_out, k_x)`` of ``f = k_out F + k_x x_t``, each pair written so that it divides only where it must."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    if match == predict:
        return one, zero
    wronskian = a * dc - da * c
    pairs: dict[tuple[str, str], Callable[[], tuple[Tensor, Tensor]]] = {
        ("velocity", "x0"): lambda: (-wronskian / c, dc / c),
        ("velocity", "noise"): lambda: (wronskian / a, da / a),
        ("velocity", "score"): lambda: (-c * wronskian / a, da / a),
        ("x0", "velocity"): lambda: (-c / wronskian, dc / wronskian),
        ("x0", "noise"): lambda: (-c / a, one / a),
        ("x0", "score"): lambda: (c * c / a, one / a),
        ("noise", "velocity"): lambda: (a / wronskian, -da / wronskian),
        ("noise", "x0"): lambda: (-a / c, one / c),
        ("noise", "score"): lambda: (-c, zero),
    }
    return pairs[match, predict]()


@dataclass(frozen=True)
class Linear(OneSidedPath):
    """Rectified flow, also conditional optimal transport: ``x_t = t x + (1 - t) n``, data at ``t = 1``.

    ``v = x - n``, the network is called with ``t`` itself. Source: Liu et al., Flow Straight and Fast (2209.03003),
    equation 1; Lipman et al. (2210.02747), equation 22 with ``sigma_min = 0``.

    ``x0`` and ``noise`` predictions are singular in velocity space at the data and noise ends respectively: keep ``t``
    inside ``(0, 1)`` for them.
    """

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, 1 - t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), -torch.ones_like(t)


def check_times(t: Tensor, t_range: tuple[float, float]) -> None:
    """Refuse times of the wrong shape or dtype and, where reading them is free, times outside ``t_range``."""
    if t.dim() != 1 or not t.is_floating_point():
        raise UserError(f"t must be a floating tensor of shape (R,), not {t.dtype} of shape {tuple(t.shape)}")
    if not host_checks_allowed(t) or t.numel() == 0:
        return
    low, high = t_range
    smallest, largest = (float(v) for v in torch.aminmax(t))
    # Written so that NaN fails it too.
    if not (low <= smallest and largest <= high):
        found = "NaN" if math.isnan(smallest) else f"values from {smallest:g} to {largest:g}"
        raise UserError(f"t must lie inside the path's range [{low:g}, {high:g}], got {found}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
