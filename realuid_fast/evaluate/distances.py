"""Distances between sample sets: Fréchet, kernel, sliced Wasserstein, precision and recall."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and unbiased covariance ``(D, D)`` of features ``(N, D)``, in float64.

    Raises:
        UserError: another shape, or ``N < 2``.
    """
    if features.dim() != 2 or len(features) < 2:
        raise UserError(f"features must have shape (N, D) with N >= 2, got {tuple(features.shape)}")
    values = features.double()
    mean = values.mean(0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) - 1)


class Moments:
    """Mean and covariance of features that come in chunks and need not be kept, in float64.

    Parts are merged as ``M <- M + M_p + d d^T n m / (n + m)`` with ``d`` the difference of their means, so that no
    digits are lost when the mean is large (Chan, Golub and LeVeque, 1979). ``count`` is the number of features so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._sum = torch.zeros(0)

    def add(self, features: Tensor) -> None:
        """Add ``features (N, D)`` to the moments."""
        values = features.double()
        mean = values.mean(0)
        centred = values - mean
        if not self.count:
            self.mean, self._sum = torch.zeros_like(mean), torch.zeros_like(centred.T @ centred)
        n, m = self.count, len(values)
        apart = mean - self.mean
        self.count = n + m
        self.mean = self.mean + apart * (m / self.count)
        self._sum = self._sum + centred.T @ centred + apart.outer(apart) * (n * m / self.count)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance ``(D, D)``; :class:`UserError` for fewer than two features."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 features, there are {self.count}")
        return self._sum / (self.count - 1)


@dataclass(frozen=True)
class Statistics:
    """``mean (D,)`` and ``covariance (D, D)`` in float64 of ``count`` features, with some of them, ``(n, D)``."""

    mean: Tensor
    covariance: Tensor
    features: Tensor
    count: int


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features ``a`` (N, D) and ``b`` (M, D), in float64.

    See :func:`frechet_of_moments`.

    Raises:
        UserError: other shapes, features that are not finite, or fewer than two on either side.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"a and b must be (N, D) and (M, D) features, got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, features in {"a": a, "b": b}.items():
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"{name} must hold finite features")
    return frechet_of_moments(*moments(a), *moments(b))


def frechet_of_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians of means ``(D,)`` and covariances ``(D, D)``.

    ``||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2))``, in squared units of the features
    (Dowson and Landau, 1982; Heusel et al., 2017, arXiv:1706.08500). Symmetric matrices are decomposed, so
    that no complex square root appears.
    """
    return frechet_from_root(mean_a, cov_a, root_of(cov_a), mean_b, cov_b)


def root_of(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance ``(D, D)``."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_from_root(mean_a: Tensor, cov_a: Tensor, root_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """:func:`frechet_of_moments`, given the root of ``cov_a``, which takes most of its time."""
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel distance of features ``a`` (N, D) and ``b`` (M, D), and its standard error, in float64.

    The unbiased squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``, averaged over ``subsets`` pairs
    of random subsets of ``size`` (or all, if there are fewer). Its expectation is 0 for samples of one law, so single
    values may be negative (Bińkowski et al., 2018, arXiv:1801.01401). The standard error is the subsets' standard
    deviation over the root of their number; it is a little too small if subsets overlap much. It is NaN for one subset,
    and where every subset is all of ``a`` and all of ``b``: equal subsets say nothing of the error.

    Raises:
        UserError: other shapes, no subset, or subsets of fewer than two samples.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"a and b must be (N, D) and (M, D) features, got {tuple(a.shape)} and {tuple(b.shape)}")
    size = min(size, len(a), len(b))
    if subsets < 1 or size < 2:
        raise UserError(f"subsets must be at least 1 and size at least 2, got {subsets} and {size}")
    generator = torch.Generator().manual_seed(seed)
    a, b = a.detach().double(), b.detach().double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / a.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (size * (size - 1))

    found = []
    for _ in range(subsets):
        x, y = (each[torch.randperm(len(each), generator=generator)[:size].to(each.device)] for each in (a, b))
        found.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    values = torch.stack(found)
    known = subsets > 1 and size < max(len(a), len(b))
    return values.mean().item(), values.std().item() / subsets**0.5 if known else math.nan


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of point sets ``a`` (N, ...) and ``b`` (M, ...), in units of the samples.

    ``sqrt(mean_u W_2^2(u.a, u.b))`` over ``projections`` random unit directions ``u`` (Bonneel et al.,
    2015); sets of different size are compared on the quantiles of the larger one.

    Raises:
        UserError: samples of different sizes, or none.
    """
    a, b = a.detach().double().flatten(1), b.detach().double().flatten(1)
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 1:
        raise UserError(f"a and b must hold samples of one size, got {tuple(a.shape)} and {tuple(b.shape)}")
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64), dim=0)
    levels = (torch.arange(max(len(a), len(b)), dtype=torch.float64) + 0.5) / max(len(a), len(b))
    gap = _quantiles(a @ directions, levels) - _quantiles(b @ directions, levels)
    return gap.square().mean().sqrt().item()


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Empirical quantiles of each column of ``values`` (N, P) at ``levels`` (Q,): the step function's inverse."""
    index = (levels * len(values)).long().clamp(max=len(values) - 1)
    return values.sort(dim=0).values[index]


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of features ``generated`` (M, D) against ``real`` (N, D).

    Precision is the share of generated points inside a real point's ball, whose radius reaches that point's ``k``-th
    neighbour in its own set. Recall is the same with the sets exchanged (Kynkäänniemi et al., 1904.06991).

    Raises:
        UserError: other shapes, or a ``k`` that is not from 1 to the number of samples less 1.
    """
    if real.dim() != 2 or generated.dim() != 2 or real.shape[1] != generated.shape[1]:
        raise UserError(
            f"real and generated must be (N, D) and (M, D), got {tuple(real.shape)}, {tuple(generated.shape)}"
        )
    if k < 1 or k >= min(len(real), len(generated)):
        raise UserError(f"k must be at least 1 and below the number of samples, got {k}")
    real, generated = real.detach().double(), generated.detach().double()
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, support: Tensor, k: int) -> float:
    # Every point is its own nearest neighbour in its set, hence k + 1.
    radii = torch.cat([torch.cdist(chunk, support).kthvalue(k + 1, dim=1).values for chunk in support.split(1024)])
    inside = torch.cat([(torch.cdist(chunk, support) <= radii).any(dim=1) for chunk in points.split(1024)])
    return inside.double().mean().item()
