"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import NotWritten, UserError
from .files import in_place, make_folder, sync

LOCK = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Lock:
    """A lock that keeps every other process out of a folder, which is made if it is missing.

    The lock belongs to the process and not to the lock's file, so a process that is killed leaves no lock behind. If
    somebody deletes the file or the folder, a second process can enter; :meth:`check` notices it.

    Raises:
        UserError: another process holds the folder (the error names it and its host), or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / LOCK
        self._descriptor = self._taken()

    def check(self) -> None:
        """Raise if another process may be in the folder by now. Call it before every write to the folder.

        If the folder is gone altogether nothing is raised: the write itself fails, and the run saves what it can.

        Raises:
            NotWritten: the lock's file was deleted, or is another one.
        """
        if not self._is_own() and self.folder.exists():
            raise NotWritten(
                f"{self._file} was deleted or replaced while this run was going on, so another run may use the folder"
            )

    def retake(self) -> None:
        """Hold the folder again after it was deleted; does nothing while it is still held.

        Raises:
            UserError: another process has made it again and holds it, or it cannot be made.
        """
        if not self._is_own():
            before, self._descriptor = self._descriptor, self._taken()
            os.close(before)

    def release(self) -> None:
        """Release the lock, so that another run may use the folder."""
        # The file goes before the lock does, and only if it is this lock's: another process' stays.
        if self._is_own():
            with contextlib.suppress(OSError):
                self._file.unlink()
        os.close(self._descriptor)

    def _is_own(self) -> bool:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.path.samestat(os.fstat(self._descriptor), self._file.lstat())
        return False

    def _taken(self) -> int:
        """A descriptor of the lock's file that holds the lock."""
        try:
            make_folder(self.folder)
            # Sync an existing folder's parent too: the process that made the folder may not have waited for the disk.
            sync(self.folder.parent)
            descriptor = _locked(self._file)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError as error:
            raise UserError(f"the folder {self.folder} cannot be written: {error.strerror or error}") from None
        return descriptor


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Lock]:
    """Hold ``folder`` until the block ends, see :class:`Lock`."""
    lock = Lock(folder)
    try:
        yield lock
    finally:
        lock.release()


def _locked(file: Path) -> int:
    """A descriptor of ``file`` that holds the lock."""
    while True:
        descriptor = in_place(str(file), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(f"the folder {file.parent} is in use by {holder}: wait for it to end or stop it") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            warnings.warn(f"{file.parent} cannot be locked: a second run there would go unnoticed", stacklevel=3)
        # The previous holder may have removed the file between the two calls. Then this lock protects nothing: retry.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1024, 0))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
