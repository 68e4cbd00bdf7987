"""Layers of the U-Nets of Karras et al. (2206.00364), by the names of the published networks' parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import doubled
from .recompute import Repeatable, once_more
from .unet import GroupNorm


class Conv(nn.Module):
    """Resampling by a factor of two with a separable filter, then a convolution; ``kernel`` 0 leaves the latter out.

    ``resample`` is ``"up"``, ``"down"`` or None. With ``late`` the convolution comes before the downsampling, on inputs
    padded for both.
    """

    resample_filter: Tensor

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        resample: str | None = None,
        taps: Sequence[float] = (1, 1),
        late: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.late = resample, late
        self.box = tuple(taps) == (1, 1)
        self.padding, self.margin = kernel // 2, (len(taps) - 1) // 2
        self.weight: nn.Parameter | None = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, channels, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(out_channels))
        if resample is not None:
            row = torch.tensor([float(tap) for tap in taps])
            self.register_buffer("resample_filter", torch.outer(row, row)[None, None] / row.sum() ** 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.late:
            assert self.weight is not None
            x = F.conv2d(x, self.weight, self.bias, padding=self.padding + self.margin)
            return self._down(x, 0)
        if self.resample == "up":
            x = self._up(x)
        elif self.resample == "down":
            x = self._down(x, self.margin)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def _up(self, x: Tensor) -> Tensor:
        if self.box:
            return doubled(x)
        taps = (4 * self.resample_filter).to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, taps, stride=2, padding=self.margin, groups=x.shape[1])

    def _down(self, x: Tensor, padding: int) -> Tensor:
        if self.box:
            return F.avg_pool2d(x, 2)
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])


class Norm(GroupNorm):
    """Group normalisation with 32 groups, fewer where they would hold less than four channels."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(min(32, channels // 4), channels, eps)


class Block(Repeatable):
    """Residual block with the embedding in its middle and, perhaps, attention after it.

    ``out = skip_scale (skip(x) + conv1(silu(norm1(h + e))))`` with ``h = conv0(silu(norm0(x)))`` and ``e`` linear in
    the embedding; with ``modulated`` ``norm1(h) (1 + scale) + shift`` in place of ``norm1(h + e)``. ``heads`` add
    attention, ``skip_scale (out + proj(attention(norm2(out))))``.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        resample: str | None = None,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        taps: Sequence[float] = (1, 1),
        project: bool = False,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.skip_scale, self.modulated = heads, dropout, skip_scale, modulated
        self.norm0 = Norm(channels, eps)
        self.conv0 = Conv(channels, out_channels, 3, resample, taps)
        self.affine = nn.Linear(embedding, out_channels * (2 if modulated else 1))
        self.norm1 = Norm(out_channels, eps)
        self.conv1 = Conv(out_channels, out_channels, 3)
        self.skip: Conv | None = None
        if out_channels != channels or resample is not None:
            kernel = 1 if project or out_channels != channels else 0
            self.skip = Conv(channels, out_channels, kernel, resample, taps)
        if heads:
            self.norm2 = Norm(out_channels, eps)
            self.qkv = Conv(out_channels, 3 * out_channels, 1)
            self.proj = Conv(out_channels, out_channels, 1)

    @once_more
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(_activated(self.norm0, x))
        shift = self.affine(embedding).to(h.dtype)[:, :, None, None]
        if self.modulated:
            scale, shift = shift.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), 1.0 + scale))
        else:
            h = _activated(self.norm1, h, shift)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self._scaled(h + (x if self.skip is None else self.skip(x)))
        return self._scaled(x + self._attention(x)) if self.heads else x

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.skip_scale == 1.0 else x * self.skip_scale

    def _attention(self, x: Tensor) -> Tensor:
        # The projection's channels run head by head and, inside, (q, k, v) for each channel.
        if x.is_cuda:
            return self._attention_of_pixels(x)
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        # Attention's fused kernels take contiguous rows only.
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(2, 3).reshape(batch, channels, height, width))

    def _attention_of_pixels(self, x: Tensor) -> Tensor:
        """The same on channels_last images without a copy: the filters are sorted by (q, k, v), not the pixels."""
        batch, channels, height, width = x.shape
        assert self.qkv.weight is not None
        assert self.proj.weight is not None

        def sort(rows: Tensor) -> Tensor:
            return rows.reshape(self.heads, channels // self.heads, 3, -1).permute(2, 0, 1, 3).reshape(3 * channels, -1)

        pixels = self.norm2(x).permute(0, 2, 3, 1).flatten(1, 2)
        qkv = F.linear(pixels, sort(self.qkv.weight), sort(self.qkv.bias)[:, 0])
        q, k, v = (
            each.transpose(1, 2) for each in qkv.view(batch, -1, 3, self.heads, channels // self.heads).unbind(2)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        h = F.linear(h, self.proj.weight.flatten(1), self.proj.bias)
        return h.transpose(1, 2).reshape(batch, channels, height, width)


def _activated(norm: GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """``SiLU(norm(x + shift))``, the shift ``(B, C, 1, 1)``; one kernel on a GPU."""
    if x.is_cuda:
        return norm.silu(x, None if shift is None else shift[:, :, 0, 0])
    return F.silu(norm(x if shift is None else x + shift))


class Positions(nn.Module):
    """``[cos(t w_i), sin(t w_i)]`` with ``w_i`` from 1 down to 1e-4, both included: ``(B,)`` to ``(B, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.count = width // 2

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.count, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(steps * (-math.log(10_000.0) / (self.count - 1)))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Frequencies(nn.Module):
    """``[cos(2 pi t w_i), sin(2 pi t w_i)]`` with fixed random ``w_i ~ N(0, 16^2)``: ``(B,)`` to ``(B, width)``."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * (2 * math.pi * self.freqs.float())
        return torch.cat([angle.cos(), angle.sin()], dim=1)
