"""Checkpoints: written behind the updates; damaged, foreign and misnamed ones; runs killed at any moment."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from realuid_fast.errors import UserError
from realuid_fast.files import finished_name
from realuid_fast.train import checkpoint, hooks
from realuid_fast.train import folder as run_folder
from realuid_fast.train.checkpoint import Checkpoints

from .runs import end_of, make_other


def test_a_checkpoint_is_a_snapshot_written_behind_the_updates(tmp_path, monkeypatch):
    checkpoints, go = Checkpoints(tmp_path), threading.Event()
    write = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda *given: (go.wait(10), write(*given))[1])
    state = {"weights": torch.arange(4.0), "nested": [{0.9: torch.ones(2)}], "step": 1}
    checkpoints.save_soon(1, state)
    state["weights"].add_(1)
    state["nested"][0][0.9].zero_()
    assert not checkpoints.files()
    checkpoints.check()
    go.set()
    checkpoints.wait()
    loaded = checkpoints.load()
    assert torch.equal(loaded["weights"], torch.arange(4.0))
    assert torch.equal(loaded["nested"][0][0.9], torch.ones(2))
    checkpoints.close()


def test_nothing_but_the_writing_thread_waits_for_the_disk(run, monkeypatch):
    """Until the last checkpoint, which has nothing to run beside; logs are on disk before what counts on them."""
    synced, fsync = [], os.fsync
    thread = threading.current_thread()

    def recorded(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append((finished_name(name) or name, threading.current_thread() is thread))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    run("run", evaluate_every=0)
    names = [name for name, _ in synced]
    first = names.index("log.csv")
    # The folder of the run for the entry of the one of its checkpoints.
    assert names[first : first + 5] == ["log.csv", "distances.csv", "run", "update-00000005.pt", "checkpoints"]
    assert [name for name, here in synced[first:] if here] == ["student.safetensors", "run"]


def test_the_newest_checkpoints_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        checkpoints.load()
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    assert [file.name for file in checkpoints.files()] == ["update-00000002.pt", "update-00000003.pt"]
    assert checkpoints.load()["step"] == 3


def cut_short(file):
    os.truncate(file, file.stat().st_size // 2)


def cut_by_a_byte(file):
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def other_content(file):
    file.write_bytes(b"something else " * 100)


@pytest.mark.parametrize("damage", [cut_short, cut_by_a_byte, flip_a_bit, empty, other_content])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "weights": torch.randn(50)})
    damage(checkpoints.files()[-1])
    content = checkpoints.files()[-1].read_bytes()
    with pytest.warns(UserWarning, match=r"update-00000002.pt is damaged .*: set aside as update-00000002.damaged"):
        assert checkpoints.load()["step"] == 1
    assert (tmp_path / "update-00000002.damaged").read_bytes() == content
    damage(checkpoints.files()[-1])
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UserError, match="every one was damaged and is set aside there"),
    ):
        checkpoints.load()


def test_a_checkpoint_of_another_version_is_left_alone(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    file = checkpoints.save(1, {"step": 1})
    monkeypatch.undo()
    with pytest.raises(UserError, match="no checkpoint of this version"):
        checkpoints.load()
    assert file.exists()


def test_a_run_goes_on_from_before_a_damaged_checkpoint(run, after):
    straight = run("straight")
    after(11, lambda: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        run("broken")
    flip_a_bit(Checkpoints(straight.parent / "broken/checkpoints").files()[-1])
    with pytest.warns(UserWarning, match="update-00000010.pt is damaged"):
        broken = run("broken", resume=True)
    assert end_of(straight) == end_of(broken)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(run, after):
    after(3, lambda: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        run("broken")
    assert end_of(run("broken", resume=True)) == end_of(run("straight"))


def test_a_checkpoint_that_does_not_fit_is_a_sentence(run, after):
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(hooks.Interrupted) as stop:
        run("run")
    Checkpoints(stop.value.folder / "checkpoints").save(7, {"trainer": {"step": 7}})
    with pytest.raises(UserError, match="the checkpoint does not fit the run"):
        run("run", resume=True)


def test_what_a_user_put_beside_checkpoints_is_neither_read_nor_deleted(run, after, tmp_path):
    straight = run("straight")
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(hooks.Interrupted):
        run("run")
    folder = tmp_path / "run/checkpoints"
    mine = [folder / name for name in ("update-best.pt", "update-00000005-backup.pt", "update-5.pt", "update-00000001")]
    mine += [folder / name for name in ("update-best.damaged", "update-00000001.a.shard", "update-00000001.rankings")]
    for file in mine:
        file.write_text("mine")
    (folder / "update-00000002.pt").mkdir()
    (folder / "update-00000003.pt").symlink_to(tmp_path / "teacher.safetensors")
    assert end_of(run("run", resume=True)) == end_of(straight)
    run_folder.open_folder(tmp_path / "run", overwrite=True)
    assert all(file.read_text() == "mine" for file in mine)
    assert {file.name for file in folder.iterdir()} - {file.name for file in mine} == {
        "update-00000002.pt",
        "update-00000003.pt",
    }


def test_a_checkpoint_of_another_run_is_refused(run, after, tmp_path):
    straight = run("straight")
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(hooks.Interrupted):
        run("run")
    foreign = tmp_path / "run/checkpoints/update-00000010.pt"
    shutil.copy(straight / "checkpoints/update-00000010.pt", foreign)
    ours, other = (run_folder.identity_of(folder) for folder in (tmp_path / "run", straight))
    assert ours != other
    with pytest.raises(UserError, match=rf"update-00000010.pt is a checkpoint of another run \({other}; .*{ours}\)"):
        run("run", resume=True)
    foreign.rename(tmp_path / "elsewhere.pt")
    assert end_of(run("run", resume=True)) == end_of(straight)


def test_a_run_of_a_version_without_identities_goes_on(run, after, tmp_path):
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(hooks.Interrupted):
        run("run")
    file = Checkpoints(tmp_path / "run/checkpoints").files()[-1]
    content = torch.load(file, weights_only=True)
    assert content.pop("run") == run_folder.identity_of(tmp_path / "run")
    with file.open("wb") as stream:
        checkpoint._write_verified(stream, content)
    settings = tmp_path / "run/config.yaml"
    settings.write_text(settings.read_text().partition("\n")[2])
    assert run_folder.identity_of(tmp_path / "run") is None
    assert end_of(run("run", resume=True)) == end_of(run("straight"))
    assert Checkpoints(tmp_path / "run/checkpoints").load()["run"] == run_folder.identity_of(tmp_path / "run")


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "FIFO"])
def test_what_is_no_file_under_a_checkpoints_name_is_set_aside(run, after, tmp_path, kind):
    straight = run("straight")
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(hooks.Interrupted):
        run("run")
    newest = tmp_path / "run/checkpoints/update-00000010.pt"
    make_other(newest, kind)
    with pytest.warns(UserWarning, match=r"update-00000010.pt is damaged \(it is .*\): set aside as update-00000010.d"):
        run("run", resume=True)
    assert end_of(tmp_path / "run") == end_of(straight)
    assert os.path.lexists(newest.with_suffix(".damaged"))
