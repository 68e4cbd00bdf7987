"""Endless shuffled batches of a data set whose position can be saved and restored, and the labels that go with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset, to_float
from ..errors import UserError
from ..paths import Path
from ..sampling import needs_endpoint, takes_endpoint
from . import distributed


class Batches:
    """Batches of ``n`` distinct training samples, float32 on ``device``; each pass is a fresh shuffle.

    Every rank shuffles alike and takes its own ``n`` of the rows of all, so that no two read the same. A pass' last
    partial batch is left out. Raises :class:`UserError` when all ranks' batch exceeds the training set.
    """

    def __init__(self, dataset: Dataset, n: int, seed: int, device: torch.device) -> None:
        if (whole := n * distributed.size()) > len(dataset):
            raise UserError(f"batch {whole} is larger than data set '{dataset.name}', which has {len(dataset)} samples")
        self._samples, self._labels, self._n, self._device = dataset.train, dataset.train_labels, n, device
        self._endpoints = dataset.train_endpoints
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(dataset), generator=self._generator)
        self._position = 0
        self._rows = self._order[:0]

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch ``(n, ...)`` and its labels ``(n,)``, None where the data set has none."""
        everyones = self._n * distributed.size()
        if self._position + everyones > len(self._order):
            self._order = torch.randperm(len(self._order), generator=self._generator)
            self._position = 0
        first = self._position + distributed.rank() * self._n
        rows = self._rows = self._order[first : first + self._n]
        self._position += everyones
        labels = None if self._labels is None else self._to_device(self._labels[rows])
        return to_float(self._to_device(self._samples[rows])), labels

    def endpoints(self) -> Tensor | None:
        """The endpoints ``(n, ...)`` of the batch that :meth:`next` returned last, None where there are none."""
        return None if self._endpoints is None else to_float(self._to_device(self._endpoints[self._rows]))

    def _to_device(self, tensor: Tensor) -> Tensor:
        """A copy that the host does not wait for; bytes travel as bytes."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "order": self._order, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises when it belongs to a training set of another size."""
        if len(state["order"]) != len(self._order):
            before, now = len(state["order"]), len(self._order)
            raise UserError(f"the run was started on {before} training samples, the data set has {now} now")
        self._generator.set_state(state["generator"])
        self._order, self._position = state["order"], int(state["position"])


def endpoints_to_draw(net: nn.Module, path: Path, dataset: Dataset, device: torch.device) -> Tensor | None:
    """The training endpoints ``(N, ...)`` that ``path`` or ``net`` need; None where neither does.

    Raises:
        UserError: a data set without endpoints, where they are needed.
    """
    if not needs_endpoint(net, path):
        return None
    if dataset.train_endpoints is None:
        who = "network" if takes_endpoint(net) else f"path {type(path).__name__}"
        raise UserError(f"the {who} has a second endpoint, data set '{dataset.name}' has none")
    return dataset.train_endpoints.to(device)


def picked(
    labels: Tensor | None,
    endpoints: Tensor | None,
    count: int,
    draws: torch.Generator,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor | None, Tensor | None]:
    """Labels ``(count,)`` and endpoints ``(count, ...)`` of random training samples, in the data's proportions.

    ``labels`` and ``endpoints`` are what :func:`labels_to_draw` and :func:`endpoints_to_draw` gave.
    """
    conditions = [rows for rows in (labels, endpoints) if rows is not None]
    if not conditions:
        return None, None
    rows = torch.randint(len(conditions[0]), (count,), generator=draws, device=conditions[0].device)
    ends = None if endpoints is None else to_float(endpoints[rows]).contiguous(memory_format=layout)
    return None if labels is None else labels[rows], ends


def labels_to_draw(net: nn.Module, dataset: Dataset, device: torch.device) -> Tensor | None:
    """The training labels ``(N,)`` that a class-conditional network is called with; None for an unconditional one.

    Raises:
        UserError: a conditional network where the data set has no labels, or more classes than the network knows.
    """
    known = int(getattr(net, "num_classes", 0) or 0)
    if not known:
        return None
    if dataset.train_labels is None:
        raise UserError(f"the network is class-conditional, data set '{dataset.name}' has no labels")
    if dataset.classes > known:
        raise UserError(f"the network knows {known} classes, data set '{dataset.name}' has {dataset.classes}")
    return dataset.train_labels.to(device)
