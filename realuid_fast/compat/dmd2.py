"""DMD2's losses on EDM networks, same arguments and results, computed by the fused calls.

Source: tianweiy/DMD2 at revision 8d8fa55, ``main/edm/edm_guidance.py``. The two functions are methods of its class and
take an object of it, so they can stand in their place::

    EDMGuidance.compute_distribution_matching_loss = realuid_fast.compat.dmd2.compute_distribution_matching_loss
    EDMGuidance.compute_loss_fake = realuid_fast.compat.dmd2.compute_loss_fake

Times and noise are drawn by the same calls in the same order, so one seed gives both the same numbers. What differs:
nothing is read on the host, so ``dmtrain_gradient_norm`` is a tensor and no number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from . import elements


def compute_distribution_matching_loss(
    guidance: Any, latents: Tensor, labels: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``0.5 mean g^2`` over all ``N`` elements, with the gradient ``g / N`` in ``latents``.

    ``g = (f - f*) / mean |x - f*|``, a mean a sample, at a step of the Karras schedule drawn between ``min_step`` and
    ``max_step``. NaN in ``g`` counts as 0.

    Args:
        guidance: gives ``real_unet``, ``fake_unet``, ``karras_sigmas``, ``min_step``, ``max_step`` and
            ``num_train_timesteps``. The networks are called as ``net(x_t, sigma, labels)``, without gradient.
        latents: generated samples ``(B, ...)``.
        labels: passed to the networks as they are.

    Returns:
        ``{"loss_dm": loss}``, float32 (float64 for float64), and the log: noisy latents, both predictions, ``g``, its
        norm and the steps.

    Raises:
        UserError: latents or predictions that do not fit.
    """
    x = elements.samples("latents", latents).detach()
    with torch.no_grad():
        steps = _steps(x, guidance.min_step, min(guidance.max_step + 1, guidance.num_train_timesteps))
        sigma = guidance.karras_sigmas[steps]
        noisy = _noisy(x, torch.randn_like(x), sigma)
        real, fake = guidance.real_unet(noisy, sigma, labels), guidance.fake_unet(noisy, sigma, labels)
    names = ("latents", "real_unet", "fake_unet")
    loss, grad = elements.distillation_loss(names, latents, real, fake, drop_nan=True)
    log = {
        "dmtrain_noisy_latents": noisy,
        "dmtrain_pred_real_image": real,
        "dmtrain_pred_fake_image": fake,
        "dmtrain_grad": grad * latents.numel(),
        # The norm of g, since the loss is 0.5 mean g^2.
        "dmtrain_gradient_norm": (2 * latents.numel() * loss.detach()).sqrt(),
        "dmtrain_timesteps": steps,
    }
    return {"loss_dm": loss}, log


def compute_loss_fake(
    guidance: Any, latents: Tensor, labels: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``mean w (f - x)^2`` over all elements, ``w = sigma^-2 + sigma_data^-2``, at any step of the schedule.

    Args:
        guidance: gives ``fake_unet``, ``karras_sigmas``, ``num_train_timesteps`` and ``sigma_data``.
        latents: generated samples ``(B, ...)``; they are held fixed.
        labels: passed to the fake model as they are.

    Returns:
        ``{"loss_fake_mean": loss}``, differentiable in the fake model's output, and the log.

    Raises:
        UserError: latents or predictions that do not fit.
    """
    x = elements.samples("latents", latents).detach()
    noise = torch.randn_like(x)
    sigma = guidance.karras_sigmas[_steps(x, 0, guidance.num_train_timesteps)]
    noisy = _noisy(x, noise, sigma)
    fake = guidance.fake_unet(noisy, sigma, labels)
    out, x = elements.together(fake_unet=fake, latents=x)
    weights = (sigma**-2 + 1 / guidance.sigma_data**2).flatten()
    coef = elements.coefficient_rows(x, p=1.0, w=weights / elements.size(x))
    loss = functional.matching_loss(out=out, x=x, x_t=None, coef=coef, noise=x)
    log = {
        "faketrain_latents": x,
        "faketrain_noisy_latents": noisy,
        "faketrain_x0_pred": fake.detach(),
    }
    return {"loss_fake_mean": loss}, log


def _steps(x: Tensor, first: int, last: int) -> Tensor:
    return torch.randint(first, last, [len(x), 1, 1, 1], device=x.device, dtype=torch.long)


def _noisy(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return functional.interpolate(x, elements.coefficient_rows(x, a=1.0, c=sigma.flatten()), noise)
