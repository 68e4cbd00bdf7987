"""Kills digits runs over and over, goes on with them each time, and compares their ends with a run left alone.

    python -m bench.kills --kills 50 --out bench/results/kills.json

First one long run is killed again and again. SIGKILL comes at a random moment of one of three kinds: anywhere in the
process' life, start-up included; a while after its first checkpoint; while one is being written. After every kill all
checkpoints are read back.

Then short runs are killed once each: before and after every single call of a run that changes names in a folder or
waits for the disk (:data:`CALLS`), from the making of the folder to the exported student. The command that a user would
give next must accept the folder: ``--resume`` where it has a ``config.yaml``, the same command again where it has none.
The same is done to a run that replaces another one (``--overwrite``) beside a file of the user's.

Lives are forked from one process that has imported everything and computed nothing, which saves their imports and
nothing else.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from realuid_fast.errors import UserError
from realuid_fast.files import finished_name
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import train
from realuid_fast.train.checkpoint import files, read
from realuid_fast.train.logging import read_csv

from . import machine

KINDS = ("any time", "in training", "while writing")
SETTINGS = [
    "distill.batch=8",
    "distill.generator.warmup=10",
    "distill.fake.warmup=10",
    "run.checkpoint_every=2",
    "run.keep=3",
    "run.log_every=3",
    "run.evaluate_every=10",
    "run.evaluate_samples=40",
    "run.sample_every=0",
    "run.tensorboard=false",
    "run.progress=false",
]
# A run with two checkpoints, of which the second replaces the first, two evaluations and a picture.
SHORT = ["distill.updates=4", "run.keep=1", "run.log_every=1", "run.evaluate_every=2", "run.sample_every=4"]
CALLS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")
CLOCKS = ("images_per_second", "seconds")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--updates", type=int, help="of the run (default: 8 a kill)")
    parser.add_argument("--every", type=int, default=1, help="of the calls to kill at, 0 for none (default: 1)")
    parser.add_argument("--config", default="digits", help="of the run (default: digits)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to run; kept (default: a temporary one, removed)")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    arguments = parser.parse_args(argv)
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="kills-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Modules that a run imports when it needs them: imported here once for all lives.
        for name in ("sklearn.datasets", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"):
            importlib.import_module(name)
        result: dict[str, Any] = {}
        if arguments.kills:
            result |= _survived(folder, arguments)
        if arguments.every:
            result["calls"] = survive_calls(folder, arguments.every, arguments.config)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    command = f"python -m bench.kills --kills {arguments.kills} --every {arguments.every}"
    command += f" --updates {arguments.updates}" * bool(arguments.updates)
    result = {"command": command, "machine": machine.describe(), **result}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    failed = 0
    if arguments.kills:
        counts = ", ".join(f"{count} {kind}" for kind, count in result["kinds"].items())
        print(f"{len(result['kills'])} kills ({counts}); checkpoints lost: {result['checkpoints_lost']}")
        same = "yes" if result["same"] else "no: " + ", ".join(result["differs"])
        print(f"the same end as the run left alone: {same}")
        failed += not result["same"] or bool(result["checkpoints_lost"])
    for name, each in result.get("calls", {}).items():
        wrong = [kill for kill in each["kills"] if kill["wrong"]]
        print(f"{name}: {len(each['kills'])} kills at {each['calls']} calls; wrong: {wrong or 'none'}")
        failed += len(wrong)
    return 1 if failed else 0


class TooShort(Exception):
    """The run came to its end before the last kill: the machine became faster while the run was going on."""


def _survived(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """:func:`survive` of a run that is long enough for all kills."""
    updates = arguments.updates or 8 * arguments.kills
    while True:
        own = folder / str(updates)
        own.mkdir(exist_ok=True)
        try:
            return survive(own, arguments.kills, updates, arguments.seed, arguments.config)
        except TooShort:
            print(f"{updates} updates were made before the last kill: again with {2 * updates}", flush=True)
            updates *= 2


def survive(folder: Path, kills: int, updates: int, seed: int, source: str) -> dict[str, Any]:
    """Run once alone and once with ``kills`` kills in ``folder``; what happened."""
    config = configs.load(source, [*SETTINGS, f"distill.updates={updates}"])
    alone, killed = folder / "alone", folder / "killed"
    # How long a life takes to its first checkpoint, and how long of the rest each of the lives may have.
    begun = time.monotonic()
    life = _life(config, alone)
    _until(life, lambda: bool(_names(alone)))
    start = time.monotonic() - begun
    life.join()
    share = (time.monotonic() - begun - start) / kills
    rng = random.Random(seed)
    told: list[dict[str, Any]] = []
    lost = 0
    while len(told) < kills:
        before = _steps(killed)
        life = _life(config, killed)
        kind = KINDS[len(told) % len(KINDS)]
        _MOMENTS[kind](life, killed, rng, start, share)
        if life.exitcode is not None:
            if life.exitcode:
                raise SystemExit(f"a life ended by itself, with exit code {life.exitcode}, after {len(told)} kills")
            raise TooShort
        assert life.pid is not None
        os.kill(life.pid, signal.SIGKILL)
        life.join()
        after = _steps(killed)
        # The newest survives, and all that were there but those that rotation removed for newer ones.
        lost += len([step for step in before if step not in after and len([s for s in after if s > step]) < 3])
        kill = {"kind": kind, "newest_checkpoint": after[-1] if after else None}
        if kind == "while writing":
            kill["half_written"] = any((killed / "checkpoints").glob("*.part"))
        told.append(kill)
        print(f"kill {len(told)}, {kind}: newest checkpoint {after[-1] if after else 'none yet'}", file=sys.stderr)
    last = _life(config, killed)
    last.join()
    differs = [name for name, same in _compared(alone, killed).items() if not same]
    return {
        "updates": updates,
        "settings": SETTINGS,
        "kinds": {kind: sum(kill["kind"] == kind for kill in told) for kind in KINDS},
        "kills_in_a_write": sum(kill.get("half_written", False) for kill in told),
        "checkpoints_lost": lost,
        "same": not differs,
        "differs": differs,
        "kills": told,
    }


def survive_calls(folder: Path, every: int, source: str) -> dict[str, Any]:
    """Kill a run of its own before and after each ``every``-th call of one that is left alone; what happened.

    ``wrong`` of a kill is what differs from the run left alone at the end, or why the run did not come to its end.
    """
    config = configs.load(source, [*SETTINGS, *SHORT])
    alone, noted = folder / "alone at calls", folder / "calls.json"
    _life(config, alone, calls=_Calls(alone, note=noted)).join()
    calls = json.loads(noted.read_text())
    # The run that is replaced differs in its seed; from the new configuration on the calls are those of any run.
    before = folder / "before"
    _life(configs.load(source, [*SETTINGS, *SHORT, "run.seed=1"]), before).join()
    (before / "notes.txt").write_text("the user's")
    shutil.copytree(before, folder / "replaced")
    _life(config, folder / "replaced", overwrite=True, calls=_Calls(folder / "replaced", note=noted)).join()
    replacing = json.loads(noted.read_text())
    replacing = replacing[: replacing.index("replace config.yaml") + 2]
    told: dict[str, Any] = {}
    for name, made, start in (("start", calls, None), ("overwrite", replacing, before)):
        kills: list[dict[str, Any]] = []
        for number in range(0, len(made), every):
            for after in (False, True):
                wrong = _killed_at(config, alone, folder / "killed at a call", number, after, start)
                kills.append({"call": made[number], "number": number, "after": after, "wrong": wrong})
                print(f"{name}, {'after' if after else 'before'} {made[number]}: {wrong or 'right'}", file=sys.stderr)
        told[name] = {"calls": len(made), "kills": kills}
    return told


def _killed_at(
    config: configs.Config, alone: Path, folder: Path, number: int, after: bool, start: Path | None
) -> list[str]:
    """The faults at the end of a run that was killed at a call, and then continued as a user would."""
    shutil.rmtree(folder, ignore_errors=True)
    if start is not None:
        shutil.copytree(start, folder)
    life = _life(config, folder, overwrite=start is not None, calls=_Calls(folder, number, after))
    life.join()
    if life.exitcode != -signal.SIGKILL:
        return [f"the first life ended with exit code {life.exitcode}"]
    _steps(folder)
    life = _life(config, folder, overwrite=start is not None)
    life.join()
    if life.exitcode:
        return [f"the second life ended with exit code {life.exitcode}"]
    wrong = [name for name, same in _compared(alone, folder).items() if not same]
    # Half-written files and locks have names that begin with a dot.
    wrong += [file.name for file in folder.rglob(".*")]
    if start is not None and (folder / "notes.txt").read_text() != "the user's":
        wrong.append("notes.txt")
    return wrong


class _Calls:
    """Counts this process' calls of :data:`CALLS` on a run's folder; kills it at one of them, or notes them all.

    Args:
        folder: the run's; what changes the folder that it lies in counts too.
        number: the call to kill at, from 0.
        after: whether that call is still made.
        note: the file for the calls; written anew with every one.
    """

    def __init__(self, folder: Path, number: int | None = None, after: bool = False, note: Path | None = None) -> None:
        self._folder, self._number, self._after, self._note = folder, number, after, note
        self._made: list[str] = []
        # Checkpoints are written by a thread.
        self._lock = threading.RLock()

    def watch(self) -> None:
        """From now on; only in a process that is made for it."""
        for name in CALLS:
            setattr(os, name, functools.partial(self._call, name, getattr(os, name)))

    def _call(self, name: str, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        words = os.readlink(f"/proc/self/fd/{given[0]}") if name == "fsync" else given[name in ("replace", "rename")]
        place = Path(words)
        if place != self._folder.parent and not place.is_relative_to(self._folder):
            return call(*given, **named)
        with self._lock:
            here = len(self._made) == self._number
            self._made.append(f"{name} {finished_name(place.name) or place.name}")
            if self._note is not None:
                self._note.write_text(json.dumps(self._made))
            if here and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*given, **named)
            finally:
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)


def _life(config: configs.Config, folder: Path, overwrite: bool = False, calls: _Calls | None = None) -> BaseProcess:
    """A process that goes on with the run in ``folder``, or starts it where the folder holds none."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(config, folder, overwrite, calls))
    process.start()
    return process


def _run(config: configs.Config, folder: Path, overwrite: bool, calls: _Calls | None) -> None:
    if calls is not None:
        calls.watch()
    try:
        train("distill", config, folder, not overwrite and (folder / "config.yaml").is_file(), overwrite, "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _any_time(life: BaseProcess, folder: Path, rng: random.Random, start: float, share: float) -> None:
    life.join(rng.uniform(0.0, start + share))


def _in_training(life: BaseProcess, folder: Path, rng: random.Random, start: float, share: float) -> None:
    before = _names(folder)
    _until(life, lambda: _names(folder) != before)
    life.join(rng.uniform(0.0, share / 2))


def _while_writing(life: BaseProcess, folder: Path, rng: random.Random, start: float, share: float) -> None:
    for left in (folder / "checkpoints").glob("*.part"):
        left.unlink()
    _until(life, lambda: any((folder / "checkpoints").glob("*.part")))
    # A write takes about as long as this.
    time.sleep(rng.uniform(0.0, 0.02))


_MOMENTS: dict[str, Callable[[BaseProcess, Path, random.Random, float, float], None]] = dict(
    zip(KINDS, (_any_time, _in_training, _while_writing), strict=True)
)


def _until(life: BaseProcess, come: Callable[[], bool]) -> None:
    while life.is_alive() and not come():
        time.sleep(0.0005)


def _names(folder: Path) -> list[str]:
    return [file.name for file in files(folder / "checkpoints")]


def _steps(folder: Path) -> list[int]:
    """The updates of all checkpoints, every one of which is read in full."""
    return [int(read(file)["trainer"]["step"]) for file in files(folder / "checkpoints")]


def _compared(alone: Path, killed: Path) -> dict[str, bool]:
    """For every result of a run, whether it is the same to the last bit, apart from the columns with times."""
    same = {
        name: (killed / name).is_file() and (alone / name).read_bytes() == (killed / name).read_bytes()
        for name in ("student.safetensors", "best.safetensors", "distances.csv")
    }
    logs = [
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_csv(f / "log.csv")] for f in (alone, killed)
    ]
    same["log.csv"] = logs[0] == logs[1]
    states = [read(files(f / "checkpoints")[-1]) for f in (alone, killed)]
    same["last checkpoint"] = _equal(states[0]["trainer"], states[1]["trainer"])
    return same


def _equal(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


if __name__ == "__main__":
    sys.exit(main())
