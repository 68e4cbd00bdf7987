"""Images from others' files into memory: folders, MNIST's IDX files, CIFAR-10's binary files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .. import choices
from ..errors import UserError
from ..extras import extra
from . import folders, idx_files
from .dataset import Dataset

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
FILTERS = choices.FILTERS
MOST_PIXELS = 1 << 26  # a larger image is more likely a trap than a picture
CIFAR_RECORD = 3073  # one label byte, then 3 x 32 x 32 pixels, channel by channel
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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
    (:func:`.folders.layout`). Without such folders every ``heldout_every``-th image, by default the 10th, in the order
    of their paths is held out; with fewer images or ``heldout_every=0`` the held-out split is the training split.

    Args:
        path: the folder. Hidden files and folders in it are left out.
        size: side of the samples.
        channels: channels of the samples, 1 or 3.
        heldout_every: every so many-th image is held out, by default every 10th; 0 holds out the training images.
        limit: the number of images to take, the first ones; of each split, if folders make them.
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
            damaged[i] = f"{root / name} cannot be read as an image ({getattr(error, 'strerror', None) or error})"
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
        from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        opening = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        count = file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
        raise ValueError(f"it is {'no image' if count else 'empty'}") from None
    with opening as opened:
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


def idx(path: str | Path, size: int | None = None, channels: int = 1, filter: str = "lanczos") -> Dataset:
    """MNIST and sets like it, from their four IDX files: uint8 ``(60000, 1, 28, 28)``, the test images held out.

    ``path`` is the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-`` files,
    compressed (``.gz``) or not, or a folder with ``MNIST/raw`` in it, as torchvision writes it.

    Args:
        path: the folder with the files, or one that ``MNIST/raw`` is in.
        size: side of the samples, by default as stored. A larger one than the images' pads them evenly with black
            (28 to 32), a smaller one scales them as images of a :func:`folder` are.
        channels: 1, or 3 to repeat the grey one.
        filter: the filter of the scaling: lanczos, bicubic, bilinear, or box, which is the mean over a pixel's area.

    Raises:
        UserError: missing or damaged files, or arguments out of range.

    Source: Y. LeCun, C. Cortes and C. Burges, The MNIST database, 1998.
    """
    read = idx_files.read(Path(path))
    splits = [(idx_images(raw, size, channels, filter), labels.astype(np.int64)) for raw, labels in read]
    (train, train_labels), (heldout, heldout_labels) = splits
    return Dataset(
        "idx",
        torch.from_numpy(train),
        torch.from_numpy(heldout),
        torch.from_numpy(train_labels),
        torch.from_numpy(heldout_labels),
        preprocessing=f"{idx_preprocessing(train.shape, size, filter)}, byte / 127.5 - 1",
    )


def idx_images(
    images: np.ndarray[Any, Any], size: int | None, channels: int, filter: str = "lanczos"
) -> np.ndarray[Any, Any]:
    """Grey images ``(N, H, W)`` uint8 as samples ``(N, channels, size, size)``, see :func:`idx`."""
    with extra():
        from PIL import Image, ImageOps

    if (size is not None and size < 1) or channels not in (1, 3):
        raise UserError(f"size must be positive and channels 1 or 3, got size {size} and channels {channels}")
    if filter not in FILTERS:
        raise UserError(f"filter must be one of {', '.join(FILTERS)}; got {filter!r}")
    height, width = images.shape[1:]
    if size is not None and size >= max(height, width):
        top, left = (size - height) // 2, (size - width) // 2
        images = np.pad(images, ((0, 0), (top, size - height - top), (left, size - width - left)))
    elif size is not None:
        scaled = (ImageOps.fit(Image.fromarray(image), (size, size), _resampling(filter)) for image in images)
        images = np.stack([np.array(image) for image in scaled])
    return np.ascontiguousarray(np.repeat(images[:, None], channels, axis=1))


def idx_preprocessing(shape: tuple[int, ...], size: int | None, filter: str = "lanczos") -> str:
    """A description of what :func:`idx_images` did; ``shape`` is the shape of its samples."""
    sides = "x".join(map(str, shape[1:]))
    return f"{sides} as published" if size is None else f"{sides}, padded with black or scaled down ({filter})"


def cifar10(path: str | Path) -> Dataset:
    """CIFAR-10 from its binary files in ``path``: uint8 ``(50000, 3, 32, 32)`` and the test batch held out.

    ``path`` is the folder with ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or its
    parent. Fewer training batches are taken as they are. Raises for missing files, truncated ones and
    impossible labels. Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        path: the folder with the files, or the one that it is in.
    """
    batches, test = cifar10_files(Path(path))
    read = [cifar10_records(file) for file in batches]
    heldout, heldout_labels = cifar10_records(test)
    return Dataset(
        "cifar10",
        torch.cat([images for images, _ in read]),
        heldout,
        torch.cat([labels for _, labels in read]),
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
