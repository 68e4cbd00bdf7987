"""Runs that repeat, that are interrupted and resumed, killed, and extended; folders that are not overwritten."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import resolve
from realuid_fast.train import folder as run_folder
from realuid_fast.train import hooks
from realuid_fast.train.distill import Distiller
from realuid_fast.train.logging import read_csv
from realuid_fast.train.teacher import TeacherTrainer

from ..helpers import LABELLED, MLP, POINTS, UNET, assert_same, results, run_in, save_teacher, settings


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
    with pytest.raises(hooks.Interrupted) as stop:
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
    config["distill"]["updates"] = 200
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
    with hooks.signals() as received:
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
    run_folder.open_folder(tmp_path / "run", overwrite=True)
    # The configuration stays until the next run's takes its place: a kill in between must leave a run.
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"notes.txt", "config.yaml"}
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(UserError, match="no run, so --overwrite leaves it alone"):
        run_folder.open_folder(tmp_path / "run", overwrite=True)
    with pytest.raises(UserError, match="no run to resume"):
        run_folder.open_folder(tmp_path / "new", resume=True)
    with pytest.raises(UserError, match="cannot be written"):
        run_folder.open_folder(teacher / "under-a-file")


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
