"""The optimiser step, and whole updates of the CIFAR-10 recipe in every mode."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from realuid_fast import networks
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import layers
from realuid_fast.optim import Optimiser
from realuid_fast.train.distill import Distiller
from realuid_fast.train.modes import WARM_UP, captures, compiles

from ..published import Published
from ..report import OURS, Row
from ..step import PROBLEMS, Problem
from .device import Deadline, Device, reason

FOREACH = "Adam(fused), foreach clip, foreach averages"
DECAYS = (0.999, 0.9996, 0.9999)
HALF = {"fake_precision": "bf16", "generator_precision": "fp16"}
# A network of one resolution: a dry run goes through every call, and tracing a block a second time shows nothing.
TINY = replace(
    PROBLEMS["digits"],
    network={**PROBLEMS["digits"].network, "channel_mult": [1]},
    shape=(1, 8, 8),
    distill={"ema": (0.9,), "export": 0.0, "fake_turns": 2},
)


Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Way:
    """One way of making an update.

    Attributes:
        name: of its row.
        distill: settings of the trainer's; None for the algorithm as published.
        run: settings of the run's.
        within: a context that all updates are made in.
    """

    name: str
    distill: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    within: Context = contextlib.nullcontext

    @property
    def mode(self) -> str:
        return str(self.run.get("mode", "eager"))


GRAPHS = {"mode": "graphs-eager"}


def _autocast() -> contextlib.AbstractContextManager[Any]:
    # The cache of rounded weights would live until the context is left, here after many updates.
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, cache_enabled=False)


def _benchmark() -> contextlib.AbstractContextManager[Any]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True)


def _serves_not(*arguments: Any) -> bool:
    # A mock with a return value would keep the tensors that it is called with.
    return False


def _torch_layers() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(layers, "serves", _serves_not)


PUBLISHED = Way("as published, eager float32 (torch's defaults: TF32 convolutions)")
RECOMMENDED = Way(f"{OURS}, graphs of eager networks, bf16 and fp16 turns", HALF, GRAPHS)
# The recommended way, and those that it is compared with.
MAIN = (PUBLISHED, RECOMMENDED, Way("as published, eager under bf16 autocast", within=_autocast))
# The recommended way with one thing changed each, beside itself.
VARIANTS = (
    RECOMMENDED,
    Way("cudnn.benchmark on", HALF, GRAPHS, _benchmark),
    Way("attention by cuDNN", HALF, GRAPHS, functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
    Way("networks on torch's own layers", HALF, GRAPHS, _torch_layers),
    Way("images NCHW, on torch's own layers", HALF, {**GRAPHS, "channels_last": False}),
    Way("without graphs", HALF),
    Way("without graphs, float32", {}),
)
# This way needs minutes of a compiler before it can be measured. Compiled code is found again in torch's cache.
COMPILED = (Way(f"{OURS}, graphs of compiled networks, bf16 and fp16 turns", HALF, {"mode": "graphs"}),)


def planned_updates(case: str, batch: int, ways: Sequence[Way], dry: bool) -> Iterator[Row]:
    """The rows of :func:`updates`, without figures."""
    for way in ways:
        row: Row = {"case": case, "shape": [batch], "dtype": "float32", "way": way.name}
        yield row | {"ours": way.distill is not None, "median_ms": None}


def planned_optimiser(dry: bool) -> Iterator[Row]:
    """The rows of :func:`optimiser`, without figures."""
    with torch.device("meta"):
        count = sum(p.numel() for p in networks.build(_updated(dry).settings()).parameters())
    for name in (OURS, FOREACH):
        row: Row = {"case": "optimiser step", "shape": [count], "dtype": "float32", "way": name}
        yield row | {"ours": name == OURS, "median_ms": None}


def _updated(dry: bool) -> Problem:
    return TINY if dry else PROBLEMS["cifar10"]


def optimiser(device: Device, deadline: Deadline, write: Callable[[Row], None]) -> None:
    """One step with clip and three averages on the CIFAR-10 network's parameters, against torch's fused pieces."""
    settings = {"lr": 1e-4, "betas": (0.0, 0.999), "clip": 1.0}
    ours: float | None = None
    makers = (_ours, _foreach)
    for row, make in zip(planned_optimiser(device.dry), makers, strict=True):
        net = _updated(device.dry).make()[2].net.to(device.device).requires_grad_(True)
        step = make(net, settings)
        for p in net.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        times = device.time(step)
        if row["ours"]:
            ours = times.device_ms
        # Gradient, parameter, second moment and averages are read, all but the gradient written; the norm reads again.
        size = 4 * row["shape"][0] * (2 * (2 + len(DECAYS)) + 2)
        write(
            row
            | {
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


def updates(
    device: Device, deadline: Deadline, write: Callable[[Row], None], case: str, batch: int, ways: Sequence[Way]
) -> None:
    """Updates of ``batch``: ms of either turn and of a cycle, launches, idle share, peak memory."""
    slowest = 0.0
    for way, row in zip(ways, planned_updates(case, batch, ways, device.dry), strict=True):
        # Warm-up, cycle and parts of one that is as slow as the slowest so far.
        if deadline.left < 8e-3 * slowest:
            return
        device.forget_memory()
        try:
            row |= _measure(device, way, batch, deadline)
        except Exception as error:
            # One way that does not run, out of memory say, must not cost the others.
            row["left_out"] = reason(error)
        slowest = max(slowest, row["median_ms"] or 0.0)
        row["peak_MB"] = device.peak_MB()
        write(row)
        gc.collect()
        torch.compiler.reset()


def _problem(device: Device, batch: int) -> Problem:
    if device.dry:
        return replace(TINY, distill={**TINY.distill, "batch": 2})
    problem = PROBLEMS["cifar10"]
    return replace(problem, distill={**problem.distill, "batch": batch, "fake_turns": 5, "ema": DECAYS})


def _trainer(device: Device, way: Way, batch: int) -> Distiller | Published:
    config, dataset, teacher = _problem(device, batch).make()
    # A dry run's device has no graphs: a recorder of its own stands for them.
    dry = device.dry and captures(way.mode)
    mode = ("compiled" if compiles(way.mode) else "eager") if dry else way.mode
    run = replace(config.run, device=str(device.device), **{**way.run, "mode": mode})
    if way.distill is None:
        return Published(replace(config, run=run), dataset, teacher)
    changed = configs.merge(configs.to_mapping(replace(config, run=run)), {"distill": way.distill})
    distiller = trainers.distiller(configs.from_mapping(changed), dataset, teacher)
    if dry:
        distiller.capture(device.recorder())
    return distiller


def _measure(device: Device, way: Way, batch: int, deadline: Deadline) -> Row:
    trainer = _trainer(device, way, batch)
    with way.within():
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
