"""A small classifier whose features serve as a distance's: trained on labelled images, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..choices import CLASSIFIERS
from ..errors import UserError
from ..files import check_regular, replacing
from ..models.checksums import CHECKSUM, matches, with_checksum

CLASSIFIER_FILE = CLASSIFIERS["digits"]
FEATURES = 64
SMALLEST, MOST_CLASSES = 4, 10_000
_KINDS = ("classifier", "digit_classifier")  # the second is in the shipped digits' file
_METADATA = "realuid_fast"


class Classifier(nn.Module):
    """Three convolutions and two linear layers for images ``(N, channels, size, size)`` in ``[-1, 1]``.

    The features are the 64 SiLU activations before the last layer. The defaults are those of the digits.

    Raises:
        UserError: a ``size`` below 4, which two halvings would leave without pixels, or numbers that are not positive.
    """

    def __init__(self, channels: int = 1, size: int = 8, classes: int = 10) -> None:
        super().__init__()
        if channels < 1 or size < SMALLEST or not 1 <= classes <= MOST_CLASSES:
            raise UserError(
                f"a classifier needs channels from 1, a size from {SMALLEST} and classes from 1 to {MOST_CLASSES}, got "
                f"{channels}, {size} and {classes}"
            )
        self.shape, self.classes = (channels, size, size), classes
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.project = nn.Linear(64 * (size // 4) ** 2, FEATURES)
        self.classify = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """Features ``(N, 64)`` of images ``(N, channels, size, size)``."""
        return self.maps(x)[-1]

    def maps(self, x: Tensor) -> list[Tensor]:
        """The activations of the second and the third convolution, and the features."""
        second = F.silu(self.conv2(F.silu(self.conv1(x))))
        third = F.silu(self.conv3(F.avg_pool2d(second, 2)))
        return [second, third, F.silu(self.project(F.avg_pool2d(third, 2).flatten(1)))]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        return self.classify(self.features(x))


def train_classifier(
    epochs: int = 30, batch: int = 64, lr: float = 1e-3, seed: int = 0, dataset: data.Dataset | None = None
) -> tuple[Classifier, float]:
    """Train a classifier on a data set's training split alone; returns it with its accuracy on the held-out split.

    AdamW (weight decay 0.01), cosine decay to zero, cross entropy, no augmentation.

    Args:
        epochs, batch, lr: passes over the training split, images of a step, the first learning rate.
        seed: of the first weights and of the batches.
        dataset: square images with labels; the digits if None.

    Raises:
        UserError: data without labels, or samples that are not square images.
    """
    dataset = data.digits() if dataset is None else dataset
    labels, heldout_labels = dataset.train_labels, dataset.heldout_labels
    if labels is None or heldout_labels is None:
        raise UserError(f"a classifier needs labels, data set '{dataset.name}' has none")
    if len(dataset.shape) != 3 or dataset.shape[1] != dataset.shape[2]:
        raise UserError(
            f"a classifier needs square images (channels, size, size), '{dataset.name}' has {dataset.shape}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = Classifier(dataset.shape[0], dataset.shape[2], int(labels.max()) + 1)
    order = torch.Generator().manual_seed(seed)
    batch = min(batch, len(dataset))
    steps = epochs * (len(dataset) // batch)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    stream = dataset.batches(batch, order)
    for _ in range(steps):
        images, targets = next(stream)
        assert targets is not None
        loss = F.cross_entropy(net(images), targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval().requires_grad_(False)
    with torch.no_grad():
        found = torch.cat([net(chunk).argmax(1) for chunk in dataset.pixels("heldout").split(1000)])
    return net, (found == heldout_labels).double().mean().item()


def write(file: Path, net: Classifier, dataset: data.Dataset, accuracy: float) -> None:
    """Write a trained classifier with its checksum, its data's name and its accuracy on the held-out split."""
    description = {
        "format": 1,
        "kind": "classifier",
        "network": {"channels": net.shape[0], "size": net.shape[2], "classes": net.classes},
        "data": dataset.name,
        "heldout_accuracy": round(accuracy, 4),
    }
    with replacing(file) as stream:
        stream.write(with_checksum(net.state_dict(), _METADATA, description))


def read(file: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier's file, or a shipped one's name, as a frozen network and its description.

    Raises:
        UserError: the file is missing, damaged, or holds no classifier.
    """
    from safetensors import SafetensorError, safe_open

    file = CLASSIFIERS.get(str(file), file)
    try:
        check_regular(Path(file))
    except OSError as error:
        raise UserError(f"the classifier {file} cannot be read: {error.strerror}") from None
    try:
        with safe_open(str(file), framework="pt") as opened:
            description = json.loads(opened.metadata()[_METADATA])
            if description["kind"] not in _KINDS or not matches(Path(file), description.get(CHECKSUM)):
                raise ValueError
            # Without memory of its own: a damaged file may ask for any size.
            with torch.device("meta"):
                net = Classifier(**description.get("network", {}))
            net.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()}, assign=True)  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"the file {file} is damaged or holds no classifier") from None
    return net.eval().requires_grad_(False), description


@torch.no_grad()
def features(net: Classifier, images: Tensor, batch: int = 1000) -> Tensor:
    """Features ``(N, 64)`` float32 of images ``(N, channels, size, size)``, clipped to ``[-1, 1]`` first.

    Raises:
        UserError: images of another shape.
    """
    if images.dim() != 4 or tuple(images.shape[1:]) != net.shape:
        raise UserError(f"images must have shape (N, {', '.join(map(str, net.shape))}), got {tuple(images.shape)}")
    chunks = images.detach().float().cpu().clamp(-1, 1).split(batch)
    return torch.cat([net.features(chunk) for chunk in chunks])


@lru_cache(maxsize=1)
def digit_classifier() -> Classifier:
    """The shipped classifier of the digits, frozen, in evaluation mode."""
    try:
        return read(CLASSIFIER_FILE)[0]
    except UserError as error:
        raise UserError(f"{error}; reinstall, or run realuid-fast train-classifier") from None


def digit_features(images: Tensor, batch: int = 1000) -> Tensor:
    """:func:`features` of digits ``(N, 1, 8, 8)`` in the shipped classifier."""
    return features(digit_classifier(), images, batch)


def judge(file: str, dataset: data.Dataset) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The measure's name and features of ``run.classifier``.

    Raises:
        UserError: a file that cannot be read, or a classifier of images of another shape.
    """
    net, description = read(file)
    if net.shape != dataset.shape:
        raise UserError(
            f"run.classifier {file} is for images of shape {net.shape}, '{dataset.name}' has samples of {dataset.shape}"
        )
    name = (
        f"Fréchet distance, features of a classifier of {description['data']} "
        f"({description['heldout_accuracy']:.2%} of the held-out ones right)"
    )
    return name, lambda samples: features(net, samples)
