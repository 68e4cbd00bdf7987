"""Packing: what is written is what the in-memory loaders read, whole or not at all, and traps are refused by name."""

import io
import os
import re
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from realuid_fast import cli, data
from realuid_fast.data import folders, images, packing, staging, stored
from realuid_fast.errors import UserError


def picture(width, height, seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twelve images in two classes."""
    for i in range(12):
        file = tmp_path / "images" / ("cats", "dogs")[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(20 + i, 24, i))
    return tmp_path / "images"


@pytest.fixture
def celeba(tmp_path):
    """An archive as the aligned images come, with six of them."""
    file = tmp_path / "img_align_celeba.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(1, 7):
            archive.writestr(f"img_align_celeba/{i:06}.jpg", picture(178, 218, i, "JPEG"))
    return file


def write_cifar(folder, records=4):
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        rows = generator.integers(0, 256, (records, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(records) % 10
        rows.tofile(folder / name)


def everything(rows):
    return rows[torch.arange(len(rows))]


def test_a_folder_is_packed_as_the_loader_reads_it(folder, tmp_path):
    manifest = packing.pack(folder, tmp_path / "packed", size=16, heldout_every=4, threads=2)
    found, expected = data.load({"name": "packed", "path": str(tmp_path / "packed")}), data.folder(folder, 16)
    assert manifest.classes == ("cats", "dogs")
    assert found.shape == (3, 16, 16)
    assert found.classes == 2
    assert (len(found), len(found.heldout)) == (9, 3)
    assert found.train_labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    again = data.folder(folder, 16, heldout_every=4)
    assert torch.equal(everything(found.train), again.train)
    assert torch.equal(everything(found.heldout), again.heldout)
    assert found.train_labels.dtype == torch.int64
    assert "to 16x16 (lanczos)" in found.preprocessing
    assert len(expected.train) == 11
    # Plain arrays, which anything can map.
    mapped = np.load(tmp_path / "packed" / "train_images.npy", mmap_mode="r")
    assert np.array_equal(mapped, again.train.numpy())
    assert stored.verify(tmp_path / "packed") == manifest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "packed"]


def test_cifar10_is_packed_as_it_is(tmp_path):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    write_cifar(inner)
    packing.pack(tmp_path, tmp_path / "packed")
    found, expected = data.packed(tmp_path / "packed"), data.cifar10(tmp_path)
    for split in ("train", "heldout"):
        assert torch.equal(everything(getattr(found, split)), getattr(expected, split))
        assert torch.equal(getattr(found, f"{split}_labels"), getattr(expected, f"{split}_labels"))
    assert stored.read_manifest(tmp_path / "packed" / "manifest.json").classes[3] == "cat"
    for settings in ({"size": 64}, {"limit": 3}, {"crop": 30}):
        with pytest.raises(UserError, match="CIFAR-10 is packed as it is"):
            packing.pack(tmp_path, tmp_path / "other", **settings)


def test_celeba_keeps_the_faces(celeba, tmp_path):
    manifest = packing.pack(celeba, tmp_path / "packed", heldout_every=3, filter="bilinear")
    assert manifest.shape == (3, 64, 64)
    assert manifest.classes == ()
    assert "central 140x140 pixels, to 64x64 (bilinear)" in manifest.preprocessing
    with zipfile.ZipFile(celeba) as archive, archive.open("img_align_celeba/000001.jpg") as stream:
        whole = Image.open(stream).convert("RGB")
    face = whole.crop((19, 39, 159, 179)).resize((64, 64), Image.Resampling.BILINEAR)
    found = data.packed(tmp_path / "packed")
    assert found.train_labels is None
    assert torch.equal(everything(found.train)[0], torch.from_numpy(np.array(face)).permute(2, 0, 1))
    wide = packing.pack(celeba, tmp_path / "wide", crop=178, size=32)
    assert wide.shape == (3, 32, 32)
    with pytest.raises(UserError, match=r"000001\.jpg cannot be read as an image \(178 x 218 pixels are less than"):
        packing.pack(celeba, tmp_path / "none", crop=200)


def test_the_published_partition_of_celeba(celeba, tmp_path):
    lines = tmp_path / "list_eval_partition.txt"
    lines.write_text("".join(f"{i:06}.jpg {number}\n" for i, number in enumerate((0, 0, 1, 0, 2, 2), 1)))
    packing.pack(celeba, tmp_path / "all", heldout_every=0, size=8)
    manifest = packing.pack(celeba, tmp_path / "packed", partition=lines, size=8)
    assert (manifest.train.count, manifest.heldout.count) == (3, 2)
    rows = everything(data.packed(tmp_path / "all").train)
    found = data.packed(tmp_path / "packed")
    assert torch.equal(everything(found.train), rows[[0, 1, 3]])
    assert torch.equal(everything(found.heldout), rows[[4, 5]])
    # Nothing held out: one file serves as both.
    assert torch.equal(everything(data.packed(tmp_path / "all").heldout), rows)
    assert len(list((tmp_path / "all").glob("*.npy"))) == 1
    lines.write_text("000001.jpg 0\n")
    with pytest.raises(UserError, match=r"does not name img_align_celeba/000002\.jpg"):
        packing.pack(celeba, tmp_path / "none", partition=lines)
    lines.write_text("000001.jpg\n")
    with pytest.raises(UserError, match="is no file of lines NAME NUMBER"):
        packing.pack(celeba, tmp_path / "none", partition=lines)


def test_a_partition_that_is_no_regular_file_is_not_opened(tmp_path):
    """Opening a FIFO would wait for somebody to write."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(picture(8, 8, 0))
    os.mkfifo(tmp_path / "lines.txt")
    with pytest.raises(UserError, match=r"partition: .*it is a FIFO and not a regular file"):
        packing.pack(tmp_path / "images", tmp_path / "packed", partition=tmp_path / "lines.txt")


def test_a_partition_names_paths_where_names_repeat(tmp_path):
    """Two classes of files with the same names, as cameras and cutting tools number them."""
    for i, name in enumerate(("cats/1.png", "cats/2.png", "dogs/1.png", "dogs/lone one.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(picture(8, 8, i))
    lines = tmp_path / "lines.txt"
    lines.write_text("cats/1.png 0\ncats/2.png 2\ndogs/1.png 2\nlone one.png 0\n")
    manifest = packing.pack(tmp_path / "images", tmp_path / "packed", size=8, partition=lines)
    assert (manifest.train.count, manifest.heldout.count) == (2, 2)
    assert data.packed(tmp_path / "packed").train_labels.tolist() == [0, 1]
    assert data.packed(tmp_path / "packed").heldout_labels.tolist() == [0, 1]
    lines.write_text("1.png 0\n2.png 2\nlone one.png 0\n")
    with pytest.raises(UserError, match=r"names 1\.png, which 2 images are called: give their paths inside .*cats/1"):
        packing.pack(tmp_path / "images", tmp_path / "none", partition=lines)
    lines.write_text("cats/1.png 0\ncats/1.png 2\n")
    with pytest.raises(UserError, match=r"gives cats/1\.png two numbers"):
        packing.pack(tmp_path / "images", tmp_path / "none", partition=lines)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("a/1.png", "b/2.png"), ("a", "b")),
        (("all/train/a/1.png", "all/train/b/x/2.png"), ("a", "b")),
        (("a/1.png", "2.png"), ()),
        (("a/1.png", "a/2.png"), ()),
        (("1.png", "2.png"), ()),
    ],
)
def test_folders_that_are_classes(names, classes):
    found = folders.layout(names)
    assert (found.classes, found.numbers, found.splits) == (classes, list(range(len(classes))), [])


def test_what_is_there_is_not_touched_unasked(folder, tmp_path):
    out = tmp_path / "packed"
    packing.pack(folder, out, size=8)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match="is not empty: give --overwrite"):
        packing.pack(folder, out, size=16)
    (folder / "cats" / "99.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cats/99\.png cannot be read as an image"):
        packing.pack(folder, out, size=16, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (folder / "cats" / "99.png").unlink()
    packing.pack(folder, out, size=16, overwrite=True)
    assert data.packed(out).shape == (3, 16, 16)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "packed"]
    with pytest.raises(UserError, match="is not empty: give another folder"):
        packing.pack(folder, folder, overwrite=True)


def test_a_packing_that_was_killed_starts_afresh(folder, tmp_path):
    """Killed while it writes, it leaves no data set; one that runs keeps others out."""
    code = f"""
import time
from realuid_fast.data import images, packing
def slow(*given):
    print("decoding", flush=True)
    time.sleep(60)
images.square = slow
packing.pack({str(folder)!r}, {str(tmp_path / "packed")!r}, size=8)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"decoding\n"
        with pytest.raises(UserError, match="is being written by another process"):
            packing.pack(folder, tmp_path / "packed", size=8)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "packed").exists()
    [left] = tmp_path.glob(f"{staging.PREFIX}*")
    assert (left / "new" / "train_images.npy").exists()
    packing.pack(folder, tmp_path / "packed", size=8)
    stored.verify(tmp_path / "packed")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "packed"]


USERS = ("packed.part", "packed.old", f"{staging.PREFIX}mine")


def test_what_a_user_has_beside_the_set_stays(folder, tmp_path):
    """Folders of names that look like working folders, links among them, and strangers' files in what is replaced."""
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "train_images.npy").write_text("mine")
    out = tmp_path / "packed"
    for name in USERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
        (tmp_path / name / "train_images.npy").write_text("mine")
    (tmp_path / f"{staging.PREFIX}link").symlink_to(keep)
    for _ in range(2):
        packing.pack(folder, out, size=8, overwrite=True)
    for place in (*(tmp_path / name for name in USERS), keep):
        assert (place / "train_images.npy").read_text() == "mine"
    assert (tmp_path / f"{staging.PREFIX}link").is_symlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is no part of a packed set: move it elsewhere"):
        packing.pack(folder, out, size=8, overwrite=True)
    stored.verify(out)
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "manifest.json").write_text('{"name": "my web page"}')
    with pytest.raises(UserError, match="is not empty: give another folder, it holds no packed set"):
        packing.pack(folder, tmp_path / "manifest", size=8, overwrite=True)
    (tmp_path / "link").symlink_to(keep)
    with pytest.raises(UserError, match="is a link: give the folder that it leads to"):
        packing.pack(folder, tmp_path / "link", size=8, overwrite=True)
    assert (keep / "train_images.npy").read_text() == "mine"


def test_working_folders_of_killed_packings_are_known_by_their_marker(folder, tmp_path):
    left = tmp_path / f"{staging.PREFIX}abc"
    (left / "new").mkdir(parents=True)
    (left / staging.MARKER).write_text("packed")
    (left / "new" / "train_images.npy").write_text("half")
    (left / "new" / "notes.txt").write_text("mine")
    # A folder of another set beside this one, whose packing may be going on.
    other = tmp_path / f"{staging.PREFIX}def"
    other.mkdir()
    (other / staging.MARKER).write_text("other")
    with pytest.warns(UserWarning, match="holds files that are not this program's"):
        packing.pack(folder, tmp_path / "packed", size=8)
    assert not (left / "new" / "train_images.npy").exists()
    assert (left / "new" / "notes.txt").read_text() == "mine"
    assert (other / staging.MARKER).exists()


KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from realuid_fast.data import packing, staging, stored
source, out, exchange = sys.argv[1:]
if exchange == "no":
    staging._exchange = lambda one, other: False
left = -1
def watch(event, given):
    global left
    written = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
    if left >= 0 and (written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
packing.pack(source, out, size=8)
seen, step, ended = set(), 0, False
while not ended:
    before = stored.verify(Path(out)).shape[1]
    child = os.fork()
    if not child:
        left = step
        packing.pack(source, out, size=24 - before, overwrite=True)
        os._exit(0)
    ended = os.waitpid(child, 0)[1] == 0
    step += 1
    if not Path(out).exists():
        seen.add("aside")
        try:
            stored.verify(Path(out))
        except Exception as error:
            assert "the next pack to" in str(error), error
        staging.recover(Path(out), packing.FILES)
    seen.add("old" if stored.verify(Path(out)).shape[1] == before else "new")
staging.recover(Path(out), packing.FILES)
# A folder whose marker was not written yet, or is gone already, is left: it is empty.
left = [f for f in Path(out).parent.iterdir() if any(each.is_file() and each.stat().st_size for each in f.rglob("*"))]
print(step, *sorted(seen), *sorted(f.name for f in left))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("exchange", ["yes", "no"])
def test_a_packing_killed_at_any_step_leaves_the_old_or_the_new_set(folder, tmp_path, exchange):
    """At every file that is opened, made, renamed or removed, with and without a file system that exchanges folders."""
    words = [sys.executable, "-c", KILLED_AT_EVERY_STEP, folder, tmp_path / "packed", exchange]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    steps, *found = ended.stdout.split()
    assert int(steps) > 20
    # Without an exchange there is a step between two renames, at which the set is known to have been set aside.
    assert found == [*(["aside"] if exchange == "no" else []), "new", "old", "images", "packed"]


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, raw):
            raise OSError(28, "No space left on device")

    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *given: Full(self, "x") if mode == "xb" else opened(self, mode, *given)
    )
    with pytest.raises(UserError, match=r"train_images\.npy cannot be written: No space left"):
        packing.pack(folder, tmp_path / "packed", size=8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images"]


def archive(tmp_path, name, content, **attributes):
    file = tmp_path / "images.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        member = zipfile.ZipInfo(name)
        member.compress_type = zipfile.ZIP_DEFLATED
        for key, value in attributes.items():
            setattr(member, key, value)
        made.writestr(member, content)
        made.writestr("b.png", picture(8, 8, 0))
    return file


@pytest.mark.parametrize("name", ["../../etc/a.png", "/etc/a.png", "x/../../a.png", "C:\\a.png", "x\\..\\a.png"])
def test_archives_that_point_out_of_themselves(name, tmp_path):
    with pytest.raises(UserError, match="points out of the archive"):
        packing.pack(archive(tmp_path, name, picture(8, 8, 1)), tmp_path / "packed", size=8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_archives_that_are_traps(tmp_path, monkeypatch):
    bomb = archive(tmp_path, "bomb.png", b"\0" * (packing.MEMBER_BYTES + 1))
    assert bomb.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"images\.zip: bomb\.png unpacks to more than 64 MiB"):
        packing.pack(bomb, tmp_path / "packed", size=8)
    # A header that lies about the size: what comes out is counted.
    members = packing._members

    def lied(source, opened):
        for member in opened.infolist():
            member.file_size = min(member.file_size, 100)
        found = members(source, opened)
        for member in found.values():
            member.file_size = packing.MEMBER_BYTES + 1
        return found

    monkeypatch.setattr(packing, "_members", lied)
    with pytest.raises(UserError, match=r"bomb\.png unpacks to more than 64 MiB"):
        packing.pack(bomb, tmp_path / "packed", size=8)
    monkeypatch.undo()
    link = archive(tmp_path, "a.png", b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16)
    with pytest.raises(UserError, match=r"a\.png is a link"):
        packing.pack(link, tmp_path / "packed", size=8)
    wide = io.BytesIO()
    Image.new("1", (2**14, 2**13)).save(wide, "PNG")
    with pytest.raises(UserError, match=r"wide\.png cannot be read as an image \(16384 x 8192 pixels are more"):
        packing.pack(archive(tmp_path, "wide.png", wide.getvalue()), tmp_path / "packed", size=8)
    script = archive(tmp_path, "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image"):
        packing.pack(script, tmp_path / "packed", size=8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images.zip"]


def test_damaged_archives(tmp_path):
    whole = archive(tmp_path, "a.png", picture(64, 64, 0))
    raw = bytearray(whole.read_bytes())
    raw[200] ^= 1
    whole.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.png cannot be unpacked"):
        packing.pack(whole, tmp_path / "packed", size=8)
    whole.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="cannot be read as a zip archive"):
        packing.pack(whole, tmp_path / "packed", size=8)
    with zipfile.ZipFile(whole, "w") as made:
        made.writestr("notes.txt", "nothing")
    with pytest.raises(UserError, match="holds no images"):
        packing.pack(whole, tmp_path / "packed")
    raw = bytearray(archive(tmp_path, "a.png", picture(8, 8, 0)).read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 8] |= 1
    whole.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.png is encrypted"):
        packing.pack(whole, tmp_path / "packed")


def test_errors_name_the_argument(folder, tmp_path):
    for settings, sentence in (
        ({"kind": "video"}, "kind must be one of images, celeba, idx, cifar10; got 'video'"),
        ({"size": 0}, "size and crop must be positive"),
        ({"crop": 0}, "size and crop must be positive"),
        ({"channels": 2}, "channels 1 or 3"),
        ({"filter": "nearest"}, "filter must be one of lanczos"),
        ({"heldout_every": 1}, "heldout_every must be 0"),
        ({"limit": 0}, "threads and limit must be at least 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            packing.pack(folder, tmp_path / "packed", **settings)
    with pytest.raises(UserError, match="there is no folder or archive"):
        packing.pack(tmp_path / "none", tmp_path / "packed")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: give the name of a folder"):
        packing.pack(folder, tmp_path / "file")


def test_the_commands_errors_name_options_and_not_what_they_became(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "packed"

    def refused(*words, code=2):
        capsys.readouterr()
        assert cli.main([*map(str, words), "--out", str(out), "--size", "8"]) == code
        return capsys.readouterr().err

    assert "error: --heldout-every must be 0" in refused("pack", folder, "--heldout-every", 1)
    (tmp_path / "list.txt").write_text("nobody.png 0\n")
    assert "error: --partition: " in refused("pack", folder, "--partition", tmp_path / "list.txt")
    (tmp_path / "empty").mkdir()
    assert "error: SOURCE: the folder" in refused("pack", tmp_path / "empty")
    (folder / "cats" / "00.png").write_bytes(b"")
    (folder / "cats" / "02.png").write_bytes(b"text")
    assert "cats/00.png cannot be read as an image (it is empty)" in refused("pack", folder, "--skip-damaged", code=0)
    (folder / "cats" / "00.png").unlink()
    assert "cats/02.png cannot be read as an image (it is no image)" in refused("pack", folder, "--overwrite")

    def denied(file, *_, **__):
        raise PermissionError(13, "Permission denied", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "mkdir", lambda *given: denied(*given))
        said = refused("pack", folder, "--overwrite")
    assert f"error: {out} cannot be read or written: Permission denied" in said
    monkeypatch.setattr(packing, "_kind", denied)
    assert f"error: {folder} cannot be read: Permission denied" in refused("pack", folder)


def test_the_bar_fills_no_log_file(folder, tmp_path, monkeypatch, capsys):
    square = data.square

    def slow(*given):
        time.sleep(0.15)
        return square(*given)

    monkeypatch.setattr(images, "square", slow)
    assert cli.main(["pack", str(folder), "--out", str(tmp_path / "packed"), "--size", "8"]) == 0
    said = capsys.readouterr().err
    assert "12/12" in said
    assert len(re.split(r"[\r\n]+", said.strip())) <= 3


def test_the_command(folder, tmp_path, capsys):
    out = str(tmp_path / "packed")
    assert cli.main(["pack", str(folder), "--out", out, "--size", "8", "--no-labels", "--limit", "10"]) == 0
    assert "9 images 3x8x8 and 1 held out; use it with --set data.name=packed" in capsys.readouterr().out
    assert cli.main(["pack", "--verify", "--out", out]) == 0
    assert "every checksum is right" in capsys.readouterr().out
    with (tmp_path / "packed" / "train_images.npy").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    assert cli.main(["pack", "--verify", "--out", out]) == 2
    assert "train_images.npy is damaged" in capsys.readouterr().err
    assert cli.main(["pack", "--out", out]) == 2
    assert "give either a source to pack or --verify" in capsys.readouterr().err
