"""Discriminators that stand alone: their terms by the papers' formulas, turns with and without a fake model."""

import copy

import pytest
import torch
import torch.nn.functional as F

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.networks.critic import Critic
from realuid_fast.noise import normal

from ..helpers import LABELLED, MLP, POINTS, trainer_of

ADD = {"objective": {"name": "sds"}, "gan": {"weight_fake": 1.0, "weight_generator": 0.2, "features": "digits"}}
ADD["gan"] |= {"loss": "hinge", "r1": 0.3}
BASE = {"teacher": "x", "batch": 8, "updates": 4, "fake_turns": 2, "ema": [0.9], "export": 0.9}


def digits(**distill):
    return trainer_of(LABELLED, "digits", path={"match": "x0"}, distill={**BASE, **ADD, **distill})


def features(x):
    """Two maps of images, and a vector."""
    weight = torch.linspace(-1, 1, 27, dtype=x.dtype).view(3, 1, 3, 3)
    first = torch.tanh(F.conv2d(x, weight, padding=1))
    return [first, F.avg_pool2d(first, 2) ** 2, torch.sin(x.flatten(1)[:, :5])]


@pytest.mark.parametrize(("loss", "r1"), [("hinge", 0.7), ("softplus", 0.0), ("softplus", 0.2)])
def test_the_terms_are_the_papers(loss, r1):
    """Sauer et al. (2311.17042), section 3: ``L_adv`` of student and discriminator, hinge, R1 of each head."""
    critic = Critic(features, torch.zeros(1, 1, 8, 8), 0, loss, r1).double()
    generated, real = torch.randn(2, 6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def psi(u):
        return F.softplus(u) if loss == "softplus" else torch.clamp(1 + u, min=0)

    found = critic.backward(generated, real, 1.7)
    mine = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    plain = torch.zeros((), dtype=torch.float64)
    for head, of_generated, of_real in zip(critic.heads, features(generated), features(real), strict=True):
        plain = plain + psi(head(of_generated)).mean() + psi(-head(of_real)).mean()
        for row in of_real:
            row = row[None].requires_grad_()
            (slope,) = torch.autograd.grad(head(row).mean(), row, create_graph=True)
            plain = plain + r1 * (slope**2).sum() / 6
    torch.testing.assert_close(found, plain.detach(), rtol=1e-10, atol=1e-10)
    for one, other in zip(mine, torch.autograd.grad(1.7 * plain, [*critic.parameters()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    x = generated.requires_grad_()
    judged = [head(of) for head, of in zip(critic.heads, features(x), strict=True)]
    plain = sum((F.softplus(-h) if loss == "softplus" else -h).mean() for h in judged)
    value, pull = critic.pull(x)
    torch.testing.assert_close(value, plain.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pull, torch.autograd.grad(plain, x)[0], rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in critic.parameters())


def test_features_are_no_part_of_what_is_trained():
    net = torch.nn.Conv2d(1, 4, 3)
    critic = Critic(lambda x: [net(x)], torch.zeros(1, 1, 8, 8), 0)
    critic.backward(*torch.randn(2, 3, 1, 8, 8))
    assert all(p.grad is None for p in net.parameters())
    assert all(name.startswith("heads.") for name in critic.state_dict())
    with pytest.raises(UserError, match=r"gan\.features must be maps \(B, C, H, W\) or vectors \(B, C\), got maps of"):
        Critic(lambda x: [x[0]], torch.zeros(1, 1, 8, 8), 0)


def test_adversarial_diffusion_distillation_equals_plain_autograd():
    """``-mean h`` and SDS' ``<x, x - f*>`` in the generator's turn, without a fake model; hinge in the other turn."""
    trainer = digits()
    assert (trainer.turns, trainer.takes_real) == (2, True)
    trainer.update()
    assert set(trainer.meters.read()) >= {"discriminator loss", "adversarial loss", "critic gradient"}
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    _, watched = trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.net.parameters()]
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    trainer.generator_optimiser.zero_grad()

    y = trainer.labels[torch.randint(len(trainer.labels), (8,), generator=trainer.draws)]
    x = trainer.generator(normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8)), y)
    t = trainer.path.sample_time(8, trainer.draws)
    at = t.view(-1, 1, 1, 1)
    x_t = (at * x + (1 - at) * normal(trainer.noise.next_key(), x)).detach()
    away = x - x_t - (1 - at) * trainer.teacher(t, x_t, y)
    adversarial = -sum(h.mean() for h in trainer.critic.judge(trainer.critic.maps(x)))
    plain = (x * away.detach()).sum() / 8 + 0.2 * adversarial
    assert float(watched["adversarial loss"]) == pytest.approx(float(adversarial.detach()), rel=1e-4)
    for mine, p in zip(explicit, trainer.generator.net.parameters(), strict=True):
        (expected,) = torch.autograd.grad(plain, p, retain_graph=True)
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7)

    seen = {}
    trainer.optimisers["critic"].step = lambda: seen.update(grads=[p.grad.clone() for p in trainer.critic.parameters()])
    state = copy.deepcopy(trainer.batches.state_dict())
    trainer.fake_turn(x.detach(), y)
    trainer.batches.load_state_dict(state)
    real, _ = trainer.batches.next()
    trainer.critic.zero_grad()
    loss = trainer.critic.backward(x.detach(), real)
    assert trainer.meters.read()["discriminator loss"] == pytest.approx(float(loss), rel=1e-5)
    for mine, p in zip(seen["grads"], trainer.critic.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)


@pytest.mark.parametrize("more", [{}, {"objective": {"name": "dmd"}, "fake_turns": 1}])
def test_the_student_sees_noised_real_data_and_their_labels(more):
    """Every turn's batch is both the discriminator's real rows and, noised, the states of the student's steps."""
    trainer = digits(states="noised", t_start=0.0, times=[0.25, 0.5, 0.75], **more)
    batches, seen, judged, run, step = (
        copy.deepcopy(trainer.batches),
        [],
        [],
        trainer._run_generator,
        trainer._fake_step,
    )

    def record(*given):
        seen.append([None if tensor is None else tensor.clone() for tensor in given])
        return run(*given)

    trainer._run_generator = record
    trainer._fake_step = lambda: judged.append(trainer._rows[8:].clone()) or step()
    trainer.update()
    *turns, last = (batches.next() for _ in range(trainer.turns + 1))
    cycle = [torch.cat(column) for column in zip(*turns, strict=True)]
    for (_, y, _, steps, data), (real, labels) in zip(seen, [cycle, last], strict=True):
        assert torch.equal(data, real)
        assert torch.equal(y, labels)
        assert set(steps.tolist()) <= {0, 1, 2, 3}
    assert all(torch.equal(rows, x) for rows, (x, _) in zip(judged, turns, strict=True))
    assert torch.equal(trainer.batches.next()[0], batches.next()[0])


def test_a_fake_model_does_not_see_the_critics_real_rows():
    """With DMD, whose fake model has generated rows alone: its loss is that of a run without a critic."""
    settings = {"objective": {"name": "dmd"}}
    trainer, without = digits(**settings), digits(**settings, gan={})
    generated, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    for each in (trainer, without):
        each.fake_turn(generated, y)
    assert trainer.meters.read()["fake loss"] == without.meters.read()["fake loss"]


@pytest.mark.parametrize("objective", ["sds", "dmd"])
def test_a_run_with_a_critic_goes_on_where_it_was_stopped(objective):
    straight, after = (digits(objective={"name": objective}) for _ in range(2))
    straight.update()
    after.load_state_dict(copy.deepcopy(straight.state_dict()))
    for trainer in (straight, after):
        trainer.meters.read()
        trainer.update()
    assert straight.meters.read() == after.meters.read()
    ours, theirs = (trainer.critic.state_dict() for trainer in (straight, after))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_head_on_the_fake_model_takes_hinge_too():
    logits, signs = torch.tensor([[0.5], [-2.0], [0.3]], dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0]).double()
    coef = torch.zeros(3, 9, dtype=torch.float64)
    coef[:, 0] = 1
    term = rf.networks.discriminator.adversarial_term
    value, slope = term(logits, signs, coef, 0.0, 3, "hinge")
    assert (float(value), slope.flatten().tolist()) == (
        pytest.approx((1.5 + 0.7) / 3),
        pytest.approx([1 / 3, 0, -1 / 3]),
    )
    value, slope = term(logits, -signs.abs(), coef, 0.0, 3, "hinge", generator=True)
    assert (float(value), slope.flatten().tolist()) == (pytest.approx(1.2 / 3), pytest.approx([-1 / 3] * 3))


@pytest.mark.parametrize(
    ("gan", "more", "sentence"),
    [
        ({"features": ""}, {}, "distill.gan.r1 is a penalty of heads on frozen features: set distill.gan.features"),
        ({"features": "", "r1": 0.0}, {}, "distill.gan judges by the fake model, and SDS has none: give gan.features"),
        ({"least_share": 0.5}, {}, "distill.gan.features see clean samples; gan.least_share and divergence need"),
        ({}, {"objective": {"name": "dmd"}, "divergence": "forward-kl"}, "distill.gan.features see clean samples"),
        ({"features": "none"}, {}, "the classifier none cannot be read"),
        ({}, {"states": "noised"}, "states that are noised need further times"),
        ({}, {"objective": {"name": "regression"}, "states": "noised"}, "distill.states noised is not for distill.obj"),
        ({"loss": "square"}, {}, "distill.gan.loss must be one of softplus, hinge; got 'square'"),
    ],
)
def test_what_does_not_go_together_is_named(gan, more, sentence):
    with pytest.raises(UserError, match=sentence):
        digits(gan={**ADD["gan"], **gan}, **more)
    with pytest.raises(UserError, match=r"distill.gan.features digits are of images \(1, 8, 8\), the data have \(2,\)"):
        trainer_of(MLP, POINTS, path={"match": "x0"}, distill={**BASE, **ADD})
