"""The registered criterion, as functions of the runs' curves and ends alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

END = 3  # points of a curve whose mean is its end
Curve = list[tuple[int, float]]  # updates and distance to the held-out images


def end(curve: Curve) -> float:
    """The mean of a curve's last three points."""
    return statistics.mean(distance for _, distance in curve[-END:])


def arrival(curve: Curve, target: float) -> int | None:
    """The first update from which two points in a row are at or below ``target``; the last point counts alone."""
    for here, there in zip(curve, [*curve[1:], curve[-1]], strict=True):
        if here[1] <= target and there[1] <= target:
            return here[0]
    return None


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, object]:
    """The mean of ``ours - theirs`` by seed with its 95 % t interval, and every seed's difference.

    With three seeds the interval has two degrees of freedom and reaches 4.3 standard errors to either side.
    """
    from scipy.stats import t

    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(apart)
    half = math.nan
    if len(apart) > 1:
        half = float(t.ppf(0.975, len(apart) - 1)) * statistics.stdev(apart) / math.sqrt(len(apart))
    return {"mean": mean, "interval": [mean - half, mean + half], "each": apart}


def verdict(difference: dict[str, object]) -> str:
    """The verdict on a paired difference of distances: smaller is better. One seed has no interval and no verdict."""
    interval = difference["interval"]
    assert isinstance(interval, list)
    if math.isnan(interval[0]):
        return "one seed, no verdict"
    if interval[1] < 0:
        return "better"
    if interval[0] > 0:
        return "worse"
    return "no difference shown"
