"""Data sets: digits, 2-D mixtures, image folders, MNIST's and CIFAR-10's files in memory, packed images on disk."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from . import choices, folders, idx_files
from . import packed as stored
from .bounds import Range
from .errors import UserError
from .extras import extra

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
    images in ``[-1, 1]``.  Labels are ``(N,)`` int64 or ``None``.  Endpoints, if the set has them, are the
    starting points of two-sided paths: sample ``i``'s own if ``paired``, else drawn independently of it.
    ``preprocessing`` says in words how a stored sample was made from the source; it goes into checkpoints.
    With ``flip`` a run mirrors half of its images at random; with ``balance`` it draws all classes equally
    often.
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


def load(config: str | Mapping[str, Any]) -> Dataset:
    """Data set of a name (``"digits"``, ``"moons"``) or of a mapping with ``name`` and its loader's
    arguments.

    ``{"name": "folder", "path": ..., "size": 32}`` reads a folder of images, ``{"name": "idx", "path": ...}`` MNIST's
    files, ``{"name": "cifar10", "path": ...}`` the binary files, ``{"name": "packed", "path": ...}`` what
    ``realuid-fast pack`` has written.  Every
    set takes ``flip`` and ``balance``.  Raises :class:`UserError` for an unknown name, an argument its loader
    does not take, or bad files.
    """
    settings = {"name": config} if isinstance(config, str) else dict(config)
    name = settings.pop("name", None)
    choices = {key: settings.pop(key) for key in ("flip", "balance") if key in settings}
    if name not in LOADERS:
        raise UserError(f"data set name must be one of {', '.join(LOADERS)}; got {name!r}")
    for key, value in settings.items():
        if isinstance(value, int):
            Range(-(2**31), 2**31 - 1 if key != "seed" else 2**62).check(f"data.{key}", value)
        elif key == "seed":
            raise UserError(f"data.seed must be a whole number, got {value!r:.60}")
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


def digits() -> LabelledDataset:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels of 17 grey levels.

    Scaling ``x = pixel / 8 - 1``.  Split: within each class, in the data set's order, every fourth image
    (the 4th, 8th, ...) is held out, which makes 1,352 training and 445 held-out images, alike in class and
    writer. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    with extra():
        from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(np.asarray(source.images, dtype=np.float32)).unsqueeze(1).div_(8.0).sub_(1.0)
    labels = torch.from_numpy(np.asarray(source.target, dtype=np.int64))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held[(labels == label).nonzero().flatten()[3::4]] = True
    return LabelledDataset(
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

    Args:
        corruption: ``"downsample"``, ``"mask"`` or ``"noise"``.
        amount: side of the blocks, black rows, or the noise's standard deviation.
        seed: the noise's seed.
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


def folder(
    path: str | Path,
    size: int = 32,
    channels: int = 3,
    heldout_every: int | None = None,
    limit: int | None = None,
    labels: bool = True,
    skip_damaged: bool = False,
) -> Dataset:
    """All images under ``path`` (any sizes, searched recursively), as uint8 ``(N, channels, size, size)``.

    Each image is scaled so that its shorter side is ``size`` (Lanczos) and cut to the central square, see
    :func:`square`. Folders are classes and, where they are called ``train`` and ``test`` (or ``val``), the split
    (:func:`realuid_fast.folders.layout`). Without such folders every ``heldout_every``-th image, by default the 10th,
    in the order of their paths is held out; with one image or ``heldout_every=0`` the held-out split is the training
    split.

    Args:
        path: the folder. Hidden files and folders in it are left out.
        size: side of the samples.
        channels: channels of the samples, 1 or 3.
        heldout_every: every so many-th image is held out, by default every 10th; 0 holds out the training images.
        limit: the number of images to take, the first ones; of each part, if folders make a split.
        labels: whether folders are classes.
        skip_damaged: whether images that cannot be read are left out, with a warning that counts them.

    Raises:
        UserError: a missing path, a folder without images, or a file that is no readable image, with its name.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"path: there is no folder {root}")
    if size < 1 or channels not in (1, 3):
        raise UserError(f"size must be positive and channels 1 or 3, got size {size} and channels {channels}")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    folders.check_heldout_every(heldout_every)
    found = folders.layout(folders.images_in(root), labels, limit)
    images = torch.empty(len(found.names), channels, size, size, dtype=torch.uint8)
    damaged: dict[int, str] = {}
    for i, name in enumerate(found.names):
        try:
            images[i] = torch.from_numpy(square(root / name, size, channels))
        except MemoryError:
            raise
        except Exception as error:
            # A file from elsewhere can make the decoder raise any kind of exception.
            damaged[i] = f"{root / name} cannot be read as an image ({error})"
            if not skip_damaged:
                raise UserError(f"path: {damaged[i]}; data.skip_damaged=true leaves such files out") from None
    train, heldout = ([row for row in rows if row not in damaged] for rows in found.split(heldout_every))
    warn_damaged(list(damaged.values()), len(found.names))
    if not train or not heldout:
        raise UserError(f"path: the folder {root} holds no readable images to train on, or none to hold out")
    numbers, train_images = torch.tensor(found.numbers, dtype=torch.int64), images[train]
    return Dataset(
        "folder",
        train_images,
        train_images if heldout == train else images[heldout],
        numbers[train] if found.classes else None,
        numbers[heldout] if found.classes else None,
        preprocessing=f"shorter side to {size}, central square, {channels} channel(s), byte / 127.5 - 1",
    )


def warn_damaged(reasons: Sequence[str], count: int) -> None:
    """Warn that some of ``count`` images were left out, one for each of ``reasons``; no warning without a reason."""
    if reasons:
        warnings.warn(f"{len(reasons)} of {count} images were left out; the first: {reasons[0]}", stacklevel=3)


def square(
    file: Path | BinaryIO, size: int, channels: int, crop: int | None = None, filter: str = "lanczos"
) -> np.ndarray[Any, Any]:
    """The pixels ``(channels, size, size)`` uint8 of an image: its central ``crop x crop`` ones, or the largest central
    square, scaled with one of :data:`FILTERS`.

    Transparent pixels are laid over white. Grey images of 16 bits are scaled to bytes, ``u / 257``.

    Raises ``ValueError`` for an image of more than :data:`MOST_PIXELS` or smaller than ``crop``, for pixels whose range
    the file does not say (whole numbers of 32 bits, floating point), and whatever the decoder does for a damaged one.
    """
    with extra():
        from PIL import Image, ImageOps

    with Image.open(file, formats=IMAGE_FORMATS) as opened:
        width, height = opened.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS}")
        picture = _bytes(ImageOps.exif_transpose(opened), opened.format, getattr(opened, "tag_v2", {}))
    if crop is not None:
        if min(picture.size) < crop:
            raise ValueError(f"{picture.width} x {picture.height} pixels are less than a crop of {crop}")
        left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
        picture = picture.crop((left, top, left + crop, top + crop))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size), _resampling(filter))
    return np.ascontiguousarray(np.array(picture).reshape(size, size, channels).transpose(2, 0, 1))


def _resampling(filter: str) -> Any:
    with extra():
        from PIL import Image

    return Image.Resampling[filter.upper()]


def _bytes(picture: Any, format: str | None, tags: Mapping[int, Any]) -> Any:
    """An image with pixels of 8 bits, of one in ``format`` with TIFF's ``tags``; Pillow itself clips wider pixels."""
    with extra():
        from PIL import Image

    mode = picture.mode
    if mode == "F" or (mode == "I" and format not in ("PNG", "PPM")):
        kind = "floating point" if mode == "F" else "whole numbers of 32 bits"
        raise ValueError(f"its pixels are {kind}, and the file does not say what is black and what is white")
    if mode != "I" and not mode.startswith("I;16"):
        return picture
    values = np.array(picture).astype(np.float64)
    # Tag 258 is the number of bits; tag 262 is 0 where the smallest value is white.
    white = (1 << tags.get(258, (16,))[0]) - 1
    if tags.get(262) == 0:
        values = white - values
    if (hidden := picture.info.get("transparency")) is not None:
        values[values == hidden] = white
    return Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))


def idx(path: str | Path, size: int | None = None, channels: int = 1) -> Dataset:
    """MNIST and sets like it, from their four IDX files: uint8 ``(60000, 1, 28, 28)``, the test images held out.

    ``path`` is the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-`` files,
    compressed (``.gz``) or not, or a folder with ``MNIST/raw`` in it, as torchvision writes it.

    Args:
        path: the folder with the files, or one that ``MNIST/raw`` is in.
        size: side of the samples, by default as stored. A larger one than the images' pads them evenly with black
            (28 to 32), a smaller one scales them as images of a :func:`folder` are.
        channels: 1, or 3 to repeat the grey one.

    Raises:
        UserError: missing or damaged files. Source: Y. LeCun, C. Cortes and C. Burges, The MNIST database, 1998.
    """
    splits = [(idx_images(raw, size, channels), labels.astype(np.int64)) for raw, labels in idx_files.read(Path(path))]
    (train, train_labels), (heldout, heldout_labels) = splits
    return Dataset(
        "idx",
        torch.from_numpy(train),
        torch.from_numpy(heldout),
        torch.from_numpy(train_labels),
        torch.from_numpy(heldout_labels),
        preprocessing=f"{idx_preprocessing(train.shape, size)}, byte / 127.5 - 1",
    )


def idx_images(images: np.ndarray[Any, Any], size: int | None, channels: int) -> np.ndarray[Any, Any]:
    """Grey images ``(N, H, W)`` uint8 as samples ``(N, channels, size, size)``, see :func:`idx`."""
    with extra():
        from PIL import Image, ImageOps

    if (size is not None and size < 1) or channels not in (1, 3):
        raise UserError(f"size must be positive and channels 1 or 3, got size {size} and channels {channels}")
    height, width = images.shape[1:]
    if size is not None and size >= max(height, width):
        top, left = (size - height) // 2, (size - width) // 2
        images = np.pad(images, ((0, 0), (top, size - height - top), (left, size - width - left)))
    elif size is not None:
        scaled = (ImageOps.fit(Image.fromarray(image), (size, size), _resampling("lanczos")) for image in images)
        images = np.stack([np.array(image) for image in scaled])
    return np.ascontiguousarray(np.repeat(images[:, None], channels, axis=1))


def idx_preprocessing(shape: tuple[int, ...], size: int | None) -> str:
    """A description of what :func:`idx_images` did; ``shape`` is the shape of its samples."""
    sides = "x".join(map(str, shape[1:]))
    return f"{sides} as published" if size is None else f"{sides}, padded with black or scaled down (lanczos)"


def cifar10(path: str | Path) -> Dataset:
    """CIFAR-10 from its binary files in ``path``: uint8 ``(50000, 3, 32, 32)`` and the test batch held out.

    ``path`` is the folder with ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or its
    parent. Fewer training batches are taken as they are.  Raises for missing files, truncated ones and
    impossible labels. Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        path: the folder with the files, or the one that it is in.
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

    Args:
        path: the folder.
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
    "idx": idx,
    "cifar10": cifar10,
    "packed": packed,
}
