"""Calls planned once: their launches are those of Triton's own launcher, to the word."""

import torch
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher

import realuid_fast as rf
from realuid_fast.kernels import plans

from . import device
from .alone import alone


def launched():
    """The arguments that Triton's launcher and then plans give the driver in the same calls; and hooked launches."""
    x, out, other = torch.randn(3, 64, 3, 32, 32, device="cuda")
    path, objective = rf.paths.Linear(), rf.objectives.RealUID(0.92, 0.94)
    coef, key = path.coefficients(torch.rand(64, device="cuda")), rf.NoiseStream(0, "cuda").next_key()
    given, original = [], CudaLauncher.__init__

    def watched(self, *arguments):
        original(self, *arguments)
        native = self.launch

        def launch(*words):
            given.append(words)
            native(*words)

        self.launch = launch

    def call():
        rf.interpolate(x, coef, key)
        shared = {"x": x, "x_t": None, "coef": coef, "noise": key}
        rf.functional.generator_grads(objective, teacher_out=out, fake_out=other, **shared)
        rf.functional.matching_grads(out=out, **shared)
        torch.ops.realuid_fast.scale_grads_([x, out], coef[0, 0])

    def word(value):
        return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value

    def words():
        """Launches without Triton's own notes for hooks, which stand between the kernel and its signature."""
        found = [repr((*each[:8], *each[-3:-1], *map(word, each[-1]))) for each in given]
        given.clear()
        return found

    CudaLauncher.__init__ = watched
    call()
    by_triton = words()
    plans._hooked = lambda: True  # plans end in Triton's launcher
    call()
    by_hooked = words()
    plans._hooked = lambda: False
    call()
    by_plan = words()
    return by_triton, by_hooked, by_plan


def test_what_the_driver_is_given():
    by_triton, by_hooked, by_plan = alone(launched)
    assert len(by_triton) == 6
    assert by_hooked == by_triton
    assert by_plan == by_triton


def hooked():
    """Launches of a planned call that Triton's hook sees, and those that the device counts."""
    x = torch.randn(64, 3, 32, 32, device="cuda")
    coef, key = rf.paths.Linear().coefficients(torch.rand(64, device="cuda")), rf.NoiseStream(0, "cuda").next_key()
    for _ in range(3):
        rf.interpolate(x, coef, key)
    seen = []
    knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    device.reset()
    rf.interpolate(x, coef, key)
    return seen, device.counts().done


def test_triton_hooks_see_planned_launches():
    seen, done = alone(hooked)
    assert seen == ["_interpolate_kernel"]
    assert done.total() == 1
