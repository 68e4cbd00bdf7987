"""Inputs of a run: its data, files that its settings name, and the student that ``distill.start`` names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import choices, data, teachers
from ..errors import UserError
from ..teachers import CHECKPOINTS, Description
from ..train.checkpoint import files as checkpoints_in
from ..train.checkpoint import read
from ..train.sharding import Damaged


def dataset_of(source: Mapping[str, Any]) -> data.Dataset:
    """:func:`realuid_fast.data.load` of the section ``data``; errors about its path name ``data.path``."""
    try:
        return data.load(source)
    except UserError as error:
        if not str(error).startswith("path: "):
            raise
        gone = not Path(str(source.get("path", "."))).exists()
        how = "; run the command from the folder that data.path is seen from, or give --set data.path=PATH"
        raise UserError(f"data.{error}{how if gone else ''}") from None


@contextlib.contextmanager
def named(setting: str, source: str) -> Iterator[None]:
    """Put the setting in front of an error about the file ``source`` that it names.

    If the file is not there and a shipped configuration makes it, the error says which one.
    """
    try:
        yield
    except UserError as error:
        how = "" if Path(source).exists() else _how_made(Path(source))
        raise UserError(f"{setting}: {error}{how}") from None


def _how_made(source: Path) -> str:
    """A clause that names the shipped configuration whose first lines have the command that makes ``source``."""
    for file in sorted(choices.CONFIGS.rglob("*.yaml")):
        commands = (line for line in file.read_text().splitlines() if line.startswith("#   realuid-fast"))
        if any({str(source), str(source.parent)} & set(line.partition(" --out ")[2].split()) for line in commands):
            name = file.relative_to(choices.CONFIGS).with_suffix("")
            return f"; realuid-fast config {name} prints the command that makes it"
    return ""


def student_of(
    source: str, decay: float | None, teacher: Description, t_start: float, setting: str = "distill.start"
) -> nn.Module:
    """The network of a student to go on from.

    Args:
        source: a student's file, a finished run's folder, or a checkpoint with ``ema_gens`` as the published code
            writes it, whose generators start at 0.
        decay: the decay of the average to take; 0 takes the last weights. By default it is the only one of a file, the
            exported one of a folder, and the largest of a published checkpoint. An average that a folder has not
            exported is read from its newest checkpoint.
        teacher: the description of the teacher, whose network the student must have.
        t_start: the start time that the student must have.
        setting: the setting that names ``source``, for errors.

    Raises:
        UserError: ``source`` does not exist, does not have the average, or is a student of another network or start
            time.
    """
    file = Path(source)
    if file.suffix in CHECKPOINTS:
        settings, state = teachers.published(file, teacher.network, decay)
        network, described = teachers.filled(settings, state, source), Description(settings)
    else:
        model = model_of_student(source, setting)
        network, described = model.net, model.description
    if described.network != teacher.network:
        raise UserError(f"{setting} {source} has another network than the teacher")
    if described.t_start != t_start:
        raise UserError(
            f"{setting} {source} is a student of t_start = {described.t_start:g}, this run is one of {t_start:g}"
        )
    if file.suffix in CHECKPOINTS or decay is None or described.decay == decay:
        return network
    if not file.is_dir():
        holds = "does not say which average it holds" if described.decay is None else f"holds {described.decay:g}"
        raise UserError(f"distill.start_decay {decay:g} is not in {source}, which {holds}: give its run's folder")
    network.load_state_dict(_average(file, decay))
    return network


def model_of_student(source: str, setting: str) -> teachers.Model:
    """The student of a file or of a finished run's folder, which ``setting`` names."""
    file = Path(source)
    _hint(file)
    with named(setting, source):
        return teachers.load(file / "student.safetensors" if file.is_dir() else file, role="student")


def _hint(file: Path) -> None:
    """Say which folder to name instead, if a run has no ``best.safetensors`` because it was never evaluated."""
    if file.name == "best.safetensors" and not file.exists() and (file.parent / "student.safetensors").exists():
        raise UserError(
            f"there is no file {file}: nothing was evaluated in that run; set distill.start={file.parent} to go on "
            "from its last student"
        )


def _average(folder: Path, decay: float) -> Mapping[str, Tensor]:
    """An average of a run, or its last weights for 0, as its newest checkpoint has it."""
    files = checkpoints_in(folder / "checkpoints")
    if not files:
        raise UserError(f"distill.start_decay {decay:g} is not what {folder} exported, and it has no checkpoint left")
    try:
        trainer = read(files[-1])["trainer"]
        averages = {0.0: trainer["generator"], **trainer["generator_optimiser"]["ema"]}
    except (Damaged, KeyError, TypeError) as error:
        raise UserError(f"{files[-1]} is no sound checkpoint of a student: {error}") from None
    if decay not in averages:
        there = ", ".join(f"{each:g}" for each in sorted(averages))
        raise UserError(f"distill.start_decay {decay:g} is not in {folder}, only {there}")
    # A sharded tensor comes as Rows, which are read by slicing.
    return {name: value if isinstance(value, Tensor) else value[:] for name, value in averages[decay].items()}
