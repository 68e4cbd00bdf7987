"""Kills a digits run over and over, goes on with it each time, and compares its end with a run that was left alone.

    python -m bench.kills --kills 50 --out bench/results/kills.json

SIGKILL comes at a random moment of one of three kinds: anywhere in the process' life, start-up included; a while after
its first checkpoint; while one is being written. After every kill all checkpoints are read back. Lives are forked from
one process that has imported everything and computed nothing, which saves their imports and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from realuid_fast.errors import UserError
from realuid_fast.train import config as configs
from realuid_fast.train.checkpoint import read
from realuid_fast.train.jobs import train
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
CLOCKS = ("images_per_second", "seconds")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--updates", type=int, help="of the run (default: 8 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to run; kept (default: a temporary one, removed)")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        result = survive(folder, arguments.kills, arguments.updates or 8 * arguments.kills, arguments.seed)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    result = {"command": f"python -m bench.kills --kills {arguments.kills}", "machine": machine.describe(), **result}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    counts = ", ".join(f"{count} {kind}" for kind, count in result["kinds"].items())
    print(f"{len(result['kills'])} kills ({counts}); checkpoints lost: {result['checkpoints_lost']}")
    print(f"the same end as the run left alone: {'yes' if result['same'] else 'no: ' + ', '.join(result['differs'])}")
    return 0 if result["same"] and not result["checkpoints_lost"] else 1


def survive(folder: Path, kills: int, updates: int, seed: int) -> dict[str, Any]:
    """Run once alone and once with ``kills`` kills in ``folder``; what happened."""
    config = configs.load("digits", [*SETTINGS, f"distill.updates={updates}"])
    alone, killed = folder / "alone", folder / "killed"
    # What the digits come with: imported once, here.
    importlib.import_module("sklearn.datasets")
    # How long a life takes to its first checkpoint, and how long of the rest each of the lives may have.
    begun = time.monotonic()
    life = _life(config, alone, resume=False)
    _until(life, lambda: bool(_names(alone)))
    start = time.monotonic() - begun
    life.join()
    share = (time.monotonic() - begun - start) / kills
    rng = random.Random(seed)
    told: list[dict[str, Any]] = []
    lost = 0
    while len(told) < kills:
        before = _steps(killed)
        life = _life(config, killed, resume=(killed / "config.yaml").is_file())
        kind = KINDS[len(told) % len(KINDS)]
        _MOMENTS[kind](life, killed, rng, start, share)
        if life.exitcode is not None:
            raise SystemExit(f"a life ended by itself, with exit code {life.exitcode}, after {len(told)} kills")
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
    last = _life(config, killed, resume=True)
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


def _life(config: configs.Config, folder: Path, resume: bool) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(config, folder, resume))
    process.start()
    return process


def _run(config: configs.Config, folder: Path, resume: bool) -> None:
    try:
        # A life that was killed before its folder held a configuration starts as a new one.
        train("distill", config, folder, resume, not resume and folder.is_dir() and any(folder.iterdir()), "")
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
    return sorted(file.name for file in (folder / "checkpoints").glob("update-*.pt"))


def _steps(folder: Path) -> list[int]:
    """The updates of all checkpoints, every one of which is read in full."""
    return [int(read(file)["trainer"]["step"]) for file in sorted((folder / "checkpoints").glob("update-*.pt"))]


def _compared(alone: Path, killed: Path) -> dict[str, bool]:
    """For everything a run leaves, whether it is the same to the last bit, but for the clock's columns."""
    same = {
        name: (killed / name).is_file() and (alone / name).read_bytes() == (killed / name).read_bytes()
        for name in ("student.safetensors", "best.safetensors", "distances.csv")
    }
    logs = [
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_csv(f / "log.csv")] for f in (alone, killed)
    ]
    same["log.csv"] = logs[0] == logs[1]
    states = [read(sorted((f / "checkpoints").glob("update-*.pt"))[-1]) for f in (alone, killed)]
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
