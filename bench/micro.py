"""Times the fused calls against plain torch on CPU: ``python -m bench.micro``, about ten minutes; ``--quick`` two.

Writes micro.json (every number), micro.md (sizes of training batches in float32), micro_all.md (all cases) and two
plots. The cases are :func:`entries`; a call and its peers are a function below each. All ways of a case run in turn in
one process (:mod:`bench.timing`). Peers draw their noise with torch.randn or are given a tensor; the fused calls
regenerate it from a key or are given the same tensor. Freed memory is kept for the next call, for all ways alike, as
the trainer does.

Bytes are what a call has to move: every input read once, every output written once. The limit beside it is the speed of
copying as many bytes in the same rounds, by ``Tensor.copy_`` and by streaming stores, as the kernels write.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import realuid_fast as rf

from . import machine, peers, plots, report, timing
from .report import COPIES, OURS, Row
from .timing import Case, Way

TINY, DIGITS, SMALL, CIFAR, LARGE = (2, 4), (128, 1, 8, 8), (64, 3, 32, 32), (256, 3, 32, 32), (2048, 3, 32, 32)
SIZES = (TINY, (8, 1, 8, 8), DIGITS, (16, 3, 32, 32), SMALL, CIFAR, LARGE, (1024, 4, 128, 128))
# Ways that show where the time of a small call goes. The second is torch's own floor, on one number of each input.
SMALL_PARTS = ("operator alone", "torch.addcmul and backward")
LONG = 2**22  # from so many elements on a call is larger than the caches and much longer than the clock's resolution


@dataclass(frozen=True)
class Entry:
    """One line of the table of cases; ``compiled``: also by torch.compile, which takes some seconds to build."""

    call: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    compiled: bool = False


def entries(quick: bool = False) -> Iterator[Entry]:
    """The cases: every call over sizes in float32, and over types and layouts at the sizes of training batches."""
    for call in CALLS:
        for shape in (TINY, DIGITS, CIFAR) if quick else SIZES:
            yield Entry(call, shape, compiled=shape == CIFAR or (not quick and shape in (DIGITS, SMALL, LARGE)))
        yield Entry(call, CIFAR, torch.bfloat16, compiled=not quick)
        if not quick:
            yield Entry(call, CIFAR, torch.float16)
            yield Entry(call, LARGE, torch.bfloat16)
            for dtype in (torch.float32, torch.bfloat16):
                yield Entry(call, CIFAR, dtype, torch.channels_last)


@dataclass(frozen=True)
class Peer:
    """The code that a user would write, ``function(*inputs, noise, **bound)``, which may be a loss to differentiate."""

    name: str
    function: Callable[..., Any]
    autograd: bool = True
    eager: bool = True
    compiled: bool = True
    draws: bool = True
    bound: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A fused call on the tensors of one entry, and its peers.

    ``loss`` is its differentiable form, if it has one, and ``alone`` the operator without the arguments' checks.
    ``moved`` counts the tensors that have to be read or written; ``draw`` makes the peers' noise.
    """

    moved: int
    ours: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    draw: Callable[[], Tensor]
    peers: tuple[Peer, ...]
    loss: Callable[..., Tensor] | None = None
    alone: Callable[[], Any] | None = None


class Setting:
    """Tensors and settings of one entry."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.rows = entry, entry.shape[0]
        self.random = torch.Generator().manual_seed(0)
        self.path, self.key = rf.paths.Linear(), rf.NoiseStream(0).next_key()
        self.objective = rf.objectives.RealUID(peers.ALPHA, peers.BETA)
        self.t = self.path.sample_time(self.rows, self.random)
        self.coef = self.path.coefficients(self.t)

    def tensor(self, rows: int | None = None) -> Tensor:
        """Normals of the entry's kind, with ``rows`` samples where given."""
        drawn = torch.randn(rows or self.rows, *self.entry.shape[1:], generator=self.random).to(self.entry.dtype)
        return drawn.contiguous(memory_format=self.entry.layout) if drawn.dim() == 4 else drawn


def _generator(s: Setting, drawn: bool) -> Call:
    teacher, fake, x, given = (s.tensor() for _ in range(4))
    noise = s.key if drawn else given
    # Compiled draws are scalar code, several times slower than eager ones: shown once.
    shown = drawn and s.entry.shape == CIFAR and s.entry.dtype == torch.float32
    table = {"coef": s.coef}
    without, switches = (None, None, None, None), (True, True, True, True, False, False)
    everything = (teacher, fake, x, None, s.coef, noise, *without, *s.objective.generator_scalars, *switches)
    return Call(
        moved=6 if drawn else 7,
        ours=lambda: rf.functional.generator_grads(
            s.objective, teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=s.coef, noise=noise
        ),
        loss=lambda a, b, c: rf.functional.generator_loss(
            s.objective, teacher_out=a, fake_out=b, x=c, x_t=None, coef=s.coef, noise=noise
        ),
        alone=lambda: torch.ops.realuid_fast.generator(*everything),
        inputs=(teacher, fake, x),
        draw=lambda: torch.randn_like(x) if drawn else given,
        peers=(
            Peer("coefficient table", peers.generator_table, bound=table),
            Peer("as published", peers.generator_published),
            Peer("written out", peers.generator_written_out),
            Peer("gradients by hand", peers.generator_by_hand, autograd=False, eager=False),
            Peer("noise inside", peers.generator_noise_inside, eager=False, compiled=shown, draws=False, bound=table),
        ),
    )


def _fake(s: Setting) -> Call:
    half = s.rows // 2
    fake, x, like = s.tensor(), s.tensor(), s.tensor(half)
    coef = s.path.coefficients(s.t[:half].repeat(2))
    without, halves = (None, None, None, None), (*s.objective.generated, *s.objective.real)
    everything = (fake, x, None, coef, s.key, *without, half, half, *halves, True, True)
    return Call(
        moved=3,
        ours=lambda: rf.functional.fake_grads(
            s.objective, fake_out=fake, x=x, x_t=None, coef=coef, noise=s.key, n_real=half, noise_rows=half
        ),
        loss=lambda f: rf.functional.fake_loss(
            s.objective, fake_out=f, x=x, x_t=None, coef=coef, noise=s.key, n_real=half, noise_rows=half
        ),
        alone=lambda: torch.ops.realuid_fast.fake(*everything),
        inputs=(fake,),
        draw=lambda: torch.randn_like(like),
        peers=(
            Peer("weights by row", peers.fake_by_row, bound={"x": x}),
            Peer("as published", peers.fake_published, bound={"x": x}),
            Peer("gradients by hand", peers.fake_by_hand, autograd=False, eager=False, bound={"x": x}),
        ),
    )


def _matching(s: Setting) -> Call:
    out, x = s.tensor(), s.tensor()
    return Call(
        moved=3,
        ours=lambda: rf.functional.matching_grads(out=out, x=x, x_t=None, coef=s.coef, noise=s.key),
        loss=lambda f: rf.functional.matching_loss(out=f, x=x, x_t=None, coef=s.coef, noise=s.key),
        alone=lambda: torch.ops.realuid_fast.matching(out, x, None, s.coef, s.key, None, s.rows, True, True),
        inputs=(out,),
        draw=lambda: torch.randn_like(x),
        peers=(
            Peer("coefficient table", peers.matching_table, bound={"x": x, "coef": s.coef}),
            Peer("as published", peers.matching_published, bound={"x": x}),
            Peer("gradients by hand", peers.matching_by_hand, autograd=False, eager=False, bound={"x": x}),
        ),
    )


def _interpolate(s: Setting) -> Call:
    x = s.tensor()
    return Call(
        moved=2,
        ours=lambda: rf.interpolate(x, s.coef, s.key),
        inputs=(x,),
        draw=lambda: torch.randn_like(x),
        peers=(
            Peer("as published", peers.interpolate, autograd=False, bound={"t": s.t}),
            Peer("torch.lerp", peers.interpolate_lerp, autograd=False, compiled=False, bound={"t": s.t}),
        ),
    )


def _normals(s: Setting) -> Call:
    like = s.tensor()
    return Call(
        moved=1,
        ours=lambda: rf.noise.normal(s.key, like),
        inputs=(like,),
        draw=lambda: like,
        peers=(
            Peer("torch.randn", torch.randn_like, autograd=False, compiled=False, draws=False),
            # Into a tensor that exists, whose pages are there already.
            Peer("Tensor.normal_", Tensor.normal_, autograd=False, compiled=False, draws=False),
        ),
    )


CALLS: dict[str, Callable[[Setting], Call]] = {
    "generator loss, 3 gradients, noise drawn": functools.partial(_generator, drawn=True),
    "generator loss, 3 gradients, noise given": functools.partial(_generator, drawn=False),
    "fake loss, gradient, half the rows real, noise drawn": _fake,
    "matching loss, gradient, noise drawn": _matching,
    "interpolate, noise drawn": _interpolate,
    "normals": _normals,
}


def build(entry: Entry) -> Case:
    """The entry's tensors made and its ways bound to them, copies of as many bytes among them."""
    call = CALLS[entry.call](Setting(entry))
    size = call.moved * math.prod(entry.shape) * entry.dtype.itemsize
    ways = [Way(OURS, call.ours, ours=True)]
    if call.loss is not None and call.alone is not None:
        ways.append(Way(f"{OURS}, autograd", runner(call, Peer("", call.loss, draws=False))))
        if entry.shape in (TINY, SMALL):
            numbers = tuple(torch.ones(()) for _ in call.inputs)
            parts = call.alone, runner(replace(call, inputs=numbers), Peer("", peers.least, draws=False))
            ways += [Way(name, part) for name, part in zip(SMALL_PARTS, parts, strict=True)]
    for peer in call.peers:
        if peer.eager:
            ways.append(Way(f"eager, {peer.name}", runner(call, peer)))
        if peer.compiled and entry.compiled:
            compiled = replace(peer, function=_compiled(peer.function))
            ways.append(Way(f"torch.compile, {peer.name}", runner(call, compiled)))
    return Case(
        entry.call,
        entry.shape,
        ways + copies(size),
        dtype=str(entry.dtype).removeprefix("torch."),
        layout="channels_last" if entry.layout == torch.channels_last else "contiguous",
        bytes=size,
    )


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def runner(call: Call, peer: Peer) -> Callable[[], Any]:
    """The peer on the call's inputs and fresh noise; with ``autograd``, the gradients of the loss that it returns."""
    inputs = [tensor.detach().requires_grad_(peer.autograd) for tensor in call.inputs]

    def run() -> Any:
        noise = {"noise": call.draw()} if peer.draws else {}
        result = peer.function(*inputs, **noise, **peer.bound)
        return torch.autograd.grad(result, inputs) if peer.autograd else result

    return run


def copies(size: int) -> list[Way]:
    """Copying ``size / 2`` bytes, which moves ``size``: by torch and, where caches end, with streaming stores."""
    source = torch.ones(size // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    ways = [Way(COPIES[0], lambda: target.copy_(source))]
    if machine.streaming_copy(size, repeats=1) is not None:
        ways.append(Way(COPIES[1], lambda: size / (1e9 * (machine.streaming_copy(size) or 0.0)), times_itself=True))
    return ways


def run(chosen: Iterable[Entry], seconds: float) -> list[Row]:
    """All rows of the entries, each timed for about ``seconds``; says on standard error what it is at."""
    rows: list[Row] = []
    for entry in chosen:
        case = build(entry)
        print(f"{case.name}, {entry.shape}, {case.dtype}, {case.layout}", file=sys.stderr, flush=True)
        calls = 1 if math.prod(entry.shape) >= LONG else 3
        rows += timing.measure(case, rounds=60, calls=calls, seconds=seconds)
    return rows


def table(rows: Sequence[Row], described: Mapping[str, Any]) -> str:
    """Markdown tables for each call, none wider than a page: speeds, other ways in eager mode, and those compiled."""
    found = []
    cases = report.by_case(rows)
    for call in dict.fromkeys(ways[OURS]["case"] for ways in cases):
        chosen = [ways for ways in cases if ways[OURS]["case"] == call]
        others = dict.fromkeys(name for ways in chosen for name in ways if name not in (OURS, *COPIES))
        header = ["shape", "type", "ms", "GB/s", *(f"{name}, GB/s" for name in COPIES), "share of copy"]
        lines = []
        for ways in chosen:
            ours, share = ways[OURS], report.share_of_copy(ways)
            speeds = [report.number(ways.get(name, {}).get("GBps")) for name in (OURS, *COPIES)]
            share_text = "" if share is None else f"{share:.0%}"
            lines.append([report.shape(ours), report.kind(ours), report.number(ours["median_ms"]), *speeds, share_text])
        found.append(f"**{call}**\n\n" + report.markdown(header, lines, words=2))
        for compiled, kind in ((False, "eager"), (True, "torch.compile")):
            names = [name for name in others if name.startswith("torch.compile") == compiled]
            measured = [ways for ways in chosen if any(name in ways for name in names)]
            if measured:
                short = [name.removeprefix("torch.compile, ") for name in names]
                lines = [
                    [
                        report.shape(ways[OURS]),
                        report.kind(ways[OURS]),
                        *(f"{ways[name]['ratio']:.1f}x" if name in ways else "" for name in names),
                    ]
                    for ways in measured
                ]
                head = [f"{kind}, times realuid_fast's", "type", *short]
                found.append(report.markdown(head, lines, words=2))
    found.append(
        f"`{described['command']}` on {machine.sentence(described)}. ms, GB/s and share are realuid_fast's; the "
        "tables below them have other ways' times by its own, medians over rounds of the ratio inside the round. The "
        f"clock is the {described['clock']}. The share is of the faster copy of the same number of bytes.\n"
    )
    return "\n".join(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser("bench.micro", __doc__, "time of a case beside its compilation (default 2.5, quick 1)")
    parser.add_argument("--threads", type=report.threads, default=1, help="torch threads (default 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(argv)

    chosen = [entry for entry in entries(args.quick) if args.only in entry.call]
    if not chosen:
        parser.error(f"no case has {args.only!r} in its name")
    if args.no_compile:
        chosen = [replace(entry, compiled=False) for entry in chosen]
    described = report.start("bench.micro", argv, args.threads)
    rows = run(chosen, report.seconds(args, 2.5, quick=1.0))
    name = report.named("micro", args.threads)
    usual = [row for row in rows if row["shape"] != list(SIZES[-1]) and report.kind(row) == "float32"]
    tables = {name: table(usual, described), f"{name}_all": table(rows, described)}
    report.write(report.Results(name, described, rows), args.out, tables)
    plots.times(rows, args.out / f"{name}_time.png")
    plots.shares(rows, args.out / f"{name}_share.png")
    print(tables[f"{name}_all"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
