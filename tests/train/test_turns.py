"""A turn of the distiller against plain autograd; what a turn loads and reads; whole updates that reach the data."""

import copy

import pytest
import torch

import realuid_fast as rf
from realuid_fast import data, paths, teachers
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build
from realuid_fast.noise import normal

from ..helpers import (
    LABELLED,
    MLP,
    NULL,
    PAIRS,
    POINTS,
    UNET,
    distiller,
    drawn_again,
    random_network,
    settings,
)

IN_X0 = [{"name": "sid"}, {"name": "dmd", "alpha": 0.9}]  # these are defined there alone
ANYWHERE = [
    {"name": "uid"},
    {"name": "moment-matching"},
    {"name": "realuid", "alpha": 0.9, "beta": 0.95},
    {"name": "general", "alpha": 0.9, "beta": 0.95, "gamma": 0.8, "kappa": 0.95},
]


@pytest.mark.parametrize(
    ("objective", "match"),
    [*((each, "velocity") for each in ANYWHERE), *((each, "x0") for each in [*ANYWHERE, *IN_X0])],
)
def test_generator_turn_equals_plain_autograd(objective, match):
    trainer = distiller(path={"match": match}, distill={"objective": objective})
    trainer.update()
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    loss, _ = trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.parameters()]

    # The same draws once more, and one graph through everything.
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    trainer.generator_optimiser.zero_grad()
    x = trainer.generator(normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8)))
    t = trainer.path.sample_time(8, trainer.draws)
    coef = trainer.path.coefficients(t, match=match)
    key = trainer.noise.next_key()
    x_t = rf.interpolate(x, coef, key)
    teacher_out, fake_out = (net.requires_grad_(False)(t, x_t) for net in (trainer.teacher, trainer.fake))
    plain = rf.functional.generator_loss(
        trainer.objective, teacher_out=teacher_out, fake_out=fake_out, x=x, x_t=x_t, coef=coef, noise=key
    )
    plain.backward()

    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=1e-5)
    for mine, p in zip(explicit, trainer.generator.parameters(), strict=True):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-5 * scale + 1e-7)
    assert all(p.grad is None for p in trainer.teacher.parameters())


@pytest.mark.parametrize(("labelled", "shared"), [(False, True), (True, True), (False, False)])
def test_fake_turn_equals_plain_autograd(labelled, shared):
    objective = {"name": "general", "alpha": 0.9, "beta": 0.95, "gamma": 0.8, "kappa": 1.0}
    distill = {"objective": objective, "shared_draws": shared}
    trainer = distiller(LABELLED if labelled else UNET, distill=distill)
    state = copy.deepcopy(trainer.state_dict())
    generated = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) if labelled else None
    seen = {}
    trainer.fake_optimiser.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in trainer.fake.named_parameters()}
    )
    trainer.fake_turn(generated, labels)

    real, real_labels, t, coef, key = drawn_again(trainer, state)
    x = torch.cat([generated, real])
    y = torch.cat([labels, real_labels]) if labelled else None
    rows = 8 if shared else 16
    assert torch.equal(t[:8], t[8:]) == shared
    x_t = rf.interpolate(x, coef, key, noise_rows=rows)
    teacher_out = trainer.teacher(t, x_t, y)
    loss = rf.functional.fake_loss(
        trainer.objective,
        fake_out=trainer.fake(t, x_t, y),
        x=x,
        x_t=x_t,
        coef=coef,
        noise=key,
        n_real=8,
        teacher_out=teacher_out,
        noise_rows=rows,
    )
    loss.backward()
    assert trainer.meters.read()["fake loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, p in trainer.fake.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


def test_each_turn_has_its_own_times_and_weight(monkeypatch):
    """Discrete tables of one time tell the turns apart; a turn that is not named keeps the run's law."""
    seen = []
    base = {"sampler": "discrete", "sampler_settings": {"times": [0.75]}, "match": "x0"}
    base |= {"fake": {"sampler": "discrete", "sampler_settings": {"times": [0.25]}, "weight": "scale"}}
    for own, expected in (
        ({}, (0.75, 1.0)),
        ({"sampler": "discrete", "sampler_settings": {"times": [0.5]}}, (0.5, 1.0)),
        ({"weight": "scale"}, (0.75, 0.75)),
    ):
        trainer = distiller(path={**base, "generator": own}, distill={"objective": {"name": "sid"}, "fake_turns": 1})
        drawn = trainer._interpolant
        monkeypatch.setattr(
            trainer, "_interpolant", lambda *given, drawn=drawn: seen.append(given[2:4]) or drawn(*given)
        )
        seen.clear()
        trainer.update()
        found = [(float(t[0]), float(coef[0, 8])) for t, coef in seen]
        assert found == [(0.25, 0.25), expected]
        for t, coef in seen:
            assert bool((t == t[0]).all())
            assert bool((coef[:, 8] == coef[0, 8]).all())


@pytest.mark.parametrize("objective", ["dmd", "diff-instruct", "sds"])
def test_guidance_at_times_of_its_own_equals_the_two_terms(objective):
    """Decoupled DMD: ``w (f - c)`` at the turn's times plus ``(s - 1) w' (u - c)`` at the guidance's, DMD's scaled."""
    law = {"sampler": "beta", "sampler_settings": {"a": 1.0, "b": 2.0}, "weight": "scale"}
    given = {"objective": {"name": objective}, "guidance": 2.5}
    trainer = distiller(NULL, path={"match": "x0", "guidance": law}, distill=given)
    trainer.update()
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.parameters()]

    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    trainer.generator_optimiser.zero_grad()
    labels = trainer._conditions(8)[0]
    x = trainer.generator(normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8)), labels)
    fixed, gradient, no_label = x.detach(), 0, torch.full_like(labels, trainer.teacher.null_label)
    for sampler, weight, factor in (
        (trainer.path.sampler, torch.ones_like, 1.0),
        (paths.samplers.Beta(1.0, 2.0), torch.clone, 1.5),
    ):
        t = sampler.draw(8, trainer.path, trainer.draws)
        coef = trainer.path.coefficients(t, "x0", "velocity")
        x_t = rf.interpolate(fixed, coef, trainer.noise.next_key())
        s = t.view(-1, 1, 1, 1)
        with torch.no_grad():
            conditional = x_t + (1 - s) * trainer.teacher(t, x_t, labels)
            if factor == 1.0:
                other = fixed if objective == "sds" else x_t + (1 - s) * trainer.fake(t, x_t, labels)
            else:
                other = x_t + (1 - s) * trainer.teacher(t, x_t, no_label)
        scale = 1 / (fixed - conditional).abs().mean((1, 2, 3)) if objective == "dmd" else 1.0
        gradient = gradient + (factor * weight(t) * scale).view(-1, 1, 1, 1) * (other - conditional) / 8
    x.backward(gradient)
    for mine, p in zip(explicit, trainer.generator.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


@pytest.mark.parametrize("objective", [{"name": "sds"}, *IN_X0])
def test_an_objective_of_x0_space_is_not_distilled_in_another(objective):
    with pytest.raises(UserError, match=r"match must be x0 for .*, not velocity: .* path\.match=x0"):
        distiller(distill={"objective": objective})


@pytest.mark.parametrize("given", [{"objective": {"name": "uid"}, "guidance": 2.0}, {"objective": {"name": "dmd"}}])
def test_guidance_has_times_of_its_own_only_where_it_adds_a_gradient_in_the_samples(given):
    with pytest.raises(UserError, match=r"guidance has times of its own only where it is not 1"):
        distiller(NULL, path={"guidance": {"weight": "scale"}}, distill=given)


@pytest.mark.parametrize(
    ("law", "sentence"),
    [
        ({"sampler": "karras", "sampler_settings": {"mean": 1.0}}, r"path\.fake\.sampler: the sampler 'karras' has no"),
        (
            {"sampler_settings": {"mean": 1.0}},
            r"path\.fake\.sampler_settings is given, but path\.fake\.sampler is null",
        ),
        ({"weight": "two"}, r"path\.fake\.weight must be one of one, edm, scale, noise; got 'two'"),
    ],
)
def test_a_turns_law_is_refused_by_its_own_name(law, sentence):
    with pytest.raises(UserError, match=sentence):
        distiller(path={"fake": law})


def test_uid_loads_no_real_data_and_alpha_decides():
    trainer = distiller(distill={"objective": {"name": "uid"}, "batch": 1353})
    assert trainer.batches is None
    with pytest.raises(UserError, match=r"batch 1353 is larger than data set 'digits', which has 1352 samples"):
        distiller(distill={"objective": {"name": "realuid"}, "batch": 1353})
    assert trainer.images_per_update == 3 * 1353


def test_the_step_reads_no_tensor_on_the_host(monkeypatch):
    trainer = distiller(LABELLED)
    trainer.update()

    # On CPU, where it costs nothing, the path checks its times; on a device it does not.
    monkeypatch.setattr(paths.checks, "host_checks_allowed", lambda _: False)

    def refuse(self, *_):
        raise AssertionError("a tensor was read on the host inside the step")

    for name in ("item", "__float__", "__int__", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    trainer.update()


@pytest.mark.parametrize(("name", "predict"), [("vp", "noise"), ("ve", "edm"), ("trigonometric", "v")])
def test_generator_turn_equals_plain_autograd_on_other_paths(name, predict):
    held, objective = data.load(POINTS), {"name": "realsid", "alpha": 0.9, "beta": 0.95}
    model = teachers.Model(random_network(MLP), teachers.Description(MLP, path=name, predict=predict))
    path = {"match": "x0", "weight": "edm", "sampler": "log-normal"}
    trainer = trainers.distiller(
        configs.from_mapping(settings("x", path=path, distill={"objective": objective})), held, model
    )
    trainer.update()
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    loss, _ = trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.parameters()]

    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    trainer.generator_optimiser.zero_grad()
    x = trainer.generator(normal(trainer.noise.next_key(), torch.empty(8, 2)))
    own = paths.PATHS[name](sampler="log-normal")
    t = own.sample_time(8, trainer.draws)
    coef, key = own.coefficients(t, "x0", predict, own.edm_weight), trainer.noise.next_key()
    x_t = rf.interpolate(x, coef, key)
    seen = own.network_time(t, predict), own.network_input(x_t, t, predict)
    teacher_out, fake_out = (net.requires_grad_(False)(*seen) for net in (trainer.teacher, trainer.fake))
    plain = rf.functional.generator_loss(
        trainer.objective, teacher_out=teacher_out, fake_out=fake_out, x=x, x_t=x_t, coef=coef, noise=key
    )
    plain.backward()
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=1e-5)
    for mine, p in zip(explicit, trainer.generator.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


def test_two_sided_fake_turn_equals_plain_autograd():
    network = {**UNET, "endpoint": True}
    description = teachers.Description(network, path="brownian-bridge", predict="residual")
    held, path = data.load(PAIRS), {"match": "x0"}
    content = settings("x", data=PAIRS, path=path, distill={"objective": {"name": "real-bridge"}})
    trainer = trainers.distiller(
        configs.from_mapping(content), held, teachers.Model(random_network(network), description)
    )
    state = copy.deepcopy(trainer.state_dict())
    generated, ends = torch.randn(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = {}
    trainer.fake_optimiser.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in trainer.fake.named_parameters()}
    )
    trainer.fake_turn(generated, None, ends)

    trainer.draws.set_state(state["ranks"][0]["draws"])
    trainer.noise.load_state_dict(state["noise"])
    trainer.batches.load_state_dict(state["batches"])
    real, _ = trainer.batches.next()
    row = int((held.train == real[0]).flatten(1).all(1).nonzero()[0])
    assert torch.equal(trainer.batches.endpoints()[0], held.train_endpoints[row])
    t = trainer.path.sample_time(8, trainer.draws).repeat(2)
    coef, key = trainer.path.coefficients(t, "x0", "residual"), trainer.noise.next_key()
    x, y = torch.cat([generated, real]), torch.cat([ends, trainer.batches.endpoints()])
    x_t = rf.interpolate(x, coef, key, y, noise_rows=8)
    out = trainer.fake(t, x_t, None, y)
    rf.functional.fake_loss(
        trainer.objective, fake_out=out, x=x, x_t=x_t, coef=coef, noise=key, n_real=8, endpoint=y, noise_rows=8
    ).backward()
    for name, p in trainer.fake.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    ("objective", "match"),
    [({"name": "general", "alpha": 0.9, "beta": 0.95, "gamma": 0.8}, "velocity"), ({"name": "dmd"}, "x0")],
)
def test_guided_turns_equal_plain_autograd(objective, match):
    """Both turns with a guided teacher against the guided field written out, network by network."""
    guided = distiller(NULL, distill={"guidance": 3.0, "objective": objective}, path={"match": match})
    plain = distiller(NULL, distill={"objective": objective}, path={"match": match})

    class Guided(torch.nn.Module):
        def forward(self, t, x, y):
            c, u = plain.teacher(t, x, y), plain.teacher(t, x, torch.full_like(y, 10))
            return u + 3.0 * (c - u)

    plain._run_teacher = Guided()
    for _ in range(2):
        guided.update()
        plain.update()
    for mine, theirs in zip(guided.generator.parameters(), plain.generator.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(guided.fake.parameters(), plain.fake.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    unguided = distiller(NULL, distill={"objective": objective}, path={"match": match})
    for _ in range(2):
        unguided.update()
    gaps = [float((a - b).abs().max()) for a, b in
            zip(guided.generator.parameters(), unguided.generator.parameters(), strict=True)]  # fmt: skip
    assert max(gaps) > 1e-3
    with pytest.raises(UserError, match="guidance needs a class-conditional network"):
        distiller(LABELLED, distill={"guidance": 3.0})


def test_distillation_moves_the_student_to_the_data():
    """Two Gaussian clouds: an untrained student far from the data comes near in some hundred updates."""
    held = data.load({"name": "eight_gaussians", "n": 2000, "n_heldout": 500})
    network = {"kind": "mlp", "shape": [2], "width": 32, "depth": 2}
    config = configs.from_mapping(
        settings(
            "x",
            network=network,
            teacher={"batch": 128, "updates": 300, "optimiser": {"lr": 3e-3}},
            distill={"batch": 128, "updates": 300, "t_start": 0.0, "generator": {"warmup": 10}},
        )
    )
    teacher = trainers.teacher_trainer(config, held)
    for _ in range(300):
        teacher.update()
    state, description = teacher.exported()
    net = build(network)
    net.load_state_dict(state)
    trainer = trainers.distiller(config, held, teachers.Model(net, description))
    measure, noise = Measure(held), evaluation_noise((2,), 1000)
    before = measure(generate(trainer.sample, noise)[0]).distance
    for _ in range(300):
        trainer.update()
    after = measure(generate(trainer.sample, noise)[0]).distance
    assert before > 1.0
    assert after < 0.45
