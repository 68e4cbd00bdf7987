"""Paths between data and Gaussian noise: flows and diffusions."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .base import PRECONDITIONED, Path, Preconditioning, Triple
from .checks import check_number

Pair = tuple[Tensor, Tensor]

# The linear-beta schedule that the "vp" preconditioning measures its time in (Karras et al., 2206.00364, table 1).
VP_BETA_MIN, VP_BETA_RANGE, VP_STEPS = 0.1, 19.9, 1000


@dataclass(frozen=True)
class OneSidedPath(Path):
    """A path from data to Gaussian noise, ``x_t = a(t) x + c(t) n`` with ``n ~ N(0, I)``.

    Subclasses give ``scales(t) -> (a, c)`` and ``rates(t) -> (a', c')``. If ``a`` or ``c`` is zero at an end of the
    range, they also give that end as ``a_zero`` or ``c_zero``. With ``W = a c' - a' c`` the quantities that a network
    may predict are linear functions of one another at a known ``x_t``::

        x0 = (c' x_t - c v) / W        n = (a v - a' x_t) / W        v = a' x0 + c' n        score = -n / c

    so every prediction but ``residual`` has a conversion into every match space. At a noise level ``sigma = c / a`` the
    rescaled ``x_t / a`` is ``x + sigma n``. Preconditioned networks are trained on that, so they serve every one-sided
    path.

    Conversions that divide by ``a`` (``noise``, ``score``) or ``c`` (``x0``) diverge where those are zero, and so does
    preconditioning, which takes the logarithm of ``sigma``. There times are clipped, see :meth:`Path.time_range`.

    Source: Albergo and Vanden-Eijnden, Stochastic Interpolants (2303.08797), section 2; Lipman et al., Flow Matching
    (2210.02747), section 4.
    """

    has_endpoint: ClassVar[bool] = False

    @abstractmethod
    def scales(self, t: Tensor) -> Pair:
        """``(a(t), c(t))``, each shaped like ``t``."""

    @abstractmethod
    def rates(self, t: Tensor) -> Pair:
        """``(a'(t), c'(t))``, each shaped like ``t``."""

    @property
    def a_zero(self) -> float | None:
        """The end of ``t_range`` at which ``a = 0``; None if ``a`` stays positive."""
        return None

    @property
    def c_zero(self) -> float | None:
        """The end of ``t_range`` at which ``c = 0``; None if ``c`` stays positive."""
        return None

    @property
    def variance_preserving(self) -> bool:
        """Whether ``a^2 + c^2 = 1``. Then the velocity is ``W`` times the prediction ``v``, and ``x_t`` is not read."""
        return False

    def posterior(self, s: Tensor, t: Tensor) -> Triple:
        """``(x, z, n)`` with ``z_s = x x + z z_t + n n`` drawn from ``q(z_s | z_t, x)``, ``s`` nearer to the data than
        ``t``.

        With ``keep = snr(t) / snr(s)`` they are ``a_s (1 - keep), keep a_s / a_t, c_s (1 - keep)^(1/2)``: the
        diffusion's state at ``s`` between the data and its state at ``t``. At a ``t`` of pure noise it is ``q(z_s |
        x)``. Source: Ho et al. (2006.11239), equation 7; for any scales Kingma et al. (2107.00630), appendix A.
        """
        (a_s, c_s), (a_t, c_t) = self.scales(s), self.scales(t)
        # At the data's end c is 0, and so is the share that is kept. Rounding must not bring it above 1.
        tiny = torch.finfo(c_t.dtype).tiny
        of_a, of_c = a_t / a_s.clamp(min=tiny), c_s / c_t.clamp(min=tiny)
        keep = ((of_a * of_c) ** 2).clamp(max=1.0)
        return a_s * (1 - keep), of_a * of_c**2, c_s * (1 - keep).sqrt()

    def preconditioning(self, t: Tensor) -> Preconditioning:
        a, c = self.scales(t.clamp(*self.time_range("x0", "edm")))
        variance = a**2 * self.sigma_data**2 + c**2
        c_in = torch.rsqrt(variance)
        return Preconditioning(
            c_skip=a * self.sigma_data**2 / variance,
            c_out=self.sigma_data * c * c_in,
            c_in=c_in,
            c_noise=torch.log(c / a) / 4,
        )

    def _scales(self, t: Tensor) -> Triple:
        a, c = self.scales(t)
        return a, torch.zeros_like(t), c

    def _rates(self, t: Tensor) -> Triple:
        da, dc = self.rates(t)
        return da, torch.zeros_like(t), dc

    def _check_pair(self, match: str, predict: str) -> None:
        super()._check_pair(match, predict)
        if predict == "residual":
            raise UserError(f"predict must not be residual on {type(self).__name__}: only bridges define its scale")

    def _singular_times(self, match: str, predict: str) -> tuple[float | None, ...]:
        by_a = predict in ("noise", "score") and match != "noise"
        by_c = predict == "x0" and match != "x0"
        if predict in PRECONDITIONED:
            by_a = by_c = True
        return (self.a_zero if by_a else None, self.c_zero if by_c else None)

    def _conversion(self, match: str, predict: str, t: Tensor, scales: Triple, rates: Triple) -> Pair:
        (a, _, c), (da, _, dc) = scales, rates
        if self.variance_preserving and (match, predict) == ("velocity", "v"):
            return a * dc - da * c, torch.zeros_like(t)
        return conversion(match, predict, a, c, da, dc, self.sigma_data)

    def _precondition(self, t: Tensor, predict: str) -> Pair:
        if predict == "edm":
            edm = self.preconditioning(t)
            return edm.c_in, edm.c_noise
        a, c = self.scales(t.clamp(*self.time_range("x0", predict)))
        if predict == "ve":
            return 1 / a, torch.log(c / (2 * a))
        time = _linear_beta_time((c / a) ** 2, VP_BETA_MIN, VP_BETA_RANGE)
        return torch.rsqrt(a**2 + c**2), (VP_STEPS - 1) * time


def conversion(match: str, predict: str, a: Tensor, c: Tensor, da: Tensor, dc: Tensor, sigma_data: float = 0.5) -> Pair:
    """``(k_out, k_x)`` of ``f = k_out F + k_x x_t`` on a one-sided path, dividing only where it must."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    # Each prediction as x0 and as noise, (times F, times x_t); the velocity is a' x0 + c' n.
    if predict == "velocity":
        w = a * dc - da * c
        x0, n = (-c / w, dc / w), (a / w, -da / w)
    elif predict == "x0":
        x0, n = (one, zero), (-a / c, 1 / c)
    elif predict in ("noise", "vp"):
        x0, n = (-c / a, 1 / a), (one, zero)
    elif predict == "ve":
        x0, n = (c / a, 1 / a), (-one, zero)
    elif predict == "score":
        x0, n = (c * c / a, 1 / a), (-c, zero)
    elif predict == "v":
        square = a * a + c * c
        x0, n = (-c / square, a / square), (a / square, c / square)
    else:  # edm
        variance = a**2 * sigma_data**2 + c**2
        out = sigma_data * torch.rsqrt(variance)
        x0, n = (out * c, a * sigma_data**2 / variance), (-out * a, c / variance)
    if match == "velocity":
        return da * x0[0] + dc * n[0], da * x0[1] + dc * n[1]
    return x0 if match == "x0" else n


@dataclass(frozen=True)
class Linear(OneSidedPath):
    """Rectified flow, also conditional optimal transport: ``x_t = t x + (1 - t) n``, data at ``t = 1``.

    ``v = x - n``, the network is called with ``t`` itself: the convention of torchcfm. With ``data_at=0`` time runs the
    other way, ``x_t = (1 - t) x + t n`` and ``v = n - x``, and the network is called with ``1000 t``: the convention of
    diffusers' flow models. Source: Liu et al., Flow Straight and Fast (2209.03003), equation 1; Lipman et al.
    (2210.02747), equation 22 with ``sigma_min = 0``; reversed, Esser et al. (2403.03206), equation 13.

    ``shift`` concerns only samplers with many steps. Without it steps are equal in the share ``u`` of noise that is
    left. With it the share becomes ``shift u / (1 + (shift - 1) u)``: above 1 more steps are taken in noise.
    Source: Esser et al. (2403.03206), equation 23; ``shift`` of diffusers' ``FlowMatchEulerDiscreteScheduler``, whose
    levels differ: before the shift all but the last are equal from 1 to a smallest level, and the last leads from there
    to 0. With shift 3 and 10 steps it has 0.9601, 0.9133, 0.8577 after 1, and this path 0.9643, 0.9231, 0.875.
    """

    data_at: int = field(default=1, kw_only=True)
    shift: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_at not in (0, 1):
            raise UserError(f"data_at must be 0 or 1, the time at which the path is data, not {self.data_at!r}")
        check_number("shift", self.shift, above=0)

    @property
    def own_time_scale(self) -> float:
        return 1.0 if self.data_at == 1 else 1000.0

    @property
    def a_zero(self) -> float:
        return 1.0 - self.data_at

    @property
    def c_zero(self) -> float:
        return float(self.data_at)

    def scales(self, t: Tensor) -> Pair:
        return (t, 1 - t) if self.data_at == 1 else (1 - t, t)

    def rates(self, t: Tensor) -> Pair:
        one = torch.ones_like(t)
        return (one, -one) if self.data_at == 1 else (-one, one)

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma) if self.data_at == 1 else 1 / (1 + 1 / sigma)


@dataclass(frozen=True)
class FlowMatching(OneSidedPath):
    """Flow matching with a narrow Gaussian at the data end: ``x_t = t x + (1 - (1 - sigma) t) n``.

    Source: Lipman et al. (2210.02747), equation 22; torchcfm's ``TargetConditionalFlowMatcher``, whose default is
    ``sigma = 0``.
    """

    sigma: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma", self.sigma)
        if not 0 <= self.sigma < 1:
            raise UserError(f"sigma must lie in [0, 1), got {self.sigma:g}")

    @property
    def a_zero(self) -> float:
        return 0.0

    @property
    def c_zero(self) -> float | None:
        return 1.0 if self.sigma == 0 else None

    def scales(self, t: Tensor) -> Pair:
        return t, (1 - t) + self.sigma * t

    def rates(self, t: Tensor) -> Pair:
        return torch.ones_like(t), torch.full_like(t, self.sigma - 1)

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma + (1 - self.sigma))


@dataclass(frozen=True)
class Trigonometric(OneSidedPath):
    """Generalised variance preserving: ``x_t = sin(pi t / 2) x + cos(pi t / 2) n``, data at ``t = 1``.

    Source: Albergo and Vanden-Eijnden, Building Normalizing Flows (2209.15571), section 2; "GVP" in Ma et al., SiT
    (2401.08740).
    """

    @property
    def variance_preserving(self) -> bool:
        return True

    @property
    def a_zero(self) -> float:
        return 0.0

    @property
    def c_zero(self) -> float:
        return 1.0

    def scales(self, t: Tensor) -> Pair:
        # cos(pi t / 2) would round to a negative number at t = 1.
        return torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * (1 - t))

    def rates(self, t: Tensor) -> Pair:
        a, c = self.scales(t)
        return math.pi / 2 * c, -math.pi / 2 * a

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(1 / sigma)


@dataclass(frozen=True)
class VP(OneSidedPath):
    """Variance preserving diffusion with linear beta: ``a = e^(-I/2)``, ``c = sqrt(1 - e^(-I))``, data at ``t = 0``.

    ``I = beta_min t + (beta_max - beta_min) t^2 / 2``. ``c'`` diverges like ``1 / sqrt(t)`` at the data end, so times
    start at ``1e-5``, as in training in the source. The network is called with ``999 t``, as the published continuous
    models are. Source: Song et al., Score-Based Generative Modeling through SDEs (2011.13456), appendix C.
    """

    beta_min: float = field(default=0.1, kw_only=True)
    beta_max: float = field(default=20.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta_min", self.beta_min, above=0)
        check_number("beta_max", self.beta_max, above=self.beta_min)

    @property
    def variance_preserving(self) -> bool:
        return True

    @property
    def t_range(self) -> tuple[float, float]:
        return 1e-5, 1.0

    @property
    def steep(self) -> tuple[bool, bool]:
        return True, False

    @property
    def own_time_scale(self) -> float:
        return 999.0

    def scales(self, t: Tensor) -> Pair:
        integral = self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t**2
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def rates(self, t: Tensor) -> Pair:
        a, c = self.scales(t)
        half_beta = (self.beta_min + (self.beta_max - self.beta_min) * t) / 2
        return -half_beta * a, half_beta * a**2 / c

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        return _linear_beta_time(sigma**2, self.beta_min, self.beta_max - self.beta_min)


def _linear_beta_time(variance: Tensor, beta_min: float, beta_range: float) -> Tensor:
    """The time at which ``e^I - 1`` reaches ``variance = (c / a)^2``: the positive root of a quadratic."""
    integral = torch.log1p(variance)
    return 2 * integral / (beta_min + torch.sqrt(beta_min**2 + 2 * beta_range * integral))


@dataclass(frozen=True)
class VPCosine(OneSidedPath):
    """Variance preserving diffusion with the cosine schedule, data at ``t = 0``.

    ``a = cos(u) / cos(u_0)``, ``c = sqrt(1 - a^2)`` with ``u = (pi/2) (t + offset) / (1 + offset)`` and ``u_0`` its
    value at 0. ``c'`` diverges at the data end, so times start at ``1e-5``; ``a`` is zero at ``t = 1``. The network is
    called with ``1000 t``. Source: Nichol and Dhariwal, Improved DDPM (2102.09672), equation 17.
    """

    offset: float = field(default=0.008, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("offset", self.offset, above=0)

    @property
    def variance_preserving(self) -> bool:
        return True

    @property
    def t_range(self) -> tuple[float, float]:
        return 1e-5, 1.0

    @property
    def steep(self) -> tuple[bool, bool]:
        return True, False

    @property
    def own_time_scale(self) -> float:
        return 1000.0

    @property
    def a_zero(self) -> float:
        return 1.0

    @property
    def _start(self) -> float:
        return math.pi / 2 * self.offset / (1 + self.offset)

    def scales(self, t: Tensor) -> Pair:
        passed = math.pi / 2 / (1 + self.offset) * t  # u - u_0
        # sin(pi/2 - u), since cos(u) would round to a negative number at t = 1, and 1 - a^2 as a product.
        a = torch.sin(math.pi / 2 / (1 + self.offset) * (1 - t)) / math.cos(self._start)
        c = torch.sqrt(torch.sin(passed) * torch.sin(passed + 2 * self._start)) / math.cos(self._start)
        return a, c

    def rates(self, t: Tensor) -> Pair:
        a, c = self.scales(t)
        speed = math.pi / 2 / (1 + self.offset)
        da = -speed * torch.sin(speed * t + self._start) / math.cos(self._start)
        return da, -a * da / c

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        # tan u = sqrt(sigma^2 + sin^2 u_0) / cos u_0; the arc cosine would lose small times to rounding.
        u = torch.atan(torch.sqrt(sigma**2 + math.sin(self._start) ** 2) / math.cos(self._start))
        return (u - self._start) * 2 / math.pi * (1 + self.offset)


@dataclass(frozen=True)
class VE(OneSidedPath):
    """Variance exploding diffusion, EDM: ``x_t = x + sigma n``; the time is ``sigma`` itself, data at its low end.

    The path of EDM's networks with ``predict="edm"`` and ``weight=path.edm_weight`` in ``match="x0"``, and of models of
    its table's columns "VP" and "VE" with ``predict="vp"`` and ``predict="ve"``. ``W = 1``: nothing diverges.
    Source: Karras et al. (2206.00364), table 1, whose sampling range is ``[0.002, 80]``.
    """

    sigma_min: float = field(default=0.002, kw_only=True)
    sigma_max: float = field(default=80.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma_min", self.sigma_min, above=0)
        check_number("sigma_max", self.sigma_max, above=self.sigma_min)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def scales(self, t: Tensor) -> Pair:
        return torch.ones_like(t), t

    def rates(self, t: Tensor) -> Pair:
        return torch.zeros_like(t), torch.ones_like(t)

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        return sigma
