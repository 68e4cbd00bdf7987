"""From a folder of images to a one-step generator: data, a teacher trained from nothing, and its distillation.

    python examples/own_images.py PATH/TO/IMAGES --out runs/own_images

Folders called ``train`` and ``test`` are the split, and other folders the classes. The file is short enough to be
changed; ``realuid-fast train-teacher`` and ``distill`` with ``--config folder`` do the same and can be resumed. The
defaults train for hours on a CPU.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import realuid_fast as rf

T_START, DECAY = 0.28, 0.999
PATH = rf.paths.Linear(sampler="stratified")


def twice(labels: Tensor | None) -> Tensor | None:
    """Labels of generated rows and, below them, of real ones; None for images without classes."""
    return None if labels is None else labels.repeat(2)


def optimiser(net: nn.Module, lr: float, beta1: float) -> rf.optim.FusedAdam:
    betas = (beta1, 0.999)
    return rf.optim.FusedAdam(net.parameters(), lr, betas, clip=1.0, ema_decays=(DECAY,), ema_warmup=True)


def train_teacher(images: rf.data.Dataset, network: dict[str, Any], updates: int, batch: int) -> nn.Module:
    """A flow-matching network at its moving average, frozen."""
    net, stream = rf.networks.build(network), rf.NoiseStream(seed=0)
    adam = optimiser(net, 1e-3, 0.9)
    for update in range(1, updates + 1):
        x, y = images.sample(batch)
        draw = PATH.draw(x, stream.next_key())
        loss = rf.matching_loss(draw, net(draw.t, draw.x_t, y))
        adam.zero_grad()
        loss.backward()
        adam.step()
        if update % 100 == 0 or update == updates:
            print(f"teacher, update {update}: loss {loss.item():.2f}", flush=True)
    return rf.frozen_view(net, adam.averages(DECAY)).eval()


def distill(images: rf.data.Dataset, teacher: nn.Module, updates: int, batch: int, fake_turns: int) -> nn.Module:
    """The student at its moving average, frozen."""
    objective, stream = rf.objectives.RealUID(alpha=0.92, beta=0.94), rf.NoiseStream(seed=1)
    student, fake = (copy.deepcopy(teacher).train().requires_grad_(True) for _ in range(2))
    student_adam, fake_adam = (optimiser(net, 3e-4, 0.5) for net in (student, fake))
    frozen_fake = rf.frozen_view(fake)
    for update in range(1, updates + 1):
        for _ in range(fake_turns):
            real, y = images.sample(batch)
            with torch.no_grad():
                x = rf.sampling.one_step(student, torch.randn_like(real), T_START, y)
            draw = PATH.draw(x, stream.next_key(), real=real)
            fake_loss = rf.fake_loss(objective, draw, fake(draw.t, draw.x_t, twice(y)))
            fake_adam.zero_grad()
            fake_loss.backward()
            fake_adam.step()
        # Real images give the student their labels and nothing else.
        x = rf.sampling.one_step(student, torch.randn_like(real), T_START, y)
        draw = PATH.draw(x, stream.next_key())
        loss = rf.generator_loss(objective, draw, teacher(draw.t, draw.x_t, y), frozen_fake(draw.t, draw.x_t, y))
        student_adam.zero_grad()
        loss.backward()
        student_adam.step()
        if update % 100 == 0 or update == updates:
            print(f"student, update {update}: fake loss {fake_loss.item():.2f}, loss {loss.item():.3f}", flush=True)
    return rf.frozen_view(student, student_adam.averages(DECAY)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, help="a folder of images, nested or not")
    parser.add_argument("--out", type=Path, default=Path("runs/own_images"), help="folder for networks and pictures")
    parser.add_argument("--size", type=int, default=32, help="side that images are scaled and cut to, divisible by 4")
    parser.add_argument("--channels", type=int, default=32, help="width of the network's first level, divisible by 8")
    parser.add_argument("--teacher-updates", type=int, default=20000)
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--fake-turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)

    images = rf.data.load({"name": "folder", "path": str(options.images), "size": options.size})
    network = {
        "kind": "unet", "dim": list(images.shape), "num_channels": options.channels, "channel_mult": [1, 2, 2],
        "norm_groups": 8, "time_scale": 100.0, "class_cond": images.classes > 0, "num_classes": images.classes,
    }  # fmt: skip
    print(f"{len(images)} images of shape {images.shape}, {images.classes} classes")

    options.out.mkdir(parents=True, exist_ok=True)
    teacher = train_teacher(images, network, options.teacher_updates, options.batch)
    description = rf.teachers.Description(network, data=images.config, preprocessing=images.preprocessing, decay=DECAY)
    rf.teachers.save(options.out / "teacher.safetensors", teacher.state_dict(), description)

    student = distill(images, teacher, options.updates, options.batch, options.fake_turns)
    description = replace(description, role="student", t_start=T_START, teacher="teacher.safetensors")
    rf.teachers.save(options.out / "student.safetensors", student.state_dict(), description)

    for role, steps in (("teacher", 20), ("student", None)):
        samples = rf.sample(options.out / f"{role}.safetensors", 64, steps=steps)
        rf.save_picture(samples, options.out / f"{role}.png")
    print(f"teacher, student and their pictures are in {options.out}")


if __name__ == "__main__":
    main()
