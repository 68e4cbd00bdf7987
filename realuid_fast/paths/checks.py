"""Checks of the arguments of paths and samplers; each error is a sentence that names the argument."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..contracts import check_tensor, host_checks_allowed, is_number, type_name
from ..errors import UserError


def check_times(t: Tensor, t_range: tuple[float, float]) -> None:
    """Refuse times of the wrong shape or dtype and, if reading them is free, times outside ``t_range``."""
    check_tensor("t", t)
    if t.dim() != 1 or not t.is_floating_point():
        raise UserError(f"t must be a floating tensor of shape (R,), not {t.dtype} of shape {tuple(t.shape)}")
    if not host_checks_allowed(t) or t.numel() == 0:
        return
    low, high = t_range
    first, last = _rounded(t_range, t.dtype)
    smallest, largest = (float(v) for v in torch.aminmax(t))
    # Negated, so that NaN is refused too.
    if not (first <= smallest and largest <= last):
        found = "NaN" if math.isnan(smallest) else f"values from {smallest:g} to {largest:g}"
        raise UserError(f"t must lie inside the path's range [{low:g}, {high:g}], got {found}")


@functools.lru_cache(maxsize=256)
def _rounded(t_range: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """The range with its ends rounded to ``dtype``, so that times at its ends lie inside."""
    low, high = torch.tensor(t_range, dtype=dtype).tolist()
    return low, high


def check_number(name: str, value: float, above: float = -math.inf, below: float = math.inf) -> None:
    """Refuse a value that is not a finite number strictly between ``above`` and ``below``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        how = f": pass float({name})" if is_number(value) and not isinstance(value, (int, float)) else ""
        raise UserError(f"{name} must be a finite number, not {value!r}{how}")
    if not above < value < below:
        bound = f"above {above:g}" if math.isinf(below) else f"between {above:g} and {below:g}"
        raise UserError(f"{name} must lie {bound}, got {value:g}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the words ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        found = repr(value) if isinstance(value, str) else type_name(value)
        raise UserError(f"{name} must be one of {', '.join(allowed)}, not {found}")
