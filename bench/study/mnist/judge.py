"""Scores of samples in the classifier's features: distance with a bootstrap interval, precision, recall, kernel
distance, memorisation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from realuid_fast import data, metrics, teachers
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.evaluate.table import sampler

from .arms import Place

SAMPLES = 10_000  # of every distance: as many as there are held-out images
NEAREST = 2000  # samples and held-out images of precision, recall and memorisation
BOOTSTRAP = 200
LEVEL = (0.025, 0.975)


@dataclass(frozen=True)
class Scores:
    """Scores of one set of samples.

    Attributes:
        distance: Fréchet distance to the held-out images.
        interval: its 95 % bootstrap interval, over samples and held-out images.
        to_train: the same distance to 10,000 training images.
        precision, recall: Kynkäänniemi et al., 1904.06991, on 2,000 of each.
        kernel, kernel_error: kernel distance and its standard error, Bińkowski et al., 1801.01401; the latter is NaN,
            null in JSON, where every subset is all samples.
        memorised: the probability that a sample is nearer, in pixels, to its nearest training image than a held-out
            image is to its own. New images of the training law have 0.5, copies of training images have 1.
    """

    distance: float
    interval: tuple[float, float]
    to_train: float
    precision: float
    recall: float
    kernel: float
    kernel_error: float
    memorised: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | ({"kernel_error": None} if math.isnan(self.kernel_error) else {})


class Judge:
    """Measures samples against one data set's two splits; what does not change with the samples is made once."""

    def __init__(self, place: Place, config_data: dict[str, Any], samples: int = SAMPLES) -> None:
        self.dataset = data.load(config_data)
        self.measure = Measure(self.dataset, classifier=str(place.classifier))
        self.samples = samples
        train = self.measure.train
        # A random draw: even and odd places of MNIST's file hold different kinds of images, so images at even distances
        # from each other are no fair sample.
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        self.some_train = train[order[:samples]]
        self._train_features = self.measure.features(self.some_train)
        self._real = self.measure.features(self.measure.heldout)
        self._apart = _nearest(self.measure.heldout[:NEAREST], train)

    def made_by(self, model: teachers.Model, steps: int = 1, solver: str = "euler", count: int | None = None) -> Tensor:
        """Samples of a model from the noise that every evaluation uses; the first ``count`` where it is given."""
        noise = evaluation_noise(self.dataset.shape, self.samples)[:count]
        return generate(sampler(model, steps, solver), noise)[0].clamp(-1, 1)

    def __call__(self, samples: Tensor) -> Scores:
        """The scores of images ``(N, C, H, W)``."""
        found, real = self.measure.features(samples), self._real
        precision, recall = metrics.precision_recall(real[:NEAREST], found[:NEAREST])
        kernel, error = metrics.kernel_distance(found, real)
        return Scores(
            metrics.frechet_distance(found, real),
            bootstrap(found, real),
            metrics.frechet_distance(found, self._train_features),
            precision,
            recall,
            kernel,
            error,
            nearer(_nearest(samples[:NEAREST], self.measure.train), self._apart),
        )

    def floor(self) -> Scores:
        """The scores of real training images: a generator of the training law has these."""
        return self(self.some_train)


def bootstrap(found: Tensor, real: Tensor, repeats: int = BOOTSTRAP, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the Fréchet distance of features ``(N, D)`` and ``(M, D)``, both drawn anew each time.

    A bootstrap adds the draw's bias once more. The interval is therefore the basic one: quantiles of the differences
    from the distance itself, subtracted from it (Davison and Hinkley, Bootstrap Methods, 1997, section 2.4).
    """
    generator = torch.Generator().manual_seed(seed)

    def again(features: Tensor) -> Tensor:
        return features[torch.randint(len(features), (len(features),), generator=generator)]

    distance = metrics.frechet_distance(found, real)
    values = torch.tensor([metrics.frechet_distance(again(found), again(real)) for _ in range(repeats)])
    low, high = torch.quantile(values.double(), torch.tensor(LEVEL, dtype=torch.float64)).tolist()
    return max(2 * distance - high, 0.0), max(2 * distance - low, 0.0)


def nearer(ours: Tensor, theirs: Tensor) -> float:
    """The probability that a number of ``ours`` is below one of ``theirs``; equal numbers count half."""
    less = torch.searchsorted(theirs.sort().values, ours, right=True)
    least = torch.searchsorted(theirs.sort().values, ours, right=False)
    return 1 - (0.5 * (less + least).double() / len(theirs)).mean().item()


def _nearest(images: Tensor, train: Tensor) -> Tensor:
    """The distance of every image to its nearest training image, in pixels' units."""
    flat = train.flatten(1)
    return torch.cat([torch.cdist(part, flat).min(1).values for part in images.flatten(1).split(500)])
