"""Blocks of a network that keep only their inputs for the backward pass, and run again in it.

This saves memory at the price of one more forward pass. A network then holds the inputs of its blocks and, while the
gradients of one block are computed, that block's activations. The second run draws the same dropout masks as the first,
so the gradients are the same, and in eager mode equal to the bit. Source: Chen et al., Training Deep Nets with
Sublinear Memory Cost (1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError


class Repeatable(nn.Module):
    """A block that can run again in the backward pass: a subclass decorates its ``forward`` with :func:`once_more`."""

    recompute = False


def once_more(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates a :class:`Repeatable`'s ``forward``: it runs again in the backward pass if ``recompute`` is set."""

    @functools.wraps(forward)
    def run(self: Repeatable, *inputs: Any) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return forward(self, *inputs)

        def call(*again: Any) -> Tensor:
            return forward(self, *again)

        out: Tensor = checkpoint(call, *inputs, use_reentrant=False)
        return out

    return run


def repeated(net: nn.Module) -> list[Repeatable]:
    """The blocks of ``net`` that run again in the backward pass."""
    return [module for module in net.modules() if isinstance(module, Repeatable) and module.recompute]


def recompute(net: nn.Module, wanted: bool = True) -> None:
    """Have all blocks of ``net`` run again in its backward passes, or none. Copies made later take the setting over.

    The backend (:func:`realuid_fast.backend`) must be the same in both passes.

    Raises:
        UserError: the network has no block that can run again.
    """
    found = [module for module in net.modules() if isinstance(module, Repeatable)]
    if wanted and not found:
        raise UserError(
            f"run.checkpoint_activations is for the U-Nets of this package; {type(net).__name__} has no blocks to run "
            "again"
        )
    for block in found:
        block.recompute = wanted
