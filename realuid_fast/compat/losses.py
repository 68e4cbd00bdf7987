"""The loss functions of the published RealUID code, same signatures and values, computed by the fused calls.

On the path ``x_t = t x1 + (1 - t) x0`` with target ``x1 - x0``; sums over pixels, divided by the batch. As there, the
fake turn's value is to be MAXIMISED over ``u`` and the generator turn's minimised. What differs: the fake turn
differentiates in ``u`` alone and runs both halves in one forward; ``dist_loss`` with ``alpha = 1`` leaves the real half
out; ``general_dist_loss`` honours ``gamma``, which is ignored there (``alpha`` stands in its place); ``alpha = 1`` with
another ``beta``, whose inner maximum is unbounded, is an error.
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
    t: Tensor,
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
        t: times ``(B,)``; ``x0`` noise, ``x1_gen`` generated and ``x1_data`` real samples ``(B, ...)``; ``y`` labels.
        generator_turn: False leaves out the teacher's term and takes off the real half's, with ``1 - alpha, 1 - beta``.

    Raises:
        UserError: an ``alpha`` or ``beta`` that the objective refuses, or tensors that do not agree.

    Source: RealUID paper, the real-data loss.
    """
    objective = _plain(alpha, beta)
    if generator_turn:
        return _generator(u, u_star, t, x0, x1_gen, y, objective)
    return -_fake(u, u_star, t, x0, x1_gen, x1_data, y, objective, from_teacher=False)


def general_dist_loss(
    u: Network,
    u_star: Network,
    t: Tensor,
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
        UserError: as :func:`dist_loss`; an unknown ``parametrization``, or ``gamma = 1`` with real data.

    Source: RealUID paper, the general real-data loss.
    """
    if parametrization not in ("standard", "beta"):
        raise UserError(f"parametrization must be 'standard' or 'beta', not {parametrization!r}")
    objective = _general(alpha, beta, gamma, beta if parametrization == "beta" else 1.0)
    if generator_turn:
        return _generator(u, u_star, t, x0, x1_gen, y, objective)
    return -_fake(u, u_star, t, x0, x1_gen, x1_data, y, objective, from_teacher=True)


def GANloss(
    u: Network,
    t: Tensor,
    x0: Tensor,
    x1_gen: Tensor,
    x1_data: Tensor,
    y: Tensor | None = None,
    generator_turn: bool = True,
) -> Tensor:
    """Non-saturating adversarial loss on the logits of ``u.forward_head(t, x_t, y)``.

    ``softplus(-h(gen))`` in the generator's turn; ``-softplus(h(gen)) - softplus(-h(data))``, to be maximised, in the
    other; means over all logits.
    """
    weight = t.view(-1, *[1] * (x0.dim() - 1))

    def logits(x1: Tensor) -> Tensor:
        return u.forward_head(t, torch.lerp(x0, x1, weight), y).float()  # type: ignore[attr-defined]

    if generator_turn:
        return F.softplus(-logits(x1_gen)).mean()
    return -F.softplus(logits(x1_gen.detach())).mean() - F.softplus(-logits(x1_data.detach())).mean()


@functools.lru_cache(maxsize=64)
def _plain(alpha: float, beta: float) -> Objective:
    return UID() if alpha == beta == 1 else RealUID(alpha, beta)


@functools.lru_cache(maxsize=64)
def _general(alpha: float, beta: float, gamma: float, kappa: float) -> Objective:
    return GeneralRealUID(alpha, beta, gamma, kappa)


def _generator(
    u: Network, u_star: Network, t: Tensor, x0: Tensor, x1: Tensor, y: Tensor | None, objective: Objective
) -> Tensor:
    coef, x0 = _PATH.coefficients(t), _laid_out(x0, x1)
    x_t = functional.interpolate(x1, coef, x0)
    fake, teacher = _laid_out(u(t, x_t, y), x1), _laid_out(u_star(t, x_t, y), x1)
    return functional.generator_loss(teacher, fake, x1, None, coef, x0, objective)


def _fake(
    u: Network,
    u_star: Network,
    t: Tensor,
    x0: Tensor,
    x1_gen: Tensor,
    x1_data: Tensor | None,
    y: Tensor | None,
    objective: Objective,
    from_teacher: bool,
) -> Tensor:
    """The fake loss, counted from its value at ``f = f*`` where ``from_teacher``."""
    x, n_real, rows = x1_gen.detach(), 0, x0.shape[0]
    x0 = _laid_out(x0, x)
    if objective.needs_real:
        if x1_data is None:
            raise UserError(f"x1_data must be given with alpha = {objective.alpha:g}")
        x, n_real = torch.cat((x, _laid_out(x1_data, x))), x1_data.shape[0]
        t, y = torch.cat((t, t)), None if y is None else torch.cat((y, y))
    coef = _PATH.coefficients(t)
    x_t = functional.interpolate(x, coef, x0, noise_rows=rows)
    teacher = None
    if from_teacher:
        with torch.no_grad():
            teacher = _laid_out(u_star(t, x_t, y), x)

    def loss(out: Tensor) -> Tensor:
        return functional.fake_loss(out, x, None, coef, x0, objective, n_real, teacher, noise_rows=rows)

    value = loss(_laid_out(u(t, x_t, y), x))
    return value if teacher is None else value - loss(teacher)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    last = ops.is_channels_last(like) and not like.is_contiguous()
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
