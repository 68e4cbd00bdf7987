"""Small work of a whole U-Net done at once, where each launch takes a GPU longer to start than to run.

:func:`shifts` are the residual blocks' linear layers on the embedding. :func:`with_casts` casts the parameters under
autocast, which by itself casts some 150 of a U-Net one by one in each forward pass, and their gradients backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..optim import is_sharded
from .layers import Conv3x3

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# A parameter, after the dictionary of its module that holds it and its name there.
Held = tuple[dict[str, Any], str, Tensor]


class _Cast(torch.autograd.Function):
    """Casts tensors to another type. Their gradients come back in the type that the tensors had."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return _copied(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(_copied([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(given) for grad in grads)


def cast_at_once(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` as ``dtype``. torch.compile need not look inside, where it compares every tensor with every other."""
    return cast(tuple[Tensor, ...], cast(Any, _Cast.apply)(dtype, *tensors))


def _copied(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


def products(net: nn.Module, last: nn.Module) -> tuple[nn.Module, ...]:
    """The linear layers and convolutions of ``net`` outside its ``last`` layers, which :func:`with_casts` is for.

    A network looks for them once, when it is made: torch.compile takes seconds to follow the search.
    """
    outside = set(last.modules())
    return tuple(module for module in net.modules() if isinstance(module, _PRODUCTS) and module not in outside)


def casts(net: Any, like: Tensor) -> list[Held]:
    """The parameters that a call of ``net`` should run with as :func:`with_casts` casts them, or none.

    Autocast must be on, the parameters float32 and whole. With several ranks gradients are to come one after another,
    because they are sent while others are computed; blocks that run again must find the parameters once more.
    """
    if not (torch.is_autocast_enabled(like.device.type) and backends.compiled(like.device, "casts")):
        return []
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    hooked = net._forward_hooks or net._forward_pre_hooks or net._backward_hooks or net._backward_pre_hooks
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if transformed or hooked or several or any(block.recompute for block in net._blocks):
        return []
    found = []
    for module in net._products:
        for name, p in module._parameters.items():
            if p is not None:
                if p.dtype != torch.float32 or is_sharded(p):
                    return []
                found.append((module._parameters, name, p))
    return found


def with_casts(net: nn.Module, held: Sequence[Held], arguments: tuple[Any, ...]) -> Any:
    """``net(*arguments)`` with parameters in autocast's type, which their modules hold while the call lasts."""
    tensors = [p for _, _, p in held]
    # A graph with the function of autograd in it is not kept on disk by torch.compile.
    differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    try:
        made = cast_at_once(dtype, *tensors) if differentiable else _copied(tensors, dtype)
        for (holder, name, _), short in zip(held, made, strict=True):
            holder[name] = short
        return net(*arguments)
    finally:
        for holder, name, p in held:
            holder[name] = p


def joins(block: Any) -> bool:
    """Whether :func:`shifts` may use a block's parameters for it: none is sharded, and no layer replaced or hooked."""
    linear, conv = cast(nn.Linear, block.emb_layers[1]), block.in_layers[2]
    plain = type(linear) is nn.Linear and type(conv) is Conv3x3
    return plain and not (linear._forward_hooks or linear._forward_pre_hooks or is_sharded(linear.weight))


def shifts(blocks: Sequence[Any], embedding: Tensor) -> tuple[Tensor, ...]:
    """The linear layers of all ``blocks`` on the embedding, as one product; without ``scale_shift`` a block's result
    has its first convolution's bias in it, so that the convolution itself can leave it out.
    """
    layers = [cast(nn.Linear, block.emb_layers[1]) for block in blocks]
    bias = torch.cat([layer.bias for layer in layers])
    if not blocks[0].scale_shift:
        bias = bias + torch.cat([cast(Tensor, cast(Conv3x3, block.in_layers[2]).bias) for block in blocks])
    rows = F.linear(F.silu(embedding), torch.cat([layer.weight for layer in layers]), bias)
    return rows.split([layer.out_features for layer in layers], dim=1)
