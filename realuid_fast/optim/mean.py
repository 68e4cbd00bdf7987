"""Gradients of several ranks and passes become their mean, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adam import FusedAdam
from .schedules import Optimiser

# Bytes of gradients in one message: so many that the message's time is set by bandwidth and not by latency.
PIECE = 2**25


def average(optimiser: Optimiser, ranks: int, parts: int = 1) -> None:
    """Let the optimiser step along the mean over ``ranks`` of gradients that were summed over ``parts`` passes."""
    if ranks > 1:
        mean = Mean(optimiser.adam, ranks, parts)
        optimiser.adam.reduce, optimiser.adam.settle = mean, mean.settle
    elif parts > 1:
        optimiser.adam.reduce = lambda gradients: torch._foreach_mul_(list(gradients), 1 / parts)


class Mean:
    """Averages an optimiser's gradients, summed over ``parts`` backward passes, over all ranks.

    The flat gradient is reduced in pieces of :data:`PIECE` bytes or more, from its end to its beginning. A piece is
    sent as soon as the last backward pass has made all of its gradients, while earlier layers are still to come. The
    pieces follow from the parameters' sizes alone and are sent in a fixed order, so every run on as many ranks adds in
    the same order. DDP does not promise that: it lays out its buckets again after its first backward pass, and once
    more when a run is resumed.

    :meth:`FusedAdam.step` calls the object. The call sends the pieces that were not sent yet, such as one with a
    parameter without a gradient, and waits for all of them.
    """

    def __init__(self, adam: FusedAdam, ranks: int, parts: int) -> None:
        self._params: list[nn.Parameter] = [p for group in adam.param_groups for p in group["params"]]
        self._flat = adam.flat_storage[0] if len(adam.flat_storage) == 1 else None
        self._factor, self._parts = 1 / (ranks * parts), parts
        self._pieces = pieces([p.numel() * p.element_size() for p in self._params], PIECE)
        self._sent, self._running = 0, list[tuple[Tensor, list[Tensor], Any]]()
        self._missing = self._all()
        for i, piece in enumerate(self._pieces):
            for p in self._params[piece]:
                p.register_post_accumulate_grad_hook(partial(self._arrived, i))

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        while self._sent < len(self._pieces):
            self._send()
        self.settle()
        self._sent, self._missing = 0, self._all()

    def settle(self) -> None:
        """Wait for the pieces that were sent; their gradients are means afterwards.

        On a GPU the stream waits and the host does not. With gloo the host waits.
        """
        for buffer, homes, work in self._running:
            work.wait()
            buffer.mul_(self._factor)
            if homes:
                torch._foreach_copy_(homes, torch._utils._unflatten_dense_tensors(buffer, homes))
        self._running.clear()

    def _all(self) -> list[int]:
        return [self._parts * len(self._params[piece]) for piece in self._pieces]

    def _arrived(self, i: int, _: Tensor) -> None:
        """A backward pass has added to the gradient of a parameter of piece ``i``."""
        self._missing[i] -= 1
        if self._missing[i] < 0:
            raise RuntimeError(f"a gradient was added to after it had gone to the other ranks: {self._parts} a step")
        while self._sent < len(self._pieces) and self._missing[self._sent] == 0:
            self._send()

    def _send(self) -> None:
        piece = self._pieces[self._sent]
        self._sent += 1
        homes = [p.grad for p in self._params[piece] if p.grad is not None]
        if self._flat is not None and self._flat.gather(piece):
            # Point the gradients at the flat buffer. Otherwise the step would copy this rank's own there once more.
            self._flat.attach(piece)
            buffer, homes = self._flat.gradients(piece), []
        elif homes:
            buffer = torch._utils._flatten_dense_tensors(homes)
        else:
            return
        self._running.append((buffer, homes, dist.all_reduce(buffer, async_op=True)))


def pieces(sizes: Sequence[int], least: int) -> list[slice]:
    """Runs of neighbours with at least ``least`` in sum, from the last to the first; the first may have less."""
    found, end, held = [], len(sizes), 0
    for first in reversed(range(len(sizes))):
        held += sizes[first]
        if held >= least or first == 0:
            found.append(slice(first, end))
            end, held = first, 0
    return found
