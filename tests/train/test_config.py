"""The training configuration: shipped files, overrides with their types, and refusals that name the key."""

import os
from pathlib import Path

import pytest

from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import free_cores, resolve

from ..helpers import distiller, settings


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
        ("distill.bach=3", "no key 'distill.bach' in the configuration, did you mean distill.batch"),
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


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("path.name=mine", "path.name must be one of linear, .*; got 'mine'"),
        ("path.settings.sigma=1", "path.settings has no key 'sigma' on the path 'linear'; it takes time_scale"),
        ("path.settings.data_at=3", "path.settings: data_at must be 0 or 1"),
        ("path.sampler=mine", "path.sampler must be one of uniform, .*, discrete; got 'mine'"),
        ("path.sampler_settings.mean=1", "path.sampler: the sampler 'stratified' has no setting 'mean'"),
        ("path.weight=mine", "path.weight must be one of one, edm, scale, noise; got 'mine'"),
        ("path.match=mine", "path.match must be one of velocity, x0, noise; got 'mine'"),
        ("path.predict=residual", "path.match and path.predict: predict must not be residual on Linear"),
    ],
)
def test_a_path_that_cannot_be_is_named(override, sentence):
    with pytest.raises(UserError, match=sentence):
        configs.load("digits", [override]).path.build()


def test_a_resumed_run_keeps_its_configuration(tmp_path):
    kept = configs.from_mapping(settings("x"))
    configs.save(kept, tmp_path / "config.yaml")
    assert resolve(None, ["run.log_every=1"], tmp_path, True).run.log_every == 1
    with pytest.raises(UserError, match="batch differs from the run"):
        resolve(None, ["distill.batch=9"], tmp_path, True)
    with pytest.raises(UserError, match="no run to resume"):
        resolve(None, [], tmp_path / "new", True)


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
