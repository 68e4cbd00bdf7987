"""Progressive halving of a teacher's steps: a network of ``N`` steps learns two of its teacher's ``2 N`` DDIM steps.

From ``z_t`` at a time of the student's grid the teacher takes two steps, to ``z''``. The target is the prediction of
the data from which one step leads there::

    x~ = (z'' - c''/c z_t) / (a'' - c''/c a)        a, c at t, a'', c'' two of the teacher's steps nearer to the data

On the linear path a DDIM step is Euler's, and the target's velocity is the mean of the teacher's two. Source: Salimans
and Ho, Progressive Distillation (2202.00512), algorithm 2; for a network that takes the scale of its guidance it is the
second stage of Meng et al. (2210.03142).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..coefficients import Coefficients
from ..errors import UserError
from ..matching import Matching
from ..paths import OneSidedPath, Path
from .calls import call, converted, ends, follows_flow, scales
from .solvers import grid


class Halving:
    """The times and the targets of a student of ``steps`` DDIM steps.

    Args:
        teacher: the frozen network of ``2 steps`` steps.
        steps: the student's steps.
        path, predict: the path and the prediction of both networks.
        device: the device of the tables.

    Raises:
        UserError: fewer than one step, a two-sided path, or a prediction without a probability flow.
    """

    def __init__(self, teacher: nn.Module, steps: int, path: Path, predict: str, device: torch.device) -> None:
        if not isinstance(path, OneSidedPath) or not follows_flow(path, predict):
            raise UserError(f"halved needs a path from noise alone to data, not {type(path).__name__}")
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        self.teacher, self.steps, self.path, self.predict = teacher, steps, path, predict
        start, data = ends(path)
        low, high = path.time_range("x0", predict)
        shares = grid(path, min(max(start, low), high), data, 2 * steps)
        times = [time for time, _ in shares] + [data]
        inside = [min(max(time, low), high) for time in times]
        # Rows of the network's time, a and c, one for each time of the teacher's grid.
        rows = [(seen, *scales(path, time)[::2]) for time, seen in zip(times, inside, strict=True)]
        self._rows = torch.tensor(rows, dtype=torch.float64).to(device)

    def times(self, matching: Matching, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times ``(count,)`` of the student's grid, drawn evenly, and their coefficients by ``matching``."""
        step = torch.randint(self.steps, (count,), generator=draws, device=draws.device)
        t = self._rows[2 * step, 0].float()
        return t, matching.coefficients(t)

    def target(self, t: Tensor, z_t: Tensor, labels: Tensor | None = None, guidance: float | Tensor = 1.0) -> Tensor:
        """The raw output ``F`` like ``z_t`` that gives ``x~`` at times ``t`` ``(B,)`` of the student's grid."""
        # The row whose time this is. Times of the grid are apart by more than their rounding.
        first = 2 * (self._rows[:-1:2, 0] - t[:, None].to(self._rows)).abs().argmin(1)
        (_, a, c), z = self._at(first, z_t), z_t
        for step in range(2):
            (time, a_now, c_now), (_, a_then, c_then) = self._at(first + step, z), self._at(first + step + 1, z)
            time = time.flatten().to(t)
            out = call(self.teacher, time, z, labels, self.path, self.predict, None, guidance)
            x0 = converted(self.path, "x0", self.predict, time, out, z)
            z = (a_then - c_then / c_now * a_now) * x0 + c_then / c_now * z
        x0 = (z - c_then / c * z_t) / (a_then - c_then / c * a)
        coef = Coefficients(self.path.coefficients(t, "x0", self.predict).to(z_t.dtype), z_t)
        return (x0 - coef.k_x * z_t) / coef.k_out

    def _at(self, rows: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """Time, ``a`` and ``c`` of rows of the table, in the shape that multiplies ``like``."""
        return tuple(self._rows[rows].to(like.dtype).view(-1, 3, *[1] * (like.dim() - 1)).unbind(1))
