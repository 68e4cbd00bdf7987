"""Numbers that say whether a distillation is on its way, since its losses do not: made on the device in every update.

The generator's loss is a distance between two networks, one of which keeps moving; it can fall while samples get worse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import losses
from ..coefficients import Coefficients
from ..data import Dataset
from ..interpolant import Interpolant

BUCKETS = 4
PROJECTIONS = 64
MOST = 2048  # held-out samples that generated ones are compared with


class Tripwires:
    """A generator turn's numbers, as quotients for :class:`~realuid_fast.train.meters.Meters`, in this order:

    - ``gap 0-25% data`` and so on: ``sum ||F - F*|| / sum ||F*||`` over the samples whose interpolant holds that share
      of data, ``a / (a + b + c)``; on the linear path that is ``t``. Where it grows without end, the fake model lost
      track; where it is zero, nothing drives the generator.
    - ``error ratio``: ``sum w ||f - tgt||^2 / sum w ||f* - tgt||^2`` on generated samples. The fake model is there to
      fit them better than the teacher does: above 1 it does not.
    - ``sliced distance``: the 2-Wasserstein distance of the turn's samples to held-out ones along 64 fixed directions,
      in units of the samples. A batch is small, so that the number has a floor of its own: its course counts.

    Args:
        dataset: gives the held-out samples.
        batch: samples of a generator turn.
        device: where the turn runs.
    """

    names = (
        *(f"gap {100 * i // BUCKETS}-{100 * (i + 1) // BUCKETS}% data" for i in range(BUCKETS)),
        "error ratio",
        "sliced distance",
    )

    def __init__(self, dataset: Dataset, batch: int, device: torch.device) -> None:
        held = dataset.pixels("heldout", MOST).flatten(1)
        directions = torch.randn(held.shape[1], PROJECTIONS, generator=torch.Generator().manual_seed(0))
        directions = F.normalize(directions, dim=0)
        ranks = ((torch.arange(batch) + 0.5) / batch * len(held)).long()
        self._directions = directions.to(device)
        self._quantiles = (held @ directions).sort(dim=0).values[ranks].to(device)
        self._buckets = torch.arange(BUCKETS, device=device)

    @torch.no_grad()
    def __call__(
        self,
        teacher_out: Tensor,
        fake_out: Tensor,
        draw: Interpolant,
    ) -> Tensor:
        """Sums above and below the line, float32 ``(2, 6)``, of a turn's tensors as ``generator_grads`` takes them."""
        x, own = draw.x, tuple(range(1, draw.x.dim()))
        norms = torch.stack(
            [torch.linalg.vector_norm(fake_out - teacher_out, dim=own), torch.linalg.vector_norm(teacher_out, dim=own)]
        )
        row = Coefficients(draw.coef)
        bucket = (row.a.abs() / row.scales.abs().sum(1) * BUCKETS).long().clamp(max=BUCKETS - 1)
        gaps = norms @ (bucket[:, None] == self._buckets).to(norms)
        errors = torch.stack([losses.matching_loss(draw, out) for out in (fake_out, teacher_out)])
        apart = (x.flatten(1) @ self._directions).sort(dim=0).values - self._quantiles
        distance = apart.square().mean().sqrt()
        return torch.cat([gaps, errors[:, None], torch.stack([distance, torch.ones_like(distance)])[:, None]], dim=1)
