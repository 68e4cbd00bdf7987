"""Records of finished runs. A record holds a run's curve, scores and first samples, so a report needs no network.

Records are small and are committed: a study of many hours goes on from them on another machine, and whoever repeats a
run compares with them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from realuid_fast import data, teachers
from realuid_fast.errors import UserError
from realuid_fast.files import replacing
from realuid_fast.jobs import config as configs
from realuid_fast.settings import Config
from realuid_fast.train.logging import read_csv

from ... import machine
from .arms import Arm, Place
from .judge import Judge

SHOWN = 24  # samples of every run that a record keeps, for the grid
# Settings that name a file or a folder: a run is the same wherever its files lie.
PLACES = (("data", "path"), ("run", "classifier"), ("distill", "teacher"), ("distill", "start"))


@dataclass(frozen=True)
class Records:
    """The records of a study, ``FOLDER/RUN.json``.

    Attributes:
        folder: where they are.
        place: the folders of the runs, the teachers and the classifier.
        extra: settings of every run, over the configuration.
        count: the number of samples of every distance.
    """

    folder: Path
    place: Place
    extra: list[str]
    count: int

    def find(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """The run's record; None where there is none that was made with the same (:meth:`_made_with`)."""
        file = self._file(arm, seed)
        if not file.is_file():
            return None
        found = dict(json.loads(file.read_text()))
        asked = self._made_with(arm, seed)
        try:
            # Settings that have come since are at their defaults, under which the run was made.
            then = settings(configs.from_mapping(found["settings"]))
        except UserError:
            return None
        return found if all({**found, "settings": then}[key] == value for key, value in asked.items()) else None

    def write(self, arm: Arm, seed: int, judge: Judge) -> None:
        """Measure the finished run's student and keep its record."""
        folder = self.place.run(arm, seed)
        file = folder / "student.safetensors"
        made = {**self._made_with(arm, seed), "student": digest(file)}
        if (old := self.find(arm, seed)) and old["student"] == made["student"]:
            return
        samples = judge.made_by(teachers.load(file, role="student"))
        record = {
            **made,
            "curve": [(int(row["update"]), row["distance"]) for row in read_csv(folder / "distances.csv")],
            "scores": judge(samples).as_dict(),
            "samples": _packed(samples[:SHOWN]),
            "machine": machine.kind(),
        }
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._file(arm, seed)) as part:
            part.write(f"{{\n{lines}\n}}\n".encode())

    def repeated(self, arm: Arm, seed: int, judge: Judge) -> str:
        """One sentence that compares a run made again with its record.

        Raises:
            UserError: no record of this run.
        """
        name, record = self.place.run(arm, seed).name, self.find(arm, seed)
        if record is None:
            raise UserError(f"--repeat {name}: {self.folder} holds no record of this run with these settings")
        file = self.place.run(arm, seed) / "student.safetensors"
        if digest(file) == record["student"]:
            return f"{name}: the student equals the recorded one to the bit"
        again = judge(judge.made_by(teachers.load(file, role="student"))).distance
        before, (low, high) = record["scores"]["distance"], record["scores"]["interval"]
        # The interval is one of the laws' distance, which lies below the samples'. So its half width is compared.
        within = "within" if abs(again - before) <= (high - low) / 2 else "beyond"
        return (
            f"{name}: another student of distance {again:.3f}; the recorded one is {before:.3f}, and the difference "
            f"is {within} half of its 95 % bootstrap interval, {(high - low) / 2:.3f}"
        )

    def _file(self, arm: Arm, seed: int) -> Path:
        return self.folder / f"{self.place.run(arm, seed).name}.json"

    def _made_with(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Settings, teacher, classifier and number of samples: on one processor they decide a record's numbers."""
        return {
            "settings": settings(configs.load("mnist", self.place.settings(arm, seed, self.extra))),
            "teacher": digest(self.place.teacher(arm.teacher)),
            "classifier": digest(self.place.classifier),
            "count": self.count,
        }


def settings(config: Config) -> dict[str, Any]:
    """A configuration without the settings that name files."""
    sections = {key: dict(value) for key, value in configs.to_mapping(config).items()}
    for section, key in PLACES:
        sections[section].pop(key, None)
    return dict(json.loads(json.dumps(sections)))


def digest(file: Path) -> str:
    """A checksum of the tensors in a safetensors file, whatever its description says.

    Raises:
        UserError: there is no such file.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}: the step that makes it has not run yet")
    content = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def pictures(record: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    """The samples that a record keeps, images ``(SHOWN, *shape)`` in ``[-1, 1]``."""
    raw = bytearray(zlib.decompress(base64.b64decode(record["samples"])))
    return data.to_float(torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, *shape))


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file in one step."""
    with replacing(file) as part:
        part.write((json.dumps(content, indent=1) + "\n").encode())


def _packed(samples: Tensor) -> str:
    return base64.b64encode(zlib.compress(data.to_bytes(samples).numpy().tobytes(), 9)).decode()
