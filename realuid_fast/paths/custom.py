"""A path of your own from its scales as functions of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..contracts import host_checks_allowed, type_name
from ..errors import UserError
from .base import Path, Triple
from .one_sided import OneSidedPath, Pair
from .two_sided import TwoSidedPath

Scalar = Callable[[Tensor], Tensor]


def custom(
    a: Scalar,
    c: Scalar,
    b: Scalar | None = None,
    *,
    da: Scalar | None = None,
    dc: Scalar | None = None,
    db: Scalar | None = None,
    t_range: tuple[float, float] = (0.0, 1.0),
    **settings: Any,
) -> Path:
    """The path ``x_t = a(t) x + b(t) y + c(t) n``. Without ``b`` it is one-sided and has all conversions.

    Args:
        a, b, c: elementwise functions from times ``(R,)`` to scales ``(R,)``, in torch operations.
        da, db, dc: their derivatives; by automatic differentiation if not given.
        t_range: the permitted times. Every scale and derivative must be finite on it. A quantity that a conversion in
            use divides by must not vanish: ``a`` for predictions of noise or score, ``c`` for predictions of ``x0``,
            both for preconditioned networks. If one vanishes at an end, choose a range without that end.
        settings: ``sampler``, ``time_scale`` and so on, as for :class:`~realuid_fast.paths.Path` or
            :class:`~realuid_fast.paths.TwoSidedPath`.

    Raises:
        UserError: ``t_range`` is empty, ``db`` is given without ``b``, or a scale or derivative is not finite or not
            shaped like its times. They are tried at the ends and in the middle of the range.
    """
    if b is None and db is not None:
        raise UserError("db must not be given without b")
    functions = {"a": (a, da), "c": (c, dc)} | ({} if b is None else {"b": (b, db)})
    for name, (scale, rate) in functions.items():
        for label, function in ((name, scale), *([] if rate is None else [(f"d{name}", rate)])):
            if not callable(function):
                raise UserError(f"{label} must be a function from times (R,) to (R,), not {type_name(function)}")
    if not isinstance(t_range, (tuple, list)) or len(t_range) != 2 or not t_range[0] < t_range[1]:
        raise UserError(f"t_range must hold a lower and an upper time, got {t_range!r}")
    low, high = t_range
    times = torch.tensor([low, (low + high) / 2, high], dtype=torch.float64)
    for name, (scale, rate) in functions.items():
        _check(name, scale(times), times)
        _check(f"d{name}", _derivative(scale, rate, times), times)
    if b is None:
        return CustomOneSided(functions=((a, da), (c, dc)), times=(low, high), **settings)
    return CustomTwoSided(functions=((a, da), (b, db), (c, dc)), times=(low, high), **settings)


def _check(name: str, value: object, t: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != t.shape:
        raise UserError(f"{name} must return one value a time, as a tensor shaped like its times")
    if host_checks_allowed(value) and not torch.isfinite(value).all():
        raise UserError(f"{name} must be finite on t_range [{t[0]:g}, {t[-1]:g}]: clip its ends off")


def _derivative(scale: Scalar, rate: Scalar | None, t: Tensor) -> Tensor:
    if rate is not None:
        return rate(t)
    # The scale is elementwise, so the gradient of the sum holds every row's own derivative.
    return torch.func.grad(lambda t: scale(t).sum())(t)


Functions = tuple[tuple[Scalar, Scalar | None], ...]


@dataclass(frozen=True)
class CustomOneSided(OneSidedPath):
    """The path of :func:`custom` without ``b``: ``functions`` holds ``(a, a'), (c, c')``, ``times`` the range."""

    functions: Functions = field(kw_only=True)
    times: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.times

    def scales(self, t: Tensor) -> Pair:
        a, c = (scale(t) for scale, _ in self.functions)
        return a, c

    def rates(self, t: Tensor) -> Pair:
        da, dc = (_derivative(scale, rate, t) for scale, rate in self.functions)
        return da, dc


@dataclass(frozen=True)
class CustomTwoSided(TwoSidedPath):
    """The path of :func:`custom` with ``b``: ``functions`` holds ``(a, a'), (b, b'), (c, c')``."""

    functions: Functions = field(kw_only=True)
    times: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.times

    def scales(self, t: Tensor) -> Triple:
        a, b, c = (scale(t) for scale, _ in self.functions)
        return a, b, c

    def rates(self, t: Tensor) -> Triple:
        da, db, dc = (_derivative(scale, rate, t) for scale, rate in self.functions)
        return da, db, dc
