"""The baselines: a discriminator on the fake model's features, and trajectory regression."""

import copy
import dataclasses
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import realuid_fast as rf
from realuid_fast import data, descent, teachers
from realuid_fast.cli import plan
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.jobs.train import train
from realuid_fast.models.generator import _key
from realuid_fast.networks import build
from realuid_fast.networks.discriminator import Head, Judged, adversarial_term
from realuid_fast.noise import normal
from realuid_fast.sampling import integrate
from realuid_fast.train.distill import Distiller
from realuid_fast.train.hooks import Interrupted
from realuid_fast.train.regression import RegressionTrainer

from .. import helpers
from ..helpers import drawn_again, random_network

MLP = {"kind": "mlp", "shape": [2], "width": 8, "depth": 2}
LABELLED = {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 2, "num_classes": 10, "null_label": True}
UNET = {"kind": "unet", "dim": [1, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4}
POINTS = {"name": "eight_gaussians", "n": 2000, "n_heldout": 500}
SONG = {"kind": "song-unet", "dim": [3, 8, 8], "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
ADM = {"kind": "dhariwal-unet", "dim": [3, 8, 8], "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1}
GAN = {"weight_fake": 3.0, "weight_generator": 2.0, "least_share": 0.3}
REGRESSION = {"objective": {"name": "regression"}, "regression": {"steps": 3}}


def trainer_of(network, held, teacher=None, path=None, run=None, **settings):
    distill = {"teacher": "x", "batch": 8, "updates": 12, "fake_turns": 2, "ema": [0.9], "export": 0.9, **settings}
    run = {"tensorboard": False, "progress": False, **(run or {})}
    return helpers.trainer_of(network, held, teacher, path=path or {}, distill=distill, run=run)


@pytest.fixture(scope="module")
def points_teacher():
    """A teacher of eight Gaussians, trained for a second or two."""
    network = {"kind": "mlp", "shape": [2], "width": 32, "depth": 2}
    content = {
        "network": network,
        "teacher": {"batch": 128, "updates": 300, "optimiser": {"lr": 3e-3}, "ema": [0.9], "export": 0.9},
    }
    held = data.load(POINTS)
    trainer = trainers.teacher_trainer(configs.from_mapping({"data": held.config, **content}), held)
    for _ in range(300):
        trainer.update()
    state, description = trainer.exported()

    def fresh():
        net = build(network)
        net.load_state_dict(state)
        return teachers.Model(net, description)

    return fresh


def distance_of(trainer):
    return Measure(data.load(POINTS))(generate(trainer.sample, evaluation_noise((2,), 1000))[0]).distance


# -- the head


@pytest.mark.parametrize(
    ("shape", "logits"),
    [((256, 4, 4), 1), ((32, 8, 8), 4), ((32, 2, 2), 1), ((12, 3, 3), 1), ((6, 1, 1), 1), ((5,), 1)],
)
def test_heads_fit_their_features(shape, logits):
    head = Head(shape)
    features = torch.randn(3, *shape, requires_grad=True)
    out = head(features)
    assert out.shape == (3, logits)
    out.sum().backward()
    assert features.grad.abs().max() > 0
    assert out.std() > 0  # rows differ: no normalisation has wiped them out


def test_the_head_of_the_published_network_is_the_published_one():
    """Two halving convolutions with 32 groups of 8 channels, then one logit; as many parameters."""
    layers = Head((256, 4, 4)).layers
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "GroupNorm", "SiLU"] * 2 + ["Conv2d"]
    assert layers[1].num_groups == 32
    assert sum(p.numel() for p in layers.parameters()) == 2 * (256 * 256 * 4 + 256 + 2 * 256) + 257


@pytest.mark.parametrize("network", [MLP, LABELLED, UNET, SONG, ADM], ids=["points", "labelled", "unet", "song", "adm"])
def test_features_come_with_the_same_output(network):
    net = random_network(network).eval()
    shape = tuple(network.get("shape") or network["dim"])
    t, x = torch.rand(4), torch.randn(4, *shape)
    y = torch.arange(4) if network is LABELLED else None
    judged = Judged(net, shape, seed=0)
    out, logits = judged(t, x, y)
    assert torch.equal(out, net(t, x, y))
    assert logits.shape[0] == 4
    assert torch.equal(Judged(net, shape, seed=0)(t, x, y)[1], logits)
    assert not torch.equal(Judged(net, shape, seed=1)(t, x, y)[1], logits)
    with pytest.raises(UserError, match="needs a network whose forward can return its features, which Linear cannot"):
        Judged(torch.nn.Linear(2, 2), (2,), 0)


def test_softplus_term_is_its_formula():
    logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    coef = torch.zeros(6, 9, dtype=torch.float64)
    coef[:, 0] = torch.tensor([0.1, 0.9, 0.5, 0.1, 0.9, 0.5])
    coef[:, 2] = 1 - coef[:, 0]
    signs = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64)
    value, gradient = adversarial_term(logits, signs, coef, 0.5, 3)
    literal = F.softplus(logits[1:3]).sum() / 6 + F.softplus(-logits[4:]).sum() / 6
    torch.testing.assert_close(value, literal.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(literal, logits)[0])


# -- the turns


@pytest.mark.parametrize("objective", [{"name": "uid"}, {"name": "realuid"}, {"name": "moment-matching"}])
def test_fake_turn_with_a_discriminator_equals_plain_autograd(objective):
    trainer = trainer_of(LABELLED, {"name": "digits"}, gan=GAN, objective=objective)
    state = copy.deepcopy(trainer.state_dict())
    generator = torch.Generator().manual_seed(0)
    generated, labels = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8)
    seen = {}
    trainer.fake_optimiser.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in trainer.judged.named_parameters()}
    )
    trainer.fake_turn(generated, labels)

    real, real_labels, t, coef, key = drawn_again(trainer, state)
    x, y = torch.cat([generated, real]), torch.cat([labels, real_labels])
    x_t = rf.interpolate(x, coef, key, noise_rows=8)
    out, logits = trainer.judged(t, x_t, y)
    rows = 16 if trainer.objective.needs_real else 8
    teacher = trainer.teacher(t, x_t, y)[:rows] if trainer.objective.needs_teacher else None
    loss = rf.functional.fake_loss(
        trainer.objective, fake_out=out[:rows], x=x[:rows], x_t=None, coef=coef[:rows], noise=key, n_real=rows - 8,
        teacher_out=teacher, noise_rows=8,
    )  # fmt: skip
    near = (t >= 0.3).float()[:, None]
    adversarial = (near * F.softplus(logits))[:8].mean() + (near * F.softplus(-logits))[8:].mean()
    (loss + 3.0 * adversarial).backward()
    read = trainer.meters.read()
    assert read["fake loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert read["discriminator loss"] == pytest.approx(float(adversarial.detach()), rel=1e-5)
    for name, p in trainer.judged.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


@pytest.mark.parametrize(("objective", "match"), [("uid", "velocity"), ("normalised", "velocity"), ("dmd", "x0")])
@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_generator_turn_with_a_discriminator_equals_plain_autograd(objective, match, precision):
    settings = {"gan": GAN, "objective": {"name": objective}, "generator_precision": precision}
    trainer = trainer_of(MLP, POINTS, path={"match": match}, **settings)
    trainer.update()
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    loss, watched = trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.parameters()]
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    trainer.generator_optimiser.zero_grad()

    x = trainer.generator(normal(trainer.noise.next_key(), torch.empty(8, 2)))
    t = trainer.path.sample_time(8, trainer.draws)
    coef, key = trainer.path.coefficients(t, match=match), trainer.noise.next_key()
    x_t = rf.interpolate(x, coef, key)
    out, logits = trainer.judged.requires_grad_(False)(t, x_t)
    plain = rf.functional.generator_loss(
        trainer.objective, teacher_out=trainer.teacher(t, x_t), fake_out=out, x=x, x_t=x_t, coef=coef, noise=key
    )
    adversarial = ((t >= 0.3).float()[:, None] * F.softplus(-logits)).mean()
    (plain + 2.0 * adversarial).backward()
    # Half precision rounds the networks' outputs, and the gradient is driven by their difference.
    slack = 1e-4 if precision == "float32" else 0.1
    assert float(watched["adversarial loss"]) == pytest.approx(float(adversarial.detach()), rel=slack)
    mine, theirs = (torch.cat([g.flatten() for g in grads]) for grads in
                    (explicit, [p.grad for p in trainer.generator.parameters()]))  # fmt: skip
    assert float((mine - theirs).norm() / theirs.norm()) < slack
    if precision == "float32":
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=1e-5)


def _explicit(draw, divergence, log_ratio, teacher_out, fake_out):
    """The loss of :mod:`realuid_fast.descent` and its gradient in ``draw.x``."""
    x_t = draw.x_t
    fixed = dataclasses.replace(draw, x=draw.x.detach(), x_t=x_t.detach())
    outs = teacher_out.detach(), fake_out.detach()
    grads = descent.generator_grads(rf.objectives.SiD(1.0), fixed, *outs, divergence, log_ratio)
    seeds = [grads.teacher_out, grads.fake_out]
    (through,) = torch.autograd.grad([teacher_out, fake_out], draw.x, seeds, retain_graph=True)
    direct = 0 if grads.x_t is None else torch.autograd.grad(x_t, draw.x, grads.x_t, retain_graph=True)[0]
    return grads.loss, grads.x + through + direct


def _with_gradient(value, x_t, gradient):
    """``value`` ``(R, 1)`` with another gradient in ``x_t``."""
    return value + (gradient.detach() * (x_t - x_t.detach())).sum(1, keepdim=True)


def test_uni_instructs_forward_kl_is_its_code_with_the_ratio_differentiated():
    """``r (y_real - y_fake) (y_fake - y) / mean |y - y_real|``, the mean held fixed, in float64.

    a-little-hoof/Uni_Instruct at 3cdf92e, fsim_training/fsim_loss.py and the loop's branch Forward-KL, which holds the
    ratio ``r`` fixed too. Its gradient is then not that of the divergence (tests/test_descent.py).
    """
    generator = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    path, logits = rf.paths.VE(), torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    sigma = torch.linspace(0.1, 3, 5, dtype=torch.float64)
    x = x.requires_grad_()
    draw = path.draw(x, n, match="x0", predict="x0", t=sigma)
    outs = torch.tanh(draw.x_t), torch.sin(draw.x_t) * sigma[:, None]
    mine, gradient = _explicit(draw, "forward-kl", logits, *outs)
    y_t = x + sigma[:, None] * n
    y_real, y_fake = torch.tanh(y_t), torch.sin(y_t) * sigma[:, None]
    factor = (x - y_real).abs().mean(1, keepdim=True).detach()
    ratio = _with_gradient(logits, y_t, (y_real - y_fake) / sigma[:, None] ** 2).exp()
    theirs = (ratio * (y_real - y_fake) * (y_fake - x) / factor).sum() / 5
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, x)[0], rtol=1e-10, atol=1e-10)


def test_dmd2s_turn_is_the_papers():
    """Yin et al. (2405.14867): sections 4.3 (the discriminator) and 4.5 (states by the student's own earlier steps)."""
    times = [0.25, 0.5, 0.75]
    settings = {"gan": GAN, "objective": {"name": "dmd"}, "t_start": 0.0, "times": times}
    trainer = trainer_of(MLP, POINTS, path={"match": "x0"}, **settings)
    trainer.update()
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.net.parameters()]
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)

    def student(t, x_t):
        return x_t + (1 - t[:, None]) * trainer.generator.net(t, x_t)

    z = normal(trainer.noise.next_key(), torch.empty(8, 2))
    step = torch.randint(4, (8,), generator=trainer.draws)
    assert len(step.unique()) > 2
    states, starts = [z], torch.tensor([0.0, *times])
    with torch.no_grad():
        for number, t in enumerate(times, 1):
            x = student(starts[number - 1].expand(8), states[-1])
            states.append(t * x + (1 - t) * normal(_key(z, number), z))
    x = student(starts[step], torch.stack(states)[step, torch.arange(8)])
    t = trainer.path.sample_time(8, trainer.draws)
    x_t = t[:, None] * x + (1 - t[:, None]) * normal(trainer.noise.next_key(), x)
    out, logits = trainer.judged.requires_grad_(False)(t, x_t)
    teacher, fake = (x_t + (1 - t[:, None]) * f for f in (trainer.teacher(t, x_t), out))
    direction = (fake - teacher) / (x - teacher).abs().mean(1, keepdim=True)
    adversarial = ((t >= 0.3).float()[:, None] * F.softplus(-logits)).mean()
    plain = (x * direction.detach()).sum() / 8 + 2.0 * adversarial
    expected = torch.autograd.grad(plain, [*trainer.generator.net.parameters()])
    for mine, p in zip(explicit, expected, strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-4 * float(p.abs().max()) + 1e-7)


def test_a_head_judges_real_rows_with_times_and_noise_of_their_own():
    """The fake model's own loss, UID's, is then that of the generated rows alone, with their noise."""
    trainer = trainer_of(MLP, POINTS, gan={"weight_fake": 1.0}, objective={"name": "uid"}, shared_draws=False)
    state, net = copy.deepcopy(trainer.state_dict()), copy.deepcopy(trainer.fake)
    generated = torch.randn(8, 2)
    trainer.fake_turn(generated)
    *_, t, _, key = drawn_again(trainer, state)
    draw = trainer.path.draw(generated, key, t=t[:8])
    plain = rf.fake_loss(rf.objectives.UID(), draw, net(draw.t, draw.x_t))
    assert trainer.meters.read()["fake loss"] == pytest.approx(float(plain.detach()), rel=1e-5)


def test_a_divergence_weighs_the_rows_by_the_discriminators_ratio():
    """With every logit ``c``, the ratio is ``e^c`` for all rows, and the generator's gradient as much larger."""
    settings = {"gan": {"weight_fake": 1.0}, "objective": {"name": "dmd"}, "generator": {"clip": 0.0}}

    def gradient(**more):
        trainer = trainer_of(MLP, POINTS, path={"match": "x0"}, **settings, **more)
        with torch.no_grad():
            for p in trainer.judged.head.parameters():
                p.zero_()
            trainer.judged.head.layers[-1].bias.fill_(0.7)
            trainer.fake.last.bias.add_(0.3)
        trainer.generator_backward()
        return torch.cat([p.grad.flatten() for p in trainer.generator.parameters()])

    for divergence, factor in (("forward-kl", math.exp(0.7)), ("jeffreys", 1 + math.exp(0.7))):
        torch.testing.assert_close(gradient(divergence=divergence), factor * gradient())
    for other in ("realuid", "sim"):
        with pytest.raises(
            UserError, match=r"distill.divergence jensen-shannon needs an objective .* not \w+ on Linear"
        ):
            trainer_of(MLP, POINTS, gan={"weight_fake": 1.0}, divergence="jensen-shannon", objective={"name": other})
    sid = {"name": "sid", "alpha_sid": 1.0, "scaled": False}
    with pytest.raises(UserError, match=r"divergence forward-kl with sid needs path\.match=x0, not velocity"):
        trainer_of(MLP, POINTS, gan={"weight_fake": 1.0}, divergence="forward-kl", objective=sid)
    sid = {"name": "sid", "alpha_sid": 1.2}
    with pytest.raises(UserError, match="or sid at alpha_sid 1 on a one-sided path; not SiD on Linear"):
        trainer_of(MLP, POINTS, path={"match": "x0"}, gan={"weight_fake": 1.0}, divergence="forward-kl", objective=sid)


@pytest.mark.parametrize("divergence", ["forward-kl", "jensen-shannon", "pearson"])
def test_uni_instructs_turn_is_the_expansions(divergence):
    """``-(h + h') ||delta||^2 + 2 h <delta, f* - x>`` over ``2 mean |x - f*|``, with ``h`` differentiated too."""
    settings = {"gan": {"weight_fake": 1.0}, "objective": {"name": "sid"}, "generator": {"clip": 0.0}}
    trainer = trainer_of(MLP, POINTS, path={"match": "x0"}, divergence=divergence, **settings)
    trainer.update()
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    loss, _ = trainer.generator_backward()
    explicit = torch.cat([p.grad.flatten() for p in trainer.generator.net.parameters()])
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    z = normal(trainer.noise.next_key(), torch.empty(8, 2))
    x = trainer.generator(z)
    t = trainer.path.sample_time(8, trainer.draws)[:, None]
    x_t = t * x + (1 - t) * normal(trainer.noise.next_key(), x)
    out, logits = trainer.judged.requires_grad_(False)(t[:, 0], x_t)
    teacher, fake = (x_t + (1 - t) * f for f in (trainer.teacher(t[:, 0], x_t), out))
    delta = teacher - fake
    u = _with_gradient(logits.detach().mean(1, keepdim=True), x_t, t / (1 - t) ** 2 * delta)
    r = u.exp()
    h, slope = {
        "forward-kl": (r, r), "jensen-shannon": (r / (1 + r), r / (1 + r) ** 2), "pearson": (r**2, 2 * r**2)
    }[divergence]  # fmt: skip
    rows = -(h + slope) * delta.square() + 2 * h * delta * (teacher - x)
    plain = (rows / (2 * (x - teacher).abs().mean(1, keepdim=True).detach())).sum() / 8
    found = torch.autograd.grad(plain, [*trainer.generator.net.parameters()])
    expected = torch.cat([p.flatten() for p in found])
    # float32: the rows' gradients cancel each other.
    assert float((explicit - expected).norm() / expected.norm()) < 1e-4
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gan": {"weight_fake": -1.0}}, "distill.gan.weight_fake must be finite and not negative, got -1"),
        ({"gan": {"weight_generator": 1.0}}, "weight_generator needs a weight_fake"),
        ({"gan": {"weight_fake": 1.0, "least_share": 1.5}}, r"least_share must lie in \[0, 1\], got 1.5"),
        (
            {"gan": {"weight_fake": 1.0}, "objective": {"name": "sds"}},
            "distill.gan judges by the fake model, and SDS",
        ),
        ({"divergence": "forward-kl"}, "divergence forward-kl needs a discriminator"),
        *(
            (
                {"gan": {"weight_fake": 1.0} | wrong, "divergence": "forward-kl", "objective": {"name": "dmd"}},
                r"divergence forward-kl takes its density ratio .*: distill\.gan\.loss must be softplus and",
            )
            for wrong in ({"loss": "hinge"}, {"least_share": 0.2})
        ),
        ({"divergence": "kl"}, "distill.divergence must be one of reverse-kl, forward-kl"),
        (
            {"regression": {"solver": "dopri"}},
            "distill.regression.solver must be one of euler, heun, midpoint, ddim, dpmpp, edm; got 'dopri'",
        ),
        ({"regression": {"steps": 0}}, "distill.regression.steps must be at least 1, got 0"),
        ({"steps": [2]}, "distill.steps is for the objective regression; other students take distill.times"),
        ({**REGRESSION, "gan": {"weight_fake": 1.0}}, "distill.gan is not for distill.objective regression"),
        ({**REGRESSION, "generator_precision": "tf32"}, "generator_precision tf32 does not run on cpu"),
        ({**REGRESSION, "guidance": 2.0}, "guidance needs a class-conditional network"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer_of(MLP, POINTS, path={"match": "x0"}, **settings)


def test_a_plan_counts_the_discriminators_rows():
    """Real rows in the fake turns and a backward pass through the fake model, with an objective that has neither."""
    few = ["distill.batch=4", "distill.objective={name: dmd, alpha: 1.0}", "path.match=x0"]
    without, with_head = (
        plan.make("distill", configs.load(configs.preset("uid"), [*few, *more]), steps=0)
        for more in ([], ["distill.gan.weight_fake=1", "distill.gan.weight_generator=1"])
    )
    assert with_head.images_per_update == without.images_per_update + 4 == 12
    assert with_head.operations["generator turn"] > without.operations["generator turn"]
    assert with_head.parameters["fake model"] > without.parameters["fake model"]
    baseline = plan.make("distill", configs.load(configs.preset("regression")), steps=0)
    assert set(baseline.operations) == {"the teacher's samples", "generator turn"}


# -- regression


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_regression_equals_plain_autograd(guidance, solver):
    trainer = trainer_of(
        LABELLED, {"name": "digits"}, objective={"name": "regression"}, guidance=guidance,
        regression={"steps": 3, "solver": solver}, t_start=0.28,
    )  # fmt: skip
    assert isinstance(trainer, RegressionTrainer)
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    seen = {}
    trainer.optimiser.step = lambda: seen.update({n: p.grad.clone() for n, p in trainer.generator.named_parameters()})
    trainer.update()

    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    labels = trainer.labels[torch.randint(len(trainer.labels), (8,), generator=trainer.draws)]
    z = normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8))
    x, h = z, 1 / 3  # the teacher's flow by hand
    null = torch.full_like(labels, 10)

    def velocity(t, x):
        conditional, unconditional = (trainer.teacher(torch.full((8,), t), x, y) for y in (labels, null))
        return unconditional + guidance * (conditional - unconditional)

    with torch.no_grad():
        for i in range(3):
            slope = velocity(i * h, x)
            ahead = velocity((i + 1) * h, x + h * slope) if solver == "heun" else slope
            x = x + h * (slope + ahead) / 2
    start = 0.72 * z
    made = start + 0.72 * trainer.generator.net(torch.full((8,), 0.28), start, labels)
    loss = (made - x).square().sum() / 8
    loss.backward()
    assert trainer.meters.read()["regression loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, p in trainer.generator.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-7)


def test_regression_learns_the_teachers_samples(points_teacher):
    settings = {"batch": 256, "updates": 300, "t_start": 0.0, "generator": {"lr": 3e-3, "betas": [0.9, 0.99]}}
    trainer = trainer_of(None, POINTS, points_teacher(), **{**REGRESSION, "regression": {"steps": 10}}, **settings)
    trainer.update()
    first = trainer.meters.read()["regression loss"]
    before = distance_of(trainer)
    for _ in range(299):
        trainer.update()
    trainer.meters.read()
    trainer.update()
    assert trainer.meters.read()["regression loss"] < first / 4
    # It regresses z to the very sample that the teacher makes of it.
    z = evaluation_noise((2,), 500)
    made, target = trainer.sample(z), integrate(trainer.teacher, z, 10)
    assert float((made - target).square().sum(1).mean()) < first / 4
    assert distance_of(trainer) < before / 2


def test_regression_needs_a_teacher_that_follows_a_flow():
    held = {"name": "digit_pairs"}
    network = {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1}
    described = teachers.Description(network, path="brownian-bridge", predict="x0", data=data.load(held).config)
    model = teachers.Model(random_network(network), described)
    with pytest.raises(UserError, match="follow from the noise: from x0 on BrownianBridge they are random"):
        trainer_of(None, held, model, path={"match": "x0"}, **REGRESSION)


# -- learning, and going on


def test_a_discriminator_learns_and_the_generator_from_it(points_teacher):
    """Its loss falls below that of one who only guesses, ``2 log 2``, although the generator improves meanwhile."""
    settings = {"batch": 128, "updates": 200, "t_start": 0.0, "fake_turns": 2, "objective": {"name": "uid"}}
    trainer = trainer_of(None, POINTS, points_teacher(), gan={"weight_fake": 1.0, "weight_generator": 0.3}, **settings)
    before = distance_of(trainer)
    losses = []
    for _ in range(200):
        trainer.update()
        losses.append(trainer.meters.read()["discriminator loss"])
    assert losses[0] == pytest.approx(2 * math.log(2), abs=0.2)
    assert min(losses) < 1.2
    assert distance_of(trainer) < before / 2


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Distiller, {"gan": GAN}),
        (RegressionTrainer, REGRESSION),
        (RegressionTrainer, {**REGRESSION, "steps": [1, 2]}),
    ],
    ids=["gan", "regression", "steps"],
)
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, cls, settings):
    file = tmp_path / "teacher.safetensors"
    held = {**POINTS, "n": 200, "n_heldout": 50}
    teachers.save(file, random_network(MLP).state_dict(), teachers.Description(MLP, data=held))
    config = configs.from_mapping(
        {
            "data": held,
            "distill": {"teacher": str(file), "batch": 8, "updates": 9, "ema": [0.9], "export": 0.9, **settings},
            "run": {"log_every": 2, "checkpoint_every": 3, "tensorboard": False, "progress": False, "accumulate": 2},
        }
    )

    def run(folder, resume=False):
        torch.manual_seed(0)
        return train("distill", config, folder, resume, False, "realuid-fast distill")[0]

    whole = run(tmp_path / "whole")
    update = cls.update

    def stopping(self):
        update(self)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cls, "update", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut")
    monkeypatch.setattr(cls, "update", update)
    cut = run(tmp_path / "cut", resume=True)
    first, second = load_file(str(whole)), load_file(str(cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [
        [",".join(line.split(",")[:-2]) for line in (folder / "log.csv").read_text().splitlines()]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert logs[0] == logs[1]
