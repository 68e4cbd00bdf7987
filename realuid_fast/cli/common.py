"""Helpers that several commands share: the command's own line, models by name, the table of distances, threads."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, data, models
from ..errors import UserError
from ..evaluate import table as evaluation
from ..evaluate.measure import Measure
from ..extras import extra
from ..models.files import Model
from ..precision import in_words

with extra():
    from tqdm import tqdm


def command_line(arguments: argparse.Namespace) -> str:
    """The command that reproduces a run: its words without the folder and what concerns it."""
    words = ["realuid-fast", arguments.command]
    if getattr(arguments, "source", None):
        words += [str(arguments.source)]
    if getattr(arguments, "config", None):
        words += ["--config", arguments.config]
    if getattr(arguments, "preset", None):
        words += ["--preset", arguments.preset]
    if arguments.set:
        words += ["--set", *arguments.set]
    return shlex.join(words)


def model(source: str) -> Model:
    """A student or teacher: a file, a finished run's folder, or a shipped name."""
    return models.open_model(source)


def check_out(file: Path, overwrite: bool) -> None:
    """Refuse a file for ``--out`` that exists or cannot be written, before anything is computed."""
    if os.path.isdir(file):
        raise UserError(f"--out {file} is a folder: give the name of a file")
    if os.path.lexists(file) and not overwrite:
        raise UserError(f"--out {file} exists: give --overwrite or another name")
    if not os.path.isdir(file.parent):
        raise UserError(f"--out {file}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {file} cannot be written: permission denied to write into the folder {file.parent}")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns the disk's errors in the block into a sentence about ``--out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def as_typed(**options: str) -> Iterator[None]:
    """Errors in the block that begin with an argument's name begin with the option's, as it was typed."""
    try:
        yield
    except UserError as error:
        word = re.match(r"\w+", str(error))
        if word is None or word[0] not in options:
            raise
        raise UserError(options[word[0]] + str(error)[word.end() :]) from None


def shape(model: Model) -> tuple[int, ...]:
    network = model.description.network
    return tuple(network.get("dim", network.get("shape", (2,))))


def show_table(
    measure: Measure,
    dataset: data.Dataset,
    teacher: Model | None,
    student: Model | None,
    count: int,
    steps: Sequence[int] = evaluation.STEPS,
    device: torch.device | str = "cpu",
    precision: str = "float32",
) -> tuple[list[evaluation.Row], str]:
    """Measure and print the table; its rows and what its distance is."""
    table = []
    for row in evaluation.rows(measure, dataset.shape, teacher, student, count, steps, device, True, precision):
        # Said as it comes: a teacher's hundred steps take a while.
        tqdm.write(f"measured: {row.name}", file=sys.stderr)
        table.append(row)
    metric = f"{measure.name}, to held-out data ({count:,} samples{in_words(precision)})"
    print("\n" + evaluation.markdown(table, metric))
    return table, metric


def context() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "torch": torch.__version__,
        "realuid_fast": __version__,
    }


def use_threads(threads: int) -> None:
    if threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
