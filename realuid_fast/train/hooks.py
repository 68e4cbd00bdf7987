"""Observers of a run between its updates: the rows of its log, its pace, skipped updates, its best network, signals."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .. import teachers
from ..errors import UserError
from ..meters import Fetched
from . import distributed
from .trainer import Trainer

AHEAD = 2  # updates that the host may queue on a device before it waits


class Row:
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
        """Whether a call would not wait."""
        return self._fetched.ready

    def __call__(self) -> tuple[int, dict[str, float], dict[str, int]]:
        values = self._fetched.values()
        row, calls = self._quotients(values[: self._meters]), {}
        for i, name in enumerate(self._names):
            steps, row[f"{name} skipped"], row[f"{name} rate"] = values[self._meters + 3 * i :][:3]
            calls[name] = int(steps)
        return self._step, {**row, **self._clock}, calls


class Watch:
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

    def fetch(self) -> Row:
        """The row for the updates since the last one; its numbers are still being copied."""
        trainer, now = self._trainer, time.perf_counter()
        seconds = self._spent + now - self._since
        images = (trainer.step - self._step) * trainer.images_per_update * distributed.size()
        self._spent, self._since, self._step = 0.0, now, trainer.step
        return Row(trainer, {"images_per_second": images / max(seconds, 1e-9), "seconds": seconds})


class Pace:
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


class Skips:
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


class Best:
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


class Interrupted(Exception):
    """A signal asked the run to end; everything is saved. ``code`` is the process' exit code."""

    of_all_ranks = True

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, saved in {folder}")
        self.code = 128 + signum
        self.folder = folder


def stopping() -> list[signal.Signals]:
    """The signals that a run stops at. SIGHUP is one of them unless it is ignored, as under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
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
