"""Times whole training updates against the algorithm as published: ``python -m bench.step``, minutes; ``--quick`` one.

Two configurations: the shipped one of digits, and the CIFAR-10 recipe (a 36-million-parameter U-Net, five fake turns)
at batch 16; weights and images are random, which costs the same. Writes step.json, step.md (time, and peak memory of a
fake turn and of the whole update), step_phases.md and a plot of the phases. The ways take turns in one process
(:mod:`bench.timing`); memory is measured in a process of its own for each way, in which freed blocks go back to the
system at once.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from realuid_fast import networks
from realuid_fast.data import Dataset
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.settings import Config, DistillConfig
from realuid_fast.teachers import Description, Model
from realuid_fast.train.distill import Distiller

from . import machine, plots, report, timing
from .published import Published
from .report import OURS, Row
from .timing import Case, Stopwatch, Way

PUBLISHED, HALF = "as published", f"{OURS}, bf16 fake turn"
HALF_SETTING = {"fake_precision": "bf16"}  # of DistillConfig, where the trainer has it
IMAGES = 512


@dataclass(frozen=True)
class Problem:
    """A configuration's network on random images, with what differs in how it is distilled."""

    title: str
    network: Mapping[str, Any]
    shape: tuple[int, int, int]
    classes: int = 0
    config: str = "digits"
    distill: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The network's settings."""
        return {**self.network, "dim": list(self.shape)} | ({"num_classes": self.classes} if self.classes else {})

    def make(self) -> tuple[Config, Dataset, Model]:
        """A configuration, images and a teacher, the same at every call."""
        draws = torch.Generator().manual_seed(0)
        settings = self.settings()
        net = networks.build(settings)
        with torch.no_grad():
            for parameter in net.parameters():
                # Fill all layers, including those that start at zero: their zero output would save later work.
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draws))
        images = torch.randint(256, (IMAGES, *self.shape), dtype=torch.uint8, generator=draws)
        labels = torch.arange(IMAGES) % self.classes if self.classes else None
        config = configs.load(self.config)
        distill = replace(config.distill, **self.distill)
        return (
            replace(config, distill=distill),
            Dataset("random images", images, images, labels),
            Model(net, Description(settings)),
        )


PROBLEMS = {
    "digits": Problem("digits network", configs.load("digits").network, (1, 8, 8), classes=10),
    "cifar10": Problem(
        "CIFAR-10 network", configs.load("recipes/cifar10").network, (3, 32, 32), 0, "recipes/cifar10", {"batch": 16}
    ),
}


def ways() -> list[str]:
    """The ways of making an update; the one in half precision where the trainer has that setting."""
    known = {f.name for f in fields(DistillConfig)}
    return [OURS, *([HALF] if known.issuperset(HALF_SETTING) else []), PUBLISHED]


def trainer(problem: Problem, way: str) -> Distiller | Published:
    """A trainer on the problem, with networks of its own, whose phases go by this benchmark's clock."""
    config, dataset, teacher = problem.make()
    if way == PUBLISHED:
        return Published(config, dataset, teacher)
    if way == HALF:
        config = configs.from_mapping(configs.merge(configs.to_mapping(config), {"distill": HALF_SETTING}))
    distiller = trainers.distiller(config, dataset, teacher)
    distiller.phases = Stopwatch()  # type: ignore[assignment]
    return distiller


def measure(name: str, rounds: int, seconds: float) -> list[Row]:
    """One row a way of the problem ``name``: the times of an update, by phase too, and memory."""
    problem = PROBLEMS[name]
    phases: dict[str, list[dict[str, float]]] = {}
    made = []
    for way in ways():
        made.append(Way(way, _recorded(trainer(problem, way), phases.setdefault(way, [])), ours=way == OURS))
    batch = problem.make()[0].distill.batch
    case = Case(f"update, {problem.title}", (batch, *problem.shape), made)
    rows = timing.measure(case, rounds, calls=1, seconds=seconds)
    for row in rows:
        # The first update warms up.
        updates = phases[row["way"]][1:]
        row["phases"] = {phase: 1e3 * median(update[phase] for update in updates) for phase in updates[0]}
        row |= _peak_in_a_process(name, row["way"])
    return rows


def _recorded(trained: Distiller | Published, phases: list[dict[str, float]]) -> Any:
    """``trained.update`` that appends the seconds of each phase to ``phases``."""

    def update() -> None:
        trained.phases.seconds = {}
        trained.update()
        phases.append(trained.phases.seconds)

    return update


def peaks(trained: Distiller | Published) -> dict[str, float]:
    """Resident megabytes (10^6 bytes) before an update, at the peak of its fake turns and at that of all of it.

    Linux only.

    Raises:
        OSError: the system does not let a process reset its own peak.
    """
    trained.update()
    # Leave the generator's turn out, so that the peak of this update is that of its fake turns.
    setattr(trained, "generator_turn", lambda *_: None)  # noqa: B010
    gc.collect()
    found = {"held_MB": _resident("VmRSS")}
    for name in ("peak_MB", "update_peak_MB"):
        Path("/proc/self/clear_refs").write_text("5")
        trained.update()
        found[name] = _resident("VmHWM")
        vars(trained).pop("generator_turn", None)
        gc.collect()
    return found


def _resident(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024 / 1e6


def _peak_in_a_process(name: str, way: str) -> dict[str, float]:
    """:func:`peaks` in a fresh process; empty where they cannot be measured."""
    # With a fixed threshold larger blocks are mapped one by one, and go back to the system when they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.step", "--peak", name, way]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"memory was not measured: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    return dict(json.loads(done.stdout))


def table(rows: Sequence[Row], described: Mapping[str, Any]) -> str:
    """Time and memory of every way, the machine below."""
    memory_header = ["resident at a fake turn's peak, MB", "of it the turn's own", "at the update's peak, MB"]
    header = ["update", "batch", "way", "ms", "times realuid_fast", *memory_header]
    lines = []
    for row in rows:
        own = row["peak_MB"] - row["held_MB"] if "peak_MB" in row else None
        memory = [report.number(row.get("peak_MB")), report.number(own), report.number(row.get("update_peak_MB"))]
        times = [report.number(row["median_ms"]), f"{row['ratio']:.2f}"]
        lines.append([row["case"].removeprefix("update, "), report.shape(row), row["way"], *times, *memory])
    return report.markdown(header, lines, words=3) + (
        f"\n`{described['command']}` on {machine.sentence(described)}. Medians; the ratio is the median over rounds of "
        f"the ratio inside the round. The clock is the {described['clock']}. Memory is a process' that does nothing "
        "else; a fake turn's own is what it holds at its peak beyond the networks, optimisers and averages.\n"
    )


def phase_table(rows: Sequence[Row]) -> str:
    """Milliseconds of every phase, a column a way."""
    parts = []
    for of_case in report.by_case(rows):
        names = dict.fromkeys(phase for row in of_case.values() for phase in row["phases"])
        lines = [[name, *(report.number(row["phases"].get(name)) for row in of_case.values())] for name in names]
        title = next(iter(of_case.values()))["case"]
        parts.append(f"**{title}**\n\n" + report.markdown(["phase, ms", *of_case], lines))
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser("bench.step", __doc__, "time of a network after warming up (default 120, quick 20)")
    parser.add_argument("--threads", type=report.threads, default=1, help="torch threads (default 1)")
    parser.add_argument("--peak", nargs=2, metavar=("NETWORK", "WAY"), help="only print its memory")
    args = parser.parse_args(argv)
    if args.peak is not None:
        torch.set_num_threads(args.threads)
        network, way = args.peak
        if network not in PROBLEMS or way not in ways():
            parser.error(f"--peak takes one of {', '.join(PROBLEMS)} and one of {', '.join(ways())}")
        print(json.dumps(peaks(trainer(PROBLEMS[network], way))))
        return 0
    chosen = [name for name in PROBLEMS if args.only in name and not (args.quick and name != "digits")]
    if not chosen:
        parser.error(f"no network has {args.only!r} in its name")
    described = report.start("bench.step", argv, args.threads)
    rows: list[Row] = []
    for name in chosen:
        rows += measure(name, rounds=200, seconds=report.seconds(args, 120.0, quick=20.0))
    name = report.named("step", args.threads)
    tables = {name: table(rows, described), f"{name}_phases": phase_table(rows)}
    report.write(report.Results(name, described, rows), args.out, tables)
    plots.breakdown(rows, args.out / f"{name}_phases.png")
    print("\n".join(tables.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
