"""Memory that does not suffice, and losses and gradients that are not finite."""

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from realuid_fast import backends, functional
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure
from realuid_fast.networks import build, memory
from realuid_fast.train.logging import read_csv

from ..helpers import MLP
from .runs import end_of, steps


def test_gradients_that_stay_without_a_number_stop_the_run(run, monkeypatch):
    straight, calls = run("straight", checkpoint_every=1), 0
    grads = functional.generator_grads

    def poisoned(*given, **named):
        nonlocal calls
        calls += 1
        found = grads(*given, **named)
        return found._replace(x=found.x * math.nan) if calls > 6 else found

    monkeypatch.setattr(functional, "generator_grads", poisoned)
    with pytest.raises(UserError, match=r"the generator's gradient was not finite in 4 steps in a row.*at update 10"):
        run("broken", checkpoint_every=1, stop_after_skips=4)
    broken = straight.parent / "broken"
    assert steps(broken) == [5, 6]
    assert [row["generator skipped"] for row in read_csv(broken / "log.csv")[-5:]] == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    assert end_of(run("broken", resume=True)) == end_of(straight)


def test_a_skip_now_and_then_does_not_stop_a_run(run, monkeypatch):
    calls, grads = 0, functional.generator_grads

    def poisoned(*given, **named):
        nonlocal calls
        calls += 1
        found = grads(*given, **named)
        return found._replace(x=found.x * math.nan) if calls % 2 else found

    monkeypatch.setattr(functional, "generator_grads", poisoned)
    folder = run("run", stop_after_skips=2)
    assert read_csv(folder / "log.csv")[-1]["generator skipped"] == 6


def test_memory_that_does_not_suffice_says_what_would_fit(run, after):
    after(7, lambda: torch.empty(2**58))
    with pytest.raises(
        UserError,
        match=r"stopped after update 7: the memory of cpu does not suffice for a batch of 8: a sample's activations "
        r"take .* MB .*, [\d,]+ MB are free now, so that about 7 would fit; with run.accumulate=2 the batch "
        r"goes through in parts of 4; --resume goes on from update-00000005.pt",
    ):
        run("large")
    assert end_of(run("large", resume=True)) == end_of(run("straight"))


@pytest.mark.parametrize(
    ("batch", "rows", "free", "said"),
    [
        (64, 1, 10.5, r"about 10 would fit; with run.accumulate=8 the batch goes through in parts of 8$"),
        (
            64,
            2,
            10.5,
            r"in 2 passes .* about 5 would fit; with run.accumulate=16 the batch goes through in parts of 4$",
        ),
        (7, 1, 100.0, r"about 6 would fit; with run.accumulate=7 the batch goes through in parts of 1$"),
        (64, 1, 0.5, r"about 0 would fit$"),
        (64, 1, None, r"does not suffice for a batch of 64$"),
    ],
)
def test_what_would_fit_is_what_is_free_over_what_a_sample_takes(monkeypatch, batch, rows, free, said):
    net = build(MLP)
    size = memory.bytes_per_sample(net, (2,), torch.device("cpu"))
    assert size > 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: None if free is None else int(free * size))
    advice = memory.advice(net, batch, 1, rows, (2,), torch.device("cpu"))
    assert re.search(said, advice), advice
    # The same advice for a batch that goes through in three parts already.
    if "goes through" in advice:
        parts = int(re.search(r"accumulate=(\d+)", advice)[1])
        assert f"run.accumulate={3 * parts} " in memory.advice(net, batch, 3, rows, (2,), torch.device("cpu"))


def test_memory_that_one_sample_exhausts_is_said(monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(memory, "bytes_per_sample", exhausted)
    assert memory.advice(build(MLP), 8, 1, 1, (2,), torch.device("cpu")).endswith("a batch of 8, nor for a batch of 1")


def test_memory_that_does_not_suffice_for_an_evaluation_says_so(run, monkeypatch):
    """Smaller parts of a batch would not help, and a resumed run comes to the same evaluation."""
    measured = Measure.__call__
    calls = itertools.count()

    def exhausted(self, samples):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(self, samples)

    monkeypatch.setattr(Measure, "__call__", exhausted)
    with pytest.raises(
        UserError, match=r"not suffice for the evaluation after update 4: resume with a smaller run\.ev"
    ):
        run("large")
    assert end_of(run("large", resume=True)) == end_of(run("straight"))


def test_a_run_that_was_too_large_goes_on_in_parts(run, after):
    after(7, lambda: torch.empty(2**58))
    with pytest.raises(UserError, match=r"run\.accumulate=2"):
        run("large")
    folder = run("large", resume=True, accumulate=2)
    assert [row["update"] for row in read_csv(folder / "log.csv")] == list(range(1, 13))


def test_activations_are_counted_once_and_without_the_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(2, 8)

        def forward(self, t, x, y=None):
            return self.inside(x).relu()

    # The linear layer keeps its two inputs, the rectifier its eight results.
    assert memory.bytes_per_sample(Net(), (2,), torch.device("cpu")) == 4 * (2 + 8)
    assert memory.is_exhausted(torch.OutOfMemoryError("CUDA out of memory"))
    assert not memory.is_exhausted(RuntimeError("shapes do not match"))
    left = RuntimeError("the capture of a graph has become invalid")
    left.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert memory.is_exhausted(left)


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.",
        "no memory for images like those of x",
        "could not create a primitive",
        "could not create a primitive descriptor for a convolution forward propagation primitive",
        "std::bad_alloc",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_memory_that_does_not_suffice_is_known_by_what_libraries_say(words):
    assert memory.is_exhausted(RuntimeError(words))


def test_the_packages_operators_are_known_when_they_find_no_memory():
    """The real operator, in a process with 30 MB of memory more than it has, is asked for images of 67 MB."""
    if not backends.compiled(torch.device("cpu")):
        pytest.skip("the C++ extension was not built")
    # A process of its own: one that has run commands keeps freed memory, in which the images would find room.
    script = """
import resource
from pathlib import Path
import torch
import realuid_fast.ops
from realuid_fast.networks import memory

x = torch.randn(64, 64, 64, 64).contiguous(memory_format=torch.channels_last)
weight = torch.randn(64, 64, 3, 3)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 30 * 2**20,) * 2)
try:
    torch.ops.realuid_fast.conv3x3.default(x, weight, None)
except RuntimeError as error:
    print("no memory for" in str(error) and memory.is_exhausted(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
