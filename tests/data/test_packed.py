"""Images on disk: rows as they were written, memory that does not grow with the set, damage in a sentence."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from realuid_fast import data
from realuid_fast.data import stored
from realuid_fast.data.stored import File, Manifest, Split, Stored
from realuid_fast.errors import UserError


def write(folder, train=12, heldout=4, shape=(3, 8, 8), classes=("a", "b", "c"), seed=0):
    """A packed set of random images, with the shortest code that makes one; its training images."""
    import hashlib

    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)

    def entry(name, values):
        np.save(folder / name, values)
        raw = (folder / name).read_bytes()
        return File(name, len(raw), hashlib.sha256(raw).hexdigest())

    splits, images = [], []
    for split, count in (("train", train), ("heldout", heldout)):
        images.append(generator.integers(0, 256, (count, *shape), dtype=np.uint8))
        named = None
        if classes:
            named = entry(f"{split}_labels.npy", (np.arange(count) % len(classes)).astype(np.int32))
        splits.append(Split(count, entry(f"{split}_images.npy", images[-1]), named))
    manifest = Manifest(shape, tuple(classes), "as drawn", "numbers", *splits)
    (folder / "manifest.json").write_text(manifest.text())
    return torch.from_numpy(images[0])


def test_rows_are_those_of_the_array(tmp_path):
    images = write(tmp_path)
    rows = data.packed(tmp_path).train
    index = torch.tensor([3, 0, 11, 3])
    assert torch.equal(rows[index], images[index])
    assert rows[index[:0]].shape == (0, 3, 8, 8)
    assert (len(rows), rows.shape, rows.dtype) == (12, (12, 3, 8, 8), torch.uint8)
    for bad in (12, -1):
        with pytest.raises(IndexError, match="of 12"):
            rows[torch.tensor([0, bad])]


def test_the_data_set_is_the_one_in_memory(tmp_path):
    images = write(tmp_path)
    found = data.load({"name": "packed", "path": str(tmp_path)})
    memory = data.Dataset("numbers", images, images[:4], found.train_labels, found.heldout_labels)
    assert torch.equal(found.pixels(), memory.pixels())
    assert torch.equal(found.pixels("train", 5), memory.pixels("train", 5))
    assert torch.equal(memory.pixels("train", 5), memory.pixels()[[0, 2, 4, 7, 9]])
    (x, y), (a, b) = (each.sample(6, torch.Generator().manual_seed(0)) for each in (found, memory))
    assert torch.equal(x, a)
    assert torch.equal(y, b)
    streams = [each.batches(5, torch.Generator().manual_seed(0)) for each in (found, memory)]
    for _ in range(3):
        assert torch.equal(next(streams[0])[0], next(streams[1])[0])
    assert found.preprocessing == "as drawn, byte / 127.5 - 1"
    assert (
        found.fingerprint("train") == json.loads((tmp_path / "manifest.json").read_text())["train"]["images"]["sha256"]
    )
    assert memory.fingerprint("train") != memory.fingerprint("heldout")


def test_a_set_larger_than_memory_streams(tmp_path):
    """Twice this machine's memory, of which the file system keeps nothing: it is zeros but for one row."""
    shape = (3, 256, 256)
    count = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (3 * 256 * 256)
    write(tmp_path, 1, 2, shape, ())
    with (tmp_path / "train_images.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
        start = stream.tell()
        try:
            stream.truncate(start + count * 3 * 256 * 256)
        except OSError as error:
            pytest.skip(f"no sparse file of {count * 3 * 256 * 256 >> 30} GiB can be made here: {error.strerror}")
        stream.seek(start + (count - 1) * 3 * 256 * 256)
        stream.write(bytes([255]) * 3 * 256 * 256)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["train"]["count"] = count
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    code = f"""
import resource, torch
from realuid_fast import data
from realuid_fast.train.batches import Batches
from realuid_fast.evaluate.measure import Measure
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
dataset = data.packed({str(tmp_path)!r})
batches = Batches(dataset, 16, 0, torch.device("cpu"))
before = peak()
for _ in range(20):
    x, _ = batches.next()
    assert x.shape == (16, 3, 256, 256) and (x == -1).all()
print(len(dataset), float(dataset.sample(1)[0].max()), dataset.train[torch.tensor([len(dataset) - 1])].min().item())
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert out[:3] == [str(count), "-1.0", "255"]
    # Batches of 3 MB as bytes and 13 as floats.
    assert int(out[3]) < 150


def test_a_file_cut_short_is_an_error_and_a_deleted_one_none(tmp_path):
    images = write(tmp_path)
    rows = data.packed(tmp_path).train
    file = tmp_path / "train_images.npy"
    file.unlink()
    assert torch.equal(rows[torch.tensor([11])], images[[11]])
    with pytest.raises(UserError, match=r"there is no file .*train_images\.npy"):
        data.packed(tmp_path)
    write(tmp_path)
    rows = data.packed(tmp_path).train
    os.truncate(file, file.stat().st_size - 193)
    assert torch.equal(rows[torch.tensor([9])], images[[9]])
    for row in (10, 11):
        with pytest.raises(OSError, match=f"was cut short: row {row} of 12 is not there") as error:
            rows[torch.tensor([0, row])]
        assert error.value.filename == str(file)
    with pytest.raises(UserError, match=r"train_images\.npy is cut short: it has 2239 bytes of 2432"):
        data.packed(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"kind": "video"}, "is no manifest of a packed data set"),
        ({"shape": [3, 8]}, "'shape' must be channels, height and width"),
        ({"shape": [3, 8, 8.0]}, "'shape' must be a whole number"),
        ({"shape": [3, True, 8]}, "'shape' must be a whole number"),
        ({"shape": [3, 2**30, 2**30]}, "'shape' must be smaller"),
        ({"shape": [1, 8, 8]}, "is not the array of the manifest, 12x1x8x8 of type uint8"),
        ({"classes": "abc"}, "'classes' must be a list of names"),
        ({"classes": ["a", "b"]}, "its labels are not all among the 2 classes"),
        ({"classes": [1]}, "'classes' must be text"),
        ({"preprocessing": None}, "'preprocessing' must be text"),
        ({"train": None}, "'train' must be a split's count"),
        ({"train.count": 0}, "'train.count' must be a whole number of at least 1"),
        ({"train.count": 11}, "is not the array of the manifest, 11x3x8x8"),
        ({"train.images": "train_images.npy"}, "'train.images' must be a file's name"),
        ({"train.images.name": "../train_images.npy"}, "'train.images.name' must be the name of a .npy file beside"),
        ({"train.images.name": "other.npy"}, "there is no file"),
        ({"train.images.sha256": "0" * 63}, "'train.images.sha256' must be 64 hexadecimal digits"),
        ({"train.images.size": -1}, "'train.images.size' must be a whole number"),
        ({"train.labels.sha256": "0" * 64}, r"train_labels\.npy is damaged: its checksum"),
        ({"train.labels.name": "none.npy"}, r"none\.npy cannot be read"),
        ({"train.labels.name": "train_images.npy"}, "is not the array of the manifest, 12 of type int32"),
    ],
)
def test_damage_to_the_manifest_is_named(tmp_path, change, sentence):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for key, value in change.items():
        *path, last = key.split(".")
        place = manifest
        for part in path:
            place = place[part]
        place[last] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=sentence):
        data.packed(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b"9" * 5000, b"{" + b" " * (1 << 24) + b"}"])
def test_what_is_no_manifest(tmp_path, content):
    with pytest.raises(UserError, match="there is no packed data set"):
        data.packed(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="is no manifest of a packed data set"):
        data.packed(tmp_path)


def test_a_manifest_is_what_was_written(tmp_path):
    write(tmp_path)
    manifest = stored.read_manifest(tmp_path / "manifest.json")
    assert stored.verify(tmp_path) == manifest
    (tmp_path / "again.json").write_text(manifest.text())
    assert asdict(stored.read_manifest(tmp_path / "again.json")) == asdict(manifest)


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "train_images.npy", np.array([print, 1], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is not the array of the manifest"):
        data.packed(tmp_path)
    np.save(tmp_path / "train_images.npy", np.zeros((12, 3, 8, 8), np.uint8).T.copy().T)
    with pytest.raises(UserError, match="is not the array of the manifest"):
        data.packed(tmp_path)


def test_descriptors_are_closed(tmp_path):
    write(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Stored(tmp_path / "train_images.npy", (12, 3, 8, 8))
    assert len(os.listdir("/proc/self/fd")) == before


def test_classes_leave_the_other_labels_out(tmp_path):
    whole, kept = data.load("digits"), data.load({"name": "digits", "classes": [3, 0]})
    for split in ("train", "heldout"):
        labels = getattr(whole, f"{split}_labels")
        rows = (labels == 0) | (labels == 3)
        assert torch.equal(getattr(kept, split), getattr(whole, split)[rows])
        assert torch.equal(getattr(kept, f"{split}_labels"), labels[rows])
    assert kept.config == {"name": "digits", "classes": [3, 0]}
    assert kept.preprocessing.endswith("; classes 0, 3 alone")
    # A pair stays a pair.
    pairs, of = data.load({"name": "digit_pairs", "classes": [7]}), data.load("digit_pairs")
    assert torch.equal(pairs.train_endpoints, of.train_endpoints[of.train_labels == 7])
    write(tmp_path)
    for config, sentence in (
        ({"name": "digits", "classes": []}, r"data.classes must be different labels of 'digits', got \[\]"),
        ({"name": "digits", "classes": [1, 1]}, "data.classes must be different labels"),
        ({"name": "digits", "classes": [10]}, "data.classes must be different labels"),
        ({"name": "digits", "classes": 3}, "data.classes must be different labels"),
        ({"name": "packed", "path": str(tmp_path), "classes": [0]}, "data.classes is for sets held in memory"),
    ):
        with pytest.raises(UserError, match=sentence):
            data.load(config)
    with pytest.raises(UserError, match=r"data\.classes is for data with labels, 'unlabelled' has none"):
        data.Dataset("unlabelled", whole.train, whole.heldout).keep([0])


def test_flip_and_balance_need_what_they_work_on(tmp_path):
    write(tmp_path, classes=())
    for config, sentence in (
        ({"name": "packed", "path": str(tmp_path), "balance": True}, "data.balance is for data with labels"),
        ({"name": "packed", "path": str(tmp_path), "flip": 1}, "data.flip must be true or false, got 1"),
        ({"name": "moons", "flip": True}, "data.flip is for images"),
        ({"name": "digit_pairs", "balance": True}, "are for data without endpoints"),
    ):
        with pytest.raises(UserError, match=sentence):
            data.load(config)
    found = data.load({"name": "digits", "flip": True, "balance": False})
    assert (found.flip, found.balance) == (True, False)
    assert found.config == {"name": "digits", "flip": True, "balance": False}
