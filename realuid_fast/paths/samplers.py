"""Laws that training times are drawn from, one small class each.

Every law but :class:`Beta` is a quantile function of a uniform number, and can be stratified. Draws stay on the device
and are clipped to the path's range.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contracts import type_name
from ..errors import UserError
from .checks import check_number

if TYPE_CHECKING:
    from .base import Path


class Sampler(ABC):
    """A law of times."""

    @abstractmethod
    def draw(
        self,
        n: int,
        path: Path,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``n`` times of ``path``, float32, ``(n,)``."""


@dataclass(frozen=True)
class QuantileSampler(Sampler):
    """A law given by its quantiles.

    Args:
        stratified: one uniform draw in each of ``n`` equal bins, in random order, instead of ``n`` independent ones:
            the same law for one row, less variance for the batch mean.
    """

    stratified: bool = field(default=False, kw_only=True)

    @abstractmethod
    def quantile(self, u: Tensor, path: Path) -> Tensor:
        """Times ``(n,)`` at the shares ``u`` ``(n,)`` of the law.

        A law of times counts from the start of the path's range, a law of noise levels from the least noise.
        """

    def draw(
        self,
        n: int,
        path: Path,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float32)
        if self.stratified:
            u = (torch.randperm(n, generator=generator, device=device) + u) / n
        return self.quantile(u, path).clamp(*path.t_range)


@dataclass(frozen=True)
class Uniform(QuantileSampler):
    """Uniform on the path's range."""

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        return _on_range(u, path)


@dataclass(frozen=True)
class LogitNormal(QuantileSampler):
    """``logit(u) ~ N(mean, std^2)`` for the fraction ``u`` of the path's range, counted from its start; ``std > 0``.

    Source: Esser et al., Scaling Rectified Flow Transformers (2403.03206), section 3.1, whose best is ``(0, 1)``.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number("mean", self.mean)
        check_number("std", self.std, above=0)

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        return _on_range(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)), path)


@dataclass(frozen=True)
class LogNormal(QuantileSampler):
    """``ln sigma ~ N(mean, std^2)`` for the noise level ``sigma = c / a``, on any path that has one; ``std > 0``.

    On :class:`~realuid_fast.paths.DDBMVE` it is the diffusion's ``sigma``, the time.

    Source: Karras et al. (2206.00364), table 1: ``(-1.2, 1.2)``.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        check_number("mean", self.mean)
        check_number("std", self.std, above=0)

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        return path.time_at_sigma(torch.exp(self.mean + self.std * torch.special.ndtri(u)))


@dataclass(frozen=True)
class Karras(QuantileSampler):
    """Noise levels ``sigma = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho``, ``u`` uniform.

    Levels are in units of the data, ``0 < sigma_min < sigma_max``; ``rho > 0`` and ``0 < share <= 1``.

    With a ``share`` below 1, ``u`` is uniform on ``[0, share]``: the schedule without its largest noise levels. SiD's
    generator has 0.8, its ``tmax`` of 800 of 1000 (Zhou et al., 2404.04057; mingyuanzhou/SiD at revision 01fbb13,
    ``run_sid.sh``). Source: Karras et al. (2206.00364), equation 5, read as a law.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    share: float = 1.0

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, above=0)
        check_number("sigma_max", self.sigma_max, above=self.sigma_min)
        check_number("rho", self.rho, above=0)
        check_number("share", self.share, above=0)
        if self.share > 1:
            raise UserError(f"share must be at most 1, got {self.share:g}")

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return path.time_at_sigma((low + (high - low) * (self.share * u)) ** self.rho)


@dataclass(frozen=True)
class Discrete(QuantileSampler):
    """Uniform on a table of path times inside the path's range, as models trained on numbered steps need."""

    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.times, Iterable):
            raise UserError(f"times must be a sequence of path times, not {type_name(self.times)}")
        object.__setattr__(self, "times", tuple(self.times))
        if not self.times:
            raise UserError("times must hold at least one path time")
        for i, value in enumerate(self.times):
            check_number(f"times[{i}]", value)

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        low, high = path.t_range
        if not (low <= min(self.times) and max(self.times) <= high):
            raise UserError(f"times must lie inside the path's range [{low:g}, {high:g}]")
        # A stratified u may round up to 1.
        return _table(self.times, u.device)[(u * len(self.times)).long().clamp(max=len(self.times) - 1)]


@dataclass(frozen=True)
class Beta(Sampler):
    """The fraction of the path's range, counted from its start, is ``Beta(a, b)``, ``a, b > 0``; not stratified."""

    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        check_number("a", self.a, above=0)
        check_number("b", self.b, above=0)

    def draw(
        self,
        n: int,
        path: Path,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        # Beta variables are ratios of gamma variables. In float64 small parameters do not give 0 / 0.
        one = torch.ones(n, device=device, dtype=torch.float64)
        first = torch._standard_gamma(self.a * one, generator)
        second = torch._standard_gamma(self.b * one, generator)
        return _on_range((first / (first + second)).float(), path).clamp(*path.t_range)


@dataclass(frozen=True)
class Shifted(QuantileSampler):
    """``shift u / (1 + (shift - 1) u)`` of the path's range, ``u`` uniform, counted from its start; ``shift > 0``.

    A shift above 1 draws more times near the end of the range, one below 1 (its inverse) as many near the start.
    Source: Esser et al. (2403.03206), equation 23, with data at ``t = 0`` and shift 3.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        check_number("shift", self.shift, above=0)

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        return _on_range(self.shift * u / (1 + (self.shift - 1) * u), path)


SAMPLERS: dict[str, Sampler] = {
    "uniform": Uniform(),
    "stratified": Uniform(stratified=True),
    "logit-normal": LogitNormal(),
    "log-normal": LogNormal(),
    "karras": Karras(),
    "shifted": Shifted(),
}


def build(name: str, settings: Mapping[str, Any] | None = None) -> Sampler:
    """The sampler of a name with numbers of its own in place of the default ones, such as ``{"mean": -0.4}``.

    Raises:
        UserError: an unknown name, or a number that the sampler does not have or refuses.
    """
    if not isinstance(name, str):
        raise UserError(f"a sampler's name must be a string, not {type_name(name)}")
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"the sampler's settings must be a mapping from names to numbers, not {type_name(settings)}")
    # SAMPLERS lacks these two: a table has no default, and a Beta law without numbers is the uniform one.
    bare: dict[str, type[Beta | Discrete]] = {"beta": Beta, "discrete": Discrete}
    default = {} if name in bare else vars(named(name))
    kind: Any = bare[name] if name in bare else type(named(name))
    known = [f.name for f in fields(kind)]
    if unknown := [key for key in settings or {} if key not in known]:
        raise UserError(f"the sampler '{name}' has no setting {unknown[0]!r}; it takes {', '.join(known)}")
    return kind(**{**default, **(settings or {})})


def named(name: str) -> Sampler:
    """The sampler of a name, with its default numbers."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise UserError(f"sampler must be a Sampler or one of {', '.join(SAMPLERS)}, not {name!r}")
    return SAMPLERS[name]


@functools.lru_cache(maxsize=32)
def _table(times: tuple[float, ...], device: torch.device) -> Tensor:
    """The table on its device, copied there once: a copy from the host would stall every draw."""
    return torch.tensor(times, device=device, dtype=torch.float32)


def _on_range(u: Tensor, path: Path) -> Tensor:
    low, high = path.t_range
    return low + (high - low) * u
