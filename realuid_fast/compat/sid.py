"""SiD's losses, same class, arguments and sums, computed by the fused calls.

Source: mingyuanzhou/SiD at revision 01fbb13, ``training/sid_loss.py``. The source returns a loss for every element,
which its training loop sums. These return a loss for every sample, ``(B,)``, with the same sum and gradients. Times and
noise are drawn by the same calls in the same order, so one seed gives both the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..errors import UserError
from ..objectives import Objective
from . import elements

_SIGMA_MIN, _SIGMA_MAX, _RHO = 0.002, 80.0, 7.0


class SID_EDMLoss:
    """Score identity distillation's two losses on EDM networks, ``net(x_t, sigma, labels, augment_labels=...)``.

    Args:
        P_mean, P_std: mean and standard deviation of ``log sigma`` in the fake model's loss.
        sigma_data: of the weight ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2`` there.
        beta_d, beta_min: without effect, as in the source.
        drop_nan: whether a sample with NaN in it, or in a prediction of it, has loss and gradient 0. The source leaves
            such samples out, after the host has looked for them; here nothing waits. False saves the passes that look.
    """

    def __init__(
        self,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        sigma_data: float = 0.5,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        *,
        drop_nan: bool = True,
    ) -> None:
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data
        self.beta_d, self.beta_min, self.drop_nan = beta_d, beta_min, drop_nan

    def generator_loss(
        self,
        true_score: Callable[..., Tensor],
        fake_score: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        alpha: float = 1.2,
        tmax: float = 800,
    ) -> Tensor:
        """``<D, f* - x> - alpha ||D||^2`` with ``D = f* - f``, divided by ``mean |x - f*|``, a sum a sample; ``(B,)``.

        ``sigma`` is on Karras' schedule, uniform up to ``tmax / 1000`` of it. The mean is held fixed and at least 1e-5.

        Args:
            true_score, fake_score: teacher and fake model, frozen; gradients flow through both into ``images``.
            images: generated samples ``(B, C, H, W)``.
            labels: passed to the networks as they are.
            augment_pipe: None, or a function of images that returns them augmented, with their augmentation labels.
            alpha: weight of ``||D||^2``.
            tmax: the share of the schedule that is drawn from, in thousandths.

        Raises:
            UserError: images that are no batch of floating-point numbers, an ``alpha`` that is no finite number.
        """
        x = elements.samples("images", images)
        share = torch.rand([len(x), 1, 1, 1], device=x.device) * tmax / 1000
        low, high = _SIGMA_MIN ** (1 / _RHO), _SIGMA_MAX ** (1 / _RHO)
        sigma = (high + (1 - share) * (low - high)) ** _RHO
        x, augmented = augment_pipe(x) if augment_pipe is not None else (x, torch.zeros(len(x), 9, device=x.device))
        x_t = self._noisy(x, sigma)
        f_true = true_score(x_t, sigma, labels, augment_labels=augmented)
        f_fake = fake_score(x_t, sigma, labels, augment_labels=augmented)
        x, f_true, f_fake = self._kept(images=x, true_score=f_true, fake_score=f_fake)
        objective = Objective("SiD", alpha=1.0, beta=1.0, gamma=1.0, Q=2 * _number(alpha), sample_scale=0.5)
        coef = elements.coefficient_rows(x, p=1.0, w=1.0)
        return functional.generator_loss(
            objective, teacher_out=f_true, fake_out=f_fake, x=x, x_t=None, coef=coef, noise=f_true.detach(),
            reduction="none",
        )  # fmt: skip

    def __call__(
        self,
        fake_score: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """``weight ||f - x||^2``, a sum a sample; ``(B,)``, differentiable in the fake model's output.

        Raises:
            UserError: images that are no batch of floating-point numbers, or that require a gradient.
        """
        x = elements.samples("images", images)
        sigma = (torch.randn([len(x), 1, 1, 1], device=x.device) * self.P_std + self.P_mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        x, augmented = augment_pipe(x) if augment_pipe is not None else (x, None)
        out = fake_score(self._noisy(x, sigma), sigma, labels, augment_labels=augmented)
        x, out = self._kept(images=x, fake_score=out)
        coef = elements.coefficient_rows(x, p=1.0, w=weight.flatten())
        return functional.matching_loss(out=out, x=x, x_t=None, coef=coef, noise=x, reduction="none")

    @staticmethod
    def _noisy(x: Tensor, sigma: Tensor) -> Tensor:
        coef = elements.coefficient_rows(x, a=1.0, c=sigma.flatten())
        return functional.interpolate(x, coef, torch.randn_like(x))

    def _kept(self, **given: Tensor) -> list[Tensor]:
        tensors = elements.together(**given)
        if not self.drop_nan:
            return tensors
        lost = torch.stack([tensor.detach().flatten(1).isnan().any(1) for tensor in tensors]).any(0)
        lost = lost.view(-1, *[1] * (tensors[0].dim() - 1))
        return [tensor.masked_fill(lost, 0.0) for tensor in tensors]


def _number(alpha: Any) -> float:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise UserError(f"alpha must be a number, not {alpha!r}")
    return float(alpha)
