"""Numbers that follow from a path's attributes alone, known to Python even while a program is traced."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# Every fact by its path's id, and by its path's class and attributes, with the path, so that no other path gets its id.
_KNOWN: dict[Any, tuple[Any, Any]] = {}
_MOST = 1024


def fact(function: F) -> F:
    """``function(path, *rest)``, computed once for all paths of one class with the same attributes.

    Losses and generators branch on such numbers, and a traced tensor has no number to give. So a fact is computed in a
    thread of its own, where torch traces and transforms nothing, and torch.compile takes it as a constant. A function
    under functools.lru_cache would be traced: torch.compile does not look into the cache.
    """

    @functools.wraps(function)
    def known(path: Any, *rest: Any, **named: Any) -> Any:
        if named:
            return known(*inspect.signature(function).bind(path, *rest, **named).args)
        if torch.compiler.is_dynamo_compiling():
            # No fact depends on the law of times.
            own = {name: _pinned(value) for name, value in {**_attributes(path), "sampler": "uniform"}.items()}
            return constant(type(path), tuple(own), *own.values(), *_pinned(rest))
        return known_now(path, rest)

    def known_now(path: Any, rest: tuple[Any, ...]) -> Any:
        own = (function, id(path), rest)
        if (found := _KNOWN.get(own)) is not None:
            return found[1]
        alike: Any = (function, type(path), *_attributes(path).values(), rest)
        try:
            found = _KNOWN.get(alike)
        except TypeError:
            # A list or an array among the attributes has no hash: only the path itself is known again.
            alike = own
        if found is None:
            with ThreadPoolExecutor(1) as thread:
                found = path, thread.submit(function, path, *rest).result()
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[own] = _KNOWN[alike] = path, found[1]
        return found[1]

    def constant(kind: type, names: tuple[str, ...], *values: Any) -> Any:
        # A path that the compiled program makes has no object yet.
        path: Any = object.__new__(kind)
        for name, value in zip(names, values, strict=False):
            object.__setattr__(path, name, value)
        return known_now(path, values[len(names) :])

    # The mark of torch.compiler.assume_constant_result, which would first import torch._dynamo: that takes longer than
    # all else that a short command does.
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return known  # type: ignore[return-value]


def _attributes(path: Any) -> dict[str, Any]:
    return vars(path) or {field.name: getattr(path, field.name) for field in fields(path)}


def _pinned(value: Any) -> Any:
    """The value as a constant of the compiled program, which guards it: torch.compile may have made it a variable."""
    if isinstance(value, tuple):
        return tuple([_pinned(part) for part in value])
    if isinstance(value, float):
        return float.fromhex(value.hex())
    return operator.index(value) if isinstance(value, int) else value
