"""The regression on stored pairs beside another objective: its batches, and its backward pass in a generator's turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.pairs import Pairs
from .batches import Batches


class PairTerm:
    """``weight D mean d(G(z), x(z))`` on a batch like ``like`` of ``pairs``, for the network ``net``.

    Raises:
        UserError: pairs of another shape, or without the labels that the network takes.
    """

    def __init__(self, pairs: Pairs, like: Tensor, net: nn.Module, seed: int) -> None:
        dataset, classes = pairs.dataset, int(getattr(net, "num_classes", 0) or 0)
        if dataset.shape != tuple(like.shape[1:]):
            raise UserError(f"regression.pairs are samples of {dataset.shape}, the student's {tuple(like.shape[1:])}")
        if classes and not 0 < dataset.classes <= classes:
            raise UserError(f"regression.pairs have {dataset.classes} classes, the network has {classes}")
        self._pairs, self._factor = pairs, pairs.weight * like[0].numel()
        self.batches = Batches(dataset, len(like), seed, like.device)
        self._noise, self._target = torch.empty_like(like), torch.empty_like(like)
        self._labels = torch.zeros(len(like), dtype=torch.int64, device=like.device) if classes else None

    def read(self) -> None:
        """Copy the next batch to the addresses that :meth:`backward` reads."""
        samples, labels = self.batches.next()
        for place, values in ((self._target, samples), (self._noise, self.batches.endpoints()), (self._labels, labels)):
            if place is not None and values is not None:
                place.copy_(values)

    def grads(
        self, generate: Callable[..., Any], networks: Callable[[], Any], scale: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss ``()``, the samples with the generator's graph, and ``scale`` times the gradient in them.

        The caller goes backward from all of a turn's samples at once: ranks average a parameter's gradient when one
        backward pass has made it.
        """
        with networks():
            made = generate(self._noise, self._labels).to(self._target.dtype)
        x = made.detach().requires_grad_()
        loss = self._factor * self._pairs.distance(x, self._target).mean()
        return loss.detach(), made, scale * torch.autograd.grad(loss, x)[0]
