"""Standard streams whose failures do not end a command: a reader that is gone, a full disk, a closed descriptor."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class Tolerant:
    """A text stream that drops text which cannot be written, and keeps the first :attr:`error`.

    It may wrap ``None``, which Python has in the place of a stream whose descriptor was closed at the start. Then it
    drops everything.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._noted():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noted():
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
        except ValueError:
            # The stream was closed (ignore it), or its encoding lacks a character.
            if self._stream is None or not self._stream.closed:
                raise


def guarded(command: Callable[[], int]) -> int:
    """Run ``command`` to its end, even if its output cannot be written; returns its exit code.

    If the command's code is 0 but standard output did not take everything, the code is 141 when the reader is gone (128
    + SIGPIPE, as in a shell), and 2 with a sentence for any other reason. Losses of standard error change no code.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    out, err = Tolerant(sys.stdout), Tolerant(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        code = command()
        out.flush()
        if code == 0 and out.error is not None:
            if out.error.errno == errno.EPIPE:
                return 128 + signal.SIGPIPE
            print(f"error: standard output: {out.error.strerror or out.error}", file=sys.stderr)
            return 2
        return code
    finally:
        sys.stdout, sys.stderr = before
        for stream, tolerant in zip(before, (out, err), strict=True):
            tolerant.flush()
            if tolerant.error is not None:
                _silence(stream)


def _open_closed_descriptors() -> None:
    """Open the null device for closed standard descriptors: a file that got the number 2 would receive messages."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # open() takes the lowest free number, which is the closed descriptor's.
            os.open(os.devnull, os.O_RDWR)


def _silence(stream: TextIO | None) -> None:
    """Send a stream's unwritten text to the null device. Python would try to write it again at exit, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, cast(TextIO, stream).fileno())
        os.close(null)
