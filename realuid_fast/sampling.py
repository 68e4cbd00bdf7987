"""Sampling: Euler and Heun integration of a multi-step teacher on the linear path, and the one-step
generator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import UserError

SOLVERS = ("euler", "heun")


@torch.no_grad()
def integrate(
    net: nn.Module,
    noise: Tensor,
    steps: int,
    solver: str = "euler",
    labels: Tensor | None = None,
    t_start: float = 0.0,
) -> Tensor:
    """Solve ``dx/dt = net(t, x)`` from noise at ``t_start`` to data at ``t = 1`` in ``steps`` equal steps.

    ``net`` predicts the velocity ``x - n`` of the linear path ``x_t = t x + (1 - t) n``.  Euler takes one
    evaluation a step; Heun (trapezoid, second order) takes two.

    Args:
        net: called as ``net(t, x, y)`` with ``t`` of shape (B,).
        noise: the state at ``t_start``, (B, ...); standard normal for ``t_start = 0``.
        steps: number of steps, at least 1.
        solver: ``"euler"`` or ``"heun"``.
        labels: (B,) int64 for class-conditional networks.
        t_start: time to start from, in [0, 1).

    Returns:
        Samples like ``noise``.  Raises :class:`UserError` for an unknown solver or bad numbers.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if solver not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if not 0.0 <= t_start < 1.0:
        raise UserError(f"t_start must lie in [0, 1), got {t_start}")
    h = (1.0 - t_start) / steps
    x = noise
    for i in range(steps):
        t = x.new_full((len(x),), t_start + i * h, dtype=torch.float32)
        slope = net(t, x, labels)
        if solver == "euler":
            x = torch.add(x, slope, alpha=h)
        else:
            ahead = net(t + h, torch.add(x, slope, alpha=h), labels)
            x = torch.add(x, slope + ahead, alpha=h / 2)
    return x


def evaluations(steps: int, solver: str = "euler") -> int:
    """Network evaluations per sample of :func:`integrate`."""
    return steps * (2 if solver == "heun" else 1)


def one_step(net: nn.Module, z: Tensor, t_start: float = 0.0, labels: Tensor | None = None) -> Tensor:
    """The generator ``G(z) = x + (1 - t0) net(t0, x)`` with ``x = (1 - t0) z``: one evaluation,
    differentiable.

    This is one Euler step of the linear path from ``t0 = t_start`` to 1.  Started at ``t0 = 0`` a velocity
    network returns the mean of the data whatever ``z``; at ``t0`` near 0.28 (noise level ``(1 - t0)/t0 =
    2.5``, the choice of SiD, Zhou et al., 2024, arXiv:2404.04057) a teacher already gives a blurred, varied
    sample to start the distillation from.

    Args:
        net: called as ``net(t, x, y)``.
        z: standard normal noise (B, ...).
        t_start: ``t0`` in [0, 1).
        labels: (B,) int64 for class-conditional networks.
    """
    if not 0.0 <= t_start < 1.0:
        raise UserError(f"t_start must lie in [0, 1), got {t_start}")
    x = z * (1.0 - t_start) if t_start else z
    t = z.new_full((len(z),), t_start, dtype=torch.float32)
    return torch.add(x, net(t, x, labels), alpha=1.0 - t_start)
