"""Calls planned once: their launches are those of Triton's own launcher, to the word and to the byte."""

import ctypes
import threading

import torch
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher

import realuid_fast as rf
from realuid_fast.kernels import plans
from realuid_fast.ops import extension, triton_backend

from ..kernels.test_plans import arguments
from . import device
from .alone import alone

SIZES = {"i1": 1, "i32": 4, "fp32": 4, "i64": 8}


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
    torch.ops.realuid_fast_node.stop_plans(True)
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


def on_cuda(value, offset):
    """An operator's argument on the device; its tensors of samples begin at an element of their storage."""
    if isinstance(value, list):
        return [on_cuda(each, offset) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() < 2 or not value.is_floating_point() or value.shape[1] == 9:
        return value.cuda()
    return value.new_empty(value.numel() + offset, device="cuda")[offset:].view_as(value)


def to_the_byte():
    """By case: what the driver is given by Triton's launcher, by a plan in Python, and by one in C++ in two threads."""
    assert triton_backend._native, extension.why_no_nodes()
    driver, begin, launch = ctypes.CDLL("libcuda.so.1"), CudaLauncher.__init__, CudaLauncher.__call__
    driver.nullgpu_written.restype = ctypes.c_char_p

    def noted(self, src, metadata):
        begin(self, src, metadata)
        sizes = "".join(str(SIZES.get(type_, 8)) for type_ in src.signature.values() if type_ != "constexpr")
        self.kernel = metadata.name.encode(), f"{sizes}88".encode()  # the last two are Triton's scratch memory

    def watched(self, *words):
        # Kernels of one name have different arguments. Those of the last launch or plan hold.
        driver.nullgpu_watch(*self.kernel)
        launch(self, *words)

    CudaLauncher.__init__, CudaLauncher.__call__ = noted, watched
    in_python, planned = [], triton_backend._planned
    triton_backend._planned = lambda key, *rest: in_python.append(key) or planned(key, *rest)

    def launches(op, given):
        """The launches of a call, their addresses by name, and how many calls came to Python."""
        in_python.clear()
        results = getattr(torch.ops.realuid_fast, op)(*given)
        names = {}
        for kind, listed in (("argument", given), ("result", results if isinstance(results, tuple) else (results,))):
            flat = [each for value in listed for each in (value if isinstance(value, list) else [value])]
            tensors = [each for each in flat if isinstance(each, torch.Tensor) and each.numel()]
            names |= {f"{each.data_ptr():016x}": f"{kind} {place}" for place, each in enumerate(tensors)}
        lines = [line.split() for line in driver.nullgpu_written().decode().splitlines()]

        def by_name(word):
            return names.get(word, "own" if len(word) == 16 and int(word, 16) >> 40 else word)

        return [line[:8] + [by_name(word) for word in line[8:]] for line in lines], len(in_python)

    stop, found = torch.ops.realuid_fast_node.stop_plans, {}
    for op in (*triton_backend._HOMES, "scale_grads_"):
        for dim, offset, dtype in ((60, 0, torch.float32), (3072, 0, torch.bfloat16), (675, 1, torch.float32)):
            # One tensor given for several arguments must not be taken for one argument later.
            ways, alike = [], arguments(op, dim, alike=True, dtype=dtype)
            given = [on_cuda(value, offset) for value in arguments(op, dim, alike=False, dtype=dtype)]
            stop(True)
            ways += [launches(op, given), launches(op, given)]
            stop(False)
            launches(op, [on_cuda(value, offset) for value in alike])
            ways.append(launches(op, given))
            side = torch.cuda.Stream()
            thread = threading.Thread(target=lambda ways=ways, op=op, given=given: ways.append(launches(op, given)))
            thread.start()
            thread.join()
            with torch.cuda.stream(side):
                ways.append((launches(op, given), side.cuda_stream))
            found[op, dim] = ways
    return found


def test_plans_in_cpp_give_the_driver_the_same_bytes():
    for case, (by_triton, by_python, by_cpp, in_thread, (on_stream, stream)) in alone(to_the_byte).items():
        launches, calls = by_triton
        assert launches
        assert calls == 1
        assert by_python == by_triton, case
        assert by_cpp == (launches, 0), case
        assert in_thread == by_cpp, case
        moved = [[*row[:7], str(stream), *row[8:]] for row in launches]
        assert on_stream == (moved, 0), case
