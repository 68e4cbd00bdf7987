"""A data set: its training and held-out samples with labels and endpoints, and how samples become float32."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import UserError
from . import stored


@dataclass
class Dataset:
    """Training and held-out samples of one data set.

    ``train`` and ``heldout`` are ``(N, ...)`` tensors, or rows on disk that an index reads, stored as uint8 (images
    whose pixels are bytes) or float32; :meth:`sample` and :meth:`batches` always hand out float32, images in ``[-1,
    1]``. Labels are ``(N,)`` int64 or ``None``. Endpoints, if the set has them, are the starting points of two-sided
    paths: sample ``i``'s own if ``paired``, else drawn independently of it. ``preprocessing`` says in words how a
    stored sample was made from the source; it goes into checkpoints. With ``flip`` a run mirrors half of its images at
    random; with ``balance`` it draws all classes equally often.
    """

    name: str
    train: Tensor | stored.Stored
    heldout: Tensor | stored.Stored
    train_labels: Tensor | None = None
    heldout_labels: Tensor | None = None
    preprocessing: str = "none"
    config: dict[str, Any] = field(default_factory=dict)
    train_endpoints: Tensor | None = None
    heldout_endpoints: Tensor | None = None
    paired: bool = False
    flip: bool = False
    balance: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, ``(C, H, W)`` or ``(2,)``."""
        return tuple(self.train.shape[1:])

    @property
    def classes(self) -> int:
        """Number of classes, 0 where the samples carry no label; one that is only held out counts too."""
        known = [labels for labels in (self.train_labels, self.heldout_labels) if labels is not None]
        return 0 if self.train_labels is None else max(int(labels.max()) for labels in known) + 1

    def __len__(self) -> int:
        return len(self.train)

    def keep(self, classes: Sequence[int]) -> None:
        """Leave out every sample, training and held-out, whose label is none of ``classes``. Labels keep their numbers.

        Raises:
            UserError: no labels, a set on disk, or a number that is no label of the training samples.
        """
        if self.train_labels is None or self.heldout_labels is None:
            raise UserError(f"data.classes is for data with labels, '{self.name}' has none")
        if not isinstance(self.train, Tensor) or not isinstance(self.heldout, Tensor):
            raise UserError("data.classes is for sets held in memory: pack the folders of these classes alone")
        whole = isinstance(classes, (list, tuple)) and all(type(label) is int for label in classes)
        known = set(self.train_labels.tolist())
        if not whole or not classes or len(set(classes)) < len(classes) or not known.issuperset(classes):
            raise UserError(f"data.classes must be different labels of '{self.name}', got {classes!r:.60}")
        wanted = torch.tensor(classes)
        for split in ("train", "heldout"):
            rows = torch.isin(getattr(self, f"{split}_labels"), wanted)
            for name in (split, f"{split}_labels", f"{split}_endpoints"):
                if (values := getattr(self, name)) is not None:
                    setattr(self, name, values[rows])
        self.preprocessing += f"; classes {', '.join(map(str, sorted(classes)))} alone"

    def pixels(self, split: str = "train", most: int | None = None) -> Tensor:
        """Samples of ``"train"`` or ``"heldout"`` as float32: all, or ``most`` at even distances where there are
        more; raises for another split.
        """
        if split not in ("train", "heldout"):
            raise UserError(f"split must be 'train' or 'heldout', got {split!r}")
        samples = self.train if split == "train" else self.heldout
        count = len(samples) if most is None else min(most, len(samples))
        if isinstance(samples, Tensor) and count == len(samples):
            return to_float(samples)
        return to_float(samples[torch.arange(count) * len(samples) // count])

    def fingerprint(self, split: str) -> str:
        """SHA-256 of a split's stored samples and what they were made of, in hexadecimal; rows on disk have theirs
        in their manifest.
        """
        samples = self.train if split == "train" else self.heldout
        if isinstance(samples, stored.Stored):
            return samples.sha256
        found = hashlib.sha256(f"{samples.dtype} {tuple(samples.shape)}".encode())
        found.update(samples.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draw ``n`` distinct training samples: float32 ``(n, ...)`` and their labels ``(n,)`` or ``None``.

        One ``generator`` state gives one draw, so that runs repeat. Raises when ``n`` exceeds the training
        set.
        """
        self._check_batch(n)
        index = torch.randperm(len(self.train), generator=generator)[:n]
        return self._take(index)

    def batches(self, n: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless stream of batches of ``n``: each pass visits a fresh shuffle, its last partial batch
        left out.
        """
        self._check_batch(n)

        def stream() -> Iterator[tuple[Tensor, Tensor | None]]:
            while True:
                order = torch.randperm(len(self.train), generator=generator)
                for first in range(0, len(order) - n + 1, n):
                    yield self._take(order[first : first + n])

        return stream()

    def _take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = None if self.train_labels is None else self.train_labels[index]
        return to_float(self.train[index]), labels

    def _check_batch(self, n: int) -> None:
        if n < 1:
            raise UserError(f"batch must be at least 1, got {n}")
        if n > len(self.train):
            raise UserError(f"batch {n} is larger than data set '{self.name}', which has {len(self.train)} samples")


class LabelledDataset(Dataset):
    """A data set whose samples all carry a label, as its types say."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw ``n`` distinct training samples: float32 ``(n, ...)`` and their labels ``(n,)``."""
        samples, labels = super().sample(n, generator)
        return samples, cast(Tensor, labels)


def to_float(samples: Tensor) -> Tensor:
    """Stored samples as float32: bytes ``u`` become ``u / 127.5 - 1``, floats stay as they are."""
    return samples.float().div_(127.5).sub_(1.0) if samples.dtype == torch.uint8 else samples.float()


def to_bytes(images: Tensor) -> Tensor:
    """Images in ``[-1, 1]`` as uint8, rounded and clipped: the inverse of :func:`to_float` on bytes."""
    return images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
