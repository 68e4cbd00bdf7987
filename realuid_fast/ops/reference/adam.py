"""The optimiser step in plain torch, by torch's foreach functions."""

from __future__ import annotations

import torch
from torch import Tensor


def begin_step_(grads: list[Tensor], steps: list[Tensor], counts: Tensor) -> Tensor:
    """The global norm of ``grads``. Counts the update in ``counts`` and, if the norm is finite, in each of ``steps``.

    ``counts`` is int64 ``(2,)``: updates begun, and those among them whose norm was not finite.
    """
    norm = torch.nn.utils.get_total_norm(grads)
    finite = torch.isfinite(norm)
    for step in steps:
        step += finite
    counts += torch.stack((torch.ones_like(finite), ~finite))
    return norm


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    norm: Tensor,
    step: Tensor,
    lr: Tensor,
    counts: Tensor,
    ema_decays: Tensor,
    clip: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    ema_warmup: bool,
) -> None:
    """Adam on ``params`` after :func:`begin_step_`, then the averages; nothing changes if ``norm`` is not finite.

    ``lr`` holds the rates of updates 0, 1, ...; all later updates use its last entry. If ``beta1`` is 0, ``exp_avgs``
    may be empty.
    Each of ``emas`` is ``(E, ...)``, a row for each of ``ema_decays`` ``(E,)``.
    """
    finite, dtype = torch.isfinite(norm), params[0].dtype

    def number(value: Tensor) -> Tensor:
        return value.to(dtype)

    def kept(decay: float) -> Tensor:
        return number(1 - (1 - decay) * finite.double())

    factor = torch.where(norm > clip, clip / norm.double(), 1.0) if clip else torch.ones_like(norm)
    scaled = list(torch._foreach_mul(grads, number(-factor if maximize else factor)))
    if weight_decay:
        torch._foreach_add_(scaled, params, alpha=weight_decay)
    # A skipped step is carried out with gradient, rates and weights of 0, so that the host need not know of it. 0 times
    # NaN is NaN, so the gradients' bits are multiplied: a GPU gets one launch for many gradients, as everywhere below.
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    torch._foreach_mul_([grad.view(bits) for grad in scaled], finite.to(bits))
    torch._foreach_mul_(exp_avg_sqs, kept(beta2))
    torch._foreach_addcmul_(exp_avg_sqs, scaled, scaled, value=1 - beta2)
    moments: list[Tensor] = scaled
    if exp_avgs:
        torch._foreach_mul_(exp_avgs, kept(beta1))
        torch._foreach_add_(exp_avgs, scaled, alpha=1 - beta1)
        moments = exp_avgs

    # If the very first step is skipped, no step has been taken yet, and the corrections below would divide by 0.
    taken = step.double().clamp(min=1.0)
    rate = torch.take(lr, (counts[0] - 1).clamp(0, lr.numel() - 1)).double() / (1 - beta1**taken)
    divisors = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(divisors, number((1 - beta2**taken).sqrt()))
    torch._foreach_add_(divisors, eps)
    changes = torch._foreach_div(moments, divisors)
    torch._foreach_mul_(changes, number(torch.where(finite, -rate, 0.0)))
    torch._foreach_add_(params, changes)
    if ema_decays.numel():
        average_(params, emas, norm, counts, ema_decays, ema_warmup)


def average_(
    params: list[Tensor], emas: list[Tensor], norm: Tensor, counts: Tensor, ema_decays: Tensor, ema_warmup: bool
) -> None:
    """Move every row of ``emas[i]`` by one minus its decay towards ``params[i]``, unless ``norm`` is not finite."""
    decays = ema_decays.double()
    if ema_warmup:
        updates = counts[0].double()
        decays = torch.minimum(decays, updates / (updates + 9.0))
    weights = torch.where(torch.isfinite(norm), 1 - decays, 0.0).to(params[0].dtype)
    for k, weight in enumerate(weights):
        rows = [ema[k] for ema in emas]
        gaps = torch._foreach_sub(params, rows)
        torch._foreach_mul_(gaps, weight)
        torch._foreach_add_(rows, gaps)
