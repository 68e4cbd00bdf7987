"""The gradient of a generator's loss in its samples, through the networks that saw their interpolants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..coefficients import Coefficients
from ..functional import GeneratorGrads
from ..interpolant import Interpolant


def through_networks(
    grads: GeneratorGrads, draw: Interpolant, x_t: Tensor, outs: Sequence[Tensor | None], judged: Tensor | None
) -> Tensor:
    """The loss' whole gradient in ``x``: the direct one, and ``a`` times the one in ``x_t`` through the networks.

    ``outs`` are the teacher's, the fake model's and the unguided output and the discriminator's logits, whose gradient
    is ``judged``.
    """
    seeds = (grads.teacher_out, grads.fake_out, grads.teacher_uncond, judged)
    pairs = [(out, seed) for out, seed in zip(outs, seeds, strict=True) if out is not None and seed is not None]
    if not pairs:
        return grads.x
    (g_x_t,) = torch.autograd.grad([out for out, _ in pairs], x_t, [seed for _, seed in pairs])
    if grads.x_t is not None:
        g_x_t = g_x_t + grads.x_t
    return torch.addcmul(grads.x, Coefficients(draw.coef, like=x_t).a, g_x_t)
