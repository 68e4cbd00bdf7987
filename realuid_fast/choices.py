"""Names and numbers that the command line's help shows. This module imports no torch, so the help comes at once."""

from __future__ import annotations

import os
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
CONFIGS = Path(__file__).parent / "configs"
# The shipped teachers, students, and classifiers of evaluations.
TEACHERS = {"digits": ASSETS / "digits_teacher.safetensors", "mnist-teacher": ASSETS / "mnist_teacher.safetensors"}
STUDENTS = {"mnist": ASSETS / "mnist_student.safetensors"}
CLASSIFIERS = {"digits": ASSETS / "digits_classifier.safetensors", "mnist": ASSETS / "mnist_classifier.safetensors"}
SOLVERS = ("euler", "heun", "midpoint", "ddim", "dpmpp", "edm")
FILTERS = ("lanczos", "bicubic", "bilinear", "box")  # filters that scale images
SOURCES = ("images", "celeba", "idx", "cifar10")  # kinds of sources that `pack` reads
LABELS = ("empirical", "balanced")  # ways to choose a generator's labels for Inception distances
TEACHER_STEPS = (1, 20, 100)  # numbers of steps of the teacher in the rows of `evaluate`
MODES = ("eager", "compiled", "graphs", "graphs-eager")  # ways to run the turns of a training
PRECISIONS = ("float32", "tf32", "bf16", "fp16")  # arithmetics of the networks in a turn
PLAN_STEPS = 20  # updates that --dry-run times
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realuid_fast"
CACHE_IN_WORDS = "realuid_fast in $XDG_CACHE_HOME or ~/.cache"


def configs() -> list[str]:
    """The shipped configurations: ``realuid-fast distill --config NAME``."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def presets() -> dict[str, str]:
    """The shipped presets, each with its first line: ``realuid-fast distill --preset NAME``."""
    return _titles("presets")


def recipes() -> dict[str, str]:
    """The published recipes, each with its first line: ``realuid-fast distill --config recipes/NAME``."""
    return _titles("recipes")


def _titles(folder: str) -> dict[str, str]:
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    return {file.stem: file.read_text().partition("\n")[0].removeprefix("# ") for file in files}
