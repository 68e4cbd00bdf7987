"""Runs the command that was asked for and turns what it raises into a sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..networks.memory import is_exhausted
from ..ops import extension
from ..train import distributed
from ..train.hooks import Interrupted
from .parser import WHOLE

Command = Callable[[argparse.Namespace], None]


def run(arguments: argparse.Namespace, command: Command | None = None) -> int:
    """The exit code of ``command``, by default of ``arguments.run``: a module of this package and a function in it."""
    try:
        code = _answered(arguments, command)
    except Exception:
        # The caller gets the error. Only a process group that could not be ended must end the process here.
        if not distributed.unended():
            raise
        traceback.print_exc()
        code = 1
    distributed.leave(code)
    return code


def _answered(arguments: argparse.Namespace, command: Command | None) -> int:
    warnings.showwarning = _warn
    # Every update allocates the same tensors; without this the C library has their pages zeroed anew each time.
    extension.keep_freed_memory()
    try:
        _check_numbers(arguments)
        if command is None:
            module, name = arguments.run.split(".")
            command = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"{stop}; go on with the same command{' and --resume' * hasattr(arguments, 'resume')}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # A full disk, a folder taken away: what the commands cannot see coming.
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        print(f"error: the memory does not suffice: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 2
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, allowed in WHOLE.items():
        given = getattr(arguments, name, None)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            allowed.check(f"--{name.replace('_', '-')}", value)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
