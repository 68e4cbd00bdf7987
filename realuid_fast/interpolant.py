"""The interpolant of one batch: ``x_t`` and everything that a loss at ``x_t`` needs, in one object."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import noise as noises
from .contracts import check_tensor
from .errors import UserError
from .functional import interpolate
from .ops import is_channels_last
from .tensors import check_noise, refuse_gradients

if TYPE_CHECKING:
    from .paths.base import Path, Weight


@dataclass(frozen=True)
class Interpolant:
    """A batch at its interpolant ``x_t = a x + b y + c n``; :meth:`Path.draw` makes it.

    Rows are samples: ``R`` of them, of which the last ``n_real`` are real and all others generated.

    Attributes:
        path: the path that drew it.
        match: the match space of the losses, one of :data:`~realuid_fast.paths.MATCH_SPACES`.
        predict: what the networks predict, one of :data:`~realuid_fast.paths.PREDICTIONS`.
        x: samples ``(R, ...)``.
        x_t: the interpolant ``(R, ...)``, a function of ``x`` and ``endpoint`` for autograd.
        t: path times ``(R,)``.
        coef: coefficient rows ``a b c p q s k_out k_x w``, ``(R, 9)``.
        noise: the key that ``n`` is drawn from, or ``n`` itself, ``(noise_rows, ...)``.
        noise_rows: row ``i`` has the noise of row ``i mod noise_rows``.
        endpoint: the second endpoint ``y``, ``(R, ...)``, where the path has one.
        n_real: the number of real rows.
    """

    path: Path
    match: str
    predict: str
    x: Tensor
    x_t: Tensor
    t: Tensor
    coef: Tensor
    noise: Tensor
    noise_rows: int
    endpoint: Tensor | None = None
    n_real: int = 0

    @property
    def network_time(self) -> Tensor:
        """The time that a network is called with, ``(R,)``: see :meth:`Path.network_time`."""
        return self.path.network_time(self.t, self.predict)

    @property
    def network_input(self) -> Tensor:
        """The input of a network, ``(R, ...)``: ``x_t``, or ``c_in x_t`` for a preconditioned network."""
        return self.path.network_input(self.x_t, self.t, self.predict)

    @property
    def read_x_t(self) -> Tensor | None:
        """``x_t`` if the losses read it (``k_x != 0``), else None."""
        return self.x_t if self.path.reads_x_t(self.match, self.predict) else None

    def generated(self) -> Interpolant:
        """The same batch without its real rows."""
        count = self.x.shape[0] - self.n_real
        rows, noise_rows = slice(count), min(self.noise_rows, count)
        noise = self.noise if noises.is_key(self.noise) else self.noise[:noise_rows]
        end = None if self.endpoint is None else self.endpoint[rows]
        return replace(
            self, x=self.x[rows], x_t=self.x_t[rows], t=self.t[rows], coef=self.coef[rows], noise=noise,
            noise_rows=noise_rows, endpoint=end, n_real=0,
        )  # fmt: skip


def draw(
    path: Path,
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
) -> Interpolant:
    """The work of :meth:`Path.draw`, which documents it."""
    check_tensor("x", x)
    check_noise(noise)
    rows = x.shape[0] if x.dim() else 0
    x = _joined("real", x, "x", real)
    if (endpoint is not None) != path.has_endpoint:
        needed = "must be given" if path.has_endpoint else "must not be given"
        raise UserError(f"endpoint {needed} for the path {type(path).__name__}")
    if (endpoint is None) != (real_endpoint is None) and real is not None:
        raise UserError("endpoint and real_endpoint must both be given where real is: every row has an endpoint")
    if real is None and real_endpoint is not None:
        raise UserError("real_endpoint must not be given without real: it holds the endpoints of the real rows")
    if endpoint is not None:
        endpoint = _joined("real_endpoint", endpoint, "endpoint", real_endpoint)
    n_real = x.shape[0] - rows if real is not None else 0
    sharing = n_real > 0 and shared
    drawn = rows if sharing else rows + n_real
    if t is None:
        t = path.sample_time(drawn, generator, x.device)
    elif not isinstance(t, Tensor) or t.shape != (drawn,):
        found = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise UserError(f"t must be a tensor of shape ({drawn},), one time for each row that draws, not {found}")
    refuse_gradients("path.draw", t=t)
    if sharing:
        t = torch.cat((t, t))
    # Coefficients have the type of the arithmetic, float64 for float64 samples alone.
    if (x.dtype == torch.float64) != (t.dtype == torch.float64):
        t = t.double() if x.dtype == torch.float64 else t.float()
    coef = path.coefficients(t, match, predict, weight)
    if coef.requires_grad:
        raise UserError("weight and the path's functions must return tensors without a gradient: no call gives one")
    if not noises.is_key(noise) and noise.shape[:1] != (drawn,):
        raise UserError(
            f"noise must be a key or have {drawn} rows, one for each row that draws, not {tuple(noise.shape)}"
        )
    x_t = interpolate(x, coef, noise, endpoint, drawn)
    return Interpolant(path, match, predict, x, x_t, t, coef, noise, drawn, endpoint, n_real)


def _joined(name: str, above: Tensor, above_name: str, below: Tensor | None) -> Tensor:
    """Generated rows followed by as many real ones, in the memory layout of the generated rows."""
    if below is None:
        return above
    if not isinstance(below, Tensor) or below.shape != above.shape or below.dtype != above.dtype:
        found = f"{tuple(below.shape)} {below.dtype}" if isinstance(below, Tensor) else type(below).__name__
        raise UserError(
            f"{name} must have {above_name}'s shape and dtype, {tuple(above.shape)} {above.dtype}, not {found}: "
            "the losses weigh as many real rows as generated ones"
        )
    if below.device != above.device:
        raise UserError(f"{name} must be on {above_name}'s device {above.device}, not {below.device}")
    if is_channels_last(above) and not above.is_contiguous():
        below = below.contiguous(memory_format=torch.channels_last if above.dim() == 4 else torch.channels_last_3d)
    elif above.is_contiguous():
        below = below.contiguous()
    return torch.cat((above, below))
