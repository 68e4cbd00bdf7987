"""Names the phases of an update: NVTX ranges always, wall-clock times on request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import nvtx
import torch


class Phases:
    """``with phases("fake forward"):`` marks an NVTX range; with ``timings`` it also adds up the seconds it takes.

    Timing waits for the device at both ends of a phase, so it changes what it measures on a GPU: it is off by default.
    """

    def __init__(self, timings: bool = False, device: torch.device | str = "cpu") -> None:
        self.timings = timings
        self._device = torch.device(device)
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with nvtx.annotate(name, domain="realuid_fast"):
            if not self.timings:
                yield
                return
            start = self._now()
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
