"""A call planned once: what its launches take, so that a later call of the same kind only allocates and launches.

An operator's module (``generator``, ``fake``, ...) works out a call's launches from its arguments, and Triton binds
every argument and looks its kernel up. On a few samples the host then takes longer than the device is expected to. All
of it follows from shapes, dtypes, layout, numbers and the pointers' alignment, so a plan keeps what came of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from ctypes import c_float, c_uint32
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from .tiles import Call


class Plan(NamedTuple):
    """How to repeat a call.

    Attributes:
        memory: size, strides and dtype of each tensor to allocate, or a tensor without elements, which all calls share;
            the operator's results come first.
        empty: allocates from size, strides and dtype.
        results: how many of them are results; None for a single one that the operator returns by itself.
        numbers: the launches' arguments that are no tensors.
        launches: a compiled kernel on its grid, and what picks its arguments from the call's arguments, the allocated
            tensors and the numbers, in one row.
        words: the same launches for :func:`keep_natively`, or None where the driver alone cannot repeat one.
    """

    memory: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | Tensor, ...]
    empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
    results: int | None
    numbers: tuple[Any, ...]
    launches: tuple[tuple[Callable[..., None], Callable[[Sequence[Any]], Sequence[Any]]], ...]
    words: tuple[int, ...] | None

    def run(self, arguments: tuple[Any, ...]) -> Any:
        """Allocate the results, launch the kernels, and return the results. The tensors are on the current device."""
        empty = self.empty
        made = [each if isinstance(each, Tensor) else empty(*each) for each in self.memory]
        row = (*arguments, *made, *self.numbers)
        for launch, pick in self.launches:
            launch(*pick(row))
        return made[0] if self.results is None else tuple(made[: self.results])


def _empty_on(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """A function that allocates on ``device``."""
    if device.type == "cuda":
        # The code that torch.compile writes allocates with it too. torch.empty_strided takes the host twice as long.
        on_cuda: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
        return on_cuda
    return lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device=device)


def _hooked() -> bool:
    """Whether somebody, a profiler for one, asked Triton to be told of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _launch(kernel: CompiledKernel, grid: tuple[int, ...], device: torch.device) -> Callable[..., None]:
    """A function that launches ``kernel`` on ``grid`` on the current stream, given the kernel's arguments.

    Triton's own takes three times as long: it looks for hooks and for scratch memory before every launch. All that its
    launcher hands to the driver's function in C is the same each time but for the stream and the kernel's arguments. So
    the launcher is called once with a function that keeps what it is given.
    """
    by_triton: Callable[..., None] = kernel[grid]
    launcher: Any = copy.copy(getattr(kernel, "run", None))
    unusual = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if not hasattr(launcher, "launch") or any(getattr(launcher, name, False) for name in unusual):
        return by_triton
    native, seen = launcher.launch, []
    launcher.launch = lambda *given: seen.append(given)
    stream, argument = object(), object()
    launcher(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, argument)
    *given, arguments = seen[0]
    places = [place for place, value in enumerate(given) if value is stream]
    if arguments != (argument,) or len(places) != 1:
        return by_triton
    before, after = given[: places[0]], given[places[0] + 1 :]
    current_stream, index = torch._C._cuda_getCurrentRawStream, device.index

    def launch(*arguments: Any) -> None:
        if _hooked():
            by_triton(*arguments)
        else:
            native(*before, current_stream(index), *after, arguments)

    return launch


def run_and_record(
    plan_calls: Callable[..., tuple[list[Call], Any]], arguments: tuple[Any, ...], like: Tensor
) -> tuple[Any, Plan | None]:
    """Run a call and return its results with the plan to repeat it.

    There is no plan for a call without launches, whose results may have been filled, nor where a launch gives no
    compiled kernel, as in the interpreter.

    Args:
        plan_calls: works out launches and results. A launch's tensors are arguments of the call, results, or memory
            that the call allocates, and no views of those.
        like: an argument on the call's device.
    """
    # One tensor given twice must not look like one argument, so each becomes an object of its own.
    arguments = tuple(each.detach() if isinstance(each, Tensor) else each for each in arguments)
    calls, results = plan_calls(*arguments)
    kernels = [call.run() for call in calls]
    if not calls or not all(isinstance(kernel, CompiledKernel) for kernel in kernels):
        return results, None

    made = [*results] if isinstance(results, tuple) else [results]
    count = len(made) if isinstance(results, tuple) else None
    places = {id(each): place for place, each in enumerate((*arguments, *made)) if isinstance(each, Tensor)}
    for call in calls:
        for each in call.arguments.values():
            if isinstance(each, Tensor) and id(each) not in places:
                places[id(each)] = len(arguments) + len(made)
                made.append(each)
    numbers: list[Any] = []
    launches = []
    words: list[list[int] | None] = []
    for call, kernel in zip(calls, kernels, strict=True):
        given, picked = {**call.arguments, **call.constants}, []
        for name in call.kernel.arg_names:
            if isinstance(given[name], Tensor):
                picked.append(places[id(given[name])])
            else:
                picked.append(len(arguments) + len(made) + len(numbers))
                numbers.append(given[name])
        grid = (*call.grid, 1, 1)[:3]
        launches.append((_launch(kernel, grid, like.device), itemgetter(*picked)))
        words.append(_words(kernel, grid, [given[name] for name in call.kernel.arg_names], picked))
    memory = tuple((tuple(each.shape), each.stride(), each.dtype) if each.numel() else each for each in made)
    whole = [launch for launch in words if launch is not None]
    told = tuple(word for launch in whole for word in launch) if len(whole) == len(words) else None
    return results, Plan(memory, _empty_on(like.device), count, tuple(numbers), tuple(launches), told)


def _words(kernel: CompiledKernel, grid: tuple[int, ...], given: list[Any], places: list[int]) -> list[int] | None:
    """A launch for ``csrc/autograd/plans.h``, or None where it takes more than the driver's plain launch."""
    types: Any = getattr(getattr(kernel, "src", None), "signature", None)
    metadata: Any = getattr(kernel, "metadata", None)
    plain = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "instrumentation_mode": ""}
    plain |= {"global_scratch_size": 0, "profile_scratch_size": 0}
    if types is None or any((getattr(metadata, name, value) or value) != value for name, value in plain.items()):
        return None
    arguments: list[int] = []
    for type_, value, place in zip(types.values(), given, places, strict=True):
        if type_ == "constexpr":
            continue
        if type_[0] == "*" and isinstance(value, Tensor):
            arguments += [1, place]
        elif type_ in ("i32", "i64"):
            arguments += [0, value]
        elif type_ == "fp32":
            arguments += [0, c_uint32.from_buffer(c_float(value)).value]
        else:
            return None
    threads = 32 * metadata.num_warps
    return [kernel.function, *grid, threads, metadata.shared, len(arguments) // 2, *arguments]


class _Watched(list[Any]):
    """A chain of Triton's hooks that has launches go through Triton while there are hooks."""

    def append(self, function: Any) -> None:
        super().append(function)
        torch.ops.realuid_fast_node.stop_plans(True)

    def remove(self, function: Any) -> None:
        super().remove(function)
        torch.ops.realuid_fast_node.stop_plans(_hooked())


def keep_natively(plan: Plan) -> None:
    """Hand the plan of the call under way to ``csrc/autograd/plans.h``, which repeats it without Python.

    It is kept for what the call followed from there. So this is done for every call that came to Python, also where the
    plan is an old one.
    """
    if plan.words is None or _hooked():
        return
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if not isinstance(getattr(hook, "calls", None), _Watched):
            if not hasattr(hook, "calls"):
                return
            hook.calls = _Watched(hook.calls)
    made = [
        each if isinstance(each, Tensor) else torch.empty_strided(each[0], each[1], dtype=each[2], device="meta")
        for each in plan.memory
    ]
    torch.ops.realuid_fast_node.keep_plan(made, 1 if plan.results is None else plan.results, plan.words)


def trace(calls: list[Call], results: Any) -> Any:
    """Put a call's launches into the graph that torch.compile is tracing, and return the call's results."""
    listed = results if isinstance(results, tuple) else (results,)
    # inductor would fill a tensor without dimensions by a launch of its own before a kernel writes it.
    rooms = {id(each): each.new_empty(1) for each in listed if not each.dim()}
    for call in calls:
        arguments = {name: rooms.get(id(value), value) for name, value in call.arguments.items()}
        # inductor hands numbers over in float64, where a launch of ours rounds them to float32.
        rounded = {name: c_float(value).value for name, value in arguments.items() if isinstance(value, float)}
        call._replace(arguments={**arguments, **rounded}).trace()
    if not calls:
        return results
    found = tuple(rooms[id(each)].view(()) if id(each) in rooms else each for each in listed)
    return found if isinstance(results, tuple) else found[0]
