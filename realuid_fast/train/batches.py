"""Endless shuffled batches of a data set, whose position can be saved and restored."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Dataset, to_float
from ..errors import UserError
from . import distributed

AHEAD = 4  # batches that are read from disk before they are asked for


class _Pass(NamedTuple):
    """One shuffle of the samples, and the generator's state after it."""

    order: Tensor
    generator: Tensor


class Batches:
    """Batches of ``n`` training samples, float32 on ``device``; each pass is a fresh shuffle.

    Every rank shuffles alike and takes its own ``n`` rows of the common batch, so no two ranks read the same sample. A
    pass' last partial batch is left out. A pass has every sample once. If the data set is to ``balance``, a pass has as
    many rows of each class, and so repeats samples of rare classes.

    Samples on disk are read by a thread, :data:`AHEAD` batches before they are asked for, on CUDA into pinned memory.
    Batches that were read and not handed out are not in the state: a resumed run reads them again. Bytes are copied to
    the device as bytes and become floats there. If the data set is to ``flip``, half of the samples are mirrored there,
    by coins drawn from ``draws``.

    Raises:
        UserError: the batch of all ranks together is larger than the training set.
    """

    def __init__(
        self, dataset: Dataset, n: int, seed: int, device: torch.device, draws: torch.Generator | None = None
    ) -> None:
        if (whole := n * distributed.size()) > len(dataset):
            raise UserError(f"batch {whole} is larger than data set '{dataset.name}', which has {len(dataset)} samples")
        self._samples, self._labels, self._n, self._device = dataset.train, dataset.train_labels, n, device
        self._endpoints = dataset.train_endpoints
        # Floats have no checksum: another processor may round those that are computed differently.
        self._sha256 = dataset.fingerprint("train") if self._samples.dtype == torch.uint8 else ""
        self._balanced, self._flip, self._draws = dataset.balance, dataset.flip, draws
        self._generator = torch.Generator().manual_seed(seed)
        self._pass = self._shuffled()
        # The position where the next planned batch begins, and the position where the last batch handed out ends.
        self._position, self._handed_out = 0, (self._pass, 0)
        self._thread = None if isinstance(dataset.train, Tensor) else ThreadPoolExecutor(1, "batches")
        self._ahead: deque[tuple[Future[Tensor], Tensor, tuple[_Pass, int]]] = deque()
        self._rows = self._pass.order[:0]

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch ``(n, ...)`` and its labels ``(n,)``, None where the data set has none.

        Raises:
            OSError: the samples on disk cannot be read any more.
        """
        if self._thread is None:
            assert isinstance(self._samples, Tensor)
            self._rows, self._handed_out = self._plan()
            samples = self._samples[self._rows]
        else:
            while len(self._ahead) < AHEAD:
                rows, end = self._plan()
                self._ahead.append((self._thread.submit(self._read, self._samples, rows, self._pinned), rows, end))
            reading, rows, end = self._ahead[0]
            try:
                samples = reading.result()
            except BaseException:
                self._rewind(*self._handed_out)
                raise
            self._ahead.popleft()
            self._rows, self._handed_out = rows, end
        labels = None if self._labels is None else self._to_device(self._labels[self._rows])
        return to_float(self._mirrored(self._to_device(samples))), labels

    def endpoints(self) -> Tensor | None:
        """The endpoints ``(n, ...)`` of the batch that :meth:`next` returned last, None where there are none."""
        return None if self._endpoints is None else to_float(self._to_device(self._endpoints[self._rows]))

    def _plan(self) -> tuple[Tensor, tuple[_Pass, int]]:
        """The rows of one more batch, and where it ends."""
        everyones = self._n * distributed.size()
        if self._position + everyones > len(self._pass.order):
            self._pass, self._position = self._shuffled(), 0
        first = self._position + distributed.rank() * self._n
        self._position += everyones
        return self._pass.order[first : first + self._n], (self._pass, self._position)

    def _shuffled(self) -> _Pass:
        count = len(self._samples)
        if self._balanced:
            assert self._labels is not None
            order = _balanced(self._labels, count, self._generator)
        else:
            order = torch.randperm(count, generator=self._generator)
        return _Pass(order, self._generator.get_state())

    def _rewind(self, shuffle: _Pass, position: int) -> None:
        """Go on from the position where a batch ended; forget all batches that were planned or read after it."""
        for reading, _, _ in self._ahead:
            reading.cancel()
        self._ahead.clear()
        self._generator.set_state(shuffle.generator)
        self._pass, self._position, self._handed_out = shuffle, position, (shuffle, position)

    def _mirrored(self, samples: Tensor) -> Tensor:
        if not self._flip:
            return samples
        coins = torch.rand(len(samples), generator=self._draws, device=self._device) < 0.5
        return torch.where(coins.view(-1, 1, 1, 1), samples.flip(-1), samples)

    @property
    def _pinned(self) -> bool:
        return self._device.type == "cuda"

    def _to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device, in the tensor's own type. The host does not wait for it."""
        if self._pinned and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    # A static method: a bound one would keep this object, and so its thread, alive while a batch is being read.
    @staticmethod
    def _read(samples: Any, rows: Tensor, pinned: bool) -> Tensor:
        return samples.read(rows, torch.empty(len(rows), *samples.shape[1:], dtype=samples.dtype, pin_memory=pinned))

    def state_dict(self) -> dict[str, Any]:
        shuffle, position = self._handed_out
        return {"generator": shuffle.generator, "order": shuffle.order, "position": position, "samples": self._sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises when it belongs to other bytes or another number of samples."""
        before, now = len(state["order"]), len(self._pass.order)
        if before != now:
            raise UserError(f"the run was started on {before} training samples, the data set has {now} now")
        # Earlier versions wrote no checksum of samples in memory.
        known = state.get("samples") or self._thread is not None
        if known and state.get("samples", "") != self._sha256:
            raise UserError("the run was started on other training samples than the data set has now")
        self._rewind(_Pass(state["order"], state["generator"]), int(state["position"]))


def _balanced(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` row numbers in random order, equally many of each class that occurs, or one more.

    The rows of a class are whole shuffles of its members, as many as it takes.
    """
    known = labels.unique()
    own = torch.full((len(known),), count // len(known))
    own[torch.randperm(len(known), generator=generator)[: count % len(known)]] += 1
    rows = []
    for label, wanted in zip(known, own.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        shuffles = [torch.randperm(len(members), generator=generator) for _ in range(-(-wanted // len(members)))]
        rows.append(members[torch.cat(shuffles)[:wanted]] if shuffles else members[:0])
    return torch.cat(rows)[torch.randperm(count, generator=generator)]
