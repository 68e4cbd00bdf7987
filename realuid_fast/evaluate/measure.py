"""Distances of generated samples to a data set's held-out split, in features that suit the data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor, nn

from ..data import Dataset, to_float
from ..errors import UserError
from ..noise import NoiseStream, normal
from .classifier import digit_features, judge
from .distances import (
    Statistics,
    frechet_distance,
    frechet_of_moments,
    moments,
    precision_recall,
    sliced_wasserstein,
)
from .inception import Inception

COMPONENTS = 64  # principal components of the pixels, where no classifier exists
MOST = 2000  # samples that precision, recall and the principal components use
# Limits on what is held in memory of a split on disk to compare with: samples, taken at even distances, and values.
STORED, STORED_VALUES = 10_000, 1 << 28
WARMING = 16  # samples that are made before the clock starts
INCEPTION_BATCH = 100  # images that go through the Inception network at a time
Sampler = Callable[..., Tensor]  # noise, and labels and endpoints, if any, to samples
NOISE_SEED = 2**40  # evaluation noise: the same for every run, and no run's own


@dataclass(frozen=True)
class Distances:
    """``distance`` is the data set's main distance (:attr:`Measure.name`). ``sliced_wasserstein`` is taken on pixels
    or coordinates, not on features.

    ``pair_error``, for paired data, is the root mean square, over pixels and samples, of the difference between a
    sample and the original whose endpoint it was made from.
    """

    distance: float
    sliced_wasserstein: float
    precision: float
    recall: float
    pair_error: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class Measure:
    """Measures samples against the held-out split of one data set.

    Digits: Fréchet distance in the digit classifier's features. Points: sliced Wasserstein distance, since two moments
    say little about a mixture. Other images: Fréchet distance on the first 64 principal components of the training
    pixels, which sees layout and colour but no content; :attr:`name` says so wherever the number is shown.

    Args:
        dataset: the samples.
        inception: features for images in place of those above.
        classifier: the file of a :class:`~realuid_fast.metrics.Classifier`, whose features are taken for images where
            ``inception`` is not given.
        train: Inception statistics of all training images. Distances are then to these, as published ones are, and no
            longer to the held-out split. The sliced Wasserstein distance stays one to the held-out split, of at most
            the first 10,000 samples.

    Raises:
        UserError: fewer than two held-out samples, or a classifier's file that cannot be used.
    """

    def __init__(
        self,
        dataset: Dataset,
        inception: Inception | None = None,
        train: Statistics | None = None,
        classifier: str = "",
    ) -> None:
        self.heldout, self.train = (
            dataset.pixels(split, None if isinstance(rows, Tensor) else _bounded(STORED, dataset.shape))
            for split, rows in (("heldout", dataset.heldout), ("train", dataset.train))
        )
        if len(self.heldout) < 2:
            hint = {"folder": "data.heldout_every", "packed": "pack --heldout-every"}.get(dataset.name)
            raise UserError(
                f"data set '{dataset.name}' needs at least 2 held-out samples to measure a distance to"
                + (f": a smaller {hint} holds out more images" if hint else "")
            )
        self._labels, self._heldout_labels = dataset.train_labels, dataset.heldout_labels
        self._endpoints = None if dataset.heldout_endpoints is None else to_float(dataset.heldout_endpoints)
        self._paired = dataset.paired
        self._points = len(dataset.shape) == 1
        self.features: Callable[[Tensor], Tensor] = _flat
        if inception is not None:
            if self._points:
                raise UserError(f"run.inception is for images, '{dataset.name}' holds points")
            self.name = f"Fréchet Inception distance, weights {inception.sha256[:8]}"
            if train is not None:
                self.name += f", to all {train.count:,} training images"
            self.features = lambda samples: torch.cat(
                [inception(part).cpu() for part in samples.split(INCEPTION_BATCH)]
            )
        elif classifier:
            self.name, self.features = judge(classifier, dataset)
        elif dataset.name in ("digits", "digit_pairs"):
            self.name, self.features = "Fréchet distance, digit classifier features", digit_features
        elif self._points:
            self.name = "sliced Wasserstein distance, points"
        else:
            self.features = _principal_components(dataset.pixels("train", _bounded(MOST, dataset.shape)))
            count = self.features(self.heldout[:1]).shape[1]
            self.name = f"Fréchet distance, {count} principal components of the pixels"
        self._to_train, self._device = train, "cpu" if inception is None else inception.device
        self._real_features = self.features(self.heldout) if train is None else _spread(train.features)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the distances that :meth:`__call__` gives on this data set."""
        names = tuple(f.name for f in fields(Distances))
        return names if self._paired else names[:-1]

    def __call__(self, samples: Tensor) -> Distances:
        """Distances of ``samples (N, ...)`` to the held-out split; images are clipped to ``[-1, 1]`` first.

        Samples of paired data must be made from :meth:`conditions`, in that order.
        """
        found = self._distances(samples)
        if not self._paired:
            return found
        originals = self.heldout.repeat(-(-len(samples) // len(self.heldout)), *[1] * (samples.dim() - 1))
        squared = (samples.detach().float().cpu().clamp(-1, 1) - originals[: len(samples)]).square().mean()
        return replace(found, pair_error=float(squared.sqrt()))

    def _distances(self, samples: Tensor) -> Distances:
        samples, real = self._prepared(samples), self._to_train
        sliced = sliced_wasserstein(samples if real is None else samples[:STORED], self.heldout)
        features = self.features(samples)
        if not bool(torch.isfinite(features).all()):
            return Distances(float("inf"), float("inf"), 0.0, 0.0)
        if real is not None:
            of_real = (each.to(self._device) for each in (real.mean, real.covariance))
            main = frechet_of_moments(*moments(features.to(self._device)), *of_real)
        else:
            main = sliced if self._points else frechet_distance(features, self._real_features)
        theirs, generated = self._real_features[:MOST], features[:MOST]
        neighbours = min(3, len(theirs) - 1, len(generated) - 1)
        precision, recall = precision_recall(theirs, generated, neighbours)
        return Distances(main, sliced, precision, recall)

    def _prepared(self, samples: Tensor) -> Tensor:
        samples = samples.detach().float().cpu()
        return samples if self._points else samples.clamp(-1, 1)

    def to_train(self, samples: Tensor) -> float:
        """The main distance of ``samples (N, ...)`` to the training split in place of the held-out one.

        Published Inception distances are of this kind. A loss with real data pulls samples towards the training split,
        and this distance does not contain how far the two splits lie apart.
        """
        if self._to_train is not None:
            return self._distances(samples).distance
        return self.between(samples, self.train)

    def between(self, samples: Tensor, others: Tensor) -> float:
        """The main distance of ``samples (N, ...)`` to ``others (M, ...)``, infinite where either is not finite."""
        samples, others = self._prepared(samples), self._prepared(others)
        features = [self.features(part) for part in (samples, others)]
        if not all(bool(torch.isfinite(part).all()) for part in features):
            return math.inf
        return sliced_wasserstein(samples, others) if self._points else frechet_distance(*features)

    def conditions(
        self, net: nn.Module, count: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels and endpoints to make ``count`` samples for an evaluation from; each None if there are none.

        The endpoints are the held-out ones, repeated. The labels of paired data are those of the endpoints.
        """
        if self._endpoints is None:
            return self.labels(net, count), None
        times = -(-count // len(self._endpoints))
        endpoints = self._endpoints.repeat(times, *[1] * (self._endpoints.dim() - 1))[:count].to(device)
        labels = self.labels(net, count)
        if labels is not None and self._paired and self._heldout_labels is not None:
            labels = self._heldout_labels.repeat(times)[:count]
        return labels, endpoints

    def shown(
        self, net: nn.Module, count: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`conditions` for pictures. The labels are 0, 1, 2, ... repeated, except for paired data."""
        labels, endpoints = self.conditions(net, count, device)
        if not self._paired:
            labels = class_by_class(net, count, device)
        return None if labels is None else labels.to(device), endpoints

    def labels(self, net: nn.Module, count: int) -> Tensor | None:
        """``count`` labels for a class-conditional network: the training split's in a fixed random order, repeated.

        So the classes have the data's proportions, and every model is judged on the same labels. None for an
        unconditional network.
        """
        if not getattr(net, "num_classes", 0):
            return None
        if self._labels is None:
            raise UserError("the network is class-conditional, the data set has no labels")
        order = torch.randperm(len(self._labels), generator=torch.Generator().manual_seed(1))
        return self._labels[order].repeat(-(-count // len(order)))[:count]

    def floor(self) -> Distances:
        """Distances of real samples that generated ones are not compared with: a perfect generator would have these."""
        return self._distances(self.train if self._to_train is None else self.heldout)

    @property
    def floor_name(self) -> str:
        """Which real samples :meth:`floor` measures."""
        return "real training data" if self._to_train is None else "real held-out data"


def _bounded(most: int, shape: tuple[int, ...]) -> int:
    return max(2, min(most, STORED_VALUES // math.prod(shape)))


def _spread(features: Tensor) -> Tensor:
    """At most :data:`MOST` features, taken at even distances, because a split may be sorted by class."""
    count = min(MOST, len(features))
    return features[torch.arange(count) * len(features) // count]


def _flat(samples: Tensor) -> Tensor:
    return samples.detach().float().cpu().flatten(1)


def _principal_components(train: Tensor) -> Callable[[Tensor], Tensor]:
    flat = _flat(train)
    mean = flat.mean(0)
    count = max(min(COMPONENTS, len(flat) - 1, flat.shape[1]), 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _, _, axes = torch.svd_lowrank(flat - mean, q=count, niter=4)
    return lambda samples: (_flat(samples) - mean) @ axes


def evaluation_noise(shape: tuple[int, ...], count: int, device: torch.device | str = "cpu") -> Tensor:
    """The fixed noise ``(count, *shape)`` of every evaluation. A curve then moves with the model, not with the draw."""
    like = torch.empty(count, *shape, device=device)
    return normal(NoiseStream(NOISE_SEED, device).next_key(), like)


def generate(
    sample: Sampler,
    noise: Tensor,
    labels: Tensor | None = None,
    endpoint: Tensor | None = None,
    batch: int = 500,
) -> tuple[Tensor, float]:
    """Call ``sample(noise, labels)``, or ``sample(noise, labels, endpoint)`` with endpoints, in batches.

    Returns all samples on the CPU, and the samples per second after a warm-up.
    """
    conditions = [labels] if endpoint is None else [labels, endpoint]

    def part(first: int, count: int) -> Tensor:
        rows = slice(first, first + count)
        return sample(noise[rows], *(None if c is None else c[rows].to(noise.device) for c in conditions))

    part(0, WARMING)
    began = time.perf_counter()
    made = torch.cat([part(i, batch).cpu() for i in range(0, len(noise), batch)])
    return made, len(noise) / max(time.perf_counter() - began, 1e-9)


def class_by_class(net: nn.Module, count: int, device: torch.device | str = "cpu") -> Tensor | None:
    """``count`` labels 0, 1, 2, ..., repeated, for pictures; None for an unconditional network."""
    classes = int(getattr(net, "num_classes", 0) or 0)
    return torch.arange(count, device=device) % classes if classes else None
