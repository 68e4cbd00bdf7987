"""Fused kernels and a trainer for universal inverse distillation with real-data supervision."""

from . import backends, couplings, errors, noise, objectives, optim, paths
from .backends import backend
from .functional import (
    FakeGrads,
    GeneratorGrads,
    MatchingGrads,
    fake_grads,
    fake_loss,
    generator_grads,
    generator_loss,
    interpolate,
    matching_grads,
    matching_loss,
    sample_output,
)
from .noise import NoiseStream

__version__ = "0.1.0"

__all__ = [
    "FakeGrads",
    "GeneratorGrads",
    "MatchingGrads",
    "NoiseStream",
    "backend",
    "backends",
    "couplings",
    "errors",
    "fake_grads",
    "fake_loss",
    "generator_grads",
    "generator_loss",
    "interpolate",
    "matching_grads",
    "matching_loss",
    "noise",
    "objectives",
    "optim",
    "paths",
    "sample_output",
]
