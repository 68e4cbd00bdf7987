"""Fused kernels and a trainer for universal inverse distillation with real-data supervision.

``import realuid_fast`` loads neither torch nor the operators; the first use of any of its names does. A program that
calls ``torch.ops.realuid_fast`` without using a name of the package imports ``realuid_fast.ops``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        backends,
        couplings,
        data,
        errors,
        functional,
        metrics,
        networks,
        noise,
        objectives,
        optim,
        paths,
        sampling,
        teachers,
    )
    from .backends import backend
    from .functional import FakeGrads, GeneratorGrads, MatchingGrads, interpolate, sample_output
    from .interpolant import Interpolant
    from .losses import fake_grads, fake_loss, generator_grads, generator_loss, matching_grads, matching_loss
    from .models import load, sample
    from .models.frozen import frozen_view
    from .models.pictures import save_picture
    from .noise import NoiseStream
    from .tripwires import Tripwires

__version__ = "0.1.0"

__all__ = [
    "FakeGrads",
    "GeneratorGrads",
    "Interpolant",
    "MatchingGrads",
    "NoiseStream",
    "Tripwires",
    "backend",
    "backends",
    "couplings",
    "data",
    "errors",
    "fake_grads",
    "fake_loss",
    "frozen_view",
    "functional",
    "generator_grads",
    "generator_loss",
    "interpolate",
    "load",
    "matching_grads",
    "matching_loss",
    "metrics",
    "networks",
    "noise",
    "objectives",
    "optim",
    "paths",
    "sample",
    "sample_output",
    "sampling",
    "save_picture",
    "teachers",
]

_MODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__))
# The command line's help needs these, and they need no torch.
_LIGHT = frozenset({"choices", "cli", "errors", "extras", "streams", "__main__"})
_HOMES = {
    "Interpolant": "interpolant",
    "NoiseStream": "noise",
    "Tripwires": "tripwires",
    "backend": "backends",
    "frozen_view": "models.frozen",
    "load": "models",
    "sample": "models",
    "save_picture": "models.pictures",
    **dict.fromkeys(("FakeGrads", "GeneratorGrads", "MatchingGrads", "interpolate", "sample_output"), "functional"),
}


def __getattr__(name: str) -> Any:
    """Import a module of the package, or the module that a call lives in, when its name is first used."""
    if name not in _MODULES and name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _LIGHT:
        # Layers and backends find the operators registered, whichever name is used first.
        importlib.import_module(f"{__name__}.ops")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'losses')}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
