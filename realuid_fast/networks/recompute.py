"""Parts of a network that keep no more than their inputs for the backward pass, and run again in it.

Memory for one more forward pass: of a network's activations there are then the inputs of its parts and, while a part's
gradients are computed, that part's own. The second run draws the masks of dropout that the first one drew, so that
gradients are the same, eagerly to the bit. Source: Chen et al., Training Deep Nets with Sublinear Memory Cost
(1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError


class Part(nn.Module):
    """What can be run again: a subclass puts :func:`once_more` on its forward."""

    recompute = False


def once_more(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A :class:`Part`'s ``forward``, run again in the backward pass where ``recompute`` is set."""

    @functools.wraps(forward)
    def run(self: Part, *inputs: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return forward(self, *inputs)

        def call(*again: Tensor) -> Tensor:
            return forward(self, *again)

        out: Tensor = checkpoint(call, *inputs, use_reentrant=False)
        return out

    return run


def parts(net: nn.Module) -> list[Part]:
    """The parts of ``net`` that are to be run again."""
    return [module for module in net.modules() if isinstance(module, Part) and module.recompute]


def recompute(net: nn.Module, wanted: bool = True) -> None:
    """Have all parts of ``net`` run again in its backward passes, or none; copies made later do as it does.

    The backend (:func:`realuid_fast.backend`) must be the same in both passes.

    Raises:
        UserError: a network without such parts.
    """
    found = [module for module in net.modules() if isinstance(module, Part)]
    if wanted and not found:
        raise UserError(
            f"run.checkpoint_activations is for the U-Nets of this package; {type(net).__name__} has no parts to run "
            "again"
        )
    for part in found:
        part.recompute = wanted
