"""Parts that all operators' gradients share: refusals, the scaling by the incoming gradient, and the node of a loss.

The nodes here and in ``losses`` serve every kind of call. ``csrc/autograd`` has the same in C++ for plain calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UserError


def _traced(grad: Tensor) -> bool:
    """Whether the backward pass is traced or transformed: the tensor stands for others, and no kernel may write."""
    functorch = torch._C._functorch
    wrapped = functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad)
    return type(grad) is not Tensor or wrapped


def refuse_second_derivative(grad: Tensor, call: str) -> None:
    # A traced backward runs in grad mode too, so only plain tensors tell that create_graph was asked for.
    if torch.is_grad_enabled() and not _traced(grad):
        raise RuntimeError(f"{call} has no second derivative: call backward without create_graph=True")


def refuse_forward_mode(call: str, inputs: Sequence[Any]) -> None:
    """Refuse inputs with a forward-mode tangent: autograd would take a kernel's missing derivative for zero."""
    # Outside torch.func.jvp and forward_ad.dual_level no tensor has a tangent, so the check ends here.
    if forward_ad._current_level < 0:
        return
    for tensor in inputs:
        while isinstance(tensor, Tensor):
            # Nested transforms wrap a tensor once each, and any of the layers may carry the tangent.
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            batched = wrapped and torch._C._functorch.is_batchedtensor(tensor)
            if not batched and forward_ad.unpack_dual(tensor).tangent is not None:
                raise UserError(
                    f"{call} has no forward-mode derivative: take its gradient with backward or torch.autograd"
                )
            tensor = torch._C._functorch.get_unwrapped(tensor) if wrapped else None


def refuse_transforms(call: str) -> None:
    """Refuse to record a node inside a transform of torch.func: the gradients are saved in the forward pass."""
    if torch._C._are_functorch_transforms_active():
        raise UserError(
            f"{call} cannot be differentiated inside torch.func (grad, vjp, jacrev, vmap): take its gradient with "
            "backward or torch.autograd.grad"
        )


def _scaled(kernel: Any, grads: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """The kernel's gradients times the incoming gradient, in the kernel's own buffers. The host reads no value."""
    if _traced(scale):
        # Plain arithmetic, which a compiler can fuse with later operations.
        return [(grad * _per_row(scale, grad)).to(grad.dtype) for grad in grads]
    if torch._C._autograd._get_current_graph_task_keep_graph():
        # A second backward will come for the same gradients, so this one must not scale them in place.
        grads = [grad.clone() for grad in grads]
    getattr(torch.ops, kernel.namespace).scale_grads_(grads, scale.contiguous())
    return list(grads)


def _per_row(scale: Tensor, grad: Tensor) -> Tensor:
    return scale if scale.dim() == 0 else scale.view(-1, *[1] * (grad.dim() - 1))


class LossFunction(torch.autograd.Function):
    """Runs a loss kernel in the forward pass, keeps the gradients it computed, and hands them on in the backward pass.

    Only the tensors that want a gradient (``leaves``) are arguments that autograd sees. It spends time on every
    argument, in both directions, and a kernel has up to twenty.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Any, wants: list[bool], inputs: tuple[Any, ...], *leaves: Tensor) -> Tensor:
        mean, rows, *grads = kernel(*inputs, *wants)
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*itertools.compress(grads, wants))
        return mean if inputs[-1] else rows

    @staticmethod
    def backward(ctx: Any, scale: Tensor | None) -> tuple[Any, ...]:
        if scale is None:
            return None, None, None, *(None for _ in ctx.saved_tensors)
        refuse_second_derivative(scale, f"{ctx.kernel._opname}_loss")
        return None, None, None, *_scaled(ctx.kernel, ctx.saved_tensors, scale)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a batch of images or volumes is stored channels_last."""
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)
