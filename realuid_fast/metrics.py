"""Distances between sample sets under their public name; :mod:`realuid_fast.evaluate.distances` computes them."""

from .evaluate.distances import (
    CLASSIFIER_FILE,
    FEATURES,
    DigitClassifier,
    Moments,
    Statistics,
    digit_classifier,
    digit_features,
    features_of,
    frechet_distance,
    frechet_of_moments,
    kernel_distance,
    main,
    moments,
    precision_recall,
    sliced_wasserstein,
    train_classifier,
)

__all__ = [
    "CLASSIFIER_FILE",
    "FEATURES",
    "DigitClassifier",
    "Moments",
    "Statistics",
    "digit_classifier",
    "digit_features",
    "features_of",
    "frechet_distance",
    "frechet_of_moments",
    "kernel_distance",
    "main",
    "moments",
    "precision_recall",
    "sliced_wasserstein",
    "train_classifier",
]

if __name__ == "__main__":
    raise SystemExit(main())
