"""Moment matching in several steps: the posterior, its losses by the paper's formula, students that are saved."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import realuid_fast as rf
from realuid_fast import data, paths, teachers
from realuid_fast.coefficients import Coefficients
from realuid_fast.errors import UserError
from realuid_fast.evaluate.table import sampler
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.models.generator import Generator, _key
from realuid_fast.models.teacher_step import StepDirection, TeacherStep
from realuid_fast.noise import normal
from realuid_fast.objectives import MomentMatching, ParameterMoments

from ..helpers import MLP, NULL, UNET, random_network, settings

FOUR = {"states": "data", "t_start": 0.0, "times": [0.25, 0.5, 0.75], "objective": {"name": "moment-matching"}}


def moments(network=UNET, run=None, **distill):
    content = settings("x", data={"name": "digits"}, path={"match": "x0"}, distill={**FOUR, **distill}, run=run or {})
    held = data.load(content["data"])
    model = teachers.Model(random_network(network), teachers.Description(network, data=held.config))
    return trainers.trainer("distill", configs.from_mapping(content), held, model)


@pytest.mark.parametrize("path", [paths.Linear(), paths.Linear(data_at=0), paths.VP(), paths.VE(), paths.VPCosine()])
def test_the_posterior_is_that_of_the_diffusion(path):
    """Given ``x``, ``z_s`` has the marginal of its own time and its covariance with ``z_t = r z_s + noise``."""
    low, high = path.t_range
    shares = torch.tensor([[0.7, 0.5, 0.9], [0.2, 0.4, 0.85]], dtype=torch.float64)
    t, s = low + (min(high, 5.0) - low) * shares
    levels = [c / a for a, c in (path.scales(t), path.scales(s))]
    if levels[0][0] < levels[1][0]:
        t, s = s, t
    (a_s, c_s), (a_t, c_t) = path.scales(s), path.scales(t)
    of_x, of_z, of_n = path.posterior(s, t)
    torch.testing.assert_close(of_x + of_z * a_t, a_s, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_z**2 * c_t**2 + of_n**2, c_s**2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_z * c_t**2, a_t / a_s * c_s**2, rtol=1e-12, atol=1e-12)


def test_the_posterior_at_the_ends():
    """From pure noise it is ``q(z_s | x)``, at the data it is ``x``; from a time to itself it is ``z_t``."""
    found = paths.Linear().posterior(torch.tensor([0.4, 1.0, 0.3]), torch.tensor([0.0, 0.7, 0.3]))
    expected = torch.tensor([[0.4, 1.0, 0.0], [0.0, 0.0, 1.0], [0.6, 0.0, 0.0]])
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-6, atol=1e-6)
    near = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    for path, t in ((paths.Linear(), near), (paths.VP(), near), (paths.VE(), near * 60 + 0.01)):
        for value in path.posterior(torch.nextafter(t, torch.tensor(0.5)), t):
            assert torch.isfinite(value).all()


@pytest.mark.parametrize("predict", ["x0", "velocity"])
def test_the_losses_are_the_papers(predict):
    """Salimans et al. (2406.04103): ``w(s) <x~, f - f*>`` and ``w(s) (||f - x~||^2 + ||f - f*||^2)``, in float64."""
    path, objective = paths.Linear(), MomentMatching()
    generator = torch.Generator().manual_seed(1)
    z_t, x, n = torch.randn(3, 5, 3, dtype=torch.float64, generator=generator)
    t, s = torch.linspace(0.1, 0.5, 5).double(), torch.linspace(0.2, 0.9, 5).double()
    weight = 1 / (1 - s)
    # q(z_s | z_t, x): z_t = r z_s + N(0, v), in the words of the paper's appendix with alpha = t, sigma = 1 - t.
    r = t / s
    v = (1 - t) ** 2 - r**2 * (1 - s) ** 2
    deviation = (v.sqrt() * (1 - s) / (1 - t))[:, None]
    z_s = (r * (1 - s) ** 2 / (1 - t) ** 2)[:, None] * z_t + (s * v / (1 - t) ** 2)[:, None] * x + deviation * n

    coef = path.coefficients(s, "x0", predict, lambda s: 1 / (1 - s))
    for name, value in zip("abc", path.posterior(s, t), strict=True):
        getattr(Coefficients(coef), name).copy_(value)
    fused = rf.interpolate(x, coef, n, z_t)
    torch.testing.assert_close(fused, z_s, rtol=1e-12, atol=1e-12)

    outs = torch.tanh(z_s * s[:, None]), torch.sin(z_s + s[:, None])
    teacher, fake = (o if predict == "x0" else z_s + (1 - s)[:, None] * o for o in outs)
    x = x.requires_grad_()
    value = rf.functional.generator_loss(
        objective, teacher_out=outs[0], fake_out=outs[1], x=x, x_t=fused, coef=coef, noise=n, endpoint=z_t
    )
    literal = (weight * (x * (fake - teacher)).sum(1)).mean()
    for one, other in ((value, literal), *zip(*(torch.autograd.grad(v, x) for v in (value, literal)), strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    x, out = x.detach(), outs[1].requires_grad_()
    fake = out if predict == "x0" else z_s + (1 - s)[:, None] * out
    value = rf.functional.fake_loss(
        objective, fake_out=out, x=x, x_t=fused, coef=coef, noise=n, endpoint=z_t, teacher_out=outs[0]
    )
    literal = (weight * ((fake - x) ** 2 + (fake - teacher) ** 2).sum(1)).mean()
    constant = (weight * (teacher**2).sum(1)).mean()
    torch.testing.assert_close(value, literal - constant, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(v, out) for v in (value, literal)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


TURNS = [("fake", 1.0), ("real", 1.0), ("generator", 1.0), ("generator", 2.5)]


@pytest.mark.parametrize(("turn", "guidance"), TURNS)
def test_a_turn_equals_plain_autograd(turn, guidance):
    """From noised real rows and their labels, by the paper's formulas on the linear path, ``k = 4``."""
    trainer = moments(NULL, guidance=guidance)
    trainer.update()
    state = copy.deepcopy(trainer.state_dict())
    loss = trainer.turn_backward(turn)
    trained = trainer.generator.net if turn == "generator" else trainer.fake
    explicit = [p.grad.clone() for p in trained.parameters()]
    other = trainer.fake if turn == "generator" else trainer.generator.net
    assert all(p.grad is None or not p.grad.any() for p in other.parameters())

    trainer.load_state_dict(state)
    for optimiser in trainer.optimisers.values():
        optimiser.zero_grad()
    real, labels = trainer.batches.next()
    u, step = torch.rand(2, 8, generator=trainer.draws)
    t, s = 1 - (u + step / 4).clamp(max=1), (1 - u).view(-1, 1, 1, 1)
    n = [normal(trainer.noise.next_key(), real) for _ in range(2)]
    at = t.view(-1, 1, 1, 1)
    z_t = at * real + (1 - at) * n[0]
    x = real if turn == "real" else z_t + (1 - at) * trainer.generator.net(t, z_t, labels)
    r = at / s
    v = (1 - at) ** 2 - r**2 * (1 - s) ** 2
    z_s = r * ((1 - s) / (1 - at)) ** 2 * z_t + s * v / (1 - at) ** 2 * x + v.sqrt() * (1 - s) / (1 - at) * n[1]
    z_s = z_s.detach()
    none = torch.full_like(labels, trainer.teacher.null_label)
    time = s.flatten()
    c, uncond = (z_s + (1 - s) * trainer.teacher(time, z_s, y).detach() for y in (labels, none))
    teacher = uncond + guidance * (c - uncond)
    fake = z_s + (1 - s) * trainer.fake(time, z_s, labels)
    if turn != "generator":
        x = x.detach()
        plain = ((fake - x) ** 2 + (fake - teacher) ** 2 - teacher**2).sum() / 8
    else:
        plain = (x * (fake - teacher).detach()).sum() / 8
    gradients = torch.autograd.grad(plain, [*trained.parameters()])
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-4, atol=1e-4)
    for mine, p in zip(explicit, gradients, strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-4 * float(p.abs().max()) + 1e-7)


def test_the_loss_in_parameter_space_is_the_papers():
    """``||E nu||^2 / 2`` in the preconditioner's weighting, ``nu`` the teacher's gradient on samples, in float64."""
    path, objective, net = paths.Linear(), ParameterMoments(), random_network(UNET).double()
    fake, parameters = TeacherStep(net), [*net.parameters()]
    optimiser, generator = StepDirection(fake), torch.Generator().manual_seed(2)
    before = copy.deepcopy(net.state_dict())

    def batch():
        x, z = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64, generator=generator)
        return x, z, torch.rand(5, dtype=torch.float64, generator=generator) * 0.8 + 0.1

    def teacher_loss(x, z, s):
        f = z + (1 - s).view(-1, 1, 1, 1) * net(s, z)
        return ((f - x) ** 2).flatten(1).sum(1).div(1 - s).mean()

    real = [batch() for _ in range(3)]
    left = iter(real)
    optimiser.measure_first(lambda: teacher_loss(*next(left)).backward(), 3)
    squares = [[g**2 for g in torch.autograd.grad(teacher_loss(*rows), parameters)] for rows in real]
    preconditioner = [1 / (torch.stack(g).mean(0).sqrt() + 1e-8) for g in zip(*squares, strict=True)]

    x, z, s = batch()
    coef = path.coefficients(s, "x0", "velocity", lambda s: 1 / (1 - s))
    given = {"x_t": z, "coef": coef, "noise": z}
    rf.functional.fake_loss(objective, fake_out=fake(s, z), x=x, teacher_out=net(s, z).detach(), **given).backward()
    optimiser.step()
    nu = torch.autograd.grad(teacher_loss(x, z, s), parameters)

    x, z, s = batch()
    given = {"x_t": z, "coef": path.coefficients(s, "x0", "velocity", lambda s: 1 / (1 - s)), "noise": z}
    x.requires_grad_()
    with torch.no_grad():
        outs = {"teacher_out": net(s, z), "fake_out": fake(s, z)}
    value = rf.functional.generator_loss(objective, **outs, x=x, **given)

    def product(x):
        # Plain layers on contiguous images, because the package's have no second derivative.
        with rf.backend("torch"), sdpa_kernel(SDPBackend.MATH):
            other = torch.autograd.grad(teacher_loss(x, z, s), parameters, create_graph=True)
        return sum((scale * a * b).sum() for scale, a, b in zip(preconditioner, nu, other, strict=True))

    literal = product(x)
    torch.testing.assert_close(2 * value, literal - product(torch.zeros_like(x)), rtol=1e-10, atol=1e-10)
    mine, theirs = (torch.autograd.grad(of, x)[0] for of in (2 * value, literal))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_turns_in_parameter_space_equal_plain_autograd(monkeypatch):
    """The fake turn's batch moves the teacher along its own loss' gradient; the generator's turn has another batch."""
    monkeypatch.setattr(trainers, "_MEASURED", 3)
    trainer = moments(NULL, objective={"name": "parameter-moments"}, fake_turns=1)
    state = trainer.optimisers["fake"].adam.state
    assert not any(state[p]["exp_avg_sq"].any() for p in trainer.fake.net.parameters())
    trainer.update()
    moment = [state[p]["exp_avg_sq"].clone() for p in trainer.fake.net.parameters()]
    assert all(second.any() for second in moment)
    state = copy.deepcopy(trainer.state_dict())
    trainer.turn_backward("fake")
    trainer._optimise("fake", "fake optimiser")
    trainer.turn_backward("generator")
    explicit = [p.grad.clone() for p in trainer.generator.net.parameters()]

    trainer.load_state_dict(state)
    for optimiser in trainer.optimisers.values():
        optimiser.zero_grad()
    net, k = trainer.fake.net, 4

    def rows():
        real, labels = trainer.batches.next()
        u, step = torch.rand(2, 8, generator=trainer.draws)
        t, s = 1 - (u + step / k).clamp(max=1), 1 - u
        n = [normal(trainer.noise.next_key(), real) for _ in range(2)]
        at, to = (each.view(-1, 1, 1, 1) for each in (t, s))
        z_t = at * real + (1 - at) * n[0]
        x = z_t + (1 - at) * trainer.generator.net(t, z_t, labels)
        of_x, of_z, of_n = (each.view(-1, 1, 1, 1) for each in paths.Linear().posterior(s, t))
        z_s = (of_x * x + of_z * z_t + of_n * n[1]).detach()
        return x, ((z_s + (1 - to) * net(s, z_s, labels) - x) ** 2).sum() / 8

    _, loss = rows()
    nu = torch.autograd.grad(loss, [*net.parameters()])
    _, loss = rows()
    other = torch.autograd.grad(loss, [*net.parameters()], create_graph=True)
    scales = [1 / (second.sqrt() + 1e-8) for second in moment]
    product = sum((scale * a * b).sum() for scale, a, b in zip(scales, nu, other, strict=True))
    # The term <nu, f*> of the product has no part in x~.
    gradients = torch.autograd.grad(product / 2, [*trainer.generator.net.parameters()])
    for mine, p in zip(explicit, gradients, strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-4 * float(p.abs().max()) + 1e-7)


@pytest.mark.parametrize("objective", ["moment-matching", "parameter-moments"])
def test_an_ancestral_student_trains_goes_on_and_is_sampled_from_its_file(tmp_path, monkeypatch, objective):
    monkeypatch.setattr(trainers, "_MEASURED", 3)
    given = {"objective": {"name": objective}, "fake_turns": 1}
    straight, before = moments(**given), moments(**given)
    for trainer in (straight, before):
        trainer.update()
    after = moments(**given)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    straight.update()
    after.update()
    numbers = straight.meters.read()
    assert numbers == after.meters.read()
    assert all(math.isfinite(value) for value in numbers.values())
    file = tmp_path / "student.safetensors"
    teachers.save(file, *straight.exported())
    model = teachers.load(file)
    assert (model.description.ancestral, model.description.format) == (True, 4)
    z = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(sampler(model)(z, None), straight.sample(z))
    torch.testing.assert_close(rf.load(file)(z), straight.sample(z))
    plain = dataclasses.replace(model.description, ancestral=False, format=3)
    assert not torch.allclose(sampler(teachers.Model(model.net, plain))(z, None), straight.sample(z))


def test_an_ancestral_generator_draws_its_states_from_the_posterior():
    path, times = paths.Linear(), (0.25, 0.5, 0.75)
    net = random_network(MLP)
    several, z = Generator(net, 0.0, path, "velocity", times, ancestral=True), torch.randn(6, 2)
    state, x = z, z + net(torch.zeros(6), z)
    by_hand = [x]
    for number, (before, t) in enumerate(zip((0.0, *times), times, strict=False), 1):
        of_x, of_z, of_n = path.posterior(torch.tensor(t), torch.tensor(before))
        state = of_x * x + of_z * state + of_n * normal(_key(z, number), z)
        x = state + (1 - t) * net(torch.full((6,), t), state)
        by_hand.append(x)
    torch.testing.assert_close(several(z), x, rtol=1e-5, atol=1e-5)
    step = torch.tensor([0, 1, 2, 3, 1, 0])
    torch.testing.assert_close(several(z, step=step), torch.stack(by_hand)[step, torch.arange(6)], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="ancestral states are for one-sided paths, not BrownianBridge"):
        Generator(net, 0.9, paths.BrownianBridge(), "x0", (0.5,), ancestral=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"objective": {"name": "uid"}}, "states of data need the objective moment-matching, not UID"),
        ({"objective": {"name": "regression"}}, "distill.states data needs an objective such as moment-matching"),
        ({"gan": {"weight_fake": 1.0}}, "distill.gan is not for distill.states data"),
        ({"labels": "batch"}, "distill.labels batch is not for distill.states data"),
        ({"run": {"mode": "compiled"}}, "run.mode compiled is not for distill.states data"),
        (
            {"objective": {"name": "parameter-moments"}, "fake_turns": 2},
            "distill.fake_turns, which must be 1, is not for distill.objective parameter-moments",
        ),
        (
            {"objective": {"name": "parameter-moments"}, "fake_turns": 1, "guidance": 2.0, "network": NULL},
            "distill.guidance is not for distill.objective parameter-moments",
        ),
        (
            {"objective": {"name": "parameter-moments"}, "states": "own"},
            "distill.states must be data for parameter-space moment matching",
        ),
    ],
)
def test_what_does_not_go_with_states_of_data_is_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        moments(**given)
