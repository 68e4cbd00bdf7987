"""Points in the plane: Gaussians on a circle, half circles, a board, and pairs of two such sets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from .dataset import Dataset


def eight_gaussians(
    n: int = 20_000, n_heldout: int = 10_000, seed: int = 0, radius: float = 2.0, scale: float = 0.1
) -> Dataset:
    """Eight Gaussians evenly spaced on a circle; points ``(N, 2)``.

    Args:
        n, n_heldout: number of training points, and of others that are held out.
        seed: the points' seed.
        radius: the circle's radius.
        scale: standard deviation of each Gaussian.
    """

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(8, (count,), generator=generator)
        angle = label * (math.pi / 4)
        centre = torch.stack([angle.cos(), angle.sin()], dim=1) * radius
        return centre + scale * torch.randn(count, 2, generator=generator), label

    return _mixture("eight_gaussians", draw, n, n_heldout, seed)


def moons(n: int = 20_000, n_heldout: int = 10_000, seed: int = 0, scale: float = 0.05) -> Dataset:
    """Two interleaved half circles of radius 1 with Gaussian noise, centred; points ``(N, 2)``.

    Args:
        n, n_heldout: number of training points, and of others that are held out.
        seed: the points' seed.
        scale: standard deviation of the noise.
    """

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(2, (count,), generator=generator)
        angle = math.pi * torch.rand(count, generator=generator)
        side = 1.0 - 2.0 * label
        # The upper half circle around (-1/2, -1/4) and the lower one around (1/2, 1/4).
        point = torch.stack([side * angle.cos() - 0.5 * side, side * angle.sin() - 0.25 * side], dim=1)
        return point + scale * torch.randn(count, 2, generator=generator), label

    return _mixture("moons", draw, n, n_heldout, seed)


def checkerboard(n: int = 20_000, n_heldout: int = 10_000, seed: int = 0, cells: int = 4) -> Dataset:
    """Uniform on the dark squares of a board that covers ``[-2, 2]^2``; points ``(N, 2)``.

    Args:
        n, n_heldout: number of training points, and of others that are held out.
        seed: the points' seed.
        cells: squares on a side of the board.
    """
    if not 2 <= cells <= 1000:
        raise UserError(f"cells must be from 2 to 1000, got {cells}")

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dark = torch.tensor([(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0])
        label = torch.randint(len(dark), (count,), generator=generator)
        point = dark[label] + torch.rand(count, 2, generator=generator)
        return point * (4.0 / cells) - 2.0, label

    return _mixture("checkerboard", draw, n, n_heldout, seed)


def _mixture(
    name: str,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    n: int,
    n_heldout: int,
    seed: int,
) -> Dataset:
    if min(n, n_heldout) < 1:
        raise UserError(f"n and n_heldout must be at least 1, got {n} and {n_heldout}")
    # Each split has its own generator, so that the size of one does not change the points of the other.
    train, train_labels = draw(n, torch.Generator().manual_seed(2 * seed))
    heldout, heldout_labels = draw(n_heldout, torch.Generator().manual_seed(2 * seed + 1))
    return Dataset(name, train, heldout, train_labels, heldout_labels)


POINTS: dict[str, Callable[..., Dataset]] = {
    "eight_gaussians": eight_gaussians,
    "moons": moons,
    "checkerboard": checkerboard,
}


def transport(source: str = "moons", target: str = "eight_gaussians", n: int = 20_000, seed: int = 0) -> Dataset:
    """Points of one 2-D set as samples and, drawn apart from them, points of another as endpoints.

    Args:
        source: the set of the endpoints, ``"eight_gaussians"``, ``"moons"`` or ``"checkerboard"``.
        target: the set of the samples, one of the same.
        n: number of training points; 10,000 others are held out.
        seed: the points' seed.
    """
    for key, name in (("source", source), ("target", target)):
        if name not in POINTS:
            raise UserError(f"{key} must be one of {', '.join(POINTS)}; got {name!r}")
    data, ends = POINTS[target](n=n, seed=seed), POINTS[source](n=n, seed=seed + 500_000)
    data.name, data.train_endpoints, data.heldout_endpoints = "transport", ends.pixels(), ends.pixels("heldout")
    return data
