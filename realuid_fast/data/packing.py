"""Packs images for :mod:`.stored`: folders, zip archives such as CelebA's, MNIST's and CIFAR-10's files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from .. import choices
from ..errors import UserError
from ..files import read_regular, sync
from ..progress import bar
from . import folders, idx_files, images, staging
from .stored import MANIFEST, SPLITS, File, Manifest, Split, read_manifest

KINDS = choices.SOURCES
# The files of a packed set: nothing else is ever removed.
FILES = (MANIFEST, *(f"{split}_{what}.npy" for split in SPLITS for what in ("images", "labels")))
CELEBA_CROP, CELEBA_SIZE, CELEBA_FOLDER = 140, 64, "img_align_celeba"
# A member of an archive that unpacks to more is refused, whatever its header says: no photograph is as large.
MEMBER_BYTES = 1 << 26
_MOST_PARTITION = 1 << 28  # bytes of a partition; CelebA's has 5 million
_CHUNK = 256  # images that are decoded at a time


@dataclass(frozen=True)
class Images:
    """How images become rows: the central ``crop x crop`` pixels (None: the largest central square), scaled to ``size``
    with ``filter``, one of :data:`realuid_fast.data.FILTERS`, in ``channels`` channels, 1 or 3.
    """

    size: int = 32
    channels: int = 3
    crop: int | None = None
    filter: str = "lanczos"

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3) or (self.crop is not None and self.crop < 1):
            raise UserError("size and crop must be positive and channels 1 or 3")
        if self.filter not in images.FILTERS:
            raise UserError(f"filter must be one of {', '.join(images.FILTERS)}; got {self.filter!r}")

    def __str__(self) -> str:
        square = "largest central square" if self.crop is None else f"central {self.crop}x{self.crop} pixels"
        return f"{square}, to {self.size}x{self.size} ({self.filter}), {self.channels} channel(s)"


def pack(
    source: str | Path,
    out: str | Path,
    kind: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    crop: int | None = None,
    filter: str = "lanczos",
    heldout_every: int | None = None,
    partition: str | Path | None = None,
    labels: bool = True,
    limit: int | None = None,
    threads: int = 1,
    overwrite: bool = False,
    progress: bool = False,
    skip_damaged: bool = False,
) -> Manifest:
    """Write the images of ``source`` into the folder ``out``, which :func:`realuid_fast.data.packed` reads.

    ``out`` appears when everything in it is complete and on disk. Until then it lies in a folder of another name beside
    ``out`` (:mod:`.staging`), which a call that is interrupted removes or, where it was killed, the next
    one does. Nothing of an archive is unpacked to disk, and images are held in memory 256 at a time.

    Args:
        source: a folder or a zip archive of images, or the folder of MNIST's or CIFAR-10's files.
        out: the folder to write.
        kind: one of :data:`KINDS`; by default ``cifar10`` and ``idx`` (MNIST) where those files are, ``celeba`` where
            images lie in ``img_align_celeba``, else ``images``.
        size: side of the stored images; by default 64 for CelebA, MNIST's as published, else 32, which CIFAR-10's are.
        channels: 1 or 3, by default 1 for MNIST, else 3.
        crop: side of the central square that is kept. By default 140 for CelebA's aligned 178x218 images, which leaves
            the face (Song and Ermon, 1907.05600, and score-based models since); others take 178, the full width. For
            other images the largest central square.
        filter: one of :data:`realuid_fast.data.FILTERS`.
        heldout_every: in the order of their paths every so many-th image is held out, by default the 10th; 0 to hold
            out the training images themselves. Folders ``train`` and ``test`` (or ``val``) are the split, and then this
            cannot be given (:func:`realuid_fast.data.folders.layout`).
        partition: in its place a file of lines ``NAME NUMBER`` as CelebA comes with: images of number 0 are the
            training images, those of 2 held out, those of 1 left out. A name is an image's path inside ``source``, or
            its last part where no other image has the same.
        labels: whether folders are classes: the first one in which paths differ, below the folders of a split, in
            alphabetical order. Images that do not all lie in one have no labels. CelebA's never have any.
        limit: only the first so many images, of each split, if folders make them.
        threads: the number of threads that decode images.
        overwrite: whether a packed set in ``out`` may be replaced; anything else is never touched.
        skip_damaged: whether images that cannot be read are left out, with a warning that counts them.
        progress: whether to show a bar.

    Raises:
        UserError: arguments, a source or a file in it that cannot be used, or ``out`` that cannot be written.
    """
    source, out = Path(source), Path(os.path.abspath(out))
    with _told(source, "read"):
        kind = kind or _kind(source)
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if threads < 1 or (limit is not None and limit < 1):
        raise UserError("threads and limit must be at least 1")
    folders.check_heldout_every(heldout_every)
    _check_free(out, overwrite)
    whole = (crop, partition, limit, heldout_every) == (None,) * 4
    if kind in ("cifar10", "idx"):
        _check_whole(kind, whole, size, channels)
        with _written(out, overwrite) as place:
            if kind == "cifar10":
                return _cifar10(source, place, progress)
            return _idx(source, place, size, 1 if channels is None else channels, filter)
    celeba = kind == "celeba"
    size, channels = (CELEBA_SIZE if celeba else 32) if size is None else size, 3 if channels is None else channels
    how_made = Images(size, channels, CELEBA_CROP if celeba and crop is None else crop, filter)
    with contextlib.ExitStack() as stack:
        listed, opened = _listed(source, stack)
        found = folders.layout(listed, labels and not celeba, limit)
        names = found.names
        if partition is None:
            train, heldout = found.split(heldout_every)
        else:
            train, heldout = _partitioned(names, source, partition)
        decode = partial(_decoded, source, opened, how_made)
        place = stack.enter_context(_written(out, overwrite))
        shown = stack.enter_context(bar(len({*train, *heldout}), "image", progress))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        damaged: list[str] = []
        splits: list[Split] = []
        for split, rows in (("train", train), ("heldout", heldout)):
            if split == "heldout" and rows == train:
                splits.append(splits[0])
                continue
            kept = []
            shape = (len(rows), channels, size, size)
            with ArrayWriter(place / f"{split}_images.npy", shape, np.dtype(np.uint8)) as writer:
                for first in range(0, len(rows), _CHUNK):
                    chunk = rows[first : first + _CHUNK]
                    for row, pixels in zip(chunk, pool.map(decode, [names[row] for row in chunk]), strict=True):
                        shown.update(1)
                        if isinstance(pixels, UserError):
                            if not skip_damaged:
                                raise UserError(f"{pixels}; --skip-damaged leaves such files out")
                            damaged.append(str(pixels))
                            continue
                        writer.add(pixels)
                        kept.append(row)
            if not kept:
                raise UserError(f"{source} holds no readable images for the split {split}")
            named = _labels(place, split, np.array([found.numbers[row] for row in kept])) if found.classes else None
            splits.append(Split(len(kept), writer.entry, named))
        images.warn_damaged(damaged, len({*train, *heldout}))
        said = f"{len(names)} images of {source.name}" + (f", {len(damaged)} of them left out" if damaged else "")
        if found.splits and partition is None:
            said += ", split by its folders"
        manifest = Manifest((channels, size, size), found.classes, str(how_made), said, *splits)
        _finish(place, manifest)
    return manifest


def _check_whole(kind: str, whole: bool, size: int | None, channels: int | None) -> None:
    """Refuse to choose among images of sets that are packed as they are published."""
    if kind == "cifar10" and (size not in (None, 32) or channels not in (None, 3) or not whole):
        raise UserError(
            "CIFAR-10 is packed as it is: leave size, channels, crop, partition, heldout_every and limit out"
        )
    if kind == "idx" and not whole:
        raise UserError("IDX files are packed whole: leave crop, partition, heldout_every and limit out")


def _decoded(source: Path, opened: Callable[[str], bytes], how: Images, name: str) -> np.ndarray[Any, Any] | UserError:
    """The pixels of an image, or the error that says why it has none."""
    try:
        return images.square(io.BytesIO(opened(name)), how.size, how.channels, how.crop, how.filter)
    except UserError as error:
        return error
    except MemoryError:
        raise
    except Exception as error:
        # A decoder can raise any kind of exception at a foreign file.
        return UserError(f"{source}: {name} cannot be read as an image ({getattr(error, 'strerror', None) or error})")


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse a place that holds anything, but for a packed set and nothing else where it may be replaced."""
    with _told(out):
        staging.recover(out, FILES)
    if out.is_symlink():
        raise UserError(f"{out} is a link: give the folder that it leads to, {os.path.realpath(out)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give the name of a folder")
    there = {file.name for file in out.iterdir()} if out.exists() else set()
    if not there:
        return
    try:
        read_manifest(out / MANIFEST)
    except UserError:
        raise UserError(f"the folder {out} is not empty: give another folder, it holds no packed set") from None
    if not overwrite:
        raise UserError(f"the folder {out} is not empty: give --overwrite or another folder")
    if others := sorted(there.difference(FILES)):
        raise UserError(f"the folder {out} holds {others[0]}, which is no part of a packed set: move it elsewhere")


def _kind(source: Path) -> str:
    """The kind of a source, by the names in it."""
    if source.is_dir():
        if any(source.glob("data_batch_*.bin")) or (source / "cifar-10-batches-bin").is_dir():
            return "cifar10"
        if idx_files.folder(source) is not None:
            return "idx"
        return "celeba" if CELEBA_FOLDER in (source.name, *(each.name for each in source.iterdir())) else "images"
    return "celeba" if source.stem == CELEBA_FOLDER else "images"


def _idx(source: Path, place: Path, size: int | None, channels: int, filter: str) -> Manifest:
    splits = []
    for split, (raw, numbers) in zip(SPLITS, idx_files.read(source), strict=True):
        rows = images.idx_images(raw, size, channels, filter)
        with ArrayWriter(place / f"{split}_images.npy", rows.shape, np.dtype(np.uint8)) as writer:
            writer.add(rows)
        splits.append((Split(len(rows), writer.entry, _labels(place, split, numbers)), rows.shape, numbers.max()))
    shape = splits[0][1]
    classes = tuple(str(number) for number in range(1 + max(int(most) for _, _, most in splits)))
    done = images.idx_preprocessing(shape, size, filter)
    manifest = Manifest(shape[1:], classes, done, f"IDX files of {source.name}", splits[0][0], splits[1][0])
    _finish(place, manifest)
    return manifest


def _cifar10(source: Path, place: Path, progress: bool) -> Manifest:
    files, heldout = images.cifar10_files(source)
    splits = []
    with bar(len(files) + 1, "file", progress) as shown:
        for split, those in (("train", files), ("heldout", [heldout])):
            count = sum(file.stat().st_size // images.CIFAR_RECORD for file in those)
            numbers = []
            with ArrayWriter(place / f"{split}_images.npy", (count, 3, 32, 32), np.dtype(np.uint8)) as writer:
                for file in those:
                    pixels, labels = images.cifar10_records(file)
                    writer.add(pixels.numpy())
                    numbers.append(labels.numpy())
                    shown.update(1)
            splits.append(Split(count, writer.entry, _labels(place, split, np.concatenate(numbers))))
    manifest = Manifest((3, 32, 32), images.CIFAR_CLASSES, "3x32x32 as published", "CIFAR-10, binary files", *splits)
    _finish(place, manifest)
    return manifest


def _listed(source: Path, stack: contextlib.ExitStack) -> tuple[list[str], Callable[[str], bytes]]:
    """The images in ``source`` in alphabetical order, as paths inside it, and what reads one."""
    if source.is_dir():
        names = folders.images_in(source)

        def read(name: str) -> bytes:
            return (source / name).read_bytes()

    elif source.is_file():
        archive = stack.enter_context(_archive(source))
        members = _members(source, archive)
        names = sorted(members)

        def read(name: str) -> bytes:
            try:
                with archive.open(members[name]) as stream:
                    raw = stream.read(MEMBER_BYTES + 1)
            except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
                raise UserError(f"{source}: {name} cannot be unpacked ({error})") from None
            if len(raw) > MEMBER_BYTES:
                raise UserError(f"{source}: {name} unpacks to more than {MEMBER_BYTES >> 20} MiB")
            return raw

    else:
        raise UserError(f"there is no folder or archive {source}")
    if not names:
        raise UserError(f"{source} holds no images ({', '.join(sorted(folders.IMAGE_SUFFIXES))})")
    return names, read


def _archive(source: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{source} cannot be read as a zip archive ({error})") from None


def _members(source: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The images of an archive by name; refuses it as a whole for one that no honest archive has."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name, path = member.filename, PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in name or re.match("[A-Za-z]:", name):
            raise UserError(f"{source}: {name!r} points out of the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{source}: {name} is a link")
        if not folders.is_image(path) or member.is_dir():
            continue
        if member.flag_bits & 1:
            raise UserError(f"{source}: {name} is encrypted")
        if member.file_size > MEMBER_BYTES:
            raise UserError(f"{source}: {name} unpacks to more than {MEMBER_BYTES >> 20} MiB")
        if name in members:
            raise UserError(f"{source}: there are two of {name}")
        members[name] = member
    return members


def _partitioned(names: Sequence[str], source: Path, partition: str | Path) -> tuple[list[int], list[int]]:
    """The rows to train on and those to hold out, by a file of lines ``NAME NUMBER``."""
    numbers: dict[str, int] = {}
    try:
        for line in read_regular(Path(partition), _MOST_PARTITION).decode().splitlines():
            if not line.strip():
                continue
            name, text = line.rsplit(None, 1)
            if numbers.setdefault(name.strip(), int(text)) != int(text):
                raise UserError(f"partition: {partition} gives {name.strip()} two numbers")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"partition: {partition} is no file of lines NAME NUMBER ({error})") from None
    last_parts = [PurePosixPath(name).name for name in names]
    count = Counter(last_parts)
    own = []
    for name, last in zip(names, last_parts, strict=True):
        number = numbers.get(name, numbers.get(last))
        if number is None:
            raise UserError(f"partition: {partition} does not name {name}")
        if name not in numbers and count[last] > 1:
            raise UserError(
                f"partition: {partition} names {last}, which {count[last]} images are called: give their paths inside "
                f"{source}, such as {name}"
            )
        own.append(number)
    train, heldout = folders.of_splits(own)
    if not train or not heldout:
        raise UserError(f"partition: {partition} leaves no images to train on, or none to hold out")
    return train, heldout


def _labels(place: Path, split: str, numbers: np.ndarray[Any, Any]) -> File:
    with ArrayWriter(place / f"{split}_labels.npy", numbers.shape, np.dtype(np.int32)) as array:
        array.add(numbers.astype(np.int32))
    return array.entry


class ArrayWriter:
    """An ``.npy`` file that grows by rows in order, hashed as it is written; ``entry`` describes it at the end.

    ``shape`` is that of the whole array; where fewer rows come, the file says so at the end.
    """

    entry: File

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file, self._hash, self._shape, self._dtype = file, hashlib.sha256(), shape, dtype
        self._bytes = 0  # of values, behind the header

    def __enter__(self) -> ArrayWriter:
        with _told(self._file):
            self._stream: BinaryIO = self._file.open("xb")
        self._header = self._header_of(self._shape)
        self._write(memoryview(self._header))
        return self

    def add(self, values: np.ndarray[Any, Any]) -> None:
        raw = np.ascontiguousarray(values).data.cast("B")
        self._write(raw)
        self._bytes += len(raw)

    def _header_of(self, shape: tuple[int, ...]) -> bytes:
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, described)
        return header.getvalue()

    def _write(self, raw: memoryview) -> None:
        with _told(self._file):
            self._stream.write(raw)
        self._hash.update(raw)

    def _correct(self) -> None:
        """Write the number of rows that came into the header, which numpy pads for that, and hash the file anew."""
        row = math.prod(self._shape[1:]) * self._dtype.itemsize
        header = self._header_of((self._bytes // row, *self._shape[1:]))
        assert len(header) == len(self._header)
        self._hash = hashlib.sha256()
        with self._file.open("r+b") as stream:
            stream.write(header)
            stream.seek(0)
            while chunk := stream.read(1 << 20):
                self._hash.update(chunk)

    def __exit__(self, kind: object, *_: object) -> None:
        with _told(self._file), self._stream:
            if kind is None:
                self._stream.flush()
                if self._bytes != math.prod(self._shape) * self._dtype.itemsize:
                    self._correct()
                os.fsync(self._stream.fileno())
        self.entry = File(self._file.name, len(self._header) + self._bytes, self._hash.hexdigest())


@contextlib.contextmanager
def _told(file: Path, what: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{file} cannot be {what}: {error.strerror or error}") from None


@contextlib.contextmanager
def _written(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block ends, and goes where the block fails."""
    try:
        with staging.staged(out, FILES, overwrite) as place:
            yield place
    except OSError as error:
        # The name of a working folder says nothing to a user.
        named = error.filename if staging.PREFIX not in str(error.filename) else None
        raise UserError(f"{named or out} cannot be read or written: {error.strerror or error}") from None


def _finish(place: Path, manifest: Manifest) -> None:
    """The manifest, and everything on disk."""
    with _told(place / MANIFEST):
        with (place / MANIFEST).open("xb") as stream:
            stream.write(manifest.text().encode())
            stream.flush()
            os.fsync(stream.fileno())
        sync(place)
    # A set that the reader would refuse must not get its name.
    read_manifest(place / MANIFEST)
