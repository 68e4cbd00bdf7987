"""Faults around a run, provoked one by one: nothing is lost, and the message says what to do (docs/faults.md)."""

import errno
import fcntl
import functools
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from realuid_fast import backends, functional, streams, teachers
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure
from realuid_fast.files import part_of, replacing
from realuid_fast.networks import build
from realuid_fast.pack import pack
from realuid_fast.train import checkpoint, loop, memory
from realuid_fast.train import config as configs
from realuid_fast.train.checkpoint import Checkpoints
from realuid_fast.train.distill import Distiller
from realuid_fast.train.jobs import train
from realuid_fast.train.lock import LOCK, Lock, held
from realuid_fast.train.logging import CsvLog, read_csv

from .helpers import MLP, POINTS, save_teacher

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """Distils in a folder by name; keywords are settings of ``run``. The folder."""
    save_teacher(tmp_path / "teacher.safetensors")

    def start(name, resume=False, data=POINTS, teacher="teacher.safetensors", **settings):
        config = {
            "data": data,
            "distill": {
                "teacher": str(tmp_path / teacher),
                "batch": 8,
                "updates": 12,
                "fake_turns": 1,
                "ema": [0.9],
                "export": 0.9,
            },
            "run": {
                "log_every": 1,
                "evaluate_every": 4,
                "evaluate_samples": 20,
                "checkpoint_every": 5,
                "tensorboard": False,
                "progress": False,
                **settings,
            },
        }
        torch.manual_seed(0)
        train("distill", configs.from_mapping(config), tmp_path / name, resume, False, "")
        return tmp_path / name

    return start


def end_of(folder):
    """The results of a run that another run must repeat."""
    clocks = {"images_per_second": 0.0, "seconds": 0.0}
    # As text, in which one NaN equals another.
    log = [str({**row, **clocks}) for row in read_csv(folder / "log.csv")]
    files = [(folder / name).read_bytes() for name in ("student.safetensors", "best.safetensors", "distances.csv")]
    return files, log


def steps(folder):
    return [int(file.stem.removeprefix("update-")) for file in Checkpoints(folder / "checkpoints").files()]


@pytest.fixture
def after(monkeypatch):
    """Call something after the chosen update, once."""

    def prepare(step, act):
        update = Distiller.update

        def acting(self):
            update(self)
            if self.step == step:
                monkeypatch.setattr(Distiller, "update", update)
                act()

        monkeypatch.setattr(Distiller, "update", acting)

    return prepare


# -- checkpoints


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
        synced.append((part_of(name) or name, threading.current_thread() is thread))
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
    torch.manual_seed(5)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    expected = torch.randn(3)
    assert [file.name for file in checkpoints.files()] == ["update-00000002.pt", "update-00000003.pt"]
    assert checkpoints.load()["step"] == 3
    assert torch.equal(torch.randn(3), expected)


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
    with pytest.raises(loop.Interrupted) as stop:
        run("run")
    Checkpoints(stop.value.folder / "checkpoints").save(7, {"trainer": {"step": 7}})
    with pytest.raises(UserError, match="the checkpoint does not fit the run"):
        run("run", resume=True)


def test_what_a_user_put_beside_checkpoints_is_neither_read_nor_deleted(run, after, tmp_path):
    straight = run("straight")
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
        run("run")
    folder = tmp_path / "run/checkpoints"
    mine = [folder / name for name in ("update-best.pt", "update-00000005-backup.pt", "update-5.pt", "update-00000001")]
    mine += [folder / name for name in ("update-best.damaged", "update-00000001.a.shard", "update-00000001.rankings")]
    for file in mine:
        file.write_text("mine")
    (folder / "update-00000002.pt").mkdir()
    (folder / "update-00000003.pt").symlink_to(tmp_path / "teacher.safetensors")
    assert end_of(run("run", resume=True)) == end_of(straight)
    loop.open_folder(tmp_path / "run", overwrite=True)
    assert all(file.read_text() == "mine" for file in mine)
    assert {file.name for file in folder.iterdir()} - {file.name for file in mine} == {
        "update-00000002.pt",
        "update-00000003.pt",
    }


def test_a_checkpoint_of_another_run_is_refused(run, after, tmp_path):
    straight = run("straight")
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
        run("run")
    foreign = tmp_path / "run/checkpoints/update-00000010.pt"
    shutil.copy(straight / "checkpoints/update-00000010.pt", foreign)
    ours, other = (loop._identity(folder) for folder in (tmp_path / "run", straight))
    assert ours != other
    with pytest.raises(UserError, match=rf"update-00000010.pt is a checkpoint of another run \({other}; .*{ours}\)"):
        run("run", resume=True)
    foreign.rename(tmp_path / "elsewhere.pt")
    assert end_of(run("run", resume=True)) == end_of(straight)


def test_a_run_of_a_version_without_identities_goes_on(run, after, tmp_path):
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
        run("run")
    file = Checkpoints(tmp_path / "run/checkpoints").files()[-1]
    content = torch.load(file, weights_only=True)
    assert content.pop("run") == loop._identity(tmp_path / "run")
    with file.open("wb") as stream:
        checkpoint._write_verified(stream, content)
    settings = tmp_path / "run/config.yaml"
    settings.write_text(settings.read_text().partition("\n")[2])
    assert loop._identity(tmp_path / "run") is None
    assert end_of(run("run", resume=True)) == end_of(run("straight"))
    assert Checkpoints(tmp_path / "run/checkpoints").load()["run"] == loop._identity(tmp_path / "run")


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "FIFO"])
def test_what_is_no_file_under_a_checkpoints_name_is_set_aside(run, after, tmp_path, kind):
    straight = run("straight")
    after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
        run("run")
    newest = tmp_path / "run/checkpoints/update-00000010.pt"
    make_other(newest, kind)
    with pytest.warns(UserWarning, match=r"update-00000010.pt is damaged \(it is .*\): set aside as update-00000010.d"):
        run("run", resume=True)
    assert end_of(tmp_path / "run") == end_of(straight)
    assert os.path.lexists(newest.with_suffix(".damaged"))


def make_other(file, kind):
    """Something that is no regular file."""
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    else:
        file.symlink_to(file.parent / "nothing" if kind == "link to nothing" else kind)


def test_a_run_killed_again_and_again_ends_as_if_left_alone(tmp_path):
    out = tmp_path / "kills.json"
    command = [sys.executable, "-m", "bench.kills", "--kills", "5", "--updates", "24", "--every", "0"]
    command += ["--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["same"] is True
    assert result["checkpoints_lost"] == 0
    assert len(result["kills"]) == 5


def test_a_run_killed_at_every_call_that_changes_its_folder_ends_as_if_left_alone(run, tmp_path):
    """A small network: the calls are those of any run. The committed result is of the digits' U-Net."""
    settings = tmp_path / "c.yaml"
    content = yaml.safe_load((run("run") / "config.yaml").read_text())
    settings.write_text(yaml.safe_dump({key: content[key] for key in ("data", "distill")}))
    out = tmp_path / "kills.json"
    command = [sys.executable, "-m", "bench.kills", "--kills", "0", "--every", "8"]
    done = subprocess.run(
        [*command, "--config", str(settings), "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())["calls"]
    made = {kill["call"] for each in told.values() for kill in each["kills"]}
    assert {call.split()[0] for call in made} >= {"fsync", "replace", "mkdir", "unlink"}
    assert all(kill["wrong"] == [] for each in told.values() for kill in each["kills"])


def test_the_committed_kills_left_nothing_wrong():
    """At every call, before and after it; ``python -m bench.kills`` makes the file."""
    result = json.loads((ROOT / "bench/results/kills.json").read_text())
    assert len(result["kills"]) >= 40
    assert result["same"] is True
    assert result["checkpoints_lost"] == 0
    for each in result["calls"].values():
        assert len(each["kills"]) == 2 * each["calls"]
        assert all(kill["wrong"] == [] for kill in each["kills"])


# -- signals


def test_a_signal_does_not_wait_for_an_evaluation(run, after):
    straight = run("straight")
    after(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
        run("broken")
    broken = straight.parent / "broken"
    assert [row["update"] for row in read_csv(broken / "distances.csv")] == [0, 4]
    run("broken", resume=True)
    assert end_of(straight) == end_of(broken)


def test_a_signal_in_the_last_update_leaves_the_evaluation_to_the_resumed_run(run, after):
    after(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
        run("broken")
    assert end_of(run("broken", resume=True)) == end_of(run("straight"))


def test_a_terminal_that_closes_is_a_signal_to_save(run, after, tmp_path):
    """It sends SIGHUP more than once."""
    straight, before = run("straight"), signal.getsignal(signal.SIGHUP)

    def close():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)

    after(8, close)
    with pytest.raises(loop.Interrupted, match="stopped by SIGHUP") as stop:
        run("broken")
    assert stop.value.code == 129
    assert signal.getsignal(signal.SIGHUP) == before
    assert end_of(run("broken", resume=True)) == end_of(straight)
    # As nohup does it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after(8, close)
        assert end_of(run("ignored")) == end_of(straight)
    finally:
        signal.signal(signal.SIGHUP, before)


# -- output


class Broken(io.TextIOWrapper):
    """A stream to a reader that is gone, or to a full disk."""

    def __init__(self, kind):
        if kind == "reader gone":
            read, write = os.pipe()
            os.close(read)
        else:
            write = os.open("/dev/full", os.O_WRONLY)
        super().__init__(os.fdopen(write, "wb"), line_buffering=True)


@pytest.mark.parametrize("kind", ["reader gone", "disk full", "closed"])
def test_a_run_whose_messages_nobody_reads_goes_on(run, monkeypatch, kind):
    straight = run("straight")
    stream = None if kind == "closed" else Broken(kind)
    monkeypatch.setattr(sys, "stderr", stream)
    # Every update tells something.
    monkeypatch.setattr(Distiller, "concern", lambda self, row: "something to say")
    broken = run("broken", progress=True)
    monkeypatch.undo()
    assert end_of(broken) == end_of(straight)
    if stream is not None:
        streams._silence(stream)
        stream.close()


def test_a_command_whose_messages_nobody_reads_saves_on_a_signal(run, tmp_path):
    straight = run("straight")
    settings = yaml.safe_load((straight / "config.yaml").read_text())
    settings["distill"]["updates"] = 100_000
    settings["run"] |= {"progress": True, "checkpoint_every": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "realuid_fast", "distill", "--config", "c.yaml", "--out", "run"]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=full, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "run/log.csv", time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(timeout=60) == 129
    finally:
        process.kill()
    assert len(steps(tmp_path / "run")) == 1


@pytest.mark.parametrize(("kind", "code"), [("reader gone", 141), ("disk full", 2)])
def test_output_that_cannot_be_written_is_told_after_the_work(monkeypatch, capfd, kind, code):
    stream = Broken(kind)
    monkeypatch.setattr(sys, "stdout", stream)
    done = []

    def work():
        for _ in range(3):
            print("a line", flush=True)
        done.append(True)
        return 0

    assert streams.guarded(work) == code
    assert done
    # Python writes what is left in the stream when it ends.
    stream.close()
    said = capfd.readouterr().err
    assert said == ("" if code == 141 else "error: standard output: No space left on device\n")


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    words = f"{sys.executable} -m realuid_fast info 2>&1 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"realuid-fast .*\n141\n", done.stdout), done.stdout


def test_a_closed_descriptor_does_not_become_a_file_of_the_run():
    words = "import os, sys; from realuid_fast import streams; "
    words += "streams.guarded(lambda: sys.exit(os.open(sys.executable, os.O_RDONLY)))"
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c '{words}' 2>&- >&-"], cwd=ROOT, timeout=60)
    assert done.returncode > 2


# -- files


REMNANTS = [".lock", "config.yaml.part", ".config.yaml.0123456789abcdef.part"]


@pytest.mark.parametrize("names", [[], *([name] for name in REMNANTS), REMNANTS])
def test_a_run_that_was_killed_before_it_had_a_configuration_starts(run, names, tmp_path):
    folder = tmp_path / "run"
    for overwrite in (False, True):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("half of")
        with pytest.raises(UserError, match=r"no run to resume in .*: it has no config.yaml; leave --resume out"):
            loop.open_folder(folder, resume=True)
        loop.open_folder(folder, overwrite=overwrite)
    assert (run("run") / "student.safetensors").is_file()
    assert not list(folder.rglob(".*"))


def test_a_run_that_is_killed_while_it_replaces_another_leaves_a_run(run, monkeypatch, tmp_path):
    """Beside a file of the user's, without which an empty folder would be left."""
    folder = run("run")
    (folder / "notes.txt").write_text("mine")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples/mine.png").write_text("mine")
    (folder / "samples/.update-00000004.png.0123456789abcdef.part").write_text("half of")
    loop.open_folder(folder, resume=True)
    assert [file.name for file in (folder / "samples").iterdir()] == ["mine.png"]
    loop.open_folder(folder, overwrite=True)
    assert {file.name for file in folder.iterdir()} == {"notes.txt", "samples", "config.yaml"}
    loop.open_folder(folder, overwrite=True)
    loop.open_folder(folder, resume=True)
    assert end_of(run("run", resume=True)) == end_of(run("straight"))
    assert (folder / "samples/mine.png").exists()


def test_what_is_being_written_has_a_name_of_its_own(tmp_path):
    mine, target = tmp_path / "mine", tmp_path / "file"
    mine.write_text("mine")
    (tmp_path / "file.part").symlink_to(mine)
    with replacing(target) as stream:
        (made,) = (file for file in tmp_path.iterdir() if part_of(file.name) == "file")
        stream.write(b"new")
    assert (target.read_text(), mine.read_text(), made.exists()) == ("new", "mine", False)
    assert (tmp_path / "file.part").is_symlink()
    target.unlink()
    target.symlink_to(mine)
    with replacing(target) as stream:
        stream.write(b"newer")
    assert (target.read_text(), mine.read_text(), target.is_symlink()) == ("newer", "mine", False)


@pytest.mark.parametrize("kind", ["folder", "FIFO", "link to nothing", "/dev/zero"])
def test_a_run_writes_to_nothing_but_files_and_folders_of_its_own(run, tmp_path, kind):
    whole = run("run")
    for name in ("log.csv", "distances.csv", "student.safetensors", "checkpoints", "samples"):
        shutil.copytree(whole, folder := tmp_path / name)
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        make_other(folder / name, str(tmp_path) if kind == "folder" and name in loop.RUN_FOLDERS else kind)
        before = sorted(folder.rglob("*"))
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"{name} is a link or not a f\w+, where a run would write: move it"):
                loop.open_folder(folder, **how)
            assert sorted(folder.rglob("*")) == before


def test_a_log_that_becomes_a_link_or_is_deleted_is_not_written_through(run, after, tmp_path):
    (tmp_path / "mine").write_text("mine")

    def exchange():
        (tmp_path / "linked/log.csv").unlink()
        (tmp_path / "linked/log.csv").symlink_to(tmp_path / "mine")

    after(7, exchange)
    with pytest.raises(UserError, match=r"stopped after update 7: .*log.csv: it is not a regular file; --resume goes"):
        run("linked")
    assert (tmp_path / "mine").read_text() == "mine"
    after(7, lambda: (tmp_path / "gone/log.csv").unlink())
    with pytest.raises(UserError, match=r"stopped after update 7: .*log.csv: No such file or directory; --resume goes"):
        run("gone")


def test_names_of_new_files_are_on_disk_before_a_checkpoint_counts_on_them(run, monkeypatch, tmp_path):
    """A power cut forgets an entry of a folder that was not brought to disk, whatever was done with the file."""
    fsync, replace, known, counted = os.fsync, os.replace, {}, []

    def recorded(descriptor):
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place.is_dir():
            known[place] = set(os.listdir(place))
        fsync(descriptor)

    def replaced(source, target):
        if Path(target).name == "update-00000005.pt":
            counted.append(dict(known))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", replaced)
    run("new/run")
    (at_checkpoint,) = counted
    assert "new" in at_checkpoint[tmp_path]
    assert "run" in at_checkpoint[tmp_path / "new"]
    assert {"config.yaml", "log.csv", "distances.csv", "checkpoints"} <= at_checkpoint[tmp_path / "new/run"]
    assert "update-00000012.pt" in known[tmp_path / "new/run/checkpoints"]


@pytest.fixture
def file_limit():
    """Files cannot grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_a_folder_that_cannot_be_written_is_refused():
    with (
        pytest.raises(UserError, match="the folder /proc/nothing/run cannot be written"),
        held(Path("/proc/nothing/run")),
    ):
        pass


def test_a_folder_that_vanishes_is_made_again(run, after, tmp_path):
    after(7, lambda: shutil.rmtree(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"stopped after update \d+: .*; --resume goes on from update-"):
        run("gone")
    gone, straight = run("gone", resume=True), run("straight")
    assert end_of(gone)[0][0] == end_of(straight)[0][0]


def test_a_folder_that_vanishes_under_a_checkpoint_is_made_again(run, monkeypatch, tmp_path):
    """Between the beginning and the end of a write in the background, which alone notices."""
    begun = []
    write_verified = checkpoint._write_verified

    def vanishing(stream, content):
        if not begun:
            begun.append(stream)
            shutil.rmtree(tmp_path / "gone")
        return write_verified(stream, content)

    monkeypatch.setattr(checkpoint, "_write_verified", vanishing)
    # The update after it waits until it has failed, which is before the next row of the log.
    monkeypatch.setattr(Checkpoints, "check", Checkpoints.wait)
    message = (
        r"stopped after update \d+: the checkpoint .*update-00000005.pt cannot be written: No such file.*; --resume"
    )
    with pytest.raises(UserError, match=message):
        run("gone", log_every=12)
    monkeypatch.undo()
    gone, straight = run("gone", resume=True, log_every=12), run("straight", log_every=12)
    assert end_of(gone)[0][0] == end_of(straight)[0][0]


def test_a_folder_that_vanishes_is_made_again_where_a_checkpoint_fails_too(run, after, monkeypatch, tmp_path):
    """The row of the log is the first to notice, while a write in the background has failed and nobody has looked."""
    gone, write_verified = threading.Event(), checkpoint._write_verified

    def late(stream, content):
        assert gone.wait(60)
        return write_verified(stream, content)

    def vanish():
        shutil.rmtree(tmp_path / "gone")
        gone.set()

    after(7, vanish)
    monkeypatch.setattr(checkpoint, "_write_verified", late)
    monkeypatch.setattr(Checkpoints, "check", lambda self: None)
    with pytest.raises(UserError, match=r"stopped after update \d+: .*log.csv: No such file.*; --resume goes on from"):
        run("gone")
    assert gone.is_set()
    monkeypatch.undo()
    assert end_of(run("gone", resume=True))[0][0] == end_of(run("straight"))[0][0]


def test_a_replaced_file_is_old_or_new(tmp_path):
    file = tmp_path / "f"
    with replacing(file) as stream:
        stream.write(b"old")

    def fail():
        with replacing(file) as stream:
            stream.write(b"ne")
            stream.flush()
            assert file.read_bytes() == b"old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [f.name for f in tmp_path.iterdir()] == ["f"]
    assert file.read_bytes() == b"old"


def test_a_log_that_lost_rows_is_a_warning(tmp_path):
    log = CsvLog(tmp_path / "log.csv", ["a"])
    log.write({"a": 1})
    with pytest.warns(UserWarning, match="has lost rows"):
        log.cut(log.position + 5)


def image_teacher(tmp_path, data):
    """Writes images and a teacher of them; the arguments of a run on them."""
    rows = torch.randint(0, 256, (12, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    images = tmp_path / "images"
    for i, pixels in enumerate(rows):
        (images / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(images / "ab"[i % 2] / f"{i}.png")
    network = {"kind": "mlp", "shape": [3, 8, 8], "width": 8, "depth": 1}
    teachers.save(
        tmp_path / "images.safetensors", build(network).state_dict(), teachers.Description(network, data=data)
    )
    return {"data": data, "teacher": "images.safetensors"}


def test_data_deleted_in_a_run(run, after, tmp_path):
    images = tmp_path / "images"
    given = image_teacher(tmp_path, {"name": "folder", "path": str(images), "size": 8, "heldout_every": 4})
    straight = run("straight", **given)
    after(3, lambda: shutil.rmtree(images))
    broken = run("broken", **given)
    assert end_of(straight) == end_of(broken)
    with pytest.raises(UserError, match="path: there is no folder"):
        run("broken", resume=True, **given)


@pytest.fixture
def streamed(tmp_path):
    """The arguments of a run on images that are read from disk, mirrored and drawn by class; the file of them."""
    packed = tmp_path / "packed"
    given = image_teacher(tmp_path, {"name": "packed", "path": str(packed), "flip": True, "balance": True})
    pack(tmp_path / "images", packed, size=8, heldout_every=4)
    return given, packed / "train_images.npy"


def test_streamed_data_deleted_in_a_run(run, after, streamed):
    given, file = streamed
    straight = run("straight", **given)
    after(3, file.unlink)
    broken = run("broken", **given)
    assert end_of(straight) == end_of(broken)
    with pytest.raises(UserError, match=r"path: there is no file .*train_images\.npy"):
        run("broken", resume=True, **given)


def test_streamed_data_cut_short_in_a_run(run, after, streamed):
    given, file = streamed
    straight, whole = run("straight", **given), file.read_bytes()
    after(7, lambda: os.truncate(file, 200))
    with pytest.raises(UserError, match=r"train_images\.npy: was cut short.*--resume goes on from update-0+(5|10)\.pt"):
        run("broken", **given)
    with pytest.raises(UserError, match=r"path: .*train_images\.npy is cut short"):
        run("broken", resume=True, **given)
    file.write_bytes(whole)
    assert end_of(straight) == end_of(run("broken", resume=True, **given))


def test_other_data_in_the_place_of_streamed(run, streamed, after, tmp_path):
    given, file = streamed
    after(7, lambda: os.truncate(file, 200))
    with pytest.raises(UserError, match="was cut short"):
        run("run", **given)
    pack(tmp_path / "images", file.parent, size=8, heldout_every=4, filter="box", crop=4, overwrite=True)
    with pytest.raises(UserError, match="the run was started on other training samples than the data set has now"):
        run("run", resume=True, **given)


# -- two at once


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


# -- numbers, memory, clocks


def test_gradients_that_stay_without_a_number_stop_the_run(run, monkeypatch):
    straight, calls = run("straight", checkpoint_every=1), 0
    grads = functional.generator_grads

    def poisoned(*given, **named):
        nonlocal calls
        calls += 1
        found = grads(*given, **named)
        return found._replace(x=found.x * math.nan) if calls > 6 else found

    monkeypatch.setattr(functional, "generator_grads", poisoned)
    with pytest.raises(UserError, match=r"the generator's gradient was not finite in 4 steps in a row.*at update 10"):
        run("broken", checkpoint_every=1, stop_after_skips=4)
    broken = straight.parent / "broken"
    assert steps(broken) == [5, 6]
    assert [row["generator skipped"] for row in read_csv(broken / "log.csv")[-5:]] == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    assert end_of(run("broken", resume=True)) == end_of(straight)


def test_a_skip_now_and_then_does_not_stop_a_run(run, monkeypatch):
    calls, grads = 0, functional.generator_grads

    def poisoned(*given, **named):
        nonlocal calls
        calls += 1
        found = grads(*given, **named)
        return found._replace(x=found.x * math.nan) if calls % 2 else found

    monkeypatch.setattr(functional, "generator_grads", poisoned)
    folder = run("run", stop_after_skips=2)
    assert read_csv(folder / "log.csv")[-1]["generator skipped"] == 6


def test_memory_that_does_not_suffice_says_what_would_fit(run, after):
    after(7, lambda: torch.empty(2**58))
    with pytest.raises(
        UserError,
        match=r"stopped after update 7: the memory of cpu does not suffice for a batch of 8: a sample's activations "
        r"take .* MB .*, [\d,]+ MB are free now, so that about 7 would fit; with run.accumulate=2 the batch "
        r"goes through in parts of 4; --resume goes on from update-00000005.pt",
    ):
        run("large")
    assert end_of(run("large", resume=True)) == end_of(run("straight"))


@pytest.mark.parametrize(
    ("batch", "rows", "free", "said"),
    [
        (64, 1, 10.5, r"about 10 would fit; with run.accumulate=8 the batch goes through in parts of 8$"),
        (
            64,
            2,
            10.5,
            r"in 2 passes .* about 5 would fit; with run.accumulate=16 the batch goes through in parts of 4$",
        ),
        (7, 1, 100.0, r"about 6 would fit; with run.accumulate=7 the batch goes through in parts of 1$"),
        (64, 1, 0.5, r"about 0 would fit$"),
        (64, 1, None, r"does not suffice for a batch of 64$"),
    ],
)
def test_what_would_fit_is_what_is_free_over_what_a_sample_takes(monkeypatch, batch, rows, free, said):
    net = build(MLP)
    size = memory.bytes_per_sample(net, (2,), torch.device("cpu"))
    assert size > 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: None if free is None else int(free * size))
    advice = memory.advice(net, batch, 1, rows, (2,), torch.device("cpu"))
    assert re.search(said, advice), advice
    # Of a batch that goes through in parts already.
    if "goes through" in advice:
        parts = int(re.search(r"accumulate=(\d+)", advice)[1])
        assert f"run.accumulate={3 * parts} " in memory.advice(net, batch, 3, rows, (2,), torch.device("cpu"))


def test_memory_that_one_sample_exhausts_is_said(monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(memory, "bytes_per_sample", exhausted)
    assert memory.advice(build(MLP), 8, 1, 1, (2,), torch.device("cpu")).endswith("a batch of 8, nor for a batch of 1")


def test_memory_that_does_not_suffice_for_an_evaluation_says_so(run, monkeypatch):
    """Smaller parts of a batch would not help, and a resumed run comes to the same evaluation."""
    measured = Measure.__call__
    calls = itertools.count()

    def exhausted(self, samples):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(self, samples)

    monkeypatch.setattr(Measure, "__call__", exhausted)
    with pytest.raises(
        UserError, match=r"not suffice for the evaluation after update 4: resume with a smaller run\.ev"
    ):
        run("large")
    assert end_of(run("large", resume=True)) == end_of(run("straight"))


def test_a_run_that_was_too_large_goes_on_in_parts(run, after):
    after(7, lambda: torch.empty(2**58))
    with pytest.raises(UserError, match=r"run\.accumulate=2"):
        run("large")
    folder = run("large", resume=True, accumulate=2)
    assert [row["update"] for row in read_csv(folder / "log.csv")] == list(range(1, 13))


def test_activations_are_counted_once_and_without_the_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(2, 8)

        def forward(self, t, x, y=None):
            return self.inside(x).relu()

    # The linear layer keeps its two inputs, the rectifier its eight results.
    assert memory.bytes_per_sample(Net(), (2,), torch.device("cpu")) == 4 * (2 + 8)
    assert memory.is_exhausted(torch.OutOfMemoryError("CUDA out of memory"))
    assert not memory.is_exhausted(RuntimeError("shapes do not match"))
    left = RuntimeError("the capture of a graph has become invalid")
    left.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert memory.is_exhausted(left)


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.",
        "no memory for images like those of x",
        "could not create a primitive",
        "could not create a primitive descriptor for a convolution forward propagation primitive",
        "std::bad_alloc",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_memory_that_does_not_suffice_is_known_by_what_libraries_say(words):
    assert memory.is_exhausted(RuntimeError(words))


def test_the_packages_operators_are_known_when_they_find_no_memory():
    """The real operator, in a process with 30 MB of memory more than it has, is asked for images of 67 MB."""
    if not backends.compiled(torch.device("cpu")):
        pytest.skip("the C++ extension was not built")
    # A process of its own: one that has run commands keeps freed memory, in which the images would find room.
    script = """
import resource
from pathlib import Path
import torch
import realuid_fast.ops
from realuid_fast.train import memory

x = torch.randn(64, 64, 64, 64).contiguous(memory_format=torch.channels_last)
weight = torch.randn(64, 64, 3, 3)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 30 * 2**20,) * 2)
try:
    torch.ops.realuid_fast.conv3x3.default(x, weight, None)
except RuntimeError as error:
    print("no memory for" in str(error) and memory.is_exhausted(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_clock_that_is_set_back_changes_nothing(run, monkeypatch):
    straight = run("straight")
    now = 2e9

    def backwards():
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(time, "time", backwards)
    jumped = run("jumped")
    assert end_of(straight) == end_of(jumped)
    rows = read_csv(jumped / "log.csv")
    assert all(0 < row["seconds"] < 60 and row["images_per_second"] > 0 for row in rows)


# -- the best so far


def test_the_best_network_is_kept(run, monkeypatch):
    folder = run("run")
    distances = {row["update"]: row["distance"] for row in read_csv(folder / "distances.csv")}
    best = min(distances, key=distances.get)
    saved = Checkpoints(folder / "checkpoints").load()["best"]
    assert saved["update"] == best
    assert saved["distance"] == distances[best]
    kept = load_file(str(folder / "best.safetensors"))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in saved["network"].items())
    assert teachers.load(folder / "best.safetensors").description.role == "student"


# -- the page


def test_every_fault_on_the_page_names_tests_that_exist():
    page = (ROOT / "docs/faults.md").read_text().partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split("|")[-2])
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / file).read_text(), (file, name)
