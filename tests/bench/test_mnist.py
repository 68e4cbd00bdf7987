"""The study on MNIST: its criterion on numbers made by hand, its scores, and the whole command on a tiny set."""

import functools
import gzip
import json
import shutil
import signal
import struct
from unittest.mock import ANY

import numpy as np
import pytest
import torch

import realuid_fast as rf
from bench.study import presets
from bench.study.mnist import __main__ as study
from bench.study.mnist import arms, asset, criterion, judge, report
from realuid_fast import choices, cli, metrics
from realuid_fast.cli import training
from realuid_fast.jobs import config as configs
from realuid_fast.train.hooks import Interrupted

TINY = [
    *("data.size=8", "network.num_channels=4", "network.channel_mult=[1]", "network.norm_groups=2"),
    *("teacher.batch=8", "teacher.updates=1", "teacher.evaluate_every=0", "distill.batch=4", "distill.updates=4"),
    *("distill.fake_turns=1", "run.evaluate_every=2", "run.evaluate_samples=20"),
]


def test_an_arrival_is_two_points_in_a_row_and_an_end_three():
    curve = [(0, 9.0), (10, 3.0), (20, 5.0), (30, 3.5), (40, 3.0), (50, 2.5)]
    assert criterion.end(curve) == pytest.approx(3.0)
    assert criterion.arrival(curve, 3.5) == 30
    assert criterion.arrival(curve, 3.0) == 40
    assert criterion.arrival(curve, 2.5) == 50
    assert criterion.arrival(curve, 2.0) is None


def test_paired_differences_have_their_t_interval():
    found = criterion.paired([1.0, 2.0, 4.0], [2.0, 4.0, 7.0])
    assert found["each"] == [-1.0, -2.0, -3.0]
    assert found["mean"] == -2.0
    # Two degrees of freedom: 4.3027 standard errors of 1 / sqrt(3).
    assert found["interval"] == pytest.approx([-2 - 4.3027 / 3**0.5, -2 + 4.3027 / 3**0.5], abs=1e-4)
    assert criterion.verdict(found) == "no difference shown"
    assert criterion.verdict(criterion.paired([1.0, 1.1, 0.9], [2.0, 2.1, 2.0])) == "better"
    assert criterion.verdict(criterion.paired([2.0, 2.1, 2.0], [1.0, 1.1, 0.9])) == "worse"


def test_arrivals_are_compared_with_uids_where_every_seed_arrives():
    ends = {"distance": 1.0}
    slow = [{"curve": [(0, 9.0), (10, 5.0), (20, 1.0), (30, 1.0), (40, 1.0)], "scores": ends}] * 2
    fast = [{"curve": [(0, 9.0), (10, 1.0), (20, 1.0), (30, 1.0), (40, 1.0)], "scores": ends}] * 2
    late = [fast[0], {"curve": [(0, 9.0), (10, 5.0), (20, 5.0), (30, 5.0), (40, 5.0)], "scores": ends}]
    rows = report.comparison({"uid": slow, "fast": fast, "late": late, "longer": slow}, "longer")
    assert rows["fast"]["arrivals"] == [10, 10]
    assert rows["fast"]["sooner"] == {"mean": -10, "interval": [-10, -10], "each": [-10, -10]}
    assert rows["late"]["arrivals"] == [10, None]
    assert "sooner" not in rows["late"]
    assert "sooner" not in rows["uid"]


def test_the_training_images_of_the_judge_are_a_fair_draw_of_a_file_that_alternates(tmp_path):
    """Black images at even places, others at odd ones; the real files, measure and shipped classifier."""
    folder = tmp_path / "set"
    write_set(folder)
    file = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(file.read_bytes()))
    count, size = int.from_bytes(content[4:8], "big"), 16 * 16
    for even in range(0, count, 2):
        content[16 + even * size : 16 + (even + 1) * size] = bytes(size)
    file.write_bytes(gzip.compress(bytes(content)))
    settings = {"name": "idx", "path": str(folder), "size": 16, "filter": "box"}
    found = judge.Judge(arms.Place(folder, tmp_path, shipped=True), settings, count // 4).some_train.flatten(1)
    black = int((found == -1).all(1).sum())
    assert len(found) == count // 4
    assert 0 < black < len(found)
    assert len(found[(found != -1).any(1)].unique(dim=0)) == len(found) - black


def test_memorisation_is_a_half_for_new_samples_and_one_for_copies():
    generator = torch.Generator().manual_seed(0)
    theirs, ours = torch.rand(2000, generator=generator), torch.rand(2000, generator=generator)
    assert judge.nearer(ours, theirs) == pytest.approx(0.5, abs=0.03)
    assert judge.nearer(torch.zeros(5), theirs) == 1.0
    assert judge.nearer(torch.full((5,), 2.0), theirs) == 0.0
    assert judge.nearer(torch.zeros(3), torch.zeros(4)) == 0.5


def test_the_bootstrap_interval_holds_the_distance_of_the_laws():
    """Two Gaussians one apart in the mean: the distance of the laws is 1, and that of 400 points lies above it."""
    held = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(400, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        b[:, 0] += 1
        low, high = judge.bootstrap(a, b, repeats=100, seed=seed)
        assert 0 <= low < high
        assert low < metrics.frechet_distance(a, b)
        held += low <= 1 <= high
    # 19 of 20 are expected; fewer than 15 have a probability below 1e-4 if each holds with 0.95.
    assert held >= 15


def write_set(root):
    generator = np.random.default_rng(0)
    root.mkdir()
    for split, count in (("train", 64), ("t10k", 40)):
        images = struct.pack(">HBB3I", 0, 8, 3, count, 16, 16) + generator.bytes(count * 256)
        labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(i % 10 for i in range(count))
        (root / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def ship(monkeypatch, out, folder):
    """The package as if it shipped the networks of a study in small."""
    folder.mkdir()
    for shipped, name in (("TEACHERS", "mnist-teacher"), ("STUDENTS", "mnist"), ("CLASSIFIERS", "mnist")):
        monkeypatch.setitem(getattr(choices, shipped), name, folder / f"{shipped.lower()}.safetensors")
    assert asset.main(str(out), "uid-seed0") == 0


def test_the_whole_study_in_small(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "set")
    started = []

    def here(commands, _jobs, _folder, done=lambda name: None):
        """Starting a process takes longer than these runs."""
        for name, command in commands.items():
            started.append(name)
            assert cli.main(command[3:]) == 0
            done(name)

    monkeypatch.setattr(study, "run_all", here)
    # Other tests prove these, so there are fewer here: draws of the bootstrap, rounds of the clock, pictures of runs.
    monkeypatch.setattr(judge, "bootstrap", functools.partial(judge.bootstrap, repeats=20))
    monkeypatch.setattr(study, "costs", functools.partial(study.costs, rounds=1))
    monkeypatch.setattr(training, "plot_distances", lambda *_: None)
    words = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    words += ["--seeds", "0", "1", "--samples", "40", "--set", *TINY]
    assert study.main(words) == 0
    names = [arm.name for arm in arms.MAIN] + ["uid-longer"]
    assert started == ["classifier", "teacher", *(f"{name}-seed{seed}" for seed in (0, 1) for name in names)]

    content = json.loads((tmp_path / "results" / "main.json").read_text())
    assert [arm["name"] for arm in content["arms"]] == names
    for name in names:
        for run in content["results"][name]:
            assert run["curve"][0][0] == 0
            low, high = run["scores"]["interval"]
            assert 0 <= low <= high
            assert 0 <= run["scores"]["memorised"] <= 1
    # Runs of one seed share their draws: before the first update all arms are the same generator.
    for seed in (0, 1):
        assert len({content["results"][name][seed]["curve"][0][1] for name in names}) == 1
    uid = [run["scores"]["distance"] for run in content["results"]["uid"]]
    other = [run["scores"]["distance"] for run in content["results"]["realuid-0.92-0.94"]]
    found = content["comparison"]["realuid-0.92-0.94"]["less_uid"]
    assert found["each"] == pytest.approx([b - a for a, b in zip(uid, other, strict=True)])
    assert uid != other
    # UID with as much time takes as many more updates as an update of RealUID costs more.
    ratios = [ratio for name, ratio in content["costs"]["ratio"].items() if name != "uid"]
    longer = round(4 * sum(ratios) / len(ratios))
    assert content["results"]["uid-longer"][0]["curve"][-1][0] == longer
    table = (tmp_path / "results" / "main.md").read_text()
    assert f"UID (1, 1), {longer} updates" in table
    assert "teacher, 100 Heun steps" in table
    for name in ("main.png", "samples.png"):
        assert (tmp_path / "results" / name).stat().st_size > 1000

    # The same command finds everything done. It measures the training images alone, whose scores are in no file.
    started.clear()
    measured, measure = [], judge.Judge.__call__
    monkeypatch.setattr(judge.Judge, "__call__", lambda self, samples: measured.append(1) or measure(self, samples))
    assert study.main(words) == 0
    assert started == []
    assert len(measured) == 1
    assert json.loads((tmp_path / "results" / "main.json").read_text()) == {**content, "machine": ANY}
    # The other groups begin from these runs.
    monkeypatch.setattr(judge.Judge, "__call__", measure)
    monkeypatch.setattr(arms, "SECOND", ("distill.updates=2", *arms.SECOND[1:]))
    # One damaged teacher goes the way of the other.
    monkeypatch.delitem(arms.DAMAGED, "early")
    one = ["--seeds", "0", *words[words.index("--samples") :]]
    for group in ("ablations", "others"):
        started.clear()
        assert study.main([*words[:6], "--group", group, *one]) == 0
        found = json.loads((tmp_path / "results" / f"{group}.json").read_text())
        rows = {row["name"]: row for row in found["rows"]}
        made = [name.removesuffix("-seed0") for name in started if name.endswith("-seed0")]
        assert list(rows)[-len(made) :] == made
        best = study._best(tmp_path / "results" / "main.json")
        assert len(made) == len(arms.OTHERS if group == "others" else arms.ablations(best))
        assert set(started) - {f"{name}-seed0" for name in made} == (
            {"teacher-half"} if group == "ablations" else set()
        )
        assert (tmp_path / "results" / f"{group}.png").stat().st_size > 1000
        for row in rows.values():
            if row["against"]:
                assert row["less"]["verdict"] == "one seed, no verdict"
                assert row["less"]["mean"] == pytest.approx(row["final"][0] - rows[row["against"]]["final"][0])
    # The family tree's systems are the presets' own settings.
    monkeypatch.setattr(arms, "SYSTEM_UPDATES", 2)
    few = ("uid", "sid", "moments-parameters")
    every = arms.configs.presets()
    monkeypatch.setattr(arms.configs, "presets", lambda: few)
    started.clear()
    assert study.main([*words[:6], "--group", "family", *one[2:]]) == 0
    monkeypatch.setattr(arms.configs, "presets", lambda: every)
    assert started == ["family-uid-seed0", "family-moments-parameters-seed0", "family-sid-seed0"]
    found = json.loads((tmp_path / "results" / "family.json").read_text())
    assert (found["updates"], found["seeds"], len(found["rows"])) == (2, [0], 3)
    monkeypatch.setattr(presets, "_family", lambda: found)
    page = presets.page({"rows": []})
    assert f"| 1; 2 without the scale | {found['rows'][2]['final'][0]:.1f} |" in page
    assert "after 2 updates, one seed" in page
    # Another machine has no runs. The report needs none, and a run without a record is made with the others' teacher.
    ship(monkeypatch, tmp_path / "out", tmp_path / "shipped")
    for file in (tmp_path / "shipped").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    assert rf.load("mnist").description.command == rf.load("mnist-teacher").description.command == asset.COMMAND
    monkeypatch.setattr(judge.Judge, "__call__", measure)
    elsewhere = [*words[:2], "--out", str(tmp_path / "elsewhere"), *words[4:6], "--go-on", *words[6:]]
    kept = tmp_path / "results" / "records"
    lost = json.loads((kept / "uid-seed1.json").read_text())
    (kept / "uid-seed1.json").unlink()
    # A record is as old as its run: it knows no setting that came later.
    del (old := json.loads((kept / "uid-seed0.json").read_text()))["settings"]["distill"]["target_steps"]
    (kept / "uid-seed0.json").write_text(json.dumps(old))
    started.clear()
    assert study.main([*elsewhere, "--only", "report"]) == 2
    assert "has no record of the run uid-seed1 with these settings" in capsys.readouterr().err
    assert study.main(elsewhere) == 0
    assert started == ["uid-seed1"]
    again = json.loads((tmp_path / "results" / "main.json").read_text())
    assert again["results"] == content["results"]
    assert again["comparison"] == content["comparison"]
    assert json.loads((kept / "uid-seed1.json").read_text()) == {**lost, "machine": ANY}
    # A run that is made again is compared with its record.
    started.clear()
    assert study.main([*elsewhere, "--repeat", "realuid-0.8-1-seed0", "uid-seed1"]) == 0
    assert started == ["realuid-0.8-1-seed0"]
    said = capsys.readouterr().out
    assert said.count("the student equals the recorded one to the bit") == 2
    lost["student"], width = "another", lost["scores"]["distance"]
    for apart, word in ((0.2, "within"), (0.9, "beyond")):
        lost["scores"] |= {"distance": width * (1 + apart), "interval": [0.0, width]}
        (kept / "uid-seed1.json").write_text(json.dumps(lost))
        assert study.main([*elsewhere, "--repeat", "uid-seed1"]) == 0
        said = capsys.readouterr().out
        assert f"another student of distance {width:.3f}" in said
        assert f"the difference is {word} half of its 95 % bootstrap interval" in said
    assert study.main([*elsewhere, "--repeat", "uid-seed7"]) == 2
    assert "--repeat uid-seed7: this group has no such run, it has uid-seed0" in capsys.readouterr().err
    # A record of another teacher, or of another number of samples, is no record.
    assert study.main([*elsewhere, "--only", "report", "--samples", "30"]) == 2
    assert "has no record of the run uid-seed0 with these settings" in capsys.readouterr().err
    shutil.copy(tmp_path / "out" / "teacher-half" / "teacher.safetensors", choices.TEACHERS["mnist-teacher"])
    assert study.main([*elsewhere, "--only", "report"]) == 2
    assert "has no record of the run uid-seed0 with these settings and this teacher" in capsys.readouterr().err
    # A run of other settings is not taken for a finished one.
    capsys.readouterr()
    assert study.main([*words, "distill.batch=5", "--only", "report"]) == 2
    assert "it is not finished" in capsys.readouterr().err


def test_the_systems_of_the_family_tree_are_the_presets_own_settings():
    found = {arm.name.removeprefix("family-"): arm for arm in arms.systems()}
    # Left out are presets of other data or paths, and two that need a file of their own.
    apart = ("ibmd", "real-bridge", "interpolant", "vp", "edm", "sid-edm", "uni-instruct", "trigonometric")
    apart += ("guided", "dmd-decoupled", "dmd-pairs", "ced", "sfd-second")
    assert set(found) == set(choices.presets()) - set(apart)
    for name, arm in found.items():
        here, there = configs.load("mnist", arm.changes), configs.load(configs.preset(name))
        assert here.distill.objective == there.distill.objective
        assert (here.distill.times, here.distill.states) == (there.distill.times, there.distill.states)
        assert (here.path.match, here.path.weight) == (there.path.match, there.path.weight)
        assert here.distill.updates == arms.SYSTEM_UPDATES
    assert configs.load("mnist", found["add"].changes).distill.gan.features == "mnist"


def test_a_stopped_study_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(_commands, _jobs, folder, *_):
        raise Interrupted(signal.SIGTERM, folder)

    write_set(tmp_path / "set")
    monkeypatch.setattr(study, "run_all", stopped)
    assert study.main(["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith(f"saved in {tmp_path / 'out'}; go on with the same command\n")


def test_what_cannot_be_is_refused(tmp_path, capsys):
    assert study.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "does not hold the four IDX files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert study.main(["--data", str(tmp_path), "--seeds", "0", "0"]) == 2
    assert "--seeds different numbers" in capsys.readouterr().err
