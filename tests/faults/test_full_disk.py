"""A disk that is full under a checkpoint, a log or an exported network."""

import functools
import os
import resource
from pathlib import Path

import pytest

from realuid_fast.errors import UserError
from realuid_fast.train.checkpoint import Checkpoints
from realuid_fast.train.logging import CsvLog

from .runs import end_of, steps


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
