"""Compact U-Net of the ADM family (Dhariwal and Nichol, 2021, arXiv:2105.05233), called as ``net(t, x, y=None)``.

Parameter names and shapes are those of the U-Net that published flow-matching checkpoints use (torchcfm's
``UNetModelWrapper``), so that their state dicts load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..errors import UserError
from . import together
from .layers import Conv1x1, Conv3x3, GroupNorm, doubled, norm_silu_conv
from .recompute import Repeatable, once_more

# Multipliers by image side, as the published configurations choose them.
DEFAULT_MULT: dict[int, tuple[float, ...]] = {
    8: (1, 2),
    16: (1, 2, 2),
    28: (1, 2, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding ``(B, width)`` of ``t`` ``(B,)``: ``[cos(t w_i), sin(t w_i)]`` with ``w_i =
    max_period^(-i / (width // 2))``.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half))
    angle = t.float()[:, None] * rates
    embedding = torch.cat([angle.cos(), angle.sin()], dim=1)
    return F.pad(embedding, (0, 1)) if width % 2 else embedding


ConvT = TypeVar("ConvT", nn.Conv1d, nn.Conv2d)


class Blocks(Repeatable, nn.Sequential):
    """Modules applied in order; residual blocks also get the time embedding."""

    @once_more
    def forward(self, x: Tensor, embedding: Tensor | tuple[Tensor, ...]) -> Tensor:
        for module in self:
            x = module(x, embedding) if isinstance(module, ResBlock) else module(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour doubling, followed by a 3x3 convolution where ``conv`` is set."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        if conv:
            self.conv = Conv3x3(channels, channels)
        self.has_conv = conv

    def forward(self, x: Tensor) -> Tensor:
        # Autocast would double pixels in float32, which the convolution rounds again: the values are the same.
        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not self.has_conv):
            x = doubled(x)
        return self.conv(x) if self.has_conv else x


class Downsample(nn.Module):
    """Halving by a strided 3x3 convolution, or by averaging where ``conv`` is not set."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block ``skip(x) + conv(norm(conv(norm(x)) + e))`` with the time embedding ``e`` in the middle.

    With ``scale_shift`` the second norm is modulated, ``norm(h) (1 + scale) + shift``, instead of ``h + e``.
    ``resample`` is ``"up"``, ``"down"`` or ``None``: both branches are resampled before the first
    convolution.

    In place of the embedding, a call may be given what :func:`~.together.shifts` computed for all blocks of a network.
    """

    place = 0  # among the network's residual blocks

    def __init__(
        self,
        channels: int,
        embedding: int,
        out_channels: int,
        groups: int,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample: nn.Module | None = None
        if resample is not None:
            self.resample = Upsample(channels, False) if resample == "up" else Downsample(channels, False)
        self.in_layers = nn.Sequential(GroupNorm(groups, channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zeroed(Conv3x3(out_channels, out_channels)),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else Conv1x1(channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor | tuple[Tensor, ...]) -> Tensor:
        norm, conv = cast(GroupNorm, self.in_layers[0]), self.in_layers[2]
        # The shift that was computed for all blocks at once has the convolution's bias in it, but not beside a scale.
        biased = self.scale_shift or not isinstance(embedding, tuple)
        if self.resample is None:
            h = norm_silu_conv(norm, x, conv, biased=biased)
        else:
            h, x = self.resample(norm.silu(x)), self.resample(x)
            h = conv(h) if biased else conv(h, biased=False)
        shift = embedding[self.place] if isinstance(embedding, tuple) else self.emb_layers(embedding)
        norm, (_, activation, dropout, conv) = cast(GroupNorm, self.out_layers[0]), self.out_layers
        dropped = cast(nn.Dropout, dropout).p if dropout.training else 0.0
        if self.scale_shift:
            scale, shift = shift.to(h.dtype)[:, :, None, None].chunk(2, dim=1)
            h = conv(F.dropout(activation(torch.addcmul(shift, norm(h), 1.0 + scale)), dropped))
        else:
            h = norm_silu_conv(norm, h, conv, shift, dropped)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Residual self-attention over all positions.

    The projection's channels are ordered head by head, each ``(q, k, v)``; ``split_first`` orders them ``q,
    k, v`` first and heads inside, as some checkpoints do.
    """

    def __init__(self, channels: int, heads: int, groups: int, split_first: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.split_first = split_first
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # A 1x1 convolution on (B, C, T) is a linear layer on (B, T, C), the order that attention wants.
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias)
        size = channels // self.heads
        # The three are views of one tensor. Backward, their gradients are laid side by side in one copy.
        if self.split_first:
            q, k, v = qkv.view(batch, -1, 3, self.heads, size).unbind(2)
        else:
            q, k, v = qkv.view(batch, -1, self.heads, 3, size).unbind(3)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        h = h.transpose(1, 2).reshape(batch, -1, channels)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(batch, channels, height, width)


class Output(nn.Sequential):
    """The network's last layers, ``conv(SiLU(norm(x)))``, in the order ``norm, SiLU, conv``.

    The U-Net calls this module as a whole: where a network is sharded, the call is what gathers its parameters.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm, _, conv = self
        return conv(cast(GroupNorm, norm).silu(x))


class UNet(nn.Module):
    """U-Net on images ``(B, C, H, W)`` and times ``(B,)``, returning ``(B, out_channels, H, W)``.

    Args:
        dim: ``(C, H, W)`` of the images; ``H`` and ``W`` divisible by ``2 ** (levels - 1)``.
        num_channels: width of the first level, a multiple of ``norm_groups`` where multiplied.
        num_res_blocks: residual blocks a level (one more on the way up).
        channel_mult: width of each level as a multiple of ``num_channels``; by default from the image side.
        attention_resolutions: sides of the levels with attention (``(16,)`` or ``"16,8"``); the middle
            follows ``middle_attention``.
        num_heads, num_heads_upsample: attention heads, and those on the way up (-1: as many).
        num_head_channels: channels of a head; unless -1 it takes the place of ``num_heads``.
        use_scale_shift_norm: whether the embedding scales and shifts the second normalisation of a block.
        resblock_updown: whether residual blocks change the resolution.
        use_new_attention_order: whether q, k and v are the outer split of the channels and heads the inner one.
        dropout: probability of dropout in the residual blocks.
        class_cond, num_classes: label conditioning; then ``y`` of shape ``(B,)`` int64 is required.
        null_label: whether it also knows ``num_classes`` as "no label", for classifier-free guidance.
        learn_sigma: twice the output channels.
        norm_groups: groups of every normalisation (ADM: 32).
        time_scale: factor on ``t`` before its embedding (1 in the published flow-matching models).
        middle_attention: attention between the two middle blocks (always there in ADM).
        endpoint: whether the network also sees a path's other endpoint, as further input channels.
        guided: whether it takes the scale of its guidance, a number or ``(B,)``, 1 by default.

    Raises:
        UserError: for a shape, width or label that the network cannot take.
    """

    def __init__(
        self,
        dim: Sequence[int],
        num_channels: int,
        num_res_blocks: int = 1,
        channel_mult: Sequence[float] | None = None,
        attention_resolutions: Sequence[int] | str = (),
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        dropout: float = 0.0,
        class_cond: bool = False,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        norm_groups: int = 32,
        time_scale: float = 1.0,
        middle_attention: bool = True,
        endpoint: bool = False,
        null_label: bool = False,
        guided: bool = False,
    ) -> None:
        super().__init__()
        in_channels, height, width = _shape(dim)
        widths = _widths(height, width, num_channels, channel_mult, norm_groups)
        attend_at = {width // r for r in _numbers(attention_resolutions)}

        self.dim, self.endpoint, self.num_channels = (in_channels, height, width), endpoint, num_channels
        self.num_classes = num_classes if class_cond else None
        self.null_label = check_null_label(null_label, self.num_classes or 0)
        self.time_scale, self.guided, embedding = float(time_scale), guided, 4 * num_channels
        self.time_embed = nn.Sequential(nn.Linear(num_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if class_cond:
            self.label_emb = nn.Embedding(num_classes + null_label, embedding)

        def res(channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, embedding, out_channels, norm_groups, dropout, use_scale_shift_norm, resample)

        def attention(channels: int, heads: int) -> Attention:
            heads = _heads(channels, heads, num_head_channels)
            return Attention(channels, heads, norm_groups, use_new_attention_order)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Blocks(Conv3x3((1 + endpoint) * in_channels, channels))])
        skips, shrink = [channels], 1
        for level, out_channels in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(channels, out_channels)]
                channels = out_channels
                if shrink in attend_at:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(Blocks(*layers))
                skips.append(channels)
            if level != len(widths) - 1:
                down = res(channels, channels, "down") if resblock_updown else Downsample(channels, True)
                self.input_blocks.append(Blocks(down))
                skips.append(channels)
                shrink *= 2

        # Without attention an identity takes its place, so that the second block's parameters keep their names.
        between = attention(channels, num_heads) if middle_attention else nn.Identity()
        self.middle_block = Blocks(res(channels, channels), between, res(channels, channels))

        self.output_blocks = nn.ModuleList()
        for level, out_channels in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), out_channels)]
                channels = out_channels
                if shrink in attend_at:
                    layers.append(attention(channels, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and i == num_res_blocks:
                    layers.append(res(channels, channels, "up") if resblock_updown else Upsample(channels, True))
                    shrink //= 2
                self.output_blocks.append(Blocks(*layers))

        last = _zeroed(nn.Conv2d(channels, in_channels * (1 + learn_sigma), 3, padding=1))
        self.out = Output(GroupNorm(norm_groups, channels), nn.SiLU(), last)
        self.scale_embed = scale_layers(num_channels, embedding) if guided else None
        self._residual, self._products = _numbered(self), together.products(self, self.out)

    @property
    def _blocks(self) -> tuple[nn.Module, ...]:
        """All blocks, in the order in which they run."""
        return (*self.input_blocks, self.middle_block, *self.output_blocks)

    def forward(
        self,
        t: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        endpoint: Tensor | None = None,
        with_features: bool = False,
        guidance: float | Tensor = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prediction for images ``x`` ``(B, C, H, W)`` at times ``t`` ``(B,)`` or ``()``, with labels
        ``y`` ``(B,)`` if conditional and ``endpoint`` like ``x`` if the network takes one; ``with_features`` also the
        middle's output ``(B, C, H', W')``. ``guidance`` is the scale for a network that takes it.
        """
        if x.dim() != 4 or x.shape[1] != self.dim[0]:
            raise UserError(f"x must have shape (batch, {self.dim[0]}, height, width), got {tuple(x.shape)}")
        if (y is None) != (self.num_classes is None):
            raise UserError("y must be given to a class-conditional network and to no other")
        t = t.expand(x.shape[0]) if t.dim() == 0 else t
        if t.shape != x.shape[:1]:
            raise UserError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        if held := together.casts(self, x):
            return cast(Tensor, together.with_casts(self, held, (t, x, y, endpoint, with_features, guidance)))
        features = timestep_embedding(t * self.time_scale, self.num_channels)
        embedding = self.time_embed(features.to(next(self.time_embed.parameters()).dtype))
        if self.scale_embed is not None:
            embedding = embedding + self.scale_embed(scale_features(guidance, x, self.num_channels).to(embedding.dtype))
        if y is not None:
            embedding = embedding + self.label_emb(y)
        check_endpoint(self.endpoint, x, endpoint)
        if endpoint is not None:
            x = torch.cat([x, endpoint], dim=1)
        # On a GPU many small products cost more than one.
        at_once = backends.compiled(x.device, "shifts") and all(map(together.joins, self._residual))
        told = together.shifts(self._residual, embedding) if at_once else embedding
        skips = []
        for block in self.input_blocks:
            x = block(x, told)
            skips.append(x)
        middle = x = self.middle_block(x, told)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), told)
        out = in_full(self.out, x, next(self.out[-1].parameters()))
        return (out, middle) if with_features else out


def scale_layers(features: int, width: int) -> nn.Sequential:
    """The embedding of a guidance scale. It starts at zero, so the network starts as one that takes no scale."""
    last = nn.Linear(width, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), last)


def scale_features(scale: float | Tensor, x: Tensor, features: int) -> Tensor:
    """Sinusoidal features ``(B, features)`` of a guidance scale, one for all rows of ``x`` or one a row."""
    rows = scale if isinstance(scale, Tensor) else x.new_full((x.shape[0],), scale, dtype=torch.float32)
    if rows.shape != x.shape[:1]:
        raise UserError(f"guidance must be a number or have shape ({x.shape[0]},), got {tuple(rows.shape)}")
    # The fastest feature has the period 2 pi, the range of common scales.
    return timestep_embedding(rows, features)


def _numbered(net: nn.Module) -> tuple[ResBlock, ...]:
    """The residual blocks of a network, each told its place among them."""
    blocks = tuple(module for module in net.modules() if isinstance(module, ResBlock))
    for place, block in enumerate(blocks):
        block.place = place
    return blocks


def check_null_label(wanted: bool, classes: int) -> int | None:
    """The label that means "no label", one above the classes' labels; None if it is not wanted."""
    if wanted and not classes:
        raise UserError("null_label needs a class-conditional network")
    return classes if wanted else None


def check_endpoint(wanted: bool, x: Tensor, endpoint: Tensor | None) -> None:
    """Refuse an endpoint that is not wanted, missing, or not shaped like ``x``."""
    if (endpoint is None) == wanted:
        raise UserError("endpoint must be given to a network that takes it and to no other")
    if endpoint is not None and endpoint.shape != x.shape:
        raise UserError(f"endpoint must have x's shape {tuple(x.shape)}, got {tuple(endpoint.shape)}")


def in_full(layers: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """``layers(x)`` in the storage type of their ``weight``, also under autocast.

    The last layer sets the rounding of a network's output, and losses take differences of outputs. Full precision in
    this one layer costs next to nothing.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.to(weight.dtype))


def _zeroed(layer: ConvT) -> ConvT:
    """The layer with all parameters zero, so that a fresh residual branch (or output) contributes nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _shape(dim: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    if len(dim) != 3:
        raise UserError(f"dim must be (channels, height, width), got {tuple(dim)}")
    channels, height, width = (int(v) for v in dim)
    return channels, height, width


def _widths(
    height: int, width: int, num_channels: int, channel_mult: Sequence[float] | None, norm_groups: int
) -> list[int]:
    """The channels of every level."""
    if channel_mult is None:
        if width not in DEFAULT_MULT:
            raise UserError(f"channel_mult must be given for images of side {width}")
        channel_mult = DEFAULT_MULT[width]
    levels = len(channel_mult)
    shrink = 2 ** (levels - 1)
    if height % shrink or width % shrink:
        raise UserError(f"dim has sides {height, width}, not divisible by {shrink} for {levels} levels in channel_mult")
    widths = [int(m * num_channels) for m in channel_mult]
    for value in widths:
        if value < 1 or value % norm_groups:
            raise UserError(f"norm_groups {norm_groups} does not divide a level of {value} channels")
    return widths


def _heads(channels: int, heads: int, head_channels: int) -> int:
    """The heads of an attention, of ``head_channels`` each unless that is -1."""
    if head_channels != -1:
        if channels % head_channels:
            raise UserError(f"num_head_channels {head_channels} does not divide {channels} channels")
        heads = channels // head_channels
    if channels % heads:
        raise UserError(f"num_heads {heads} does not divide {channels} channels")
    return heads


def _numbers(values: Sequence[int] | str) -> list[int]:
    """The whole numbers of a list, or of a text with commas between them."""
    given = [number for number in values.split(",") if number.strip()] if isinstance(values, str) else values
    return [int(value) for value in given]
