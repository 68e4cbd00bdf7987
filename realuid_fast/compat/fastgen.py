"""FastGen's losses for one-step distillation, same names, arguments and values, computed by the fused calls.

Source: NVlabs/FastGen at revision 34f30e8, ``fastgen/methods/common_loss.py`` and
``fastgen/methods/distribution_matching/f_distill.py``. Its losses are means over all elements. What differs: they are
computed and returned in float32 (float64 for float64) whatever the tensors' dtype; a sample's weight is not rounded to
that dtype; a target takes no gradient. Nothing is read on the host, so CUDA graphs can hold every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..contracts import check_tensor
from ..errors import UserError
from ..objectives import divergence_weight
from . import elements

_DIVERGENCES = {
    "rkl": "reverse-kl",
    "kl": "forward-kl",
    "js": "jensen-shannon",
    "sf": "softened-reverse-kl",
    "neyman": "neyman",
    "sh": "squared-hellinger",
    "jf": "jeffreys",
}


def denoising_score_matching_loss(
    pred_type: str,
    net_pred: Tensor,
    x0: Tensor | None = None,
    eps: Tensor | None = None,
    noise_scheduler: Any = None,
    t: Tensor | None = None,
) -> Tensor:
    """``mean (net_pred - target)^2`` over all elements, for ``x_t = alpha x0 + sigma eps``.

    The target is ``x0``, ``eps``, ``alpha eps - sigma x0`` for ``"v"`` and ``eps - x0`` for ``"flow"``.

    Args:
        pred_type: ``"x0"``, ``"eps"``, ``"v"`` or ``"flow"``.
        net_pred: the network's output ``(R, ...)``; the loss is differentiable in it.
        x0, eps: clean samples and noise, as far as the target needs them.
        noise_scheduler, t: for ``"v"`` alone; ``noise_scheduler.alpha(t)`` and ``.sigma(t)`` give one number a sample.

    Raises:
        UserError: an unknown ``pred_type``, a tensor that is missing or does not fit, or a target with a gradient.
    """

    def scales() -> tuple[Tensor, Tensor]:
        check_tensor("t", t)
        if noise_scheduler is None:
            raise UserError(
                "noise_scheduler must be given for pred_type 'v': its alpha(t) and sigma(t) make the target"
            )
        return noise_scheduler.alpha(t), noise_scheduler.sigma(t)

    return elements.denoising_loss(pred_type, net_pred, x0, eps, scales)


def variational_score_distillation_loss(
    gen_data: Tensor, teacher_x0: Tensor, fake_score_x0: Tensor, additional_scale: Tensor | None = None
) -> Tensor:
    """``0.5 mean g^2`` over all ``N`` elements, with the gradient ``g / N`` in ``gen_data``.

    ``g = (fake_score_x0 - teacher_x0) additional_scale / (mean |gen_data - teacher_x0| + 1e-6)``, a mean a sample.
    The source takes ``g`` from the samples and compares them with the result, which rounds ``g`` to the samples'
    digits. Here ``g`` itself is the gradient, so it keeps its own.

    Args:
        gen_data: generated samples ``(R, ...)``; the loss is differentiable in them alone.
        teacher_x0, fake_score_x0: the teacher's and the fake model's prediction of them.
        additional_scale: one number or one a sample, such as f-distill's weights.

    Raises:
        UserError: tensors that do not fit.
    """
    names = ("gen_data", "teacher_x0", "fake_score_x0")
    return elements.distillation_loss(names, gen_data, teacher_x0, fake_score_x0, additional_scale, least=1e-6)[0]


def _f_div_weight(ours: str, factor: float, r: Tensor) -> Tensor:
    check_tensor("r", r)
    # The source bounds the ratio below for neyman alone, whose weight is its reciprocal.
    r = r.clamp(min=1e-8) if ours == "neyman" else r
    return factor * divergence_weight(ours, r.log())


# f-distill's weights as functions of r = p_data / p_generated. ``sh`` is twice what our formula gives.
all_f_div_weighting_function: dict[str, Callable[[Tensor], Tensor]] = {
    name: functools.partial(_f_div_weight, ours, 2.0 if name == "sh" else 1.0) for name, ours in _DIVERGENCES.items()
}


def get_f_div_weighting_h(model: Any, fake_logits: Tensor, t: Tensor) -> Tensor:
    """The samples' weights of f-distill, ``h(r) / mean h(r)``, for ``additional_scale``.

    ``r`` is ``exp`` of a sample's mean logit, between ``ratio_lower`` and ``ratio_upper``. With ``ratio_normalization``
    it is divided by its running mean in the sample's bucket of time. Sums are over all ranks. The source has it as its
    model's method ``_get_f_div_weighting_h``. This takes the model, so it can stand in that place::

        FdistillModel._get_f_div_weighting_h = realuid_fast.compat.fastgen.get_f_div_weighting_h

    The source counts with ``bincount`` and picks buckets by a mask, and both wait for the device. This does not wait.

    Args:
        model: gives ``config.f_distill``, ``f_div_weighting_function`` and, to normalise, ``net.noise_scheduler``,
            ``net.bins`` and ``bin_num``; ``net.bins`` is updated in place.
        fake_logits: the discriminator's logits ``(R, n)`` on generated samples.
        t: their times ``(R,)``.

    Returns:
        ``(R,)`` in the logits' dtype, without gradient.

    Raises:
        UserError: logits or times of another shape.
    """
    check_tensor("fake_logits", fake_logits)
    check_tensor("t", t)
    if fake_logits.dim() != 2 or t.shape != fake_logits.shape[:1]:
        raise UserError(
            f"fake_logits must have shape (R, n) and t (R,), not {tuple(fake_logits.shape)} and {tuple(t.shape)}"
        )
    settings = model.config.f_distill
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    with torch.no_grad():
        r = fake_logits.float().mean(1).clamp(-10.0, 10.0).exp().clamp(settings.ratio_lower, settings.ratio_upper)
        if settings.ratio_normalization:
            r = r / (_running_ratios(model, r, t, ranks) + 1e-6)
        # The source's function for rkl returns a single 1.
        h: Tensor = model.f_div_weighting_function(r).expand_as(r)
        total = h.sum()
        if ranks > 1:
            dist.all_reduce(total)
        return (h / (total / (len(r) * ranks) + 1e-6)).to(fake_logits.dtype)


def _running_ratios(model: Any, r: Tensor, t: Tensor, ranks: int) -> Tensor:
    """Each sample's running mean of ratios in its bucket of time, after this batch has been added to it; ``(R,)``."""
    schedule, bins = model.net.noise_scheduler, model.net.bins
    width = (schedule.max_t - schedule.min_t) / model.bin_num
    bucket = ((t.double() - schedule.min_t) / width).floor().long().clamp(0, model.bin_num - 1)
    inside = (bucket[:, None] == torch.arange(model.bin_num, device=t.device)).to(r.dtype)
    sums = torch.stack([torch.ones_like(r), r]) @ inside
    if ranks > 1:
        dist.all_reduce(sums)
    count, total = sums
    rate, old = model.config.f_distill.ratio_ema_rate, bins.float()
    new = torch.where(count > 0, rate * old + (1 - rate) * total / (count + 1e-6), old)
    bins.copy_(new)
    return new[bucket]
