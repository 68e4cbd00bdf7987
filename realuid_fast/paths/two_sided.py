"""Paths between two data sets: conditional flows with a source sample, bridges and stochastic interpolants."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from .base import CLIP, Path, Preconditioning, Triple
from .checks import check_number
from .one_sided import Pair, conversion


@dataclass(frozen=True)
class TwoSidedPath(Path):
    """A path with a second endpoint, ``x_t = a(t) x + b(t) y + c(t) n``; ``y`` is the calls' ``endpoint``.

    Subclasses give ``scales(t) -> (a, b, c)`` and ``rates(t) -> (a', b', c')``. A network sees ``x_t`` and may see
    ``y``; a conversion knows only the network's output and ``x_t``. These two fix no more than two of the three
    unknowns ``x, y, n``, so only these pairs of match space and prediction exist:

    ============  ========================================  ==============================
    match         predictions                               conversion
    ============  ========================================  ==============================
    ``velocity``  ``velocity``
    ``x0``        ``x0``, ``edm``, ``residual`` (bridges)   ``c_out F + c_skip x_t``, ``x_t - r F``
    ``noise``     ``noise``, ``score``                      ``-c F``
    ============  ========================================  ==============================

    If ``c = 0`` throughout, ``velocity`` and ``x0`` convert into each other too, because then ``x_t`` and ``x`` fix
    ``y``. Any other pair, say ``velocity`` from ``x0``, lacks a term ``k_y y`` and is refused here. A network that is
    given ``y`` can add that term to its own output and declare the match space as its prediction.

    Args:
        sigma_end: the endpoint's standard deviation that the ``edm`` preconditioning assumes.
        covariance: the covariance of data and endpoint that it assumes.
    """

    into_x0: ClassVar[tuple[str, ...]] = ("x0", "edm")

    sigma_end: float = field(default=0.5, kw_only=True)
    covariance: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma_end", self.sigma_end, above=0)
        check_number("covariance", self.covariance)
        if abs(self.covariance) > self.sigma_data * self.sigma_end:
            raise UserError(
                f"covariance must not exceed sigma_data sigma_end = {self.sigma_data * self.sigma_end:g} in size, "
                f"got {self.covariance:g}"
            )

    @abstractmethod
    def scales(self, t: Tensor) -> Triple:
        """``(a(t), b(t), c(t))``, each shaped like ``t``."""

    @abstractmethod
    def rates(self, t: Tensor) -> Triple:
        """``(a'(t), b'(t), c'(t))``, each shaped like ``t``."""

    @property
    def noiseless(self) -> bool:
        """Whether ``c = 0`` at every time."""
        return False

    @property
    def b_zero(self) -> float | None:
        """The end of ``t_range`` at which ``b`` and ``c`` vanish; None if they do not."""
        return None

    def preconditioning(self, t: Tensor) -> Preconditioning:
        a, b, c = self.scales(t)
        data, end, mixed = self.sigma_data**2, self.sigma_end**2, self.covariance
        variance = a**2 * data + b**2 * end + 2 * a * b * mixed + c**2
        c_in = torch.rsqrt(variance)
        return Preconditioning(
            c_skip=(a * data + b * mixed) / variance,
            c_out=torch.sqrt(b**2 * (data * end - mixed**2) + data * c**2) * c_in,
            c_in=c_in,
            c_noise=torch.log(t) * 250,
        )

    def _scales(self, t: Tensor) -> Triple:
        return self.scales(t)

    def _rates(self, t: Tensor) -> Triple:
        return self.rates(t)

    def _check_pair(self, match: str, predict: str) -> None:
        super()._check_pair(match, predict)
        name = type(self).__name__
        if self.noiseless and ("noise" in (match, predict) or predict == "score"):
            raise UserError(f"match and predict must not be noise or score on {name} with c = 0: x_t holds no noise")
        known = {"velocity": ("velocity",), "x0": self.into_x0, "noise": ("noise", "score")}[match]
        if self.noiseless:
            known += ("x0",) if match == "velocity" else ("velocity",)
        if predict not in known:
            raise UserError(
                f"predict={predict!r} cannot be taken into match={match!r} on {name}: that needs the endpoint y beside "
                f"x_t and the network's output; match={match!r} takes {', '.join(known)}"
            )

    def _singular_times(self, match: str, predict: str) -> tuple[float | None, ...]:
        if predict == "edm":  # the logarithm of t, and c_out = 0
            return (0.0, self.b_zero)
        return (self.b_zero,) if (match, predict) == ("velocity", "x0") else ()

    def _conversion(self, match: str, predict: str, t: Tensor, scales: Triple, rates: Triple) -> Pair:
        a, b, c = scales
        if {match, predict} == {"velocity", "x0"}:
            return conversion(match, predict, a, b, rates[0], rates[1])
        if predict == "edm":
            edm = self.preconditioning(t)
            return edm.c_out, edm.c_skip
        return -c, torch.zeros_like(t)  # noise from score

    def _precondition(self, t: Tensor, predict: str) -> Pair:
        if predict != "edm":
            raise UserError(f"predict must not be {predict} on {type(self).__name__}: it is for one-sided paths only")
        edm = self.preconditioning(t.clamp(*self.time_range("x0", predict)))
        return edm.c_in, edm.c_noise


@dataclass(frozen=True)
class ICFM(TwoSidedPath):
    """Independent conditional flow matching: ``x_t = t x + (1 - t) y + sigma n``, source sample ``y``, data at 1.

    ``v = x - y``. With pairs from :func:`realuid_fast.couplings.couple` in place of independent ones it is OT-CFM.
    Source: Tong et al. (2302.00482), section 3, and their package torchcfm, whose default is ``sigma = 0``.
    """

    sigma: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma", self.sigma)
        if self.sigma < 0:
            raise UserError(f"sigma must not be negative, got {self.sigma:g}")

    @property
    def noiseless(self) -> bool:
        return self.sigma == 0

    @property
    def b_zero(self) -> float | None:
        return 1.0 if self.noiseless else None

    def scales(self, t: Tensor) -> Triple:
        return t, 1 - t, torch.full_like(t, self.sigma)

    def rates(self, t: Tensor) -> Triple:
        one = torch.ones_like(t)
        return one, -one, torch.zeros_like(t)


@dataclass(frozen=True)
class Bridge(TwoSidedPath):
    """A Brownian bridge under any diffusion rate: data ``x`` at ``t = 0``, endpoint ``y = x_T`` at ``t = T``.

    With ``g(t)`` the variance that the diffusion adds from 0 to ``t`` and ``h(t) = g(T) - g(t)``::

        a = h / g(T)        b = g / g(T)        c = sqrt(g h / g(T))        r = sqrt(g)

    Subclasses give ``variances(t) -> (g, h)`` and ``rate(t) = g'``. ``c'`` diverges at both ends: times stay 1e-4 of
    the range away from them. Source: Liu et al., I2SB (2302.05872), proposition 3.3 and equation 11.
    """

    into_x0 = ("x0", "edm", "residual")

    @abstractmethod
    def variances(self, t: Tensor) -> Pair:
        """``(g(t), h(t))``."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """``g'(t)``."""

    @property
    def t_range(self) -> tuple[float, float]:
        return CLIP, 1 - CLIP

    @property
    def steep(self) -> tuple[bool, bool]:
        return True, True

    def _conversion(self, match: str, predict: str, t: Tensor, scales: Triple, rates: Triple) -> Pair:
        if predict == "residual":
            return -torch.sqrt(self.variances(t)[0]), torch.ones_like(t)
        return super()._conversion(match, predict, t, scales, rates)

    def scales(self, t: Tensor) -> Triple:
        g, h = self.variances(t)
        return h / (g + h), g / (g + h), torch.sqrt(g * h / (g + h))

    def rates(self, t: Tensor) -> Triple:
        g, h = self.variances(t)
        _, _, c = self.scales(t)
        share = self.rate(t) / (g + h)
        return -share, share, share * (h - g) / (2 * c)


@dataclass(frozen=True)
class BrownianBridge(Bridge):
    """``x_t = (1 - t/T) x + (t/T) y + sqrt(eps t (T - t) / T) n``, the endpoint ``y`` at ``t = T``.

    ``residual`` is ``(x_t - x) / sqrt(eps t)``. Times stay ``1e-4 T`` away from the ends, where ``c'`` diverges.
    Source: Gushchin et al., Inverse Bridge Matching Distillation (2502.01362), section 2; Shi et al. (2303.16852).
    """

    eps: float = field(default=1.0, kw_only=True)
    T: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eps", self.eps, above=0)
        check_number("T", self.T, above=0)

    @property
    def t_range(self) -> tuple[float, float]:
        return CLIP * self.T, (1 - CLIP) * self.T

    def variances(self, t: Tensor) -> Pair:
        return self.eps * t, self.eps * (self.T - t)

    def rate(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.eps)


@dataclass(frozen=True)
class I2SB(Bridge):
    """The image-to-image Schrödinger bridge: clean ``x`` at ``t = 0``, degraded ``y`` at ``t = 1``.

    The diffusion rate is ``(sqrt(beta_min) + (sqrt(beta_max) - sqrt(beta_min)) t)^2`` up to ``t = 1/2`` and mirrored
    after it. The network predicts ``residual`` and is called with ``1000 t``. Source: Liu et al. (2302.05872) and
    their release, whose default ``beta_max`` is 0.3 and whose 1000 steps discretise this schedule.
    """

    beta_min: float = field(default=0.1, kw_only=True)
    beta_max: float = field(default=0.3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta_min", self.beta_min, above=0)
        check_number("beta_max", self.beta_max, above=0)

    @property
    def own_time_scale(self) -> float:
        return 1000.0

    def _added(self, t: Tensor) -> Tensor:
        """``g(t)``: in the first half from the near end, in the second half as the whole less the mirror image."""
        root, slope = math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)

        def first_half(t: Tensor) -> Tensor:
            return t * (root**2 + root * slope * t + slope**2 * t**2 / 3)

        whole = 2 * (0.5 * (root**2 + root * slope / 2 + slope**2 / 12))
        return torch.where(t <= 0.5, first_half(t), whole - first_half(1 - t))

    def variances(self, t: Tensor) -> Pair:
        return self._added(t), self._added(1 - t)

    def rate(self, t: Tensor) -> Tensor:
        root, slope = math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)
        return (root + slope * torch.minimum(t, 1 - t)) ** 2


@dataclass(frozen=True)
class DDBMVE(TwoSidedPath):
    """The variance exploding diffusion bridge, ``r = t^2 / T^2``: ``a = 1 - r, b = r, c = t sqrt(1 - r)``.

    Data at ``t = 0``, endpoint ``y`` at ``t = T = sigma_max``; the time is the diffusion's ``sigma``. The network
    predicts ``edm`` and is called with ``250 ln t``. ``c'`` diverges at ``T``: times end at ``(1 - 1e-4) T``.
    Source: Zhou et al., DDBM (2309.16948), section 3 and table 1.
    """

    sigma_min: float = field(default=0.002, kw_only=True)
    sigma_max: float = field(default=80.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma_min", self.sigma_min, above=0)
        check_number("sigma_max", self.sigma_max, above=self.sigma_min / (1 - CLIP))

    @property
    def t_range(self) -> tuple[float, float]:
        return self.sigma_min, (1 - CLIP) * self.sigma_max

    @property
    def steep(self) -> tuple[bool, bool]:
        return False, True

    def scales(self, t: Tensor) -> Triple:
        share = (t / self.sigma_max) ** 2
        left = (self.sigma_max - t) * (self.sigma_max + t) / self.sigma_max**2
        return left, share, t * torch.sqrt(left)

    def rates(self, t: Tensor) -> Triple:
        left, share, _ = self.scales(t)
        speed = 2 * t / self.sigma_max**2
        return -speed, speed, (left - share) / torch.sqrt(left)

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        """``sigma`` itself: the diffusion's, from which ``c / a = sigma / sqrt(1 - r)`` differs."""
        return sigma


@dataclass(frozen=True)
class DDBMVP(TwoSidedPath):
    """The variance preserving diffusion bridge: data at ``t = 0``, endpoint ``y`` at ``t = 1``.

    With ``H(t) = beta_min t + beta_d t^2 / 2`` the published means and variance are::

        a = sinh((H(1) - H)/2) / sinh(H(1)/2)      b = sinh(H/2) / sinh(H(1)/2)
        c^2 = 2 sinh(H/2) sinh((H(1) - H)/2) / sinh(H(1)/2)

    which loses nothing at either end. The network predicts ``edm`` and is called with ``250 ln t``. ``c'`` diverges at
    both ends: times stay 1e-4 away from them. Source: Zhou et al., DDBM (2309.16948), section 3 and table 1, with
    their ``beta_d = 2, beta_min = 0.1``.
    """

    beta_min: float = field(default=0.1, kw_only=True)
    beta_d: float = field(default=2.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta_min", self.beta_min, above=0)
        check_number("beta_d", self.beta_d, above=0)

    @property
    def t_range(self) -> tuple[float, float]:
        return CLIP, 1 - CLIP

    @property
    def steep(self) -> tuple[bool, bool]:
        return True, True

    def _halves(self, t: Tensor) -> tuple[Tensor, Tensor, float]:
        """``H/2``, ``(H(1) - H)/2`` and ``sinh(H(1)/2)``."""
        passed = t * (self.beta_min + self.beta_d * t / 2) / 2
        left = (1 - t) * (self.beta_min + self.beta_d * (1 + t) / 2) / 2
        return passed, left, math.sinh((self.beta_min + self.beta_d / 2) / 2)

    def scales(self, t: Tensor) -> Triple:
        passed, left, whole = self._halves(t)
        a, b = torch.sinh(left) / whole, torch.sinh(passed) / whole
        return a, b, torch.sqrt(2 * whole * a * b)

    def rates(self, t: Tensor) -> Triple:
        passed, left, whole = self._halves(t)
        speed = (self.beta_min + self.beta_d * t) / 2
        _, _, c = self.scales(t)
        # (c^2)' = 2 speed sinh(left - passed) / whole
        dc = speed * torch.sinh(left - passed) / (whole * c)
        return -speed * torch.cosh(left) / whole, speed * torch.cosh(passed) / whole, dc


def _gamma_root(t: Tensor) -> Pair:
    root = torch.sqrt(t * (1 - t))
    return root, (1 - 2 * t) / (2 * root)


def _gamma_parabola(t: Tensor) -> Pair:
    return t * (1 - t), 1 - 2 * t


def _gamma_sin2(t: Tensor) -> Pair:
    t = t - torch.round(t)  # exact, so sin(pi t) is 0 at t = 1
    return torch.sin(math.pi * t) ** 2, math.pi * torch.sin(2 * math.pi * t)


def _gamma_zero(t: Tensor) -> Pair:
    return torch.zeros_like(t), torch.zeros_like(t)


GAMMAS: dict[str, Callable[[Tensor], Pair]] = {
    "root": _gamma_root,
    "parabola": _gamma_parabola,
    "sin2": _gamma_sin2,
    "zero": _gamma_zero,
}


@dataclass(frozen=True)
class StochasticInterpolant(TwoSidedPath):
    """``x_t = alpha(t) x + beta(t) y + gamma(t) n``, data at ``t = 1``, endpoint ``y`` at ``t = 0``.

    Args:
        mix: ``"linear"``, ``alpha = t, beta = 1 - t``, or ``"trigonometric"``, ``sin`` and ``cos`` of ``pi t / 2``.
        gamma: ``"root"`` ``sqrt(t (1 - t))``, ``"parabola"`` ``t (1 - t)``, ``"sin2"`` ``sin^2(pi t)``, or ``"zero"``.

    The derivative of ``"root"`` diverges at both ends: its times stay 1e-4 away from them. Other mixes and gammas:
    :func:`~realuid_fast.paths.custom`. Source: Albergo, Boffi and Vanden-Eijnden (2303.08797), definition 2.1
    and the choices of its section 4.
    """

    mix: str = field(default="linear", kw_only=True)
    gamma: str = field(default="root", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix not in ("linear", "trigonometric"):
            raise UserError(f"mix must be linear or trigonometric, not {self.mix!r}")
        if self.gamma not in GAMMAS:
            raise UserError(f"gamma must be one of {', '.join(GAMMAS)}, not {self.gamma!r}")

    @property
    def t_range(self) -> tuple[float, float]:
        return (CLIP, 1 - CLIP) if self.gamma == "root" else (0.0, 1.0)

    @property
    def steep(self) -> tuple[bool, bool]:
        return self.gamma == "root", self.gamma == "root"

    @property
    def noiseless(self) -> bool:
        return self.gamma == "zero"

    @property
    def b_zero(self) -> float:
        return 1.0

    def scales(self, t: Tensor) -> Triple:
        c = GAMMAS[self.gamma](t)[0]
        if self.mix == "linear":
            return t, 1 - t, c
        # cos(pi t / 2) would round to a negative number at t = 1.
        return torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * (1 - t)), c

    def rates(self, t: Tensor) -> Triple:
        dc = GAMMAS[self.gamma](t)[1]
        if self.mix == "linear":
            return torch.ones_like(t), -torch.ones_like(t), dc
        a, b, _ = self.scales(t)
        return math.pi / 2 * b, -math.pi / 2 * a, dc
