"""A generator turn's gradients where the objective descends an f-divergence."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import losses
from .coefficients import Coefficients
from .divergences import WEIGHTS, divergence_weight
from .errors import UserError
from .functional import GeneratorGrads
from .interpolant import Interpolant
from .objective import Objective
from .objectives import SiD
from .paths import OneSidedPath


def generator_grads(
    objective: Objective,
    draw: Interpolant,
    teacher_out: Tensor,
    fake_out: Tensor,
    divergence: str | None = None,
    log_ratio: Tensor | None = None,
    *,
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> GeneratorGrads:
    """:func:`~realuid_fast.losses.generator_grads` for any f-divergence ``D_f = E_{p_g} f(r)``, ``r = p_d / p_g``.

    An objective whose gradient flows through the samples alone descends ``D_f`` at the drawn times: its rows get the
    weight ``h(r)`` (:func:`~realuid_fast.objectives.divergence_weight`), held fixed.
    :func:`~realuid_fast.objectives.SiD` descends the expansion of ``D_f`` over time, ``int w(t) E_{p_g} h(r) ||s_d -
    s_g||^2`` of the two scores. With ``delta = f* - f`` in x0 space and ``h' = r dh/dr`` a row of it is::

        w (-(h + h') ||delta||^2 + 2 h <delta, f* - x>),    grad log r = (a / c^2) delta in x_t

    Its gradient is exact where ``f*``, ``f`` and ``r`` are: ``h`` and ``h'`` are differentiated too, through the
    gradient of ``log r`` that the two predictions give, so that nothing passes through the discriminator.

    Args:
        objective: one of those objectives. Of SiD the weight of a sample is taken, not ``alpha_sid``.
        draw, teacher_out, fake_out, teacher_uncond, guidance: as for :func:`~realuid_fast.losses.generator_grads`; for
            SiD of a one-sided path, in x0 space.
        divergence: one of :data:`~realuid_fast.objectives.DIVERGENCES`; None and ``"reverse-kl"`` are the plain
            objective.
        log_ratio: ``log r`` ``(R,)`` at ``draw.x_t``, or a discriminator's logits ``(R, n)``, whose mean is taken.

    Returns:
        The gradients. The loss' value says nothing by itself: on average it is not the divergence.

    Raises:
        UserError: another divergence or objective, or tensors that do not agree.

    Source: f-distill (Xu et al., 2502.15681), theorem 1; Uni-Instruct (Wang et al., 2505.20755), its expansion, whose
    gradient is derived here: the first variation of the expansion in ``p_g``.
    """

    def grads(of: Objective, rows: Interpolant) -> GeneratorGrads:
        return losses.generator_grads(of, rows, teacher_out, fake_out, teacher_uncond=teacher_uncond, guidance=guidance)

    if divergence in (None, "reverse-kl") or log_ratio is None:
        return grads(objective, draw)
    log_ratio = log_ratio.flatten(1).mean(1) if log_ratio.dim() > 1 else log_ratio
    weight = divergence_weight(divergence, log_ratio)
    if objective.flows == "x":
        coef = draw.coef.clone()
        Coefficients(coef).w.mul_(weight)
        return grads(objective, replace(draw, coef=coef))
    if objective.name != "SiD":
        raise UserError(f"objective must be SiD, or one whose gradient flows through x alone; not {objective.name}")
    if draw.match != "x0" or not isinstance(draw.path, OneSidedPath):
        raise UserError(
            f"draw must be of a one-sided path in x0 space for {objective.name} with a divergence, not of "
            f"{type(draw.path).__name__} in {draw.match} space"
        )
    # Two of SiD's losses span the row: -||delta||^2 + 2 <delta, f* - x> and the same with -2 ||delta||^2.
    once, twice = (grads(SiD(alpha, scaled=objective.sample_scale > 0), draw) for alpha in (0.5, 1.0))
    with torch.enable_grad():
        u = log_ratio.detach().to(once.rows.dtype).requires_grad_()
        h = WEIGHTS[divergence](u)
        (slope,) = torch.autograd.grad(h.sum(), u, create_graph=True)
        rows = (h - slope) * once.rows + slope * twice.rows
        (by_ratio,) = torch.autograd.grad(rows.sum(), u)
    first, second = (h - slope).detach(), slope.detach()
    each = (len(u), *[1] * (draw.x.dim() - 1))

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else first.view(each).to(a) * a + second.view(each).to(a) * b

    row = Coefficients(draw.coef, like=draw.x)
    asked = teacher_out if teacher_uncond is None else torch.lerp(teacher_uncond, teacher_out, guidance)
    pull = by_ratio.view(each) * (row.a / row.c) ** 2 * row.k_out * (asked - fake_out) / len(u)
    g_teacher, g_fake, g_x, g_x_t, g_uncond = (both(a, b) for a, b in zip(once[2:], twice[2:], strict=True))
    assert g_x is not None
    return GeneratorGrads(rows.detach().mean(), rows.detach(), g_teacher, g_fake, g_x + pull, g_x_t, g_uncond)
