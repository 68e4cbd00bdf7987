"""A teacher that looks further: the data at which it arrives from ``x_t`` in several steps, as a network's output.

An objective that compares a sample with the teacher's prediction of the data may take this in its place. With SDS it is
SparseFusion's target (Zhou and Tulsiani, 2212.00792): one step gives the mean of all data that may lie behind ``x_t``,
several steps one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..coefficients import Coefficients
from ..errors import UserError
from ..paths import OneSidedPath, Path
from ..paths.base import PRECONDITIONED
from .calls import LINEAR, call, converted, ends


@torch.no_grad()
def multi_step(
    net: nn.Module,
    t: Tensor,
    x_t: Tensor,
    steps: int,
    labels: Tensor | None = None,
    path: Path = LINEAR,
    predict: str = "velocity",
    guidance: float | Tensor = 1.0,
) -> Tensor:
    """The raw output ``F`` like ``x_t`` that says what ``net`` says of the data after ``steps`` DDIM steps.

    Each row goes from its own time to the data's end in steps equal in time, and ``k_out F + k_x x_t`` is the
    prediction of the data in the last of them. With one step it is ``net``'s own output.

    Args:
        net: a network, called as the path says for its prediction.
        t: path times ``(B,)``.
        x_t: states ``(B, ...)``.
        steps: at least 1.
        labels: ``(B,)`` int64 for class-conditional networks.
        path, predict: the path and the prediction that the network was trained on.
        guidance: scale of classifier-free guidance, 1 for none.

    Raises:
        UserError: fewer than one step, or a two-sided path.
    """
    path = _checked(steps, path)
    (low, high), data, x = path.time_range("x0", predict), ends(path).data, x_t

    def scales(time: Tensor) -> tuple[Tensor, ...]:
        both = path.scales(time.clamp(*path.t_range))
        return tuple(scale.to(x_t.dtype).view(-1, *[1] * (x_t.dim() - 1)) for scale in both)

    for i in range(steps):
        now, then = (t + (data - t) * (place / steps) for place in (i, i + 1))
        seen = now.clamp(low, high)
        out = call(net, seen, x, labels, path, predict, None, guidance)
        if steps == 1:
            return out
        x0 = converted(path, "x0", predict, seen, out, x)
        (a, c), (a_then, c_then) = scales(now), scales(then)
        # A time that rounding has put at the data's end has no noise: its row stays where it is.
        kept = torch.where(c > 0, c_then / c, 0.0)
        x = (a_then - kept * a) * x0 + kept * x
    coef = Coefficients(path.coefficients(t.clamp(low, high), "x0", predict).to(x_t.dtype), x_t)
    return torch.where(coef.k_out != 0, (x0 - coef.k_x * x_t) / coef.k_out, 0.0)


class MultiStep(nn.Module):
    """:func:`multi_step` of a teacher, called as the teacher is: ``net(time, x_t, y)``.

    Raises:
        UserError: as :func:`multi_step`; a preconditioned prediction, whose network sees neither ``t`` nor ``x_t``.
    """

    guided = True  # it takes the scale of a guidance, and guides each of its steps

    def __init__(self, net: nn.Module, steps: int, path: Path, predict: str) -> None:
        super().__init__()
        _checked(steps, path)
        if predict in PRECONDITIONED:
            raise UserError(
                f"target_steps need a network that is called with x_t itself, not one that predicts {predict}"
            )
        self.net, self.steps, self.path, self.predict = net, steps, path, predict
        self._scale = float(path.network_time(torch.ones(1, dtype=torch.float32), predict))

    def forward(self, time: Tensor, x: Tensor, y: Tensor | None = None, guidance: float | Tensor = 1.0) -> Tensor:
        """``F`` like ``x``."""
        return multi_step(self.net, time / self._scale, x, self.steps, y, self.path, self.predict, guidance)


def _checked(steps: int, path: Path) -> OneSidedPath:
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if not isinstance(path, OneSidedPath):
        raise UserError(f"target_steps need a path from noise alone to data, not {type(path).__name__}")
    return path
