"""The formulas of the fused calls as one would write them in torch, against which the kernels are timed.

The ``*_table`` forms take the coefficient table as the fused calls do. The others are written out for the one case that
is timed (linear path, velocity, RealUID), where the target is ``x - n`` and every weight is one, and do less work than
the table asks for: the hardest peers to beat. Half-precision tensors are widened first, as the fused calls do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from realuid_fast.paths import Coefficients

ALPHA, BETA = 0.92, 0.94


def least(*numbers: Tensor) -> Tensor:
    """The least that autograd takes for a function of some tensors: one operation of torch on a number of each."""
    product: Tensor = torch.addcmul(numbers[0], numbers[-1], numbers[len(numbers) // 2])
    return product


def generator_table(teacher_out: Tensor, fake_out: Tensor, x: Tensor, noise: Tensor, coef: Tensor) -> Tensor:
    """RealUID's generator loss through D = f* - f for any one-sided path, for autograd."""
    c = Coefficients(coef, like=x)
    teacher, fake = c.k_out * teacher_out.float(), c.k_out * fake_out.float()
    d = teacher - fake
    r = ALPHA * teacher - BETA * (c.p * x.float() + c.s * noise.float())
    return _mean_of_sums(c.w * (2 * r - ALPHA * d) * d)


def generator_noise_inside(teacher_out: Tensor, fake_out: Tensor, x: Tensor, coef: Tensor) -> Tensor:
    """The same with its noise drawn inside, where a compiler may fuse the draw."""
    return generator_table(teacher_out, fake_out, x, torch.randn_like(x), coef)


def generator_published(teacher_out: Tensor, fake_out: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The same as the paper writes it: alpha ||f* - (beta/alpha) tgt||^2 - alpha ||f - (beta/alpha) tgt||^2."""
    target = (BETA / ALPHA) * (x.float() - noise.float())
    teacher = ((teacher_out.float() - target) ** 2).flatten(1).sum(1)
    fake = ((fake_out.float() - target) ** 2).flatten(1).sum(1)
    return (ALPHA * teacher - ALPHA * fake).mean()


def generator_written_out(teacher_out: Tensor, fake_out: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The same through D, which multiplies less."""
    teacher = teacher_out.float()
    d = teacher - fake_out.float()
    r = ALPHA * teacher - BETA * (x.float() - noise.float())
    return _mean_of_sums((2 * r - ALPHA * d) * d)


def generator_by_hand(teacher_out: Tensor, fake_out: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """:func:`generator_written_out` with its three gradients derived by hand."""
    teacher = teacher_out.float()
    d = teacher - fake_out.float()
    u = 2 * (ALPHA * teacher - BETA * (x.float() - noise.float())) - 2 * ALPHA * d
    loss = _mean_of_sums(d * (u + ALPHA * d))
    scale = 1 / x.shape[0]
    gradients = scale * (u + 2 * ALPHA * d), -scale * u, (-2 * BETA * scale) * d
    return loss, *(gradient.to(x.dtype) for gradient in gradients)


def fake_by_row(fake_out: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """RealUID's loss of the fake model with a weight and a ratio a row: the first half generated, the second real."""
    weight, ratio = _halves(x, noise)
    error = fake_out.float() - ratio * _shared_target(x, noise)
    return (weight.flatten() * (error * error).flatten(1).sum(1)).sum() / noise.shape[0]


def fake_published(fake_out: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The same as the paper writes it: alpha ||f - (beta/alpha) tgt||^2 and the like with 1 - alpha, 1 - beta."""
    rows, noise = noise.shape[0], noise.float()
    generated = fake_out[:rows].float() - BETA / ALPHA * (x[:rows].float() - noise)
    real = fake_out[rows:].float() - (1 - BETA) / (1 - ALPHA) * (x[rows:].float() - noise)
    return (ALPHA * (generated**2).flatten(1).sum(1) + (1 - ALPHA) * (real**2).flatten(1).sum(1)).mean()


def fake_by_hand(fake_out: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """:func:`fake_by_row` with its gradient derived by hand."""
    weight, ratio = _halves(x, noise)
    error = fake_out.float() - ratio * _shared_target(x, noise)
    weighted = weight * error
    return (weighted * error).sum() / noise.shape[0], ((2 / noise.shape[0]) * weighted).to(x.dtype)


def matching_table(out: Tensor, x: Tensor, noise: Tensor, coef: Tensor) -> Tensor:
    """The matching loss for any one-sided path."""
    c = Coefficients(coef, like=x)
    return _mean_of_sums(c.w * (c.k_out * out.float() - c.p * x.float() - c.s * noise.float()) ** 2)


def matching_published(out: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The matching loss for velocities, ||f - (x - n)||^2."""
    return _mean_of_sums((out.float() - (x.float() - noise.float())) ** 2)


def matching_by_hand(out: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """:func:`matching_published` with its gradient derived by hand."""
    error = out.float() - (x.float() - noise.float())
    return _mean_of_sums(error * error), ((2 / x.shape[0]) * error).to(x.dtype)


def interpolate(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = t x + (1 - t) n."""
    t = t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return t * x + (1 - t) * noise


def interpolate_lerp(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The same in one operation."""
    return torch.lerp(noise, x, t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype))


def _mean_of_sums(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1).mean()


def _halves(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and target ratio of every row, broadcast over a batch like ``x``."""
    rows = noise.shape[0]
    weight, ratio = torch.empty(2, len(x), *[1] * (x.dim() - 1), device=x.device)
    weight[:rows], weight[rows:] = ALPHA, 1 - ALPHA
    ratio[:rows], ratio[rows:] = BETA / ALPHA, (1 - BETA) / (1 - ALPHA)
    return weight, ratio


def _shared_target(x: Tensor, noise: Tensor) -> Tensor:
    return x.float() - noise.float().repeat(2, *[1] * (x.dim() - 1))
