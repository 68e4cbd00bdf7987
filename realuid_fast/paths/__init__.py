"""Interpolant paths: how a sample, an endpoint and noise mix at time t, as rows of nine coefficients."""

from . import samplers
from .base import COLUMNS, MATCH_SPACES, PREDICTIONS, Path, Preconditioning, Weight
from .custom import CustomOneSided, CustomTwoSided, custom
from .one_sided import VE, VP, FlowMatching, Linear, OneSidedPath, Trigonometric, VPCosine
from .two_sided import DDBMVE, DDBMVP, I2SB, ICFM, Bridge, BrownianBridge, StochasticInterpolant, TwoSidedPath

# The paths a configuration can name.
PATHS: dict[str, type[Path]] = {
    "linear": Linear,
    "flow-matching": FlowMatching,
    "trigonometric": Trigonometric,
    "vp": VP,
    "vp-cosine": VPCosine,
    "ve": VE,
    "i-cfm": ICFM,
    "brownian-bridge": BrownianBridge,
    "i2sb": I2SB,
    "ddbm-ve": DDBMVE,
    "ddbm-vp": DDBMVP,
    "stochastic-interpolant": StochasticInterpolant,
}

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
    "Bridge",
    "BrownianBridge",
    "CustomOneSided",
    "CustomTwoSided",
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
    "custom",
    "samplers",
]
