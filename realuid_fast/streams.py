"""Standard streams whose failures end no command: the reader is gone, the disk is full, the descriptor is closed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class Tolerant:
    """A text stream that drops what cannot be written and keeps the first :attr:`error`.

    ``None``, which Python has for a stream whose descriptor was closed before it started, drops everything.
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
            # Of a stream that was closed, or of a character that its encoding lacks.
            if self._stream is None or not self._stream.closed:
                raise


def guarded(command: Callable[[], int]) -> int:
    """Run ``command`` to its end whatever becomes of its output; its exit code.

    Where the code is 0 but standard output did not take everything, it is 141 for a reader that is gone (128 + SIGPIPE,
    as a shell has it for a command that such a reader ends), and 2 with a sentence for any other reason. What is lost
    of standard error changes no code.
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
    """Give closed standard descriptors to the null device: a file that got the number 2 would collect messages."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free.
            os.open(os.devnull, os.O_RDWR)


def _silence(stream: TextIO | None) -> None:
    """Let what a stream still holds go to the null device: Python writes it once more when it ends, and complains."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, cast(TextIO, stream).fileno())
        os.close(null)
