"""Runs of the command line that are resumed by another command, ended early, or given what they do not take."""

import os
import re
import signal

import pytest
import yaml
from PIL import Image

from realuid_fast import teachers
from realuid_fast.cli import training
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.train.distill import Distiller
from realuid_fast.train.folder import role_of

from .conftest import NETWORK
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


def test_a_resumed_demo_keeps_its_number_of_updates(place, capsys, monkeypatch):
    (place / "d").mkdir()
    configs.save(configs.load("demo", ["distill.updates=2"]), place / "d/config.yaml")
    asked = []

    def train(job, config, *_):
        asked.append((job, config.distill.updates))
        raise UserError("seen")

    monkeypatch.setattr(jobs, "train", train)
    assert "seen" in refused(capsys, "demo", "--out", "d", "--threads", 1, "--resume")
    assert asked == [("distill", 2)]


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


def test_a_teacher_is_named_by_its_runs_folder(place, capsys):
    assert run(*TEACHER, "t") == 0
    words = ["distill", "--config", "tiny.yaml", "--out", "s", "--set"]
    assert run(*words, "distill.teacher=t") == 0
    capsys.readouterr()
    assert run("evaluate", "--student", "s", "--samples", 20, "--steps", 2) == 0
    assert "teacher, 2 Euler steps" in capsys.readouterr().out
    sentence = refused(capsys, *words[:3], "--out", "u", "--set", "distill.teacher=s")
    assert "distill.teacher: the folder s holds no teacher.safetensors" in sentence


@pytest.mark.parametrize(
    ("command", "preset", "setting", "maker"),
    [
        ("distill", "ced", "distill.regression.previous", "presets/ced"),
        ("distill", "sfd-second", "distill.regression.first_stage", "presets/sfd-second"),
        ("distill", "dmd-pairs", "distill.regression.pairs", "presets/dmd-pairs"),
        ("distill", "uni-instruct", "distill.teacher", "presets/sid-edm"),
        ("train-teacher", "guided", "teacher.guided", "presets/dmd-decoupled"),
        ("train-teacher", "halving", "teacher.halved", "halving"),
    ],
)
def test_a_file_that_a_preset_needs_is_named_with_its_maker(place, capsys, command, preset, setting, maker):
    given = ["--config", preset] if preset == maker else ["--preset", preset]
    sentence = refused(capsys, command, *given, "--out", "s")
    assert sentence.startswith(f"error: {setting}: there is no ")
    name = re.search("realuid-fast config (.*) prints the command that makes it$", sentence)[1]
    assert run("config", name) == 0
    said = capsys.readouterr().out
    place_of = re.search(r"(runs/[\w/-]+?)(/(student|teacher))?\.safetensors", sentence)[1]
    assert f"--out {place_of}" in said
    assert yaml.safe_load(said)["distill"]["updates"]


def test_a_preset_is_suggested_for_its_bare_name(capsys):
    assert "Did you mean presets/sfd?" in refused(capsys, "config", "sfd")
    assert "Did you mean" not in refused(capsys, "config", "nothing-of-the-kind")


def test_a_student_is_no_teacher_of_a_table(place, capsys):
    words = ["evaluate", "--teacher", "student.safetensors"]
    assert "--teacher student.safetensors holds a student: give it as --student" in refused(capsys, *words)


def test_paths_that_are_seen_from_elsewhere(place, capsys, monkeypatch):
    (place / "images").mkdir()
    for i in range(24):
        Image.new("L", (8, 8), i * 10).save(place / "images" / f"{i}.png")
    images = [
        "--set",
        "data.name=folder",
        "data.path=images",
        "data.size=8",
        "data.channels=1",
        "network.num_classes=0",
    ]
    assert run(*TEACHER, "t", *images) == 0
    assert run(*DISTILL[:-1], "distill.teacher=t/teacher.safetensors", *images[1:]) == 0
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    capsys.readouterr()
    sentence = refused(capsys, "evaluate", "--student", "../run")
    assert "there is no file t/teacher.safetensors, the student's teacher" in sentence
    assert "give --teacher" in sentence
    words = ["evaluate", "--student", "../run", "--teacher", "../t", "--samples", 20, "--steps", 1]
    sentence = refused(capsys, *words)
    assert "error: data.path: there is no folder images" in sentence
    assert "give --set data.path=PATH" in sentence
    assert run(*words, "--set", "data.path=../images") == 0
    capsys.readouterr()
    assert "data.path: there is no folder images" in refused(capsys, "train-teacher", "--out", "../t", "--resume")


def test_whole_numbers_may_be_written_with_an_exponent():
    for text in ("1e3", "1.0e+3", "1E+3"):
        updates = configs.load("digits", [f"distill.updates={text}"]).distill.updates
        assert (updates, type(updates)) == (1000, int)
        count = configs.load("mixture", [f"data.n={text}"]).data["n"]
        assert (count, type(count)) == (1000, int)
    for text in ("1.5e0", "many", ".inf", ".nan", "1e400"):
        with pytest.raises(UserError, match=r"distill\.updates must be a whole number"):
            configs.load("digits", [f"distill.updates={text}"])


def test_a_student_has_its_teachers_network_and_its_configuration_says_so(place, capsys, monkeypatch):
    words = ["network.width=64"]
    stopped(monkeypatch, capsys, words=words)
    assert yaml.safe_load((place / "run/config.yaml").read_text())["network"] == NETWORK
    # The same command with --resume goes on, and says what it does not take.
    assert run(*DISTILL, *words, "--resume") == 0
    assert "the student has the network of its teacher: network.width is 8, not 64" in capsys.readouterr().err
    assert yaml.safe_load((place / "run/config.yaml").read_text())["network"] == NETWORK
    assert teachers.load("run/student.safetensors").description.network == NETWORK
    assert "distill.batch differs from the run" in refused(capsys, *DISTILL, *words, "distill.batch=9", "--resume")


def test_a_student_of_the_configured_network_warns_of_nothing(tmp_path, capsys):
    small = ["teacher.updates=1", "distill.updates=1", "run.evaluate_every=0", "run.progress=false"]
    small += ["run.tensorboard=false", "network.num_channels=8", f"distill.teacher={tmp_path}/t"]
    small += ["distill.generator.warmup=0", "distill.fake.warmup=0", "teacher.optimiser.warmup=0"]
    for command, name in (("train-teacher", "t"), ("distill", "s")):
        assert run(command, "--out", tmp_path / name, "--set", *small) == 0
    assert "warning" not in capsys.readouterr().err
    assert run("distill", "--resume", "--out", tmp_path / "s") == 0


def test_settings_of_the_baseline_are_refused_for_another_objective(tmp_path):
    for given in ("steps=4", "solver=heun"):
        words = ["distill.objective.name=uid", f"distill.regression.{given}"]
        with pytest.raises(UserError, match=r"distill\.regression\.\w+ is for distill\.objective regression alone"):
            configs.load("digits", words)
        # A run of an earlier version goes on without it.
        content = configs.to_mapping(configs.load("digits", words[:1]))
        key, _, value = given.partition("=")
        content["distill"]["regression"][key] = yaml.safe_load(value)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        assert configs.load_kept(tmp_path / "config.yaml") == configs.load("digits", words[:1])
