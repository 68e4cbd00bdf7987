"""Numbers that no run can have: each is a sentence that names the setting or option, and nothing is computed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from realuid_fast import cli, data, networks, objectives
from realuid_fast.errors import UserError
from realuid_fast.jobs import config
from realuid_fast.models.convert import diffusers_folder

LARGE = 2**31 - 1


def refused(capsys, *words):
    """The sentence of a command that ends with 2."""
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("run.threads=100000", "run.threads must be at most 1024, got 100000"),
        (f"run.seed={2**64}", f"run.seed must be at most {2**63 - 1}, got {2**64}"),
        (f"run.seed={2**63}", f"run.seed must be at most {2**63 - 1}, got {2**63}"),
        ("run.seed=0x" + "f" * 5000, f"run.seed must be at most {2**63 - 1}, got a longer number"),
        (f"distill.updates={2**70}", f"distill.updates must be at most {LARGE}, got {2**70}"),
        (f"teacher.updates={2**70}", f"teacher.updates must be at most {LARGE}"),
        (f"distill.batch={2**40}", f"distill.batch must be at most {LARGE}"),
        (f"distill.fake_turns={2**31}", f"distill.fake_turns must be at most {LARGE}"),
        (f"distill.generator.warmup={2**70}", f"distill.generator.warmup must be at most {LARGE}"),
        ("distill.generator.warmup=-1", "distill.generator.warmup must not be negative, got -1"),
        (f"teacher.evaluate_every={2**70}", f"teacher.evaluate_every must be at most {LARGE}"),
        (f"run.evaluate_samples={2**70}", f"run.evaluate_samples must be at most {LARGE}"),
        (f"run.checkpoint_every={2**70}", f"run.checkpoint_every must be at most {LARGE}"),
    ],
)
def test_whole_numbers_of_a_configuration_are_bounded(setting, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        config.load("digits", [setting])


def test_every_whole_number_of_a_configuration_is_bounded():
    """A new setting is bounded too: its section refuses a number that no machine holds."""
    found = []

    def walk(values, prefix):
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif type(value) is int:
                found.append(f"{prefix}{key}")

    walk({k: v for k, v in config.to_mapping(config.Config()).items() if k not in ("data", "network")}, "")
    assert len(found) > 15
    for name in found:
        with pytest.raises(UserError, match=f"^{name} must be at most"):
            config.load("digits", [f"{name}={2**70}"])


def test_the_largest_seed_is_one():
    assert config.load("digits", [f"run.seed={2**63 - 1}"]).run.seed == 2**63 - 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sample", "--count", 10**14], f"--count must be at most {LARGE}, got 100000000000000"),
        (["sample", "--seed", 2**64], f"--seed must be at most {2**63 - 1}, got {2**64}"),
        (["sample", "--seed", -1], "--seed must not be negative, got -1"),
        (["sample", "--threads", 100_000], "--threads must be at most 1024, got 100000"),
        (["sample", "--steps", 2**70], f"--steps must be at most {LARGE}"),
        (["evaluate", "--threads", 100_000], "--threads must be at most 1024"),
        (["evaluate", "--samples", 2**70], f"--samples must be at most {LARGE}"),
        (["evaluate", "--steps", 5, 2**70], f"--steps must be at most {LARGE}"),
        (["evaluate", "--batch", 2**70], f"--batch must be at most {LARGE}"),
        (["evaluate", "--repeats", 2**70], f"--repeats must be at most {LARGE}"),
        (["pack", "x", "--threads", 100_000], "--threads must be at most 1024"),
        (["pack", "x", "--size", 2**40], "--size must be at most 32768"),
        (["pack", "x", "--limit", 2**70], f"--limit must be at most {LARGE}"),
        (["demo", "--threads", 100_000], "--threads must be at most 1024"),
        (["distill", "--dry-run", "--measure", 2**70], f"--measure must be at most {LARGE}"),
        (["distill", "--dry-run", "--ranks", 2**70], f"--ranks must be at most {LARGE}"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_whole_numbers_of_the_command_line_are_bounded(words, sentence, tmp_path, capsys):
    given = {"sample": ["--model", "digits"], "evaluate": ["--teacher", "digits"]}.get(words[0], [])
    out = tmp_path / ("x.npy" if words[0] == "sample" else "x")
    assert f"error: {sentence}" in refused(capsys, *words, *given, "--out", out)
    assert not out.exists()


def test_samples_that_no_memory_holds_are_a_sentence(tmp_path, capsys):
    said = refused(capsys, "sample", "--model", "digits", "--count", LARGE, "--out", tmp_path / "x.npy")
    assert said.startswith("error: the memory does not suffice")


@pytest.mark.parametrize(
    "command",
    [["distill", "--set", "run.device=meta"], ["sample", "--device", "meta"], ["evaluate", "--device", "meta"]],
)
def test_a_device_without_numbers_is_none(command, tmp_path, capsys):
    given = {"sample": ["--model", "digits"], "evaluate": ["--teacher", "digits"]}.get(
        command[0], ["distill.updates=1"]
    )
    said = refused(capsys, *command, *given, "--out", tmp_path / "x.npy")
    assert "'meta' is not a device that torch can use here" in said


def test_a_plan_for_a_device_without_numbers_is_not_measured(capsys):
    assert cli.main(["distill", "--dry-run", "--set", "run.device=meta"]) == 0
    assert "run.device meta does not exist on this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"depth": 10**9}, "network 'mlp' asks for more than 20,000 parameters"),
        ({"depth": 2**70}, "network 'mlp' cannot be built with these settings"),
        ({"width": 2**70}, "network 'mlp' cannot be built with these settings"),
        ({"width": LARGE}, "network 'mlp' cannot be built with these settings"),
        ({"width": float("nan")}, "network 'mlp' cannot be built with these settings"),
        ({"shape": [2**62]}, "network 'mlp' cannot be built with these settings"),
    ],
    ids=str,
)
def test_networks_that_no_memory_holds_are_a_sentence(settings, sentence):
    with torch.device("meta"), pytest.raises(UserError, match=sentence):
        networks.build({"kind": "mlp", "width": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "moons", "seed": 2**64}, "data.seed must be at most"),
        ({"name": "moons", "seed": 0.5}, "data.seed must be a whole number, got 0.5"),
        ({"name": "moons", "n": 2**70}, f"data.n must be at most {LARGE}"),
        ({"name": "checkerboard", "cells": 10**6}, "cells must be from 2 to 1000"),
    ],
    ids=str,
)
def test_data_of_impossible_numbers_are_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        data.load(settings)


def test_a_beta_without_a_square_is_a_sentence():
    with pytest.raises(UserError, match=r"beta and kappa must have squares, got 1e\+308 and 1"):
        objectives.RealUID(0.9, 1e308)


@pytest.mark.parametrize("key", ["num_train_timesteps", "beta_start", "beta_end", "trained_betas"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400], ids=["infinity", "nan", "large"])
def test_a_scheduler_with_infinity_is_a_sentence(key, value, tmp_path):
    model = {"_class_name": "UNet2DModel", "sample_size": 4, "in_channels": 1}
    (tmp_path / "config.json").write_text(json.dumps(model))
    save_file({"a": torch.zeros(1)}, str(tmp_path / diffusers_folder.WEIGHTS))
    content = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "num_train_timesteps": 20, key: value}
    content[key] = [0.1, 0.2, value, 0.4] if key == "trained_betas" else value
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"."):
        diffusers_folder.read(tmp_path)[1].interpolant()
