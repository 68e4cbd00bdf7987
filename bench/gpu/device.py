"""Clock, profile and memory of the device that is measured, and the same without figures for a dry run on CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType

from realuid_fast.train.modes import CudaRecorder, Recorder, Turn

Function = Callable[[], Any]
LAUNCHES = ("LaunchKernel", "GraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call, None in a dry run.

    ``device_ms``: the median of replays of the call captured as a CUDA graph, each with a cold L2 cache: what the GPU
    needs. ``min_ms`` is the fastest of them. ``call_ms``: a call among many in a row without waiting, launches and
    Python included.
    """

    device_ms: float | None
    min_ms: float | None
    call_ms: float | None


class Cuda:
    """A CUDA device by its own clock."""

    dry = False

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(self.device)
        # Read between calls to empty the L2 cache: it is four times as large, and reading leaves no dirty lines.
        self._flush = torch.zeros(4 * properties.L2_cache_size // 4 + 1, device=self.device)

    def recorder(self) -> Recorder:
        return CudaRecorder(self.device)

    def time(self, function: Function, seconds: float = 0.3, most: int = 200) -> Times:
        """Time ``function``, which is called and captured a few times first."""
        recorder = CudaRecorder(self.device)

        def turn() -> dict[str, torch.Tensor]:
            function()
            return {}

        for _ in range(3):
            recorder.run(turn)
        call_ms = self.spans(function, calls=10, rounds=5)
        replay, _ = recorder.capture(turn)
        replay()
        taken = self._events(replay, rounds=5)
        rounds = max(5, min(most, int(1e3 * seconds / max(median(taken), 1e-3))))
        taken = self._events(replay, rounds)
        return Times(median(taken), min(taken), call_ms)

    def _events(self, function: Function, rounds: int) -> list[float]:
        pairs = []
        for _ in range(rounds):
            torch.sum(self._flush)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def spans(self, function: Function, calls: int, rounds: int) -> float:
        """Milliseconds of one of ``calls`` calls in a row, the median of ``rounds`` such spans."""
        taken = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / calls)
        return median(taken)

    def profile(self, function: Function, calls: int = 1) -> dict[str, float | None]:
        """Counts for one call: launches from the host, kernels and copies on the device, and ms that any was running.

        A captured turn is one launch of many kernels.
        """
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(calls):
                function()
            torch.cuda.synchronize()
        events = profiler.events()
        host = [event.name for event in events if event.device_type != DeviceType.CUDA]
        launches = sum(any(word in name for word in LAUNCHES) for name in host)
        # Ranges that the host names are shown on the device too, from their first kernel to their last.
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        busy, reached = 0.0, float("-inf")
        for start, end in sorted(spans):
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return {"launches": launches / calls, "kernels": len(spans) / calls, "busy_ms": busy / calls / 1e3}

    def forget_memory(self) -> None:
        """Start a new peak."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_MB(self) -> float | None:
        """The most memory that was reserved since :meth:`forget_memory`, in 10^6 bytes."""
        return torch.cuda.max_memory_reserved() / 1e6


class Dry:
    """Runs everything once on the CPU and has no figures."""

    dry = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def recorder(self) -> Recorder:
        return _DryRecorder()

    def time(self, function: Function, seconds: float = 0.0, most: int = 0) -> Times:
        function()
        return Times(None, None, None)

    def spans(self, function: Function, calls: int, rounds: int) -> float | None:
        function()
        return None

    def profile(self, function: Function, calls: int = 1) -> dict[str, float | None]:
        function()
        return {"launches": None, "kernels": None, "busy_ms": None}

    def forget_memory(self) -> None:
        return None

    def peak_MB(self) -> float | None:
        return None


class _DryRecorder:
    def run(self, turn: Turn) -> dict[str, torch.Tensor]:
        return turn()

    def capture(self, turn: Turn) -> tuple[Function, dict[str, torch.Tensor]]:
        results = turn()
        return lambda: None, results


Device = Cuda | Dry


def reason(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


class Deadline:
    """The time limit of a section."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
