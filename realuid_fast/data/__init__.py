"""Data sets: digits, 2-D mixtures, image folders, MNIST's and CIFAR-10's files in memory, packed images on disk.

:func:`load` makes a :class:`Dataset` of a name. :mod:`realuid_fast.data.packing` writes packed images.
"""

from .dataset import Dataset, LabelledDataset, to_bytes, to_float
from .images import (
    CIFAR_CLASSES,
    CIFAR_RECORD,
    FILTERS,
    IMAGE_FORMATS,
    MOST_PIXELS,
    cifar10,
    cifar10_files,
    cifar10_records,
    folder,
    idx,
    idx_images,
    idx_preprocessing,
    square,
    warn_damaged,
)
from .points import POINTS, checkerboard, eight_gaussians, moons, transport
from .sets import LOADERS, digit_pairs, digits, load, packed

__all__ = [
    "CIFAR_CLASSES",
    "CIFAR_RECORD",
    "FILTERS",
    "IMAGE_FORMATS",
    "LOADERS",
    "MOST_PIXELS",
    "POINTS",
    "Dataset",
    "LabelledDataset",
    "checkerboard",
    "cifar10",
    "cifar10_files",
    "cifar10_records",
    "digit_pairs",
    "digits",
    "eight_gaussians",
    "folder",
    "idx",
    "idx_images",
    "idx_preprocessing",
    "load",
    "moons",
    "packed",
    "square",
    "to_bytes",
    "to_float",
    "transport",
    "warn_damaged",
]
