"""Settings: each says its meaning and is held to it, all of them are listed, and the listing is a configuration."""

import importlib.util
import inspect
import re
import sys
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

from realuid_fast import choices, cli, data, networks
from realuid_fast.bounds import Range
from realuid_fast.cli import listing
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.objectives import PRESETS, SiD
from realuid_fast.settings import Config, ObjectiveConfig

SHIPPED = [
    *choices.configs(),
    *(f"presets/{name}" for name in choices.presets()),
    *(f"recipes/{name}" for name in choices.recipes()),
]
PARAMETERS = [f.name for f in fields(ObjectiveConfig)[1:]]


def all_fields(cls=Config, name="", default=None):
    default, hints = default or cls(), typing.get_type_hints(cls)
    for field in fields(cls):
        key, value = f"{name}.{field.name}".lstrip("."), getattr(default, field.name)
        if is_dataclass(hints[field.name]):
            yield from all_fields(hints[field.name], key, value)
        else:
            yield key, field, value


FIELDS = list(all_fields())


def refusal(*overrides, base="digits"):
    with pytest.raises(UserError) as caught:
        configs.load(base, overrides)
    return str(caught.value)


def test_every_field_says_its_meaning_and_its_default_is_one_of_its_values():
    for key, field, value in FIELDS:
        assert field.metadata["meaning"], key
        configs._check_value(value, key, field.metadata["bounds"], field.metadata["choices"])


@pytest.mark.parametrize("key", [key for key, field, _ in FIELDS if field.metadata["choices"] is not None])
def test_a_word_that_is_no_choice_is_named_with_its_whole_key(key):
    assert refusal(f"{key}=nonsense").startswith(f"{key} must be one of ")


@pytest.mark.parametrize(
    ("key", "bounds", "value"), [(k, f.metadata["bounds"], v) for k, f, v in FIELDS if f.metadata["bounds"] is not None]
)
def test_a_number_outside_its_bounds_is_named_with_its_whole_key(key, bounds, value):
    whole = isinstance(bounds.most, int) and bounds.most > 1
    outside = [bounds.most + 1, bounds.least - 1] if whole else [".nan", bounds.least - 1, bounds.most + 1]
    outside += [bounds.least] * (bounds.ends[0] == "(") + [bounds.most] * (bounds.ends[1] == ")")
    for number in outside:
        number = str(number).replace("inf", ".inf")
        if number == ".inf" and bounds.ends[1] == "]":
            continue
        text = f"[{number}, {number}]" if isinstance(value, tuple) else number
        assert re.match(rf"{re.escape(key)} must (be|lie|not be) ", refusal(f"{key}={text}")), (key, number)


def test_bounds_hold_their_ends_where_they_say_so():
    assert [x in Range(0.0, 1.0, "[)") for x in (-0.1, 0, 0.5, 1, float("nan"))] == [False, True, True, False, False]
    assert [x in Range(0.0, 1.0, "(]") for x in (0, 0.5, 1)] == [False, True, True]
    assert float("inf") not in Range(0.0, float("inf"), "[)")
    assert Range(0.0, 1.0, "(]").rule() == "lie in (0, 1]"


# -- objectives


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_a_preset_is_a_setting_and_no_other_is_taken(name):
    own = set(inspect.signature(PRESETS[name]).parameters)
    assert own <= set(PARAMETERS)
    for parameter in PARAMETERS:
        value = "true" if parameter in ("scaled", "teacher_target") else "1.0"
        given = [f"distill.objective.name={name}", f"distill.objective.{parameter}={value}"]
        if parameter in own:
            assert getattr(configs.load("digits", given).distill.objective, parameter) == 1
        else:
            sentence = refusal(*given)
            assert sentence.startswith(f"distill.objective.{parameter} is given, but the preset {name} ")


def test_parameters_reach_the_objective():
    objective = configs.load(
        "presets/sid", ["distill.objective.scaled=false", "distill.objective.alpha_sid=0.5"]
    ).distill.objective
    assert objective.build() == SiD(0.5, scaled=False)
    assert "has no parameters" in refusal("distill.objective.alpha=1.0", base="presets/regression")
    assert "no key 'distill.objective.title'" in refusal("distill.objective.title=x")
    with pytest.raises(UserError, match=r"distill\.objective: alpha = 1 requires beta = 1"):
        configs.load("digits", ["distill.objective.alpha=1.0"]).distill.objective.build()


def test_an_objective_of_another_name_starts_afresh():
    assert configs.load("digits", ["distill.objective.name=uid"]).distill.objective == ObjectiveConfig("uid")
    mine = ObjectiveConfig("realuid", alpha=0.9, beta=0.9)
    assert mine.of("realuid") is mine
    assert mine.of("uid") == ObjectiveConfig("uid")


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its config.yaml has settings of the objective that its preset does not have, and lacks newer ones."""
    content = configs.to_mapping(configs.load("presets/uid"))
    content["distill"]["objective"] |= {"alpha": 0.92, "beta": 0.94}
    del content["distill"]["objective"]["scaled"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"distill\.objective.alpha is given"):
        configs.load(tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    for source in (None, "presets/uid"):
        assert jobs.resolve(source, [], tmp_path, resume=True) == configs.load("presets/uid")
    with pytest.warns(UserWarning, match="goes from 1000 to 2000"):
        longer = jobs.resolve(None, ["distill.updates=2000"], tmp_path, resume=True)
    assert longer.distill.updates == 2000


# -- data and networks


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.name=nothing"], "data.name must be one of digits, .*, packed; got 'nothing'"),
        (["data.name=[1]"], r"data.name must be one of .*; got \[1\]"),
        (["data.name=folder", "data.pth=x"], "no key 'data.pth' of data.name folder, did you mean data.path"),
        (["data.name=folder", "data.path=3"], "data.path must be text, got 3"),
        (["data.name=folder", "data.size=large"], "data.size must be a whole number, got 'large'"),
        (["data.name=folder", "data.labels=3"], "data.labels must be true or false, got 3"),
        (["data.flip=3"], "data.flip must be true or false, got 3"),
        (["data.size=3"], "no key 'data.size' of data.name digits"),
        (["network.kind=nothing"], "network.kind must be one of unet, .*; got 'nothing'"),
        (
            ["network.num_chanels=8"],
            "no key 'network.num_chanels' of network.kind unet, did you mean network.num_channels",
        ),
        (["network.num_channels=8.5"], "network.num_channels must be a whole number, got 8.5"),
        (["network.channel_mult=2"], "network.channel_mult must be a list of numbers, got 2"),
        (["network.channel_mult=[a]"], "network.channel_mult must be a number, got 'a'"),
        (["network.attention_resolutions=1.5"], "must be a list of whole numbers or text, got 1.5"),
        (["network.dropout=none"], "network.dropout must be a number, got 'none'"),
        (
            ["distill.teacher_network={kind: mlp, widht: 8}"],
            "no key 'distill.teacher_network.widht' of .*mean distill.teacher_network.width",
        ),
    ],
)
def test_settings_of_data_and_networks_are_named_before_anything_is_loaded(overrides, sentence):
    assert re.search(sentence, refusal(*overrides))


def test_values_of_data_and_networks_go_on_as_they_are_written():
    config = configs.load("digits", ["network.dropout=1e-1", "network.time_scale=100", "data.flip=true"])
    assert config.network["dropout"] == 0.1
    assert type(config.network["time_scale"]) is int
    assert config.data == {"name": "digits", "flip": True}
    # The kind follows from the data where it is not given, and the shape does.
    assert configs.from_mapping({"network": {"width": 8}}).network == {"width": 8}


# -- the list


def test_everything_is_listed_with_its_meaning():
    rows = {(section.of, row.key): row for section in listing.sections() for row in section.rows}
    assert {key for of, key in rows if not of} == {key for key, _, _ in FIELDS} | {
        f"data.{key}" for key in ("flip", "balance", "classes")
    }
    for kinds, name in ((data.LOADERS, "data"), (networks.KINDS, "network")):
        for kind, made in kinds.items():
            assert {key for of, key in rows if of == kind} == {
                f"{name}.{key}" for key in inspect.signature(made).parameters
            }
    assert all(row.meaning and row.type for row in rows.values())
    assert rows["", "teacher.batch"].comment() == (
        "samples of an update, over all ranks [a whole number, at least 1; default 64]"
    )
    assert rows["", "teacher.optimiser.betas"].default == (0.9, 0.999)
    assert rows["", "path.match"].kind() == "one of velocity, x0, noise"
    assert rows["folder", "data.path"].needed


@pytest.mark.parametrize("name", SHIPPED)
def test_the_list_of_a_configuration_is_that_configuration(name, tmp_path):
    config = configs.load(name)
    for everything in (False, True):
        (tmp_path / "c.yaml").write_text(listing.as_yaml(config, everything))
        assert configs.load(tmp_path / "c.yaml") == config


def test_a_setting_of_data_or_network_is_given_without_its_mark(tmp_path):
    text = listing.as_yaml(configs.load("folder"))
    assert "  #limit: null\n" in text
    (tmp_path / "c.yaml").write_text(re.sub(r"^  #(?!dim)(\w+:)", r"  \1", text, flags=re.MULTILINE))
    config = configs.load(tmp_path / "c.yaml")
    assert set(config.data) == {"name", "flip", "balance", "classes", *inspect.signature(data.folder).parameters}
    assert set(config.network) == {"kind", *inspect.signature(networks.UNet).parameters} - {"dim"}
    nameless = replace(config, network={"width": 8})
    assert yaml.safe_load(listing.as_yaml(nameless))["network"] == {"width": 8}


def test_the_command_prints_it(capsys):
    assert cli.main(["config"]) == 0
    text = capsys.readouterr().out
    assert configs.from_mapping(yaml.safe_load(text)) == Config()
    for kind in (*data.LOADERS, *networks.KINDS):
        assert f"  # -- {kind}: " in text
    assert cli.main(["config", "presets/sid", "--set", "run.seed=3"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert configs.from_mapping(content) == configs.load("presets/sid", ["run.seed=3"])
    assert cli.main(["config", "nothing"]) == 2
    assert "there is no configuration 'nothing'" in capsys.readouterr().err


def test_the_page_of_settings_has_every_key():
    file = Path(__file__).resolve().parent.parent / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", file)
    generate = sys.modules["generate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = generate._settings()
    for section in listing.sections():
        for row in section.rows:
            assert f"| `{row.key}` | {row.kind()} |" in page
