"""Checkpoints: written beside the old ones and renamed when complete, the last few kept."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

FORMAT = 2


class Checkpoints:
    """The checkpoints of one run, ``update-00000500.pt`` in ``folder``, of which the newest ``keep`` stay.

    A file appears under its name only when it is complete and on disk, so an interrupted save loses nothing.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def files(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("update-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``state`` (tensors and plain values) and torch's own generator state as the checkpoint of ``step``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"update-{step:08d}.pt"
        part = file.with_suffix(".part")
        content = {"format": FORMAT, "torch_rng": torch.get_rng_state(), **state}
        try:
            with part.open("wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
        for old in self.files()[: -self.keep]:
            old.unlink(missing_ok=True)
        return file

    def load(self) -> dict[str, Any]:
        """The newest checkpoint; also restores torch's own generator state. No code in the file runs.

        Raises:
            UserError: there is none, or the file is damaged or foreign.
        """
        files = self.files()
        if not files:
            raise UserError(f"there is no checkpoint to resume from in {self.folder}")
        try:
            content = torch.load(files[-1], map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
            raise UserError(f"{files[-1]} is damaged: remove it to resume from the one before") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{files[-1]} is no checkpoint of this version")
        torch.set_rng_state(content["torch_rng"])
        return content
