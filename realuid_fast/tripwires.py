"""Numbers that say whether a distillation is on its way, since its losses do not: made on the device in every update.

The generator's loss is a distance between two networks, one of which keeps moving; it can fall while samples get worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import losses
from .coefficients import Coefficients
from .contracts import check_device, check_tensor, check_whole, type_name
from .errors import UserError
from .interpolant import Interpolant
from .meters import Fetched, Meters
from .precision import PRECISIONS, Precision

BUCKETS = 4
PROJECTIONS = 64
MOST = 2048  # held-out samples that generated ones are compared with


class Tripwires:
    """A generator turn's numbers, gathered on the device over updates and fetched without waiting for them.

    - ``gap``: ``||F - F*|| / ||F*||`` of the networks' raw outputs over the batch, a mean over updates. One over it is
      the factor by which their rounding is amplified in the generator's gradient.
    - ``gap 0-25% data`` and so on: ``sum ||F - F*|| / sum ||F*||`` over the samples whose interpolant holds that share
      of data, ``a / (a + b + c)``; on the linear path that is ``t``. Where it grows without end, the fake model lost
      track; where it is zero, nothing drives the generator.
    - ``error ratio``: ``sum w ||f - tgt||^2 / sum w ||f* - tgt||^2`` on generated samples. The fake model is there to
      fit them better than the teacher does: above 1 it does not.
    - ``sliced distance``, where there are held-out samples: the 2-Wasserstein distance of the turn's samples to them
      along 64 fixed directions, in units of the samples. A batch is small, so that the number has a floor of its own:
      its course counts.

    Every :meth:`update` adds to sums at one address and reads nothing on the host, so a CUDA graph can hold it::

        wires = Tripwires(device, precision="bf16")
        for step in range(updates):
            ...  # a generator turn
            wires.update(draw, teacher_out, fake_out)
            if step % 100 == 0 and step > 0:
                print(reading.values(), reading.concern())
            if step % 100 == 99:
                reading = wires.fetch()  # its numbers have arrived a turn later

    Args:
        device: where the turn runs.
        precision: the coarsest arithmetic of the networks in this turn, one of
            :data:`~realuid_fast.precision.PRECISIONS`; :meth:`Reading.concern` judges by it.
        heldout: samples ``(N, ...)`` to compare generated ones with.
        batch: samples of a turn, where ``heldout`` is given.

    Raises:
        UserError: a device, a precision or a batch that cannot be used.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        precision: str = "float32",
        heldout: Tensor | None = None,
        batch: int | None = None,
    ) -> None:
        check_device(device)
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        self._precision = Precision(precision, torch.device(device))
        self.names = names(heldout is not None)
        self._meters = Meters(self.names, device)
        self._buckets = torch.arange(BUCKETS, device=device)
        self._one = torch.ones((), device=device, dtype=torch.float32)
        self._batch = None
        if heldout is None:
            return
        check_tensor("heldout", heldout)
        check_whole("batch", batch)
        if batch is None or batch < 1 or not heldout.numel():
            raise UserError(f"batch must be at least 1, and heldout hold a sample, got {batch} and {len(heldout)}")
        held, self._batch, self._held = heldout[:MOST].flatten(1), batch, heldout.shape[1:]
        draws = torch.Generator().manual_seed(0)
        directions = torch.randn(held.shape[1], PROJECTIONS, generator=draws, dtype=torch.float32)
        directions = F.normalize(directions, dim=0)
        ranks = ((torch.arange(batch, dtype=torch.float32) + 0.5) / batch * len(held)).long()
        held = held.to("cpu", torch.float32)
        self._directions = directions.to(device)
        self._quantiles = (held @ directions).sort(dim=0).values[ranks].to(device)

    def update(self, draw: Interpolant, teacher_out: Tensor, fake_out: Tensor) -> None:
        """Add a generator turn's numbers. The host waits for nothing.

        Args:
            draw: the turn's batch, from ``path.draw(x, key)``.
            teacher_out, fake_out: raw outputs of teacher and fake model at ``draw.x_t``, ``(R, ...)``, as
                :func:`~realuid_fast.generator_loss` takes them; of a guided teacher its guided output.

        Raises:
            UserError: tensors that do not agree, real rows in ``draw``, or another number of samples than ``batch``.
        """
        if not isinstance(draw, Interpolant):
            raise UserError(f"draw must be an Interpolant from path.draw(...), not {type_name(draw)}")
        if draw.n_real:
            raise UserError("draw must hold no real rows: these are the numbers of a generator's turn")
        if self._batch not in (None, len(draw.x)):
            raise UserError(
                f"draw must hold {self._batch} samples, the batch of the sliced distance, not {len(draw.x)}"
            )
        if self._batch is not None and draw.x.shape[1:] != self._held:
            shape = tuple(draw.x.shape[1:])
            raise UserError(f"draw must hold samples of shape {tuple(self._held)} like heldout, not {shape}")
        for name, out in (("teacher_out", teacher_out), ("fake_out", fake_out)):
            check_tensor(name, out)
            if out.shape != draw.x.shape or out.device != draw.x.device:
                raise UserError(
                    f"{name} must have shape {tuple(draw.x.shape)} on {draw.x.device} to go with draw, not "
                    f"{tuple(out.shape)} on {out.device}"
                )
        self._meters.add(self.names[0], self.sums(draw, teacher_out, fake_out))

    def fetch(self, reduce: Callable[[Tensor], Any] | None = None) -> Reading:
        """Start to copy the numbers of all updates since the last call to the host; the sums start again from zero.

        Args:
            reduce: called with the sums before they are copied, to add other ranks' to them in place, such as
                ``torch.distributed.all_reduce``.
        """
        sums, quotients = self._meters.drain()
        if reduce is not None:
            reduce(sums)
        return Reading(Fetched(sums), quotients, self._precision)

    @torch.no_grad()
    def sums(self, draw: Interpolant, teacher_out: Tensor, fake_out: Tensor) -> Tensor:
        """Sums above and below the line of :attr:`names`, ``(2, n)``, of one turn's tensors, unchecked."""
        own, (teacher, fake) = tuple(range(1, draw.x.dim())), map(_wide, (teacher_out, fake_out))
        apart = fake - teacher
        gap = torch.linalg.vector_norm(apart) / torch.linalg.vector_norm(teacher)
        norms = torch.stack([torch.linalg.vector_norm(out, dim=own) for out in (apart, teacher)])
        row = Coefficients(draw.coef)
        bucket = (row.a.abs() / row.scales.abs().sum(1) * BUCKETS).long().clamp(max=BUCKETS - 1)
        gaps = norms @ (bucket[:, None] == self._buckets).to(norms)
        outs = [out.detach().to(draw.x.dtype) for out in (fake_out, teacher_out)]
        errors = torch.stack([losses.matching_loss(draw, out) for out in outs])
        found = [self._over_one(gap), gaps, errors[:, None]]
        if self._batch is not None:
            x = _wide(draw.x).flatten(1).to(self._directions.dtype)
            distance = ((x @ self._directions).sort(dim=0).values - self._quantiles).square().mean().sqrt()
            found.append(self._over_one(distance))
        return torch.cat(found, dim=1)

    def _over_one(self, value: Tensor) -> Tensor:
        """A value whose mean over updates is wanted, as a quotient ``(2, 1)``."""
        return torch.stack([value, self._one.to(value.dtype)])[:, None]


class Reading:
    """Numbers of :class:`Tripwires` on their way to the host."""

    def __init__(
        self, fetched: Fetched, quotients: Callable[[Sequence[float]], dict[str, float]], precision: Precision
    ) -> None:
        self._fetched, self._quotients, self._precision = fetched, quotients, precision

    @property
    def ready(self) -> bool:
        """Whether :meth:`values` would not wait."""
        return self._fetched.ready

    def values(self) -> dict[str, float]:
        """The numbers by their names; waits until they have arrived. NaN where there was no sample to measure."""
        return self._quotients(self._fetched.values())

    def concern(self) -> str | None:
        """A sentence if the networks' rounding outgrows the gap, so that the generator's gradient is noise, or None."""
        return self._precision.concern(self.values()["gap"])


def names(heldout: bool) -> tuple[str, ...]:
    """The names of the numbers in their order; the last is there only with held-out samples."""
    gaps = (f"gap {100 * i // BUCKETS}-{100 * (i + 1) // BUCKETS}% data" for i in range(BUCKETS))
    return ("gap", *gaps, "error ratio", *(["sliced distance"] if heldout else []))


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
