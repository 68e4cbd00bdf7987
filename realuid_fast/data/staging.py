"""Writes a folder beside its place and moves it there in one step, so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import UserError
from ..files import sync

# A working folder ``PREFIX + random`` holds three things: the marker, a file whose text is the name of the folder to
# write; ``new``, the folder being written; and ``old``, the folder that had the name before. ``old`` exists only where
# the file system cannot exchange two folders in one step.
PREFIX, MARKER = ".realuid-fast-", "written-by-realuid-fast"
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextlib.contextmanager
def staged(out: Path, own: Collection[str], overwrite: bool = False) -> Iterator[Path]:
    """An empty folder that takes the name ``out`` when the block ends, and is removed if the block fails.

    ``out`` may be missing or empty; with ``overwrite`` its old content is removed afterwards. A process that is killed
    leaves the old or the new folder under the name ``out``, and a working folder, which :func:`recover` removes. Only
    files with names in ``own`` are removed, and never through a link.

    Raises:
        UserError: another process is writing ``out``.
        OSError: the disk refuses an operation, or another process has filled ``out`` meanwhile.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=out.parent))
    lock = _locked(work)
    try:
        _mark(work, out.name)
        recover(out, own, work)
        (work / "new").mkdir()
        yield work / "new"
        _put(work, out, overwrite)
    finally:
        _remove(work, own)
        if lock is not None:
            os.close(lock)


def recover(out: Path, own: Collection[str], ours: Path | None = None) -> None:
    """Remove the working folders that killed processes left beside ``out``, and put back an old ``out``.

    The working folder ``ours`` is left alone.

    Raises:
        UserError: a process is writing ``out`` now.
    """
    for work in _working(out):
        if work == ours:
            continue
        try:
            lock = _locked(work)
        except BlockingIOError:
            raise UserError(f"{out} is being written by another process: wait for it to end or stop it") from None
        if lock is None:
            # Without locks it cannot be known whether the folder's process is alive.
            continue
        try:
            if not os.path.lexists(out) and _is_folder(work / "old"):
                os.rename(work / "old", out)
                sync(out.parent)
                warnings.warn(f"{out} was put back: a process that was replacing it had been killed", stacklevel=2)
            _remove(work, own)
        finally:
            os.close(lock)


def set_aside(out: Path) -> Path | None:
    """The old folder ``out``, if a process was killed between the two renames that replace it; else None."""
    found = [work / "old" for work in _working(out) if _is_folder(work / "old")]
    return found[0] if found and not os.path.lexists(out) else None


def _working(out: Path) -> list[Path]:
    """The working folders beside ``out`` whose marker names it."""
    try:
        with os.scandir(out.parent) as entries:
            found = [Path(e) for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(work for work in found if _marked(work) == out.name)


def _mark(work: Path, name: str) -> None:
    with open(os.open(work / MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as stream:
        stream.write(os.fsencode(name))
        stream.flush()
        os.fsync(stream.fileno())


def _marked(work: Path) -> str | None:
    """The name in a working folder's marker; None if the folder is not one of this program's."""
    try:
        with open(os.open(work / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            return os.fsdecode(stream.read(4096)) if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else None
    except OSError:
        return None


def _locked(work: Path) -> int | None:
    """A descriptor that holds a lock on the folder until the process ends; None if the file system has no locks.

    Raises ``BlockingIOError`` if another process holds the lock.
    """
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _put(work: Path, out: Path, overwrite: bool) -> None:
    """Give ``work/new`` the name ``out``. A folder that had this name is in ``work`` afterwards."""
    new, old = work / "new", work / "old"
    try:
        # rename() replaces an empty folder and fails for any other.
        os.rename(new, out)
    except OSError as error:
        if not overwrite or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(new, out):
            sync(work)
            os.rename(out, old)
            try:
                os.rename(new, out)
            except OSError:
                os.rename(old, out)
                raise
    sync(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False if the system or the file system cannot do that."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _remove(work: Path, own: Collection[str]) -> None:
    """Remove a working folder, except for files that this program did not put there."""
    for folder in (work / "new", work / "old"):
        if _is_folder(folder):
            for name in own:
                with contextlib.suppress(OSError):
                    os.unlink(folder / name)
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    left = [folder for folder in (work / "new", work / "old") if os.path.lexists(folder)]
    if left:
        warnings.warn(f"{left[0]} holds files that are not this program's: they were left there", stacklevel=2)
        return
    # The marker is removed last, because without it the folder would not be recognised as this program's again.
    with contextlib.suppress(OSError):
        os.unlink(work / MARKER)
    with contextlib.suppress(OSError):
        os.rmdir(work)
