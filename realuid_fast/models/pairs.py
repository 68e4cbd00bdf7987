"""Pairs of noise and the sample that a teacher makes of it, in one file: ``realuid-fast sample --pairs`` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..data import Dataset
from ..errors import UserError
from ..files import replacing
from ..paths import COLUMNS
from .files import KEY, read_safetensors

Distance = Callable[[Tensor, Tensor], Tensor]


def mean_square(x: Tensor, target: Tensor) -> Tensor:
    """``||x - target||^2 / D`` of samples ``(B, ...)`` of ``D`` elements, ``(B,)``."""
    return (x - target).square().flatten(1).mean(1)


def mean_absolute(x: Tensor, target: Tensor) -> Tensor:
    """``||x - target||_1 / D``, ``(B,)``."""
    return (x - target).abs().flatten(1).mean(1)


def pseudo_huber(x: Tensor, target: Tensor) -> Tensor:
    """``(||x - target||^2 + c^2)^(1/2) - c``, ``(B,)``, with ``c = 0.00054 D^(1/2)``.

    It is a norm of the whole sample and no mean over its elements. Source: Song and Dhariwal (2310.14189), section 3.3.
    """
    c = 0.00054 * x[0].numel() ** 0.5
    return ((x - target).square().flatten(1).sum(1) + c**2).sqrt() - c


DISTANCES = {"l2": mean_square, "l1": mean_absolute, "huber": pseudo_huber}


@dataclass(frozen=True)
class Contrast:
    """A distance to targets and from others, ``softplus(E(x, t)) + softplus(-E(x, t'))``, ``(B,)``.

    It is the loss of noise-contrastive estimation, for a density ``exp(-E)`` times that of an earlier generator: ``t``
    is the teacher's sample of the generator's noise and ``t'`` the earlier generator's. Source: Zhu et al., Simple
    Distillation for One-Step Diffusion Models (NeurIPS 2025), as a summary of the paper gives it.

    Attributes:
        previous: the earlier generator, frozen, called as the generator.
        energy: ``E(samples, targets)`` ``(B,)``.
    """

    previous: nn.Module
    energy: Distance = pseudo_huber

    def __call__(self, x: Tensor, targets: Tensor) -> Tensor:
        """Losses ``(B,)`` of samples ``(B, ...)`` for targets ``(2 B, ...)``: the teacher's, then ``previous``'s."""
        ours, others = targets.chunk(2)
        return F.softplus(self.energy(x, ours)) + F.softplus(-self.energy(x, others))


def plain_rows(count: int, device: torch.device) -> Tensor:
    """Coefficients ``(count, 9)`` with which the matching loss is ``||out - x||^2``."""
    rows = torch.zeros(count, len(COLUMNS), device=device, dtype=torch.float32)
    for name in ("p", "k_out", "w"):
        # With these three at 1 and the rest at 0 the matching loss has f = F and tgt = x.
        rows[:, COLUMNS.index(name)] = 1.0
    return rows


def pull(
    distance: Distance, x: Tensor, target: Tensor, coef: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``D mean d(x, target)`` ``()`` and its gradient in ``x``, for samples of ``D`` elements.

    With ``coef``, those of :func:`plain_rows`, and ``noise``, of which nothing enters, the square is one fused call.
    """
    if distance is mean_square and coef is not None and noise is not None:
        grads = functional.matching_grads(out=x, x=target, x_t=None, coef=coef, noise=noise)
        return grads.loss, grads.out
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = x[0].numel() * distance(x, target).mean()
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@dataclass(frozen=True)
class Pairs:
    """The regression that DMD adds to its gradient, ``weight D mean d(G(z), x(z))`` over a batch of stored pairs.

    ``D`` is the number of a sample's elements, by which every objective here is larger than the mean over elements that
    published code takes; so the published weight holds. Source: Yin et al., DMD (2311.18828), section 3.2.

    Attributes:
        dataset: samples ``x(z)`` with the noise ``z`` as endpoints, and labels, as :func:`read` gives them.
        weight: DMD's is 0.25.
        distance: ``d(samples, targets)`` ``(B,)``, differentiable in the first: the published one is LPIPS.
    """

    dataset: Dataset
    weight: float = 0.25
    distance: Distance = mean_square


def write(file: Path, noise: Tensor, samples: Tensor, labels: Tensor | None = None, made_by: str = "") -> None:
    """Write pairs ``(N, ...)`` float32 and their labels ``(N,)``; ``made_by`` says what made them."""
    from safetensors.torch import save

    tensors = {"noise": noise.cpu().contiguous(), "samples": samples.cpu().contiguous()}
    if labels is not None:
        tensors["labels"] = labels.cpu()
    with replacing(file) as stream:
        stream.write(save(tensors, metadata={KEY: json.dumps({"kind": "pairs", "format": 1, "made_by": made_by})}))


def read(file: str | Path) -> Dataset:
    """Pairs from a file: samples, their noise as paired endpoints, and labels where there are some.

    The tensors are mapped into memory, and read from the disk when they are drawn.

    Raises:
        UserError: the file is missing or damaged, or holds no pairs.
    """
    tensors, _ = read_safetensors(Path(file))
    noise, samples, labels = (tensors.get(name) for name in ("noise", "samples", "labels"))
    whole = noise is not None and samples is not None and noise.shape == samples.shape and samples.dim() > 1
    if not whole or noise.dtype != torch.float32 or samples.dtype != torch.float32:  # type: ignore[union-attr]
        raise UserError(f"{file} holds no pairs of noise and samples: realuid-fast sample --pairs writes them")
    assert samples is not None
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != samples.shape[:1] or labels.min() < 0):
        raise UserError(f"{file} holds pairs whose labels are no numbers of classes")
    return Dataset("pairs", samples, samples[:1], labels, None, train_endpoints=noise, paired=True)
