"""Programs that do in a capture what CUDA refuses, or what a replay would not repeat: each is reported."""

import threading

import pytest
import torch

import realuid_fast as rf
from realuid_fast.train import modes

from . import device, turns
from .alone import alone

CUDA = torch.device("cuda")
# Made in the child process, where the device is.
OUTSIDE = {}


def reads_a_value(x):
    return x.sum().item()


def waits_for_the_device(x):
    torch.cuda.synchronize()


def waits_for_a_stream(x):
    torch.cuda.Stream().synchronize()


def asks_for_an_event(x):
    event = torch.cuda.Event()
    event.record()
    event.query()


def waits_for_work_outside(x):
    torch.cuda.current_stream().wait_event(OUTSIDE["event"])


def works_beside_the_capture(x):
    with torch.cuda.stream(OUTSIDE["stream"]):
        torch.add(OUTSIDE["x"], 1, out=OUTSIDE["x"])


def keeps_memory_of_another_pool(x):
    with torch.cuda.stream(OUTSIDE["stream"]):
        OUTSIDE["kept"] = torch.empty(2**22, device=CUDA)


def forks_and_does_not_join(x):
    OUTSIDE["stream"].wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(OUTSIDE["stream"]):
        x + 1


def copies_from_pageable_memory(x):
    x.copy_(torch.ones(x.shape), non_blocking=True)


def loads_a_kernel(x):
    rf.noise.normal(OUTSIDE["key"], x)


def compiles_a_network(x):
    torch.compile(lambda x: torch.sin(x) * torch.cos(x).sum(1, keepdim=True))(x)


REFUSED = {
    reads_a_value: "cudaStreamSynchronize of what is being captured",
    waits_for_the_device: "cudaDeviceSynchronize of what is being captured",
    waits_for_a_stream: "cudaStreamSynchronize during capture",
    asks_for_an_event: "cudaEventQuery of what is being captured",
    waits_for_work_outside: "a capturing stream waits for work outside the capture",
    works_beside_the_capture: "work beside the capture, which a replay does not repeat: ",
    keeps_memory_of_another_pool: "a capture keeps 1 block(s) of memory outside its pool",
    forks_and_does_not_join: "a capture ends before stream",
    copies_from_pageable_memory: "copy H2D of pageable host memory during capture",
    loads_a_kernel: "kernel _normal_kernel is loaded during capture",
    compiles_a_network: "is written by torch.compile during capture",
}


def prepare():
    """The device's objects that the programs above use; a tensor."""
    device.inductor.install()
    OUTSIDE.update(stream=torch.cuda.Stream(), event=torch.cuda.Event(), x=torch.ones(4, 4, device=CUDA))
    OUTSIDE["key"] = rf.NoiseStream(0, CUDA).next_key()
    OUTSIDE["event"].record()
    return torch.ones(4, 4, device=CUDA)


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda wrong: wrong.__name__)
def test_a_wrong_turn_is_reported(wrong):
    """Captured as the trainer does it; without the wrong line nothing is reported."""

    def run():
        x = prepare()
        found = []
        for line in (lambda x: None, wrong):

            def turn(line=line):
                result = torch.sin(x)
                line(x)
                return {"x": result}

            device.reset()
            modes.CudaRecorder(CUDA).capture(turn)
            found.append(device.counts().violations)
        return found

    right, found = alone(run)
    assert not right
    assert any(what.startswith(REFUSED[wrong]) or what.endswith(REFUSED[wrong]) for what in found), found


def test_the_memory_pool_of_dead_graphs_is_reported():
    """A recorder that keeps its pool when its graphs are gone, as this package's once did."""

    def run():
        x, recorder = prepare(), modes.CudaRecorder(CUDA)
        recorder.capture(lambda: {"x": torch.sin(x)})
        first = device.counts().violations
        recorder._graphs = {None}  # never empty, so the recorder takes no new pool
        recorder.capture(lambda: {"x": torch.sin(x)})
        return first, device.counts().violations

    first, second = alone(run)
    assert not first
    assert len(second) == 1
    assert second[0].startswith("a capture takes the memory pool of graphs that are gone")


def test_another_thread_may_wait_under_the_trainers_mode_of_capture():
    """Threads that read batches use the device meanwhile; a capture in the mode "global" forbids it."""

    def run():
        x, other = prepare(), torch.cuda.Stream()
        found = []
        for mode in ("thread_local", "global"):
            device.reset()
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
                torch.sin(x)
                thread = threading.Thread(target=other.synchronize)
                thread.start()
                thread.join()
            found.append(device.counts().violations)
        return found

    assert alone(run) == [[], ["cudaStreamSynchronize during another thread's global capture"]]


def test_an_update_that_waits_is_an_error():
    def run():
        made = turns.trainer({"distill": {"batch": 16}})
        plain = made.update

        def update():
            plain()
            made.meters.drain()[0].cpu()

        made.update = update
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            turns.update(made, turns.Watched())

    alone(run)


def test_counts_are_of_what_was_done():
    """The ground under the budgets: known launches are counted by name, captured ones apart from the others."""

    def run():
        x = prepare()
        device.reset()
        y = x * x
        z = (x @ x).half()
        z.cpu()
        counts = device.counts()
        graph = torch.cuda.CUDAGraph()
        device.reset()
        with torch.cuda.graph(graph):
            y.add_(1)
        graph.replay()
        return counts, device.counts()

    eager, captured = alone(run)
    assert eager.done.total() == 4
    assert eager.done["copy D2H"] == 1
    assert sum(count for name, count in eager.done.items() if name.startswith("cublas")) == 1
    assert eager.called["cudaStreamSynchronize"] == 1
    assert captured.recorded.total() == 1
    assert captured.done == {"graph of 1 nodes": 1}


def test_a_trainer_without_warm_up_is_reported():
    """Its captures load every kernel, and settle what a warm-up settles."""

    def run():
        watched = turns.Watched()
        modes.Captured.__init__.__defaults__ = (0,)
        modes.WARM_UP = 0
        made = turns.trainer({"distill": {"batch": 16}, "run": {"mode": "graphs-eager"}})
        made.update()
        watched.counted()
        return watched.violations

    found = alone(run)
    for kernel in ("_normal_kernel", "_interpolate_kernel", "_fake_kernel", "_generator_kernel", "_adam_kernel"):
        assert f"kernel {kernel} is loaded during capture" in found
