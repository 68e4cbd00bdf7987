"""The U-Nets of Karras et al. (2206.00364), called as ``net(t, x, y=None)`` with ``t`` their ``c_noise``.

These are the raw networks ``F``; their preconditioning is a path's prediction (``edm``, ``vp`` or ``ve``). Names and
shapes of parameters and buffers are those of the published networks' inner ``model``, so that their states load as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .edm_layers import Block, Conv, Frequencies, Norm, Positions
from .unet import check_null_label, scale_features, scale_layers, timestep_embedding

MOST_BLOCKS = 256  # most blocks of a level; a damaged file may ask for any number
ROOT_HALF = math.sqrt(0.5)


class _Common(nn.Module):
    """The base of both networks: checks, the labels' one-hot rows, and the last layer in full precision."""

    def __init__(
        self,
        dim: Sequence[int],
        levels: int,
        num_blocks: int,
        out_channels: int | None,
        label_dim: int,
        null_label: bool,
        guided: bool,
    ) -> None:
        super().__init__()
        if not 1 <= num_blocks <= MOST_BLOCKS:
            raise UserError(f"num_blocks must be from 1 to {MOST_BLOCKS}, got {num_blocks}")
        if len(dim) != 3 or dim[1] != dim[2]:
            raise UserError(f"dim must be (channels, side, side), got {tuple(dim)}")
        if levels < 1 or int(dim[1]) % 2 ** (levels - 1):
            raise UserError(
                f"dim {tuple(dim)} must be divisible by 2 once for each level of channel_mult but the first"
            )
        self.dim = tuple(int(v) for v in dim)
        self.out_channels = self.dim[0] if out_channels is None else out_channels
        if self.out_channels < self.dim[0]:
            raise UserError(f"out_channels must be at least the images' {self.dim[0]} channels, got {out_channels}")
        self.num_classes = label_dim or None
        self.null_label = check_null_label(null_label, label_dim)
        self.guided = guided

    def _takes_scale(self, features: int, embedding: int) -> None:
        """Make the layers of a guidance scale, after all others have been drawn."""
        self._features = features
        self.scale_embed = scale_layers(features, embedding) if self.guided else None

    def _told(self, embedding: Tensor, guidance: float | Tensor, x: Tensor) -> Tensor:
        """The embedding with the guidance scale, where the network takes it."""
        if self.scale_embed is None:
            return embedding
        return embedding + self.scale_embed(scale_features(guidance, x, self._features).to(embedding.dtype))

    def _checked(self, t: Tensor, x: Tensor, y: Tensor | None) -> Tensor:
        """The times as ``(B,)``."""
        if x.shape[1:] != self.dim:
            raise UserError(f"x must have shape (batch, {', '.join(map(str, self.dim))}), got {tuple(x.shape)}")
        if (y is None) != (self.num_classes is None):
            raise UserError("y must be given to a class-conditional network and to no other")
        t = t.expand(x.shape[0]) if t.dim() == 0 else t
        if t.shape != x.shape[:1]:
            raise UserError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        return t

    def _one_hot(self, y: Tensor, weight: Tensor) -> Tensor:
        """Rows ``(B, num_classes)``; zeros for the null label."""
        assert self.num_classes is not None
        return F.one_hot(y, self.num_classes + 1)[:, :-1].to(weight.dtype)

    def _last(self, norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        """The output's first channels, those of the images. Further ones, of a learned variance, are left out."""
        weight = next(conv.parameters())
        with torch.autocast(x.device.type, enabled=False):
            return conv(F.silu(norm(x.to(weight.dtype))))[:, : self.dim[0]]


class SongUNet(_Common):
    """DDPM++ and NCSN++ (Song et al., 2011.13456) as Karras et al. (2206.00364) train them.

    Args:
        dim: ``(C, R, R)`` of the images; ``R`` divisible by ``2 ** (len(channel_mult) - 1)``.
        out_channels: channels of the last layer, ``C`` when None. Channels beyond ``C`` are left out of the output.
        label_dim: number of classes, 0 for none; then ``y`` ``(B,)`` int64 is required.
        null_label: whether it also knows ``label_dim`` as "no label" (a row of zeros), as networks trained with
            label dropout do.
        augment_dim: size of the augmentation labels it was trained with. Here images count as not augmented, so the
            labels' weight is kept but has no effect.
        model_channels: base width.
        channel_mult: widths of the levels as multiples of it.
        channel_mult_emb: the embedding's width as a multiple of it.
        num_blocks: residual blocks a level.
        attn_resolutions: sides of the levels with attention.
        dropout: probability of dropout in the blocks.
        embedding_type, channel_mult_noise: ``"positional"`` and 1 in DDPM++, ``"fourier"`` and 2 in NCSN++.
        encoder_type: ``"standard"`` in DDPM++, ``"residual"`` in NCSN++, or ``"skip"``.
        decoder_type: ``"standard"`` or ``"skip"``.
        resample_filter: taps of the resampling, ``(1, 1)`` in DDPM++, ``(1, 3, 3, 1)`` in NCSN++.
        guided: whether it takes the scale of its guidance, a number or ``(B,)``, 1 by default. Its layers are this
            package's own and start at zero, so a published state makes the published network.

    Raises:
        UserError: for a setting, shape or label that the network cannot take.
    """

    def __init__(
        self,
        dim: Sequence[int],
        out_channels: int | None = None,
        label_dim: int = 0,
        null_label: bool = False,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        guided: bool = False,
    ) -> None:
        super().__init__(dim, len(channel_mult), num_blocks, out_channels, label_dim, null_label, guided)
        _check("embedding_type", embedding_type, ("positional", "fourier"))
        _check("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check("decoder_type", decoder_type, ("standard", "skip"))
        if not resample_filter or len(resample_filter) % 2 or sum(resample_filter) == 0:
            raise UserError(f"resample_filter must hold an even number of taps, got {tuple(resample_filter)}")
        taps = tuple(resample_filter)
        self.encoder_type, self.decoder_type, self.num_blocks = encoder_type, decoder_type, num_blocks
        self.sides = [self.dim[1] >> level for level in range(len(channel_mult))]
        embedding, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise

        self.map_noise = Frequencies(noise) if embedding_type == "fourier" else Positions(noise)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = _unused(noise, augment_dim) if augment_dim else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)

        def block(channels: int, out: int, resample: str | None = None, attention: bool = False) -> Block:
            return Block(
                channels, out, embedding, resample, int(attention), dropout, ROOT_HALF, 1e-6, taps, True, False
            )  # fmt: skip

        widths = [model_channels * mult for mult in channel_mult]
        channels, aux = model_channels, self.dim[0]
        self.enc = nn.ModuleDict({f"{_square(self.sides[0])}_conv": Conv(aux, channels, 3)})
        skips = [channels]
        for level, (side, width) in enumerate(zip(self.sides, widths, strict=True)):
            at = _square(side)
            if level:
                self.enc[f"{at}_down"] = block(channels, channels, "down")
                skips.append(channels)
                if encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = Conv(aux, aux, 0, "down", taps)
                    self.enc[f"{at}_aux_skip"] = Conv(aux, channels, 1)
                elif encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = Conv(aux, channels, 3, "down", taps, late=True)
                    aux = channels
            for i in range(num_blocks):
                self.enc[f"{at}_block{i}"] = block(channels, width, attention=side in attn_resolutions)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (side, width) in reversed(list(enumerate(zip(self.sides, widths, strict=True)))):
            at, lowest = _square(side), level == len(widths) - 1
            if lowest:
                self.dec[f"{at}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{at}_in1"] = block(channels, channels)
            else:
                self.dec[f"{at}_up"] = block(channels, channels, "up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and side in attn_resolutions
                self.dec[f"{at}_block{i}"] = block(channels + skips.pop(), width, attention=attention)
                channels = width
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and not lowest:
                    self.dec[f"{at}_aux_up"] = Conv(self.out_channels, self.out_channels, 0, "up", taps)
                self.dec[f"{at}_aux_norm"] = Norm(channels, 1e-6)
                self.dec[f"{at}_aux_conv"] = Conv(channels, self.out_channels, 3)
        self._initialise()
        self._takes_scale(model_channels, embedding)

    def forward(
        self,
        t: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        with_features: bool = False,
        guidance: float | Tensor = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``F(x; c_noise = t)`` for images ``x`` ``(B, C, R, R)`` and ``t`` ``(B,)`` or ``()``; ``with_features`` also
        the middle's output, on the lowest level. ``guidance`` is the scale for a network that takes it.
        """
        t = self._checked(t, x, y)
        cosine, sine = self.map_noise(t).chunk(2, dim=1)
        features = torch.cat([sine, cosine], dim=1).to(self.map_layer0.weight.dtype)
        if y is not None:
            assert self.map_label is not None
            rows = self._one_hot(y, self.map_label.weight)
            features = features + self.map_label(rows * math.sqrt(rows.shape[1]))
        embedding = F.silu(self._told(self.map_layer1(F.silu(self.map_layer0(features))), guidance, x))

        aux, x = x, self.enc[f"{_square(self.sides[0])}_conv"](x)
        skips = [x]
        for level, side in enumerate(self.sides):
            at = _square(side)
            if level:
                x = self.enc[f"{at}_down"](x, embedding)
                if self.encoder_type == "skip":
                    aux = self.enc[f"{at}_aux_down"](aux)
                    x = x + self.enc[f"{at}_aux_skip"](aux)
                elif self.encoder_type == "residual":
                    x = aux = (x + self.enc[f"{at}_aux_residual"](aux)) * ROOT_HALF
                skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{at}_block{i}"](x, embedding)
                skips.append(x)

        out = None
        for level, side in reversed(list(enumerate(self.sides))):
            at = _square(side)
            if level == len(self.sides) - 1:
                x = middle = self.dec[f"{at}_in1"](self.dec[f"{at}_in0"](x, embedding), embedding)
            else:
                x = self.dec[f"{at}_up"](x, embedding)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{at}_block{i}"](torch.cat([x, skips.pop()], dim=1), embedding)
            if self.decoder_type == "skip" or level == 0:
                image = self._last(self.dec[f"{at}_aux_norm"], self.dec[f"{at}_aux_conv"], x)
                out = image if out is None else image + self.dec[f"{at}_aux_up"](out)
        assert out is not None
        return (out, middle) if with_features else out

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw weights by Xavier's uniform law, those of a branch's last layer nearly 0, and set biases to 0."""
        for name, module in self.named_modules():
            if isinstance(module, (Conv, nn.Linear)) and module.weight is not None:
                last = name.endswith(("conv1", "proj", "aux_conv"))
                gain = 1e-5 if last else math.sqrt(0.2) if name.endswith("qkv") else 1.0
                nn.init.xavier_uniform_(module.weight, gain)
                nn.init.zeros_(module.bias)


class DhariwalUNet(_Common):
    """ADM (Dhariwal and Nichol, 2105.05233) as Karras et al. (2206.00364) train it. Attention has heads of 64 channels.

    Args:
        dim, out_channels, label_dim, null_label, augment_dim: as in :class:`SongUNet`.
        model_channels, channel_mult, channel_mult_emb, num_blocks, attn_resolutions, dropout, guided: as there too.

    Raises:
        UserError: for a setting, shape or label that the network cannot take.
    """

    def __init__(
        self,
        dim: Sequence[int],
        out_channels: int | None = None,
        label_dim: int = 0,
        null_label: bool = False,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        guided: bool = False,
    ) -> None:
        super().__init__(dim, len(channel_mult), num_blocks, out_channels, label_dim, null_label, guided)
        sides = [self.dim[1] >> level for level in range(len(channel_mult))]
        embedding = model_channels * channel_mult_emb
        self.model_channels = model_channels
        self.map_augment = _unused(model_channels, augment_dim) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label_dim, embedding, bias=False) if label_dim else None

        def block(channels: int, out: int, resample: str | None = None, attention: bool = False) -> Block:
            return Block(channels, out, embedding, resample, out // 64 if attention else 0, dropout)

        widths = [model_channels * mult for mult in channel_mult]
        channels = widths[0]
        self.enc = nn.ModuleDict({f"{_square(sides[0])}_conv": Conv(self.dim[0], channels, 3)})
        skips = [channels]
        for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
            at = _square(side)
            if level:
                self.enc[f"{at}_down"] = block(channels, channels, "down")
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{at}_block{i}"] = block(channels, width, attention=side in attn_resolutions)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        self.joined = []
        for level, (side, width) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            at = _square(side)
            if level == len(widths) - 1:
                self.dec[f"{at}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{at}_in1"] = block(channels, channels)
            else:
                self.dec[f"{at}_up"] = block(channels, channels, "up")
            for i in range(num_blocks + 1):
                name = f"{at}_block{i}"
                self.dec[name] = block(channels + skips.pop(), width, attention=side in attn_resolutions)
                self.joined.append(name)
                channels = width
        self.out_norm = Norm(channels, 1e-5)
        self.out_conv = Conv(channels, self.out_channels, 3)
        self._initialise()
        self._takes_scale(model_channels, embedding)

    def forward(
        self,
        t: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        with_features: bool = False,
        guidance: float | Tensor = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``F(x; c_noise = t)`` for images ``x`` ``(B, C, R, R)`` and ``t`` ``(B,)`` or ``()``; ``with_features`` also
        the middle's output, on the lowest level. ``guidance`` is the scale for a network that takes it.
        """
        t = self._checked(t, x, y)
        features = timestep_embedding(t, self.model_channels).to(self.map_layer0.weight.dtype)
        embedding = self.map_layer1(F.silu(self.map_layer0(features)))
        if y is not None:
            assert self.map_label is not None
            embedding = embedding + self.map_label(self._one_hot(y, self.map_label.weight))
        embedding = F.silu(self._told(embedding, guidance, x))
        skips = []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, Block) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if name in self.joined else x, embedding)
            if name.endswith("_in1"):
                middle = x
        out = self._last(self.out_norm, self.out_conv, x)
        return (out, middle) if with_features else out

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw weights and biases uniformly within ``1 / sqrt(fan_in)``, and set a branch's last layer to 0."""
        for name, module in self.named_modules():
            if isinstance(module, (Conv, nn.Linear)) and module.weight is not None:
                bound = 0.0 if name.endswith(("conv1", "proj", "out_conv")) else module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)


def _unused(width: int, size: int) -> nn.Module:
    """A module whose weight is a buffer: it is saved with the network, has no gradient and is not used."""
    module = nn.Module()
    module.register_buffer("weight", torch.zeros(width, size))
    return module


def _square(side: int) -> str:
    return f"{side}x{side}"


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}; got {value!r}")
