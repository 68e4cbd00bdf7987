"""The losses' operators: interpolant, losses and gradients, each in one pass over its tensors.

A kernel operator (``generator``) returns loss, rows' losses and gradients, and has no autograd itself. Its loss
operator (``generator_loss``) is the differentiable face: backward hands those gradients on, scaled by the incoming one.
The switches ``want_...`` say which gradients are wanted; others come back empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autograd import is_channels_last, refuse_second_derivative
from .operator import Loss, Operator, like_if


def _losses_like(x: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    return coef.new_empty(()), coef.new_empty(x.shape[0])


def _shapes_normal_like(key: Tensor, like: Tensor, noise_rows: int) -> Tensor:
    return torch.empty_like(like)


def _shapes_interpolate(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _shapes_interpolate_grads(grad: Tensor, coef: Tensor, want_x: bool, want_endpoint: bool) -> tuple[Tensor, ...]:
    return like_if(want_x, grad), like_if(want_endpoint, grad)


def _shapes_mean_abs_error(teacher_out: Tensor, x: Tensor, x_t: Tensor | None, coef: Tensor, *_: Any) -> Tensor:
    return coef.new_empty(x.shape[0])


def _shapes_matching(out: Tensor, x: Tensor, x_t: Tensor | None, coef: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *_losses_like(x, coef), like_if(rest[-1], out)


def _shapes_generator(*inputs: Any) -> tuple[Tensor, ...]:
    x, coef, uncond, wants = inputs[2], inputs[4], inputs[7], inputs[-5:]
    grads = (like_if(want, x) for want in (*wants[:-1], wants[-1] and uncond is not None))
    return *_losses_like(x, coef), *grads


def _shapes_scale_grads_(grads: Sequence[Tensor], scale: Tensor) -> None:
    return None


class _InterpolateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, x: Tensor, coef: Tensor, *rest: Any) -> Tensor:
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coef)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(x, coef, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        refuse_second_derivative(grad, "interpolate")
        _, want_x, _, _, want_endpoint, _ = ctx.needs_input_grad
        (coef,) = ctx.saved_tensors
        # The gradient of x_t may come back in another layout, and the operator takes dense rows.
        library = getattr(torch.ops, ctx.kernel.namespace)
        g_x, g_y = library.interpolate_grads(_dense(grad), coef, want_x, want_endpoint)
        return None, g_x if want_x else None, None, None, g_y if want_endpoint else None, None


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.is_contiguous() or is_channels_last(grad) else grad.contiguous()


OPERATORS = (
    Operator(
        "normal_like(Tensor key, Tensor like, SymInt noise_rows) -> Tensor",
        reference.normal_like,
        _shapes_normal_like,
    ),
    Operator(
        "interpolate(Tensor x, Tensor coef, Tensor noise, Tensor? endpoint, SymInt noise_rows) -> Tensor",
        reference.interpolate,
        _shapes_interpolate,
        _InterpolateFunction,
    ),
    Operator(
        "interpolate_grads(Tensor grad, Tensor coef, bool want_x, bool want_endpoint) -> (Tensor, Tensor)",
        reference.interpolate_grads,
        _shapes_interpolate_grads,
    ),
    Operator(
        "mean_abs_error(Tensor teacher_out, Tensor x, Tensor? x_t, Tensor coef, Tensor? teacher_uncond, Tensor? "
        "guidance) -> Tensor",
        reference.mean_abs_error,
        _shapes_mean_abs_error,
    ),
    Operator(
        "matching(Tensor out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, Tensor? endpoint, SymInt noise_rows, "
        "bool mean, bool want_out) -> (Tensor loss, Tensor rows, Tensor g_out)",
        reference.matching,
        _shapes_matching,
    ),
    # A guided teacher is teacher_uncond + guidance (teacher_out - teacher_uncond); q_rows (R,) takes the place of q.
    Operator(
        "fake(Tensor fake_out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, Tensor? teacher_out, Tensor? "
        "endpoint, Tensor? teacher_uncond, Tensor? guidance, SymInt noise_rows, SymInt n_real, float a_gen, float "
        "b_gen, float d_gen, float c_gen, float a_real, float b_real, float d_real, float c_real, bool mean, bool "
        "want_fake) -> (Tensor loss, Tensor rows, Tensor g_fake)",
        reference.fake,
        _shapes_matching,
    ),
    Operator(
        "generator(Tensor teacher_out, Tensor fake_out, Tensor x, Tensor? x_t, Tensor coef, Tensor noise, "
        "Tensor? endpoint, Tensor? teacher_uncond, Tensor? guidance, Tensor? q_rows, float alpha, float beta, float "
        "q, float kappa, bool mean, bool want_teacher, bool want_fake, bool want_x, bool want_x_t, bool want_uncond) "
        "-> (Tensor loss, Tensor rows, Tensor g_teacher, Tensor g_fake, Tensor g_x, Tensor g_x_t, Tensor g_uncond)",
        reference.generator,
        _shapes_generator,
    ),
    Operator(
        "scale_grads_(Tensor(a!)[] grads, Tensor scale) -> ()",
        reference.scale_grads_,
        _shapes_scale_grads_,
    ),
)

LOSSES = (
    Loss("matching", (0,)),
    Loss("fake", (0,)),
    Loss("generator", (0, 1, 2, 3, 7)),
)
