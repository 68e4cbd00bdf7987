"""A call planned once: what its launches take, so that a later call of the same kind only allocates and launches.

An operator's module (``generator``, ``fake``, ...) works out a call's launches from its arguments, and Triton binds
every argument and looks its kernel up. On a few samples that takes the host ten times as long as the device needs. All
of it follows from shapes, dtypes, layout, numbers and the pointers' alignment, so a plan keeps what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_float
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .tiles import Call


class Plan(NamedTuple):
    """How to repeat a call.

    Attributes:
        memory: size, strides and dtype of each tensor to allocate, or None for one like the call's own; the operator's
            results come first.
        results: how many of them are results; None for a single one that the operator returns by itself.
        numbers: the launches' arguments that are no tensors.
        launches: a compiled kernel on its grid, and what picks its arguments from the call's arguments, the allocated
            tensors and the numbers, in one row.
    """

    memory: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None, ...]
    results: int | None
    numbers: tuple[Any, ...]
    launches: tuple[tuple[Callable[..., None], Callable[[Sequence[Any]], Sequence[Any]]], ...]

    def run(self, arguments: tuple[Any, ...], like: Tensor) -> Any:
        """Allocate the results, launch the kernels, and return the results. ``like`` is on the current device."""
        device = like.device
        made = [
            torch.empty_like(like)
            if each is None
            else torch.empty_strided(each[0], each[1], dtype=each[2], device=device)
            for each in self.memory
        ]
        row = (*arguments, *made, *self.numbers)
        for launch, pick in self.launches:
            launch(*pick(row))
        return made[0] if self.results is None else tuple(made[: self.results])


def run_and_record(
    plan_calls: Callable[..., tuple[list[Call], Any]], arguments: tuple[Any, ...], like: Tensor
) -> tuple[Any, Plan | None]:
    """Run a call and return its results with the plan to repeat it.

    There is no plan for a call without launches, whose results may have been filled, nor where a launch gives no
    compiled kernel, as in the interpreter.

    Args:
        plan_calls: works out launches and results. A launch's tensors are arguments of the call, results, or memory
            that the call allocates, and no views of those.
        like: the argument that most results are like.
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
    for call, kernel in zip(calls, kernels, strict=True):
        given, picked = {**call.arguments, **call.constants}, []
        for name in call.kernel.arg_names:
            if isinstance(given[name], Tensor):
                picked.append(places[id(given[name])])
            else:
                picked.append(len(arguments) + len(made) + len(numbers))
                numbers.append(given[name])
        launches.append((kernel[(*call.grid, 1, 1)[:3]], itemgetter(*picked)))
    own = like.shape, like.stride(), like.dtype
    kinds = ((each.shape, each.stride(), each.dtype) for each in made)
    return results, Plan(tuple(None if kind == own else kind for kind in kinds), count, tuple(numbers), tuple(launches))


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
