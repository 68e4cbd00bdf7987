"""The check that all ranks of a run were started with the same settings and the same code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import realuid_fast

from ..errors import UserError
from ..train.distributed import gathered, size


class RanksDiffer(UserError):
    """The ranks of a run were started with different settings; every rank raises it."""

    of_all_ranks = True


def check_alike(settings: Mapping[str, Any]) -> None:
    """Compare ``settings``, nested by name, and the package's and torch's code over all ranks; all ranks must call.

    Of ``run.device`` only the kind is compared: ranks have different GPUs.

    Raises:
        RanksDiffer: on every rank, with the first key that differs and both values.
    """
    if size() == 1:
        return
    own = {"realuid_fast": _code(), "torch": str(torch.__version__), **_flat(settings)}
    if "run.device" in own:
        own["run.device"] = own["run.device"].partition(":")[0]
    # Values are compared by their repr, so that NaN equals NaN.
    first, *others = gathered({key: repr(value) for key, value in own.items()})
    for other, found in enumerate(others, 1):
        for key in {**first, **found}:
            one, two = (each.get(key, "not there") for each in (first, found))
            if one != two:
                raise RanksDiffer(
                    f"the ranks of a run must have the same settings and the same code: {key} is {one} on rank 0 and "
                    f"{two} on rank {other}"
                )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _code() -> str:
    """The package's version and a hash of its Python files."""
    content, root = hashlib.sha256(), Path(realuid_fast.__file__).parent
    for file in sorted(root.rglob("*.py")):
        content.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return f"{realuid_fast.__version__} ({content.hexdigest()[:12]})"
