"""Interpolant paths: how a sample, an endpoint and noise mix at time t, as rows of nine coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ..coefficients import COLUMNS, Coefficients
from ..contracts import type_name
from ..errors import UserError
from . import samplers
from .base import MATCH_SPACES, PREDICTIONS, Path, Preconditioning, Weight
from .custom import CustomOneSided, CustomTwoSided, custom
from .discrete import DiscreteVP
from .one_sided import VE, VP, FlowMatching, Linear, OneSidedPath, Trigonometric, VPCosine
from .two_sided import DDBMVE, DDBMVP, I2SB, ICFM, Bridge, BrownianBridge, StochasticInterpolant, TwoSidedPath

# The paths a configuration can name.
PATHS: dict[str, type[Path]] = {
    "linear": Linear,
    "flow-matching": FlowMatching,
    "trigonometric": Trigonometric,
    "vp": VP,
    "vp-cosine": VPCosine,
    "vp-discrete": DiscreteVP,
    "ve": VE,
    "i-cfm": ICFM,
    "brownian-bridge": BrownianBridge,
    "i2sb": I2SB,
    "ddbm-ve": DDBMVE,
    "ddbm-vp": DDBMVP,
    "stochastic-interpolant": StochasticInterpolant,
}

# The time weights a configuration can name.
WEIGHTS: dict[str, Callable[[Path], Weight | None]] = {
    "one": lambda path: None,
    "edm": lambda path: path.edm_weight,
    "scale": lambda path: path.data_scale,
    "noise": lambda path: path.noise_variance,
}


def build(name: str, settings: Mapping[str, Any] | None = None, sampler: str | samplers.Sampler = "uniform") -> Path:
    """The path of a name in :data:`PATHS` with its own ``settings``, such as ``{"beta_max": 12.0}`` of ``"vp"``.

    Raises:
        UserError: an unknown name, a setting that the path does not have, or a value that it refuses, each named.
    """
    if not isinstance(name, str) or name not in PATHS:
        raise UserError(f"path.name must be one of {', '.join(PATHS)}; got {name!r}")
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"path.settings must be a mapping from names to values, not {type_name(settings)}")
    settings = dict(settings or {})
    known = [f.name for f in fields(PATHS[name]) if f.name != "sampler"]
    if unknown := [key for key in settings if key not in known]:
        raise UserError(f"path.settings has no key {unknown[0]!r} on the path '{name}'; it takes {', '.join(known)}")
    try:
        return PATHS[name](sampler=sampler, **settings)
    except UserError as error:
        raise UserError(f"path.settings: {error}") from None


def name_and_settings(path: Path) -> tuple[str, dict[str, Any]]:
    """The arguments that :func:`build` makes a path of, but for its sampler; ``""`` for a path that is not in PATHS."""
    own = [f for f in fields(path) if f.name != "sampler"]
    settings = {f.name: getattr(path, f.name) for f in own if getattr(path, f.name) != f.default}
    name = next((name for name, kind in PATHS.items() if kind is type(path)), "")
    return name, settings if name else {}


def weight(name: str, path: Path) -> Weight | None:
    """The time weight of a name: ``one``; ``edm``, :meth:`Path.edm_weight`; ``scale``, the data's scale ``a(t)``;
    ``noise``, the noise's variance ``c(t)^2``.

    In x0 space ``edm`` is that of Karras et al. (2206.00364, table 1), and ``scale`` turns
    :func:`~realuid_fast.objectives.DMD` into Yin et al. (2311.18828, equations 7 and 8) on paths that scale the data.

    Raises:
        UserError: an unknown name.
    """
    if not isinstance(name, str) or name not in WEIGHTS:
        raise UserError(f"a weight must be one of {', '.join(WEIGHTS)}; got {name!r}")
    if not isinstance(path, Path):
        raise UserError(f"path must be a path such as paths.Linear(), not {type_name(path)}")
    return WEIGHTS[name](path)


__all__ = [
    "COLUMNS",
    "DDBMVE",
    "DDBMVP",
    "I2SB",
    "ICFM",
    "MATCH_SPACES",
    "PATHS",
    "PREDICTIONS",
    "VE",
    "VP",
    "WEIGHTS",
    "Bridge",
    "BrownianBridge",
    "Coefficients",
    "CustomOneSided",
    "CustomTwoSided",
    "DiscreteVP",
    "FlowMatching",
    "Linear",
    "OneSidedPath",
    "Path",
    "Preconditioning",
    "StochasticInterpolant",
    "Trigonometric",
    "TwoSidedPath",
    "VPCosine",
    "Weight",
    "build",
    "custom",
    "samplers",
    "weight",
]
