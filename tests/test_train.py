"""Training: configuration, the step against plain autograd, repeatability, interruption and resumption, folders."""

import contextlib
import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import realuid_fast as rf
from realuid_fast import data, functional, paths, sampling, teachers
from realuid_fast.couplings import couple
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.evaluate.table import sampler
from realuid_fast.generator import Generator, _key, frozen_view
from realuid_fast.networks import build
from realuid_fast.noise import normal
from realuid_fast.pictures import grid, picture
from realuid_fast.sampling import starting, state_from, step_at
from realuid_fast.train import checkpoint, loop
from realuid_fast.train import config as configs
from realuid_fast.train.batches import Batches
from realuid_fast.train.distill import Distiller
from realuid_fast.train.jobs import distiller as distiller_of
from realuid_fast.train.jobs import free_cores, resolve, train
from realuid_fast.train.logging import CsvLog, Events, convergence_plot, read_csv
from realuid_fast.train.meters import Fetched, Meters
from realuid_fast.train.phases import Phases
from realuid_fast.train.teacher import TeacherTrainer
from realuid_fast.train.tripwires import Tripwires

MLP = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
LABELLED = {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1, "num_classes": 10}
UNET = {"kind": "unet", "dim": [1, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4}
POINTS = {"name": "eight_gaussians", "n": 200, "n_heldout": 50}


def random_network(network, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(network)
        for p in net.parameters():
            # Fresh networks return zero: give every parameter something to say.
            torch.nn.init.normal_(p, std=0.3)
    return net


def save_teacher(file, network=MLP, dataset=None):
    described = teachers.Description(network, data=dataset or POINTS)
    teachers.save(file, random_network(network).state_dict(), described)
    return file


def settings(teacher_file, /, **sections):
    base = {
        "data": POINTS,
        "distill": {
            "teacher": str(teacher_file),
            "batch": 8,
            "updates": 12,
            "fake_turns": 2,
            "generator": {"warmup": 3, "decay": "cosine"},
            "ema": [0.9],
            "export": 0.9,
        },
        "teacher": {"batch": 8, "updates": 12, "ema": [0.9], "export": 0.9},
        "run": {
            "log_every": 5,
            "evaluate_every": 4,
            "evaluate_samples": 20,
            "checkpoint_every": 5,
            "tensorboard": False,
            "progress": False,
        },
    }
    return configs.merge(base, sections)


def distiller(network=UNET, dataset="digits", **sections):
    held = data.load(dataset)
    model = teachers.Model(random_network(network), teachers.Description(network, data=held.config))
    return Distiller(configs.from_mapping(settings("x", data=held.config, **sections)), held, model)


# -- configuration


def test_every_shipped_configuration_is_valid_and_survives_a_round_trip(tmp_path):
    names = {file.stem for file in configs.CONFIGS.glob("*.yaml")}
    assert names >= {"digits", "demo", "mixture", "folder"}
    for name in names:
        config = configs.load(name)
        config.distill.objective.build()
        config.path.build()
        configs.save(config, tmp_path / "config.yaml")
        assert configs.load(tmp_path / "config.yaml") == config


def test_overrides_reach_their_keys_with_their_types():
    changes = ["distill.generator.lr=1e-4", "run.tensorboard=false", "distill.ema=[0.5, 0.9]", "distill.export=0.5"]
    config = configs.load("digits", [*changes, "run.seed=3", "distill.teacher_decay=0.9", "path.match=x0"])
    assert config.distill.generator.lr == 1e-4
    assert config.run.tensorboard is False
    assert config.distill.ema == (0.5, 0.9)
    assert config.run.seed == 3
    assert config.distill.teacher_decay == 0.9
    assert config.distill.generator.betas == configs.load("digits").distill.generator.betas


def test_a_data_set_of_another_name_starts_afresh():
    config = configs.load("mixture", ["data.name=folder", "data.path=here"])
    assert config.data == {"name": "folder", "path": "here"}
    assert configs.load("folder", ["data.path=here"]).data["size"] == configs.load("folder").data["size"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("distill.bach=3", "no key 'distill.bach' in the configuration, did you mean batch"),
        ("distil.batch=3", "no key 'distil'.*did you mean distill"),
        ("distill.batch=many", "distill.batch must be a whole number, got 'many'"),
        ("distill.batch=2.5", "distill.batch must be a whole number"),
        ("distill.batch=true", "distill.batch must be a whole number"),
        ("distill.batch=0", "distill.batch must be at least 1"),
        ("distill.generator.lr=fast", "distill.generator.lr must be a number"),
        ("distill.generator=3", "distill.generator must be a section"),
        ("distill.fake.betas=[0.1]", "distill.fake.betas must be a list of 2 numbers"),
        ("distill.ema=0.9", "distill.ema must be a list of numbers"),
        ("run.progress=3", "run.progress must be true or false"),
        ("data=3", "data must be a section"),
        ("path.name=[1]", "path.name must be text"),
        ("distill.export=0.5", "distill.export must be 0 or one of distill.ema"),
        ("run.seed=-1", "run.seed must not be negative"),
        ("seed", "must read key.sub=value"),
        ("run..seed=1", "must read key.sub=value"),
        ("run.seed=[1", "not valid YAML"),
    ],
)
def test_a_bad_override_is_named(override, sentence):
    with pytest.raises(UserError, match=sentence):
        configs.load("digits", [override])


def test_bad_configuration_files(tmp_path):
    with pytest.raises(UserError, match="there is no configuration 'nothing'"):
        configs.load("nothing")
    file = tmp_path / "c.yaml"
    for text, sentence in (("- 1", "must hold a mapping"), ("a: [", "not valid YAML"), ("base: nothing", "no config")):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            configs.load(file)


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ({"name": "realuid", "alpha": 1.0, "beta": 0.9}, "alpha = 1 requires beta = 1"),
        ({"name": "gan"}, "must be one of uid, realuid, general"),
    ],
)
def test_objectives_that_cannot_be_are_refused(objective, sentence):
    with pytest.raises(UserError, match=sentence):
        distiller(distill={"objective": objective})


# -- the step


@pytest.mark.parametrize("match", ["velocity", "x0"])
@pytest.mark.parametrize(
    "objective",
    [
        {"name": "uid"},
        {"name": "sid"},
        {"name": "dmd", "alpha": 0.9},
        {"name": "moment-matching"},
        {"name": "realuid", "alpha": 0.9, "beta": 0.95},
        {"name": "general", "alpha": 0.9, "beta": 0.95, "gamma": 0.8, "kappa": 0.95},
    ],
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


@pytest.mark.parametrize("labelled", [False, True])
def test_fake_turn_equals_plain_autograd(labelled):
    objective = {"name": "general", "alpha": 0.9, "beta": 0.95, "gamma": 0.8, "kappa": 1.0}
    trainer = distiller(LABELLED if labelled else UNET, distill={"objective": objective})
    state = copy.deepcopy(trainer.state_dict())
    generated = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) if labelled else None
    seen = {}
    trainer.fake_optimiser.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in trainer.fake.named_parameters()}
    )
    trainer.fake_turn(generated, labels)

    trainer.draws.set_state(state["draws"])
    trainer.noise.load_state_dict(state["noise"])
    trainer.batches.load_state_dict(state["batches"])
    real, real_labels = trainer.batches.next()
    t = trainer.path.sample_time(8, trainer.draws).repeat(2)
    coef, key = trainer.path.coefficients(t), trainer.noise.next_key()
    x = torch.cat([generated, real])
    y = torch.cat([labels, real_labels]) if labelled else None
    x_t = rf.interpolate(x, coef, key, noise_rows=8)
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
        noise_rows=8,
    )
    loss.backward()
    assert trainer.meters.read()["fake loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, p in trainer.fake.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


def test_frozen_views_share_memory_and_follow_updates():
    net = build(MLP)
    view = frozen_view(net)
    assert not any(p.requires_grad for p in view.parameters())
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    t, x = torch.rand(3), torch.randn(3, 2)
    assert torch.equal(view(t, x), net(t, x))
    other = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    assert frozen_view(net, other).first.weight.data_ptr() == other["first.weight"].data_ptr()


def test_a_frozen_view_is_a_network_at_its_average():
    net = build(MLP)
    net.last.bias.requires_grad_(False)
    optimiser = rf.optim.FusedAdam([p for p in net.parameters() if p.requires_grad], ema_decays=(0.9,))
    view = rf.frozen_view(net, optimiser.averages(0.9))
    t, x = torch.rand(3), torch.randn(3, 2)
    for _ in range(2):
        (net(t, x) - 1).square().sum().backward()
        optimiser.step()
    averages = optimiser.averages(0.9)
    for (name, p), seen in zip(net.named_parameters(), view.parameters(), strict=True):
        assert torch.equal(seen, averages.get(p, p)), name
        assert seen.data_ptr() == averages.get(p, p).data_ptr()
    assert not torch.equal(view(t, x), net(t, x))
    with pytest.raises(UserError, match="these are another network's"):
        rf.frozen_view(build(MLP), averages)


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


def test_generator_starts_as_the_teachers_prediction():
    net = random_network(MLP)
    z = torch.randn(5, 2)
    expected = 0.7 * z + 0.7 * net(torch.full((5,), 0.3), 0.7 * z)
    torch.testing.assert_close(Generator(net, 0.3)(z), expected)
    with pytest.raises(UserError, match="t_start"):
        Generator(net, 1.0)


def test_teachers_that_do_not_fit_are_refused():
    held = data.load("digits")
    net = random_network(MLP)
    vp = teachers.Description(UNET, path="vp", path_settings={"beta_max": 12.0}, predict="noise")
    for description, path, sentence in (
        (teachers.Description(MLP), {}, r"samples of shape \(2,\), data set 'digits' has \(1, 8, 8\)"),
        (vp, {"predict": "velocity"}, "the teacher predicts noise, not path.predict velocity"),
        (vp, {"name": "linear"}, "trained on the path 'vp', not on path.name 'linear'"),
        (vp, {"name": "vp", "settings": {"beta_max": 20.0}}, r"'beta_max': 12.0}, not with path.settings .*20.0"),
        (vp, {"predict": "residual"}, "the teacher predicts noise, not path.predict residual"),
        (teachers.Description(UNET, path="none"), {}, "path.name must be one of linear"),
    ):
        config = configs.from_mapping(settings("x", data={"name": "digits"}, path=path))
        with pytest.raises(UserError, match=sentence):
            Distiller(config, held, teachers.Model(net, description))
    labelled = {**LABELLED, "num_classes": 5}
    with pytest.raises(UserError, match="knows 5 classes, data set 'digits' has 10"):
        distiller(labelled)


def test_second_stage_goes_on_from_a_student(tmp_path):
    first = distiller(distill={"t_start": 0.28})
    for _ in range(3):
        first.update()
    file = tmp_path / "student.safetensors"
    teachers.save(file, *first.exported())
    for source in (file, tmp_path):
        second = distiller(distill={"t_start": 0.28, "start": str(source)})
        for name, tensor in first.student.net.state_dict().items():
            assert torch.equal(second.generator.net.state_dict()[name], tensor)
            assert torch.equal(second.student.net.state_dict()[name], tensor)
        # The fake model begins at the teacher.
        for ours, theirs in zip(second.fake.parameters(), second.teacher.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    # The average remembers its start: one step moves it by 1 - 0.9 of the way, where a fresh one would follow.
    start = {name: tensor.clone() for name, tensor in second.student.net.named_parameters()}
    second.update()
    for name, now in second.generator.net.named_parameters():
        torch.testing.assert_close(second.student.net.state_dict()[name], torch.lerp(start[name], now.detach(), 0.1))

    with pytest.raises(UserError, match=r"is a student of t_start = 0.28, this run is one of 0"):
        distiller(distill={"t_start": 0.0, "start": str(file)})
    with pytest.raises(UserError, match="has another network than the teacher"):
        distiller(LABELLED, distill={"t_start": 0.28, "start": str(file)})
    with pytest.raises(UserError, match="there is no file"):
        distiller(distill={"start": str(tmp_path / "gone")})


def test_second_stage_from_another_average(tmp_path):
    """The averages of a run's folder, which has exported one of three, and of a published checkpoint with all three."""
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    own = {"ema": [0.5, 0.7, 0.9], "ema_warmup": False, "t_start": 0.0, "objective": {"name": "uid"}}
    first = settings(teacher, distill=own)
    train("distill", configs.from_mapping(first), tmp_path / "run", False, False, "")
    run = tmp_path / "run"
    kept = checkpoint.read(sorted((run / "checkpoints").iterdir())[-1])["trainer"]
    averages = {0.0: kept["generator"], **kept["generator_optimiser"]["ema"]}

    def start(source, decay, **distill):
        distill = {**first["distill"], "start": str(source), "start_decay": decay, **distill}
        return Distiller(
            configs.from_mapping({**first, "distill": distill}), data.load(POINTS), teachers.load_teacher(teacher)
        )

    def is_at(trainer, state):
        of_all = [trainer.generator.net.state_dict(), *trainer.generator_optimiser.ema.values()]
        return all(torch.equal(each[name], value) for each in of_all for name, value in state.items())

    for decay, state in averages.items():
        assert is_at(start(run, decay), state)
        assert sum(is_at(start(run, decay), other) for other in averages.values()) == 1
    assert is_at(start(run, None), averages[0.9])
    assert is_at(start(run / "student.safetensors", 0.9), averages[0.9])
    assert teachers.load(run / "student.safetensors").description.decay == 0.9
    with pytest.raises(UserError, match=r"start_decay 0\.5 is not in .*student\.safetensors, which holds 0\.9"):
        start(run / "student.safetensors", 0.5)
    with pytest.raises(UserError, match=r"start_decay 0\.6 is not in .*run, only 0, 0\.5, 0\.7, 0\.9"):
        start(run, 0.6)
    (run / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"best.safetensors: nothing was evaluated .*set distill\.start=.*run to go on"):
        start(run / "best.safetensors", 0.9)

    published = tmp_path / "student.pt"
    head = {"cls_pred_branch.0.bias": torch.zeros(3)}
    content = {"ema_gens": {str(d): {**averages[d], **head} for d in (0.5, 0.7, 0.9)}, "gen": averages[0.0], "step": 9}
    torch.save(content, published)
    assert is_at(start(published, 0.7), averages[0.7])
    assert is_at(start(published, None), averages[0.9])
    with pytest.raises(UserError, match=r"has no average of decay 0\.6, only 0, 0\.5, 0\.7, 0\.9"):
        start(published, 0.6)
    with pytest.raises(UserError, match=r"is a student of t_start = 0, this run is one of 0\.28"):
        start(published, 0.7, t_start=0.28)

    for file in (run / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="is no sound checkpoint of a student: it is cut short"):
        start(run, 0.5)
    assert is_at(start(run, 0.9), averages[0.9])
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"0\.5 is not what .*run exported, and it has no checkpoint left"):
        start(run, 0.5)


def predictions(path):
    """The predictions that a path has samples for, with a match space each."""
    found = {}
    for predict in paths.PREDICTIONS:
        for match in paths.MATCH_SPACES[:2]:
            with contextlib.suppress(UserError):
                path.time_range(match, predict)
                found[predict] = match
    return found


ONE_SIDED = [name for name, kind in paths.PATHS.items() if issubclass(kind, paths.OneSidedPath)]


@pytest.mark.parametrize("name", ONE_SIDED)
def test_every_prediction_on_every_path_trains_and_samples(name):
    held = data.load(POINTS)
    found = predictions(paths.build(name))
    assert set(found) == set(paths.PREDICTIONS) - {"residual"}
    for predict, match in found.items():
        path = {"name": name, "predict": predict, "match": match, "sampler": "log-normal"}
        content = settings("x", path=path, network=MLP, distill={"objective": {"name": "realuid"}})
        trainer = TeacherTrainer(configs.from_mapping(content), held)
        for _ in range(2):
            trainer.update()
        z = torch.randn(5, 2)
        assert torch.isfinite(trainer.sample(z)).all()
        state, description = trainer.exported()
        assert (description.path, description.predict) == (name, predict)

        # The configuration is silent: the teacher says what it was trained on.
        content["path"] = {"match": match, "sampler": "log-normal"}
        net = build(description.network)
        net.load_state_dict(state)
        student = Distiller(configs.from_mapping(content), held, teachers.Model(net, description))
        for _ in range(2):
            student.update()
        row = student.meters.read()
        assert all(math.isfinite(value) for value in row.values()), (predict, row)
        assert torch.isfinite(student.sample(z)).all()


@pytest.mark.parametrize(("name", "predict"), [("vp", "noise"), ("ve", "edm"), ("trigonometric", "v")])
def test_generator_turn_equals_plain_autograd_on_other_paths(name, predict):
    held, objective = data.load(POINTS), {"name": "realsid", "alpha": 0.9, "beta": 0.95}
    model = teachers.Model(random_network(MLP), teachers.Description(MLP, path=name, predict=predict))
    path = {"match": "x0", "weight": "edm", "sampler": "log-normal"}
    trainer = Distiller(configs.from_mapping(settings("x", path=path, distill={"objective": objective})), held, model)
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


PAIRS = {"name": "digit_pairs"}
SEEING = {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1, "num_classes": 10, "endpoint": True}


@pytest.mark.parametrize(
    ("name", "predict", "match", "network"),
    [
        ("brownian-bridge", "x0", "x0", SEEING),
        ("i2sb", "residual", "x0", UNET),
        ("ddbm-vp", "edm", "x0", {**UNET, "endpoint": True}),
        ("stochastic-interpolant", "velocity", "velocity", SEEING),
        ("i-cfm", "velocity", "x0", UNET),
        ("vp", "v", "velocity", SEEING),  # one-sided, conditional on the endpoint through the network alone
    ],
)
def test_pairs_from_teacher_to_distances(name, predict, match, network):
    held, path = data.load(PAIRS), {"name": name, "predict": predict, "match": match, "sampler": "stratified"}
    content = settings(
        "x",
        data=PAIRS,
        network=network,
        path=path,
        distill={"objective": {"name": "real-bridge"}},
        teacher={"batch": 4},
    )
    teacher = TeacherTrainer(configs.from_mapping(content), held)
    measure, noise = Measure(held), evaluation_noise(held.shape, 12)
    conditions = measure.conditions(teacher.network, 12)
    assert torch.equal(conditions[1], held.heldout_endpoints[:12])
    if "num_classes" in network:
        assert torch.equal(conditions[0], held.heldout_labels[:12])
    teacher.update()
    assert math.isfinite(measure(generate(teacher.sample, noise, *conditions)[0]).pair_error)
    state, description = teacher.exported()
    net = build(network)
    net.load_state_dict(state)
    student = Distiller(configs.from_mapping(content), held, teachers.Model(net, description))
    for _ in range(2):
        student.update()
    assert all(math.isfinite(value) for value in student.meters.read().values())
    made = student.sample(noise, *conditions)
    assert torch.isfinite(made).all()
    # The endpoint is heard.
    others = (conditions[0], conditions[1].flip(0))
    assert not torch.allclose(student.sample(noise, *others), made)


def test_two_sided_fake_turn_equals_plain_autograd():
    network = {**UNET, "endpoint": True}
    description = teachers.Description(network, path="brownian-bridge", predict="residual")
    held, path = data.load(PAIRS), {"match": "x0"}
    content = settings("x", data=PAIRS, path=path, distill={"objective": {"name": "real-bridge"}})
    trainer = Distiller(configs.from_mapping(content), held, teachers.Model(random_network(network), description))
    state = copy.deepcopy(trainer.state_dict())
    generated, ends = torch.randn(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = {}
    trainer.fake_optimiser.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in trainer.fake.named_parameters()}
    )
    trainer.fake_turn(generated, None, ends)

    trainer.draws.set_state(state["draws"])
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


def test_paths_with_an_endpoint_need_data_that_have_one():
    path = {"name": "i-cfm"}
    with pytest.raises(UserError, match="path ICFM has a second endpoint, data set 'eight_gaussians' has none"):
        TeacherTrainer(configs.from_mapping(settings("x", path=path, network=MLP)), data.load(POINTS))
    path = {"name": "brownian-bridge", "predict": "score", "match": "noise"}
    with pytest.raises(UserError, match="score gives neither velocity nor data"):
        TeacherTrainer(configs.from_mapping(settings("x", path=path, network=MLP)), data.load(POINTS))


@pytest.mark.parametrize("name", sorted(configs.presets()))
def test_every_preset_builds_and_runs_two_updates(name):
    """At its own path, objective and network, with small batches and, where it has none yet, a fresh teacher."""
    few = ["distill.batch=8", "teacher.batch=8", "run.tensorboard=false"]
    config = configs.load(configs.preset(name), few)
    source = config.data | ({"n": 100, "n_heldout": 20} if config.data["name"] == "eight_gaussians" else {})
    held = data.load(source if config.data["name"] != "transport" else config.data | {"n": 100})
    if config.distill.teacher in teachers.SHIPPED:
        model = teachers.load_teacher(config.distill.teacher)
    else:
        maker = configs.preset(Path(config.distill.teacher).parent.name)
        teacher = TeacherTrainer(configs.load(maker, few), held)
        for _ in range(2):
            teacher.update()
        state, description = teacher.exported()
        model = teachers.Model(build(description.network), description)
        model.net.load_state_dict(state)
    student = distiller_of(config)(config, held, model)
    for _ in range(2):
        student.update()
    assert all(math.isfinite(value) for value in student.meters.read().values())
    assert configs.presets()[name][0].isupper()


@pytest.mark.parametrize("case", ["noise", "noise inside classes", "endpoints"])
def test_a_teacher_on_coupled_batches(case, monkeypatch):
    """The pairs of a run without coupling, and the same noise or endpoints in the order of least distance."""
    held = data.load({"noise": POINTS, "endpoints": {"name": "transport", "n": 200}}.get(case, "digits"))
    path = {"name": "stochastic-interpolant"} if case == "endpoints" else {}
    network = {"kind": "mlp", "width": 8, "depth": 1} | ({"num_classes": 10} if "classes" in case else {})
    seen = []

    def recorded(x, coef, noise, endpoint=None):
        other = endpoint if case == "endpoints" else noise if noise.is_floating_point() else normal(noise, x)
        seen.append((x, other))
        return interpolate(x, coef, noise, endpoint)

    interpolate = rf.interpolate
    monkeypatch.setattr(functional, "interpolate", recorded)
    for coupling in (False, True):
        own = {"coupling": coupling, "batch": 32}
        content = settings("x", data=held.config, path=path, network=network, teacher=own)
        trainer = TeacherTrainer(configs.from_mapping(content), held)
        labels = trainer.batches.next()[1] if "classes" in case else None
        trainer.batches = Batches(held, 32, 0, torch.device("cpu"), trainer.draws)
        trainer.update()
        assert all(math.isfinite(value) for value in trainer.meters.read().values())
    (x, apart), (same, coupled) = seen
    assert torch.equal(x, same)
    torch.testing.assert_close(coupled, apart[couple(x, apart, labels)], rtol=0, atol=0)
    assert float((x - coupled).square().sum()) < float((x - apart).square().sum())
    if labels is not None:
        rows = {tuple(row.flatten().tolist()): int(label) for row, label in zip(apart, labels, strict=True)}
        assert [rows[tuple(row.flatten().tolist())] for row in coupled] == labels.tolist()


def test_couplings_of_what_is_paired_already_are_refused():
    content = settings("x", path={"name": "brownian-bridge"}, network=MLP, teacher={"coupling": True})
    held = data.load("digit_pairs")
    with pytest.raises(UserError, match="data set 'digit_pairs' is one of pairs"):
        TeacherTrainer(configs.from_mapping(content | {"network": {"kind": "mlp", "width": 8, "depth": 1}}), held)


def test_the_teachers_own_times_and_distance():
    path = {"name": "ve", "predict": "edm", "match": "x0", "sampler": "karras"}
    own = {"sampler": "log-normal", "sampler_settings": {"mean": -0.4}, "weight": "edm"}
    content = settings("x", path=path, teacher=own, network=MLP)
    trainer = TeacherTrainer(configs.from_mapping(content), data.load(POINTS))
    assert trainer.path.sampler == paths.samplers.LogNormal(-0.4, 1.2)
    t = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(trainer.interpolant.coefficients(t)[:, 8], (t**2 + 0.25) / (t * 0.5) ** 2)
    assert configs.from_mapping(content).path.build().path.sampler == paths.samplers.Karras()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("path.name=mine", "path.name must be one of linear, .*; got 'mine'"),
        ("path.settings.sigma=1", "path.settings has no key 'sigma' on the path 'linear'; it takes time_scale"),
        ("path.settings.data_at=3", "path.settings: data_at must be 0 or 1"),
        ("path.sampler=mine", "path.sampler must be one of uniform, .*, discrete; got 'mine'"),
        ("path.sampler_settings.mean=1", "path.sampler: the sampler 'stratified' has no setting 'mean'"),
        ("path.weight=mine", "path.weight must be one of one, edm, scale; got 'mine'"),
        ("path.match=mine", "path.match must be one of velocity, x0, noise; got 'mine'"),
        ("path.predict=residual", "path.match and path.predict: predict must not be residual on Linear"),
    ],
)
def test_a_path_that_cannot_be_is_named(override, sentence):
    with pytest.raises(UserError, match=sentence):
        configs.load("digits", [override]).path.build()


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


NULL = {**LABELLED, "null_label": True}


def test_label_dropout_trains_the_null_label():
    held = data.load("digits")
    content = settings("x", data=held.config, network={"kind": "mlp", "width": 8, "depth": 1, "num_classes": 10})
    content["teacher"] |= {"label_dropout": 0.5}
    trainer = TeacherTrainer(configs.from_mapping(content), held)
    assert trainer.net.null_label == 10
    labels = torch.zeros(1000, dtype=torch.int64)
    dropped = trainer._dropped(labels)
    assert set(dropped.tolist()) == {0, 10}
    assert 0.4 < float((dropped == 10).float().mean()) < 0.6
    before = trainer.net.label_embed.weight[10].clone()
    trainer.net.last.weight.data.normal_()  # a fresh network's last layer is zero and lets no gradient through
    for _ in range(3):
        trainer.update()
    assert not torch.equal(trainer.net.label_embed.weight[10], before)

    content["network"] |= {"null_label": False}
    with pytest.raises(UserError, match=r"teacher.label_dropout needs a class-conditional network with null_label"):
        TeacherTrainer(configs.from_mapping(content), held)
    with pytest.raises(UserError, match=r"label_dropout must lie in \[0, 1\), got 1"):
        configs.load("digits", ["teacher.label_dropout=1"])


def test_guided_sampling_follows_the_guided_velocity():
    net = random_network(NULL)
    z, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    t = torch.full((6,), 0.3)
    c, u = net(t, z, labels), net(t, z, torch.full((6,), 10))
    guided = sampling.call(net, t, z, labels, guidance=2.5)
    torch.testing.assert_close(guided, u + 2.5 * (c - u), rtol=1e-4, atol=1e-4)
    step = sampling.integrate(net, z, 1, labels=labels, guidance=2.5)
    at_start = sampling.call(net, torch.zeros(6), z, labels, guidance=2.5)
    torch.testing.assert_close(step, z + at_start)
    with pytest.raises(UserError, match="guidance needs a class-conditional network with a null label"):
        sampling.integrate(random_network(LABELLED), z, 1, labels=labels, guidance=2.0)


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
    teacher = TeacherTrainer(config, held)
    for _ in range(300):
        teacher.update()
    state, description = teacher.exported()
    net = build(network)
    net.load_state_dict(state)
    trainer = Distiller(config, held, teachers.Model(net, description))
    measure, noise = Measure(held), evaluation_noise((2,), 1000)
    before = measure(generate(trainer.sample, noise)[0]).distance
    for _ in range(300):
        trainer.update()
    after = measure(generate(trainer.sample, noise)[0]).distance
    assert before > 1.0
    assert after < 0.45


# -- runs


def run_in(folder, config, resume=False, job="distill"):
    torch.manual_seed(0)
    return train(job, configs.from_mapping(config), folder, resume, False, "realuid-fast distill")[0]


def results(folder):
    """Everything of a run that must repeat: weights, distances, and the log without its clock."""
    log = [
        {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")}
        for row in read_csv(folder / "log.csv")
    ]
    (file,) = set(folder.glob("*.safetensors")) - {folder / "best.safetensors"}
    return load_file(str(file)), (folder / "distances.csv").read_text(), log


def assert_same(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(tensor, b[0][name]) for name, tensor in a[0].items())
    assert a[1] == b[1]
    assert a[2] == b[2]


@pytest.fixture
def stop_after(monkeypatch):
    """Deliver a signal in the middle of the chosen update."""

    def prepare(cls, step, signum):
        update = cls.update

        def stopping(self):
            update(self)
            if self.step == step:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(cls, "update", stopping)
        return lambda: monkeypatch.setattr(cls, "update", update)

    return prepare


@pytest.mark.parametrize("network", [MLP, LABELLED, UNET], ids=["points", "labelled", "unet"])
def test_one_seed_gives_one_result(tmp_path, network):
    held = POINTS if network is MLP else {"name": "digits"}
    config = settings(save_teacher(tmp_path / "t.safetensors", network, held), data=held)
    config["distill"]["updates"] = 6
    for name in ("a", "b"):
        run_in(tmp_path / name, config)
    assert_same(results(tmp_path / "a"), results(tmp_path / "b"))
    config["run"] = {**config["run"], "seed": 1}
    run_in(tmp_path / "c", config)
    first, other = results(tmp_path / "a")[0], results(tmp_path / "c")[0]
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("job", ["distill", "train-teacher"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop_after, job, signum):
    config = settings(save_teacher(tmp_path / "t.safetensors", LABELLED), data={"name": "digits"}, network=LABELLED)
    run_in(tmp_path / "straight", config, job=job)
    undo = stop_after(Distiller if job == "distill" else TeacherTrainer, 7, signum)
    with pytest.raises(loop.Interrupted) as stop:
        run_in(tmp_path / "broken", config, job=job)
    undo()
    assert stop.value.code == 128 + signum
    assert [f.name for f in (tmp_path / "broken").glob("*.safetensors")] == ["best.safetensors"]
    assert sorted(f.name for f in (tmp_path / "broken/checkpoints").iterdir()) == [
        "update-00000005.pt",
        "update-00000007.pt",
    ]
    run_in(tmp_path / "broken", config, resume=True, job=job)
    assert_same(results(tmp_path / "straight"), results(tmp_path / "broken"))


def test_rows_after_the_checkpoint_are_cut_when_a_run_died_without_saving(tmp_path, monkeypatch):
    config = settings(save_teacher(tmp_path / "t.safetensors"))
    run_in(tmp_path / "straight", config)
    update = Distiller.update

    def dying(self):
        update(self)
        if self.step == 10:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Distiller, "update", dying)
    with pytest.raises(RuntimeError, match="power cut"):
        run_in(tmp_path / "died", config)
    monkeypatch.setattr(Distiller, "update", update)
    assert read_csv(tmp_path / "died/distances.csv")[-1]["update"] == 8  # the checkpoint is of update 5
    run_in(tmp_path / "died", config, resume=True)
    assert_same(results(tmp_path / "straight"), results(tmp_path / "died"))


def test_a_killed_process_continues_bit_for_bit(tmp_path):
    config = settings(save_teacher(tmp_path / "t.safetensors"))
    config["distill"]["updates"] = 400
    config["run"] = {**config["run"], "evaluate_every": 0, "log_every": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "realuid_fast.cli",
        "distill",
        "--config",
        str(tmp_path / "c.yaml"),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    log = out / "log.csv"
    # The file is there before the handlers are; its first row comes after.
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 1:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "--resume" in said
    assert "Traceback" not in said
    run_in(tmp_path / "straight", config)
    run_in(out, config, resume=True)
    assert_same(results(tmp_path / "straight"), results(out))


def test_a_second_signal_meets_the_default(capfd):
    # A shell that runs the tests in the background has SIGINT ignored.
    before = signal.getsignal(signal.SIGINT)
    with loop._signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before
    assert "a second signal" in capfd.readouterr().err


def test_nothing_is_overwritten_unasked(tmp_path):
    teacher = save_teacher(tmp_path / "t.safetensors")
    config = settings(teacher)
    config["distill"]["updates"] = 2
    run_in(tmp_path / "run", config)
    before = (tmp_path / "run/log.csv").read_text()
    with pytest.raises(UserError, match=r"is not empty: give --resume"):
        run_in(tmp_path / "run", config)
    assert (tmp_path / "run/log.csv").read_text() == before
    (tmp_path / "run/notes.txt").write_text("mine")
    loop.open_folder(tmp_path / "run", overwrite=True)
    # The configuration stays until the next run's takes its place: a kill in between must leave a run.
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"notes.txt", "config.yaml"}
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(UserError, match="no run, so --overwrite leaves it alone"):
        loop.open_folder(tmp_path / "run", overwrite=True)
    with pytest.raises(UserError, match="no run to resume"):
        loop.open_folder(tmp_path / "new", resume=True)
    with pytest.raises(UserError, match="cannot be written"):
        loop.open_folder(teacher / "under-a-file")


def test_a_resumed_run_keeps_its_configuration(tmp_path):
    kept = configs.from_mapping(settings("x"))
    configs.save(kept, tmp_path / "config.yaml")
    assert resolve(None, ["run.log_every=1"], tmp_path, True).run.log_every == 1
    with pytest.raises(UserError, match="batch differs from the run"):
        resolve(None, ["distill.batch=9"], tmp_path, True)
    with pytest.raises(UserError, match="no run to resume"):
        resolve(None, [], tmp_path / "new", True)


@pytest.mark.parametrize("job", ["train-teacher", "distill"])
def test_a_finished_run_is_extended(tmp_path, job):
    """A U-Net's run of 5 updates and 3 more at a constant rate has the weights of one of 8, to the last bit."""
    section = "teacher" if job == "train-teacher" else "distill"
    config = settings(save_teacher(tmp_path / "t.safetensors", UNET), data={"name": "digits"}, network=UNET)
    config["distill"]["generator"] = {"warmup": 1}
    config["run"]["evaluate_every"] = 0
    config[section]["updates"] = 8
    run_in(tmp_path / "straight", config, job=job)
    config[section]["updates"] = 5
    run_in(tmp_path / "extended", config, job=job)
    longer = resolve(None, [f"{section}.updates=8"], tmp_path / "extended", True)
    assert getattr(longer, section).updates == 8
    run_in(tmp_path / "extended", configs.to_mapping(longer), resume=True, job=job)
    straight, extended = results(tmp_path / "straight"), results(tmp_path / "extended")
    assert all(torch.equal(tensor, extended[0][name]) for name, tensor in straight[0].items())
    assert configs.load(tmp_path / "extended/config.yaml") == configs.from_mapping(configs.to_mapping(longer))
    with pytest.raises(UserError, match=rf"{section}\.updates 7 differs from the run's 8: a run can only be extended"):
        resolve(None, [f"{section}.updates=7"], tmp_path / "extended", True)


def test_an_extended_run_says_that_its_rate_goes_up_again(tmp_path):
    configs.save(configs.from_mapping(settings("x")), tmp_path / "config.yaml")
    with pytest.warns(UserWarning, match=r"distill\.updates goes from 12 to 20: the learning rate now falls over 20"):
        resolve(None, ["distill.updates=20"], tmp_path, True)


def test_a_run_leaves_its_logs_and_pictures(tmp_path):
    config = settings(save_teacher(tmp_path / "t.safetensors", LABELLED), data={"name": "digits"})
    config["run"] = {**config["run"], "sample_every": 6, "tensorboard": True, "timings": True}
    config["distill"]["updates"] = 6
    file = run_in(tmp_path / "run", config)
    names = {f.name for f in (tmp_path / "run").iterdir()}
    assert names == {
        "best.safetensors",
        "checkpoints",
        "config.yaml",
        "distances.csv",
        "events",
        "log.csv",
        "samples",
        "student.safetensors",
        "timings.json",
    }
    assert (tmp_path / "run/samples/update-00000006.png").stat().st_size > 1000
    log = read_csv(tmp_path / "run/log.csv")
    assert [row["update"] for row in log] == [5, 6]
    assert all(math.isfinite(value) for row in log for value in row.values())
    assert log[-1]["images_per_second"] > 0
    assert "fake backward" in (tmp_path / "run/timings.json").read_text()
    assert loop.plot_distances(tmp_path / "run", {"floor": 3.0}, "distance").stat().st_size > 1000
    student = teachers.load(file, role="student")
    assert student.description.t_start == pytest.approx(2 / 7)  # noise level 2.5 on the linear path
    assert student.description.teacher == config["distill"]["teacher"]


# -- pieces


def test_meters_give_means_and_start_afresh():
    meters = Meters(("a", "b"))
    meters.add("a", torch.tensor(1.0))
    meters.add("a", torch.tensor(3.0))
    read = meters.read()
    assert read["a"] == 2.0
    assert math.isnan(read["b"])
    assert math.isnan(meters.read()["a"])


def test_meters_divide_sums_by_sums():
    meters = Meters(("loss", "a", "b"))
    meters.add("loss", torch.tensor(2.0))
    meters.add("a", torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    meters.add("a", torch.tensor([[5.0, 0.0], [2.0, 0.0]]))
    read = meters.read()
    assert (read["loss"], read["a"]) == (2.0, 1.5)
    assert math.isnan(read["b"])


def test_tripwires_equal_their_formulas(monkeypatch):
    trainer, seen = distiller(), {}
    trainer.update()
    trainer.meters.read()
    wires = trainer.tripwires

    def watched(*given):
        seen["given"] = given
        return wires(*given)

    monkeypatch.setattr(trainer, "tripwires", watched)
    trainer.update()
    row = trainer.meters.read()
    teacher_out, fake_out, x, _, coef, key = seen["given"][:6]
    t, tgt = coef[:, 0], x - normal(key, x)
    for i, name in enumerate(Tripwires.names[:4]):
        inside = (t >= i / 4) & (t < (i + 1) / 4)
        above = (fake_out - teacher_out)[inside].flatten(1).norm(dim=1).sum()
        assert row[name] == pytest.approx(float(above / teacher_out[inside].flatten(1).norm(dim=1).sum()), rel=1e-5)
    ratio = (fake_out - tgt).square().sum() / (teacher_out - tgt).square().sum()
    assert row["error ratio"] == pytest.approx(float(ratio), rel=1e-4)
    # As many held-out samples as the batch: the quantiles are the sorted samples themselves.
    held = data.load("digits")
    few = Tripwires(data.Dataset("few", held.train, held.heldout[:8]), 8, torch.device("cpu"))
    distance = few(teacher_out, fake_out, held.pixels("heldout")[:8].flip(0) + 0.5, None, coef, key)[0, -1]
    shift = 0.5 * few._directions.sum(0)
    assert float(distance) == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-4)


def test_a_row_is_written_when_the_device_has_sent_it(tmp_path, monkeypatch):
    """A device that is behind: rows come one interval late, all of them before a checkpoint and at the end."""
    config = settings(save_teacher(tmp_path / "t.safetensors"), run={"log_every": 2, "evaluate_every": 0})
    run_in(tmp_path / "straight", config)
    written, write, update = [], CsvLog.write, Distiller.update
    monkeypatch.setattr(Fetched, "ready", False)
    monkeypatch.setattr(CsvLog, "write", lambda self, row: (written.append(row["update"]), write(self, row)))
    late = {}

    def watched(self):
        update(self)
        late[self.step] = list(written)

    monkeypatch.setattr(Distiller, "update", watched)
    run_in(tmp_path / "behind", config)
    assert (late[5], late[6], late[9], late[12]) == ([2], [2, 4], [2, 4, 6], [2, 4, 6, 8, 10])
    assert results(tmp_path / "straight")[2] == results(tmp_path / "behind")[2]


def test_a_run_says_once_when_a_precision_is_too_coarse(tmp_path, capsys):
    """A fake model that starts as the teacher is nearer to it than bfloat16 can tell."""
    teacher = save_teacher(tmp_path / "teacher.safetensors", LABELLED, {"name": "digits"})
    config = settings(teacher, data={"name": "digits"}, distill={"generator_precision": "bf16"}, run={"log_every": 1})
    run_in(tmp_path / "run", config)
    said = capsys.readouterr().err
    assert said.count("update 1: distill.generator_precision bf16 is too coarse") == 1
    assert said.count("too coarse") == 1


def test_phases_time_on_request_only():
    silent, timed = Phases(), Phases(timings=True)
    for phases in (silent, timed):
        with phases("work"):
            time.sleep(0.01)
    assert silent.seconds == {}
    assert timed.seconds["work"] > 0.009


def test_phases_need_no_nvtx(monkeypatch):
    monkeypatch.setattr("realuid_fast.train.phases.nvtx", None)
    phases = Phases(timings=True)
    with phases("work"):
        pass
    assert phases.seconds["work"] >= 0


def test_csv_is_cut_back(tmp_path):
    log = CsvLog(tmp_path / "log.csv", ["a", "b"])
    log.write({"a": 1})
    position = log.position
    log.write({"a": 2, "b": 3})
    log.cut(position)
    rows = read_csv(log.file)
    assert len(rows) == 1
    assert rows[0]["a"] == 1.0
    assert math.isnan(rows[0]["b"])
    assert CsvLog(log.file, ["a", "b"]).position == position


def test_pictures(tmp_path):
    sheet = grid(torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8), columns=3)
    assert sheet.shape == (2 * 33 + 1, 3 * 33 + 1, 3)
    assert sheet[1, 1].tolist() == [0, 0, 0]
    assert sheet[65, 98].tolist() == [255, 255, 255]
    assert picture(torch.randn(50, 2)).shape == (400, 400, 3)
    curves = {"student": [(0, 10.0), (1, math.inf), (2, 5.0)]}
    convergence_plot(curves, {"floor": 1.0}, "distance", tmp_path / "p.png", {"student": [(9, 11), (9, 11), (4, 6)]})
    assert (tmp_path / "p.png").stat().st_size > 1000
    Events(None).scalars({"a": 1.0}, 0)


def test_measure_names_what_it_measures():
    digits, points = data.load("digits"), data.load(POINTS)
    measure = Measure(digits)
    assert "classifier" in measure.name
    assert measure(digits.pixels("heldout")).distance == pytest.approx(0.0, abs=1e-6)
    assert measure.floor().distance > 1.0
    assert Measure(points).name.startswith("sliced Wasserstein")
    assert measure(torch.full((20, 1, 8, 8), math.nan)).distance == math.inf
    # To the training split the same digits are at 0, and the held-out ones as far as the training digits from those.
    assert measure.to_train(digits.pixels("train")) == pytest.approx(0.0, abs=1e-6)
    assert measure.to_train(digits.pixels("heldout")) == pytest.approx(measure.floor().distance, rel=1e-6)
    assert measure.to_train(torch.full((20, 1, 8, 8), math.nan)) == math.inf
    assert Measure(points).to_train(points.pixels("train")) == pytest.approx(0.0, abs=1e-6)
    # Between two sets, either way round.
    held, train = digits.pixels("heldout"), digits.pixels("train")
    assert measure.between(held, train) == pytest.approx(measure.between(train, held), rel=1e-6)
    assert measure.between(held, train) == measure.to_train(held)
    for either, of in ((measure, train), (Measure(points), points.pixels("train"))):
        assert either.between(of, torch.full_like(of, math.nan)) == math.inf
    images = data.Dataset(
        "folder", torch.randint(0, 256, (30, 3, 4, 4)).byte(), torch.randint(0, 256, (9, 3, 4, 4)).byte()
    )
    pixels = Measure(images)
    assert pixels.name == "Fréchet distance, 29 principal components of the pixels"
    assert pixels(images.pixels("heldout")).distance == pytest.approx(0.0, abs=1e-6)
    assert pixels(torch.ones(20, 3, 4, 4)).distance > pixels.floor().distance
    with pytest.raises(UserError, match="at least 2 held-out samples"):
        Measure(data.Dataset("folder", images.train, images.heldout[:1]))


def test_labels_keep_the_datas_proportions():
    digits = data.load("digits")
    measure, net = Measure(digits), build(LABELLED)
    labels = measure.labels(net, 2 * len(digits))
    assert torch.equal(labels.bincount(), 2 * digits.train_labels.bincount())
    assert measure.labels(build(MLP), 10) is None


def test_free_cores_is_at_least_one(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    assert free_cores() == 1
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert free_cores() == 4


def test_package_holds_its_configurations():
    assert {f.name for f in (Path(configs.__file__).parent.parent / "configs").iterdir()} >= {
        "digits.yaml",
        "folder.yaml",
    }
