"""Losses that other frameworks take as means over all elements of a batch, by the fused calls: ours divided by ``D``.

``D`` is the number of elements of a sample. Nothing here reads a tensor on the host or changes a shape, so every call
can be captured in a CUDA graph. Nothing here talks to other ranks: a mean is over this rank's batch, as DDP and FSDP2
expect it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional, ops
from ..coefficients import Coefficients
from ..contracts import check_tensor
from ..errors import UserError
from ..ops.autograd import refuse_forward_mode, refuse_second_derivative
from ..tensors import refuse_gradients
from .losses import _laid_out

# The tensors that a prediction's target is made of.
_NEEDED = {"x0": ("x0",), "eps": ("eps",), "v": ("x0", "eps"), "flow": ("x0", "eps")}


def together(**given: Any) -> list[Tensor]:
    """The named tensors in one dtype, the widest of theirs, and in the memory layout of the first.

    Raises:
        UserError: one is missing, no floating-point tensor, of another shape or on another device than the first.
    """
    first, like = next(iter(given.items()))
    for name, tensor in given.items():
        check_tensor(name, tensor)
        if not tensor.is_floating_point() or tensor.dim() == 0:
            raise UserError(f"{name} must hold floating-point numbers, a row for each sample, not {tensor.dtype}")
        if tensor.shape != like.shape or tensor.device != like.device:
            raise UserError(
                f"{name} must have {first}'s shape and device, {tuple(like.shape)} on {like.device}, not "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    widest = functools.reduce(torch.promote_types, (tensor.dtype for tensor in given.values()))
    return [_laid_out(tensor.to(widest), like) for tensor in given.values()]


def samples(name: str, value: Any) -> Tensor:
    """The samples in float32, or float64: the sources multiply by a sigma in float32, which casts half types up."""
    (x,) = together(**{name: value})
    return x.to(arithmetic(x))


def arithmetic(x: Tensor) -> torch.dtype:
    """The type of the arithmetic on samples like ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def size(x: Tensor) -> int:
    """``D``, the number of elements of a sample."""
    return max(x[:1].numel(), 1)


def coefficient_rows(x: Tensor, **numbers: float | Tensor) -> Tensor:
    """Coefficient rows ``(R, 9)`` with ``k_out = 1`` and the named numbers, each one number or one a row; others 0."""
    coef = torch.zeros(x.shape[0], 9, dtype=arithmetic(x), device=x.device)
    rows = Coefficients(coef)
    rows.k_out.fill_(1.0)
    for name, number in numbers.items():
        column = getattr(rows, name)
        column.copy_(number) if isinstance(number, Tensor) else column.fill_(number)
    return coef


def by_row(name: str, value: Any, x: Tensor) -> Tensor:
    """One number or one for each sample of ``x``, in any shape, as ``(1,)`` or ``(R,)`` of the arithmetic's type."""
    check_tensor(name, value)
    if value.numel() not in (1, x.shape[0]):
        raise UserError(f"{name} must hold one number or {x.shape[0]}, one a sample, not shape {tuple(value.shape)}")
    numbers: Tensor = value.detach().to(x.device, arithmetic(x)).reshape(-1)
    return numbers


def denoising_loss(
    pred_type: str,
    net_pred: Tensor,
    x0: Tensor | None,
    eps: Tensor | None,
    scales: Callable[[], tuple[Tensor, Tensor]],
) -> Tensor:
    """``mean (net_pred - target)^2``; the target is ``x0``, ``eps``, ``alpha eps - sigma x0`` (v), ``eps - x0`` (flow).

    One pass, which makes the target inside and computes the gradient in ``net_pred``. ``scales()`` is called for v
    alone and gives ``alpha`` and ``sigma``.
    """
    if not isinstance(pred_type, str) or pred_type not in _NEEDED:
        raise UserError(f"pred_type must be one of {', '.join(_NEEDED)}; got {pred_type!r}")
    given = {"x0": x0, "eps": eps}
    for name in _NEEDED[pred_type]:
        if given[name] is None:
            raise UserError(f"{name} must be given for pred_type {pred_type!r}")
    targets = {name: given[name] for name in _NEEDED[pred_type]}
    refuse_gradients("this loss", **targets)
    pred, *tensors = together(net_pred=net_pred, **targets)
    numbers: dict[str, float | Tensor] = {"p": 1.0}
    if pred_type == "flow":
        numbers = {"p": -1.0, "s": 1.0}
    elif pred_type == "v":
        alpha, sigma = scales()
        numbers = {"p": -by_row("sigma(t)", sigma, pred), "s": by_row("alpha(t)", alpha, pred)}
    coef = coefficient_rows(pred, w=1 / size(pred), **numbers)
    # A target of one tensor stands for the noise too, whose coefficient is 0, so that no noise is drawn.
    return functional.matching_loss(out=pred, x=tensors[0], x_t=None, coef=coef, noise=tensors[-1])


def distillation_loss(
    names: tuple[str, str, str],
    gen: Tensor,
    teacher: Tensor,
    fake: Tensor,
    scale: Tensor | None = None,
    *,
    least: float = 0.0,
    drop_nan: bool = False,
) -> tuple[Tensor, Tensor]:
    """``0.5 mean g^2`` with the gradient ``g / N`` in ``gen`` alone, where ``N`` is the number of all elements.

    ``g = (fake - teacher) scale / (mean |gen - teacher| + least)``, with a mean and a scale for each sample. One pass
    takes that mean, another one computes ``g / N`` and the value. No pseudo target ``gen - g`` is made: it would be
    rounded to ``gen``'s digits, and the gradient is the small difference that such rounding hits.

    Args:
        names: the caller's names of the three tensors, for errors.
        gen, teacher, fake: generated samples and the two predictions of them, ``(R, ...)``.
        scale: one number or one for each sample, None for 1.
        drop_nan: whether NaN in ``g`` counts as 0.

    Returns:
        The loss, float32 (float64 for float64), differentiable in ``gen``; and ``g / N`` in ``gen``'s dtype.
    """
    x, f_teacher, f_fake = together(**dict(zip(names, (gen, teacher, fake), strict=True)))
    refuse_forward_mode("this loss", (gen,))
    with torch.no_grad():
        x, f_teacher, f_fake = x.detach(), f_teacher.detach(), f_fake.detach()
        coef = coefficient_rows(x, p=1.0)
        errors = ops.current(x.device).mean_abs_error(f_teacher, x, None, coef, None, None)
        weights = 1 / (errors + least)
        if scale is not None:
            weights = weights * by_row("additional_scale", scale, x)
        Coefficients(coef).w.copy_(weights / (2 * size(x)))
        # The teacher stands for the noise too, whose coefficient is 0: no noise is drawn.
        _, rows, grad = functional.matching_grads(out=f_fake, x=f_teacher, x_t=None, coef=coef, noise=f_teacher)
        # The pass weighs a sample's squares by half its weight / D, which gives the gradient; the value has its square.
        values = rows * weights
        if drop_nan:
            grad, values = grad.nan_to_num_(), values.nan_to_num()
        loss = values.mean()
        grad = grad.to(gen.dtype)
    if torch.is_grad_enabled() and gen.requires_grad:
        return _HandedOn.apply(gen, loss, grad), grad
    return loss, grad


class _HandedOn(torch.autograd.Function):
    """A loss whose gradient was computed beside it: backward scales that gradient by the incoming one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        if torch.compiler.is_compiling() or type(scale) is not Tensor:
            return (grad * scale).to(grad.dtype), None, None
        refuse_second_derivative(scale, "this loss")
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # A second backward will come for the same gradient, so this one must not scale it in place.
            grad = grad.clone()
        ops.current(grad.device).scale_grads_([grad], scale.contiguous())
        return grad, None, None
