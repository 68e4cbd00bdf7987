"""Names the phases of an update: NVTX ranges always, wall-clock times on request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

try:
    import nvtx
except ImportError:  # ranges are for a profiler: without the package there are none
    nvtx = None


class Phases:
    """``with phases("fake forward"):`` marks an NVTX range; with ``timings`` it also adds up the seconds it takes.

    Timing waits for the device at both ends of a phase, so it changes what it measures on a GPU: it is off by default.
    A phase inside a turn is marked and timed until the turn is captured as a CUDA graph. From then on the whole turn is
    one phase.
    """

    def __init__(self, timings: bool = False, device: torch.device | str = "cpu") -> None:
        self.timings = timings
        self._device = torch.device(device)
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with _range(name):
            if not self.timings or self._capturing():
                yield
                return
            start = self._now()
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _capturing(self) -> bool:
        # Waiting for the device would end a capture.
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _range(name: str) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if nvtx is None else nvtx.annotate(name, domain="realuid_fast")
