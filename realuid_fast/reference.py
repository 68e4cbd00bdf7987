"""The fused calls in plain torch: the readable reference, which also runs on devices without a faster backend.

There is one function for each operator, with the arguments of its schema in ``ops.py``. Arithmetic is in float32, and
in float64 for float64 storage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contracts import host_checks_allowed
from .errors import UserError
from .philox import normals


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
    c = _Columns(coef, x)
    mixed = c.a * _up(x) + c.c * _noise_for(x, noise, noise_rows)
    if endpoint is not None:
        mixed = mixed + c.b * _up(endpoint)
    else:
        _check_left_out("endpoint", c.b, "b")
    return _like(mixed, x)


def interpolate_grads(grad: Tensor, coef: Tensor, want_x: bool, want_endpoint: bool) -> tuple[Tensor, Tensor]:
    c = _Columns(coef, grad)
    return _if(want_x, lambda: c.a * _up(grad), grad), _if(want_endpoint, lambda: c.b * _up(grad), grad)


def mean_abs_error(
    teacher_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    teacher_uncond: Tensor | None,
    guidance: Tensor | None,
) -> Tensor:
    if teacher_uncond is not None and guidance is not None:
        teacher_out = _guided(teacher_out, teacher_uncond, guidance)
    error = (_up(x) - _prediction(_Columns(coef, x), teacher_out, x_t)).abs()
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
    c = _Columns(coef, x)
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
    c = _Columns(coef, x)
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
    alpha: float,
    beta: float,
    q: float | Tensor,
    kappa: float,
    mean: bool,
    want_teacher: bool,
    want_fake: bool,
    want_x: bool,
    want_x_t: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    c = _Columns(coef, x)
    tgt = _target(c, x, noise, endpoint, x.shape[0])
    teacher = _prediction(c, teacher_out, x_t)
    # Take the difference of the raw outputs first: x_t cancels exactly, so no digits are lost if fake is near teacher.
    delta = c.k_out * (_up(teacher_out) - _up(fake_out))
    r = alpha * teacher - beta * tgt
    rows = _row_sums(c.w * (delta * (2 * kappa * r - q * kappa**2 * delta)))

    scale = _scale(mean, x.shape[0])
    d_fake = c.w * (2 * q * kappa**2 * delta - 2 * kappa * r)
    d_both = 2 * alpha * kappa * c.w * delta  # the gradients in f* and f add up to this
    d_tgt = -2 * beta * kappa * c.w * delta
    return (
        _mean(rows, x.shape[0], coef.dtype),
        rows.to(coef.dtype),
        _if(want_teacher, lambda: scale * c.k_out * (d_both - d_fake), teacher_out),
        _if(want_fake, lambda: scale * c.k_out * d_fake, fake_out),
        _if(want_x, lambda: scale * c.p * d_tgt, x),
        _if(want_x_t, lambda: scale * c.k_x * d_both, x),
    )


def guided_fake(
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    teacher_out: Tensor,
    endpoint: Tensor | None,
    teacher_uncond: Tensor,
    guidance: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    guided = _guided(teacher_out, teacher_uncond, guidance)
    return fake(fake_out, x, x_t, coef, noise, guided, endpoint, *rest)


def guided_generator(
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
    own_q = q if q_rows is None else _scales(q_rows, x)
    if teacher_uncond is None or guidance is None:
        inputs = (teacher_out, fake_out, x, x_t, coef, noise, endpoint, alpha, beta, own_q, kappa, mean)
        return *generator(*inputs, want_teacher, want_fake, want_x, want_x_t), x.new_empty(0)
    guided = _guided(teacher_out, teacher_uncond, guidance)
    want_guided = want_teacher or want_uncond
    loss, rows, g_guided, *others = generator(
        guided, fake_out, x, x_t, coef, noise, endpoint, alpha, beta, own_q, kappa, mean,
        want_guided, want_fake, want_x, want_x_t,
    )  # fmt: skip
    scale = _scales(guidance, x)
    return (
        loss,
        rows,
        _if(want_teacher, lambda: scale * g_guided, teacher_out),
        *others,
        _if(want_uncond, lambda: (1 - scale) * g_guided, teacher_uncond),
    )


def scale_grads_(grads: list[Tensor], scale: Tensor) -> None:
    for grad in grads:
        if grad.numel():
            grad.mul_(scale if scale.numel() == 1 else scale.view(-1, *[1] * (grad.dim() - 1)))


def begin_step_(grads: list[Tensor], steps: list[Tensor], counts: Tensor) -> Tensor:
    """The global norm of ``grads``. Counts the update in ``counts`` and, if the norm is finite, in each of ``steps``.

    ``counts`` is int64 ``(2,)``: updates begun, and those among them whose norm was not finite.
    """
    norm = torch.nn.utils.get_total_norm(grads)
    finite = torch.isfinite(norm)
    for step in steps:
        step += finite
    counts += torch.stack((torch.ones_like(finite), ~finite))
    return norm


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    norm: Tensor,
    step: Tensor,
    lr: Tensor,
    counts: Tensor,
    ema_decays: Tensor,
    clip: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    ema_warmup: bool,
) -> None:
    """Adam on ``params`` after :func:`begin_step_`, then the averages; nothing changes if ``norm`` is not finite.

    ``lr`` holds the rates of updates 0, 1, ...; all later updates use its last entry. If ``beta1`` is 0, ``exp_avgs``
    may be empty.
    Each of ``emas`` is ``(E, ...)``, a row for each of ``ema_decays`` ``(E,)``.
    """
    finite, dtype = torch.isfinite(norm), params[0].dtype

    def number(value: Tensor) -> Tensor:
        return value.to(dtype)

    def kept(decay: float) -> Tensor:
        return number(1 - (1 - decay) * finite.double())

    factor = torch.where(norm > clip, clip / norm.double(), 1.0) if clip else torch.ones_like(norm)
    scaled = list(torch._foreach_mul(grads, number(-factor if maximize else factor)))
    if weight_decay:
        torch._foreach_add_(scaled, params, alpha=weight_decay)
    # A skipped step is carried out with gradient, rates and weights of 0, so that the host need not know of it. The
    # gradient is replaced, not multiplied by 0, because 0 times NaN is NaN.
    for grad in scaled:
        grad.masked_fill_(~finite, 0.0)
    torch._foreach_mul_(exp_avg_sqs, kept(beta2))
    torch._foreach_addcmul_(exp_avg_sqs, scaled, scaled, value=1 - beta2)
    moments: list[Tensor] = scaled
    if exp_avgs:
        torch._foreach_mul_(exp_avgs, kept(beta1))
        torch._foreach_add_(exp_avgs, scaled, alpha=1 - beta1)
        moments = exp_avgs

    # If the very first step is skipped, no step has been taken yet, and the corrections below would divide by 0.
    taken = step.double().clamp(min=1.0)
    rate = torch.take(lr, (counts[0] - 1).clamp(0, lr.numel() - 1)).double() / (1 - beta1**taken)
    divisors = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(divisors, number((1 - beta2**taken).sqrt()))
    torch._foreach_add_(divisors, eps)
    changes = torch._foreach_div(moments, divisors)
    torch._foreach_mul_(changes, number(torch.where(finite, -rate, 0.0)))
    torch._foreach_add_(params, changes)
    if ema_decays.numel():
        average_(params, emas, norm, counts, ema_decays, ema_warmup)


def average_(
    params: list[Tensor], emas: list[Tensor], norm: Tensor, counts: Tensor, ema_decays: Tensor, ema_warmup: bool
) -> None:
    """Move every row of ``emas[i]`` by one minus its decay towards ``params[i]``, unless ``norm`` is not finite."""
    decays = ema_decays.double()
    if ema_warmup:
        updates = counts[0].double()
        decays = torch.minimum(decays, updates / (updates + 9.0))
    weights = torch.where(torch.isfinite(norm), 1 - decays, 0.0).to(params[0].dtype)
    for k, weight in enumerate(weights):
        rows = [ema[k] for ema in emas]
        gaps = torch._foreach_sub(params, rows)
        torch._foreach_mul_(gaps, weight)
        torch._foreach_add_(rows, gaps)


class _Columns:
    """The nine coefficients, each shaped ``(R, 1, ...)`` to broadcast over a batch like ``x``."""

    def __init__(self, coef: Tensor, x: Tensor) -> None:
        columns = (column.view(-1, *[1] * (x.dim() - 1)) for column in coef.unbind(1))
        self.a, self.b, self.c, self.p, self.q, self.s, self.k_out, self.k_x, self.w = columns


def _scales(rows: Tensor, like: Tensor) -> Tensor:
    """One number for each row, shaped to broadcast over a batch like ``like``."""
    return rows.view(-1, *[1] * (like.dim() - 1))


def _guided(conditional: Tensor, unconditional: Tensor, guidance: Tensor) -> Tensor:
    """The guided output ``u + scale (c - u)``, left in the arithmetic type."""
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


def _target(c: _Columns, x: Tensor, noise: Tensor, endpoint: Tensor | None, noise_rows: int) -> Tensor:
    tgt = c.p * _up(x) + c.s * _noise_for(x, noise, noise_rows)
    if endpoint is None:
        _check_left_out("endpoint", c.q, "q")
        return tgt
    return tgt + c.q * _up(endpoint)


def _prediction(c: _Columns, out: Tensor, x_t: Tensor | None) -> Tensor:
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


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0 or weight.numel() == 0:
        # torch refuses a convolution without pixels or channels. The result is then zeros.
        y = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:], dtype=weight.dtype)
        y = y if bias is None else y + _of_channels(bias)
    else:
        y = F.conv2d(x.to(weight.dtype), weight, bias, padding=1)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def conv3x3_grads(grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> tuple[Tensor, Tensor]:
    wanted = [want_x, want_weight, False]
    if x.numel() == 0 or weight.numel() == 0:
        g_x, g_weight = torch.zeros_like(x), torch.zeros_like(weight, memory_format=torch.contiguous_format)
        return g_x if want_x else x.new_empty(0), g_weight if want_weight else weight.new_empty(0)
    around = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, one group
    # torch's function needs its filters contiguous.
    up = [tensor.to(weight.dtype) for tensor in (grad, x)]
    g_x, g_weight, _ = torch.ops.aten.convolution_backward(*up, weight.contiguous(), None, *around, wanted)
    return (
        g_x.to(x.dtype).contiguous(memory_format=torch.channels_last) if want_x else x.new_empty(0),
        torch.empty_like(weight).copy_(g_weight) if want_weight else weight.new_empty(0),
    )


def norm_silu(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x), weight.new_zeros(x.shape[0], groups, 2)
    h = _shifted(x, shift, weight)
    grouped = h.unflatten(1, (groups, -1)).flatten(2)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, unbiased=False) + eps).rsqrt()
    y = F.silu(_normalised(h, torch.stack([mean, rstd], 2)) * _of_channels(weight) + _of_channels(bias))
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last), torch.stack([mean, rstd], 2)


def norm_silu_grads(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With ``n`` the normalised value and ``g_n = g_z weight``: ``g_x = rstd (g_n - mean(g_n) - n mean(g_n n))``."""
    n = _normalised(_shifted(x, shift, weight), statistics)
    z = n * _of_channels(weight) + _of_channels(bias)
    gate = torch.sigmoid(z)
    g_z = grad.to(weight.dtype) * gate * (1 + z * (1 - gate))
    g_n = g_z * _of_channels(weight)
    groups = statistics.shape[1]

    def group_mean(values: Tensor) -> Tensor:
        mean = values.unflatten(1, (groups, -1)).flatten(2).mean(2)
        return _of_channels(mean.repeat_interleave(x.shape[1] // groups, 1))

    rstd = _of_channels(statistics[..., 1].repeat_interleave(x.shape[1] // groups, 1))
    g_x = rstd * (g_n - group_mean(g_n) - n * group_mean(g_n * n))
    return (
        g_x.to(x.dtype).contiguous(memory_format=torch.channels_last),
        weight.new_empty(0) if shift is None else g_x.sum((2, 3)),
        (g_z * n).sum((0, 2, 3)),
        g_z.sum((0, 2, 3)),
    )


def _of_channels(values: Tensor) -> Tensor:
    return values[..., None, None]


def _shifted(x: Tensor, shift: Tensor | None, weight: Tensor) -> Tensor:
    h = x.to(weight.dtype)
    return h if shift is None else h + _of_channels(shift)


def _normalised(h: Tensor, statistics: Tensor) -> Tensor:
    mean, rstd = statistics.repeat_interleave(h.shape[1] // statistics.shape[1], 1).unbind(2)
    return (h - _of_channels(mean)) * _of_channels(rstd)
