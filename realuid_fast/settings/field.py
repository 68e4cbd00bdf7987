"""A setting: a field of a dataclass that says its default, its meaning, its bounds and its choices."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import field
from typing import Any

from ..bounds import Range


def setting(default: Any, meaning: str, bounds: Range | None = None, choices: Collection[str] | None = None) -> Any:
    """A dataclass' field: its default or the function that makes it, its meaning, and what its values are held to.

    ``bounds`` are of every number of a list. ``choices`` may grow later, as :data:`realuid_fast.paths.PATHS` does.
    """
    metadata = {"meaning": meaning, "bounds": bounds, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
