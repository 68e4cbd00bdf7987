"""The two turns under accelerate, which moves networks and batches and shares them between processes.

    python examples/with_accelerate.py --updates 300

``accelerate launch examples/with_accelerate.py`` runs it on several devices. Needs ``pip install accelerate``, which
the package does not.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import realuid_fast as rf

T_START = 0.28
PATH, OBJECTIVE = rf.paths.Linear(), rf.objectives.RealUID(alpha=0.92, beta=0.94)


def fake_loss(fake: nn.Module, student: nn.Module, real: Tensor, y: Tensor, key: Tensor) -> Tensor:
    """The fake model's turn: generated and real rows in one batch, which share times, noise and labels."""
    with torch.no_grad():
        x = rf.sampling.one_step(student, torch.randn_like(real), T_START, y)
    draw = PATH.draw(x, key, real=real)
    return rf.fake_loss(OBJECTIVE, draw, fake(draw.t, draw.x_t, y.repeat(2)))


def generator_loss(
    teacher: nn.Module, fake: nn.Module, student: nn.Module, z: Tensor, y: Tensor, key: Tensor
) -> Tensor:
    """The student's turn. The gradients that it leaves in the fake model are zeroed before that model's own turn."""
    draw = PATH.draw(rf.sampling.one_step(student, z, T_START, y), key)
    return rf.generator_loss(OBJECTIVE, draw, teacher(draw.t, draw.x_t, y), fake(draw.t, draw.x_t, y))


def digit_batches(batch: int) -> DataLoader[tuple[Tensor, ...]]:
    digits = rf.data.digits()
    assert digits.train_labels is not None  # digits have labels
    rows = TensorDataset(digits.pixels(), digits.train_labels)
    return DataLoader(rows, batch_size=batch, shuffle=True, drop_last=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=300, help="steps of both optimisers together")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="picture of the student's samples")
    options = parser.parse_args()
    torch.manual_seed(0)

    accelerator = Accelerator(cpu=options.cpu)
    teacher = rf.load("digits").net
    fake, student = (copy.deepcopy(teacher).train().requires_grad_(True) for _ in range(2))
    optimisers = [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999)) for net in (fake, student)]
    # Trained networks are wrapped; the teacher is only moved to the device.
    teacher = teacher.to(accelerator.device)
    fake, student, fake_optimiser, student_optimiser, batches = accelerator.prepare(
        fake, student, *optimisers, digit_batches(options.batch)
    )
    # Every process draws its own noise.
    stream = rf.NoiseStream(seed=accelerator.process_index, device=accelerator.device)

    update = 0
    while update < options.updates:
        for real, y in batches:
            if update % 3 < 2:
                name, net, optimiser = "fake", fake, fake_optimiser
                loss = fake_loss(fake, student, real, y, stream.next_key())
            else:
                name, net, optimiser = "generator", student, student_optimiser
                loss = generator_loss(teacher, fake, student, torch.randn_like(real), y, stream.next_key())
            optimiser.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            update += 1
            if update > options.updates - 3 or update % 100 == 0:
                accelerator.print(f"update {update}: {name} loss {loss.item():.3f}")
            if update == options.updates:
                break

    if accelerator.is_main_process:
        net = accelerator.unwrap_model(student).eval().cpu()
        with torch.no_grad():
            samples = rf.sampling.one_step(net, torch.randn(100, 1, 8, 8), T_START, torch.arange(100) % 10)
        rf.save_picture(samples, options.out)


if __name__ == "__main__":
    main()
