"""The command line: ``realuid-fast train-teacher | distill | pack | convert | sample | evaluate | info | ...``."""

from __future__ import annotations

from collections.abc import Sequence

from .parser import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for input that cannot be used, 130 or 143 after SIGINT or SIGTERM."""
    arguments = parser().parse_args(argv)
    # Imported here: torch takes seconds, which --help and --version do not wait for.
    from . import run

    return run.run(arguments)
