"""The samples' weights of the f-divergences that distribution matching can descend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .contracts import check_tensor
from .errors import UserError

# h(r) = r^2 f''(r) with r = p_d / p_g, as a function of u = log r.
_DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,  # f = -log r
    "forward-kl": torch.exp,  # f = r log r
    "jeffreys": lambda u: 1 + torch.exp(u),  # f = (r - 1) log r
    "jensen-shannon": torch.sigmoid,  # f = r log r - (r + 1) log((r + 1) / 2)
    "squared-hellinger": lambda u: torch.exp(u / 2) / 2,  # f = (1 - sqrt(r))^2
    "softened-reverse-kl": lambda u: torch.sigmoid(-u),  # f = (r + 1) log((r + 1) / (2 r))
    "neyman": lambda u: torch.exp(-u),  # f = (1 - r)^2 / (2 r), half of Neyman's chi^2
}


DIVERGENCES = tuple(_DIVERGENCES)


def divergence_weight(divergence: str, log_ratio: Tensor) -> Tensor:
    """The samples' weights with which distribution matching descends an f-divergence instead of reverse KL.

    ``h(r) = r^2 f''(r)`` for ``D_f = E_{p_g} f(r)``, ``r = p_d / p_g`` at ``x_t``: multiply it into the rows' weights,
    ``Coefficients(coef).w.mul_(divergence_weight(...))``, for :func:`~realuid_fast.objectives.DiffInstruct` or
    :func:`~realuid_fast.objectives.DMD`. Source: Xu et al.,
    f-distill (2502.15681), theorem 1 and table 1. With :func:`~realuid_fast.objectives.SiD` the weights of forward KL
    and Jeffreys' divergence are those of Uni-Instruct (Wang et al., 2505.20755), as its public code has them.

    Args:
        divergence: ``"reverse-kl"`` (1: the plain objectives), ``"forward-kl"``, ``"jeffreys"``, ``"jensen-shannon"``,
            ``"squared-hellinger"``, ``"softened-reverse-kl"`` (``1 / (1 + r)``) or ``"neyman"`` (``1 / r``). FastGen
            calls them ``rkl``, ``kl``, ``jf``, ``js``, ``sh`` (twice ours), ``sf`` and ``neyman``.
        log_ratio: ``log p_d(x_t) - log p_g(x_t)``, ``(R,)``, for instance a discriminator's logits.

    Returns:
        ``(R,)``, without gradient: the weights are held fixed.

    Raises:
        UserError: another name.
    """
    if not isinstance(divergence, str) or divergence not in _DIVERGENCES:
        raise UserError(f"divergence must be one of {', '.join(_DIVERGENCES)}; got {divergence!r}")
    check_tensor("log_ratio", log_ratio)
    return _DIVERGENCES[divergence](log_ratio.detach())
