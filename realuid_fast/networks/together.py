"""Small work of a whole U-Net done at once, where each launch takes a GPU longer to start than to run.

:func:`shifts` are the residual blocks' linear layers on the embedding. :func:`with_casts` casts the parameters under
autocast, which by itself casts some 150 of a U-Net one by one in each forward pass, and their gradients backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..optim import is_sharded
from .layers import Conv3x3
from .recompute import repeated

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)


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


def _copied(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


def casts(net: nn.Module, like: Tensor, last: nn.Module) -> bool:
    """Whether a call of ``net`` should run with the parameters of :func:`with_casts`.

    Autocast must be on, the parameters float32 and whole. With several ranks gradients are to come one after another,
    because they are sent while others are computed; blocks that run again must find the parameters once more.
    """
    if not (torch.is_autocast_enabled(like.device.type) and backends.compiled(like.device, "casts")):
        return False
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    hooked = net._forward_hooks or net._forward_pre_hooks or net._backward_hooks or net._backward_pre_hooks
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if transformed or hooked or several or repeated(net):
        return False
    return all(p.dtype == torch.float32 and not is_sharded(p) for p in _named(net, last).values())


def with_casts(net: nn.Module, last: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """``net(*arguments)`` with the parameters of its products in autocast's type, but for those of the ``last`` layer.

    The module holds the cast tensors while the call lasts.
    """
    named = _named(net, last)
    dtype = torch.get_autocast_dtype(next(iter(named.values())).device.type)
    apply = cast(Callable[..., tuple[Tensor, ...]], _Cast.apply)
    return torch.func.functional_call(net, dict(zip(named, apply(dtype, *named.values()), strict=True)), arguments)


def _named(net: nn.Module, last: nn.Module) -> dict[str, Tensor]:
    """The parameters of linear layers and convolutions outside ``last``, by their names in ``net``."""
    outside = set(last.modules())
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in net.named_modules()
        if isinstance(module, _PRODUCTS) and module not in outside
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


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
