"""Residual multilayer perceptron for 2-D points and other small samples, called as ``net(t, x, y=None)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .unet import check_endpoint, check_null_label, in_full, scale_features, scale_layers, timestep_embedding


class MLP(nn.Module):
    """Residual perceptron on flattened samples, each block normalised and modulated by the time embedding.

    Block: ``x + W2 silu(W1 (norm(x) (1 + scale) + shift))`` with ``scale, shift`` linear in the embedding of ``t`` (and
    of the label). The last layer starts at zero.

    Args:
        shape: shape of one sample, ``(2,)`` or ``(C, H, W)``.
        width: width of the residual stream.
        depth: number of residual blocks.
        expansion: hidden width of a block as a multiple of ``width``.
        time_features: sinusoidal features of ``t``.
        time_scale: factor on ``t`` before its embedding, so that [0, 1] spans many periods.
        num_classes: labels ``0 .. num_classes - 1``; 0 makes the network unconditional.
        null_label: whether it also knows ``num_classes`` as "no label", for classifier-free guidance.
        endpoint: whether the network also sees a path's other endpoint, beside ``x``.
        guided: whether it takes the scale of its guidance, a number or ``(B,)``, 1 by default.

    Raises:
        UserError: for samples or labels of another shape.
    """

    def __init__(
        self,
        shape: Sequence[int] = (2,),
        width: int = 128,
        depth: int = 3,
        expansion: float = 1.0,
        time_features: int = 32,
        time_scale: float = 100.0,
        num_classes: int = 0,
        endpoint: bool = False,
        null_label: bool = False,
        guided: bool = False,
    ) -> None:
        super().__init__()
        if min((width, depth, time_features, *shape), default=0) < 1:
            raise UserError("shape, width, depth and time_features must be positive")
        self.shape = tuple(int(v) for v in shape)
        self.time_features, self.time_scale, self.num_classes = time_features, float(time_scale), num_classes
        self.endpoint = endpoint
        self.null_label = check_null_label(null_label, num_classes)
        size, hidden = math.prod(self.shape), int(width * expansion)
        self.time_embed = nn.Sequential(nn.Linear(time_features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        if num_classes:
            self.label_embed = nn.Embedding(num_classes + null_label, width)
        self.first = nn.Linear((1 + endpoint) * size, width)
        # One matrix gives every block's scale and shift: one large product instead of many small ones.
        self.modulation = nn.Linear(width, 2 * width * depth)
        self.grow = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth))
        self.shrink = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.guided = guided
        if guided:
            self.scale_embed = scale_layers(time_features, width)

    def forward(
        self,
        t: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        endpoint: Tensor | None = None,
        with_features: bool = False,
        guidance: float | Tensor = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prediction shaped like ``x`` ``(B, *shape)`` at times ``t`` ``(B,)`` or ``()``, labels ``y``
        ``(B,)`` if conditional, ``endpoint`` like ``x`` if it takes one; ``with_features`` also the
        residual stream ``(B, width)`` half-way through the blocks. ``guidance`` is the scale for a network that takes
        it.
        """
        if x.shape[1:] != self.shape:
            raise UserError(f"x must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if (y is None) != (self.num_classes == 0):
            raise UserError("y must be given to a class-conditional network and to no other")
        check_endpoint(self.endpoint, x, endpoint)
        t = t.expand(x.shape[0]) if t.dim() == 0 else t
        if t.shape != x.shape[:1]:
            raise UserError(f"t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        features = timestep_embedding(t * self.time_scale, self.time_features).to(x.dtype)
        embedding = self.time_embed(features)
        if self.guided:
            embedding = embedding + self.scale_embed(scale_features(guidance, x, self.time_features).to(x.dtype))
        if y is not None:
            embedding = embedding + self.label_embed(y)
        width = self.first.out_features
        modulation = self.modulation(embedding).split(width, dim=1)
        h = self.first(x.flatten(1) if endpoint is None else torch.cat([x.flatten(1), endpoint.flatten(1)], dim=1))
        middle = h
        for i, (grow, shrink) in enumerate(zip(self.grow, self.shrink, strict=True)):
            scale, shift = modulation[2 * i], modulation[2 * i + 1]
            inner = torch.addcmul(shift, F.layer_norm(h, (width,)), 1.0 + scale)
            h = h + shrink(F.silu(grow(inner)))
            if i == (len(self.grow) - 1) // 2:
                middle = h
        out = in_full(self.last, F.silu(h), self.last.weight).view_as(x)
        return (out, middle) if with_features else out
