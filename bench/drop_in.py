"""Digits and time of the drop-in losses beside the sources' formulas: ``python -m bench.drop_in``, two minutes.

Every loss of :mod:`realuid_fast.compat` that restates another framework's runs on the same tensors as that framework's
formula, written out below in plain torch with autograd. Errors are relative to the formula in float64, over the whole
gradient. ``gap`` is how far the fake model's prediction is from the teacher's, or a prediction from its target, beside
samples of size one. Both ways are timed in turn in one process, each with its backward pass. Writes drop_in.json and
drop_in.md.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from realuid_fast.compat import dmd2, fastgen, modelopt, sid

from . import machine, report, timing
from .report import OURS, Row
from .timing import Case, Way

SHAPE = (256, 3, 32, 32)
GAPS = (0.3, 0.1, 0.03, 0.01)
ALPHA, SIGMA = 0.8125, 0.59375  # of the prediction v; every type holds them exactly
SOURCE, COMPILED = "the source's formula", "the source's formula, torch.compile"
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Entry:
    """A drop-in loss of tensors ``(x, teacher, fake)`` and its source's formula; ``leaves`` take a gradient."""

    name: str
    ours: Loss
    restated: Loss
    leaves: tuple[int, ...] = (0,)
    gaps: tuple[float, ...] = (0.1,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    compiled: bool = False


def _vsd(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    with torch.no_grad():
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        error = (x.to(wide) - teacher.to(wide)).abs().mean((1, 2, 3), keepdim=True)
        pseudo = x - (fake - teacher) * (1 / (error + 1e-6)).to(x.dtype)
    return 0.5 * F.mse_loss(x, pseudo)


def _dsm(kind: str, pred: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    targets = {"x0": lambda: x0, "eps": lambda: eps, "v": lambda: ALPHA * eps - SIGMA * x0, "flow": lambda: eps - x0}
    return F.mse_loss(targets[kind](), pred)


def _our_dsm(kind: str, pred: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    return modelopt.dsm_loss(
        kind, pred, x0=x0, eps=eps, t=torch.ones(len(pred)), alpha_fn=lambda t: ALPHA * t, sigma_fn=lambda t: SIGMA * t
    )


def _sid(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    share = 0.8 * torch.rand([len(x), 1, 1, 1])
    sigma = (80 ** (1 / 7) * share + 0.002 ** (1 / 7) * (1 - share)) ** 7
    _ = x + torch.randn_like(x) * sigma  # the networks' input
    weight = (x - teacher).detach().abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
    return ((teacher - fake) * (teacher - x - 1.2 * (teacher - fake)) / weight).sum()


def _our_sid(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    loss = sid.SID_EDMLoss(drop_nan=False)
    return loss.generator_loss(lambda *_, **__: teacher, lambda *_, **__: fake, x).sum()


class _Guidance:
    """A stand-in for DMD2's model: networks that return given tensors, and a schedule."""

    min_step, max_step, num_train_timesteps, sigma_data = 0, 9, 10, 0.5
    karras_sigmas = torch.linspace(0.1, 10, 10)

    def __init__(self, teacher: Tensor, fake: Tensor) -> None:
        self.real_unet, self.fake_unet = lambda *_: teacher, lambda *_: fake


def _our_dmd2(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    return dmd2.compute_distribution_matching_loss(_Guidance(teacher, fake), x, None)[0]["loss_dm"]


def _dmd2(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    with torch.no_grad():
        _ = x + torch.linspace(0.1, 10, 10)[torch.randint(10, [len(x), 1, 1, 1])] * torch.randn_like(x)
        to_teacher, to_fake = x - teacher, x - fake
        g = torch.nan_to_num((to_teacher - to_fake) / to_teacher.abs().mean((1, 2, 3), keepdim=True))
        g.norm().item()
    return 0.5 * F.mse_loss(x, (x - g).detach())


BOTH = (torch.float32, torch.bfloat16)
ENTRIES = (
    Entry("score distillation (FastGen, Model Optimizer)", fastgen.variational_score_distillation_loss, _vsd,
          gaps=GAPS, dtypes=BOTH, compiled=True),
    *(
        Entry(f"score matching, {kind} (FastGen, Model Optimizer)", functools.partial(_our_dsm, kind),
              functools.partial(_dsm, kind), gaps=GAPS[:2], dtypes=BOTH, compiled=kind == "flow")
        for kind in ("x0", "eps", "v", "flow")
    ),
    Entry("generator loss (SiD)", _our_sid, _sid, leaves=(0, 1, 2), gaps=(0.3, 0.01)),
    Entry("distribution matching (DMD2)", _our_dmd2, _dmd2, gaps=(0.3, 0.01)),
)  # fmt: skip


def tensors(entry: Entry, gap: float, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """The three tensors of a case; of score matching the first is a prediction, ``gap`` away from its target."""
    random = torch.Generator().manual_seed(0)
    one, two, near = torch.randn(3, *shape, generator=random)
    if isinstance(entry.restated, functools.partial):
        made = [{"x0": one, "eps": two, "v": ALPHA * two - SIGMA * one, "flow": two - one}[entry.restated.args[0]]]
        return [value.to(dtype) for value in (made[0] + gap * near, one, two)]
    return [value.to(dtype) for value in (one + 0.5 * two, one, one + gap * near)]


def with_gradients(loss: Loss, leaves: tuple[int, ...], given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss of the tensors, and its gradients in the leaves."""
    inputs = [value.detach().requires_grad_(i in leaves) for i, value in enumerate(given)]
    value = loss(*inputs)
    return value.detach(), list(torch.autograd.grad(value, [inputs[i] for i in leaves]))


def errors(loss: Loss, entry: Entry, given: Sequence[Tensor]) -> dict[str, float]:
    """The relative errors of value and gradients against the formula in float64, on the same rounded tensors."""
    exact, grads = with_gradients(entry.restated, entry.leaves, [value.double() for value in given])
    found, ours = with_gradients(loss, entry.leaves, given)

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one.double() - other).norm() / other.norm())

    return {"value_error": apart(found, exact), "gradient_error": max(map(apart, ours, grads))}


def run(chosen: Sequence[Entry], seconds: float, compiles: bool) -> list[Row]:
    """A row for every loss, gap, type and way; torch.compile at the first gap alone: times do not depend on it."""
    rows: list[Row] = []
    for entry in chosen:
        for dtype in entry.dtypes:
            for gap in entry.gaps:
                print(f"{entry.name}, {dtype}, gap {gap:g}", file=sys.stderr, flush=True)
                given = tensors(entry, gap, dtype)
                ways = {OURS: entry.ours, SOURCE: entry.restated}
                if entry.compiled and compiles and gap == entry.gaps[0]:
                    ways[COMPILED] = torch.compile(entry.restated, fullgraph=True, dynamic=False)
                named = [
                    Way(name, functools.partial(with_gradients, loss, entry.leaves, given), ours=name == OURS)
                    for name, loss in ways.items()
                ]
                case = Case(f"{entry.name}, gap {gap:g}", SHAPE, named, dtype=str(dtype).removeprefix("torch."))
                timed = timing.measure(case, rounds=60, seconds=seconds)
                rows += [
                    row | {"loss": entry.name, "gap": gap, **errors(ways[row["way"]], entry, given)} for row in timed
                ]
    return rows


def table(rows: Sequence[Row], described: Mapping[str, Any]) -> str:
    """A line for every loss, type and gap."""
    header = [
        "loss", "type", "gap", "error of the value", "error of the gradient", "of the source's gradient",
        "source's time, eager", "torch.compile",
    ]  # fmt: skip
    lines = []
    for ways in report.by_case(rows):
        ours, theirs = ways[OURS], ways[SOURCE]
        cells = [f"{error:.1e}" for error in (ours["value_error"], ours["gradient_error"], theirs["gradient_error"])]
        times = [f"{ways[name]['ratio']:.1f}x" if name in ways else "" for name in (SOURCE, COMPILED)]
        lines.append([ours["loss"], report.kind(ours), f"{ours['gap']:g}", *cells, *times])
    return report.markdown(header, lines, words=2) + (
        f"\n`{described['command']}` on {machine.sentence(described)}. "
        f"{report.shape(rows[0])} samples. Errors are relative to the formula in float64 on the same tensors, over the "
        "whole gradient. Times are of the source's formula with its backward pass, divided by ours: medians of "
        f"ratios inside a round. Freed memory is kept by all ways. The clock is the {described['clock']}.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser("bench.drop_in", __doc__, "time of a case beside its compilation (default 1.5, quick 0.3)")
    args = parser.parse_args(argv)
    chosen = [entry for entry in ENTRIES if args.only in entry.name]
    if not chosen:
        parser.error(f"no loss has {args.only!r} in its name")
    described = report.start("bench.drop_in", argv, 1)
    rows = run(chosen, report.seconds(args, 1.5, quick=0.3), compiles=not args.quick)
    text = table(rows, described)
    report.write(report.Results("drop_in", described, rows), args.out, {"drop_in": text})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
