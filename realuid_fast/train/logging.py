"""The logs of a run: CSV files, TensorBoard events and the plot of its distances."""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import extra
from ..files import in_place, replacing, sync
from ..models.pictures import convergence_plot


class CsvLog:
    """A CSV file that grows by rows and can be cut back to a saved position; with ``file=None`` it writes nothing.

    ``columns`` are fixed once and for all. When :meth:`write` returns, the operating system has the row. :attr:`start`
    is the position before the first row.
    """

    def __init__(self, file: Path | None, columns: Sequence[str]) -> None:
        self.file, self._columns = file, list(columns)
        head = io.StringIO()
        csv.writer(head).writerow(self._columns)
        self.start = len(head.getvalue().encode())
        if file is None:
            return
        with open(file, "a+", newline="", opener=in_place) as stream:
            if stream.tell() < self.start:
                stream.truncate(0)
                stream.write(head.getvalue())
        # Bring the file's name to disk now. Its rows are brought to disk with every checkpoint.
        sync(file.parent)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; columns that ``row`` lacks stay empty."""
        if self.file is not None:
            # Opened without creating it: a file that was deleted must not come back without its header.
            with open(self.file, "r+", newline="", opener=in_place) as stream:
                stream.seek(0, os.SEEK_END)
                csv.DictWriter(stream, self._columns, restval="").writerow(dict(row))

    @property
    def position(self) -> int:
        """Length of the file in bytes."""
        return self.start if self.file is None else self.file.stat().st_size

    def to_disk(self) -> None:
        """Wait until everything written so far is on disk, so that it survives a power cut."""
        if self.file is not None:
            with open(self.file, "rb", opener=in_place) as stream:
                os.fsync(stream.fileno())

    def cut(self, position: int) -> None:
        """Drop everything after ``position``: the rows written after the checkpoint that a run resumes from."""
        if self.file is None:
            return
        size = self.file.stat().st_size
        if size < position:
            warnings.warn(f"{self.file} has lost rows that were written before the checkpoint", stacklevel=2)
        elif position < size:
            with open(self.file, "r+b", opener=in_place) as stream:
                stream.truncate(position)


def read_csv(file: Path) -> list[dict[str, float]]:
    """All rows of a CSV file of numbers; an empty field is NaN."""
    with file.open(newline="") as stream:
        return [{k: float(v) if v else math.nan for k, v in row.items()} for row in csv.DictReader(stream)]


class Events:
    """TensorBoard scalars and images in ``folder``; with ``folder=None`` it writes nothing."""

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self._writer = None
        if folder is not None:
            with extra():
                from torch.utils.tensorboard import SummaryWriter

            # Events after the checkpoint that a run resumes from are hidden.
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def plot_distances(folder: Path, lines: dict[str, float], metric: str, name: str = "student") -> Path | None:
    """Draw ``convergence.png`` of a run from its ``distances.csv``; None if nothing was evaluated."""
    points = [(row["update"], row["distance"]) for row in read_csv(folder / "distances.csv")]
    if not points:
        return None
    with replacing(folder / "convergence.png") as stream:
        convergence_plot({name: points}, lines, metric, stream)
    return folder / "convergence.png"
