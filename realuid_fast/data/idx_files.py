"""The IDX files of MNIST and of sets like it (Fashion-MNIST, KMNIST): bytes in arrays, compressed or not.

A file is two zero bytes, the type (8: uint8), the number of dimensions, each dimension as four bytes with the highest
first, and the values in row-major order. Source: Y. LeCun, C. Cortes and C. Burges, The MNIST database, 1998.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..errors import UserError

SPLITS = ("train", "t10k")
_KINDS = {"images": 3, "labels": 1}  # and the number of their dimensions
_UINT8 = 8
MOST_BYTES = 1 << 31  # a larger file is more likely a trap than a set that is to be held in memory
_CHUNK = 1 << 20


def found(root: Path) -> list[dict[str, Path]] | None:
    """For ``train`` and for ``t10k`` the files of images and labels in ``root``; None where not all are there."""
    splits = []
    for split in SPLITS:
        files = {}
        for kind, dims in _KINDS.items():
            stems = [root / f"{split}-{kind}{point}idx{dims}-ubyte" for point in "-."]
            there = [f for stem in stems for f in (stem, stem.with_name(stem.name + ".gz")) if f.is_file()]
            if not there:
                return None
            files[kind] = there[0]
        splits.append(files)
    return splits


def folder(root: Path) -> Path | None:
    """The folder of the four files: ``root``, its ``raw``, or the ``raw`` of the only set under it; None if in none.

    Raises :class:`UserError` if several sets lie under ``root``.
    """
    near = [place for place in (root, root / "raw") if found(place)]
    places = near[:1] or [place for place in sorted(root.glob("*/raw")) if found(place)]
    if len(places) > 1:
        names = ", ".join(str(place.relative_to(root)) for place in places)
        raise UserError(f"path: {root} holds several sets of IDX files ({names}): give the folder of one")
    return places[0] if places else None


def read(root: Path) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Images ``(N, H, W)`` and labels ``(N,)``, both uint8, of the training files and of the test files.

    Raises:
        UserError: the files are missing, damaged, of another type than uint8, or not as many images as labels.
    """
    if not root.is_dir():
        raise UserError(f"path: there is no folder {root}")
    place = folder(root)
    files = None if place is None else found(place)
    if files is None:
        raise UserError(
            f"path: {root} does not hold the four IDX files train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, compressed (.gz) or not"
        )
    splits = []
    for split in files:
        images, labels = (array(split[kind], dims) for kind, dims in _KINDS.items())
        if len(images) != len(labels):
            raise UserError(f"path: {split['images']} holds {len(images)} images, {split['labels'].name} {len(labels)}")
        splits.append((images, labels))
    if splits[0][0].shape[1:] != splits[1][0].shape[1:]:
        raise UserError(f"path: the training and the test images in {place} are not alike in size")
    return splits


def array(file: Path, dims: int) -> np.ndarray[Any, Any]:
    """The values of one file, uint8 with ``dims`` dimensions.

    Raises:
        UserError: the file is damaged, cut short, longer than its header says, or holds something else.
    """
    try:
        with file.open("rb") as stream:
            if file.suffix == ".gz":
                with gzip.open(stream) as unpacked:
                    return _values(file, dims, cast(BinaryIO, unpacked))
            return _values(file, dims, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"path: {file} is a damaged gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"path: {file} cannot be read: {error.strerror or error}") from None


def _values(file: Path, dims: int, stream: BinaryIO) -> np.ndarray[Any, Any]:
    header = stream.read(4 + 4 * dims)
    if len(header) < 4 or header[:2] != b"\0\0":
        raise UserError(f"path: {file} is no IDX file: it does not begin with two zero bytes")
    if header[2] != _UINT8:
        raise UserError(f"path: {file} holds values of type 0x{header[2]:02x}; only bytes (0x08) can be read")
    if header[3] != dims:
        raise UserError(f"path: {file} holds an array of {header[3]} dimensions, wanted are {dims}")
    if len(header) < 4 + 4 * dims:
        raise UserError(f"path: {file} is cut short in its header")
    shape = struct.unpack(f">{dims}I", header[4:])
    size = math.prod(shape)
    if not 0 < size <= MOST_BYTES:
        sides = "x".join(map(str, shape))
        raise UserError(f"path: {file} says that it holds {sides} values: none, or more than {MOST_BYTES >> 30} GiB")
    # In pieces, so that memory is taken for what comes and not for what the header promises.
    raw = bytearray()
    while len(raw) <= size and (piece := stream.read(min(_CHUNK, size + 1 - len(raw)))):
        raw += piece
    if len(raw) != size:
        what = "is cut short: it has fewer" if len(raw) < size else "holds more"
        raise UserError(f"path: {file} {what} than the {size} values that its header promises")
    return np.frombuffer(raw, np.uint8).reshape(shape)
