"""The labels and endpoints that a network is called with, drawn from a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..data import Dataset, to_float
from ..errors import UserError
from ..networks.calling import takes_endpoint
from ..paths import Path
from .calls import needs_endpoint


def endpoints_to_draw(net: nn.Module, path: Path, dataset: Dataset, device: torch.device) -> Tensor | None:
    """The training endpoints ``(N, ...)`` that ``path`` or ``net`` need; None if neither needs any.

    Raises:
        UserError: endpoints are needed and the data set has none.
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

    ``labels`` and ``endpoints`` come from :func:`labels_to_draw` and :func:`endpoints_to_draw`.
    """
    conditions = [rows for rows in (labels, endpoints) if rows is not None]
    if not conditions:
        return None, None
    rows = torch.randint(len(conditions[0]), (count,), generator=draws, device=conditions[0].device)
    ends = None if endpoints is None else to_float(endpoints[rows]).contiguous(memory_format=layout)
    return None if labels is None else labels[rows], ends


def give(batches: Iterable[Sequence[Tensor | None]], *buffers: Tensor | None) -> None:
    """Copy the columns of ``batches``, one after the other, into as many buffers as are there and as they have rows."""
    for column, buffer in zip(zip(*batches, strict=True), buffers, strict=False):
        rows = [values for values in column if values is not None]
        if buffer is not None and rows:
            buffer.copy_(torch.cat(rows)[: len(buffer)])


def labels_to_draw(net: nn.Module, dataset: Dataset, device: torch.device) -> Tensor | None:
    """The training labels ``(N,)`` that a class-conditional network is called with; None for an unconditional one.

    For a data set to ``balance`` the result holds each class once, so that all classes are drawn equally often.

    Raises:
        UserError: the network is conditional and the data set has no labels, or more classes than the network knows.
    """
    known = int(getattr(net, "num_classes", 0) or 0)
    if not known:
        return None
    if dataset.train_labels is None:
        raise UserError(f"the network is class-conditional, data set '{dataset.name}' has no labels")
    if dataset.classes > known:
        raise UserError(f"the network knows {known} classes, data set '{dataset.name}' has {dataset.classes}")
    labels = dataset.train_labels.unique() if dataset.balance else dataset.train_labels
    return labels.to(device)
