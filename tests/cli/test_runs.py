"""Runs of the command line that are resumed by another command, ended early, or given what they do not take."""

import json
import os
import signal

import pytest
import yaml

from realuid_fast.cli import training
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.train.distill import Distiller
from realuid_fast.train.folder import role_of

from .test_cli import DISTILL, refused, run

TEACHER = ["train-teacher", "--config", "tiny.yaml", "--out"]


def stopped(monkeypatch, capsys, step=3, words=()):
    """A run of ``distill`` in the folder ``run`` that a signal ended after ``step`` updates."""
    update = Distiller.update

    def stopping(self):
        update(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Distiller, "update", stopping)
    assert run(*DISTILL, *words) == 143
    monkeypatch.setattr(Distiller, "update", update)
    capsys.readouterr()


def test_a_run_is_resumed_by_its_own_command_alone(place, capsys, monkeypatch):
    stopped(monkeypatch, capsys)
    assert run(*TEACHER, "t") == 0
    capsys.readouterr()
    for checkpoints in (True, False):
        if not checkpoints:
            (place / "run/checkpoints/update-00000003.pt").unlink()
        assert refused(capsys, *TEACHER, "run", "--resume").endswith("run is a run of distill, not of train-teacher")
        distill = [word if word != "run" else "t" for word in DISTILL]
        assert refused(capsys, *distill, "--resume").endswith("t is a run of train-teacher, not of distill")
    assert not (place / "run/teacher.safetensors").exists()
    # Earlier versions did not write what a run trains.
    file = place / "run/config.yaml"
    file.write_text(file.read_text().replace("it trains a student; ", ""))
    assert role_of(place / "run") is None
    assert run(*DISTILL, "--resume") == 0
    assert role_of(place / "run") == "student"


def test_a_student_is_said_to_be_written_before_the_plot(place, capsys, monkeypatch):
    seen = {}

    def failing(*_, **__):
        seen["out"] = capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "generate", failing)
    assert run(*DISTILL) == 130
    assert seen["out"] == "written to run/student.safetensors\n"


def test_the_plots_samples_have_a_bar(place, capsys, monkeypatch):
    bars = []
    bar = training.bar
    monkeypatch.setattr(training, "bar", lambda *given, **how: bars.append(bar(*given, **how)) or bars[-1])
    assert run(*DISTILL, "run.progress=true") == 0
    # 40 samples and 16 before the clock starts, in two steps.
    assert [(each.total, each.n) for each in bars] == [(112, 112)]


def test_a_stopped_run_is_ended_where_it_is(place, capsys, monkeypatch):
    falling = ["distill.generator.decay=cosine", "distill.fake.decay=linear"]
    stopped(monkeypatch, capsys, words=falling)
    given = ["distill", "--out", "run", "--resume", "--set"]
    assert "or ended from its checkpoint's update 3 on" in refused(capsys, *given, "distill.updates=2")
    assert run(*given, "distill.updates=3") == 0
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert "written to run/student.safetensors" in said.out
    assert (place / "run/convergence.png").exists()
    assert yaml.safe_load((place / "run/config.yaml").read_text())["distill"]["updates"] == 3
    assert [line.partition(",")[0] for line in (place / "run/distances.csv").read_text().split()] == [
        "update", "0", "2", "3",
    ]  # fmt: skip


def test_a_stopped_run_says_how_its_student_is_had(place, capsys, monkeypatch):
    stopped(monkeypatch, capsys)
    sentence = refused(capsys, "sample", "--model", "run", "--out", "a.npy")
    assert "run/best.safetensors" in sentence
    assert "--resume --set distill.updates=3" in sentence
    assert run("sample", "--model", "run/best.safetensors", "--out", "a.npy") == 0


def test_a_resumed_demo_keeps_its_number_of_updates(place, capsys):
    words = ["distill.updates=2", "distill.batch=8", "run.evaluate_samples=40", "run.evaluate_every=0"]
    assert run("demo", "--out", "d", "--threads", 1, "--set", *words, "run.progress=false") == 0
    assert run("demo", "--out", "d", "--threads", 1, "--resume") == 0
    assert json.loads((place / "d/evaluation.json").read_text())["updates"] == 2


def test_no_warmup_is_missed_where_nothing_is_trained(recwarn):
    given = ["distill.updates=100", "distill.generator.warmup=0", "distill.fake.warmup=500"]
    jobs.warn_of_warmup("distill", configs.load("presets/sparsefusion", given))
    assert not recwarn
    with pytest.warns(UserWarning, match=r"distill\.fake\.warmup 500 is long"):
        jobs.warn_of_warmup("distill", configs.load("presets/uid", given))
    critic = ["distill.gan.features=digits", "distill.gan.weight_fake=1"]
    with pytest.warns(UserWarning, match=r"distill\.fake\.warmup 500 is long"):
        jobs.warn_of_warmup("distill", configs.load("presets/sparsefusion", [*given, *critic]))


def test_places_that_cannot_be(place, capsys):
    assert run(*TEACHER, "") == 2
    assert "--out: it must not be empty" in capsys.readouterr().err
    (place / "images").mkdir()
    (place / "images/mine.png").write_text("precious")
    sentence = refused(capsys, *TEACHER, "images")
    assert "images is not empty: it holds no run" in sentence
    assert "--resume" not in sentence
    plan = ["train-teacher", "--config", "tiny.yaml", "--dry-run", "--json", "gone/plan.json"]
    assert "--json gone/plan.json: there is no folder gone" in refused(capsys, *plan)
