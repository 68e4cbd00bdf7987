"""The base of every path: rows of nine coefficients, native predictions, and the way a network is called for them.

A path is a handful of scalar functions of time. The conditional target in any match space, and the conversion of any
native prediction into it, follow from them. So a new path is one small class and no kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import interpolant
from ..coefficients import Coefficients
from ..contracts import check_device, check_tensor, check_whole, type_name
from ..errors import UserError
from .checks import check_choice, check_number, check_times
from .facts import fact
from .samplers import Sampler, named

MATCH_SPACES = ("velocity", "x0", "noise")
PREDICTIONS = ("velocity", "x0", "noise", "score", "v", "edm", "vp", "ve", "residual")
# Predictions whose networks see a scaled x_t, and a function of the noise level in place of the time.
PRECONDITIONED = ("edm", "vp", "ve")

# If a conversion or a derivative diverges at an end of time, that end is moved inwards by this share of the range.
CLIP = 1e-4

Weight = Callable[[Tensor], Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class Preconditioning(NamedTuple):
    """``x0 = c_skip x_t + c_out F(c_in x_t, c_noise)``, each ``(R,)``."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class Path(ABC):
    """``x_t = a(t) x + b(t) y + c(t) n``: data ``x``, perhaps a second endpoint ``y``, noise ``n ~ N(0, I)``.

    What a network may predict (its raw output ``F``), beside ``x0``, ``noise`` and the conditional ``velocity``
    ``v = a' x + b' y + c' n``:

    ============  =================================================  ================================================
    ``score``     ``-n / c``                                         Song et al., 2011.13456
    ``v``         ``a n - c x``                                      Salimans and Ho, 2202.00512, section 4
    ``edm``       ``x0 = c_skip x_t + c_out F(c_in x_t, c_noise)``   Karras et al., 2206.00364, table 1; with a second
                                                                     endpoint Zhou et al. (DDBM), 2309.16948, section 4
    ``vp``        ``n = F(c_in x_t, c_noise)``, column "VP"          Karras et al., 2206.00364, table 1
    ``ve``        ``-n = F(c_in x_t, c_noise)``, column "VE"         Karras et al., 2206.00364, table 1
    ``residual``  ``(x_t - x) / r(t)`` with a bridge's scale ``r``   Liu et al. (I2SB), 2302.05872, equation 12
    ============  =================================================  ================================================

    A conversion is ``f = k_out F + k_x x_t``: it knows the network's output and ``x_t`` and nothing else. A pair of
    match space and prediction that would need more is refused; :class:`OneSidedPath` and :class:`TwoSidedPath` say
    which exist.

    Args:
        sampler: the law of :meth:`sample_time`, a :class:`~realuid_fast.paths.samplers.Sampler` or a name
            in :data:`~realuid_fast.paths.samplers.SAMPLERS`.
        time_scale: factor on the time that the network is called with; the path's own convention when None.
        sigma_data: the data's standard deviation that the ``edm`` preconditioning assumes.

    Raises:
        UserError: a sampler or a number cannot be used; the error names it.
    """

    # Whether the path has a second endpoint y. If so, every call must be given one.
    has_endpoint: ClassVar[bool] = True

    sampler: str | Sampler = "uniform"
    time_scale: float | None = field(default=None, kw_only=True)
    sigma_data: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.sampler, str):
            named(self.sampler)
        elif not isinstance(self.sampler, Sampler):
            raise UserError(f"sampler must be a name or a Sampler, not {self.sampler!r}")
        if self.time_scale is not None:
            check_number("time_scale", self.time_scale, above=0)
        check_number("sigma_data", self.sigma_data, above=0)

    @property
    def t_range(self) -> tuple[float, float]:
        """The permitted times: every coefficient of a pair without division is finite on it, ends included."""
        return 0.0, 1.0

    @property
    def own_time_scale(self) -> float:
        """The default of ``time_scale``."""
        return 1.0

    @property
    def steep(self) -> tuple[bool, bool]:
        """Whether ``c'`` diverges just outside the lower and the upper end of ``t_range``, as that of a root does."""
        return False, False

    def time_range(self, match: str = "velocity", predict: str = "velocity") -> tuple[float, float]:
        """The times that :meth:`coefficients` clips to: ``t_range`` without ends at which this pair diverges.

        Such an end is moved inwards by :data:`CLIP` (1e-4) of the range. A time beyond it gets the row of that end.
        """
        self._check_pair(match, predict)
        low, high = self.t_range
        singular = self._singular_times(match, predict)
        inward = CLIP * (high - low)
        return low + inward * (low in singular), high - inward * (high in singular)

    def reads_x_t(self, match: str = "velocity", predict: str = "velocity") -> bool:
        """Whether ``k_x`` differs from zero, so that the losses need ``x_t``."""
        self._check_pair(match, predict)
        return _uses(self, "k_x", match, predict)

    def target_has_x(self, match: str = "velocity") -> bool:
        """Whether ``p`` differs from zero, so that the target of the match space depends on the sample ``x``."""
        self._check_pair(match, match)
        return _uses(self, "p", match, match)

    def coefficients(
        self, t: Tensor, match: str = "velocity", predict: str = "velocity", weight: Weight | None = None
    ) -> Tensor:
        """The nine coefficients of every row.

        Args:
            t: path times, shape ``(R,)``, floating, inside ``t_range``; clipped to ``time_range(match, predict)``.
            match: match space of the distance: ``"velocity"``, ``"x0"`` or ``"noise"``.
            predict: the network's native prediction, one of ``PREDICTIONS``.
            weight: the time weight ``w(t)``, a function from ``(R,)`` to ``(R,)``; one when not given.

        Returns:
            ``(R, 9)`` float32 (float64 for float64 ``t``) on ``t``'s device, columns ``a b c p q s k_out k_x w`` of
            ``x_t = a x + b y + c n``, ``tgt = p x + q y + s n`` and ``f = k_out F + k_x x_t``.
            :class:`Coefficients` reaches them by name.

        Raises:
            UserError: an unknown ``match`` or ``predict``, a pair that has no conversion on this path, a ``t`` of the
                wrong shape or dtype, or (on CPU; elsewhere with ``REALUID_FAST_CONTRACTS=1``, since reading ``t``
                stalls the device) a ``t`` outside ``t_range``.
        """
        self._check_pair(match, predict)
        check_times(t, self.t_range)
        t = (t if t.dtype == torch.float64 else t.float()).clamp(*self.time_range(match, predict))
        scales, rates = self._scales(t), self._rates(t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        p, q, s = {"velocity": rates, "x0": (one, zero, zero), "noise": (zero, zero, one)}[match]
        k_out, k_x = (one, zero) if match == predict else self._conversion(match, predict, t, scales, rates)
        w = one if weight is None else _weights(weight, t)
        return torch.stack((*scales, p, q, s, k_out, k_x, w), dim=-1)

    def sample_time(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw ``n`` path times in ``t_range``, float32, on ``device``, without reading anything back.

        Raises:
            UserError: ``n`` is not a whole number from 0 on, ``generator`` is not one, or the device cannot be used.
        """
        check_whole("n", n)
        if n < 0:
            raise UserError(f"n must not be negative, got {n}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise UserError(f"generator must be a torch.Generator or None, not {type_name(generator)}")
        if device is not None:
            check_device(device)
        sampler = named(self.sampler) if isinstance(self.sampler, str) else self.sampler
        try:
            return sampler.draw(n, self, generator, device)
        except AssertionError as error:
            # A torch without CUDA raises an AssertionError for the device "cuda".
            raise UserError(f"device {str(device)!r} cannot be used: {error}") from error

    def draw(
        self,
        x: Tensor,
        noise: Tensor,
        *,
        real: Tensor | None = None,
        endpoint: Tensor | None = None,
        real_endpoint: Tensor | None = None,
        t: Tensor | None = None,
        match: str = "velocity",
        predict: str = "velocity",
        weight: Weight | None = None,
        shared: bool = True,
        generator: torch.Generator | None = None,
    ) -> interpolant.Interpolant:
        """Draw times and the interpolant of a batch, ``x_t = a x + b y + c n``, for the losses of :mod:`.losses`.

        Args:
            x: generated samples ``(B, ...)``, or training samples for :func:`~realuid_fast.matching_loss`. ``x_t`` is
                differentiable in them.
            noise: a key of a :class:`~realuid_fast.NoiseStream`, or normals with a row for each row that draws.
            real: as many real samples, for the fake model's turn only. They become the last rows of the batch.
            endpoint, real_endpoint: the second endpoint ``y`` of either half, on a two-sided path.
            t: path times for the rows that draw their own, no gradient wanted; from :meth:`sample_time` if not given.
            match, predict, weight: as for :meth:`coefficients`.
            shared: whether real row ``i`` has the time and the noise of generated row ``i``; then ``B`` rows draw, else
                all ``2 B``.
            generator: draws the times; torch's default generator when None.

        Returns:
            an :class:`~realuid_fast.interpolant.Interpolant` of ``B`` rows, with ``real`` of ``2 B``.

        Raises:
            UserError: tensors do not agree, an endpoint is missing, or :meth:`coefficients` refuses an argument.

        Source: RealUID (2509.22459), algorithm 1, shares times and noise.
        """
        return interpolant.draw(
            self, x, noise, real=real, endpoint=endpoint, real_endpoint=real_endpoint, t=t, match=match,
            predict=predict, weight=weight, shared=shared, generator=generator,
        )  # fmt: skip

    def network_time(self, t: Tensor, predict: str = "velocity") -> Tensor:
        """The time argument of a network at path time ``t``: ``time_scale t``, or ``c_noise`` if preconditioned."""
        check_tensor("t", t)
        check_choice("predict", predict, PREDICTIONS)
        if predict in PRECONDITIONED:
            return self._precondition(t, predict)[1]
        scale = self.own_time_scale if self.time_scale is None else self.time_scale
        return t if scale == 1 else scale * t

    def network_input(self, x_t: Tensor, t: Tensor, predict: str = "velocity") -> Tensor:
        """The input of a network at ``x_t``, ``(R, ...)``: ``x_t`` itself, or ``c_in x_t`` if preconditioned."""
        check_tensor("x_t", x_t)
        check_tensor("t", t)
        check_choice("predict", predict, PREDICTIONS)
        if predict not in PRECONDITIONED:
            return x_t
        c_in = self._precondition(t, predict)[0].view(-1, *[1] * (x_t.dim() - 1))
        return (c_in * x_t).to(x_t.dtype)

    @abstractmethod
    def preconditioning(self, t: Tensor) -> Preconditioning:
        """``c_skip, c_out, c_in, c_noise`` of the ``edm`` prediction at path times ``t``, ``(R,)``.

        For data (and an endpoint) of the assumed second moments they give the network's input and target unit variance.
        """

    def edm_weight(self, t: Tensor) -> Tensor:
        """``1 / c_out^2``: with this weight an ``x0`` loss is the squared error of an ``edm`` network's raw output.

        ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2`` on the path :class:`VE`. Source: Karras et al. (2206.00364),
        table 1.
        """
        return self.preconditioning(t).c_out ** -2

    def data_scale(self, t: Tensor) -> Tensor:
        """``a(t)`` as a time weight."""
        return self._scales(t)[0]

    def noise_variance(self, t: Tensor) -> Tensor:
        """``c(t)^2`` as a time weight."""
        return self._scales(t)[2] ** 2

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        """The path time of noise level ``sigma``, for samplers that are laws of the noise level."""
        raise UserError(
            f"{type(self).__name__} has no noise level that a time could be found for: choose a sampler of times"
        )

    @abstractmethod
    def _scales(self, t: Tensor) -> Triple:
        """``(a, b, c)`` at ``t``."""

    @abstractmethod
    def _rates(self, t: Tensor) -> Triple:
        """``(a', b', c')`` at ``t``."""

    @abstractmethod
    def _conversion(self, match: str, predict: str, t: Tensor, scales: Triple, rates: Triple) -> tuple[Tensor, Tensor]:
        """``(k_out, k_x)`` of a permitted pair whose match space and prediction differ."""

    @abstractmethod
    def _precondition(self, t: Tensor, predict: str) -> tuple[Tensor, Tensor]:
        """``(c_in, c_noise)`` of a preconditioned prediction."""

    def _check_pair(self, match: str, predict: str) -> None:
        check_choice("match", match, MATCH_SPACES)
        check_choice("predict", predict, PREDICTIONS)

    def _singular_times(self, match: str, predict: str) -> tuple[float | None, ...]:
        """Times at which this pair's conversion, or its preconditioning, diverges."""
        return ()


def _weights(weight: Weight, t: Tensor) -> Tensor:
    if not callable(weight):
        raise UserError(f"weight must be a function from times (R,) to weights (R,), not {type_name(weight)}")
    w = weight(t)
    if not isinstance(w, Tensor) or w.shape != t.shape:
        found = tuple(w.shape) if isinstance(w, Tensor) else type_name(w)
        raise UserError(f"weight must return one value a row, shape {tuple(t.shape)}, not {found}")
    return w.to(t.dtype)


@fact
def _uses(path: Path, column: str, match: str, predict: str) -> bool:
    """Whether a column of the coefficients differs from zero at some time."""
    low, high = path.t_range
    inside = low + (high - low) * torch.linspace(0.1, 0.9, 65, dtype=torch.float64)
    return bool((getattr(Coefficients(path.coefficients(inside, match, predict)), column) != 0).any())
