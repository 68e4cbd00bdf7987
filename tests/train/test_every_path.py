"""Every path, prediction and preset trains; paths with two ends take pairs."""

import contextlib
import math
from pathlib import Path

import pytest
import torch

from realuid_fast import data, paths, teachers
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure, evaluation_noise, generate
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.models import pairs
from realuid_fast.networks import build

from ..helpers import (
    MLP,
    PAIRS,
    POINTS,
    SEEING,
    UNET,
    settings,
)


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
        trainer = trainers.teacher_trainer(configs.from_mapping(content), held)
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
        student = trainers.distiller(configs.from_mapping(content), held, teachers.Model(net, description))
        for _ in range(2):
            student.update()
        row = student.meters.read()
        assert all(math.isfinite(value) for value in row.values()), (predict, row)
        assert torch.isfinite(student.sample(z)).all()


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
    teacher = trainers.teacher_trainer(configs.from_mapping(content), held)
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
    student = trainers.distiller(configs.from_mapping(content), held, teachers.Model(net, description))
    for _ in range(2):
        student.update()
    assert all(math.isfinite(value) for value in student.meters.read().values())
    made = student.sample(noise, *conditions)
    assert torch.isfinite(made).all()
    # The endpoint is heard.
    others = (conditions[0], conditions[1].flip(0))
    assert not torch.allclose(student.sample(noise, *others), made)


def test_paths_with_an_endpoint_need_data_that_have_one():
    path = {"name": "i-cfm"}
    with pytest.raises(UserError, match="path ICFM has a second endpoint, data set 'eight_gaussians' has none"):
        trainers.teacher_trainer(configs.from_mapping(settings("x", path=path, network=MLP)), data.load(POINTS))
    path = {"name": "brownian-bridge", "predict": "score", "match": "noise"}
    with pytest.raises(UserError, match="score gives neither velocity nor data"):
        trainers.teacher_trainer(configs.from_mapping(settings("x", path=path, network=MLP)), data.load(POINTS))


def short_teacher(file, few, held, folder):
    """The teacher of ``runs/presets/NAME/teacher.safetensors`` after two updates, and the one that it learns from."""
    maker = configs.preset(Path(file).parent.name)
    if source := configs.load(maker).teacher.guided:
        teachers.save(folder / "source.safetensors", *short_teacher(source, few, held, folder))
        few = [*few, f"teacher.guided={folder / 'source.safetensors'}"]
    teacher = trainers.teacher_trainer(configs.load(maker, few), held)
    for _ in range(2):
        teacher.update()
    return teacher.exported()


@pytest.mark.parametrize("name", sorted(configs.presets()))
def test_every_preset_builds_and_runs_two_updates(name, tmp_path, monkeypatch):
    """At its own path, objective and network, with small batches and, where it has none yet, a fresh teacher."""
    monkeypatch.setattr(trainers, "_MEASURED", 3)
    few = ["distill.batch=8", "teacher.batch=8", "run.tensorboard=false"]
    config = configs.load(configs.preset(name), few)
    source = config.data | ({"n": 100, "n_heldout": 20} if config.data["name"] == "eight_gaussians" else {})
    held = data.load(source if config.data["name"] != "transport" else config.data | {"n": 100})
    if config.distill.teacher in teachers.SHIPPED:
        model = teachers.load_teacher(config.distill.teacher)
    else:
        state, description = short_teacher(config.distill.teacher, few, held, tmp_path)
        model = teachers.Model(build(description.network), description)
        model.net.load_state_dict(state)
    if config.distill.regression.pairs:
        few = [*few, f"distill.regression.pairs={tmp_path / 'pairs.safetensors'}"]
        pairs.write(
            tmp_path / "pairs.safetensors", *torch.randn(2, 20, *held.shape), torch.zeros(20, dtype=torch.int64)
        )
        config = configs.load(configs.preset(name), few)
    if config.distill.regression.previous:
        earlier = trainers.trainer("distill", configs.load(configs.preset("regression"), few), held, model)
        teachers.save(tmp_path / "earlier.safetensors", *earlier.exported())
        few = [*few, f"distill.regression.previous={tmp_path / 'earlier.safetensors'}"]
        config = configs.load(configs.preset(name), few)
    if config.distill.regression.first_stage:
        earlier = trainers.trainer("distill", configs.load(configs.preset("sfd"), few), held, model)
        teachers.save(tmp_path / "earlier.safetensors", *earlier.exported())
        few = [*few, f"distill.regression.first_stage={tmp_path / 'earlier.safetensors'}"]
        config = configs.load(configs.preset(name), few)
    student = trainers.trainer("distill", config, held, model)
    for _ in range(2):
        student.update()
    assert all(math.isfinite(value) for value in student.meters.read().values())
    assert configs.presets()[name][0].isupper()
