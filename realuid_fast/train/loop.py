"""The run around a trainer: folder, progress, logs, evaluations, checkpoints, and a clean end on a signal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import teachers
from ..errors import UserError
from ..optim import Optimiser
from . import config as configs
from .checkpoint import Checkpoints
from .config import Config
from .logging import CsvLog, Events, convergence_plot, picture, read_csv, save_png
from .measure import Measure, evaluation_noise, generate
from .meters import Meters
from .phases import Phases

# What a run writes, and so what --overwrite may remove.
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
)
RUN_FOLDERS = ("checkpoints", "samples", "events")


class Trainer(Protocol):
    """What :func:`run` needs of a trainer."""

    step: int
    updates: int
    device: torch.device
    meters: Meters
    phases: Phases

    @property
    def network(self) -> nn.Module: ...

    @property
    def images_per_update(self) -> int: ...

    @property
    def optimisers(self) -> dict[str, Optimiser]: ...

    def update(self) -> None: ...

    def concern(self, row: Mapping[str, float]) -> str | None: ...

    def sample(self, z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None) -> Tensor: ...

    def exported(self) -> tuple[dict[str, Tensor], teachers.Description]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Interrupted(Exception):
    """A signal asked the run to end; everything is saved. ``code`` is the process' exit code."""

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, saved in {folder}")
        self.code = 128 + signum
        self.folder = folder


def open_folder(folder: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Create or enter a run folder without ever writing over something that was not asked for.

    Raises:
        UserError: the folder is not empty and neither ``resume`` nor ``overwrite`` is given; ``resume`` without a run
            in it; ``overwrite`` of a folder that holds no run; a folder that cannot be created or written.
    """
    try:
        if resume and not (folder / "config.yaml").is_file():
            raise UserError(f"there is no run to resume in {folder}: it has no config.yaml")
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not resume:
            if not overwrite:
                raise UserError(
                    f"the folder {folder} is not empty: give --resume to go on with its run, --overwrite to start "
                    "afresh, or another folder"
                )
            if not (folder / "config.yaml").is_file():
                raise UserError(f"the folder {folder} holds files but no run, so --overwrite leaves it alone")
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
            for name in RUN_FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None


def run(config: Config, trainer: Trainer, folder: Path, measure: Measure, shape: tuple[int, ...], resume: bool) -> Path:
    """Train to the last update and save the result; the file of the exported network.

    ``folder`` comes from :func:`open_folder`. SIGINT and SIGTERM finish the update at hand, save and raise
    :class:`Interrupted`; a second signal ends the process at once.

    Raises:
        UserError: a checkpoint that cannot be resumed from, or a folder that stops being writable.
        Interrupted: after a signal.
    """
    settings = config.run
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep)
    saved = checkpoints.load() if resume else None
    if saved is not None:
        trainer.load_state_dict(saved["trainer"])
    configs.save(config, folder / "config.yaml")

    log, distances = _logs(trainer, folder, measure)
    if saved is not None:
        log.cut(saved["log"])
        distances.cut(saved["distances"])
    events = Events(folder / "events" if settings.tensorboard else None, trainer.step)
    watch, first = _Watch(trainer), trainer.step

    def save() -> None:
        state = {"trainer": trainer.state_dict(), "log": log.position, "distances": distances.position}
        checkpoints.save(trainer.step, state)

    def show() -> None:
        count = 100 if len(shape) == 3 else 2000
        noise = evaluation_noise(shape, count, trainer.device)
        pixels = picture(trainer.sample(noise, *measure.shown(trainer.network, count, trainer.device)))
        save_png(pixels, folder / "samples" / f"update-{trainer.step:08d}.png")
        events.image("samples", pixels, trainer.step)

    def evaluate() -> float:
        noise = evaluation_noise(shape, settings.evaluate_samples, trainer.device)
        conditions = measure.conditions(trainer.network, len(noise))
        values = measure(generate(trainer.sample, noise, *conditions)[0]).as_dict()
        distances.write({"update": trainer.step, **values})
        events.scalars({f"distance/{name}": value for name, value in values.items()}, trainer.step)
        return values["distance"]

    progress = tqdm(
        total=trainer.updates,
        initial=trainer.step,
        disable=not settings.progress,
        unit="update",
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )
    shown: dict[str, str] = {}
    concerned = False
    with _signals() as received, contextlib.closing(progress), contextlib.closing(events):
        if saved is None and settings.evaluate_every:
            shown["distance"] = f"{evaluate():.4g}"
        watch.start()
        while trainer.step < trainer.updates and not received:
            trainer.update()
            step, last = trainer.step, trainer.step == trainer.updates
            if step % settings.log_every == 0 or last:
                row = watch.read()
                log.write({"update": step, **row})
                events.scalars(row, step)
                if not concerned and (concern := trainer.concern(row)) is not None:
                    concerned = True
                    tqdm.write(f"update {step}: {concern}", file=sys.stderr)
                shown.update({name: f"{row[name]:.4g}" for name in row if name.endswith("loss")})
                shown["images/s"] = f"{row['images_per_second']:.0f}"
                progress.set_postfix(shown, refresh=False)
            progress.update(1)
            with watch.paused():
                if settings.evaluate_every and (step % settings.evaluate_every == 0 or last):
                    shown["distance"] = f"{evaluate():.4g}"
                if settings.sample_every and (step % settings.sample_every == 0 or last):
                    show()
                if settings.checkpoint_every and step % settings.checkpoint_every == 0 and not last:
                    save()
        save()
        if trainer.step < trainer.updates:
            raise Interrupted(received[0], folder)
    if settings.timings:
        done = trainer.step - first
        timings = {name: 1e3 * seconds / max(done, 1) for name, seconds in trainer.phases.seconds.items()}
        (folder / "timings.json").write_text(json.dumps({"unit": "ms per update", **timings}, indent=1) + "\n")
    state, description = trainer.exported()
    file = folder / f"{description.role}.safetensors"
    teachers.save(file, state, description)
    return file


def plot_distances(folder: Path, lines: dict[str, float], metric: str, name: str = "student") -> Path | None:
    """Draw ``convergence.png`` of a run from its ``distances.csv``; None where nothing was evaluated."""
    points = [(row["update"], row["distance"]) for row in read_csv(folder / "distances.csv")]
    if not points:
        return None
    convergence_plot({name: points}, lines, metric, folder / "convergence.png")
    return folder / "convergence.png"


def _logs(trainer: Trainer, folder: Path, measure: Measure) -> tuple[CsvLog, CsvLog]:
    names = [*trainer.meters.names, *(f"{name} rate" for name in trainer.optimisers)]
    names += [f"{name} skipped" for name in trainer.optimisers]
    log = CsvLog(folder / "log.csv", ["update", *names, "images_per_second", "seconds"])
    distances = CsvLog(folder / "distances.csv", ["update", *measure.columns])
    return log, distances


class _Watch:
    """Turns a trainer's meters into a row of the log; its clock stands still during evaluations and saves."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._step = trainer.step
        self._since = self._spent = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._spent += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        trainer = self._trainer
        row = trainer.meters.read()
        for name, optimiser in trainer.optimisers.items():
            row[f"{name} rate"] = optimiser.lr
            row[f"{name} skipped"] = float(optimiser.skipped)
        seconds = self._spent + time.perf_counter() - self._since
        done = trainer.step - self._step
        row["images_per_second"] = done * trainer.images_per_update / max(seconds, 1e-9)
        row["seconds"] = seconds
        self._spent, self._since, self._step = 0.0, time.perf_counter(), trainer.step
        return row


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in a list; then the defaults are back, so a second one ends the process."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        # Written directly: the handler may have interrupted a buffered write.
        os.write(2, b"\nfinishing this update, then saving; a second signal ends the process at once\n")

    for wanted in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: no handlers there
            before[wanted] = signal.signal(wanted, receive)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
