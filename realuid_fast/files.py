"""Writes files that are never half written, and refuses to read what is no regular file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{16}\.part")


@contextlib.contextmanager
def replacing(file: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content replaces ``file`` in one step when the block ends, and is on disk then if ``durable``.

    If the block or the disk fails, ``file`` stays as it was. A link under that name is replaced and not followed.

    The stream writes to a new file ``.NAME.<16 random digits>.part`` beside ``file``, so no other file is overwritten.
    A process that is killed leaves that file behind.
    """
    beside = unfinished(file)
    try:
        with open(beside, "xb", opener=in_place) as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(beside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    if durable:
        sync(file.parent)


def unfinished(file: Path) -> Path:
    """A new name beside ``file`` for content that will replace ``file`` when it is complete."""
    return file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")


def finished_name(name: str) -> str | None:
    """The name that :func:`unfinished` made ``name`` from; None if it did not make it."""
    made = _UNFINISHED.fullmatch(name)
    return made[1] if made else None


def in_place(path: str, flags: int) -> int:
    """An ``opener`` for :func:`open` that opens regular files only: no link, and no pipe, which would block.

    Raises:
        OSError: ``path`` is not a regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        # A link, or a pipe without a reader.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, "it is not a regular file", path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def is_own(file: Path) -> bool:
    """Whether ``file`` is a regular file and no link to one."""
    with contextlib.suppress(OSError):
        return stat.S_ISREG(file.lstat().st_mode)
    return False


def remove(files: Iterable[Path]) -> None:
    """Delete those of ``files`` that are regular files; links and folders stay."""
    for file in files:
        if is_own(file):
            file.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents; the new entries are on disk afterwards."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file and no folder", str(folder)) from None
    sync(folder.parent)


def sync(folder: Path) -> None:
    """Bring a folder's entries to disk. Otherwise a power cut can lose a file's new name."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # a folder that may be written but not read cannot be opened for this
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the file system does not support syncing a folder
            raise
    finally:
        os.close(opened)


def check_regular(file: Path, most: int | None = None) -> None:
    """Refuse anything but a regular file: a FIFO keeps its reader waiting, and a device such as /dev/zero never ends.

    Raises:
        OSError: ``file`` is missing, is no regular file, has more than ``most`` bytes, or may not be read. ``strerror``
            says which.
    """
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind} and not a regular file", str(file))
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, and at most {most:,} are read", str(file))
    # The safetensors library says of a file that may not be read that it is missing.
    os.close(os.open(file, os.O_RDONLY | os.O_CLOEXEC))


def read_regular(file: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes; raises :class:`OSError` for any other."""
    check_regular(file, most)
    return file.read_bytes()
