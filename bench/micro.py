"""Times the fused calls against plain torch on CPU: ``python -m bench.micro``.

Prints a table and writes it with the machine's description to bench/results/micro.md and micro.json.

Every way of computing a case runs in turn, round after round, so that a drifting machine slows all of them alike. A
turn is a few calls in a row, of which the first, with the caches as another way left them, is not counted. On one
thread the clock is the thread's processor time, which waiting for a busy neighbour does not lengthen; on more it is the
wall's. The peers draw their noise with torch.randn or are given a tensor; the fused calls regenerate it from a key or
are given the same tensor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import realuid_fast as rf

from . import machine, peers

RESULTS = Path(__file__).resolve().parent / "results"
CIFAR, DIGITS = (256, 3, 32, 32), (128, 1, 8, 8)


@dataclass(frozen=True)
class Way:
    """One way of computing a case; ``ours`` is what the others are compared with."""

    name: str
    run: Callable[[], Any]
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """One computation with the ways of doing it that may be compared: all of them do the same work."""

    name: str
    shape: tuple[int, ...]
    ways: list[Way]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _with_grad(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """function(*inputs, ...) followed by the gradients of its loss with respect to ``inputs``."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run(*rest: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, *rest), leaves)

    return run


def _inputs(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def _setting() -> tuple[rf.paths.Linear, rf.objectives.Objective, Tensor]:
    return rf.paths.Linear(), rf.objectives.RealUID(peers.ALPHA, peers.BETA), rf.NoiseStream(0).next_key()


def generator_cases(shape: tuple[int, ...], compile_peers: bool = True) -> list[Case]:
    """The generator loss with its gradients to teacher_out, fake_out and x: noise drawn, and noise given."""
    path, objective, key = _setting()
    teacher, fake, x, noise = _inputs(shape, 4)
    coef = path.coefficients(path.sample_time(shape[0]))
    eager = _with_grad(lambda a, b, c, n: peers.generator_loss(a, b, c, n, coef), teacher, fake, x)
    written_out = _with_grad(peers.velocity_loss, teacher, fake, x)

    # No timing of ways that do not compute the same thing.
    ours = rf.generator_grads(teacher, fake, x, None, coef, noise, objective)
    gradients = (ours.teacher_out, ours.fake_out, ours.x)
    torch.testing.assert_close(gradients, eager(noise))
    torch.testing.assert_close(gradients, written_out(noise))
    torch.testing.assert_close((ours.loss, *gradients), peers.velocity_one_pass(teacher, fake, x, noise))

    def draw() -> Tensor:
        return torch.randn(shape)

    drawn = [
        Way("realuid_fast", lambda: rf.generator_grads(teacher, fake, x, None, coef, key, objective), ours=True),
        Way("eager, autograd", lambda: eager(draw())),
        Way("eager, autograd, velocity written out", lambda: written_out(draw())),
    ]
    given = [
        Way("realuid_fast", lambda: rf.generator_grads(teacher, fake, x, None, coef, noise, objective), ours=True),
        Way("eager, autograd", lambda: eager(noise)),
        Way("eager, autograd, velocity written out", lambda: written_out(noise)),
    ]
    if compile_peers:
        table = _compiled(peers.generator_loss)
        compiled = _with_grad(lambda a, b, c, n: table(a, b, c, n, coef), teacher, fake, x)
        compiled_out = _with_grad(_compiled(peers.velocity_loss), teacher, fake, x)
        one_pass = _compiled(peers.velocity_one_pass)
        inside = _compiled(lambda a, b, c: peers.generator_loss(a, b, c, torch.randn_like(c), coef))
        drawn_inside = _with_grad(inside, teacher, fake, x)
        drawn += [
            Way("torch.compile, autograd", lambda: compiled(draw())),
            Way("torch.compile, autograd, velocity written out", lambda: compiled_out(draw())),
            Way("torch.compile, gradients by hand, velocity written out", lambda: one_pass(teacher, fake, x, draw())),
            Way("torch.compile, autograd, randn compiled in", lambda: drawn_inside()),
        ]
        given += [
            Way("torch.compile, autograd", lambda: compiled(noise)),
            Way("torch.compile, autograd, velocity written out", lambda: compiled_out(noise)),
            Way("torch.compile, gradients by hand, velocity written out", lambda: one_pass(teacher, fake, x, noise)),
        ]
    return [
        Case("generator loss, 3 gradients, noise drawn", shape, drawn),
        Case("generator loss, 3 gradients, noise given", shape, given),
    ]


def fake_cases(shape: tuple[int, ...], compile_peers: bool = True) -> list[Case]:
    """The fake model's loss with its gradient on shape[0] generated and as many real rows, one noise for both."""
    path, objective, key = _setting()
    rows = shape[0]
    both = (2 * rows, *shape[1:])
    fake, x = _inputs(both, 2)
    coef = path.coefficients(path.sample_time(rows).repeat(2))
    eager = _with_grad(lambda f, n: peers.fake_loss(f, x, n), fake)
    ways = [
        Way(
            "realuid_fast",
            lambda: rf.fake_grads(fake, x, None, coef, key, objective, n_real=rows, noise_rows=rows),
            ours=True,
        ),
        Way("eager, autograd", lambda: eager(torch.randn(shape))),
    ]
    if compile_peers:
        compiled = _with_grad(_compiled(lambda f, n: peers.fake_loss(f, x, n)), fake)
        ways.append(Way("torch.compile, autograd", lambda: compiled(torch.randn(shape))))
    return [Case("fake loss, gradient, noise drawn", both, ways)]


def interpolate_cases(shape: tuple[int, ...], compile_peers: bool = True) -> list[Case]:
    """x_t from x and fresh noise."""
    path, _, key = _setting()
    (x,) = _inputs(shape, 1)
    t = path.sample_time(shape[0])
    coef = path.coefficients(t)
    ways = [
        Way("realuid_fast", lambda: rf.interpolate(x, coef, key), ours=True),
        Way("eager", lambda: peers.interpolate(x, t, torch.randn(shape))),
    ]
    if compile_peers:
        compiled = _compiled(peers.interpolate)
        ways.append(Way("torch.compile", lambda: compiled(x, t, torch.randn(shape))))
    return [Case("interpolate, noise drawn", shape, ways)]


def normal_cases(shape: tuple[int, ...], compile_peers: bool = True) -> list[Case]:
    """Standard normals into a new tensor; by torch also into one that exists, whose pages are there already."""
    _, _, key = _setting()
    (like,) = _inputs(shape, 1)
    ways = [
        Way("realuid_fast", lambda: rf.noise.normal(key, like), ours=True),
        Way("torch.randn", lambda: torch.randn(shape)),
        Way("Tensor.normal_", lambda: like.normal_()),
    ]
    return [Case("normals", shape, ways)]


def cases(compile_peers: bool = True) -> list[Case]:
    return [
        *generator_cases(CIFAR, compile_peers),
        *fake_cases(CIFAR, compile_peers),
        *interpolate_cases(CIFAR, compile_peers),
        *normal_cases(CIFAR, compile_peers),
        *generator_cases(DIGITS, compile_peers),
    ]


def measure(case: Case, rounds: int, calls: int = 4, warmup: int = 3) -> list[dict[str, Any]]:
    """Times every way of a case in turn, ``rounds`` turns of ``calls`` calls each; milliseconds."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for way in case.ways:
        for _ in range(warmup):
            way.run()
    seconds: list[list[float]] = [[] for _ in case.ways]
    for _ in range(rounds):
        for way, taken in zip(case.ways, seconds, strict=True):
            turn = []
            for _ in range(calls):
                start = clock()
                result = way.run()
                turn.append(clock() - start)
                # Freed outside the clock, as a training loop frees it one step later.
                del result
            taken.append(sorted(turn[1:])[(calls - 1) // 2])
    ours = next(i for i, way in enumerate(case.ways) if way.ours)
    rows = []
    for way, taken in zip(case.ways, seconds, strict=True):
        ratios = sorted(other / mine for other, mine in zip(taken, seconds[ours], strict=True))
        taken = sorted(taken)
        rows.append(
            {
                "case": case.name,
                "shape": list(case.shape),
                "way": way.name,
                "median_ms": 1e3 * taken[len(taken) // 2],
                "min_ms": 1e3 * taken[0],
                "ratio": ratios[len(ratios) // 2],
            }
        )
    return rows


def table(rows: list[dict[str, Any]], described: dict[str, Any]) -> str:
    """The rows as Markdown, the machine below."""
    lines = ["| case | shape | way | median, ms | minimum, ms | times realuid_fast |", "|---|---|---|---:|---:|---:|"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            f"| {row['case']} | {shape} | {row['way']} | {row['median_ms']:.3f} | {row['min_ms']:.3f} "
            f"| {row['ratio']:.1f} |"
        )
    lines += [
        "",
        f"`python -m bench.micro` on {described['processor']}, {described['threads']} thread(s) of "
        f"{described['cores']} cores, {described['isa']}, torch {described['torch']}, copy bandwidth "
        f"{described['copy_GBps']} GB/s on one thread, load average {described['load_average']} at the start. "
        f"{described['clock']}; all ways of a case interleaved in one run; the last column is the median over rounds "
        "of the ratio inside the round.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds over all ways of a case (default 60)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of micro.json and micro.md")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    described = machine.describe()
    described["clock"] = "Processor time of the one thread" if args.threads == 1 else "Wall time"
    rows: list[dict[str, Any]] = []
    for case in cases(not args.no_compile):
        if args.only in case.name:
            rows += measure(case, args.rounds)
    text = table(rows, described)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "micro.json").write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    (args.out / "micro.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
