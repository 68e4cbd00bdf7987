"""Networks through torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import together


def compiled(net: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """``net`` through torch.compile, as one graph, for the fixed shapes of a turn."""

    def call(*arguments: Any, **options: Any) -> Any:
        return net(*arguments, **options)

    torch.compiler.allow_in_graph(together.cast_at_once)
    # torch.compile counts its variants by code object and refuses the ninth. Turns need at most five of two networks,
    # but all networks of a process share their class' code: give each call its own.
    call.__code__ = call.__code__.replace(co_name=f"call_{id(net)}")
    return torch.compile(call, fullgraph=True, dynamic=False, backend=backend)


def sharing(nets: tuple[Any, ...], compile: Callable[..., Any] = compiled) -> tuple[Callable[..., Any], ...]:
    """Each of ``nets`` through torch.compile. Networks that differ in the numbers of their parameters alone share code.

    The network is an argument of what is compiled. torch.compile then asks whether a call is like one before, and not
    whether it is of the same network.
    """

    def call(net: Any, *arguments: Any, **options: Any) -> Any:
        return net(*arguments, **options)

    run = compile(call)
    return tuple(functools.partial(run, net) for net in nets)
