"""Model Optimizer's losses for one-step distillation, same names, arguments and values, by the fused calls.

Source: NVIDIA/Model-Optimizer at revision a2fbac7, ``modelopt/torch/fastgen/losses.py``, which restates FastGen's.
:mod:`realuid_fast.compat.fastgen` says what differs here. The source's adversarial losses take a few logits a
sample and have no counterpart here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..contracts import check_tensor
from ..errors import UserError
from . import elements, fastgen

_Scale = Callable[[Tensor], Tensor]


def dsm_loss(
    pred_type: str,
    net_pred: Tensor,
    *,
    x0: Tensor | None = None,
    eps: Tensor | None = None,
    t: Tensor | None = None,
    alpha_fn: _Scale | None = None,
    sigma_fn: _Scale | None = None,
) -> Tensor:
    """``mean (net_pred - target)^2``: :func:`~realuid_fast.compat.fastgen.denoising_score_matching_loss`.

    Args:
        pred_type, net_pred, x0, eps: as there.
        t, alpha_fn, sigma_fn: for ``"v"`` alone; ``alpha_fn(t)`` and ``sigma_fn(t)`` give one number a sample.

    Raises:
        UserError: as there.
    """

    def scales() -> tuple[Tensor, Tensor]:
        check_tensor("t", t)
        if alpha_fn is None or sigma_fn is None:
            missing = "alpha_fn" if alpha_fn is None else "sigma_fn"
            raise UserError(f"{missing} must be given for pred_type 'v': its value at t makes the target")
        return alpha_fn(t), sigma_fn(t)  # type: ignore[arg-type]

    return elements.denoising_loss(pred_type, net_pred, x0, eps, scales)


def vsd_loss(
    gen_data: Tensor, teacher_x0: Tensor, fake_score_x0: Tensor, additional_scale: Tensor | None = None
) -> Tensor:
    """``0.5 mean g^2``: :func:`~realuid_fast.compat.fastgen.variational_score_distillation_loss` under another name."""
    return fastgen.variational_score_distillation_loss(gen_data, teacher_x0, fake_score_x0, additional_scale)
