"""Short runs of every trainer, with the hashes and log values that they must have.

Every case trains a real network for a few updates on one thread, through the same call as the command line, and is read
back from what the run wrote: its last checkpoint and ``log.csv``. A change that should move no number moves none of the
hashes. The script compares cases with the committed files and names what differs, or writes these files::

    python tests/golden/trajectories.py                    compare every case
    python tests/golden/trajectories.py --write            this machine's hashes; for numbers that change on purpose
    python tests/golden/trajectories.py --write --log      also the log values, that other machines compare with
    python tests/golden/trajectories.py --write teacher    of this case alone

Bits depend on the processor: torch, oneDNN and the extension choose their code by it. So hashes are kept for each
:func:`machine`. The log values of every machine must be the committed ones within :data:`TOLERANCE`, so that a machine
without hashes is held to something too.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from realuid_fast import teachers
from realuid_fast.data import packing
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.networks import build
from realuid_fast.ops import extension
from realuid_fast.train import checkpoint

HERE = Path(__file__).parent
HASHES, LOGS = HERE / "hashes.json", HERE / "logs.json"
TIMED = ("seconds", "images_per_second")  # columns of log.csv that no two runs have in common
# A share of a column's largest value, since machines sum in another order.
# Seen between AVX-512, AVX2 and plain code: 1e-5 to 6e-5.
TOLERANCE = 1e-4
WIDER: dict[str, float | None] = {
    "moment_matching": 3e-4,  # the generator's loss is a difference of terms twenty times as large
    "parts": 1e-2,  # bfloat16 rounds sums that differ in their last bit to other numbers
    "several_steps": None,  # the noise of further steps is drawn by a key that is the bits of z: another trajectory
}

UNET = {"kind": "unet", "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4, "time_scale": 100.0}
DIGITS = {"name": "digits"}
PAIRS = {"name": "digit_pairs", "corruption": "downsample", "amount": 4}
SHORT = {
    "distill": {
        "batch": 8,
        "updates": 12,
        "fake_turns": 2,
        "generator": {"warmup": 1},
        "fake": {"warmup": 1},
        "ema": [0.9, 0.99],
        "export": 0.9,
    },
    "teacher": {"batch": 8, "updates": 12, "optimiser": {"warmup": 1}, "ema": [0.9, 0.99], "export": 0.9},
    "run": {
        "threads": 1,
        "log_every": 3,
        "evaluate_every": 0,
        "sample_every": 0,
        "checkpoint_every": 0,
        "teacher_steps": 0,
        "tensorboard": False,
        "progress": False,
    },
}

Record = dict[str, Any]
CASES: dict[str, Callable[[Path], Record]] = {}


def case(function: Callable[[Path], Record]) -> Callable[[Path], Record]:
    CASES[function.__name__] = function
    return function


# -- cases: each trains in an empty folder


@case
def digits(folder: Path) -> Record:
    """The recipe of the demo: RealUID with the shipped teacher."""
    return distilled(folder, "digits")


@case
def teacher(folder: Path) -> Record:
    """A class-conditional network from nothing, with dropout and with labels left out."""
    return trained(folder, "digits", network={"dropout": 0.1}, teacher={"label_dropout": 0.2})


@case
def teacher_coupled(folder: Path) -> Record:
    return trained(folder, "digits", teacher={"coupling": True, "reduction": "mean"})


@case
def regression(folder: Path) -> Record:
    return distilled(folder, "presets/regression", distill={"regression": {"steps": 3, "solver": "heun"}})


@case
def sfd(folder: Path) -> Record:
    """One step and three in turn, towards DPM-Solver++; the network takes their number."""
    return distilled(folder, "presets/sfd", distill={"steps": [1, 3]})


@case
def gan(folder: Path) -> Record:
    return distilled(folder, "presets/gan")


@case
def ibmd(folder: Path) -> Record:
    return distilled(folder, "presets/ibmd", distill={"teacher": bridge_teacher(folder)})


@case
def real_bridge(folder: Path) -> Record:
    return distilled(folder, "presets/real-bridge", distill={"teacher": bridge_teacher(folder)})


@case
def several_steps(folder: Path) -> Record:
    return distilled(folder, "digits", distill={"times": [0.5, 0.8]})


@case
def guided(folder: Path) -> Record:
    network = {**UNET, "dim": [1, 8, 8], "class_cond": True, "num_classes": 10, "null_label": True}
    return distilled(folder, "digits", distill={"teacher": made_teacher(folder, network, DIGITS), "guidance": 2.0})


@case
def normalised(folder: Path) -> Record:
    return distilled(folder, "presets/normalised")


@case
def general(folder: Path) -> Record:
    """The fake turn that asks the teacher."""
    return distilled(folder, "presets/general")


@case
def sid(folder: Path) -> Record:
    return distilled(folder, "presets/sid")


@case
def moment_matching(folder: Path) -> Record:
    return distilled(folder, "presets/moment-matching")


@case
def moments_steps(folder: Path) -> Record:
    """Four steps from noised real data, each drawn from the posterior of the one before."""
    return distilled(folder, "presets/moments-steps")


@case
def packed(folder: Path) -> Record:
    """Images that are read from disk, at 32 pixels in colour with attention; mirrored half of the time."""
    numbers = np.random.default_rng(0)
    source = folder / "cifar-10-batches-bin"
    source.mkdir()
    for name, count in (("data_batch_1", 40), ("test_batch", 8)):
        records = numbers.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(source / f"{name}.bin")
    data = {"name": "packed", "path": str(folder / "packed"), "flip": True}
    packing.pack(source, data["path"])
    network = {**UNET, "dim": [3, 32, 32], "attention_resolutions": [16], "num_heads": 2}
    start = {"teacher": made_teacher(folder, network, data), "batch": 4, "labels": "batch", "fake_start": "fresh"}
    return distilled(folder, "digits", data=data, distill=start)


@case
def parts(folder: Path) -> Record:
    """A batch in two parts, the fake turns in bfloat16, activations computed twice."""
    run = {"accumulate": 2, "checkpoint_activations": True}
    return distilled(folder, "digits", distill={"fake_precision": "bf16", "fake_turns": 1}, run=run)


@case
def points(folder: Path) -> Record:
    """Points between two distributions, on a path with noise of its own."""
    network = {"kind": "mlp", "shape": [2], "width": 32, "depth": 2, "endpoint": True}
    data = {"name": "transport", "source": "moons", "target": "eight_gaussians"}
    path = {"path": "stochastic-interpolant", "path_settings": {"gamma": "parabola"}}
    file = made_teacher(folder, network, data, **path)
    return distilled(folder, "presets/interpolant", distill={"teacher": file, "batch": 32})


@case
def two_ranks(folder: Path) -> Record:
    """Two processes that share a batch of eight out."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
                run("distill", folder, config_of("digits"))
                dist.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], f"the ranks ended with {codes}"
    return recorded(folder / "run")


# -- what the cases are made of


def config_of(name: str, **sections: Any) -> configs.Config:
    """A shipped configuration, then :data:`SHORT`, then ``sections``."""
    content = configs.to_mapping(configs.load(name))
    return configs.from_mapping(functools.reduce(configs.merge, [content, SHORT, sections]))


def made_teacher(folder: Path, network: dict[str, Any], data: dict[str, Any], **described: Any) -> str:
    """The file of a teacher that was not trained: every weight is a normal number, the same ones on every machine."""
    net, numbers = build(network), np.random.default_rng(0)
    state = {
        name: torch.from_numpy(numbers.normal(0, 0.3 if value.dim() == 1 else value[0].numel() ** -0.5, value.shape))
        for name, value in net.state_dict().items()
    }
    file = folder / "teacher.safetensors"
    described_as = teachers.Description(network, data=data, **described)
    teachers.save(file, {name: value.float() for name, value in state.items()}, described_as)
    return str(file)


def bridge_teacher(folder: Path) -> str:
    network = {**UNET, "dim": [1, 8, 8], "endpoint": True}
    path = {"path": "brownian-bridge", "path_settings": {"eps": 0.25}, "predict": "x0"}
    return made_teacher(folder, network, PAIRS, **path)


def distilled(folder: Path, name: str, **sections: Any) -> Record:
    run("distill", folder, config_of(name, **sections))
    return recorded(folder / "run")


def trained(folder: Path, name: str, **sections: Any) -> Record:
    run("train-teacher", folder, config_of(name, **sections))
    return recorded(folder / "run")


def run(job: str, folder: Path, config: configs.Config) -> None:
    threads = torch.get_num_threads()
    try:
        jobs.train(job, config, folder / "run", resume=False, overwrite=False, command="")
    finally:
        torch.set_num_threads(threads)


def recorded(folder: Path) -> Record:
    """A finished run's hashes by group of tensors, and the values and the hash of its log."""
    (file,) = (folder / "checkpoints").glob("update-*.pt")
    hashes = {name: digest(tensors) for name, tensors in groups(checkpoint.read(file)["trainer"])}
    with (folder / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    log = {name: [row[name] for row in rows] for name in rows[0] if name not in TIMED}
    return {"hashes": hashes, "log": log}


def groups(state: dict[str, Any]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """The tensors of a trainer's state that training changes, in the order of the network, by what they are."""
    for name, value in state.items():
        if name in ("generator", "fake", "network", "head") and value is not None:
            yield name, list(value.values())
        if name.endswith("optimiser"):
            for decay, average in value["ema"].items():
                yield f"{name}, average {decay:g}", list(average.values())
            moments: dict[str, list[torch.Tensor]] = {}
            for entry in value["adam"]["state"].values():
                for moment, tensor in entry.items():
                    moments.setdefault(moment, []).append(tensor)
            for moment, tensors in moments.items():
                yield f"{name}, {moment}", tensors


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of types, shapes and values in their order, whatever the tensors' names and strides are."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def log_digest(log: dict[str, list[str]], columns: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps([[name, log.get(name)] for name in columns]).encode()).hexdigest()


# -- committed files


def machine() -> str:
    """Everything that bits depend on: versions, and the code that torch and the extension choose on this processor."""
    about: dict[str, str] = {}
    if (file := Path("/proc/cpuinfo")).is_file():
        lines = (line.partition(":") for line in file.read_text().partition("\n\n")[0].splitlines())
        about = {name.strip(): value.strip() for name, _, value in lines}
    processor = "/".join(about.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    return (
        f"torch {torch.__version__}, {processor}, torch's code {torch.backends.cpu.get_cpu_capability()}, "
        f"extension's code {'none' if os.environ.get('REALUID_FAST_BACKEND') == 'torch' else extension.isa() or 'none'}"
    )


def computed(name: str) -> Record:
    """A case's run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return CASES[name](Path(folder))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def differences(name: str, found: Record) -> list[str]:
    """The differences of a case from the committed one, in sentences: log values, then hashes if there are any."""
    log, within = read(LOGS).get(name, {}), WIDER.get(name, TOLERANCE)
    said = []
    for column, values in log.items() if within is not None else ():
        mine = found["log"].get(column)
        if mine is None or len(mine) != len(values):
            said.append(f"log.csv has {0 if mine is None else len(mine)} rows of '{column}', not {len(values)}")
            continue
        there, here = np.array(values, dtype=float), np.array(mine, dtype=float)
        off = np.abs(here - there).max() / max(np.abs(there).max(), 1e-30)
        if not off <= within:
            said.append(f"'{column}' in log.csv is {off:.1e} off: {mine} in place of {values}")
    expected = read(HASHES).get(machine(), {}).get(name)
    if expected is not None:
        here = {**found["hashes"], "log": log_digest(found["log"], log)}
        said += [f"{group}: other bits" for group, value in expected.items() if here.get(group) != value]
    return said


def write(names: Iterable[str], logs: bool) -> None:
    hashes, kept = read(HASHES), read(LOGS)
    own = hashes.setdefault(machine(), {})
    for name in names:
        found = computed(name)
        if logs or name not in kept:
            kept[name] = found["log"]
        own[name] = {**found["hashes"], "log": log_digest(found["log"], kept[name])}
    for file, content in ((HASHES, hashes), (LOGS, kept)):
        file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"by default all: {', '.join(CASES)}")
    parser.add_argument("--write", action="store_true", help="keep this machine's hashes as the expected ones")
    parser.add_argument("--log", action="store_true", help="with --write, the log values too")
    options = parser.parse_args()
    names = options.cases or list(CASES)
    torch.set_num_threads(1)
    if options.write:
        write(names, options.log)
        return 0
    known = machine() in read(HASHES)
    print(machine(), "" if known else ": no hashes are kept for it, log values are compared")
    failed = False
    for name in names:
        start = time.perf_counter()
        said = differences(name, computed(name))
        failed |= bool(said)
        print(f"{name} ({time.perf_counter() - start:.1f} s):", "; ".join(said) or "as committed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
