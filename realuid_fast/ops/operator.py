"""The parts of an operator's definition; losses, adam and layers list their operators, the registry defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operator(NamedTuple):
    """An operator that backends implement: its schema, and the functions that hold for every backend."""

    schema: str
    reference: Callable[..., Any]
    """The formula in plain torch, which runs where no backend has implemented the operator."""
    shapes: Callable[..., Any]
    """The outputs' shapes, dtypes and layouts without their values, for tracing and meta tensors."""
    function: Any = None
    """The ``torch.autograd.Function`` of an operator that is differentiable itself."""

    @property
    def name(self) -> str:
        """The operator's name in the schema."""
        return self.schema[: self.schema.index("(")]


class Loss(NamedTuple):
    """A loss operator ``<kernel>_loss``: the kernel's arguments up to ``mean``, differentiable in some of them."""

    kernel: str
    differentiable: tuple[int, ...]
    """Positions of the inputs that the kernel's gradients belong to."""


def like_if(wanted: bool, like: Tensor) -> Tensor:
    """A tensor like ``like`` for a gradient that is wanted, an empty one for a gradient that is not."""
    return torch.empty_like(like) if wanted else like.new_empty(0)
