"""A run's results and its checkpoints, for the tests of faults."""

import os
from pathlib import Path

from realuid_fast.train.checkpoint import Checkpoints
from realuid_fast.train.logging import read_csv

ROOT = Path(__file__).resolve().parent.parent.parent


def end_of(folder):
    """The results of a run that another run must repeat."""
    clocks = {"images_per_second": 0.0, "seconds": 0.0}
    # As text, in which one NaN equals another.
    log = [str({**row, **clocks}) for row in read_csv(folder / "log.csv")]
    files = [(folder / name).read_bytes() for name in ("student.safetensors", "best.safetensors", "distances.csv")]
    return files, log


def steps(folder):
    return [int(file.stem.removeprefix("update-")) for file in Checkpoints(folder / "checkpoints").files()]


def make_other(file, kind):
    """Something that is no regular file."""
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    else:
        file.symlink_to(file.parent / "nothing" if kind == "link to nothing" else kind)
