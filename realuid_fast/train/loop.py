"""The run around a trainer: updates, progress, logs, evaluations, checkpoints, and a clean end on a signal."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import secrets
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import teachers
from ..errors import NotWritten, UserError
from ..evaluate.measure import Measure, evaluation_noise, generate
from ..extras import extra
from ..files import make_folder, replacing
from ..lock import Lock
from ..models.pictures import picture, save_png
from ..networks import memory
from ..settings import RunConfig
from ..streams import Tolerant
from . import distributed
from .checkpoint import Checkpoints
from .folder import identity_of, write_config
from .hooks import Best, Interrupted, Pace, Row, Skips, Watch, signals
from .logging import CsvLog, Events
from .modes import captures, compiles
from .trainer import Trainer

with extra():
    from tqdm import tqdm


def run(
    trainer: Trainer,
    folder: Path,
    measure: Measure,
    shape: tuple[int, ...],
    settings: RunConfig | None = None,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    lock: Lock | None = None,
) -> Path:
    """Train to the last update and save the result; the file of the exported network.

    After SIGINT, SIGTERM or SIGHUP (unless ignored, as under nohup) the run finishes its current update, saves and
    raises :class:`Interrupted`; a second signal ends the process at once. If distances are evaluated, the network with
    the smallest one so far is in ``best.safetensors``.

    A resumed run goes on from its newest sound checkpoint, or from the beginning if it died before the first. It ends
    as it would have without the interruption, bit for bit on one thread.

    Args:
        trainer: a trainer at its beginning.
        folder: a folder from :func:`realuid_fast.train.folder.open_folder`.
        measure: the distances of evaluations.
        shape: the shape of one sample.
        settings: the section ``run``, its defaults when None; settings of a trainer are ignored.
        config: what ``config.yaml`` holds, in plain values.
        resume: go on with the run in the folder.
        lock: rank 0's lock of the folder, which is checked before every write.

    Raises:
        UserError: the run cannot go on from its checkpoint, the folder is no longer writable or no longer this run's,
            memory does not suffice, or ``stop_after_skips`` updates in a row had no finite gradient.
        Interrupted: after a signal.
    """
    return _Run(trainer, folder, measure, shape, settings or RunConfig(), config or {}, resume, lock).train()


class _Run:
    """A run between its first and its last update."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        measure: Measure,
        shape: tuple[int, ...],
        settings: RunConfig,
        config: Mapping[str, Any],
        resume: bool,
        lock: Lock | None,
    ) -> None:
        trainer.description.checked()  # before the first update, not after the last
        self.trainer, self.folder, self.measure, self.shape = trainer, folder, measure, shape
        self.settings, self.config, self.lock = settings, config, lock
        self.leader = distributed.rank() == 0
        # No rank holds a sharded network in full, so all ranks take part in its evaluations and checkpoints.
        self.together = self.leader or trainer.sharded
        identity = identity_of(folder) if self.leader and resume else None
        self.checkpoints = Checkpoints(folder / "checkpoints", settings.keep, trainer.sharded, self.check, identity)
        saved = self._restored() if resume else None
        if saved is None:
            trainer.random.begin()
        self.checkpoints.identity = identity or (saved or {}).get("run") or secrets.token_hex(8)
        if self.leader:
            self.check()
            write_config(folder, config, self.checkpoints.identity, trainer.description.role)
        self.log, self.distances = self._logs()
        self.log.cut(self.log.start if saved is None else saved["log"])
        self.distances.cut(self.distances.start if saved is None else saved["distances"])
        self.stderr = Tolerant(sys.stderr)
        self.events = Events(folder / "events" if settings.tensorboard and self.leader else None, trainer.step)
        self.best = Best(folder, trainer, saved["best"] if saved and self.leader else None, self.check)
        self.observed: int | None = saved["observed"] if saved else None
        self.rows: list[Row] = []
        self.shown: dict[str, str] = {}
        self.concerned, self.first = False, trainer.step
        self.watch, self.pace = Watch(trainer), Pace(trainer.device)
        self.skips = Skips(trainer, settings.stop_after_skips)

    def train(self) -> Path:
        """Every update that is left, with all that is due between two of them; the file of the exported network."""
        trainer = self.trainer
        self.progress = self._bar()
        with (
            signals() as received,
            contextlib.closing(self.progress),
            contextlib.closing(self.events),
            contextlib.closing(self.checkpoints),
            self.explained(),
        ):
            try:
                self.observe()
                self.watch.start()
                stopping = False
                while trainer.step < trainer.updates and not stopping:
                    trainer.update()
                    self.pace.keep()
                    self.checkpoints.check()
                    # A signal reaches the ranks in different updates, so they agree on one to stop after.
                    if distributed.size() == 1 or self.due(self.settings.log_every):
                        stopping = distributed.agreed(bool(received))
                    if self.due(self.settings.log_every):
                        self.log_row()
                    self.progress.update(1)
                    # The sender of a signal may not wait as long as an evaluation takes. A resumed run makes it.
                    if not stopping:
                        with self.watch.paused():
                            self.observe()
                            if not self.last and self.due(self.settings.checkpoint_every):
                                self.save_soon()
            except (OSError, UserError):
                # With several ranks the others are in the middle of an update and cannot help to collect the state.
                if distributed.size() == 1:
                    self.rescue()
                # If another run has taken the folder over, report that: it is the cause of the other error.
                self.check()
                raise
            self.save()
            if not self.last or self.observed != trainer.step:
                raise Interrupted((received or [signal.SIGTERM])[0], self.folder)
        return self.export()

    @property
    def last(self) -> bool:
        """Whether the last update was made."""
        return self.trainer.step >= self.trainer.updates

    def due(self, every: int) -> bool:
        """Whether what happens ``every`` so many updates, and after the last one, is due now; 0 is for never."""
        return bool(every) and (self.trainer.step % every == 0 or self.last)

    def check(self) -> None:
        """Raise if the folder is no longer this run's."""
        if self.lock is not None:
            self.lock.check()

    def log_row(self) -> None:
        """Start to fetch a row of the log. If it has not arrived yet, it is written with the next one."""
        self.settle()
        self.rows.append(self.watch.fetch())
        if self.rows[0].ready:
            self.settle()

    def settle(self) -> None:
        """Write the rows whose copies to the host were started; waits for those that have not arrived."""
        while self.rows:
            step, row, calls = self.rows.pop(0)()
            self.check()
            self.log.write({"update": step, **row})
            self.events.scalars(row, step)
            if not self.concerned and (concern := self.trainer.concern(row)) is not None:
                self.concerned = True
                tqdm.write(f"update {step}: {concern}", file=self.stderr)
            self.shown.update({name: f"{row[name]:.4g}" for name in row if name.endswith("loss")})
            self.shown["images/s"] = f"{row['images_per_second']:.0f}"
            self.progress.set_postfix(self.shown, refresh=False)
            self.skips.check(step, row, calls)

    def observe(self) -> None:
        """Make the evaluation and the picture due after this update, unless they were made before a restart."""
        step = self.trainer.step
        if self.observed == step:
            return
        self.observed = step
        if not self.together:
            return
        try:
            if self.due(self.settings.evaluate_every):
                self.shown["distance"] = f"{self.evaluate():.4g}"
            if step and self.due(self.settings.sample_every):
                self.show()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            raise UserError(
                f"the memory of {self.trainer.device} does not suffice for the evaluation after update {step}: resume "
                "with a smaller run.evaluate_samples, or without evaluations by run.evaluate_every=0 and "
                "run.sample_every=0"
            ) from None

    def evaluate(self) -> float:
        """The main distance of fresh samples, written down with the others."""
        trainer = self.trainer
        noise = evaluation_noise(self.shape, self.settings.evaluate_samples, trainer.device)
        sample = functools.partial(trainer.sample, precision=self.settings.evaluate_precision)
        samples, _ = generate(sample, noise, *self.measure.conditions(trainer.network, len(noise)))
        values = self.measure(samples).as_dict() if self.leader else {"distance": math.inf}
        if self.leader:
            self.check()
            self.distances.write({"update": trainer.step, **values})
            self.events.scalars({f"distance/{name}": value for name, value in values.items()}, trainer.step)
        self.best.consider(values["distance"])
        return values["distance"]

    def show(self) -> None:
        """A picture of fresh samples."""
        trainer, count = self.trainer, 100 if len(self.shape) == 3 else 2000
        noise = evaluation_noise(self.shape, count, trainer.device)
        samples = trainer.sample(noise, *self.measure.shown(trainer.network, count, trainer.device))
        if not self.leader:
            return
        pixels = picture(samples)
        self.check()
        (self.folder / "samples").mkdir(exist_ok=True)
        with replacing(self.folder / "samples" / f"update-{trainer.step:08d}.png", durable=False) as stream:
            save_png(pixels, stream)
        self.events.image("samples", pixels, trainer.step)

    def state(self) -> dict[str, Any]:
        """Everything that the run goes on from; all ranks call this, and every owner gives its own state."""
        self.settle()
        return {
            "trainer": self.trainer.state_dict(),
            "log": self.log.position,
            "distances": self.distances.position,
            "best": self.best.state,
            "observed": self.observed,
        }

    def save_soon(self) -> None:
        """Queue a checkpoint."""
        self.settle()
        # While all updates are skipped, a new checkpoint would only push out an older, better one.
        if not self.skips.running:
            now = self.state()
            if self.together:
                self.checkpoints.save_soon(self.trainer.step, now, self._logs_to_disk)

    def save(self) -> None:
        """Write a checkpoint and wait for it."""
        now = self.state()
        if self.together:
            self.checkpoints.save(self.trainer.step, now, self._logs_to_disk)

    def rescue(self) -> None:
        """Save to a folder that somebody has removed: its checkpoints are gone, so the run exists in memory alone.

        If another run has made the folder again, nothing is saved there.
        """
        if (self.folder / "config.yaml").exists():
            return
        # A save in the background may have failed for the same reason. Its error must not prevent this save.
        self.checkpoints.close()
        with contextlib.suppress(OSError, UserError):
            if self.lock is not None:
                self.lock.retake()
            if (self.folder / "config.yaml").exists():
                return
            make_folder(self.folder)
            write_config(self.folder, self.config, self.checkpoints.identity or "", self.trainer.description.role)
            self._logs()
            self.checkpoints.save(self.trainer.step, self.state())

    def export(self) -> Path:
        """Save the trained network and, if asked for, the times of an update's phases."""
        exported, description = self.trainer.exported()
        file = self.folder / f"{description.role}.safetensors"
        if self.leader:
            self.check()
            if self.settings.timings:
                updates, seconds = max(self.trainer.step - self.first, 1), self.trainer.phases.seconds
                timings = {"unit": "ms per update", **{name: 1e3 * each / updates for name, each in seconds.items()}}
                with replacing(self.folder / "timings.json") as stream:
                    stream.write(json.dumps(timings, indent=1).encode() + b"\n")
            with self.explained():
                teachers.save(file, exported, description)
        return file

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of the disk or of memory inside the block into a sentence that names the last checkpoint."""
        try:
            yield
        except OSError as error:
            what = f"{error.filename or 'a file'}: {error.strerror or error}"
        except NotWritten as error:
            what = str(error)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            what = self._memory_advice(error)
        else:
            return
        self.checkpoints.close()
        files = self.checkpoints.files()
        left = f"--resume goes on from {files[-1].name}" if files else "no checkpoint was written yet"
        raise UserError(f"stopped after update {self.trainer.step}: {what}; {left}") from None

    def _memory_advice(self, error: BaseException) -> str:
        # The traceback's frames keep the failed turn's tensors alive, and with them the memory.
        held: BaseException | None = error
        while held is not None:
            traceback.clear_frames(held.__traceback__)
            held = held.__context__
        trainer = self.trainer
        what = memory.advice(
            trainer.network, trainer.batch, trainer.parts, trainer.passes, self.shape, trainer.device
        )  # fmt: skip
        if "run.accumulate" in what and captures(trainer.mode):
            what += f" (and run.mode={'compiled' if compiles(trainer.mode) else 'eager'}: a graph takes a batch whole)"
        return what

    def _restored(self) -> dict[str, Any] | None:
        """The checkpoint that the trainer goes on from; None if the run died before its first."""
        if not self.leader:
            # Wait for rank 0, which sets damaged files aside.
            distributed.wait()
        there = self.checkpoints.files() or self.checkpoints.lost
        saved = self.checkpoints.load(verify=self.leader) if there else None
        if self.leader:
            distributed.wait()
        if saved is not None:
            for name in ("trainer", "log", "distances", "best", "observed"):
                if name not in saved:
                    raise UserError(f"the checkpoint does not fit the run: {name!r}")
            if isinstance(saved["trainer"], dict):
                # Earlier versions kept the ranks' own states beside the trainer's.
                saved["trainer"].setdefault("ranks", saved.get("ranks"))
            self.trainer.load_state_dict(saved["trainer"])
        return saved

    def _logs(self) -> tuple[CsvLog, CsvLog]:
        trainer = self.trainer
        names = [*trainer.meters.names, *(f"{name} rate" for name in trainer.optimisers)]
        names += [f"{name} skipped" for name in trainer.optimisers]
        columns = {
            "log.csv": ["update", *names, "images_per_second", "seconds"],
            "distances.csv": ["update", *self.measure.columns],
        }
        log, distances = (CsvLog(self.folder / n if self.leader else None, each) for n, each in columns.items())
        return log, distances

    def _logs_to_disk(self) -> None:
        self.log.to_disk()
        self.distances.to_disk()

    def _bar(self) -> Any:
        return tqdm(
            total=self.trainer.updates,
            initial=self.trainer.step,
            disable=not (self.settings.progress and self.leader),
            file=self.stderr,
            unit="update",
            mininterval=0.2 if self.stderr.isatty() else 15.0,
            dynamic_ncols=True,
        )
