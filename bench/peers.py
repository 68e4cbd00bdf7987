"""The formulas of the fused calls as one would write them in torch: what the kernels are timed against.

`generator_loss` takes the coefficient table as the fused call does. The others are written out for the one case that is
timed (linear path, velocity, RealUID) and do less work than the table asks for: the hardest peers to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA, BETA = 0.92, 0.94


def generator_loss(teacher_out: Tensor, fake_out: Tensor, x: Tensor, noise: Tensor, coef: Tensor) -> Tensor:
    """RealUID's generator loss through D = f* - f for any one-sided path, for autograd."""
    p, s, k_out, w = (coef[:, i].reshape(-1, *[1] * (x.dim() - 1)) for i in (3, 5, 6, 8))
    teacher, fake, target = k_out * teacher_out, k_out * fake_out, p * x + s * noise
    d = teacher - fake
    r = ALPHA * teacher - BETA * target
    return (w * (2 * r - ALPHA * d) * d).flatten(1).sum(1).mean()


def velocity_loss(teacher_out: Tensor, fake_out: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The same for the linear path and velocities, where the target is x - n and every weight is one."""
    d = teacher_out - fake_out
    r = ALPHA * teacher_out - BETA * (x - noise)
    return ((2 * r - ALPHA * d) * d).flatten(1).sum(1).mean()


def velocity_one_pass(teacher_out: Tensor, fake_out: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """velocity_loss with its three gradients derived by hand."""
    d = teacher_out - fake_out
    u = 2 * (ALPHA * teacher_out - BETA * (x - noise)) - 2 * ALPHA * d
    loss = (d * (u + ALPHA * d)).flatten(1).sum(1).mean()
    scale = 1 / x.shape[0]
    return loss, scale * (u + 2 * ALPHA * d), -scale * u, (-2 * BETA * scale) * d


def fake_loss(fake_out: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """RealUID's loss of the fake model: the first half of the rows generated, the second real, the noise shared."""
    n_real = noise.shape[0]
    target = x - noise.repeat(2, *[1] * (x.dim() - 1))
    weight = torch.cat([x.new_full((n_real,), ALPHA), x.new_full((n_real,), 1 - ALPHA)])
    ratio = torch.cat([x.new_full((n_real,), BETA / ALPHA), x.new_full((n_real,), (1 - BETA) / (1 - ALPHA))])
    column = (-1, *[1] * (x.dim() - 1))
    e = fake_out - ratio.reshape(column) * target
    return (weight * (e * e).flatten(1).sum(1)).sum() / n_real


def interpolate(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = t x + (1 - t) n."""
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    return t * x + (1 - t) * noise
