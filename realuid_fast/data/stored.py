"""Image sets on disk, larger than memory if need be: arrays of bytes, read row by row, beside a manifest in JSON.

A folder holds ``manifest.json`` and, for the splits ``train`` and ``heldout``, plain ``.npy`` files: images
``(N, C, H, W)`` uint8 and, where there are labels, ``(N,)`` int32. :mod:`realuid_fast.data.packing` writes them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import check_regular, read_regular
from . import staging

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
_MANIFEST_BYTES = 1 << 24
_CHUNK = 1 << 20
# numpy has no larger arrays, and no file is as long.
_MOST_BYTES = 2**62
# Labels are read whole: 4 GB of them.
_MOST_LABELS = 2**30


@dataclass(frozen=True)
class File:
    """An array's file: its name beside the manifest, its length in bytes with the header, and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """``count`` images, and their labels where the set has classes."""

    count: int
    images: File
    labels: File | None


@dataclass(frozen=True)
class Manifest:
    """A packed set's description of itself.

    ``shape`` is ``(C, H, W)``; ``classes`` names the labels 0, 1, ... and is empty without labels; ``preprocessing``
    and ``source`` say in words how a stored image was made, and from what.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    preprocessing: str
    source: str
    train: Split
    heldout: Split

    def text(self) -> str:
        """The content of ``manifest.json``."""
        return json.dumps({"format": FORMAT, "kind": "packed images", **asdict(self)}, indent=1) + "\n"


def read_manifest(file: Path) -> Manifest:
    """The manifest in ``file``, every value checked.

    Raises:
        UserError: there is none, it is damaged or of a newer format; the sentence names the file and the value.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            raw = stream.read(_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        said = f"path: there is no packed data set in {file.parent}: it has no {file.name}"
        if (aside := staging.set_aside(file.parent.absolute())) is not None:
            said += f"; one that was to be replaced lies in {aside}, and the next pack to {file.parent} puts it back"
        raise UserError(said) from None
    except OSError as error:
        raise UserError(f"path: {file} cannot be read: {error.strerror or error}") from None
    try:
        content = json.loads(raw) if len(raw) <= _MANIFEST_BYTES else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("kind") != "packed images":
        raise UserError(f"path: {file} is no manifest of a packed data set")
    if content.get("format") != FORMAT:
        raise UserError(f"path: {file} has format {content.get('format')!r}, this version reads {FORMAT}")

    def refuse(key: str, wanted: str) -> UserError:
        return UserError(f"path: {file} is damaged: '{key}' must be {wanted}")

    def whole(value: Any, key: str, least: int) -> int:
        if type(value) is not int or not least <= value < _MOST_BYTES:
            raise refuse(key, f"a whole number of at least {least}")
        return value

    def text(value: Any, key: str) -> str:
        if not isinstance(value, str):
            raise refuse(key, "text")
        return value

    def entry(value: Any, key: str) -> File:
        if not isinstance(value, dict):
            raise refuse(key, "a file's name, size and sha256")
        name, digest = text(value.get("name"), f"{key}.name"), text(value.get("sha256"), f"{key}.sha256")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}\.npy", name):
            raise refuse(f"{key}.name", "the name of a .npy file beside the manifest")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise refuse(f"{key}.sha256", "64 hexadecimal digits")
        return File(name, whole(value.get("size"), f"{key}.size", 1), digest)

    def split(key: str) -> Split:
        value = content.get(key)
        if not isinstance(value, dict):
            raise refuse(key, "a split's count, images and labels")
        labels = None if not classes else entry(value.get("labels"), f"{key}.labels")
        return Split(whole(value.get("count"), f"{key}.count", 1), entry(value.get("images"), f"{key}.images"), labels)

    shape, classes = content.get("shape"), content.get("classes")
    if not isinstance(shape, list) or len(shape) != 3:
        raise refuse("shape", "channels, height and width")
    c, h, w = (whole(side, "shape", 1) for side in shape)
    if not isinstance(classes, list):
        raise refuse("classes", "a list of names")
    classes = tuple(text(name, "classes") for name in classes)
    preprocessing, source = (text(content.get(key), key) for key in ("preprocessing", "source"))
    manifest = Manifest((c, h, w), classes, preprocessing, source, split("train"), split("heldout"))
    if max(manifest.train.count, manifest.heldout.count) * c * h * w > _MOST_BYTES:
        raise refuse("shape", "smaller: no array holds so many bytes")
    return manifest


class Stored:
    """The images of one ``.npy`` file, as ``rows[index]``: uint8 ``(n, C, H, W)`` in memory, read when asked for.

    Rows are read and not mapped. Touching a mapping whose file has been cut short kills the process (SIGBUS), where a
    read says what is wrong; a page fault stops every Python thread, where a read lets the others run; and the kernel is
    told of all rows of a batch before the first is waited for, so that a disk works on many at a time. A file that is
    deleted stays readable: its descriptor is open.

    Args:
        file: the array.
        shape: ``(N, C, H, W)``, which the file's own header must agree with.
        sha256: the digest that the manifest has of it; not verified here, see :func:`verify`.

    Raises:
        UserError: the file is missing, another array than described, or cut short.
    """

    dtype = torch.uint8

    def __init__(self, file: Path, shape: tuple[int, ...], sha256: str = "") -> None:
        self.file, self.shape, self.sha256 = file, shape, sha256
        self._row = math.prod(shape[1:])
        try:
            check_regular(file)
            self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UserError(f"path: there is no file {file}") from None
        except OSError as error:
            raise UserError(f"path: {file} cannot be read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._start = _header(file, self._descriptor, shape, np.dtype(np.uint8))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.read(index, torch.empty(len(index), *self.shape[1:], dtype=torch.uint8))

    def read(self, index: Tensor, out: Tensor) -> Tensor:
        """The rows ``index (n,)`` into ``out (n, C, H, W)``, contiguous uint8 in host memory, which is returned.

        Raises:
            OSError: the file cannot be read, or has been cut short; its ``filename`` and ``strerror`` say so.
            IndexError: a row that the array does not have.
        """
        rows = index.tolist()
        if rows and not 0 <= min(rows) <= max(rows) < len(self):
            raise IndexError(f"rows {min(rows)} to {max(rows)} of {len(self)}")
        descriptor, size = self._descriptor, self._row
        offsets = [self._start + row * size for row in rows]
        if hasattr(os, "posix_fadvise"):
            for offset in offsets:
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        places = out.view(-1).numpy().data
        try:
            for i, offset in enumerate(offsets):
                place = places[i * size : (i + 1) * size]
                while done := os.preadv(descriptor, [place], offset):
                    if done == len(place):
                        break
                    place, offset = place[done:], offset + done
                else:
                    raise OSError(errno.EIO, f"was cut short: row {rows[i]} of {len(self)} is not there")
        except OSError as error:
            # A read by descriptor does not know the name.
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        return out


def labels(file: Path, count: int, classes: int, sha256: str) -> Tensor:
    """The labels ``(count,)`` int64 in ``file``, verified against their digest.

    Raises:
        UserError: the file is missing, not what the manifest describes, or holds a label of no class.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            offset = _header(file, stream.fileno(), (count,), np.dtype(np.int32))
        # A file of a terabyte need not have a byte on disk: it is as long as its array, or it is not read.
        raw = read_regular(file, offset + 4 * min(count, _MOST_LABELS))
    except OSError as error:
        raise UserError(f"path: {file} cannot be read: {error.strerror or error}") from None
    values = torch.from_numpy(np.frombuffer(raw, np.int32, count, offset).astype(np.int64))
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise UserError(f"path: {file} is damaged: its checksum is not the manifest's")
    if int(values.min()) < 0 or int(values.max()) >= classes:
        raise UserError(f"path: {file} is damaged: its labels are not all among the {classes} classes")
    return values


def verify(folder: Path) -> Manifest:
    """Read every file of the packed set in ``folder`` and compare it with the manifest.

    Raises:
        UserError: a file is missing or is not what was written.
    """
    manifest = read_manifest(folder / MANIFEST)
    for split in (manifest.train, manifest.heldout):
        for entry in (split.images, split.labels):
            if entry is None:
                continue
            file, found = folder / entry.name, hashlib.sha256()
            try:
                check_regular(file)
                if (length := file.stat().st_size) != entry.size:
                    raise UserError(f"{file} has {length} bytes, the manifest says {entry.size}")
                with file.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        found.update(chunk)
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
            if found.hexdigest() != entry.sha256:
                raise UserError(f"{file} is damaged: its checksum is not the manifest's")
    return manifest


def _header(file: Path, descriptor: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The place in an ``.npy`` file where its values begin; refuses another array than described, or too few bytes."""
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        stream.seek(0)
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found, fortran, kind = read(stream)
        except Exception:
            # numpy's reader can raise any kind of exception at a foreign header.
            raise UserError(f"path: {file} is no .npy file") from None
        offset = stream.tell()
        if found != shape or fortran or kind != dtype:
            wanted = "x".join(map(str, shape))
            raise UserError(f"path: {file} is not the array of the manifest, {wanted} of type {dtype}")
        size, needed = os.fstat(descriptor).st_size, offset + math.prod(shape) * dtype.itemsize
    if size < needed:
        raise UserError(f"path: {file} is cut short: it has {size} bytes of {needed}")
    return offset
