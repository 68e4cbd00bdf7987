"""Packs images for :mod:`realuid_fast.packed`: image folders, zip archives such as CelebA's, CIFAR-10's files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from . import choices, data
from .errors import UserError
from .files import sync
from .packed import MANIFEST, File, Manifest, Split, read_manifest

KINDS = choices.SOURCES
CELEBA_CROP, CELEBA_SIZE, CELEBA_FOLDER = 140, 64, "img_align_celeba"
# A member of an archive that unpacks to more is refused, whatever its header says: no photograph is as large.
MEMBER_BYTES = 1 << 26
_CHUNK = 256  # images that are decoded at a time

Decode = Callable[[str], np.ndarray[Any, Any]]


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
        if self.filter not in data.FILTERS:
            raise UserError(f"filter must be one of {', '.join(data.FILTERS)}; got {self.filter!r}")

    def __str__(self) -> str:
        square = "largest central square" if self.crop is None else f"central {self.crop}x{self.crop} pixels"
        return f"{square}, to {self.size}x{self.size} ({self.filter}), {self.channels} channel(s)"


def pack(
    source: str | Path,
    out: str | Path,
    kind: str | None = None,
    size: int | None = None,
    channels: int = 3,
    crop: int | None = None,
    filter: str = "lanczos",
    heldout_every: int = 10,
    partition: str | Path | None = None,
    labels: bool = True,
    limit: int | None = None,
    threads: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the images of ``source`` into the folder ``out``, which :func:`realuid_fast.data.packed` reads.

    ``out`` appears when everything in it is complete and on disk. Until then it is ``out.part``, which a call that is
    interrupted removes or, where it was killed, the next one starts afresh. Nothing of an archive is unpacked to disk,
    and images are held in memory 256 at a time.

    Args:
        source: a folder or a zip archive of images, or the folder of CIFAR-10's binary files.
        out: the folder to write.
        kind: one of :data:`KINDS`; by default ``cifar10`` where the binary files are, ``celeba`` where images lie in
            ``img_align_celeba``, else ``images``.
        size: of the stored images; by default 64 for CelebA, else 32, which CIFAR-10's are.
        channels: 1 or 3.
        crop: side of the central square that is kept. By default 140 for CelebA's aligned 178x218 images, which leaves
            the face (Song and Ermon, 1907.05600, and score-based models since); others take 178, the full width. For
            other images the largest central square.
        filter: one of :data:`realuid_fast.data.FILTERS`.
        heldout_every: in the order of their paths every so many-th image is held out; 0 to hold out the training
            images themselves.
        partition: in its place a file of lines ``NAME NUMBER`` as CelebA comes with: images of number 0 are the
            training images, those of 2 held out, those of 1 left out.
        labels: whether folders are classes: the first one in which paths differ, in alphabetical order. Images that do
            not all lie in one have no labels. CelebA's never have any.
        limit: only the first so many images.
        threads: that decode images.
        overwrite: whether a packed set in ``out`` may be replaced; anything else is never touched.
        progress: whether to show a bar.

    Raises:
        UserError: arguments, a source or a file in it that cannot be used, or ``out`` that cannot be written.
    """
    source, out = Path(source), Path(out)
    kind = kind or _kind(source)
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if threads < 1 or (limit is not None and limit < 1):
        raise UserError("threads and limit must be at least 1")
    if heldout_every < 0 or heldout_every == 1:
        raise UserError(f"heldout_every must be 0 (nothing held out) or at least 2, got {heldout_every}")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if (next(out.iterdir(), None) is not None) and not (overwrite and (out / MANIFEST).is_file()):
            how = "give --overwrite or another folder" if (out / MANIFEST).is_file() else "give another folder"
            raise UserError(f"the folder {out} is not empty: {how}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give the name of a folder")
    if kind == "cifar10":
        if size not in (None, 32) or channels != 3 or (crop, partition, limit) != (None, None, None):
            raise UserError("CIFAR-10 is packed as it is: leave size, channels, crop, partition and limit out")
        with _written(out) as part:
            return _cifar10(source, part, progress)
    celeba = kind == "celeba"
    size = (CELEBA_SIZE if celeba else 32) if size is None else size
    how_made = Images(size, channels, CELEBA_CROP if celeba and crop is None else crop, filter)
    with contextlib.ExitStack() as stack:
        names, opened = _listed(source, stack)
        names = names[:limit]
        classes, numbers = _classes(names) if labels and not celeba else ((), [])
        train, heldout = _split(names, heldout_every, partition)

        def decode(name: str) -> np.ndarray[Any, Any]:
            try:
                return data.square(io.BytesIO(opened(name)), size, channels, how_made.crop, filter)
            except UserError:
                raise
            except Exception as error:
                # What a foreign file makes a decoder raise is anything.
                raise UserError(f"{source}: {name} cannot be read as an image ({error})") from None

        part = stack.enter_context(_written(out))
        bar = stack.enter_context(
            tqdm(total=len({*train, *heldout}), disable=not progress, unit="image", dynamic_ncols=True)
        )
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        shape = (channels, size, size)
        splits: list[Split] = []
        for split, rows in (("train", train), ("heldout", heldout)):
            if split == "heldout" and rows == train:
                splits.append(splits[0])
                continue
            with ArrayWriter(part / f"{split}_images.npy", (len(rows), *shape), np.dtype(np.uint8)) as images:
                for first in range(0, len(rows), _CHUNK):
                    chunk = [names[row] for row in rows[first : first + _CHUNK]]
                    for pixels in pool.map(decode, chunk):
                        images.add(pixels)
                        bar.update(1)
            named = None if not classes else _labels(part, split, np.array([numbers[row] for row in rows]))
            splits.append(Split(len(rows), images.entry, named))
        manifest = Manifest(shape, classes, str(how_made), f"{len(names)} images of {source.name}", *splits)
        _finish(part, manifest)
    return manifest


def _kind(source: Path) -> str:
    """What lies in ``source``, by its names."""
    if source.is_dir():
        if any(source.glob("data_batch_*.bin")) or (source / "cifar-10-batches-bin").is_dir():
            return "cifar10"
        return "celeba" if CELEBA_FOLDER in (source.name, *(each.name for each in source.iterdir())) else "images"
    return "celeba" if source.stem == CELEBA_FOLDER else "images"


def _cifar10(source: Path, part: Path, progress: bool) -> Manifest:
    files, heldout = data.cifar10_files(source)
    splits = []
    with tqdm(total=len(files) + 1, disable=not progress, unit="file", dynamic_ncols=True) as bar:
        for split, parts in (("train", files), ("heldout", [heldout])):
            count = sum(file.stat().st_size // data.CIFAR_RECORD for file in parts)
            numbers = []
            with ArrayWriter(part / f"{split}_images.npy", (count, 3, 32, 32), np.dtype(np.uint8)) as images:
                for file in parts:
                    pixels, labels = data.cifar10_records(file)
                    images.add(pixels.numpy())
                    numbers.append(labels.numpy())
                    bar.update(1)
            splits.append(Split(count, images.entry, _labels(part, split, np.concatenate(numbers))))
    manifest = Manifest((3, 32, 32), data.CIFAR_CLASSES, "3x32x32 as published", "CIFAR-10, binary files", *splits)
    _finish(part, manifest)
    return manifest


def _listed(source: Path, stack: contextlib.ExitStack) -> tuple[list[str], Callable[[str], bytes]]:
    """The images in ``source`` in alphabetical order, as paths inside it, and what reads one."""
    if source.is_dir():
        files = sorted(f for f in source.rglob("*") if f.suffix.lower() in data.IMAGE_SUFFIXES and f.is_file())
        names = [file.relative_to(source).as_posix() for file in files]

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
        raise UserError(f"{source} holds no images ({', '.join(sorted(data.IMAGE_SUFFIXES))})")
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
        if path.suffix.lower() not in data.IMAGE_SUFFIXES or path.name.startswith("._") or member.is_dir():
            continue
        if member.flag_bits & 1:
            raise UserError(f"{source}: {name} is encrypted")
        if member.file_size > MEMBER_BYTES:
            raise UserError(f"{source}: {name} unpacks to more than {MEMBER_BYTES >> 20} MiB")
        if name in members:
            raise UserError(f"{source}: there are two of {name}")
        members[name] = member
    return members


def _classes(names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes, and the number of each image's; none where the images do not all lie in a folder of one."""
    parents = [PurePosixPath(name).parent for name in names]
    shared, folders = len(PurePosixPath(os.path.commonpath(parents)).parts), [parent.parts for parent in parents]
    if any(len(parts) == shared for parts in folders):
        return (), []
    classes = tuple(sorted({parts[shared] for parts in folders}))
    number = {name: i for i, name in enumerate(classes)}
    return classes, [number[parts[shared]] for parts in folders]


def _split(names: Sequence[str], every: int, partition: str | Path | None) -> tuple[list[int], list[int]]:
    """Which images train and which are held out; the same ones where none are."""
    everything = list(range(len(names)))
    if partition is None:
        heldout = everything[every - 1 :: every] if every else []
        train = [row for row in everything if (row + 1) % every] if every else everything
        return train, heldout or train
    try:
        lines = [line.split() for line in Path(partition).read_text().splitlines() if line.strip()]
        numbers = {name: int(number) for name, number in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"partition: {partition} is no file of lines NAME NUMBER ({error})") from None
    own = [numbers.get(PurePosixPath(name).name) for name in names]
    if None in own:
        raise UserError(f"partition: {partition} does not name {names[own.index(None)]}")
    train, heldout = ([row for row in everything if own[row] == number] for number in (0, 2))
    if not train or not heldout:
        raise UserError(f"partition: {partition} leaves no images to train on, or none to hold out")
    return train, heldout


def _labels(part: Path, split: str, numbers: np.ndarray[Any, Any]) -> File:
    with ArrayWriter(part / f"{split}_labels.npy", numbers.shape, np.dtype(np.int32)) as array:
        array.add(numbers.astype(np.int32))
    return array.entry


class ArrayWriter:
    """An ``.npy`` file that grows by values in order, hashed as it is written; ``entry`` describes it at the end."""

    entry: File

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file, self._hash, self._size, self._shape, self._dtype = file, hashlib.sha256(), 0, shape, dtype

    def __enter__(self) -> ArrayWriter:
        self._stream: BinaryIO = _writing(self._file, lambda: self._file.open("xb"))
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(header, described)
        self._write(header.getbuffer())
        return self

    def add(self, values: np.ndarray[Any, Any]) -> None:
        self._write(np.ascontiguousarray(values).data.cast("B"))

    def _write(self, raw: memoryview) -> None:
        _writing(self._file, lambda: self._stream.write(raw))
        self._hash.update(raw)
        self._size += len(raw)

    def __exit__(self, kind: object, *_: object) -> None:
        def finish() -> None:
            with self._stream:
                if kind is None:
                    self._stream.flush()
                    os.fsync(self._stream.fileno())

        _writing(self._file, finish)
        self.entry = File(self._file.name, self._size, self._hash.hexdigest())


def _writing(file: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path]:
    """``out.part``, empty and ours alone, which becomes ``out`` when the block ends, and goes where the block fails."""
    part = out.with_name(out.name + ".part")
    descriptor = _writing(part, lambda: _claimed(part))
    try:
        _writing(part, lambda: _empty(part))
        try:
            yield part
            _writing(out, lambda: _replace(part, out))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _claimed(part: Path) -> int:
    """A descriptor of the folder that holds a lock on it, which goes with the process."""
    while True:
        part.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{part} is being written by another process: wait for it to end or stop it") from None
        # Whoever held it before may have given the folder its final name between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), part.stat()):
                return descriptor
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _replace(part: Path, out: Path) -> None:
    """``part`` under the name ``out``; a set that was there is removed after."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    part.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _finish(part: Path, manifest: Manifest) -> None:
    """The manifest, and everything on disk."""

    def write() -> None:
        with (part / MANIFEST).open("xb") as stream:
            stream.write(manifest.text().encode())
            stream.flush()
            os.fsync(stream.fileno())
        sync(part)

    _writing(part / MANIFEST, write)
    # What the reader would refuse must not get its name.
    read_manifest(part / MANIFEST)
