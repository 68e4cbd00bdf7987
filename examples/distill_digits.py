"""Distil the shipped digits teacher into a one-step generator: the whole job in one file, to be copied and changed.

    python examples/distill_digits.py --out runs/own_loop

The teacher needs 100 network evaluations a sample, the student one. The fake model starts at random weights, as in the
paper (arXiv 2509.22459, appendix D.1), and has several turns in each update; real digits act through it alone. The
folder then holds ``student.safetensors``, which ``rf.load`` reads, and the picture ``samples.png``.
The defaults take a few minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import realuid_fast as rf

CLASSES = 10
T_START = 0.28  # the student starts near the noise, not in it: there the teacher's weights already make varied samples
DECAY = 0.99  # of the student's moving average, which is evaluated and saved
WARMUP = 50  # steps in which a learning rate rises to its value


def distance(student: nn.Module, real: Tensor, count: int) -> float:
    """Fréchet distance of ``count`` one-step samples to ``real`` in the digit classifier's features."""
    z = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = rf.sampling.one_step(student, z, T_START, torch.arange(count) % CLASSES)
    return rf.metrics.frechet_distance(rf.metrics.digit_features(samples), rf.metrics.digit_features(real))


def optimiser(net: nn.Module, lr: float, averages: Sequence[float] = ()) -> tuple[rf.optim.FusedAdam, LinearLR]:
    """Adam with the clip and the moving averages in one pass, and the warm-up of its learning rate."""
    adam = rf.optim.FusedAdam(net.parameters(), lr, betas=(0.5, 0.999), clip=1.0, ema_decays=averages, ema_warmup=True)
    return adam, LinearLR(adam, start_factor=1 / WARMUP, total_iters=WARMUP)


def distill(out: Path, updates: int, fake_turns: int, batch: int, lr: float, evaluate_every: int, samples: int) -> None:
    digits = rf.data.digits()
    heldout = digits.pixels("heldout")
    path, objective = rf.paths.Linear(), rf.objectives.RealUID(alpha=0.92, beta=0.94)
    stream = rf.NoiseStream(seed=0)

    loaded = rf.load("digits")
    teacher = loaded.net  # in evaluation mode, without gradients
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    fake = rf.networks.build(loaded.description.network)

    fake_adam, fake_warmup = optimiser(fake, lr)
    student_adam, student_warmup = optimiser(student, lr, averages=(DECAY,))
    # Both share their memory with the networks in training, so that they follow every step.
    frozen_fake = rf.frozen_view(fake)
    averaged = rf.frozen_view(student, student_adam.averages(DECAY)).eval()

    for update in range(1, updates + 1):
        # Fake turns: generated rows and real ones in one batch, which share times, noise and labels.
        for _ in range(fake_turns):
            real, y = digits.sample(batch)
            assert y is not None  # digits have labels
            with torch.no_grad():
                x = rf.sampling.one_step(student, torch.randn_like(real), T_START, y)
            draw = path.draw(x, stream.next_key(), real=real)
            fake_loss = rf.fake_loss(objective, draw, fake(draw.t, draw.x_t, y.repeat(2)))
            fake_adam.zero_grad()
            fake_loss.backward()
            fake_adam.step()
            fake_warmup.step()

        # The student's turn: no real digits; gradients flow through the teacher and the frozen fake model into x.
        y = torch.randint(CLASSES, (batch,))
        x = rf.sampling.one_step(student, torch.randn(batch, 1, 8, 8), T_START, y)
        draw = path.draw(x, stream.next_key())
        student_loss = rf.generator_loss(
            objective, draw, teacher(draw.t, draw.x_t, y), frozen_fake(draw.t, draw.x_t, y)
        )
        student_adam.zero_grad()
        student_loss.backward()
        student_adam.step()
        student_warmup.step()

        if update % evaluate_every == 0 or update == updates:
            print(
                f"update {update}: fake loss {fake_loss.item():.2f}, student loss {student_loss.item():.3f}, "
                f"distance {distance(averaged, heldout, samples):.2f}",
                flush=True,
            )

    out.mkdir(parents=True, exist_ok=True)
    file = out / "student.safetensors"
    description = replace(
        loaded.description, role="student", t_start=T_START, teacher="digits", decay=DECAY, command=Path(__file__).name
    )
    rf.teachers.save(file, averaged.state_dict(), description)
    rf.save_picture(rf.sample(file, 100), out / "samples.png")
    print(f"student and samples are in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/own_loop"), help="folder for student and picture")
    parser.add_argument("--updates", type=int, default=500, help="turns of the student")
    parser.add_argument("--fake-turns", type=int, default=3, help="turns of the fake model in each update")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--evaluate-every", type=int, default=100, help="updates between two evaluations")
    parser.add_argument("--samples", type=int, default=2000, help="samples of an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    torch.manual_seed(options.pop("seed"))
    distill(**options)


if __name__ == "__main__":
    main()
