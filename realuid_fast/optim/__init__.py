"""The optimiser step: Adam with clip and averages in one pass, flat storage for it, and learning-rate schedules."""

from __future__ import annotations

from .adam import FusedAdam
from .flat import ALIGN, FlatParameters, is_sharded, spread
from .schedules import DECAYS, Optimiser

__all__ = ["ALIGN", "DECAYS", "FlatParameters", "FusedAdam", "Optimiser", "is_sharded", "spread"]
