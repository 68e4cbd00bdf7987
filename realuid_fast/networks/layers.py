"""Layers of the image networks: torch's own, and the package's operators where those are faster.

The operators want images in channels_last order; other layouts, and everything inside ``rf.backend("torch")``, run as
plain torch. They have no second derivative.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops import NormSiluConv3x3, refuse_forward_mode

# With fewer channels, or fewer tiles of 4x4 pixels, a convolution is faster through oneDNN. For half types more tiles
# are needed, because oneDNN multiplies those at twice the speed of float32, and the operator does not.
LEAST_CHANNELS, LEAST_TILES, LEAST_TILES_HALF = 16, 8, 96
# For each type of images, the type of parameters that the operators take with them.
_PARAMETERS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 with padding 1."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        if _autocasts(x):
            # Cast the images as autocast does for a convolution. The operator takes its filters in float32.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias if biased else None
        if serves(x, self.weight) and self._pays(x):
            return torch.ops.realuid_fast.conv3x3.default(x, self.weight, bias)
        return self._conv_forward(x, self.weight, bias)

    def joins(self, x: Tensor) -> bool:
        """Whether a call with images like ``x`` runs the operator on them as they are, without a cast or a hook."""
        hooked = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return not (hooked or _autocasts(x)) and serves(x, self.weight) and self._pays(x)

    def _pays(self, x: Tensor) -> bool:
        if min(self.in_channels, self.out_channels) < LEAST_CHANNELS:
            return False
        batch, _, height, width = x.shape
        tiles = batch * -(-height // 4) * -(-width // 4)
        if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
            return tiles >= LEAST_TILES_HALF and not _has_matrix_unit()
        return tiles >= LEAST_TILES


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution: on channels_last images a linear layer on the pixels, which costs less a call."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if serves(x, self.weight, "conv1x1"):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the storage type."""

    def forward(self, x: Tensor) -> Tensor:
        if serves(x, self.weight, "group_norm"):
            groups, eps = self.num_groups, self.eps
            return torch.ops.realuid_fast.group_norm.default(x, self.weight, self.bias, groups, eps)[0]
        if x.dtype == torch.float32 or x.dtype == torch.float64:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)

    def silu(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``SiLU(norm(x + shift))``, the shift ``(B, C)`` added to every pixel."""
        if serves(x, self.weight, "norm_silu"):
            shift = _of_kind(shift, self.weight)
            groups, eps = self.num_groups, self.eps
            return torch.ops.realuid_fast.norm_silu.default(x, shift, self.weight, self.bias, groups, eps)[0]
        return F.silu(self(x if shift is None else x + shift.to(x.dtype)[:, :, None, None]))


def norm_silu_conv(
    norm: GroupNorm,
    x: Tensor,
    conv: nn.Module,
    shift: Tensor | None = None,
    dropout: float = 0.0,
    biased: bool = True,
) -> Tensor:
    """``conv(dropout(SiLU(norm(x + shift))))``, the shift ``(B, C)`` added to every pixel, ``dropout`` a probability.

    If both layers run as operators, the convolution's input is not kept for the backward pass but computed again.
    Without ``biased``, ``conv`` is a :class:`Conv3x3` that leaves its bias out, for a caller that adds it elsewhere.
    """
    # torch.func's transforms know the two operators, but not the autograd function that joins them.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if biased and isinstance(conv, Conv3x3) and not transformed and conv.joins(x) and serves(x, norm.weight):
        shift = _of_kind(shift, norm.weight)
        of_norm = (x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps)
        refuse_forward_mode("norm_silu with conv3x3", (*of_norm, conv.weight, conv.bias))
        return cast(Tensor, NormSiluConv3x3.apply(*of_norm, conv.weight, conv.bias, dropout))
    y = F.dropout(norm.silu(x, shift), dropout)
    return cast(Tensor, conv(y) if biased else conv(y, biased=False))


def doubled(x: Tensor) -> Tensor:
    """Images of twice the sides, every pixel four times (nearest neighbour).

    On CUDA, channels_last images become so by views and one copy. torch's own operator would do the same forwards, but
    torch.compile adds up its gradient in float32 and in NCHW, which costs copies back.
    """
    if x.is_cuda and x.is_contiguous(memory_format=torch.channels_last):
        return _doubled_pixels(x)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _doubled_pixels(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def serves(x: Tensor, weight: Tensor, layer: str = "conv3x3") -> bool:
    """Whether a layer's operator takes images ``x`` with the parameter ``weight``: channels_last, of float types.

    On CUDA, never in float64, normalisations are operators and 1x1 convolutions linear layers. 3x3 convolutions are
    cuDNN's.
    """
    # A linear layer takes parameters of the images' type too, which they have where a network's casts were one.
    parameters = x.dtype if layer == "conv1x1" and x.is_cuda and weight.dtype == x.dtype else _PARAMETERS.get(x.dtype)
    return (
        x.is_contiguous(memory_format=torch.channels_last)
        and weight.dtype == parameters
        and not (x.is_cuda and x.dtype == torch.float64)
        and backends.compiled(x.device, layer)
    )


def _of_kind(shift: Tensor | None, weight: Tensor) -> Tensor | None:
    """A shift as the operators read it: in the parameters' type, without gaps."""
    return None if shift is None else shift.to(weight.dtype).contiguous()


def _autocasts(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)


def _has_matrix_unit() -> bool:
    """Whether this processor's oneDNN multiplies half types many times faster than float32."""
    return torch.cpu._is_amx_tile_supported()


# torch.compile cannot trace the call above. This is the mark of torch.compiler.assume_constant_result. That function
# itself imports torch._dynamo first, which takes longer than all else that a short command does.
_has_matrix_unit._dynamo_marked_constant = True  # type: ignore[attr-defined]
