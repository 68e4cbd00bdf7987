"""Running means of a step's numbers, kept on the device and read once per log interval."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Meters:
    """Sums and counts by name. Adding launches one small operation; only :meth:`read` waits for the device."""

    def __init__(self, names: Iterable[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self._sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._counts = dict.fromkeys(self.names, 0)

    def add(self, name: str, value: Tensor) -> None:
        """Add one value ``()`` to the mean called ``name``."""
        self._sums[self.names.index(name)] += value.detach()
        self._counts[name] += 1

    def read(self) -> dict[str, float]:
        """The means since the last reading, NaN where nothing was added; starts afresh."""
        sums = self._sums.tolist()
        means = {
            name: total / count if (count := self._counts[name]) else float("nan")
            for name, total in zip(self.names, sums, strict=True)
        }
        self._sums.zero_()
        self._counts = dict.fromkeys(self.names, 0)
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.clone(), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self._counts = dict(state["counts"])
