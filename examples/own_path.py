"""A path and an objective of your own: written down, checked, then trained and distilled on two-dimensional moons.

    python examples/own_path.py --out runs/own_path

On the path the data comes in sooner than on the linear one, ``x_t = t (2 - t) x + (1 - t) n``. The objective is RealUID
with another factor on the squared distance of teacher and fake model. The folder then holds both networks and a picture
of the student's samples. The defaults take about two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import realuid_fast as rf

ALPHA, BETA = 0.92, 0.94


@dataclass(frozen=True)
class Early(rf.paths.OneSidedPath):
    """``x_t = t (2 - t) x + (1 - t) n``: noise at ``t = 0``, data at ``t = 1``."""

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t * (2 - t), 1 - t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * (1 - t), -torch.ones_like(t)

    # The time at which a scale vanishes: conversions that divide by it are clipped there, and nowhere else.
    @property
    def a_zero(self) -> float:
        return 0.0

    @property
    def c_zero(self) -> float:
        return 1.0

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        """Solves ``c / a = sigma``, for a student's start and for samplers that are laws of the noise level."""
        return 1 - 2 * sigma / (1 + (1 + 4 * sigma**2).sqrt())


# With a name the path can be written into a network's file, and rf.load finds it there in a program that has this line.
rf.paths.PATHS["early"] = Early


def weighted_realuid(alpha: float, beta: float, factor: float) -> rf.objectives.Objective:
    """RealUID whose ``||f* - f||^2`` counts ``factor`` times."""
    return rf.objectives.Objective("WeightedRealUID", alpha=alpha, beta=beta, gamma=alpha, Q=factor * alpha)


def check_path(path: rf.paths.OneSidedPath) -> None:
    """Rates are the scales' derivatives, a noise level has its time, and a prediction keeps what it says elsewhere."""
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    a, c = path.scales(t)
    rates = tuple(torch.func.vmap(torch.func.grad(lambda t, i=i: path.scales(t)[i]))(t) for i in (0, 1))
    torch.testing.assert_close(path.rates(t), rates)
    torch.testing.assert_close(path.time_at_sigma(c / a), t)

    x, n = torch.randn(2, 25, 2, dtype=torch.float64)
    x_t, velocity = a[:, None] * x + c[:, None] * n, rates[0][:, None] * x + rates[1][:, None] * n
    for predict, out in {"velocity": velocity, "x0": x, "noise": n, "score": -n / c[:, None]}.items():
        for match, expected in {"velocity": velocity, "x0": x, "noise": n}.items():
            row = rf.paths.Coefficients(path.coefficients(t, match, predict), like=x)
            torch.testing.assert_close(row.k_out * out + row.k_x * x_t, expected)
    for match in rf.paths.MATCH_SPACES:
        ends = torch.tensor(path.t_range)
        assert torch.isfinite(path.coefficients(ends, match, "velocity")).all()


def check_objective(factor: float) -> None:
    """Both losses are what they are on paper, in float64."""
    objective, path = weighted_realuid(ALPHA, BETA, factor), Early()
    x, real, noise, teacher, fake = torch.randn(5, 8, 2, dtype=torch.float64)
    draw = path.draw(x, noise)
    a, c = (rate[:, None] for rate in path.rates(draw.t))
    target = a * x + c * noise

    def square(f: Tensor, scale: float, target: Tensor = target) -> Tensor:
        return (f - scale * target).square().sum(1).mean()

    student_loss = ALPHA * (square(teacher, BETA / ALPHA) - square(fake, BETA / ALPHA))
    student_loss += (1 - factor) * ALPHA * square(teacher, 1.0, fake)
    torch.testing.assert_close(rf.generator_loss(objective, draw, teacher, fake), student_loss)

    fake_loss = ALPHA * square(fake, BETA / ALPHA)
    fake_loss += (1 - ALPHA) * square(fake, (1 - BETA) / (1 - ALPHA), a * real + c * noise)
    both = path.draw(x, noise, real=real, t=draw.t)
    torch.testing.assert_close(rf.fake_loss(objective, both, torch.cat((fake, fake))), fake_loss)


def train(out: Path, teacher_updates: int, updates: int, batch: int, factor: float) -> None:
    path, objective = Early(sampler="stratified"), weighted_realuid(ALPHA, BETA, factor)
    moons, stream = rf.data.moons(), rf.NoiseStream(seed=0)
    network = {"kind": "mlp", "shape": [2], "width": 128, "depth": 3}

    teacher = rf.networks.build(network)
    adam = rf.optim.FusedAdam(teacher.parameters(), 2e-3, clip=5.0, ema_decays=(0.995,), ema_warmup=True)
    for _ in range(teacher_updates):
        draw = path.draw(moons.sample(batch)[0], stream.next_key())
        loss = rf.matching_loss(draw, teacher(draw.t, draw.x_t))
        adam.zero_grad()
        loss.backward()
        adam.step()
    teacher = rf.frozen_view(teacher, adam.averages(0.995))

    start = rf.sampling.default_start(path)
    student, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    fake_adam = rf.optim.FusedAdam(fake.parameters(), 1e-3, betas=(0.0, 0.999), clip=5.0)
    student_adam = rf.optim.FusedAdam(student.parameters(), 3e-4, betas=(0.0, 0.999), clip=5.0, ema_decays=(0.99,))
    frozen_fake, averaged = rf.frozen_view(fake), rf.frozen_view(student, student_adam.averages(0.99))

    def generate(net: nn.Module, count: int = batch) -> Tensor:
        return rf.sampling.one_step(net, torch.randn(count, 2), start, path=path)

    for _ in range(updates):
        for _ in range(3):
            draw = path.draw(generate(student).detach(), stream.next_key(), real=moons.sample(batch)[0])
            loss = rf.fake_loss(objective, draw, fake(draw.t, draw.x_t))
            fake_adam.zero_grad()
            loss.backward()
            fake_adam.step()
        draw = path.draw(generate(student), stream.next_key())
        loss = rf.generator_loss(objective, draw, teacher(draw.t, draw.x_t), frozen_fake(draw.t, draw.x_t))
        student_adam.zero_grad()
        loss.backward()
        student_adam.step()

    out.mkdir(parents=True, exist_ok=True)
    for role, net in (("teacher", teacher), ("student", averaged)):
        description = rf.teachers.Description(network, role, path="early", t_start=start if role == "student" else 0.0)
        rf.teachers.save(out / f"{role}.safetensors", net.state_dict(), description)
        samples = rf.sample(out / f"{role}.safetensors", 2000, steps=20 if role == "teacher" else None)
        distance = rf.metrics.sliced_wasserstein(samples, moons.pixels("heldout"))
        print(f"{role}: sliced Wasserstein distance {distance:.4f} to held-out points")
    rf.save_picture(samples, out / "samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/own_path"), help="folder for networks and picture")
    parser.add_argument("--teacher-updates", type=int, default=2000)
    parser.add_argument("--updates", type=int, default=1000, help="of the student, each with three of the fake model")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--factor", type=float, default=0.8, help="of the squared distance; 1 is RealUID")
    options = vars(parser.parse_args())
    torch.manual_seed(0)
    check_path(Early())
    check_objective(options["factor"])
    print("path and objective are what they say")
    train(**options)


if __name__ == "__main__":
    main()
