"""The same run three ways from the same draws: as published, in parity mode, in fast mode: ``python -m bench.parity``.

300 updates, of five fake turns each, on images of CIFAR-10's shape made of the handwritten digits (enlarged, in random
colours), with a small class-conditional U-Net and a teacher that is trained here first. The published way is
:class:`bench.published.Published` in plain PyTorch; it is handed the very noise, times and batches that the trainer
draws. Parity mode is the trainer with ``run.parity``, eager and in float32; fast mode the same with compiled networks,
and eager with the fake turns in bfloat16. Two more runs are there to compare differences with: the published way with
its networks in another memory layout, which rounds otherwise, and parity mode with another seed, which draws otherwise.
Writes parity.json, parity.md and parity.png; some minutes a way on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from realuid_fast import data
from realuid_fast.data import Dataset, to_bytes
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build
from realuid_fast.noise import NoiseStream, normal
from realuid_fast.settings import Config
from realuid_fast.teachers import Model
from realuid_fast.train.distill import Distiller

from . import machine, plots, report
from .published import Published

PUBLISHED, ROUNDED, PARITY, FAST, HALF, OTHER = (
    "as published, plain PyTorch",
    "the same in channels_last",
    "parity mode, eager, float32",
    "fast mode, compiled, float32",
    "fast mode, bf16 fake turn",
    "parity mode, another seed",
)
WAYS: dict[str, list[str]] = {
    PUBLISHED: [],
    ROUNDED: [],
    PARITY: [],
    FAST: ["run.mode=compiled"],
    HALF: ["distill.fake_precision=bf16"],
    OTHER: ["run.seed=1"],
}
SIDE, EARLY = 32, 50
NETWORK = {
    "kind": "unet", "dim": [3, SIDE, SIDE], "num_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1,
    "norm_groups": 4, "middle_attention": False, "class_cond": True, "num_classes": 10, "dropout": 0.1,
}  # fmt: skip
SETTINGS = {
    "network": NETWORK,
    "teacher": {"batch": 16, "optimiser": {"lr": 1e-3, "warmup": 50}, "ema": [0.99], "export": 0.99},
    "distill": {
        "teacher": "here",
        "batch": 4,
        "fake_turns": 5,
        "generator": {"lr": 5e-4, "warmup": 20},
        "fake": {"lr": 5e-4, "warmup": 20},
        "ema": [0.999],
        "export": 0.999,
    },
    "run": {"parity": True},
}
Curves = dict[str, list[float]]


def images() -> Dataset:
    """The digits' training images at CIFAR-10's shape: enlarged, each between two random colours."""
    digits, draws = data.digits(), torch.Generator().manual_seed(0)
    ink = nn.functional.interpolate(digits.pixels(), size=SIDE, mode="bilinear", align_corners=False).add(1).div(2)
    back, front = torch.rand(2, len(ink), 3, 1, 1, generator=draws)
    pixels = to_bytes(2 * (0.5 * back + ink * (0.5 + 0.5 * front - 0.5 * back)) - 1)
    return Dataset(
        "coloured digits", pixels, pixels, digits.train_labels, digits.train_labels, config={"name": "digits"}
    )


def teacher(dataset: Dataset, updates: int) -> Model:
    """A teacher trained on the images for so many updates."""
    trainer = trainers.teacher_trainer(
        configs.from_mapping(configs.merge(SETTINGS, {"teacher": {"updates": updates}})), dataset
    )
    for _ in range(updates):
        trainer.update()
    state, description = trainer.exported()
    net = build(description.network)
    net.load_state_dict(state)
    return Model(net.eval(), description)


class Draws:
    """Draws for :class:`Published` the numbers that a :class:`Distiller` in parity mode will draw, from its state."""

    def __init__(self, ours: Distiller, plain: Published) -> None:
        state = ours.state_dict()
        self._noise, self._times = NoiseStream(0, ours.device), torch.Generator(ours.device)
        self._noise.load_state_dict(state["noise"])
        self._times.set_state(state["ranks"][0]["draws"])
        plain.batches.load_state_dict(state["batches"])
        # Both start from the same fake model. If it is untrained, it is the trainer's.
        plain.fake.load_state_dict(ours.fake.state_dict())
        self._plain, self._path, self._like, self._cycle = plain, ours.path, ours._like, ours._like_cycle

    def update(self) -> dict[str, Tensor]:
        """One update of the published algorithm; its losses and gradient norms, the fake model's means over turns."""
        plain = self._plain
        batches = [plain.batches.next() for _ in range(plain.turns + 1)]
        made = normal(self._noise.next_key(), self._cycle).split(plain.batch)
        found = []
        for z, (real, y) in zip(made, batches, strict=False):
            t, n = self._drawn()
            found.append(plain.fake_turn(z, y if plain.labelled else None, t, n, real))
        z, y = normal(self._noise.next_key(), self._like), batches[-1][1]
        generator = plain.generator_turn(z, y if plain.labelled else None, *self._drawn())
        fake = [torch.stack(values).mean() for values in zip(*found, strict=True)]
        names = (f"{who} {what}" for who in ("fake", "generator") for what in ("loss", "gradient"))
        return dict(zip(names, (*fake, *generator), strict=True))

    def _drawn(self) -> tuple[Tensor, Tensor]:
        t = self._path.sample_time(self._plain.batch, self._times, self._like.device)
        return t, normal(self._noise.next_key(), self._like)


def run(way: str, dataset: Dataset, model: Model, updates: int) -> tuple[Curves, dict[str, Tensor], float]:
    """The curves of one way, the generator's parameters at its end, and its seconds."""
    ours = trainers.distiller(_config(WAYS[way], updates), dataset, _copy(model))
    net, update = ours.generator.net, _ours(ours)
    if way in (PUBLISHED, ROUNDED):
        plain = Published(_config([], updates), dataset, _copy(model))
        if way == ROUNDED:
            for each in (plain.generator, plain.fake, plain.teacher):
                each.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        net, draws = plain.generator, Draws(ours, plain)
        update = lambda: {name: float(value) for name, value in draws.update().items()}  # noqa: E731
    curves: Curves = {"fake loss": [], "generator loss": []}
    begin = time.perf_counter()
    for number in range(updates):
        values = update()
        for name, curve in curves.items():
            curve.append(values[name])
        if (number + 1) % 50 == 0:
            print(f"{way}: update {number + 1}", file=sys.stderr, flush=True)
    return curves, {k: v.detach().clone() for k, v in net.state_dict().items()}, time.perf_counter() - begin


def _ours(trainer: Distiller) -> Callable[[], dict[str, float]]:
    def update() -> dict[str, float]:
        trainer.update()
        return trainer.meters.read()

    return update


def _config(overrides: Sequence[str], updates: int) -> Config:
    words = configs.nested([*overrides, f"distill.updates={updates}"])
    return configs.from_mapping(configs.merge(SETTINGS, words))


def _copy(model: Model) -> Model:
    # The trainer changes the network that it is given, so build one for it.
    net = build(model.description.network)
    net.load_state_dict(model.net.state_dict())
    return Model(net.eval(), model.description)


def row(way: str, curves: Curves, state: Mapping[str, Tensor], first: Mapping[str, Any]) -> dict[str, Any]:
    """A way's run compared with the published one, ``first``, which holds ``curves``, ``state`` and ``start``."""
    found: dict[str, Any] = {"way": way, "curves": curves}
    for name, curve in curves.items():
        ours, theirs = (
            torch.tensor(curve, dtype=torch.float64),
            torch.tensor(first["curves"][name], dtype=torch.float64),
        )
        # A generator loss is a difference and passes through zero, so divide by the size of the whole curve.
        apart = (ours - theirs).abs() / theirs.square().mean().sqrt()
        found[name] = {
            "mean": float(ours.mean()),
            f"largest difference in {EARLY}": float(apart[:EARLY].max()),
            "median difference": float(apart.median()),
        }
    start, end = first["start"], first["state"]
    moved, missed = (sum(float((x[k] - y[k]).square().sum()) for k in start) for x, y in ((end, start), (state, end)))
    found["parameters apart, share of way"] = (missed / moved) ** 0.5
    return found


def table(rows: Sequence[Mapping[str, Any]], described: Mapping[str, Any], updates: int) -> str:
    header = ["from the same draws"]
    for name in ("fake loss", "generator loss"):
        header += [f"{name}, mean", f"from published, at most in {EARLY} updates", f"median over {updates}"]
    header.append("generator's parameters apart, of the way gone")
    lines = []
    for found in rows:
        cells = [found["way"]]
        for name in ("fake loss", "generator loss"):
            mean, early, middle = found[name].values()
            cells += [f"{mean:,.0f}", _share(early), _share(middle)]
        lines.append([*cells, _share(found["parameters apart, share of way"])])
    return report.markdown(header, lines) + (
        f"\n`{described['command']}` on {machine.sentence(described)}. Differences of one update's "
        "losses as shares of the root mean square of the published run's losses.\n"
    )


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.2%}" if value >= 1e-3 else f"{value:.0e}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=300, help="of every way (default: 300)")
    parser.add_argument("--teacher-updates", type=int, default=200, help="of the teacher before (default: 200)")
    parser.add_argument("--out", type=report._folder, default=report.RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    described = report.start("bench.parity", argv, threads=1)
    dataset = images()
    model = teacher(dataset, options.teacher_updates)
    start = {name: value.clone() for name, value in model.net.state_dict().items()}
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for way in WAYS:
        curves, state, seconds = run(way, dataset, model, options.updates)
        first = first or {"curves": curves, "state": state, "start": start}
        rows.append(row(way, curves, state, first) | {"seconds": round(seconds, 1)})
    text = table(rows, described, options.updates)
    content = {"machine": described, "updates": options.updates, "settings": SETTINGS, "rows": rows}
    (options.out / "parity.json").write_text(json.dumps(content) + "\n")
    (options.out / "parity.md").write_text(text)
    plots.parity({found["way"]: found["curves"] for found in rows}, options.out / "parity.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
