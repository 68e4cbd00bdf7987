"""Sampling: orders of convergence on a closed form, the generator as one Euler step, errors."""

import math

import pytest
import torch
from torch import nn

from realuid_fast import sampling
from realuid_fast.errors import UserError


class GaussianVelocity(nn.Module):
    """Exact velocity of the linear path for data N(m, s^2): E[x - n | x_t]."""

    def __init__(self, mean=1.5, std=0.5):
        super().__init__()
        self.mean, self.std, self.calls = mean, std, 0

    def forward(self, t, x, y=None):
        self.calls += 1
        t = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        variance = t**2 * self.std**2 + (1 - t) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / variance * (x - t * self.mean)


def test_solvers_converge_at_their_order():
    """The flow of a Gaussian maps noise n to mean + std n."""
    net, noise = GaussianVelocity(), torch.randn(50, 3, dtype=torch.float64)
    exact = net.mean + net.std * noise
    error = {
        (solver, steps): (sampling.integrate(net, noise, steps, solver) - exact).abs().max().item()
        for solver in ("euler", "heun")
        for steps in (64, 128)
    }
    assert math.log2(error["euler", 64] / error["euler", 128]) == pytest.approx(1, abs=0.15)
    assert math.log2(error["heun", 64] / error["heun", 128]) == pytest.approx(2, abs=0.3)
    assert error["heun", 64] < error["euler", 128]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_evaluations_are_counted(solver):
    net = GaussianVelocity()
    sampling.integrate(net, torch.randn(4, 2), 5, solver)
    assert net.calls == sampling.evaluations(5, solver)


@pytest.mark.parametrize("t_start", [0.0, 0.28])
def test_one_step_is_one_euler_step(t_start):
    net, z = GaussianVelocity(), torch.randn(6, 1, 4, 4)
    expected = sampling.integrate(net, (1 - t_start) * z, 1, t_start=t_start)
    torch.testing.assert_close(sampling.one_step(net, z, t_start), expected)
    assert net.calls == 2


def test_one_step_carries_gradients_and_labels():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 2))

        def forward(self, t, x, y=None):
            return self.table[y] - x

    net, y = Labelled(), torch.tensor([0, 2])
    sampling.one_step(net, torch.randn(2, 2), 0.5, y).sum().backward()
    assert torch.equal(net.table.grad, torch.tensor([[0.5, 0.5], [0, 0], [0.5, 0.5]]))
    assert torch.equal(sampling.integrate(net, torch.randn(2, 2), 1, labels=y), torch.zeros(2, 2))


def test_errors_name_the_argument():
    net, noise = GaussianVelocity(), torch.zeros(2, 2)
    with pytest.raises(UserError, match="steps must be at least 1"):
        sampling.integrate(net, noise, 0)
    with pytest.raises(UserError, match="solver must be one of euler, heun"):
        sampling.integrate(net, noise, 3, "rk4")
    with pytest.raises(UserError, match="t_start"):
        sampling.integrate(net, noise, 3, t_start=1.0)
    with pytest.raises(UserError, match="t_start"):
        sampling.one_step(net, noise, -0.1)
