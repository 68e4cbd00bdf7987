"""The loss functions of the published RealUID code, same signatures and values, computed by the fused calls.

On the path ``x_t = t x1 + (1 - t) x0`` with target ``x1 - x0``; sums over pixels, divided by the batch. As there, the
fake turn's value is to be MAXIMISED over ``u`` and the generator turn's minimised. What differs: the fake turn
differentiates in ``u`` alone and runs both halves in one forward; ``dist_loss`` with ``alpha = beta = 1`` leaves the
real half out; ``general_dist_loss`` honours ``gamma``, which is ignored there (``alpha`` stands in its place).

Two fake turns are errors. ``general_dist_loss`` with ``gamma = 1`` and another ``alpha`` or ``beta`` has no maximum:
its real half is linear in ``u``. ``dist_loss`` with ``alpha = 1`` and another ``beta`` has one in the published code,
which leaves its real half out there: ``u = beta u_g`` with the generator's own field ``u_g``, whatever the real data
are. Its generator turn is then ``||u* - beta u_g||^2`` and ends at the field ``u* / beta``, which is not the teacher's.
The generator turn has no real half, and its formula takes any numbers.

``t`` is a tensor of ``B`` times in any shape, such as ``(B,)`` or ``(B, 1, 1, 1)``, or one time for all rows, a number
or a tensor with one element. Its dtype is turned into that of the samples' arithmetic, and the networks are called
with ``(B,)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, ops
from ..errors import UserError
from ..objectives import UID, GeneralRealUID, Objective, RealUID
from ..paths import Linear

Network = Callable[..., Tensor]
_PATH = Linear()


def dist_loss(
    u: Network,
    u_star: Network,
    t: Tensor | float,
    x0: Tensor,
    x1_gen: Tensor,
    x1_data: Tensor | None,
    y: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    generator_turn: bool = True,
) -> Tensor:
    """RealUID: ``alpha ||f* - (beta/alpha) v||^2 - alpha ||f - (beta/alpha) v||^2``, ``v = x1 - x0``.

    Args:
        u, u_star: fake model and frozen teacher, called as ``net(t, x_t, y)``.
        t: times, see above; ``x0`` noise, ``x1_gen`` generated and ``x1_data`` real samples ``(B, ...)``; ``y`` labels.
        generator_turn: False leaves out the teacher's term and takes off the real half's, with ``1 - alpha, 1 - beta``.

    Raises:
        UserError: tensors that do not agree, times that are neither one nor one a sample; in the fake turn an
            ``alpha`` or ``beta`` that :func:`~realuid_fast.objectives.RealUID` refuses, in the generator turn an
            ``alpha`` of 0.

    Source: RealUID (2509.22459), the real-data loss.
    """
    if generator_turn:
        if alpha == 0:
            raise UserError("alpha must not be 0: the formula divides by it")
        return _generator(u, u_star, t, x0, x1_gen, y, _formula(alpha, beta, alpha))
    if alpha == 1 and beta != 1:
        raise UserError(
            f"alpha = 1 requires beta = 1, got beta = {beta:g}: the published function leaves its real half out there "
            "and draws the generator's field to u* / beta, without real data; with that half it would be unbounded"
        )
    objective = _plain(alpha, beta)
    x, x_t, t, y, coef, x0 = _fake_rows(t, x0, x1_gen, x1_data, y, objective)
    out = _laid_out(u(t, x_t, y), x)
    rows = x0.shape[0]
    return -functional.fake_loss(
        objective, fake_out=out, x=x, x_t=None, coef=coef, noise=x0, n_real=x.shape[0] - rows, noise_rows=rows
    )


def general_dist_loss(
    u: Network,
    u_star: Network,
    t: Tensor | float,
    x0: Tensor,
    x1_gen: Tensor,
    x1_data: Tensor | None,
    y: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    parametrization: str = "standard",
    generator_turn: bool = True,
) -> Tensor:
    """General RealUID: ``-gamma ||d||^2 + 2 beta <d, v> - 2 alpha <d, f*>``, ``d = kappa (f - f*)``.

    ``kappa`` is 1 for ``parametrization="standard"`` and ``beta`` for ``"beta"``; the fake turn adds the real half's
    terms with ``1 - gamma, 1 - beta, 1 - alpha``. The other arguments are :func:`dist_loss`'s.

    Raises:
        UserError: tensors that do not agree, an unknown ``parametrization``; in the fake turn numbers that
            :func:`~realuid_fast.objectives.GeneralRealUID` refuses.

    Source: RealUID (2509.22459), the general real-data loss.
    """
    if parametrization not in ("standard", "beta"):
        raise UserError(f"parametrization must be 'standard' or 'beta', not {parametrization!r}")
    kappa = beta if parametrization == "beta" else 1.0
    if generator_turn:
        return _generator(u, u_star, t, x0, x1_gen, y, _formula(alpha, beta, gamma, kappa))
    objective = _general(alpha, beta, gamma, kappa)
    x, x_t, t, y, coef, x0 = _fake_rows(t, x0, x1_gen, x1_data, y, objective)
    fake = _laid_out(u(t, x_t, y), x)
    with torch.no_grad():
        teacher = _laid_out(u_star(t, x_t, y), x)
    # Either half is the generator's formula with its own numbers: a sum over d itself, exact where u is near u_star.
    halves = [_formula(alpha, beta, gamma, kappa)]
    if objective.needs_real:
        halves.append(_formula(1 - alpha, 1 - beta, 1 - gamma, kappa))
    rows = x0.shape[0]
    parts = zip(halves, teacher.split(rows), fake.split(rows), x.split(rows), coef.split(rows), strict=True)
    return torch.stack(
        [
            functional.generator_loss(half, teacher_out=a, fake_out=b, x=c, x_t=None, coef=d, noise=x0)
            for half, a, b, c, d in parts
        ]
    ).sum()


def GANloss(
    u: Network,
    t: Tensor | float,
    x0: Tensor,
    x1_gen: Tensor,
    x1_data: Tensor,
    y: Tensor | None = None,
    generator_turn: bool = True,
) -> Tensor:
    """Non-saturating adversarial loss on the logits of ``u.forward_head(t, x_t, y)``.

    ``softplus(-h(gen))`` in the generator's turn; ``-softplus(h(gen)) - softplus(-h(data))``, to be maximised, in the
    other; means over all logits, in float32 (float64 for float64).

    Raises:
        UserError: times that are neither one number nor one a sample.

    Source: David-cripto/RealUID at revision 6f63be4, ``GANloss``.
    """
    t = _times(t, x1_gen)
    weight = t.view(-1, *[1] * (x0.dim() - 1))

    def logits(x1: Tensor) -> Tensor:
        x_t = torch.lerp(x0.to(t.dtype), x1.to(t.dtype), weight).to(x1.dtype)
        out: Tensor = u.forward_head(t, x_t, y)  # type: ignore[attr-defined]
        return out if out.dtype == torch.float64 else out.float()

    if generator_turn:
        return F.softplus(-logits(x1_gen)).mean()
    return -F.softplus(logits(x1_gen.detach())).mean() - F.softplus(-logits(x1_data.detach())).mean()


class _Formula(Objective):
    """The numbers of one turn's formula. They need not be an objective's, which has a maximum in the other turn."""

    def _check(self) -> None:
        pass


@functools.lru_cache(maxsize=64)
def _formula(alpha: float, beta: float, gamma: float, kappa: float = 1.0) -> Objective:
    return _Formula("compat", alpha, beta, gamma, Q=gamma, kappa=kappa)


@functools.lru_cache(maxsize=64)
def _plain(alpha: float, beta: float) -> Objective:
    return UID() if alpha == beta == 1 else RealUID(alpha, beta)


@functools.lru_cache(maxsize=64)
def _general(alpha: float, beta: float, gamma: float, kappa: float) -> Objective:
    return GeneralRealUID(alpha, beta, gamma, kappa)


def _generator(
    u: Network, u_star: Network, t: Tensor | float, x0: Tensor, x1: Tensor, y: Tensor | None, objective: Objective
) -> Tensor:
    x1, t = _laid_out(x1, x1), _times(t, x1)
    coef, x0 = _PATH.coefficients(t), _laid_out(x0, x1)
    x_t = functional.interpolate(x1, coef, x0)
    fake, teacher = _laid_out(u(t, x_t, y), x1), _laid_out(u_star(t, x_t, y), x1)
    return functional.generator_loss(objective, teacher_out=teacher, fake_out=fake, x=x1, x_t=None, coef=coef, noise=x0)


def _fake_rows(
    t: Tensor | float, x0: Tensor, x1_gen: Tensor, x1_data: Tensor | None, y: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Samples, states, times, labels and coefficients of the fake turn's rows, real ones last; the noise they share."""
    x, t = _laid_out(x1_gen.detach(), x1_gen), _times(t, x1_gen)
    x0, rows = _laid_out(x0, x), x.shape[0]
    if objective.needs_real:
        if x1_data is None:
            raise UserError(f"x1_data must be given with alpha = {objective.alpha:g}, gamma = {objective.gamma:g}")
        x = torch.cat((x, _laid_out(x1_data.detach(), x)))
        t, y = torch.cat((t, t)), None if y is None else torch.cat((y, y))
    coef = _PATH.coefficients(t)
    return x, functional.interpolate(x, coef, x0, noise_rows=rows), t, y, coef, x0


def _times(t: Tensor | float, x: Tensor) -> Tensor:
    """``(B,)`` times in the dtype of the arithmetic on ``x``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(t, (int, float)):
        return x.new_full((len(x),), t, dtype=dtype)
    if not isinstance(t, Tensor) or t.numel() not in (1, len(x)):
        got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
        raise UserError(
            f"t must be a number or a tensor of one time or of {len(x)}, one for each sample, got {got:.60}"
        )
    return t.to(dtype).reshape(-1).expand(len(x))


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    if like.is_contiguous() or not ops.is_channels_last(like):
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last if like.dim() == 4 else torch.channels_last_3d)
