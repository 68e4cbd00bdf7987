"""SparseFusion's target: the data after several of the teacher's steps, alone, as SDS's row and in a trainer's turn."""

import copy

import pytest
import torch

import realuid_fast as rf
from realuid_fast import paths, sampling
from realuid_fast.coefficients import Coefficients
from realuid_fast.errors import UserError
from realuid_fast.models.multi_step import MultiStep
from realuid_fast.models.pairs import mean_absolute, pull
from realuid_fast.noise import normal
from realuid_fast.objectives import SDS

from ..helpers import MLP, NULL, POINTS, distiller

SPARSE = {"objective": {"name": "sds"}, "target_steps": 4}
X0 = {"match": "x0", "weight": "noise"}


class Network(torch.nn.Module):
    """A network in float64 whose output bends with the time and the state."""

    def forward(self, t, x, y=None):
        return torch.tanh(x * 1.3 + t.double()[:, None]) - 0.4 * x


def arrived(net, path, predict, t, x_t, steps):
    """The data in the last of ``steps`` DDIM steps from ``x_t`` to the data's end, written out for one row."""
    end, x = sampling.ends(path).data, x_t
    for i in range(steps):
        now, then = (t + (end - t) * place / steps for place in (i, i + 1))
        (a, c), (a_then, c_then) = path.scales(now), path.scales(then)
        coef = Coefficients(path.coefficients(now[None], "x0", predict), x)
        x0 = coef.k_out * net(path.network_time(now[None], predict), x) + coef.k_x * x
        x = a_then * x0 + c_then * (x - a * x0) / c
    return x0


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("path", "predict"), [(paths.Linear(), "velocity"), (paths.VPCosine(), "noise")])
def test_the_loss_is_sparsefusions(path, predict, steps):
    """zhizdev/sparsefusion at 0324bae: ``(1 - alpha_cumprod) |x - x0|`` with the sample ``x0`` held fixed, in float64.

    Its squared form is SDS's row, whose gradient is ``w (x - x0)``.
    """
    draws, net = torch.Generator().manual_seed(0), Network()
    x, n = torch.randn(2, 5, 3, dtype=torch.float64, generator=draws)
    x, t = x.requires_grad_(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    draw = path.draw(x, n, match="x0", predict=predict, weight=paths.weight("noise", path), t=t)
    out = sampling.multi_step(net, draw.t, draw.x_t.detach(), steps, None, path, predict)
    coef = Coefficients(draw.coef, x)
    found = coef.k_out * out + coef.k_x * draw.x_t.detach()
    rows = [arrived(net, path, predict, t[i], draw.x_t[i : i + 1].detach(), steps) for i in range(5)]
    x0, weight = torch.cat(rows), path.scales(t)[1] ** 2
    torch.testing.assert_close(found, x0, rtol=1e-10, atol=1e-10)
    if steps == 1:
        assert torch.equal(out, net(path.network_time(t, predict), draw.x_t))

    loss = rf.generator_loss(SDS(), draw, out)
    theirs = (weight[:, None] * x * (x - x0).detach()).sum() / 5
    torch.testing.assert_close(loss, theirs, rtol=1e-10, atol=1e-10)
    squared = (weight[:, None] * (x - x0) ** 2).sum() / 2 / 5
    gradient = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(squared, x)[0], rtol=1e-10, atol=1e-10)

    value, gradient = pull(lambda x, target: weight * mean_absolute(x, target), x.detach(), found)
    published = (weight[:, None] * (x - x0).abs()).mean()
    torch.testing.assert_close(value, 3 * published.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, 3 * torch.autograd.grad(published, x)[0], rtol=1e-10, atol=1e-10)


def test_a_row_at_the_datas_end_stays_where_it_is():
    x, net, path = torch.randn(3, 2, dtype=torch.float64), Network(), paths.Linear()
    t = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    out = sampling.multi_step(net, t, x, 3)
    assert torch.isfinite(out).all()
    coef = Coefficients(path.coefficients(t, "x0", "velocity"), x)
    assert torch.equal((coef.k_out * out + coef.k_x * x)[1:], x[1:])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_generators_turn_takes_the_teachers_steps(guidance):
    """``w(t) (x - x0)``, ``w = (1 - t)^2``, by four Euler steps of the guided teacher; one step is another gradient."""
    trainer = distiller(NULL, path=X0, distill={**SPARSE, "guidance": guidance})
    trainer.update()
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.parameters()]

    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    trainer.generator_optimiser.zero_grad()
    labels, teacher = trainer._conditions(8)[0], trainer.teacher.net
    x = trainer.generator(normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8)), labels)
    t = trainer.path.sample_time(8, trainer.draws)
    x_t = rf.interpolate(x.detach(), trainer.path.coefficients(t, "x0", "velocity"), trainer.noise.next_key())
    no_label = torch.full_like(labels, teacher.null_label)
    with torch.no_grad():
        state, step = x_t, (1 - t) / 4
        for i in range(4):
            seen = t + i * step
            c, u = (teacher(seen, state, which) for which in (labels, no_label))
            state = state + step.view(-1, 1, 1, 1) * (u + guidance * (c - u))
    x.backward(((1 - t) ** 2).view(-1, 1, 1, 1) * (x - state).detach() / 8)
    for mine, p in zip(explicit, trainer.generator.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-7)


def test_what_takes_no_further_target_is_named():
    for given, sentence in (
        ({"distill": {"target_steps": 2}}, "distill.target_steps above 1 are not for distill.objective RealUID"),
        ({"distill": SPARSE, "run": {"mode": "compiled"}}, r"target_steps above 1 are not for run\.mode compiled"),
        ({"distill": SPARSE, "path": {**X0, "guidance": {"weight": "scale"}}}, r"are not for path\.guidance"),
    ):
        with pytest.raises(UserError, match=sentence):
            distiller(MLP, POINTS, **{"path": X0, **given})
    with pytest.raises(UserError, match="target_steps need a path from noise alone to data, not BrownianBridge"):
        MultiStep(Network(), 2, paths.BrownianBridge(), "x0")
    with pytest.raises(UserError, match="called with x_t itself, not one that predicts edm"):
        MultiStep(Network(), 2, paths.VE(), "edm")
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        sampling.multi_step(Network(), torch.ones(1), torch.ones(1, 2), 0)
