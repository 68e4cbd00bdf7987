"""The samples' weights of the f-divergences that distribution matching can descend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .contracts import check_tensor
from .errors import UserError

# h(r) = r^2 f''(r) with r = p_d / p_g, as a function of u = log r.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,  # f = -log r
    "forward-kl": torch.exp,  # f = r log r
    "jeffreys": lambda u: 1 + torch.exp(u),  # f = (r - 1) log r
    "jensen-shannon": torch.sigmoid,  # f = r log r - (r + 1) log((r + 1) / 2)
    "squared-hellinger": lambda u: torch.exp(u / 2) / 2,  # f = (1 - sqrt(r))^2
    "softened-reverse-kl": lambda u: torch.sigmoid(-u),  # f = (r + 1) log((r + 1) / (2 r))
    "neyman": lambda u: torch.exp(-u),  # f = (1 - r)^2 / (2 r), half of Neyman's chi^2
    "pearson": lambda u: torch.exp(2 * u),  # f = (1 - r)^2 / 2, half of Pearson's chi^2
}


DIVERGENCES = tuple(WEIGHTS)


def divergence_weight(divergence: str, log_ratio: Tensor) -> Tensor:
    """The samples' weights with which distribution matching descends an f-divergence instead of reverse KL.

    ``h(r) = r^2 f''(r)`` for ``D_f = E_{p_g} f(r)``, ``r = p_d / p_g`` at ``x_t``: multiply it into the rows' weights,
    ``Coefficients(coef).w.mul_(divergence_weight(...))``, for :func:`~realuid_fast.objectives.DiffInstruct` or
    :func:`~realuid_fast.objectives.DMD`. :func:`realuid_fast.descent.generator_grads` does so, and has the weights'
    part in Uni-Instruct with :func:`~realuid_fast.objectives.SiD`. Source: Xu et al., f-distill (2502.15681), theorem 1
    and table 1.

    Args:
        divergence: ``"reverse-kl"`` (1: the plain objectives), ``"forward-kl"``, ``"jeffreys"``, ``"jensen-shannon"``,
            ``"squared-hellinger"``, ``"softened-reverse-kl"`` (``1 / (1 + r)``), ``"neyman"`` (``1 / r``) or
            ``"pearson"`` (``r^2``). FastGen calls the first seven ``rkl``, ``kl``, ``jf``, ``js``, ``sh`` (twice ours),
            ``sf`` and ``neyman``.
        log_ratio: ``log p_d(x_t) - log p_g(x_t)``, ``(R,)``, for instance a discriminator's logits.

    Returns:
        ``(R,)``, without gradient: the weights are held fixed.

    Raises:
        UserError: another name.
    """
    if not isinstance(divergence, str) or divergence not in WEIGHTS:
        raise UserError(f"divergence must be one of {', '.join(WEIGHTS)}; got {divergence!r}")
    check_tensor("log_ratio", log_ratio)
    return WEIGHTS[divergence](log_ratio.detach())
