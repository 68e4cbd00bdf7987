"""Endless shuffled batches of a data set whose position can be saved and restored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, to_float
from ..errors import UserError


class Batches:
    """Batches of ``n`` distinct training samples, float32 on ``device``; each pass is a fresh shuffle.

    A pass' last partial batch is left out. Raises :class:`UserError` when ``n`` exceeds the training set.
    """

    def __init__(self, dataset: Dataset, n: int, seed: int, device: torch.device) -> None:
        if n > len(dataset):
            raise UserError(f"batch {n} is larger than data set '{dataset.name}', which has {len(dataset)} samples")
        self._samples, self._n, self._device = dataset.train, n, device
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(dataset), generator=self._generator)
        self._position = 0

    def next(self) -> Tensor:
        """The next batch ``(n, ...)``."""
        if self._position + self._n > len(self._order):
            self._order = torch.randperm(len(self._order), generator=self._generator)
            self._position = 0
        rows = self._order[self._position : self._position + self._n]
        self._position += self._n
        return to_float(self._samples[rows]).to(self._device)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "order": self._order, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises when it belongs to a training set of another size."""
        if len(state["order"]) != len(self._order):
            before, now = len(state["order"]), len(self._order)
            raise UserError(f"the run was started on {before} training samples, the data set has {now} now")
        self._generator.set_state(state["generator"])
        self._order, self._position = state["order"], int(state["position"])
