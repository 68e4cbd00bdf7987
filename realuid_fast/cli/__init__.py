"""The command line: ``realuid-fast train-teacher | distill | pack | convert | sample | evaluate | info | ...``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from ..extras import MissingPackage
from ..streams import guarded
from .parser import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    It is 0, 2 for input that cannot be used or output that cannot be written, 129, 130 or 143 after SIGHUP, SIGINT or
    SIGTERM, and 141 where the command did its work but the reader of its output went away.
    """
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    # The imports make objects that stay. Looking through them for garbage takes a seventh of the start.
    collects = gc.isenabled()
    gc.disable()
    try:
        # Imported here: torch takes seconds, which --help and --version do not wait for.
        from . import run
    except MissingPackage as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if collects:
            gc.enable()
    return run.run(arguments)
