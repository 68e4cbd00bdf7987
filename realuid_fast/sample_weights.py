"""The weights that an objective gives to the samples of a generator call: SiD's, a distance's, the normalised ones'."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .coefficients import Coefficients
from .objectives import Objective
from .tensors import Guidance

_LEAST_ERROR = 1e-5
_LEAST_NORM = 1e-5


def weighed(
    objective: Objective,
    teacher_out: Tensor,
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None,
    guided: Guidance,
) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor | None]:
    """The weights that an objective gives to the samples of a generator call.

    Only :func:`~realuid_fast.objectives.SiD` and its like (``sample_scale``), objectives with a distance and normalised
    ones weigh samples. The weight and ``Q`` of the last two take two passes that write no gradients: one for ``<D,
    r>``, and one over the two outputs alone for ``||D||^2``.

    With a distance the loss is ``w g (<D, r> - q)``, ``q = Q/2 ||D||^2``. Its gradient in ``D`` is ``w g (r - Q D + 2
    g' / g (<D, r> - q) D)``. The kernel's is ``w (r - Q_row / 2 D)``, so it is called with ``w g`` and with ``Q_row = 2
    Q - 4 g' / g (<D, r> - q)``.

    Returns:
        Coefficient rows with the weight in ``w``. The operator's ``teacher_uncond, guidance, q_rows``. The rows'
        losses if the operator returns the values of another loss with the same gradients, else None.
    """
    extra = (*guided, None)
    if not objective.weighs_samples:
        return coef, extra, None
    namespace, (uncond, scales) = ops.current(x.device), guided
    with torch.no_grad():
        if objective.sample_scale:
            other = None if uncond is None else uncond.to(x.dtype)
            error = namespace.mean_abs_error(teacher_out.to(x.dtype), x, x_t, coef, other, scales)
            scale = torch.ones_like(coef)
            # If the teacher predicts a sample exactly, its error is 0 and its weight would be infinite.
            Coefficients(scale).w.copy_(objective.sample_scale / error.clamp(min=_LEAST_ERROR))
            return coef * scale, extra, None
        loss = namespace.generator_loss
        one, apart, weights = coef.clone(), torch.zeros_like(coef), coef.clone()
        Coefficients(one).w.fill_(1.0)
        Coefficients(apart).w.fill_(1.0)
        Coefficients(apart).k_out.copy_(Coefficients(coef).k_out)
        inputs = (teacher_out, fake_out, x, x_t, one, noise, endpoint, *extra)
        dots = loss(*inputs, *objective.generator_scalars, False)
        squares = loss(teacher_out, fake_out, fake_out, None, apart, noise, None, *extra, 0.0, 0.0, -1.0, 1.0, False)
        if objective.distance is not None:
            w = Coefficients(weights).w.mul_(objective.distance.gain(squares))
            value = dots - objective.Q / 2 * squares
            return weights, (uncond, scales, 2 * objective.Q - 4 * objective.distance.bend(squares) * value), w * value
        norms = squares.sqrt().clamp(min=_LEAST_NORM)
        w = Coefficients(weights).w.div_(norms)
        # A norm that is clamped is a constant, so its derivative, and with it Q, is 0.
        q_rows = torch.where(squares > _LEAST_NORM**2, 2 * dots / norms**2, torch.zeros_like(dots))
        return weights, (uncond, scales, q_rows), w * dots


def mean_of(rows: Tensor) -> Tensor:
    """The mean of the rows' losses, 0 of no rows."""
    return rows.sum() / max(len(rows), 1)
