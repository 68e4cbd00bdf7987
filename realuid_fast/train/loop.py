"""The run around a trainer: folder, progress, logs, evaluations, checkpoints, and a clean end on a signal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import teachers
from ..errors import NotWritten, UserError
from ..evaluate.measure import Measure, evaluation_noise, generate
from ..extras import extra
from ..files import is_own, make_folder, new_part, part_of, remove, replacing
from ..noise import NoiseStream
from ..optim import Optimiser
from ..pictures import picture, save_png
from ..streams import Tolerant
from . import config as configs
from . import distributed, memory, sharding
from .checkpoint import Checkpoints, clear, clear_half_written
from .lock import LOCK, Lock
from .logging import CsvLog, Events, convergence_plot, read_csv
from .meters import Fetched, Meters
from .modes import captures, compiles
from .phases import Phases
from .settings import Config

with extra():
    import yaml
    from tqdm import tqdm

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
AHEAD = 2  # updates that the host may queue on a device before it waits


class Trainer(Protocol):
    """The attributes and methods of a trainer that :func:`run` uses."""

    step: int
    updates: int
    batch: int
    parts: int
    device: torch.device
    meters: Meters
    phases: Phases
    noise: NoiseStream
    draws: torch.Generator
    sharded: bool
    description: teachers.Description

    @property
    def network(self) -> nn.Module: ...

    @property
    def images_per_update(self) -> int: ...

    @property
    def rows(self) -> int: ...

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

    of_all_ranks = True

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, saved in {folder}")
        self.code = 128 + signum
        self.folder = folder


def open_folder(folder: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Create or enter a run folder without ever writing over something that was not asked for.

    Leftovers of a process that was killed before it had written ``config.yaml`` are ignored. With ``overwrite`` the old
    ``config.yaml`` stays until :func:`run` replaces it, so that a kill in between leaves a folder that holds a run.

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
            if not overwrite:
                raise UserError(
                    f"the folder {folder} is not empty: give --resume to go on with its run, --overwrite to start "
                    "afresh, or another folder"
                )
            if not (folder / "config.yaml").is_file():
                raise UserError(f"the folder {folder} holds files but no run, so --overwrite leaves it alone")
        for file in (folder / name for name in (*RUN_FILES, *RUN_FOLDERS)):
            kind = "file" if file.name in RUN_FILES else "folder"
            if file.is_symlink() or (file.exists() and not (file.is_file() if kind == "file" else file.is_dir())):
                raise UserError(f"{file} is a link or not a {kind}, where a run would write: move it away")
        remove(file for file in folder.iterdir() if part_of(file.name) in RUN_FILES)
        remove(file for file in _pictures(folder) if part_of(file.name))
        if not resume:
            _clear(folder)
        clear_half_written(folder / "checkpoints")
        tried = new_part(folder / "config.yaml")
        tried.touch(exist_ok=False)
        tried.unlink()
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None


def require_run(folder: Path) -> None:
    """Raise :class:`UserError` where ``folder`` holds no run to go on with."""
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"there is no run to resume in {folder}: it has no config.yaml; leave --resume out to start a run there"
        )


def _is_remnant(file: Path) -> bool:
    """Whether ``file`` is a leftover of a run that was killed before its configuration was complete."""
    # Earlier versions wrote config.yaml.part.
    return file.name in (LOCK, "config.yaml.part") or (part_of(file.name) in RUN_FILES and is_own(file))


def _pictures(folder: Path) -> list[Path]:
    """The pictures of samples in a run's folder, with those that a killed process had not finished."""
    there = (folder / "samples").iterdir() if (folder / "samples").is_dir() else ()
    return [file for file in there if _PICTURE.fullmatch(part_of(file.name) or file.name)]


def _clear(folder: Path) -> None:
    """Delete all files of a run except its configuration; files that no run makes stay."""
    remove(folder / name for name in RUN_FILES if name != "config.yaml")
    clear(folder / "checkpoints")
    remove(_pictures(folder))
    remove((folder / "events").glob("events.out.tfevents.*"))
    for name in RUN_FOLDERS:
        with contextlib.suppress(OSError):
            (folder / name).rmdir()


def run(
    config: Config,
    trainer: Trainer,
    folder: Path,
    measure: Measure,
    shape: tuple[int, ...],
    resume: bool,
    lock: Lock | None = None,
) -> Path:
    """Train to the last update and save the result; the file of the exported network.

    ``folder`` comes from :func:`open_folder`, and rank 0 has its ``lock``, which is checked before every write. After
    SIGINT, SIGTERM or SIGHUP (unless ignored, as under nohup) the run finishes its current update, saves and raises
    :class:`Interrupted`; a second signal ends the process at once. If distances are evaluated, the network with the
    smallest one so far is in ``best.safetensors``.

    A resumed run goes on from its newest sound checkpoint, or from the beginning if it died before the first. It ends
    as it would have without the interruption, bit for bit on one thread.

    Raises:
        UserError: the run cannot go on from its checkpoint, the folder is no longer writable or no longer this run's,
            memory does not suffice, or ``stop_after_skips`` updates in a row had no finite gradient.
        Interrupted: after a signal.
    """
    settings, leader = config.run, distributed.rank() == 0
    check = _nothing if lock is None else lock.check
    identity = _identity(folder) if leader and resume else None
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep, trainer.sharded, check, identity)
    # No rank holds a sharded network in full, so all ranks take part in its evaluations and checkpoints.
    together = leader or trainer.sharded
    saved = _load(checkpoints, leader) if resume else None
    _restore(trainer, saved, settings.seed)
    checkpoints.identity = identity or (saved or {}).get("run") or secrets.token_hex(8)
    if leader:
        check()
        _write_config(config, folder, checkpoints.identity)

    log, distances = _logs(trainer, folder if leader else None, measure)
    log.cut(log.start if saved is None else saved["log"])
    distances.cut(distances.start if saved is None else saved["distances"])
    stderr = Tolerant(sys.stderr)
    events = Events(folder / "events" if settings.tensorboard and leader else None, trainer.step)
    best = _Best(folder, trainer, None if saved is None or not leader else saved["best"], check)
    observed: int | None = None if saved is None else saved["observed"]
    rows: list[_Row] = []
    shown: dict[str, str] = {}
    concerned = False
    watch, skips, first = _Watch(trainer), _Skips(trainer, settings.stop_after_skips), trainer.step

    def settle() -> None:
        """Write the rows whose copies to the host were started; waits for those that have not arrived."""
        nonlocal concerned
        while rows:
            step, row, calls = rows.pop(0)()
            check()
            log.write({"update": step, **row})
            events.scalars(row, step)
            if not concerned and (concern := trainer.concern(row)) is not None:
                concerned = True
                tqdm.write(f"update {step}: {concern}", file=stderr)
            shown.update({name: f"{row[name]:.4g}" for name in row if name.endswith("loss")})
            shown["images/s"] = f"{row['images_per_second']:.0f}"
            progress.set_postfix(shown, refresh=False)
            skips.check(step, row, calls)

    def state() -> dict[str, Any]:
        settle()
        return {
            "trainer": trainer.state_dict(),
            "ranks": distributed.gathered(_own(trainer)),
            "log": log.position,
            "distances": distances.position,
            "best": best.state,
            "observed": observed,
        }

    def logs_to_disk() -> None:
        log.to_disk()
        distances.to_disk()

    def show() -> None:
        count = 100 if len(shape) == 3 else 2000
        noise = evaluation_noise(shape, count, trainer.device)
        samples = trainer.sample(noise, *measure.shown(trainer.network, count, trainer.device))
        if not leader:
            return
        pixels = picture(samples)
        check()
        (folder / "samples").mkdir(exist_ok=True)
        with replacing(folder / "samples" / f"update-{trainer.step:08d}.png", durable=False) as stream:
            save_png(pixels, stream)
        events.image("samples", pixels, trainer.step)

    def evaluate() -> float:
        noise = evaluation_noise(shape, settings.evaluate_samples, trainer.device)
        conditions = measure.conditions(trainer.network, len(noise))
        samples, _ = generate(trainer.sample, noise, *conditions)
        values = measure(samples).as_dict() if leader else {"distance": math.inf}
        if leader:
            check()
            distances.write({"update": trainer.step, **values})
            events.scalars({f"distance/{name}": value for name, value in values.items()}, trainer.step)
        best.consider(values["distance"])
        return values["distance"]

    def observe() -> None:
        """Make the evaluation and the picture due after this update, unless they were made before a restart."""
        nonlocal observed
        step, last = trainer.step, trainer.step == trainer.updates
        if observed == step:
            return
        observed = step
        if not together:
            return
        try:
            if settings.evaluate_every and (step % settings.evaluate_every == 0 or last):
                shown["distance"] = f"{evaluate():.4g}"
            if settings.sample_every and step and (step % settings.sample_every == 0 or last):
                show()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            raise UserError(
                f"the memory of {trainer.device} does not suffice for the evaluation after update {step}: resume with "
                "a smaller run.evaluate_samples, or without evaluations by run.evaluate_every=0 and run.sample_every=0"
            ) from None

    progress = tqdm(
        total=trainer.updates,
        initial=trainer.step,
        disable=not (settings.progress and leader),
        file=stderr,
        unit="update",
        mininterval=0.2 if stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )
    pace = _Pace(trainer.device)
    with (
        _signals() as received,
        contextlib.closing(progress),
        contextlib.closing(events),
        contextlib.closing(checkpoints),
        _explained(trainer, checkpoints, shape),
    ):
        try:
            observe()
            watch.start()
            stopping = False
            while trainer.step < trainer.updates and not stopping:
                trainer.update()
                pace.keep()
                checkpoints.check()
                step, last = trainer.step, trainer.step == trainer.updates
                # A signal reaches the ranks in different updates, so they agree on one to stop after.
                if distributed.size() == 1 or step % settings.log_every == 0 or last:
                    stopping = distributed.agreed(bool(received))
                if step % settings.log_every == 0 or last:
                    # If a row has not arrived from the device yet, it is written with the next one.
                    settle()
                    rows.append(watch.fetch())
                    if rows[0].ready:
                        settle()
                progress.update(1)
                # The sender of a signal may not wait as long as an evaluation takes. A resumed run makes it.
                if stopping:
                    break
                with watch.paused():
                    observe()
                    due = settings.checkpoint_every and step % settings.checkpoint_every == 0
                    if due and not last:
                        settle()
                        # While all updates are skipped, a new checkpoint would only push out an older, better one.
                        if not skips.running:
                            now = state()
                            if together:
                                checkpoints.save_soon(step, now, logs_to_disk)
        except (OSError, UserError):
            # With several ranks the others are in the middle of an update and cannot help to collect the state.
            if distributed.size() == 1:
                _rescue(config, trainer, folder, measure, checkpoints, state, lock)
            # If another run has taken the folder over, report that: it is the cause of the other error.
            check()
            raise
        now = state()
        if together:
            checkpoints.save(trainer.step, now, logs_to_disk)
        if trainer.step < trainer.updates or observed != trainer.step:
            raise Interrupted((received or [signal.SIGTERM])[0], folder)
    exported, description = trainer.exported()
    file = folder / f"{description.role}.safetensors"
    if leader:
        check()
        if settings.timings:
            _write_timings(folder, trainer, trainer.step - first)
        with _explained(trainer, checkpoints, shape):
            teachers.save(file, exported, description)
    return file


def plot_distances(folder: Path, lines: dict[str, float], metric: str, name: str = "student") -> Path | None:
    """Draw ``convergence.png`` of a run from its ``distances.csv``; None if nothing was evaluated."""
    points = [(row["update"], row["distance"]) for row in read_csv(folder / "distances.csv")]
    if not points:
        return None
    with replacing(folder / "convergence.png") as stream:
        convergence_plot({name: points}, lines, metric, stream)
    return folder / "convergence.png"


def _logs(trainer: Trainer, folder: Path | None, measure: Measure) -> tuple[CsvLog, CsvLog]:
    names = [*trainer.meters.names, *(f"{name} rate" for name in trainer.optimisers)]
    names += [f"{name} skipped" for name in trainer.optimisers]
    columns = {
        "log.csv": ["update", *names, "images_per_second", "seconds"],
        "distances.csv": ["update", *measure.columns],
    }
    log, distances = (CsvLog(folder / name if folder else None, columns[name]) for name in columns)
    return log, distances


def _write_timings(folder: Path, trainer: Trainer, updates: int) -> None:
    timings = {name: 1e3 * seconds / max(updates, 1) for name, seconds in trainer.phases.seconds.items()}
    with replacing(folder / "timings.json") as stream:
        stream.write(json.dumps({"unit": "ms per update", **timings}, indent=1).encode() + b"\n")


def _write_config(config: Config, folder: Path, identity: str) -> None:
    # The identity is a comment, not a setting: another run that is started from this file gets its own.
    head = f"# run {identity}: checkpoints of other runs are refused\n"
    with replacing(folder / "config.yaml") as stream:
        stream.write((head + yaml.safe_dump(configs.to_mapping(config), sort_keys=False)).encode())


def _identity(folder: Path) -> str | None:
    """The identity in a run's config.yaml; None if an earlier version or a person wrote the file."""
    found = re.search(r"^# run ([0-9a-f]{16}):", (folder / "config.yaml").read_text(), re.MULTILINE)
    return found[1] if found else None


def _nothing() -> None:
    pass


def _load(checkpoints: Checkpoints, leader: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from; None if the run died before its first."""
    if not leader:
        # Wait for rank 0, which sets damaged files aside.
        distributed.wait()
    saved = checkpoints.load(verify=leader) if checkpoints.files() or checkpoints.lost else None
    if leader:
        distributed.wait()
    return saved


def _own(trainer: Trainer) -> dict[str, Any]:
    """The state that differs between ranks. The noise is left out: its stream follows from rank 0's."""
    own = {
        "draws": trainer.draws.get_state(),
        "meters": trainer.meters.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }
    return own | ({"cuda_rng": torch.cuda.get_rng_state(trainer.device)} if trainer.device.type == "cuda" else {})


def _restore(trainer: Trainer, saved: dict[str, Any] | None, seed: int) -> None:
    """Continue from a checkpoint of any number of ranks; without one, give a rank its own random numbers."""
    rank = distributed.rank()
    if saved is None:
        # Dropout draws from torch's default generator.
        torch.manual_seed(distributed.seed(seed))
        return
    try:
        trainer.load_state_dict(sharding.taken(trainer.state_dict(), saved["trainer"]))
        noise = trainer.noise.state
        noise[0] = distributed.seed(int(noise[0]))
        ranks = saved["ranks"]
        if rank < len(ranks):
            trainer.draws.set_state(ranks[rank]["draws"])
            torch.set_rng_state(ranks[rank]["torch_rng"])
            if trainer.device.type == "cuda" and "cuda_rng" in ranks[rank]:
                torch.cuda.set_rng_state(ranks[rank]["cuda_rng"], trainer.device)
        else:
            # This rank did not exist in the saved run. It starts a stream that depends on the update.
            fresh = distributed.seed(2 * seed + 1 + (trainer.step << 32))
            trainer.draws.manual_seed(fresh)
            torch.manual_seed(fresh)
        if len(ranks) == distributed.size():
            trainer.meters.load_state_dict(ranks[rank]["meters"])
        else:
            sums = torch.stack([each["meters"]["sums"] for each in ranks]).mean(0)
            trainer.meters.load_state_dict({**ranks[0]["meters"], "sums": sums})
        for name in ("log", "distances", "best", "observed"):
            saved[name]
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit the run: {str(error) or type(error).__name__}") from None


def _rescue(
    config: Config,
    trainer: Trainer,
    folder: Path,
    measure: Measure,
    checkpoints: Checkpoints,
    state: Callable[[], dict[str, Any]],
    lock: Lock | None,
) -> None:
    """Save to a folder that somebody has removed: its checkpoints are gone, so the run exists in memory alone.

    If another run has made the folder again, nothing is saved there.
    """
    if (folder / "config.yaml").exists():
        return
    # A save in the background may have failed for the same reason. Its error must not prevent this save.
    checkpoints.close()
    with contextlib.suppress(OSError, UserError):
        if lock is not None:
            lock.retake()
        if (folder / "config.yaml").exists():
            return
        make_folder(folder)
        _write_config(config, folder, checkpoints.identity or "")
        _logs(trainer, folder, measure)
        checkpoints.save(trainer.step, state())


@contextlib.contextmanager
def _explained(trainer: Trainer, checkpoints: Checkpoints, shape: tuple[int, ...]) -> Iterator[None]:
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
        # The traceback's frames keep the failed turn's tensors alive, and with them the memory.
        held: BaseException | None = error
        while held is not None:
            traceback.clear_frames(held.__traceback__)
            held = held.__context__
        what = memory.advice(trainer.network, trainer.batch, trainer.parts, trainer.rows, shape, trainer.device)
        if "run.accumulate" in what and captures(mode := getattr(trainer, "mode", "")):
            what += f" (and run.mode={'compiled' if compiles(mode) else 'eager'}: a graph takes a batch whole)"
    else:
        return
    checkpoints.close()
    files = checkpoints.files()
    left = f"--resume goes on from {files[-1].name}" if files else "no checkpoint was written yet"
    raise UserError(f"stopped after update {trainer.step}: {what}; {left}") from None


class _Best:
    """The exported network at the smallest distance so far, in ``best.safetensors`` and in every checkpoint."""

    def __init__(self, folder: Path, trainer: Trainer, state: dict[str, Any] | None, check: Callable[[], None]) -> None:
        self._file, self._trainer, self.state, self._check = folder / "best.safetensors", trainer, state, check
        if state is not None:
            # best.safetensors may be newer than the checkpoint: write the checkpoint's network back.
            check()
            teachers.save(self._file, state["network"], trainer.description)

    def consider(self, distance: float) -> None:
        """Keep the current network if its distance is smaller than all before; an infinite one never is.

        All ranks call this for a sharded network. Only rank 0 knows the distance and gets the network.
        """
        better = distance < (math.inf if self.state is None else self.state["distance"])
        if not (distributed.agreed(better) if self._trainer.sharded else better):
            return
        network, description = self._trainer.exported()
        if not better:
            return
        network = {name: tensor.to("cpu", copy=True) for name, tensor in network.items()}
        self.state = {"update": self._trainer.step, "distance": distance, "network": network}
        self._check()
        teachers.save(self._file, network, description)


class _Skips:
    """Counts updates in a row whose gradient was not finite, row by row of the log.

    The optimiser skips such updates. A row of the log during which it took a step resets the count. ``running`` says
    that some optimiser took no step during the last row.
    """

    def __init__(self, trainer: Trainer, limit: int) -> None:
        self._limit = limit
        self._before = {name: (o.steps, int(o.skipped)) for name, o in trainer.optimisers.items()}
        self._rows = dict.fromkeys(self._before, 0)

    @property
    def running(self) -> bool:
        return any(self._rows.values())

    def check(self, step: int, row: Mapping[str, float], calls: Mapping[str, int]) -> None:
        """Count the log's row of update ``step``; each optimiser had been called ``calls[name]`` times by then.

        Raises:
            UserError: the limit is reached.
        """
        for name, (called, skipped) in self._before.items():
            done, missed = calls[name] - called, int(row[f"{name} skipped"]) - skipped
            self._before[name] = called + done, skipped + missed
            self._rows[name] = self._rows[name] + missed if done and missed == done else 0
            if self._limit and self._rows[name] >= self._limit:
                last = ", ".join(f"{key} {row[key]:.4g}" for key in row if key.endswith(("loss", "gradient")))
                raise UserError(
                    f"the {name}'s gradient was not finite in {self._rows[name]} steps in a row, all of them skipped: "
                    f"stopped at update {step} ({last}). The checkpoints from before are kept; lower the learning rate "
                    "or use a finer precision"
                )


class _Row:
    """A row of the log whose numbers are being copied to the host.

    A call waits for them and returns the update, the row, and the number of calls of each optimiser.
    """

    def __init__(self, trainer: Trainer, clock: dict[str, float]) -> None:
        sums, self._quotients = trainer.meters.drain()
        self._step, self._names, self._clock = trainer.step, list(trainer.optimisers), clock
        self._meters = len(sums)
        self._fetched = Fetched(
            torch.cat([distributed.averaged(sums), *(each.progress for each in trainer.optimisers.values())])
        )

    @property
    def ready(self) -> bool:
        return self._fetched.ready

    def __call__(self) -> tuple[int, dict[str, float], dict[str, int]]:
        values = self._fetched.values()
        row, calls = self._quotients(values[: self._meters]), {}
        for i, name in enumerate(self._names):
            steps, row[f"{name} skipped"], row[f"{name} rate"] = values[self._meters + 3 * i :][:3]
            calls[name] = int(steps)
        return self._step, {**row, **self._clock}, calls


class _Pace:
    """Keeps the host at most :data:`AHEAD` updates ahead of a device.

    Otherwise the host would run a whole log interval ahead. A run would then stop that long after a signal, and the
    times in the log would be those of queueing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """After an update, wait for the one :data:`AHEAD` updates before; the device still has the later ones to do."""
        if self._device.type != "cuda":
            return
        self._done.append(torch.cuda.Event())
        self._done[-1].record(torch.cuda.current_stream(self._device))
        if len(self._done) > AHEAD:
            self._done.popleft().synchronize()


class _Watch:
    """Makes the rows of the log. Its clock is stopped during evaluations and saves."""

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

    def fetch(self) -> _Row:
        """The row for the updates since the last one; its numbers are still being copied."""
        trainer, now = self._trainer, time.perf_counter()
        seconds = self._spent + now - self._since
        images = (trainer.step - self._step) * trainer.images_per_update * distributed.size()
        self._spent, self._since, self._step = 0.0, now, trainer.step
        return _Row(trainer, {"images_per_second": images / max(seconds, 1e-9), "seconds": seconds})


def stopping() -> list[signal.Signals]:
    """The signals that a run stops at. SIGHUP is one of them unless it is ignored, as under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT, SIGTERM or SIGHUP in a list; after it, a second SIGINT or SIGTERM ends the process.

    A SIGHUP that is ignored, as under nohup, stays ignored. After the first signal every SIGHUP is ignored: a terminal
    that closes sends it two or three times, from the shell and from the kernel, while the run is being saved.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for each in before:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        # Written directly, because the handler may have interrupted a buffered write. The other end may be closed.
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing this update, then saving; a second signal ends the process at once\n")

    for wanted in stopping():
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            before[wanted] = signal.signal(wanted, receive)
    try:
        yield received
    except Exception:
        # When one rank ends, torchrun sends SIGTERM to the others. Ignore it, so that this rank can report its error.
        if distributed.size() > 1 and signal.SIGTERM in before:
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
