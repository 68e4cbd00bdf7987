"""Data sets: digits, 2-D mixtures, image folders and CIFAR-10's binary files in memory, packed images on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import choices
from . import packed as stored
from .errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
FILTERS = choices.FILTERS
MOST_PIXELS = 1 << 26  # a larger image is more likely a trap than a picture
CIFAR_RECORD = 3073  # one label byte, then 3 x 32 x 32 pixels, channel by channel
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass
class Dataset:
    """Training and held-out samples of one data set.

    ``train`` and ``heldout`` are ``(N, ...)`` tensors, or rows on disk that an index reads, stored as uint8
    (images whose pixels are bytes) or float32; :meth:`sample` and :meth:`batches` always hand out float32,
    images in ``[-1, 1]``.  Labels are ``(N,)`` int64 or ``None``.  Endpoints, where the set has them, are what
    two-sided paths start from: sample ``i``'s own where ``paired``, else drawn apart from it.
    ``preprocessing`` says in words how a stored sample was made from the source; it goes into checkpoints.
    A run mirrors half of its images at random where ``flip``, and draws all classes alike often where
    ``balance``.
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
        """Number of classes, 0 where the samples carry no label."""
        return 0 if self.train_labels is None else int(self.train_labels.max()) + 1

    def __len__(self) -> int:
        return len(self.train)

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

        One ``generator`` state gives one draw, so that runs repeat.  Raises when ``n`` exceeds the training
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
                for start in range(0, len(order) - n + 1, n):
                    yield self._take(order[start : start + n])

        return stream()

    def _take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = None if self.train_labels is None else self.train_labels[index]
        return to_float(self.train[index]), labels

    def _check_batch(self, n: int) -> None:
        if n < 1:
            raise UserError(f"batch must be at least 1, got {n}")
        if n > len(self.train):
            raise UserError(f"batch {n} is larger than data set '{self.name}', which has {len(self.train)} samples")


def to_float(samples: Tensor) -> Tensor:
    """Stored samples as float32: bytes ``u`` become ``u / 127.5 - 1``, floats stay as they are."""
    return samples.float().div_(127.5).sub_(1.0) if samples.dtype == torch.uint8 else samples.float()


def to_bytes(images: Tensor) -> Tensor:
    """Images in ``[-1, 1]`` as uint8, rounded and clipped: the inverse of :func:`to_float` on bytes."""
    return images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def load(config: str | Mapping[str, Any]) -> Dataset:
    """Data set of a name (``"digits"``, ``"moons"``) or of a mapping with ``name`` and its loader's
    arguments.

    ``{"name": "folder", "path": ..., "size": 32}`` reads a folder of images, ``{"name": "cifar10", "path":
    ...}`` the binary files, ``{"name": "packed", "path": ...}`` what ``realuid-fast pack`` has written.  Every
    set takes ``flip`` and ``balance``.  Raises :class:`UserError` for an unknown name, an argument its loader
    does not take, or bad files.
    """
    settings = {"name": config} if isinstance(config, str) else dict(config)
    name = settings.pop("name", None)
    choices = {key: settings.pop(key) for key in ("flip", "balance") if key in settings}
    if name not in LOADERS:
        raise UserError(f"data set name must be one of {', '.join(LOADERS)}; got {name!r}")
    try:
        dataset = LOADERS[name](**settings)
    except TypeError as error:
        raise UserError(f"data set '{name}' was given an argument it cannot use: {error}") from None
    dataset.config = {"name": name, **settings, **choices}
    for key, value in choices.items():
        if not isinstance(value, bool):
            raise UserError(f"data.{key} must be true or false, got {value!r}")
        setattr(dataset, key, value)
    if (dataset.flip or dataset.balance) and dataset.train_endpoints is not None:
        raise UserError(f"data.flip and data.balance are for data without endpoints, which '{name}' has")
    if dataset.flip and len(dataset.shape) != 3:
        raise UserError(f"data.flip is for images, '{name}' holds samples of shape {dataset.shape}")
    if dataset.balance and dataset.train_labels is None:
        raise UserError(f"data.balance is for data with labels, '{name}' has none")
    return dataset


def digits() -> Dataset:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels of 17 grey levels.

    Scaling ``x = pixel / 8 - 1``.  Split: within each class, in the data set's order, every fourth image
    (the 4th, 8th, ...) is held out, which makes 1,352 training and 445 held-out images, alike in class and
    writer. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(np.asarray(source.images, dtype=np.float32)).unsqueeze(1).div_(8.0).sub_(1.0)
    labels = torch.from_numpy(np.asarray(source.target, dtype=np.int64))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held[(labels == label).nonzero().flatten()[3::4]] = True
    return Dataset(
        "digits",
        images[~held],
        images[held],
        labels[~held],
        labels[held],
        preprocessing="pixel / 8 - 1, 8x8 grey; every fourth image of a class held out",
    )


def digit_pairs(corruption: str = "downsample", amount: float = 4.0, seed: int = 0) -> Dataset:
    """:func:`digits` with a corrupted image as each one's endpoint.

    ``"downsample"``: means of ``amount x amount`` blocks, ``amount`` 2, 4 or 8, spread over their pixels again.
    ``"mask"``: the lower ``amount`` rows black. ``"noise"``: with normal noise of standard deviation ``amount`` added,
    the same in every call of one ``seed``.
    """
    if corruption not in ("downsample", "mask", "noise"):
        raise UserError(f"corruption must be downsample, mask or noise, got {corruption!r}")
    whole = {"downsample": (2, 4, 8), "mask": tuple(range(1, 9))}.get(corruption)
    if (whole and amount not in whole) or not 0 < amount < math.inf:
        wanted = f"one of {', '.join(map(str, whole))}" if whole else "positive"
        raise UserError(f"amount must be {wanted} to {corruption}, got {amount}")

    def corrupted(images: Tensor, split: int) -> Tensor:
        if corruption == "downsample":
            size = int(amount)
            blocks = torch.nn.functional.avg_pool2d(images, size)
            return blocks.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
        if corruption == "mask":
            images = images.clone()
            images[:, :, 8 - int(amount) :] = -1.0
            return images
        return images + amount * torch.randn(images.shape, generator=torch.Generator().manual_seed(2 * seed + split))

    source = digits()
    source.name, source.paired = "digit_pairs", True
    source.train_endpoints = corrupted(source.pixels(), 0)
    source.heldout_endpoints = corrupted(source.pixels("heldout"), 1)
    source.preprocessing += f"; endpoints by {corruption} {amount:g}"
    return source


def transport(source: str = "moons", target: str = "eight_gaussians", n: int = 20_000, seed: int = 0) -> Dataset:
    """Points of one 2-D set as samples and, drawn apart from them, points of another as endpoints."""
    for key, name in (("source", source), ("target", target)):
        if name not in POINTS:
            raise UserError(f"{key} must be one of {', '.join(POINTS)}; got {name!r}")
    data, ends = POINTS[target](n=n, seed=seed), POINTS[source](n=n, seed=seed + 500_000)
    data.name, data.train_endpoints, data.heldout_endpoints = "transport", ends.pixels(), ends.pixels("heldout")
    return data


def eight_gaussians(
    n: int = 20_000, n_heldout: int = 10_000, seed: int = 0, radius: float = 2.0, scale: float = 0.1
) -> Dataset:
    """Eight Gaussians of standard deviation ``scale`` evenly spaced on a circle of ``radius``; points
    ``(N, 2)``.
    """

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(8, (count,), generator=generator)
        angle = label * (math.pi / 4)
        centre = torch.stack([angle.cos(), angle.sin()], dim=1) * radius
        return centre + scale * torch.randn(count, 2, generator=generator), label

    return _mixture("eight_gaussians", draw, n, n_heldout, seed)


def moons(n: int = 20_000, n_heldout: int = 10_000, seed: int = 0, scale: float = 0.05) -> Dataset:
    """Two interleaved half circles of radius 1 with Gaussian noise of standard deviation ``scale``,
    centred; ``(N, 2)``.
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
    """Uniform on the dark squares of a ``cells x cells`` board that covers ``[-2, 2]^2``; points ``(N,
    2)``.
    """
    if cells < 2:
        raise UserError(f"cells must be at least 2, got {cells}")

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
    # One generator a split, so that the size of one leaves the other's points alone.
    train, train_labels = draw(n, torch.Generator().manual_seed(2 * seed))
    heldout, heldout_labels = draw(n_heldout, torch.Generator().manual_seed(2 * seed + 1))
    return Dataset(name, train, heldout, train_labels, heldout_labels)


def folder(
    path: str | Path,
    size: int = 32,
    channels: int = 3,
    heldout_every: int = 10,
    limit: int | None = None,
) -> Dataset:
    """All images under ``path`` (any sizes, searched recursively), as uint8 ``(N, channels, size, size)``.

    Each image is scaled so that its shorter side is ``size`` (Lanczos) and cut to the central square.  In
    the order of their paths every ``heldout_every``-th image is held out; with one image or
    ``heldout_every=0`` the held-out split is the training split.  Raises for a missing path, a folder
    without images, or a file that is no readable image.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"path: there is no folder {root}")
    if size < 1 or channels not in (1, 3):
        raise UserError(f"size must be positive and channels 1 or 3, got size {size} and channels {channels}")
    if heldout_every < 0 or heldout_every == 1:
        raise UserError(f"heldout_every must be 0 (nothing held out) or at least 2, got {heldout_every}")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())[:limit]
    if not files:
        raise UserError(f"path: the folder {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    for i, file in enumerate(files):
        try:
            images[i] = torch.from_numpy(square(file, size, channels))
        except Exception as error:
            # What a foreign file makes a decoder raise is anything.
            raise UserError(f"path: {file} cannot be read as an image ({error})") from None
    held = torch.zeros(len(files), dtype=torch.bool)
    if heldout_every:
        held[heldout_every - 1 :: heldout_every] = True
    train, heldout = images[~held], images[held]
    return Dataset(
        "folder",
        train,
        heldout if len(heldout) else train,
        preprocessing=f"shorter side to {size}, central square, {channels} channel(s), byte / 127.5 - 1",
    )


def square(
    file: Path | BinaryIO, size: int, channels: int, crop: int | None = None, filter: str = "lanczos"
) -> np.ndarray[Any, Any]:
    """The pixels ``(channels, size, size)`` uint8 of an image: its central ``crop x crop`` ones, or the largest central
    square, scaled with one of :data:`FILTERS`.

    Raises ``ValueError`` for an image of more than :data:`MOST_PIXELS`, or smaller than ``crop``, and whatever the
    decoder does for one that is damaged.
    """
    from PIL import Image, ImageOps

    with Image.open(file, formats=IMAGE_FORMATS) as opened:
        width, height = opened.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS}")
        picture = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    if crop is not None:
        if min(picture.size) < crop:
            raise ValueError(f"{picture.width} x {picture.height} pixels are less than a crop of {crop}")
        left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
        picture = picture.crop((left, top, left + crop, top + crop))
    picture = ImageOps.fit(picture, (size, size), Image.Resampling[filter.upper()])
    return np.ascontiguousarray(np.array(picture).reshape(size, size, channels).transpose(2, 0, 1))


def cifar10(path: str | Path) -> Dataset:
    """CIFAR-10 from its binary files in ``path``: uint8 ``(50000, 3, 32, 32)`` and the test batch held out.

    ``path`` is the folder with ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or its
    parent. Fewer training batches are taken as they are.  Raises for missing files, truncated ones and
    impossible labels. Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    batches, test = cifar10_files(Path(path))
    parts = [cifar10_records(file) for file in batches]
    heldout, heldout_labels = cifar10_records(test)
    return Dataset(
        "cifar10",
        torch.cat([images for images, _ in parts]),
        heldout,
        torch.cat([labels for _, labels in parts]),
        heldout_labels,
        preprocessing="byte / 127.5 - 1, 3x32x32",
    )


def cifar10_files(root: Path) -> tuple[list[Path], Path]:
    """CIFAR-10's training batches and its test batch in ``root`` or in the folder that the archive makes there."""
    if not root.is_dir():
        raise UserError(f"path: there is no folder {root}")
    inner = root if (root / "test_batch.bin").is_file() else root / "cifar-10-batches-bin"
    batches = [file for i in range(1, 6) if (file := inner / f"data_batch_{i}.bin").is_file()]
    if not batches or not (inner / "test_batch.bin").is_file():
        raise UserError(f"path: {root} holds no CIFAR-10 binary files (data_batch_1.bin ... test_batch.bin)")
    return batches, inner / "test_batch.bin"


def cifar10_records(file: Path) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, 32, 32)`` uint8 and labels ``(N,)`` int64 of one binary file."""
    raw = np.fromfile(file, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % CIFAR_RECORD:
        raise UserError(f"path: {file} is truncated: {len(raw)} bytes are no multiple of a record's {CIFAR_RECORD}")
    records = torch.from_numpy(raw.reshape(-1, CIFAR_RECORD))
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise UserError(f"path: {file} is no CIFAR-10 file: it has a label {int(labels.max())}")
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels


def packed(path: str | Path) -> Dataset:
    """The images that ``realuid-fast pack`` has written into the folder ``path``: uint8, read when they are drawn.

    Only labels are held in memory.  Raises for a missing or damaged manifest, and for arrays that are not the ones
    it describes; the images' checksums are left to :func:`realuid_fast.packed.verify`.
    """
    root = Path(path)
    manifest = stored.read_manifest(root / stored.MANIFEST)

    def images(split: stored.Split) -> stored.Stored:
        return stored.Stored(root / split.images.name, (split.count, *manifest.shape), split.images.sha256)

    def labels(split: stored.Split) -> Tensor | None:
        entry, classes = split.labels, len(manifest.classes)
        return None if entry is None else stored.labels(root / entry.name, split.count, classes, entry.sha256)

    train, heldout = manifest.train, manifest.heldout
    return Dataset(
        "packed",
        images(train),
        images(heldout),
        labels(train),
        labels(heldout),
        preprocessing=f"{manifest.preprocessing}, byte / 127.5 - 1",
    )


POINTS: dict[str, Callable[..., Dataset]] = {
    "eight_gaussians": eight_gaussians,
    "moons": moons,
    "checkerboard": checkerboard,
}
LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "digit_pairs": digit_pairs,
    **POINTS,
    "transport": transport,
    "folder": folder,
    "cifar10": cifar10,
    "packed": packed,
}
