"""Minibatch optimal-transport couplings: which endpoint of a batch goes with which sample.

Endpoints (or noise) that are drawn independently of the data are paired with it at random. If they are paired by least
squared distance inside the batch instead, a flow's paths cross less and are nearer to straight lines. Source: Tong et
al. (2302.00482), section 3; Pooladian et al., Multisample Flow Matching (2304.14772), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contracts import check_tensor
from .errors import UserError
from .extras import extra


def couple(x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
    """The permutation ``j`` that minimises ``sum_i ||x_i - y_j(i)||^2``, exactly.

    ``path.coefficients`` and the fused calls then take ``endpoint=y[j]``, or ``noise=y[j]`` on a one-sided path.
    Squared distances are computed on the tensors' device in float32 (float64 for float64). SciPy solves the assignment
    on the host in time ``O(B^3)``. That takes one transfer of ``(B, B)`` distances, which waits for the device, so
    couple batches when they are loaded, outside a captured graph.

    Args:
        x: data, ``(B, ...)``, floating.
        y: endpoints or noise like ``x``.
        labels: ``(B,)``, the classes of ``x``. Row ``i`` of ``y`` belongs to the class of row ``i`` of ``x``, and pairs
            form inside a class only: coupling across classes would make the noise that a class sees depend on it
            (Cheng and Schwing, The Curse of Conditions, 2503.10636).

    Returns:
        int64 ``(B,)`` on ``x``'s device, so that ``y[j]`` is coupled with ``x``. Without gradient.

    Raises:
        UserError: shapes, dtypes or devices do not agree, a value is not finite, or SciPy is missing.
    """
    _check(x, y, labels)
    with torch.no_grad():
        if labels is None:
            return _assign(x, y)
        permutation = torch.empty(len(x), dtype=torch.int64, device=x.device)
        for label in labels.unique():
            rows = torch.nonzero(labels == label).squeeze(1)
            permutation[rows] = rows[_assign(x[rows], y[rows])]
        return permutation


def _assign(x: Tensor, y: Tensor) -> Tensor:
    solve = _solver()
    # Only the inner products of the centred batches depend on the pairing: every other part of the squared distances
    # adds the same to all permutations and would cost digits.
    x, y = (
        (v.flatten(1) if v.dim() > 1 else v[:, None]).to(torch.promote_types(v.dtype, torch.float32)) for v in (x, y)
    )
    gain = ((x - x.mean(0)) @ (y - y.mean(0)).T).cpu()
    if not torch.isfinite(gain).all():
        raise UserError("x and y must be finite to be coupled")
    _, columns = solve(gain.double().numpy(), maximize=True)
    return torch.from_numpy(columns).to(device=x.device, dtype=torch.int64)


def _solver() -> Callable[..., Any]:
    with extra():
        from scipy.optimize import linear_sum_assignment
    return linear_sum_assignment


def _check(x: Tensor, y: Tensor, labels: Tensor | None) -> None:
    for name, value in (("x", x), ("y", y), *([] if labels is None else [("labels", labels)])):
        check_tensor(name, value)
    if x.dim() == 0 or not x.is_floating_point():
        raise UserError(f"x must be a floating batch, (B, ...), not {x.dtype} of shape {tuple(x.shape)}")
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise UserError(
            f"y must be like x, {x.dtype} of shape {tuple(x.shape)} on {x.device}, not {y.dtype} of shape "
            f"{tuple(y.shape)} on {y.device}"
        )
    if labels is not None and (labels.shape != x.shape[:1] or labels.device != x.device):
        raise UserError(
            f"labels must have shape ({len(x)},) on {x.device}, not {tuple(labels.shape)} on {labels.device}"
        )
