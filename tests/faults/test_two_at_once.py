"""Two runs in one folder: locks, and folders that change hands."""

import errno
import fcntl
import json
import os
import shutil
import signal
import time

import pytest

from realuid_fast.errors import UserError
from realuid_fast.lock import LOCK, Lock, held
from realuid_fast.train import checkpoint
from realuid_fast.train.checkpoint import Checkpoints

from .runs import end_of


def test_a_second_run_in_a_folder_is_refused(run, tmp_path):
    folder = run("run")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    with held(folder):
        with pytest.raises(UserError, match=rf"the folder .* is in use by process {os.getpid()} on "):
            run("run", resume=True)
        assert {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and f.name != LOCK} == before
    assert not (folder / LOCK).exists()
    run("run", resume=True)


@pytest.mark.parametrize("again", [False, True], ids=["lock removed", "folder deleted and made again"])
def test_a_run_whose_folder_another_may_have_taken_stops(run, after, monkeypatch, tmp_path, again):
    """Between two updates; from then on its rows, networks and rotation would be in the other one's way."""
    folder, found = tmp_path / "run", {}
    # rmtree does not survive a file that is made meanwhile.
    monkeypatch.setattr(Checkpoints, "check", Checkpoints.wait)

    def take():
        if again:
            shutil.rmtree(folder)
            run("run")
        else:
            (folder / LOCK).unlink()
        found.update({file: file.read_bytes() for file in folder.rglob("*") if file.is_file()})

    after(7, take)
    message = r"stopped after update \d+: .*/\.lock was deleted or replaced while this run was going on, so another run"
    with pytest.raises(UserError, match=message):
        run("run", keep=1)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == found
    assert end_of(run("run", resume=True))[0][0] == end_of(run("straight"))[0][0]


def test_a_lock_is_let_go_without_touching_the_next_ones(tmp_path):
    first = Lock(tmp_path)
    (tmp_path / LOCK).unlink()
    second = Lock(tmp_path)
    with pytest.raises(UserError, match="was deleted or replaced"):
        first.check()
    with pytest.raises(UserError, match="is in use by"):
        first.retake()
    first.release()
    second.check()
    second.release()
    assert not (tmp_path / LOCK).exists()


def test_a_checkpoint_in_the_making_when_the_folder_changes_hands_deletes_nothing(tmp_path, monkeypatch):
    lost, write_verified = [], checkpoint._write_verified

    def guard():
        if lost:
            raise UserError("not ours")

    checkpoints = Checkpoints(tmp_path, keep=1, guard=guard)
    checkpoints.save(1, {})

    def slow(stream, content):
        lost.append(True)
        return write_verified(stream, content)

    monkeypatch.setattr(checkpoint, "_write_verified", slow)
    with pytest.raises(UserError, match="not ours"):
        checkpoints.save(2, {})
    assert [file.name for file in tmp_path.iterdir()] == ["update-00000001.pt"]


def test_a_file_system_without_locks_is_a_warning(monkeypatch, tmp_path):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.warns(UserWarning, match="run cannot be locked: a second run there would go unnoticed"),
        held(tmp_path / "run"),
    ):
        assert (tmp_path / "run" / LOCK).is_file()


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path):
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        with held(tmp_path):
            os.write(send, b"held")
            time.sleep(60)
        os._exit(0)
    assert os.read(receive, 4) == b"held"
    try:
        with pytest.raises(UserError, match=f"process {child} on"), held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(receive)
        os.close(send)
    assert (tmp_path / LOCK).exists()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()
