"""Running means of a step's numbers, kept on the device and fetched once per log interval without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Meters:
    """Quotients of sums by name: means of values, or of one sum by another. Adding launches one or two operations."""

    def __init__(self, names: Iterable[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self._counts = dict.fromkeys(self.names, 0)

    def add(self, name: str, value: Tensor) -> None:
        """Add to what is called ``name``: a value ``()`` of a mean, or ``(2, n)``, what to add above and below the line
        of ``n`` quotients from ``name`` on.
        """
        first = self.names.index(name)
        if value.dim():
            self._sums[:, first : first + value.shape[1]] += value.detach()
        else:
            self._sums[0, first] += value.detach()
            self._counts[name] += 1

    def drain(self) -> tuple[Tensor, Callable[[Sequence[float]], dict[str, float]]]:
        """What was added since the last time, float64 ``(2 n,)`` on the device, and what makes quotients of its values.

        They are NaN where nothing was added. Starts afresh; waits for nothing.
        """
        sums, counts = self._sums.flatten().clone(), list(self._counts.values())
        self._sums.zero_()
        self._counts = dict.fromkeys(self.names, 0)

        def quotients(values: Sequence[float]) -> dict[str, float]:
            above, below = values[: len(counts)], values[len(counts) :]
            return {
                name: a / total if (total := b + count) else float("nan")
                for name, a, b, count in zip(self.names, above, below, counts, strict=True)
            }

        return sums, quotients

    def read(self) -> dict[str, float]:
        """The quotients since the last time; waits for the device."""
        sums, quotients = self.drain()
        return quotients(sums.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.clone(), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self._counts = dict(state["counts"])


class Fetched:
    """A tensor on its way from the device to the host, behind what is in the stream; the host goes on meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.cpu()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    @property
    def ready(self) -> bool:
        """Whether :meth:`values` would not wait."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """The values, when they have come."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
