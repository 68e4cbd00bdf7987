"""Distances between sample sets under their public names.

:mod:`realuid_fast.evaluate.distances` computes them, :mod:`realuid_fast.evaluate.classifier` has the classifiers whose
features they are measured in.
"""

from .evaluate.classifier import (
    CLASSIFIER_FILE,
    FEATURES,
    Classifier,
    digit_classifier,
    digit_features,
    train_classifier,
)
from .evaluate.distances import (
    Moments,
    Statistics,
    frechet_distance,
    frechet_of_moments,
    kernel_distance,
    moments,
    precision_recall,
    sliced_wasserstein,
)

__all__ = [
    "CLASSIFIER_FILE",
    "FEATURES",
    "Classifier",
    "Moments",
    "Statistics",
    "digit_classifier",
    "digit_features",
    "frechet_distance",
    "frechet_of_moments",
    "kernel_distance",
    "moments",
    "precision_recall",
    "sliced_wasserstein",
    "train_classifier",
]
