"""The two turns in Lightning: manual optimisation with two optimisers.

    python examples/with_lightning.py --updates 300

``max_steps`` counts the steps of both optimisers. Needs ``pip install lightning``, which the package does not.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
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


class Distillation(LightningModule):
    """Turns of the fake model, then one of the student."""

    def __init__(self, fake_turns: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.teacher = rf.load("digits").net
        self.fake, self.student = (copy.deepcopy(self.teacher).train().requires_grad_(True) for _ in range(2))
        self.fake_turns = fake_turns

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999)) for net in (self.fake, self.student)]

    def on_fit_start(self) -> None:
        # The stream's state lives on the device, which is known from here on.
        self.stream = rf.NoiseStream(seed=0, device=self.device)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real, y), optimisers = batch, self.optimizers()
        assert isinstance(optimisers, list)
        fake_optimiser, student_optimiser = optimisers
        key = self.stream.next_key()
        if (batch_idx + 1) % (self.fake_turns + 1):
            name, optimiser, loss = "fake", fake_optimiser, fake_loss(self.fake, self.student, real, y, key)
        else:
            name, optimiser = "generator", student_optimiser
            loss = generator_loss(self.teacher, self.fake, self.student, torch.randn_like(real), y, key)
        optimiser.zero_grad()
        self.manual_backward(loss)
        optimiser.step()
        self.log(f"{name} loss", loss.detach(), prog_bar=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=300, help="steps of both optimisers together")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="picture of the student's samples")
    options = parser.parse_args()
    torch.manual_seed(0)

    module = Distillation()
    trainer = Trainer(
        max_steps=options.updates, accelerator=options.accelerator, devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, digit_batches(options.batch))
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})

    student = rf.frozen_view(module.student).eval().cpu()
    samples = rf.sampling.one_step(student, torch.randn(100, 1, 8, 8), T_START, torch.arange(100) % 10)
    rf.save_picture(samples, options.out)


if __name__ == "__main__":
    main()
