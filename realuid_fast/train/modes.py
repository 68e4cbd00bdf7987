"""How a turn runs: with networks as written or compiled, and either call by call or as one CUDA graph.

A turn is a function without arguments over tensors at fixed addresses. It reads nothing on the host. It draws its noise
from a key stream whose state is on the device, and its times and labels from generators that a graph advances. So a
replay continues the very sequence that the plain function would have drawn.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..choices import MODES as MODES
from ..networks.compiling import compiled as compiled

# Plain calls before a capture: they compile kernels, choose algorithms and settle the optimiser's state.
WARM_UP = 3

# From torch 2.14 on a graph finds by itself the generators that it draws from, and warns when they are registered.
_REGISTERS = torch.torch_version.TorchVersion(torch.__version__) < "2.14"

Turn = Callable[[], dict[str, Tensor]]


def compiles(mode: str) -> bool:
    """Whether a mode's networks go through torch.compile."""
    return mode in ("compiled", "graphs")


def captures(mode: str) -> bool:
    """Whether a mode captures each turn as a CUDA graph."""
    return mode in ("graphs", "graphs-eager")


def why_not(mode: str, device: torch.device | str) -> str | None:
    """A clause that says why a mode does not run on ``device``; None if it does."""
    device = torch.device(device)
    if mode == "eager":
        return None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if compiles(mode) and importlib.util.find_spec("triton") is None:
            return "torch.compile needs the triton package there"
        return None
    if captures(mode):
        return "it needs a CUDA device"
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if not any(map(shutil.which, (compiler.split()[0], "g++", "clang++"))):
        return "torch.compile needs a C++ compiler"
    return None


class Recorder(Protocol):
    """The two operations that :class:`Captured` needs from a device."""

    def run(self, turn: Turn) -> dict[str, Tensor]: ...

    def capture(self, turn: Turn) -> tuple[Callable[[], Any], dict[str, Tensor]]: ...


class CudaRecorder:
    """Captures turns as CUDA graphs on one stream; graphs that live at the same time share one memory pool.

    In a shared pool a turn can use memory that another has freed. This puts three conditions on captured turns: they
    never run at the same time, they are replayed in the order in which they were captured, and a result that a later
    turn reads stays referenced (:class:`Captured` keeps its results). When all graphs of a pool are gone, the next
    capture takes a new pool: torch refuses to capture into a pool without graphs while a tensor in it is alive, and a
    caller may have kept a result.

    Args:
        device: a CUDA device.
        generators: the torch generators that the turns draw from, beside the device's default one.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._device, self._generators = device, tuple(generators)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def run(self, turn: Turn) -> dict[str, Tensor]:
        """Call ``turn`` as it is, on the stream that captures it later, in order with the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = turn()
        current.wait_stream(self._stream)
        return results

    def capture(self, turn: Turn) -> tuple[Callable[[], Any], dict[str, Tensor]]:
        """Record ``turn`` without running it; a function that replays it, and the tensors that every replay writes."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._graphs.add(graph)
        if _REGISTERS:
            for generator in self._generators:
                graph.register_generator_state(generator)
        # "thread_local": threads that read batches or write checkpoints may use the device during the capture.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = turn()
        return graph.replay, results


class Captured:
    """A turn that is called as written for its first ``warm_up`` calls, then captured, and replayed from then on.

    The warm-up calls are steps of the training like all others, so capturing changes no number.
    """

    def __init__(self, turn: Turn, recorder: Recorder, warm_up: int = WARM_UP) -> None:
        self._turn, self._recorder, self._warm_up = turn, recorder, warm_up
        self.reset()

    def reset(self) -> None:
        """Forget the graph, for instance after state was loaded: the next calls warm up and capture again."""
        self._calls = 0
        self._replay: Callable[[], Any] | None = None
        self._results: dict[str, Tensor] = {}

    @property
    def captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._replay is not None

    def __call__(self) -> dict[str, Tensor]:
        """The turn's results. The next replay overwrites those of this one."""
        if self._calls < self._warm_up:
            self._calls += 1
            return self._recorder.run(self._turn)
        if self._replay is None:
            self._replay, self._results = self._recorder.capture(self._turn)
        self._replay()
        return self._results
