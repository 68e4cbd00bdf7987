"""A discriminator that stands alone: heads on frozen features of clean samples, whatever the objective.

With heads ``h_k`` on the feature maps ``F_k``, and with psi softplus, or hinge as ``max(0, 1 + u)``::

    discriminator   sum_k mean psi(h_k(F_k(generated))) + mean psi(-h_k(F_k(real))) + r1 mean ||dh_k / dF_k(real)||^2
    generator       sum_k mean psi(-h_k(F_k(generated)))          for hinge the mean of -h_k

The means go over rows and a head's logits. The penalty's ``h_k`` is the mean of a row's logits, and its gradient is
taken in the head's input. Source: Sauer et al., Adversarial Diffusion Distillation (2311.17042), section 3, whose
features are DINO's; the penalty: Mescheder et al. (1801.04406), with half the weight there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from .discriminator import Head, psi

Features = Callable[[Tensor], Sequence[Tensor]]


class Critic(nn.Module):
    """Trained heads on the maps that ``features`` gives of samples.

    Args:
        features: samples ``(B, ...)`` to a list of maps ``(B, C, H, W)`` or vectors ``(B, C)``, differentiable. Its
            parameters, if it has any, are neither trained nor saved, and must be on the samples' device.
        like: samples ``(1, ...)`` or more, which tell the maps' shapes and the device.
        seed: the seed of the heads' first weights.
        loss: ``"softplus"`` or ``"hinge"``.
        r1: the weight of the gradient penalty on real samples, 0 for none.

    Raises:
        UserError: features of other shapes.
    """

    def __init__(self, features: Features, like: Tensor, seed: int, loss: str = "hinge", r1: float = 0.0) -> None:
        super().__init__()
        # Not a part of this module, whose parameters are those that are trained.
        self.__dict__["_features"] = features
        self.loss, self.r1 = loss, r1
        with torch.no_grad():
            shapes = [tuple(found.shape[1:]) for found in self.maps(like)]
        if not shapes or any(len(shape) not in (1, 3) for shape in shapes):
            raise UserError(f"gan.features must be maps (B, C, H, W) or vectors (B, C), got maps of shapes {shapes}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            # The penalty is differentiated twice, which torch's own layers allow.
            self.heads = nn.ModuleList(Head(shape, nn.GroupNorm) for shape in shapes).to(like.device)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The features of samples, in float32 or the samples' own type."""
        return [found.to(x.dtype) for found in self.__dict__["_features"](x)]

    def judge(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The logits ``(B, n)`` of every head."""
        return [head(found) for head, found in zip(self.heads, maps, strict=True)]

    def backward(self, generated: Tensor, real: Tensor, weight: float = 1.0) -> Tensor:
        """Add ``weight`` times the gradient of the discriminator's loss to the heads; the loss ``()``."""
        with torch.no_grad():
            of_generated, of_real = self.maps(generated), self.maps(real)
        of_real = [found.requires_grad_(self.r1 > 0) for found in of_real]
        logits = self.judge(of_real)
        terms = [psi(h, self.loss)[0].mean() for h in self.judge(of_generated)]
        terms += [psi(-h, self.loss)[0].mean() for h in logits]
        if self.r1 > 0:
            slopes = torch.autograd.grad([h.mean(1).sum() for h in logits], of_real, create_graph=True)
            terms += [self.r1 * slope.square().flatten(1).sum(1).mean() for slope in slopes]
        loss = torch.stack(terms).sum()
        loss.backward(torch.full_like(loss, weight))
        return loss.detach()

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss ``()`` on samples ``x`` and its gradient in them; the heads get none."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.judge(self.maps(x))
            loss = torch.stack([psi(-h, self.loss, generator=True)[0].mean() for h in logits]).sum()
        return loss.detach(), torch.autograd.grad(loss, x)[0]
