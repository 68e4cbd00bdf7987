"""The experiments of bench/study on tiny networks: what they train, the tables they write, what they refuse."""

import concurrent.futures
import json
import math

import pytest
import torch
import yaml

from bench.study import compare as comparison
from bench.study import presets
from realuid_fast import cli, data, teachers
from realuid_fast.cli import training
from realuid_fast.jobs import config as configs
from realuid_fast.networks import build

NETWORK = {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1, "num_classes": 10}
CONFIG = {
    "data": {"name": "digits"},
    "network": NETWORK,
    "distill": {"batch": 8, "updates": 4, "fake_turns": 1, "ema": [0.9], "export": 0.9},
    "run": {"evaluate_every": 2, "evaluate_samples": 40, "tensorboard": False, "progress": False, "teacher_steps": 2},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a configuration and a teacher in it, as the working directory."""
    monkeypatch.chdir(tmp_path)
    # The picture of every run takes longer than the run.
    monkeypatch.setattr(training, "plot_distances", lambda *_: None)
    torch.manual_seed(0)
    described = teachers.Description(NETWORK, data={"name": "digits"})
    teachers.save("teacher.safetensors", build(NETWORK).state_dict(), described)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def compare(*words):
    """The exit code of the command."""
    return comparison.main([str(word) for word in words])


def refused(capsys, *words):
    """The sentence that the command refuses its input with."""
    assert compare(*words) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    lines = [line for line in said.err.strip().splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_compare_two_seeds(place, capsys, monkeypatch):
    apart = comparison.run_all
    # Starting a process takes longer than these runs: in this one first, below in one of their own.
    monkeypatch.setattr(comparison, "run_all", lambda commands, *_: [cli.main(c[3:]) for c in commands.values()])
    words = ["--config", "tiny.yaml", "--set", "distill.teacher=teacher.safetensors", "distill.updates=2"]
    assert compare(*words, "--seeds", 0, 1, "--jobs", 2, "--out", "c") == 0
    result = json.loads((place / "c/compare.json").read_text())
    assert set(result["curves"]) == {"UID", "RealUID"}
    assert [len(runs) for runs in result["curves"].values()] == [2, 2]
    assert [(row["method"], row["updates"]) for row in result["rows"]] == [("UID", 2), ("RealUID", 2)]
    for row in result["rows"]:
        # Samples of the saved students are what the curves end with.
        assert row["distance"] == pytest.approx(row["curve_end"], rel=1e-6)
    table = (place / "c/compare.md").read_text()
    assert "UID (alpha = 1, beta = 1)" in table
    assert "never" in table
    # The training data stand beside the teacher at as many samples.
    number = f"{result['floor_samples']:,} samples"
    assert f"| real training data, {number} | | {result['floor']:.3g} | 0 |" in table
    assert f"| {result['teacher_100_steps']:.3g} | {result['teacher_100_steps_to_train']:.3g} | 0 |" in table
    for row in result["rows"]:
        assert all(0 < distance < math.inf for distance in row["distance_to_teacher"])
        assert f"({', '.join(f'{distance:.2f}' for distance in row['distance_to_teacher'])})" in table
    assert f"| teacher, 100 Euler steps, {number} | | {result['teacher_100_steps_floor']:.3g} |" in table
    assert (place / "c/compare.png").stat().st_size > 1000
    assert yaml.safe_load((place / "c/runs/uid-seed1/config.yaml").read_text())["distill"]["objective"]["name"] == "uid"
    assert "holds compare.json already" in refused(capsys, *words, "--out", "c")

    monkeypatch.setattr(comparison, "run_all", apart)
    # Resumed, only the missing run is trained again, and the results are the same.
    kept = (place / "c/runs/uid-seed0/student.safetensors").stat().st_mtime_ns
    (place / "c/runs/realuid-seed1/student.safetensors").unlink()
    assert compare(*words, "--seeds", 0, 1, "--out", "c", "--resume") == 0
    assert capsys.readouterr().out.count("started") == 1
    assert (place / "c/runs/uid-seed0/student.safetensors").stat().st_mtime_ns == kept
    assert json.loads((place / "c/compare.json").read_text())["curves"] == result["curves"]


def test_compare_in_two_stages(place, monkeypatch):
    monkeypatch.setattr(comparison, "run_all", lambda commands, *_: [cli.main(c[3:]) for c in commands.values()])
    (place / "tune.yaml").write_text(
        "base: tiny.yaml\ndistill: {objective: {alpha: 0.5, beta: 1.5}, ema: [0.9], export: 0.9}"
    )
    words = ["--config", "tiny.yaml", "--then", "tune.yaml", "--samples", 80]
    words += ["--set", "distill.teacher=teacher.safetensors", "distill.updates=2"]
    assert compare(*words, "--seeds", 0, "--jobs", 1, "--out", "two") == 0
    result = json.loads((place / "two/compare.json").read_text())
    rows = [(row["method"], row["alpha"], row["beta"], row["updates"]) for row in result["rows"]]
    assert rows == [("UID", 1, 1, 2), ("RealUID", 0.92, 0.94, 2), ("UID", 1, 1, 4), ("RealUID", 0.5, 1.5, 4)]
    assert result["samples"] == 80
    assert all(
        [p["update"] for p in run[0]] == sorted({p["update"] for p in run[0]}) for run in result["curves"].values()
    )
    tuned = yaml.safe_load((place / "two/runs/realuid-seed0-tuned/config.yaml").read_text())["distill"]
    assert tuned["start"].endswith("realuid-seed0")


def test_compare_from_a_common_first_stage(place, monkeypatch):
    monkeypatch.setattr(comparison, "run_all", lambda commands, *_: [cli.main(c[3:]) for c in commands.values()])
    (place / "tune.yaml").write_text(
        "base: tiny.yaml\ndistill: {objective: {alpha: 0.5, beta: 1.5}, ema: [0.9], export: 0.9}"
    )
    words = ["--config", "tiny.yaml", "--then", "tune.yaml", "--common", "--samples", 80]
    words += ["--set", "distill.teacher=teacher.safetensors", "distill.updates=2"]
    assert compare(*words, "--seeds", 0, 1, "--jobs", 1, "--out", "two") == 0
    result = json.loads((place / "two/compare.json").read_text())
    assert [(row["method"], row["updates"]) for row in result["rows"]] == [("UID", 2), ("UID", 4), ("RealUID", 4)]
    assert not (place / "two/runs/realuid-seed0").exists()
    for method in ("uid", "realuid"):
        tuned = yaml.safe_load((place / f"two/runs/{method}-seed1-tuned/config.yaml").read_text())["distill"]
        assert tuned["start"].endswith("runs/uid-seed1")
        assert tuned["objective"]["name"] == method
    uid, real = (result["curves"][name][0] for name in ("UID", "RealUID"))
    assert [row["update"] for row in uid] == [row["update"] for row in real]
    assert uid[:2] == real[:2]
    apart = [b - a for a, b in zip(result["rows"][1]["distance"], result["rows"][2]["distance"], strict=True)]
    assert (
        f"| {sum(apart) / 2:.2f}, standard error {abs(apart[0] - apart[1]) / 2:.2f} ("
        in (place / "two/compare.md").read_text()
    )


def test_compare_refuses(place, capsys):
    words = ["--config", "tiny.yaml", "--set", "distill.teacher=teacher.safetensors"]
    assert "--common needs a second stage: give --then" in refused(capsys, *words, "--out", "c", "--common")
    assert "seeds must be different" in refused(capsys, *words, "--out", "c", "--seeds", 1, 1)
    assert "--jobs must be at least 1" in refused(capsys, *words, "--out", "c", "--jobs", 0)
    assert "evaluate_every" in refused(capsys, *words, "run.evaluate_every=0", "--out", "c")
    assert "alpha = 1 requires" in refused(capsys, *words, "distill.objective.alpha=1.0", "--out", "c")
    assert "cannot be written" in refused(capsys, *words, "--out", "tiny.yaml/c")
    assert "there is no teacher 'gone'" in refused(
        capsys, *words[:-1], "distill.teacher=gone", "--out", "d", "--seeds", 0
    )


def test_update_that_reached_a_distance():
    curve = [{"update": 10 * i, "distance": d} for i, d in enumerate((9.0, 4.0, 5.0))]
    assert comparison._reached(curve, 4.5) == 10
    assert comparison._reached(curve, 3.0) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", 0, 2**64], f"--seeds must be at most {2**63 - 1}"),
        (["--jobs", 10**6], "--jobs must be at most 1024"),
    ],
)
def test_compare_bounds_whole_numbers(words, sentence, tmp_path, capsys):
    assert f"error: {sentence}" in refused(capsys, *words, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_sensitivity_finds_arrivals_and_writes_its_table(tmp_path, monkeypatch):
    from bench.study import sensitivity

    curve = [(20, 0.5), (40, 0.2), (60, 0.4), (80, 0.2), (100, 0.1)]
    # One evaluation below the target does not count, two in a row do.
    assert sensitivity.arrival(curve, 0.25) == 80
    assert sensitivity.arrival(curve, 0.05) is None

    monkeypatch.setattr(sensitivity, "ALPHAS", (0.9,))
    monkeypatch.setattr(sensitivity, "RATIOS", (0.96, 1.04))
    small = ["teacher.updates=3", "run.progress=false", "data.n=300", "data.n_heldout=50"]
    monkeypatch.setattr(sensitivity, "SETTINGS", [*sensitivity.SETTINGS, *small])
    words = ["--out", tmp_path / "runs", "--results", tmp_path, "--seeds", 0, 1, "--updates", 4, "--every", 2]
    monkeypatch.setattr(sensitivity, "ProcessPoolExecutor", Serial)
    assert sensitivity.main([str(word) for word in [*words, "--samples", 50]]) == 0
    content = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [(cell["alpha"], cell["ratio"]) for cell in content["cells"]] == [(1.0, 1.0), (0.9, 0.96), (0.9, 1.04)]
    uid = content["curves"][0]["runs"]
    # The paper trains with five fake turns and calls fewer than three unstable.
    assert content["fake_turns"] == 5
    assert "distill.fake_turns=5" in sensitivity.SETTINGS
    assert content["target"] == pytest.approx(sum(d for run in uid for _, d in run) / 4)
    table = (tmp_path / "sensitivity.md").read_text()
    assert "| 0.9 |" in table
    assert "4 updates of 5 fake turns, 2 seeds." in table
    assert (tmp_path / "sensitivity.png").stat().st_size > 1000


class Serial:
    """A pool of this process alone."""

    def __init__(self, jobs):
        assert jobs == 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, call, *arguments):
        future = concurrent.futures.Future()
        future.set_result(call(*arguments))
        return future


def test_the_family_tree_names_every_preset_once(tmp_path):
    """The page is what ``--page`` writes from the committed file and table."""
    named = [name for system in presets.family.FAMILY for name in system.presets]
    assert sorted(named) == sorted(configs.presets())
    assert presets.main(["--page", "--docs", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == (presets.ROOT / "docs" / "presets.md").read_text()


def test_presets_are_trained_measured_and_taken_up_again(tmp_path, capsys, monkeypatch):
    words = ["--only", "trigonometric", "--updates", 1, "--teacher-updates", 1, "--seeds", 0, "--samples", 20]
    words += ["--jobs", 1, "--work", tmp_path, "--out", tmp_path / "p.json", "--docs", tmp_path / "p.md"]
    words = [str(word) for word in words]
    few = data.eight_gaussians(n=300, n_heldout=50)
    monkeypatch.setitem(data.LOADERS, "eight_gaussians", lambda: few)
    # In this process: starting two takes longer than what they do.
    started = []

    def in_process(commands, *_):
        for name, command in commands.items():
            started.append(name)
            assert cli.main(command[3:]) == 0

    monkeypatch.setattr(presets, "run_all", in_process)
    assert presets.main(words) == 0
    assert started == ["teacher-trigonometric", "trigonometric-seed0"]
    (row,) = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert (row["path"], row["predict"], row["updates"], row["seeds"]) == ("trigonometric", "v", 1, [0])
    line = next(line for line in (tmp_path / "p.md").read_text().splitlines() if line.startswith("| trigonometric"))
    assert f"| {row['teacher']['distance']:.3g} | {row['student']['distance'][0]:.3g} ± 0 | 1 |" in line

    # Finished runs are taken as they are; another number of updates is another run.
    assert presets.main(words) == 0
    assert len(started) == 2
    words[words.index("--updates") + 1] = "2"
    assert presets.main(words) == 0
    assert started[2:] == ["trigonometric-seed0"]
    assert presets.main(["--only", "none"]) == 2
    assert "there is no preset 'none'" in capsys.readouterr().err
