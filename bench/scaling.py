"""The cost of a cycle on 1 to 1,024 GPUs, by a model and by a simulation of it: ``python -m bench.scaling``, seconds.

Nothing here was measured on several GPUs. Counted: the networks' parameters and operations (torch's counter on tensors
without memory). Published by the vendor: the machine's peaks (:data:`H200`). Assumed, and set on the command line: the
latency of a message, the share of the peak that compute reaches, the spread of compute times between ranks. The default
share is 1: compute as fast as the vendor says it can be leaves communication least to hide behind, so that the
efficiencies are bounds from below.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from realuid_fast import backends, networks
from realuid_fast.optim.mean import PIECE

from .machine import ROOT
from .step import PROBLEMS

PAGE = ROOT / "docs" / "scaling.md"
GPUS = (1, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Machine:
    """Peaks of one GPU and its wires, in operations and bytes a second, one direction."""

    name: str
    operations: float
    memory_bandwidth: float
    memory: float
    wires: float
    network: float
    node: int = 8


# NVIDIA's data sheets: H200 SXM, dense TF32, HBM3e; NVLink 4 (900 GB/s both ways); one 400 Gb/s adapter a GPU.
H200 = Machine("H200 SXM, 8 a node, 400 Gb/s each", 494.7e12, 4.8e12, 141e9, 450e9, 50e9)


@dataclass(frozen=True)
class Job:
    """A distillation on one GPU's share of the batch."""

    parameters: int
    forward: float  # operations of one image's forward pass
    batch: int  # images on one GPU
    fake_turns: int
    averages: int = 3
    real: bool = True
    teacher_in_fake: bool = False

    @property
    def fake_turn(self) -> float:
        """Operations of a fake turn: forward and twice that for backward, on generated and real rows."""
        rows = self.batch * (2 if self.real else 1)
        return self.forward * rows * (3 + self.teacher_in_fake)

    @property
    def generator_turn(self) -> float:
        """Operations of the generator's turn: its own forward and backward, and teacher and fake model forward and back
        to their inputs alone.
        """
        return self.forward * self.batch * (3 + 2 * 2)

    @property
    def generate(self) -> float:
        return self.forward * self.batch * self.fake_turns

    @property
    def gradient(self) -> int:
        """Bytes that an all-reduce brings together: a float32 gradient."""
        return 4 * self.parameters

    def optimiser(self, averages: int) -> int:
        """Bytes that a step reads and writes: the norm's pass over the gradient; then gradient, and parameter, one
        moment (``beta1 = 0`` keeps no other) and averages in and out.
        """
        return 4 * self.parameters * (1 + 1 + 2 * (2 + averages))

    @property
    def state(self) -> int:
        """Bytes a GPU holds: the teacher; fake model and generator with gradient and moment; averages."""
        return 4 * self.parameters * (1 + 2 * 3 + self.averages)

    def passes(self) -> tuple[float, ...]:
        """Operations of a cycle's passes through a network, forward and backward apart: each gathers a sharded one."""
        batch, rows = self.batch * self.forward, self.batch * self.forward * (2 if self.real else 1)
        fake = (rows, 2 * rows, *([rows] if self.teacher_in_fake else []))
        # The generator's own; teacher and fake model to their inputs.
        return self.generate, *(fake * self.fake_turns), batch, 2 * batch, *[batch] * 4

    def sharded(self, gpus: int) -> float:
        """Bytes a GPU holds of sharded networks, beside the part that is gathered."""
        return self.state / gpus


def all_reduce(size: float, gpus: int, machine: Machine, latency: float) -> float:
    """Seconds to add up ``size`` bytes over ``gpus``.

    Rings in each node reduce and gather, and between nodes every GPU does so with its own part, ``size / node``, over
    its own adapter: ``2 (n - 1) / n size / bandwidth`` each. A message's latency counts for each of the ``2 log2 n``
    rounds of a tree, which libraries take where latency decides.
    """
    inside = min(gpus, machine.node)
    nodes = gpus // inside
    seconds = (
        2 * (inside - 1) / inside * size / machine.wires + 2 * (nodes - 1) / nodes * size / inside / machine.network
    )
    return seconds + 2 * math.log2(gpus) * latency


@dataclass(frozen=True)
class Cycle:
    """Seconds of the parts of a cycle on one GPU: making samples, a fake turn's, the generator turn's."""

    generate: float
    fake: float
    generator: float
    steps: float  # all optimiser steps
    all_reduce: float  # one of them
    exposed_fake: float  # what of one goes on after a fake turn's backward pass, and after the generator's
    exposed_generator: float
    turns: int

    @property
    def compute(self) -> float:
        return self.generate + self.turns * self.fake + self.generator + self.steps

    @property
    def exposed(self) -> float:
        """Seconds of all-reduces that no compute hides: a step needs the norm of the whole gradient, from all ranks."""
        return self.turns * self.exposed_fake + self.exposed_generator

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def one_after_another(self) -> float:
        """Seconds of a cycle whose all-reduces begin when the backward pass is over."""
        return self.compute + (self.turns + 1) * self.all_reduce


def exposed(whole: float, pieces: int, backward: float) -> float:
    """The seconds of an all-reduce that remain after the backward pass. It takes ``whole`` seconds in equal pieces.

    A piece is sent when its share of the pass is over, the last one at the end of the pass.
    """
    return max(whole / pieces, whole - backward * (pieces - 1) / pieces)


def cycle(job: Job, gpus: int, machine: Machine, share: float = 1.0, latency: float = 1e-5) -> Cycle:
    """The model of one cycle, one fake model step ``fake_turns`` times and one of the generator."""
    speed = share * machine.operations
    steps = job.fake_turns * job.optimiser(0) + job.optimiser(job.averages)
    pieces = max(1, job.gradient // PIECE)
    piece = all_reduce(job.gradient / pieces, gpus, machine, latency) if gpus > 1 else 0.0
    rows = job.batch * (2 if job.real else 1)
    fake, generator = (exposed(pieces * piece, pieces, 2 * n * job.forward / speed) for n in (rows, job.batch))
    return Cycle(
        job.generate / speed,
        job.fake_turn / speed,
        job.generator_turn / speed,
        steps / machine.memory_bandwidth,
        pieces * piece,
        fake,
        generator,
        job.fake_turns,
    )


def sharded(job: Job, gpus: int, machine: Machine, share: float = 1.0, latency: float = 1e-5) -> tuple[float, float]:
    """Seconds of a cycle of networks that are sharded over ``gpus``, with all transfers hidden as far as compute lasts,
    and with none.

    Every pass gathers the parameters, ``(n - 1) / n`` of their bytes, half of what an all-reduce moves; a backward pass
    to the parameters scatters the gradient's sum as well, the other half. A step updates an ``n``-th.
    """
    speed, half = share * machine.operations, all_reduce(job.gradient, gpus, machine, latency) / 2 if gpus > 1 else 0.0
    steps = (job.fake_turns * job.optimiser(0) + job.optimiser(job.averages)) / gpus / machine.memory_bandwidth
    scattered = job.fake_turns + 1
    compute = [operations / speed for operations in job.passes()]
    moved = half * (len(compute) + scattered)
    hidden = sum(max(seconds, half) for seconds in compute) + scattered * half
    return hidden + steps, sum(compute) + moved + steps


def simulate(one: Cycle, gpus: int, spread: float, cycles: int = 200, seed: int = 0) -> float:
    """Mean seconds of a cycle when a rank's compute takes ``1 + spread |normal|`` times as long, drawn for each turn.

    The part of an all-reduce that no compute hides begins when the slowest rank arrives, and ends for all together.
    """
    draws, clock = np.random.default_rng(seed), 0.0
    step = one.steps / (one.turns + 1)
    for _ in range(cycles):
        for turn in range(one.turns + 1):
            work = one.generator if turn == one.turns else one.fake + (one.generate if turn == 0 else 0.0)
            slowest = float(np.abs(draws.standard_normal(gpus)).max()) if spread else 0.0
            left = one.exposed_generator if turn == one.turns else one.exposed_fake
            clock += work * (1 + spread * slowest) + left + step
    return clock / cycles


def count(problem: str = "cifar10") -> tuple[int, float]:
    """Parameters of a benchmark's network, and the operations of one image's forward pass."""
    chosen = PROBLEMS[problem]
    # Shapes alone: no memory, no arithmetic. The counter knows none of the package's own layers.
    with FakeTensorMode(), torch.no_grad(), backends.backend("torch"):
        net = networks.build({**chosen.network, "dim": list(chosen.shape)})
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1), torch.zeros(1, *chosen.shape))
    return sum(p.numel() for p in net.parameters()), float(counter.get_total_flops())


def table(job: Job, machine: Machine, share: float, latency: float, spread: float) -> str:
    """Efficiency on each number of GPUs, the batch on each staying the same, as Markdown."""
    alone = cycle(job, 1, machine, share, latency)
    lines = [
        "| GPUs | images a cycle's fake turn | compute, ms | one all-reduce, ms | of a cycle's not hidden, ms | "
        f"cycle, ms | nothing hidden, ms | efficiency | with ranks {spread:.0%} apart |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    slow = simulate(alone, 1, spread)
    for gpus in GPUS:
        one = cycle(job, gpus, machine, share, latency)
        ms = [1e3 * s for s in (one.compute, one.all_reduce, one.exposed, one.total, one.one_after_another)]
        lines.append(
            f"| {gpus:,} | {2 * job.batch * gpus if job.real else job.batch * gpus:,} | "
            + " | ".join(f"{value:.3g}" for value in ms)
            + f" | {alone.total / one.total:.1%} | {slow / simulate(one, gpus, spread):.1%} |"
        )
    return "\n".join(lines)


def report(share: float = 1.0, latency: float = 1e-5, spread: float = 0.02) -> str:
    """The tables of the page."""
    parameters, forward = count()
    parts = [
        f"The CIFAR-10 U-Net: {parameters / 1e6:.1f} M parameters, {forward / 1e9:.2f} G operations an image forward. "
        f"{H200.name}: {H200.operations / 1e12:.0f} T operations, {H200.memory_bandwidth / 1e12:.1f} TB/s, "
        f"{H200.wires / 1e9:.0f} GB/s in a node, {H200.network / 1e9:.0f} GB/s out of it. Assumed: {share:.0%} of the "
        f"peak, {1e6 * latency:.0f} us a message."
    ]
    for batch in (256, 32):
        job = Job(parameters, forward, batch, fake_turns=5)
        parts.append(f"**Batch {batch} on each GPU, five fake turns, real rows in each**")
        parts.append(table(job, H200, share, latency, spread))
    big = Job(100 * parameters, 100 * forward, 32, 5)
    parts.append(
        f"**Sharded: a network of {big.parameters / 1e9:.2f} G parameters, a hundred times this one, batch {big.batch} "
        "on each GPU**"
    )
    lines = [
        "| GPUs | state on each, GB | fits | gathered in a cycle, GB | cycle, transfers hidden, ms | not hidden, ms |",
        "|---:|---:|---|---:|---:|---:|",
    ]
    for gpus in GPUS:
        hidden, bare = sharded(big, gpus, H200, share, latency)
        moved = big.gradient * (len(big.passes()) + big.fake_turns + 1) * (gpus - 1) / gpus
        lines.append(
            f"| {gpus:,} | {big.sharded(gpus) / 1e9:.3g} | {'yes' if big.sharded(gpus) < H200.memory else 'no'} "
            f"| {moved / 1e9:.4g} | {1e3 * hidden:,.0f} | {1e3 * bare:,.0f} |"
        )
    parts.append("\n".join(lines))
    state = Job(parameters, forward, 1, 5).state
    fits = H200.memory / (state / parameters)
    parts.append(
        f"Whole copies of all state take {state / parameters:.0f} bytes a parameter: {state / 1e9:.2f} GB here; a GPU "
        f"of {H200.memory / 1e9:.0f} GB would be full, before any activation, at {fits / 1e9:.1f} G parameters."
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the peak that compute reaches (default: 1)")
    parser.add_argument("--latency", type=float, default=1e-5, help="of a message, in seconds (default: 1e-5)")
    parser.add_argument("--spread", type=float, default=0.02, help="of compute times between ranks (default: 0.02)")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args(argv)
    text = report(arguments.share, arguments.latency, arguments.spread)
    print(text)
    if arguments.write:
        write(PAGE, text)
    return 0


def write(page: Path, text: str, name: str = "scaling") -> None:
    """Put tables between the page's marks of that name."""
    marked = f"<!-- table: {name} -->\n{text.strip()}\n<!-- end -->"
    old = re.compile(rf"<!-- table: {name} -->.*?<!-- end -->", flags=re.DOTALL)
    page.write_text(old.sub(lambda _: marked, page.read_text()))


if __name__ == "__main__":
    sys.exit(main())
