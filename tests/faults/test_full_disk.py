"""A disk that is full under a checkpoint, a log or an exported network."""

import functools
import os
import resource
from pathlib import Path

import pytest

from realuid_fast import cli
from realuid_fast.errors import UserError
from realuid_fast.train.checkpoint import Checkpoints
from realuid_fast.train.logging import CsvLog

from .runs import end_of, steps

UMASK = os.umask(0)
os.umask(UMASK)


def test_a_full_disk_leaves_the_last_checkpoint(run, after, file_limit, monkeypatch):
    # Noticed with the update after it, however long the thread takes: the run's other files would not fit either.
    monkeypatch.setattr(Checkpoints, "check", Checkpoints.wait)
    after(9, functools.partial(file_limit, 4000))
    with pytest.raises(UserError, match=r"the checkpoint .*update-00000010.pt cannot be written: File too large"):
        run("full")
    file_limit(resource.RLIM_INFINITY)
    straight = run("straight")
    full = straight.parent / "full"
    assert steps(full) == [5]
    assert not list(full.rglob("*.part"))
    run("full", resume=True)
    assert end_of(straight) == end_of(full)


def test_a_full_disk_under_the_log_is_a_sentence(run, monkeypatch):
    write = CsvLog.write

    def full(self, row):
        if row["update"] == 8:
            raise OSError(28, "No space left on device", str(self.file))
        write(self, row)

    monkeypatch.setattr(CsvLog, "write", full)
    with pytest.raises(
        UserError,
        match=r"stopped after update 8: .*log.csv: No space left on device; --resume goes on from update-0+5.pt",
    ):
        run("full")
    monkeypatch.undo()
    assert end_of(run("full", resume=True)) == end_of(run("straight"))


@pytest.mark.parametrize("name", ["best", "student"])
def test_a_full_disk_under_an_exported_network_is_a_sentence(run, monkeypatch, name):
    replace, failed = os.replace, []

    def full(source, target):
        if Path(target).stem == name and not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    after = r"stopped after update (4|8|12): .*safetensors cannot be written: No space left on device; --resume goes on"
    with pytest.raises(UserError, match=after if name == "student" else "cannot be written: No space left on device; "):
        run("full")
    assert not list(Path(failed[0]).parent.glob("*.part"))
    assert end_of(run("full", resume=True)) == end_of(run("straight"))


def refused(capsys, *words):
    """The line in which a command says why it ends."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    return said


def test_samples_on_a_full_disk_leave_what_was_there(tmp_path, file_limit, capsys):
    for suffix in ("png", "npy", "safetensors"):
        out = tmp_path / f"samples.{suffix}"
        words = ["sample", "--model", "digits", "--steps", "1", "--count", "20", "--out", out, "--overwrite"]
        file_limit(1000)
        assert f"--out {out} cannot be written: File too large" in refused(capsys, *words)
        assert not list(tmp_path.iterdir())
        file_limit(resource.RLIM_INFINITY)
        assert cli.main([*map(str, words)]) == 0
        before = out.read_bytes()
        file_limit(1000)
        assert f"--out {out} cannot be written: File too large" in refused(capsys, *words, "--seed", "1")
        assert out.read_bytes() == before
        assert [*tmp_path.iterdir()] == [out]
        file_limit(resource.RLIM_INFINITY)
        assert out.stat().st_mode & 0o777 == 0o666 & ~UMASK
        out.unlink()
        out.mkdir()
        assert f"--out {out} is a folder" in refused(capsys, *words)
        out.rmdir()


def test_a_classifier_and_an_evaluation_on_a_full_disk_name_out(tmp_path, file_limit, capsys):
    out = tmp_path / "classifier.safetensors"
    words = ["train-classifier", "--epochs", "1", "--out", out]
    file_limit(1000)
    assert f"--out {out} cannot be written: File too large" in refused(capsys, *words)
    assert not list(tmp_path.iterdir())
    file_limit(10)
    words = ["evaluate", "--teacher", "digits", "--steps", "1", "--samples", "50", "--out", tmp_path / "table"]
    assert f"--out {tmp_path / 'table'} cannot be written: File too large" in refused(capsys, *words)
    assert not list((tmp_path / "table").iterdir())


@pytest.mark.parametrize("command", [["sample", "--model", "digits"], ["train-classifier"]])
def test_a_folder_that_takes_no_file_is_told_before_anything_is_computed(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("realuid_fast.cli.common.use_threads", lambda _: pytest.fail("began"))
    out = tmp_path / "o.safetensors"
    assert f"--out {out} cannot be written: permission denied" in refused(capsys, *command, "--out", out)
    assert "must end in " in refused(capsys, *command, "--out", tmp_path / "o.bin")
