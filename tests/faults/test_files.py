"""Files of a run: half-made folders, names that are taken, logs and folders that vanish, data that go."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from realuid_fast import teachers
from realuid_fast.data.packing import pack
from realuid_fast.errors import UserError
from realuid_fast.files import finished_name, replacing
from realuid_fast.lock import held
from realuid_fast.networks import build
from realuid_fast.train import checkpoint
from realuid_fast.train import folder as run_folder
from realuid_fast.train.checkpoint import Checkpoints
from realuid_fast.train.logging import CsvLog

from .runs import end_of, make_other

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
            run_folder.open_folder(folder, resume=True)
        run_folder.open_folder(folder, overwrite=overwrite)
    assert (run("run") / "student.safetensors").is_file()
    assert not list(folder.rglob(".*"))


def test_a_run_that_is_killed_while_it_replaces_another_leaves_a_run(run, monkeypatch, tmp_path):
    """Beside a file of the user's, without which an empty folder would be left."""
    folder = run("run")
    (folder / "notes.txt").write_text("mine")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples/mine.png").write_text("mine")
    (folder / "samples/.update-00000004.png.0123456789abcdef.part").write_text("half of")
    run_folder.open_folder(folder, resume=True)
    assert [file.name for file in (folder / "samples").iterdir()] == ["mine.png"]
    run_folder.open_folder(folder, overwrite=True)
    assert {file.name for file in folder.iterdir()} == {"notes.txt", "samples", "config.yaml"}
    run_folder.open_folder(folder, overwrite=True)
    run_folder.open_folder(folder, resume=True)
    assert end_of(run("run", resume=True)) == end_of(run("straight"))
    assert (folder / "samples/mine.png").exists()


def test_what_is_being_written_has_a_name_of_its_own(tmp_path):
    mine, target = tmp_path / "mine", tmp_path / "file"
    mine.write_text("mine")
    (tmp_path / "file.part").symlink_to(mine)
    with replacing(target) as stream:
        (made,) = (file for file in tmp_path.iterdir() if finished_name(file.name) == "file")
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
        make_other(folder / name, str(tmp_path) if kind == "folder" and name in run_folder.RUN_FOLDERS else kind)
        before = sorted(folder.rglob("*"))
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"{name} is a link or not a f\w+, where a run would write: move it"):
                run_folder.open_folder(folder, **how)
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


def test_a_folder_that_cannot_be_written_is_refused():
    with (
        pytest.raises(UserError, match="the folder /proc/nothing/run cannot be written"),
        held(Path("/proc/nothing/run")),
    ):
        pass


@pytest.fixture
def vanish(tmp_path):
    """Take the folder of the run ``gone`` away in one step: rmtree fails where a thread writes into it meanwhile."""
    return lambda: (tmp_path / "gone").rename(tmp_path / "taken away")


def test_a_folder_that_vanishes_is_made_again(run, after, vanish, tmp_path):
    after(7, vanish)
    with pytest.raises(UserError, match=r"stopped after update \d+: .*; --resume goes on from update-"):
        run("gone")
    gone, straight = run("gone", resume=True), run("straight")
    assert end_of(gone)[0][0] == end_of(straight)[0][0]


def test_a_folder_that_vanishes_under_a_checkpoint_is_made_again(run, vanish, monkeypatch, tmp_path):
    """Between the beginning and the end of a write in the background, which alone notices."""
    begun = []
    write_verified = checkpoint._write_verified

    def vanishing(stream, content):
        if not begun:
            begun.append(stream)
            vanish()
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


def test_a_folder_that_vanishes_is_made_again_where_a_checkpoint_fails_too(run, after, vanish, monkeypatch, tmp_path):
    """The row of the log is the first to notice, while a write in the background has failed and nobody has looked."""
    gone, write_verified = threading.Event(), checkpoint._write_verified

    def late(stream, content):
        assert gone.wait(60)
        return write_verified(stream, content)

    def vanish_and_tell():
        vanish()
        gone.set()

    after(7, vanish_and_tell)
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


def test_an_image_that_changed_is_noticed(run, after, tmp_path):
    images = tmp_path / "images"
    given = image_teacher(tmp_path, {"name": "folder", "path": str(images), "size": 8, "heldout_every": 4})
    run("run", **given)
    before = (images / "a" / "0.png").read_bytes()
    (images / "a" / "0.png").write_bytes((images / "a" / "2.png").read_bytes())
    with pytest.raises(UserError, match="the run was started on other training samples than the data set has now"):
        run("run", resume=True, **given)
    (images / "a" / "0.png").write_bytes(before)
    run("run", resume=True, **given)


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
