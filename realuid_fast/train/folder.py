"""The folder of a run: the files that a run writes there, who may enter it, and which of two runs it belongs to."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..extras import extra
from ..files import finished_name, is_own, make_folder, remove, replacing, unfinished
from ..lock import LOCK
from .checkpoint import clear, clear_half_written

with extra():
    import yaml

# The files and folders that a run writes. --overwrite removes these and no others.
RUN_FILES = (
    "config.yaml",
    "log.csv",
    "distances.csv",
    "timings.json",
    "convergence.png",
    "samples.png",
    "evaluation.json",
    "table.md",
    "student.safetensors",
    "teacher.safetensors",
    "best.safetensors",
)
RUN_FOLDERS = ("checkpoints", "samples", "events")
_PICTURE = re.compile(r"update-\d{8,}\.png")


def open_folder(folder: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Create or enter a run folder without ever writing over something that was not asked for.

    Leftovers of a process that was killed before it had written ``config.yaml`` are ignored. With ``overwrite`` the old
    ``config.yaml`` stays until the run replaces it, so that a kill in between leaves a folder that holds a run.

    Raises:
        UserError: the folder is not empty and neither ``resume`` nor ``overwrite`` is given; ``resume`` without a run
            in it; ``overwrite`` of a folder that holds no run; a folder that cannot be created or written; a link, or
            a file of the wrong kind, under a name that a run writes to.
    """
    try:
        if resume:
            require_run(folder)
        make_folder(folder)
        there = [file for file in folder.iterdir() if not _is_remnant(file)]
        if there and not resume:
            how = "give --resume to go on with its run, --overwrite to start afresh, or another folder"
            if not (folder / "config.yaml").is_file():
                overwrite, how = False, "it holds no run, so --overwrite leaves it alone; give another folder"
            if not overwrite:
                raise UserError(f"the folder {folder} is not empty: {how}")
        for file in (folder / name for name in (*RUN_FILES, *RUN_FOLDERS)):
            kind = "file" if file.name in RUN_FILES else "folder"
            if file.is_symlink() or (file.exists() and not (file.is_file() if kind == "file" else file.is_dir())):
                raise UserError(f"{file} is a link or not a {kind}, where a run would write: move it away")
        remove(file for file in folder.iterdir() if finished_name(file.name) in RUN_FILES)
        remove(file for file in _pictures(folder) if finished_name(file.name))
        if not resume:
            _clear(folder)
        clear_half_written(folder / "checkpoints")
        tried = unfinished(folder / "config.yaml")
        tried.touch(exist_ok=False)
        tried.unlink()
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None


def require_run(folder: Path) -> None:
    """Raise :class:`UserError` where ``folder`` holds no run to go on with."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"there is no run to resume in {folder}: it has no config.yaml; leave --resume out to start")


def write_config(folder: Path, config: Mapping[str, Any], identity: str, role: str) -> None:
    """Write the run's configuration, its identity, which its checkpoints repeat, and the role of what it trains."""
    # Identity and role are a comment, not settings: another run that is started from this file gets its own.
    head = f"# run {identity}: it trains a {role}; checkpoints of other runs are refused\n"
    with replacing(folder / "config.yaml") as stream:
        stream.write((head + yaml.safe_dump(dict(config), sort_keys=False)).encode())


def identity_of(folder: Path, what: str = "([0-9a-f]{16}):") -> str | None:
    """The identity in a run's config.yaml; None if an earlier version or a person wrote the file."""
    return (re.search(f"^# run {what}", (folder / "config.yaml").read_text(), re.MULTILINE) or (None, None))[1]


def role_of(folder: Path) -> str | None:
    """``"teacher"`` or ``"student"``, whichever the run trains; None as in :func:`identity_of`."""
    return identity_of(folder, "[0-9a-f]{16}: it trains a (teacher|student);")


def _is_remnant(file: Path) -> bool:
    """Whether ``file`` is a leftover of a run that was killed before its configuration was complete."""
    # Earlier versions wrote config.yaml.part.
    return file.name in (LOCK, "config.yaml.part") or (finished_name(file.name) in RUN_FILES and is_own(file))


def _pictures(folder: Path) -> list[Path]:
    """The pictures of samples in a run's folder, with those that a killed process had not finished."""
    there = (folder / "samples").iterdir() if (folder / "samples").is_dir() else ()
    return [file for file in there if _PICTURE.fullmatch(finished_name(file.name) or file.name)]


def _clear(folder: Path) -> None:
    """Delete all files of a run except its configuration; files that no run makes stay."""
    remove(folder / name for name in RUN_FILES if name != "config.yaml")
    clear(folder / "checkpoints")
    remove(_pictures(folder))
    remove((folder / "events").glob("events.out.tfevents.*"))
    for name in RUN_FOLDERS:
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
