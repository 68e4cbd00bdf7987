"""Data sets by name, the digits among them; :data:`LOADERS` holds every name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bounds import Range
from ..errors import UserError
from ..extras import extra
from . import stored
from .dataset import Dataset, LabelledDataset
from .images import cifar10, folder, idx
from .points import POINTS, transport


def load(config: str | Mapping[str, Any]) -> Dataset:
    """Data set of a name (``"digits"``, ``"moons"``) or of a mapping with ``name`` and its loader's arguments.

    ``{"name": "folder", "path": ..., "size": 32}`` reads a folder of images, ``{"name": "idx", "path": ...}`` MNIST's
    files, ``{"name": "cifar10", "path": ...}`` the binary files, ``{"name": "packed", "path": ...}`` what
    ``realuid-fast pack`` has written. Every set takes ``flip``, ``balance`` and ``classes``, the labels that are kept.

    Raises:
        UserError: an unknown name, an argument that its loader does not take, or bad files.
    """
    settings = {"name": config} if isinstance(config, str) else dict(config)
    name = settings.pop("name", None)
    choices = {key: settings.pop(key) for key in ("flip", "balance") if key in settings}
    kept: Any = settings.pop("classes", None)
    if name not in LOADERS:
        raise UserError(f"data set name must be one of {', '.join(LOADERS)}; got {name!r}")
    for key, value in settings.items():
        if isinstance(value, int):
            Range(-(2**31), 2**31 - 1 if key != "seed" else 2**62).check(f"data.{key}", value)
        elif key == "seed":
            raise UserError(f"data.seed must be a whole number, got {value!r:.60}")
    for key, parameter in inspect.signature(LOADERS[name]).parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise UserError(f"data.{key} must be given with data.name={name}")
    try:
        dataset = LOADERS[name](**settings)
    except TypeError as error:
        raise UserError(f"data set '{name}' was given an argument it cannot use: {error}") from None
    dataset.config = {"name": name, **settings, **choices}
    if kept is not None:
        dataset.keep(kept)
        dataset.config["classes"] = list(kept)
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

    Scaling ``x = pixel / 8 - 1``. Split: within each class, in the data set's order, every fourth image
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


def packed(path: str | Path) -> Dataset:
    """The images that ``realuid-fast pack`` has written into the folder ``path``: uint8, read when they are drawn.

    Only labels are held in memory. Raises for a missing or damaged manifest, and for arrays that are not the ones
    it describes; the images' checksums are left to :func:`realuid_fast.data.stored.verify`.

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
