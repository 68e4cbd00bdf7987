"""The optimiser step, and whole updates of the CIFAR-10 recipe in every mode."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.optim import Optimiser
from realuid_fast.train.distill import Distiller
from realuid_fast.train.modes import WARM_UP, captures, compiles

from ..published import Published
from ..report import OURS, Row
from ..step import PROBLEMS, Problem
from .device import Deadline, Device, reason

DECAYS = (0.999, 0.9996, 0.9999)
BATCHES = (256, 8)
HALF = {"fake_precision": "bf16", "generator_precision": "fp16"}
# A network of one resolution: a dry run goes through every call, and tracing a block a second time shows nothing.
TINY = replace(
    PROBLEMS["digits"],
    network={**PROBLEMS["digits"].network, "channel_mult": [1]},
    shape=(1, 8, 8),
    distill={"ema": (0.9,), "export": 0.0, "fake_turns": 2},
)


@dataclass(frozen=True)
class Way:
    """One way of making an update: whose trainer, with which settings and ``run.mode``."""

    name: str
    distill: dict[str, Any] | None = None  # None for the algorithm as published
    mode: str = "eager"
    autocast: bool = False


# The most telling first, what needs a compiler last: time may run out. Compiled code is found again in torch's cache.
WAYS = (
    Way("as published, eager float32 (torch's defaults: TF32 convolutions)"),
    Way(f"{OURS}, graphs of eager networks, bf16 and fp16 turns", HALF, mode="graphs-eager"),
    Way("as published, eager under bf16 autocast", autocast=True),
    Way(f"{OURS}, eager, bf16 and fp16 turns", HALF),
    Way(f"{OURS}, eager, float32", {}),
    Way(f"{OURS}, compiled, bf16 and fp16 turns", HALF, mode="compiled"),
    Way(f"{OURS}, graphs, bf16 and fp16 turns", HALF, mode="graphs"),
)


def optimiser(device: Device, deadline: Deadline, write: Callable[[Row], None]) -> None:
    """One step with clip and three averages on the CIFAR-10 network's parameters, against torch's fused pieces."""
    problem = TINY if device.dry else PROBLEMS["cifar10"]
    settings = {"lr": 1e-4, "betas": (0.0, 0.999), "clip": 1.0}
    ours: float | None = None
    for name, make in ((OURS, _ours), ("Adam(fused), foreach clip, foreach averages", _foreach)):
        net = problem.make()[2].net.to(device.device).requires_grad_(True)
        step = make(net, settings)
        for p in net.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        count = sum(p.numel() for p in net.parameters())
        times = device.time(step)
        if name == OURS:
            ours = times.device_ms
        # Gradient, parameter, second moment and averages are read, all but the gradient written; the norm reads again.
        size = 4 * count * (2 * (2 + len(DECAYS)) + 2)
        write(
            {
                "case": "optimiser step",
                "shape": [count],
                "dtype": "float32",
                "way": name,
                "ours": name == OURS,
                "median_ms": times.device_ms,
                "min_ms": times.min_ms,
                "call_ms": times.call_ms,
                "ratio": times.device_ms / ours if times.device_ms and ours else None,
                "GBps": size / times.device_ms / 1e6 if times.device_ms else None,
                **device.profile(step),
            }
        )


def _ours(net: nn.Module, settings: dict[str, Any]) -> Callable[[], None]:
    return Optimiser(net, **settings, ema_decays=DECAYS).step


def _foreach(net: nn.Module, settings: dict[str, Any]) -> Callable[[], None]:
    params = list(net.parameters())
    capturable = params[0].is_cuda
    adam = torch.optim.Adam(params, settings["lr"], settings["betas"], fused=True, capturable=capturable)
    averages = {decay: [p.detach().clone() for p in params] for decay in DECAYS}
    sources = [p.detach() for p in params]

    def step() -> None:
        nn.utils.clip_grad_norm_(params, settings["clip"], foreach=True)
        adam.step()
        for decay, average in averages.items():
            torch._foreach_lerp_(average, sources, 1 - decay)

    return step


def updates(device: Device, deadline: Deadline, write: Callable[[Row], None], batch: int) -> None:
    """Updates of ``batch``: ms of either turn and of a cycle, launches, idle share, peak memory."""
    first: float | None = None
    slowest = 0.0
    for way in WAYS:
        # Warm-up, cycle and parts of one that is as slow as the slowest so far.
        if deadline.left < 8e-3 * slowest:
            return
        device.forget_memory()
        row: Row = {"case": f"update, batch {batch}", "shape": [batch], "dtype": "float32", "way": way.name}
        row |= {"ours": way.distill is not None, "median_ms": None}
        try:
            row |= _measure(device, way, batch, deadline)
        except Exception as error:
            # One way that does not run, out of memory say, must not cost the others.
            row["left_out"] = reason(error)
        slowest = max(slowest, row["median_ms"] or 0.0)
        if way is WAYS[0]:
            first = row["median_ms"]
        row["published_over_this"] = first / row["median_ms"] if first and row["median_ms"] else None
        row["peak_MB"] = device.peak_MB()
        write(row)
        gc.collect()
        torch.compiler.reset()


def _problem(device: Device, batch: int) -> Problem:
    if device.dry:
        return replace(TINY, distill={**TINY.distill, "batch": 2})
    problem = PROBLEMS["cifar10"]
    return replace(problem, distill={**problem.distill, "batch": batch, "fake_turns": 5, "ema": DECAYS})


def _trainer(
    device: Device, way: Way, batch: int
) -> tuple[Distiller | Published, contextlib.AbstractContextManager[Any]]:
    config, dataset, teacher = _problem(device, batch).make()
    # A dry run's device has no graphs: a recorder of its own stands for them.
    dry = device.dry and captures(way.mode)
    mode = ("compiled" if compiles(way.mode) else "eager") if dry else way.mode
    run = replace(config.run, device=str(device.device), mode=mode)
    if way.distill is None:
        published = Published(replace(config, run=run), dataset, teacher)
        kind = device.device.type
        # Its cache of rounded weights lives until the context is left, here after many updates.
        rounded = torch.autocast(kind, torch.bfloat16, cache_enabled=False)
        return published, rounded if way.autocast else contextlib.nullcontext()
    changed = configs.merge(configs.to_mapping(replace(config, run=run)), {"distill": way.distill})
    distiller = trainers.distiller(configs.from_mapping(changed), dataset, teacher)
    if dry:
        distiller.capture(device.recorder())
    return distiller, contextlib.nullcontext()


def _measure(device: Device, way: Way, batch: int, deadline: Deadline) -> Row:
    trainer, context = _trainer(device, way, batch)
    with context:
        # Until its turns are captured where they are to be.
        for _ in range(1 if device.dry else WARM_UP + 2 if captures(way.mode) else 2):
            trainer.update()
        return _figures(device, trainer, deadline)


def _figures(device: Device, trainer: Distiller | Published, deadline: Deadline) -> Row:
    """Figures of one trainer that is warm: of whole updates, and where there is time for it of their parts."""
    # Repeat slow updates a few times and fast ones more often.
    first = device.spans(trainer.update, calls=1, rounds=1)
    most = max(3, min(20, int(3e3 / first))) if first else 1
    cycle = device.spans(trainer.update, calls=1, rounds=most)
    row: Row = {"median_ms": cycle, "updates_per_second": 1e3 / cycle if cycle else None}
    if cycle and deadline.left < 5e-3 * cycle:
        return row
    row |= device.profile(trainer.update)
    busy = row["busy_ms"]
    row["idle_share"] = max(0.0, 1 - busy / cycle) if busy and cycle else None
    if isinstance(trainer, Distiller):
        made = torch.randn_like(trainer._like)
        labels = None if trainer.labels is None else trainer.labels[: trainer.batch]
        row["fake_turn_ms"] = device.spans(lambda: trainer.fake_turn(made, labels), calls=1, rounds=most)
        row["generator_turn_ms"] = device.spans(trainer.generator_turn, calls=1, rounds=most)
    else:
        draws = trainer._draws()
        row["fake_turn_ms"] = device.spans(lambda: trainer.fake_turn(*draws), calls=1, rounds=most)
        row["generator_turn_ms"] = device.spans(lambda: trainer.generator_turn(*draws[:-1]), calls=1, rounds=most)
    return row
