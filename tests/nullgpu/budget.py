"""The committed budget of launches and host times: ``make nullgpu-budget`` writes budget.json and its tables anew."""

import gc
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

from bench import readme

from . import calls, device, turns
from .alone import alone

FILE = Path(__file__).with_name("budget.json")
ROUNDS = 100
SLICE = 2e-3  # seconds that a way is called for in a round

# The cases whose launches are counted: configuration, trainer, and whether the data are images of CIFAR-10's size.
CASES = {
    "digits, eager networks": ({"run": {"mode": "graphs-eager"}}, "distill", False),
    "digits, eager networks in bf16 and fp16": (
        {
            "run": {"mode": "graphs-eager"},
            "distill": {"fake_precision": "bf16", "generator_precision": "fp16"},
        },
        "distill",
        False,
    ),
    "digits, compiled networks": ({"run": {"mode": "graphs"}}, "distill", False),
    "digits, teacher": ({}, "train-teacher", False),
    "digits, regression": (
        {"distill": {"objective": {"name": "regression"}, "regression": {"steps": 3}}},
        "distill",
        False,
    ),
    "CIFAR-10, eager networks": ({"base": "recipes/cifar10", "run": {"mode": "graphs-eager"}}, "distill", True),
}


def launches_of(case):
    """Launches of each turn and of a settled update, by name."""
    device.inductor.install()
    return turns.once(*CASES[case])


def launches_of_calls():
    """Launches of one call of each way, by name."""
    found = {}
    for name, call in calls.ways().items():
        for _ in range(3):
            call()
        device.reset()
        call()
        counts = device.counts()
        assert not counts.violations
        found[name] = counts.done
    return found


def host_times():
    """Host time of a call of each way as a ratio to that of ``torch.add``; and the latter in microseconds.

    Processor time of the process, whose autograd has a thread for the device. All ways run in random order in every
    round. A neighbour on the machine only ever adds time, and adds more to a call that is spread over more code than
    to ``torch.add``, so each time is the least of all rounds. Triton's own launcher and inductor's are part of it; the
    driver's share of a launch and Python's garbage collector are not.
    """
    ways, now = calls.ways(), time.process_time
    repeats = {}
    for name, call in ways.items():
        for _ in range(5):
            call()
        start = now()
        call()
        repeats[name] = max(1, min(200, int(SLICE / max(now() - start, 1e-6))))
    least = dict.fromkeys(ways, float("inf"))
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for name in random.sample(list(ways), len(ways)):
            ways[name]()
            start = now()
            for _ in range(repeats[name]):
                ways[name]()
            least[name] = min(least[name], (now() - start) / repeats[name])
    return {name: seconds / least["torch.add"] for name, seconds in least.items()}, 1e6 * least["torch.add"]


def revision():
    """The commit that is checked out, marked where files differ from it."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=FILE.parent, capture_output=True, text=True, check=True).stdout

    changed = git("status", "--porcelain", "--untracked-files=no").strip()
    return git("rev-parse", "--short", "HEAD").strip() + (" and changes" if changed else "")


def ordered(names):
    """Counts by name, in the names' order, so that budgets compare line by line."""
    return dict(sorted(names.items()))


def measured():
    """The content of budget.json."""
    runs = [alone(host_times) for _ in range(3)]
    ratios = {name: min(run[name] for run, _ in runs) for name in runs[0][0]}
    add = min(add for _, add in runs)
    return {
        "command": "make nullgpu-budget",
        "revision": revision(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "torch.add, host microseconds": round(add, 2),
        "host": {name: round(ratio, 1) for name, ratio in ratios.items()},
        "calls": {name: ordered(names) for name, names in alone(launches_of_calls).items()},
        "launches": {
            case: {turn: ordered(names) for turn, names in alone(launches_of, case).items()} for case in CASES
        },
    }


def tables(found):
    """The budget for the documents: host time and launches of calls, and launches of turns."""
    add = found["torch.add, host microseconds"]
    lines = ["| call, 64x3x32x32, float32 | host time, `torch.add` = 1 | host us | launches |", "|---|---:|---:|---:|"]
    for name, ratio in found["host"].items():
        lines.append(f"| {name} | {ratio:.1f} | {add * ratio:.0f} | {sum(found['calls'][name].values())} |")
    turns = ("generate_rows", "fake_step_plain", "generator_step_plain", "update")
    lines += [
        "",
        "| launches | samples | fake turn | generator's turn | update, beside graphs |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, rows in found["launches"].items():
        cells = (f"{sum(rows[turn].values()):,}" if turn in rows else "" for turn in turns)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    made = f"`{found['command']}` at revision {found['revision']}, torch {found['torch']}, Triton {found['triton']}."
    return "\n".join([*lines, "", made])


def main():
    """Write budget.json and the tables of the documents, and print what changed in the host times."""
    before = json.loads(FILE.read_text())["host"] if FILE.exists() else {}
    found = measured()
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    (readme.RESULTS / "nullgpu.md").write_text(tables(found) + "\n")
    readme.main([])
    for name, ratio in found["host"].items():
        print(f"{name:56s} {ratio:7.1f}   before {before.get(name, float('nan')):7.1f}")


if __name__ == "__main__":
    sys.exit(main())
