"""Running means of a step's numbers, kept on the device and fetched once per log interval without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Meters:
    """Means of values, and quotients of two sums, by name. Adding a value launches one or two operations."""

    def __init__(self, names: Iterable[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self._counts = dict.fromkeys(self.names, 0)

    def add(self, name: str, value: Tensor) -> None:
        """Add to the meter ``name``: a value ``()`` to a mean, or ``(2, n)`` to the numerators (row 0) and denominators
        (row 1) of ``n`` quotients, of which ``name`` is the first.
        """
        first = self.names.index(name)
        if value.dim():
            self._sums[:, first : first + value.shape[1]] += value.detach()
        else:
            self._sums[0, first] += value.detach()
            self._counts[name] += 1

    def drain(self) -> tuple[Tensor, Callable[[Sequence[float]], dict[str, float]]]:
        """The sums since the last call, float64 ``(2 n,)`` on the device, and a function that divides their values.

        A quotient is NaN if nothing was added to it. All sums start again from zero. The host waits for nothing.
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
        """The quotients since the last call; waits for the device."""
        sums, quotients = self.drain()
        return quotients(sums.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.clone(), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self._counts = dict(state["counts"])


class Fetched:
    """A copy of a tensor from the device to the host, queued in the stream. The host goes on meanwhile."""

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
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
