"""The networks' layers' operators, on images in channels_last order.

The parameters are float32, or float64 for float64 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autograd import refuse_second_derivative
from .operator import Operator, like_if


def _images(like: Tensor, channels: int) -> Tensor:
    batch, _, *sides = like.shape
    return like.new_empty((batch, channels, *sides)).to(memory_format=torch.channels_last)


def _shapes_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _images(x, weight.shape[0])


def _shapes_conv3x3_grads(
    grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, ...]:
    return _images(x, x.shape[1]) if want_x else x.new_empty(0), like_if(want_weight, weight)


def _shapes_norm_silu(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Any:
    return _images(x, x.shape[1]), weight.new_empty((x.shape[0], groups, 2))


def _shapes_norm_silu_grads(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    g_shift = weight.new_empty(0) if shift is None else weight.new_empty(x.shape[:2])
    return _images(x, x.shape[1]), g_shift, weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])


def _shapes_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Any:
    return _shapes_norm_silu(x, None, weight, bias, groups, eps)


def _shapes_group_norm_grads(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, ...]:
    return _images(x, x.shape[1]), weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])


class _Conv3x3Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative(grad, "conv3x3")
        x, weight = ctx.saved_tensors
        return None, *_conv3x3_backward(grad, x, weight, ctx.needs_input_grad[1:])


def _conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients with respect to the images, the filters and the bias, where wanted."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    want_x, want_weight, want_bias = wanted
    g_x = g_weight = None
    if want_x or want_weight:
        g_x, g_weight = torch.ops.realuid_fast.conv3x3_grads(grad, x, weight, want_x, want_weight)
    g_bias = grad.sum((0, 2, 3), dtype=weight.dtype) if want_bias else None
    return [g_x if want_x else None, g_weight if want_weight else None, g_bias]


class _NormSiluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, statistics = kernel(*inputs)
        ctx.save_for_backward(*inputs[:4], statistics)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        refuse_second_derivative(grad, "norm_silu")
        return None, *_norm_silu_backward(grad, ctx.saved_tensors, ctx.needs_input_grad[1:5]), None, None


def _norm_silu_backward(grad: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients with respect to the images, the shift, the weight and the bias, where wanted."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.realuid_fast.norm_silu_grads(grad, *saved)
    return [g if want else None for g, want in zip(grads, wanted, strict=True)]


class _GroupNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, *_ = inputs
        with torch._C._AutoDispatchBelowAutograd():
            y, statistics = kernel(*inputs)
        ctx.save_for_backward(x, weight, statistics)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        refuse_second_derivative(grad, "group_norm")
        grad = grad.contiguous(memory_format=torch.channels_last)
        grads = torch.ops.realuid_fast.group_norm_grads(grad, *ctx.saved_tensors)
        wanted = zip(grads, ctx.needs_input_grad[1:4], strict=True)
        return None, *(g if want else None for g, want in wanted), None, None


class NormSiluConv3x3(torch.autograd.Function):
    """``conv3x3(dropout(SiLU(norm(x + shift))))``; keeps ``x`` for the backward pass, not the convolution's input.

    The two operators are one node of the graph. It keeps half their memory and computes the normalisation again in the
    backward pass. With ``dropout``, a probability, it also keeps the mask, one byte for each value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        groups: int,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        dropout: float,
    ) -> Tensor:
        y, statistics = torch.ops.realuid_fast.norm_silu(x, shift, norm_weight, norm_bias, groups, eps)
        kept = None
        if dropout:
            kept = torch.empty_like(y, dtype=torch.bool).bernoulli_(1 - dropout)
            y = _dropped(y, kept, dropout)
        ctx.save_for_backward(x, shift, norm_weight, norm_bias, statistics, weight, kept)
        ctx.groups, ctx.eps, ctx.dropout = groups, eps, dropout
        return torch.ops.realuid_fast.conv3x3(y, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative(grad, "norm_silu with conv3x3")
        *of_norm, weight, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # Only the filters' gradient reads the convolution's input. The images' gradient needs nothing but its shape.
        y = of_norm[0]
        if wanted[6]:
            y = torch.ops.realuid_fast.norm_silu(*of_norm[:4], ctx.groups, ctx.eps)[0]
            y = _dropped(y, kept, ctx.dropout)
        g_y, g_weight, g_bias = _conv3x3_backward(grad, y, weight, (any(wanted[:4]), *wanted[6:8]))
        del y
        grads = (
            [None] * 4 if g_y is None else _norm_silu_backward(_dropped(g_y, kept, ctx.dropout), of_norm, wanted[:4])
        )
        return *grads, None, None, g_weight, g_bias, None


def _dropped(values: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    """Set ``values`` that are not ``kept`` to zero, and scale the rest so that the mean stays the same; in place."""
    return values if kept is None else values.mul_(kept).mul_(0.0 if dropout == 1 else 1 / (1 - dropout))


OPERATORS = (
    # Stride 1, padding 1; the filters in float32 whatever the images' type.
    Operator(
        "conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        reference.conv3x3,
        _shapes_conv3x3,
        _Conv3x3Function,
    ),
    Operator(
        "conv3x3_grads(Tensor grad, Tensor x, Tensor weight, bool want_x, bool want_weight) -> (Tensor, Tensor)",
        reference.conv3x3_grads,
        _shapes_conv3x3_grads,
    ),
    # Group normalisation of x + shift, then SiLU; statistics are every group's mean and inverse deviation.
    Operator(
        "norm_silu(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor y, Tensor "
        "statistics)",
        reference.norm_silu,
        _shapes_norm_silu,
        _NormSiluFunction,
    ),
    Operator(
        "norm_silu_grads(Tensor grad, Tensor x, Tensor? shift, Tensor weight, Tensor bias, Tensor statistics) -> "
        "(Tensor g_x, Tensor g_shift, Tensor g_weight, Tensor g_bias)",
        reference.norm_silu_grads,
        _shapes_norm_silu_grads,
    ),
    # Group normalisation alone. CPU networks leave it to torch, so only CUDA has a kernel.
    Operator(
        "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor y, Tensor statistics)",
        reference.group_norm,
        _shapes_group_norm,
        _GroupNormFunction,
    ),
    Operator(
        "group_norm_grads(Tensor grad, Tensor x, Tensor weight, Tensor statistics) -> (Tensor g_x, Tensor g_weight, "
        "Tensor g_bias)",
        reference.group_norm_grads,
        _shapes_group_norm_grads,
    ),
)
