"""Students of several steps: their generator, their training, their file and its samples."""

import math

import pytest
import torch

import realuid_fast as rf
from realuid_fast import paths, sampling, teachers
from realuid_fast.errors import UserError
from realuid_fast.evaluate.table import sampler
from realuid_fast.models.generator import Generator, _key
from realuid_fast.noise import normal
from realuid_fast.sampling import starting, state_from, step_at

from ..helpers import MLP, SEEING, UNET, distiller, random_network


@pytest.mark.parametrize("name", ["linear", "ve", "brownian-bridge"])
def test_generator_of_several_steps(name):
    path = paths.build(name)
    own = {"linear": (0.3, 0.5, 0.9), "ve": (80.0, 5.0, 0.5), "brownian-bridge": (0.9, 0.5, 0.1)}[name]
    predict = "x0" if name == "brownian-bridge" else "velocity"
    start, *times = own
    net = random_network(MLP)
    several = Generator(net, start, path, predict, times)
    z, end = torch.randn(6, 2), (torch.randn(6, 2) if name == "brownian-bridge" else None)

    # By hand: predict, interpolate to the next time with the noise that z gives, predict again.
    by_hand = [Generator(net, start, path, predict)(z, None, end)]
    for number, later in enumerate(times, 1):
        t = torch.full((6,), later)
        x_t = rf.interpolate(by_hand[-1], path.coefficients(t, "x0", "x0"), _key(z, number), end)
        coef = path.coefficients(t, "x0", predict)
        out = sampling.call(net, t, x_t, None, path, predict, end)
        by_hand.append(coef[:, 6:7] * out + coef[:, 7:8] * x_t)
    assert several.steps == 3
    torch.testing.assert_close(several(z, None, end), by_hand[-1])
    assert torch.equal(several(z, None, end), several(z, None, end))
    step = torch.tensor([0, 1, 2, 2, 1, 0])
    expected = torch.stack(by_hand)[step, torch.arange(6)]
    torch.testing.assert_close(several(z, None, end, step), expected, rtol=1e-5, atol=1e-5)

    # The gradient goes through the last evaluation alone: that of a net applied to states which are held fixed.
    several(z, None, end, step).sum().backward()
    through_last = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    states = [state_from(starting(path, predict, start), z, end)]
    for number, later in enumerate(times, 1):
        t = torch.full((6,), later)
        x0 = by_hand[number - 1].detach()
        states.append(rf.interpolate(x0, path.coefficients(t, "x0", "x0"), _key(z, number), end))
    for row in range(6):
        one, at = slice(row, row + 1), starting(path, predict, own[step[row]])
        step_at(at, net, states[step[row]][one], None, None if end is None else end[one]).sum().backward()
    for mine, p in zip(through_last, net.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)

    with pytest.raises(UserError, match="times must come nearer to the data"):
        Generator(net, start, path, predict, (start, *times))


def test_a_noised_generator_learns_from_noised_real_data():
    """Sauer et al. (2311.17042): ``x_s = a x + c n`` at the student's times, pure noise at the first; in float64."""
    net, times = random_network(UNET).double(), (0.25, 0.5, 0.75)
    several = Generator(net, 0.0, paths.Linear(), "velocity", times, noised=True).double()
    z, real = torch.randn(2, 6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0, 1, 2, 3, 3, 0])
    t = torch.tensor([0.0, *times], dtype=torch.float64)[step]
    at, rows = t.view(-1, 1, 1, 1), torch.arange(6)
    n = torch.stack([z, *(normal(_key(z, number), z) for number in (1, 2, 3))])[step, rows]
    state = at * real + (1 - at) * n
    literal = state + (1 - at) * net(t, state)
    x = several(z, None, None, step, real)
    torch.testing.assert_close(x, literal, rtol=1e-10, atol=1e-10)
    grads = ([*torch.autograd.grad((v**2).sum(), [*net.parameters()])] for v in (x, literal))
    for mine, p in zip(*grads, strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-10, atol=1e-10 * float(p.abs().max()))
    # Samples are drawn from its own states.
    assert torch.equal(several(z), Generator(net, 0.0, paths.Linear(), "velocity", times).double()(z))
    for given in ((net, 0.0), (random_network(SEEING), 0.0, paths.Linear(), "velocity", times)):
        with pytest.raises(UserError, match="states that are noised need further times, and a generator without an en"):
            Generator(*given, noised=True)


def test_a_student_of_several_steps_trains_is_saved_and_sampled(tmp_path):
    trainer = distiller(distill={"t_start": 0.28, "times": [0.5, 0.75]})
    for _ in range(2):
        trainer.update()
    assert all(math.isfinite(value) for value in trainer.meters.read().values())
    file = tmp_path / "student.safetensors"
    teachers.save(file, *trainer.exported())
    model = teachers.load(file)
    assert model.description.times == (0.5, 0.75)
    z = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(sampler(model)(z, None), trainer.sample(z))
    assert not torch.allclose(trainer.sample(z), Generator(trainer.student.net, 0.28)(z))
