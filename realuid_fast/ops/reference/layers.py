"""The networks' layers in plain torch, in the parameters' type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    z, statistics = _before_silu(x, shift, weight, bias, groups, eps)
    return _stored(F.silu(z), x), statistics


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    z, statistics = _before_silu(x, None, weight, bias, groups, eps)
    return _stored(z, x), statistics


def _before_silu(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x), weight.new_zeros(x.shape[0], groups, 2)
    h = _shifted(x, shift, weight)
    grouped = h.unflatten(1, (groups, -1)).flatten(2)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, unbiased=False) + eps).rsqrt()
    statistics = torch.stack([mean, rstd], 2)
    return _normalised(h, statistics) * _of_channels(weight) + _of_channels(bias), statistics


def norm_silu_grads(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = _normalised(_shifted(x, shift, weight), statistics)
    z = n * _of_channels(weight) + _of_channels(bias)
    gate = torch.sigmoid(z)
    g_z = grad.to(weight.dtype) * gate * (1 + z * (1 - gate))
    g_x, g_weight, g_bias = _through_norm(g_z, n, weight, statistics)
    return _stored(g_x, x), weight.new_empty(0) if shift is None else g_x.sum((2, 3)), g_weight, g_bias


def group_norm_grads(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = _normalised(_shifted(x, None, weight), statistics)
    g_x, g_weight, g_bias = _through_norm(grad.to(weight.dtype), n, weight, statistics)
    return _stored(g_x, x), g_weight, g_bias


def _through_norm(g_z: Tensor, n: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With ``n`` the normalised value and ``g_n = g_z weight``: ``g_x = rstd (g_n - mean(g_n) - n mean(g_n n))``."""
    g_n = g_z * _of_channels(weight)
    groups = statistics.shape[1]

    def group_mean(values: Tensor) -> Tensor:
        mean = values.unflatten(1, (groups, -1)).flatten(2).mean(2)
        return _of_channels(mean.repeat_interleave(n.shape[1] // groups, 1))

    rstd = _of_channels(statistics[..., 1].repeat_interleave(n.shape[1] // groups, 1))
    g_x = rstd * (g_n - group_mean(g_n) - n * group_mean(g_n * n))
    return g_x, (g_z * n).sum((0, 2, 3)), g_z.sum((0, 2, 3))


def _stored(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _of_channels(values: Tensor) -> Tensor:
    return values[..., None, None]


def _shifted(x: Tensor, shift: Tensor | None, weight: Tensor) -> Tensor:
    h = x.to(weight.dtype)
    return h if shift is None else h + _of_channels(shift)


def _normalised(h: Tensor, statistics: Tensor) -> Tensor:
    mean, rstd = statistics.repeat_interleave(h.shape[1] // statistics.shape[1], 1).unbind(2)
    return (h - _of_channels(mean)) * _of_channels(rstd)
