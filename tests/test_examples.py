"""The examples run as their docstrings say, with small numbers, and leave what they promise."""

import ast
import importlib.util
import re
import runpy
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast.models.pictures import save_png

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = r"(-?\d+(?:\.\d+)?)"


def run(monkeypatch, capsys, name, *words):
    """The output of an example run like ``python examples/NAME.py WORDS``."""
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *map(str, words)])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def is_png(file):
    return file.read_bytes().startswith(b"\x89PNG")


def differ(net, other):
    state = other.state_dict()
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    return any(not torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_every_example_says_what_it_does_and_how_it_is_run():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    (strict,) = (each for each in config["overrides"] if each.get("disallow_any_generics"))
    assert sorted(strict["module"]) == [file.stem for file in EXAMPLES]
    for file in EXAMPLES:
        docstring = ast.get_docstring(ast.parse(file.read_text()))
        assert f"python examples/{file.name}" in docstring, file
        # A script's folder is searched first, so a name of a library would hide that library from all examples.
        assert importlib.util.find_spec(file.stem) is None, file
    assert len((ROOT / "examples" / "distill_digits.py").read_text().splitlines()) <= 150


def test_distill_digits_then_sample(monkeypatch, capsys, tmp_path):
    words = ["--updates", 2, "--fake-turns", 2, "--batch", 4, "--evaluate-every", 1, "--samples", 20]
    said = run(monkeypatch, capsys, "distill_digits", "--out", tmp_path / "run", *words)
    found = re.findall(rf"update \d+: fake loss {NUMBER}, student loss {NUMBER}, distance {NUMBER}", said)
    assert len(found) == 2
    assert all(float(distance) > 0 for *_, distance in found)
    assert is_png(tmp_path / "run" / "samples.png")
    student = rf.load(tmp_path / "run")
    assert student.is_student
    assert student.description.t_start == 0.28
    assert differ(student.net, rf.load("digits").net)

    file = tmp_path / "sevens.npy"
    run(monkeypatch, capsys, "sample", tmp_path / "run", "--count", 5, "--label", 7, "--seed", 3, "--out", file)
    assert np.array_equal(np.load(file), rf.sample(student, 5, labels=7, seed=3).numpy())


def test_sample_draws_from_a_shipped_teacher(monkeypatch, capsys, tmp_path):
    run(monkeypatch, capsys, "sample", "digits", "--count", 4, "--steps", 2, "--out", tmp_path / "new" / "samples.png")
    assert is_png(tmp_path / "new" / "samples.png")
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "sample", "digits", "--out", tmp_path / "samples.jpg")


def test_own_path_is_checked_trained_and_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("realuid_fast.paths.PATHS", paths := dict(rf.paths.PATHS))
    words = ["--teacher-updates", 20, "--updates", 4, "--batch", 32]
    said = run(monkeypatch, capsys, "own_path", "--out", tmp_path, *words)
    assert "path and objective are what they say" in said
    assert len(re.findall(rf"sliced Wasserstein distance {NUMBER}", said)) == 2
    assert is_png(tmp_path / "samples.png")
    teacher, student = (rf.load(tmp_path / f"{role}.safetensors") for role in ("teacher", "student"))
    assert isinstance(student.description.interpolant(), paths["early"])
    assert differ(student.net, teacher.net)
    del paths["early"]
    with pytest.raises(rf.errors.UserError, match=r"path\.name must be one of"):
        rf.load(tmp_path / "student.safetensors")


def test_render_views_pulls_a_scene_to_the_teacher(monkeypatch, capsys, tmp_path):
    """A teacher of few updates already shows where the blobs are; its several steps bring the scene most of the way."""
    words = ["--out", tmp_path, "--teacher-updates", 150, "--updates", 60, "--steps", 3]
    said = run(monkeypatch, capsys, "render_views", *words)
    found = re.search(rf"error between the views.*: {NUMBER} at random, {NUMBER} distilled\nthe scene is", said)
    assert found is not None, said
    begun, reached = map(float, found.groups())
    assert reached < begun / 4
    assert is_png(tmp_path / "views.png")


@pytest.mark.parametrize("classes", [(), ("cats", "dogs")], ids=["plain", "classes"])
def test_own_images_become_a_student(monkeypatch, capsys, tmp_path, classes):
    draw = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / (classes[number % 2] if classes else "")
        save_png(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8), folder / f"{number}.png")
    words = ["--size", 8, "--channels", 8, "--teacher-updates", 2, "--updates", 2, "--fake-turns", 1, "--batch", 4]
    said = run(monkeypatch, capsys, "own_images", tmp_path / "images", "--out", tmp_path / "run", *words)
    assert f"{len(classes)} classes" in said
    assert re.search(rf"student, update 2: fake loss {NUMBER}, loss {NUMBER}", said)
    teacher, student = (rf.load(tmp_path / "run" / f"{role}.safetensors") for role in ("teacher", "student"))
    assert student.classes == len(classes)
    assert differ(student.net, teacher.net)
    assert is_png(tmp_path / "run" / "teacher.png")
    assert is_png(tmp_path / "run" / "student.png")


@pytest.mark.parametrize("name", ["lightning", "accelerate"])
@pytest.mark.filterwarnings("ignore")
def test_frameworks_train(monkeypatch, capsys, tmp_path, name):
    # The package needs neither. Where make has installed the peers, tests/test_supply.py sees that they are there.
    pytest.importorskip(name)
    device = {"lightning": ["--accelerator", "cpu"], "accelerate": ["--cpu"]}[name]
    words = ["--updates", 3, "--batch", 4, "--out", tmp_path / "samples.png", *device]
    said = run(monkeypatch, capsys, f"with_{name}", *words)
    assert len(re.findall(rf"(?:fake|generator) loss\D{{1,3}}{NUMBER}", said)) >= 2
    assert is_png(tmp_path / "samples.png")
