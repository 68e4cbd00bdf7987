"""Interpolant, losses and their gradients in plain torch: the formulas, each written as it is read.

Arithmetic is in float32, and in float64 for float64 storage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...coefficients import Coefficients
from ...contracts import host_checks_allowed
from ...errors import UserError
from ..philox import normals


def normal_like(key: Tensor, like: Tensor, noise_rows: int) -> Tensor:
    rows = like.shape[0] if like.dim() else 0
    if like.numel() == 0:
        return torch.empty_like(like)
    row = like.numel() // rows
    flat = normals(key, noise_rows * row, torch.promote_types(like.dtype, torch.float32)).view(noise_rows, row)
    flat = flat.repeat(-(-rows // noise_rows), 1)[:rows]
    # Element i in memory gets number i of the stream, whatever the tensor's strides.
    return flat.reshape(-1).as_strided(like.shape, like.stride()).to(like.dtype)


def interpolate(x: Tensor, coef: Tensor, noise: Tensor, endpoint: Tensor | None, noise_rows: int) -> Tensor:
    c = Coefficients(coef, x)
    mixed = c.a * _up(x) + c.c * _noise_for(x, noise, noise_rows)
    if endpoint is not None:
        mixed = mixed + c.b * _up(endpoint)
    else:
        _check_left_out("endpoint", c.b, "b")
    return _like(mixed, x)


def interpolate_grads(grad: Tensor, coef: Tensor, want_x: bool, want_endpoint: bool) -> tuple[Tensor, Tensor]:
    c = Coefficients(coef, grad)
    return _if(want_x, lambda: c.a * _up(grad), grad), _if(want_endpoint, lambda: c.b * _up(grad), grad)


def mean_abs_error(
    teacher_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    teacher_uncond: Tensor | None,
    guidance: Tensor | None,
) -> Tensor:
    guided = _guided(teacher_out, teacher_uncond, guidance)
    error = (_up(x) - _prediction(Coefficients(coef, x), guided, x_t)).abs()
    return (_row_sums(error) * (x.shape[0] / max(x.numel(), 1))).to(coef.dtype)


def matching(
    out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None,
    noise_rows: int,
    mean: bool,
    want_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c = Coefficients(coef, x)
    tgt = _target(c, x, noise, endpoint, noise_rows)
    gap = _prediction(c, out, x_t) - tgt
    rows = _row_sums(c.w * gap * gap)
    scale = _scale(mean, x.shape[0])
    return (
        _mean(rows, x.shape[0], coef.dtype),
        rows.to(coef.dtype),
        _if(want_out, lambda: scale * c.k_out * 2 * c.w * gap, out),
    )


def fake(
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    teacher_out: Tensor | None,
    endpoint: Tensor | None,
    teacher_uncond: Tensor | None,
    guidance: Tensor | None,
    noise_rows: int,
    n_real: int,
    a_gen: float,
    b_gen: float,
    d_gen: float,
    c_gen: float,
    a_real: float,
    b_real: float,
    d_real: float,
    c_real: float,
    mean: bool,
    want_fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c = Coefficients(coef, x)
    n_gen = x.shape[0] - n_real
    # Computed on the device, because a copy from the host would end the capture of a CUDA graph.
    generated = (torch.arange(x.shape[0], device=x.device) < n_gen).view(c.a.shape)

    def by_half(gen: float, real: float) -> Tensor:
        return torch.where(generated, c.a.new_full((), gen), c.a.new_full((), real))

    A, B, D, C = by_half(a_gen, a_real), by_half(b_gen, b_real), by_half(d_gen, d_real), by_half(c_gen, c_real)

    tgt = _target(c, x, noise, endpoint, noise_rows)
    f = _prediction(c, fake_out, x_t)
    linear = B * tgt
    if teacher_out is not None:
        teacher_out = _guided(teacher_out, teacher_uncond, guidance)
        # With D = 0 the teacher must not matter, even if it holds NaN: a kernel does not read it then.
        linear = linear + torch.where(D != 0, D * _prediction(c, teacher_out, x_t), torch.zeros_like(f))
    rows = _row_sums(c.w * (f * (A * f - 2 * linear) + C * tgt * tgt))
    scale = _scale(mean, n_gen)
    grad = _if(want_fake, lambda: scale * c.k_out * 2 * c.w * (A * f - linear), fake_out)
    return _mean(rows, n_gen, coef.dtype), rows.to(coef.dtype), grad


def generator(
    teacher_out: Tensor,
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None,
    teacher_uncond: Tensor | None,
    guidance: Tensor | None,
    q_rows: Tensor | None,
    alpha: float,
    beta: float,
    q: float,
    kappa: float,
    mean: bool,
    want_teacher: bool,
    want_fake: bool,
    want_x: bool,
    want_x_t: bool,
    want_uncond: bool,
) -> tuple[Tensor, ...]:
    c = Coefficients(coef, x)
    tgt = _target(c, x, noise, endpoint, x.shape[0])
    guided = _guided(teacher_out, teacher_uncond, guidance)
    teacher = _prediction(c, guided, x_t)
    # Take the difference of the raw outputs first: x_t cancels exactly, so no digits are lost if fake is near teacher.
    delta = c.k_out * (_up(guided) - _up(fake_out))
    r = alpha * teacher - beta * tgt
    q2 = (q if q_rows is None else _scales(q_rows, x)) * kappa**2
    rows = _row_sums(c.w * (delta * (2 * kappa * r - q2 * delta)))

    scale = _scale(mean, x.shape[0])
    d_fake = c.w * (2 * q2 * delta - 2 * kappa * r)
    d_both = 2 * alpha * kappa * c.w * delta  # the gradients in f* and f add up to this
    d_tgt = -2 * beta * kappa * c.w * delta
    share = None if teacher_uncond is None or guidance is None else _scales(guidance, x)

    def of_guided() -> Tensor:
        return scale * c.k_out * (d_both - d_fake)

    return (
        _mean(rows, x.shape[0], coef.dtype),
        rows.to(coef.dtype),
        _if(want_teacher, of_guided if share is None else lambda: share * of_guided(), teacher_out),
        _if(want_fake, lambda: scale * c.k_out * d_fake, fake_out),
        _if(want_x, lambda: scale * c.p * d_tgt, x),
        _if(want_x_t, lambda: scale * c.k_x * d_both, x),
        x.new_empty(0) if share is None else _if(want_uncond, lambda: (1 - share) * of_guided(), x),
    )


def scale_grads_(grads: list[Tensor], scale: Tensor) -> None:
    for grad in grads:
        if grad.numel():
            grad.mul_(scale if scale.numel() == 1 else scale.view(-1, *[1] * (grad.dim() - 1)))


def _scales(rows: Tensor, like: Tensor) -> Tensor:
    """One number for each row, shaped to broadcast over a batch like ``like``."""
    return rows.view(-1, *[1] * (like.dim() - 1))


def _guided(conditional: Tensor, unconditional: Tensor | None, guidance: Tensor | None) -> Tensor:
    """The guided output ``u + scale (c - u)``, left in the arithmetic type; ``c`` itself without guidance."""
    if unconditional is None or guidance is None:
        return conditional
    u = _up(unconditional)
    return u + _scales(guidance, u) * (_up(conditional) - u)


def _up(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _like(value: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(value)


def _if(wanted: bool, value: Callable[[], Tensor], like: Tensor) -> Tensor:
    return _like(value(), like) if wanted else like.new_empty(0)


def _noise_for(x: Tensor, noise: Tensor, noise_rows: int) -> Tensor:
    if not noise.is_floating_point():
        like = x if x.dtype in (torch.float32, torch.float64) else torch.empty_like(x, dtype=torch.float32)
        return normal_like(noise, like, noise_rows)
    rows = x.shape[0]
    repeats = -(-rows // max(noise_rows, 1))
    return _up(noise[:noise_rows].repeat(repeats, *[1] * (x.dim() - 1))[:rows])


def _target(c: Coefficients, x: Tensor, noise: Tensor, endpoint: Tensor | None, noise_rows: int) -> Tensor:
    tgt = c.p * _up(x) + c.s * _noise_for(x, noise, noise_rows)
    if endpoint is None:
        _check_left_out("endpoint", c.q, "q")
        return tgt
    return tgt + c.q * _up(endpoint)


def _prediction(c: Coefficients, out: Tensor, x_t: Tensor | None) -> Tensor:
    f = c.k_out * _up(out)
    if x_t is not None:
        return f + torch.where(c.k_x != 0, c.k_x * _up(x_t), torch.zeros_like(f))
    _check_left_out("x_t", c.k_x, "k_x")
    return f


def _check_left_out(name: str, column: Tensor, column_name: str) -> None:
    """Refuse a missing tensor, unless its column of coefficients is zero in every row."""
    if host_checks_allowed(column) and bool((column != 0).any()):
        raise UserError(f"{name} is needed: coef has rows with {column_name} different from 0")


def _row_sums(values: Tensor) -> Tensor:
    return (
        values.reshape(values.shape[0], -1).sum(1, dtype=torch.float64)
        if values.numel()
        else values.new_zeros(values.shape[0], dtype=torch.float64)
    )


def _mean(rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return (rows.sum() / max(count, 1)).to(dtype)


def _scale(mean: bool, count: int) -> float:
    return 1.0 / max(count, 1) if mean else 1.0
