"""Progressive halving: targets by the paper's algorithm, on Gaussians whose flow is known, and a trainer's step."""

import pytest
import torch

from realuid_fast import data, paths, sampling, teachers
from realuid_fast.coefficients import Coefficients
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.models.halving import Halving
from realuid_fast.noise import normal

from ..helpers import MLP, NULL, POINTS, random_network, settings

CPU = torch.device("cpu")
MEAN, VARIANCE = 0.7, 0.36
CASES = [
    (paths.Linear(), "velocity"), (paths.Linear(data_at=0), "velocity"), (paths.Trigonometric(), "v"),
    (paths.VP(), "noise"), (paths.VE(), "edm"),
]  # fmt: skip


class AtTimes(torch.nn.Module):
    """A network in float64 by its prediction of the data at path times of a list, which it is called with."""

    def __init__(self, path, predict, times, x0):
        super().__init__()
        self.path, self.predict, self.x0 = path, predict, x0
        self.t = torch.tensor(times, dtype=torch.float64)
        self.seen = path.network_time(self.t, predict).double()

    def forward(self, time, x, y=None):
        t = self.t[(self.seen - time[:, None].double()).abs().argmin(1)]
        x_t = x.double() / self.path.network_input(torch.ones(len(x), 1, dtype=torch.float64), t, self.predict)
        coef = Coefficients(self.path.coefficients(t, "x0", self.predict), x_t)
        return (self.x0(t, x_t) - coef.k_x * x_t) / coef.k_out


def gaussian(path):
    """The mean of the data given ``x_t``, for data of N(0.7, 0.36)."""

    def x0(t, x_t):
        a, c = (scale[:, None] for scale in path.scales(t))
        return MEAN + a * VARIANCE / (a**2 * VARIANCE + c**2) * (x_t - a * MEAN)

    return x0


def halved(path, predict, steps):
    """The teacher of a Gaussian, its halving, and the times of its grid."""
    halving = Halving(torch.nn.Identity(), steps, path, predict, CPU)
    times = halving._rows[:, 0].tolist()
    halving.teacher = AtTimes(path, predict, times, gaussian(path))
    return halving, times


@pytest.mark.parametrize(("path", "predict"), CASES)
def test_the_target_is_the_papers(path, predict):
    """Salimans and Ho (2202.00512), algorithm 2, in float64: two DDIM steps, and the data that one step would need."""
    halving, times = halved(path, predict, 3)
    z_t = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(times[:-1:2], dtype=torch.float64)
    found = halving.target(t, z_t)
    for row in range(3):
        (a, c), z = path.scales(torch.tensor(times[2 * row], dtype=torch.float64)), z_t[row : row + 1]
        for now, then in ((2 * row, 2 * row + 1), (2 * row + 1, 2 * row + 2)):
            now, then = (torch.tensor([times[i]], dtype=torch.float64) for i in (now, then))
            x = gaussian(path)(now, z)
            noise = (z - path.scales(now)[0] * x) / path.scales(now)[1]
            z = path.scales(then)[0] * x + path.scales(then)[1] * noise
        a_then, c_then = path.scales(then)
        x = (z - c_then / c * z_t[row]) / (a_then - c_then / c * a)
        coef = Coefficients(path.coefficients(t[row : row + 1], "x0", predict), z)
        torch.testing.assert_close(coef.k_out * found[row] + coef.k_x * z_t[row], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("path", "predict"), CASES)
def test_a_student_that_has_learned_makes_its_teachers_samples_in_half_the_steps(path, predict):
    halving, times = halved(path, predict, 4)

    def learned(t, x_t):
        coef = Coefficients(path.coefficients(t, "x0", predict), x_t)
        return coef.k_out * halving.target(t, x_t) + coef.k_x * x_t

    student = AtTimes(path, predict, times[:-1:2], learned)
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = sampling.integrate(student, z, 4, "ddim", path=path, predict=predict)
    torch.testing.assert_close(
        made, sampling.integrate(halving.teacher, z, 8, "ddim", path=path, predict=predict), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("path", "predict"), CASES[:3])
def test_fine_steps_follow_the_gaussians_flow(path, predict):
    """The flow takes ``z`` to ``mean + deviation z``; its DDIM steps are off by the grid's width."""
    errors = []
    for steps in (32, 64):
        halving, times = halved(path, predict, steps)
        t = torch.tensor(times[:-1:2], dtype=torch.float64)[1:]
        a, c = (scale[:, None] for scale in path.scales(t))
        z = torch.linspace(-2, 2, len(t), dtype=torch.float64)[:, None]
        z_t = a * MEAN + (a**2 * VARIANCE + c**2).sqrt() * z
        coef = Coefficients(path.coefficients(t, "x0", predict), z_t)
        x = coef.k_out * halving.target(t, z_t) + coef.k_x * z_t
        a_then, c_then = (scale[:, None] for scale in path.scales(torch.tensor(times[2::2], dtype=torch.float64)[1:]))
        reached = a_then * x + c_then / c * (z_t - a * x)
        exact = a_then * MEAN + (a_then**2 * VARIANCE + c_then**2).sqrt() * z
        errors.append(float((reached - exact).abs().max()))
    assert errors[0] < 3e-3
    assert errors[1] < errors[0] / 2.5  # of second order in a step


def teaching(folder, network, dataset, **teacher):
    held, source = data.load(dataset), folder / "source.safetensors"
    teachers.save(source, random_network(network).state_dict(), teachers.Description(network, data=held.config))
    own = {"halved": str(source), "steps": 3, **teacher}
    return trainers.teacher_trainer(configs.from_mapping(settings("x", data=held.config, teacher=own)), held)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_step_of_halving_equals_plain_autograd(guided, tmp_path):
    """``||f - v~||^2``, ``v~`` the mean of the teacher's two velocities; a guided network at scales of its own."""
    trainer = teaching(tmp_path, {**NULL, "guided": True} if guided else MLP, "digits" if guided else POINTS)
    teacher = teachers.load(tmp_path / "source.safetensors").net
    trainer.update()
    noise, state, batches = trainer.noise.state_dict(), trainer.draws.get_state(), trainer.batches.state_dict()
    noise = {name: value.clone() for name, value in noise.items()}
    trainer._backward()
    explicit = [p.grad.clone() for p in trainer.net.parameters()]
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(state)
    trainer.batches.load_state_dict(batches)
    x, y = trainer.batches.next()
    t = torch.randint(3, (8,), generator=trainer.draws) / 3
    at = t.view(-1, *[1] * (x.dim() - 1))
    n = normal(trainer.noise.next_key(), x)
    scale = {"guidance": 1 + 3 * torch.rand(8, generator=trainer.draws)} if guided else {}
    y, z_t = (y if guided else None), at * x + (1 - at) * n
    with torch.no_grad():
        first = teacher(t, z_t, y, **scale)
        second = teacher(t + 1 / 6, z_t + first / 6, y, **scale)
    loss = (trainer.net(t, z_t, y, **scale) - (first + second) / 2).square().sum() / 8
    for mine, p in zip(explicit, torch.autograd.grad(loss, [*trainer.net.parameters()]), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-4 * float(p.abs().max()) + 1e-6)
    z = torch.randn(4, *x.shape[1:])
    labels = torch.arange(4) if guided else None
    expected = sampling.integrate(trainer.averaged, z, 3, "ddim", labels)
    torch.testing.assert_close(trainer.sample(z, labels), expected)


def test_what_cannot_be_halved_is_named(tmp_path):
    with pytest.raises(UserError, match="halved needs a path from noise alone to data, not BrownianBridge"):
        Halving(torch.nn.Identity(), 2, paths.BrownianBridge(), "velocity", CPU)
    with pytest.raises(UserError, match=r"teacher\.halved goes with neither guided nor label_dropout nor coupling"):
        teaching(tmp_path, MLP, POINTS, coupling=True)
    with pytest.raises(UserError, match=r"teacher\.guided and teacher\.halved are two stages: give one of them"):
        teaching(tmp_path, MLP, POINTS, guided="x")
    with pytest.raises(UserError, match=r"teacher\.steps must be at least 1, got 0"):
        teaching(tmp_path, MLP, POINTS, steps=0)
