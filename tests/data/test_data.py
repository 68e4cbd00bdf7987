"""Data sets: splits and scaling, deterministic draws, image folders, CIFAR-10 files, and errors in a
sentence.
"""

import gzip
import itertools
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from realuid_fast import data
from realuid_fast.data import folders, packing, stored
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure


def test_digits_split_covers_the_source_once():
    from sklearn.datasets import load_digits

    digits, source = data.load("digits"), load_digits()
    assert digits.train.shape == (1352, 1, 8, 8)
    assert digits.heldout.shape == (445, 1, 8, 8)
    assert digits.shape == (1, 8, 8)
    assert digits.classes == 10
    assert len(digits) == 1352
    everything = torch.cat([digits.train, digits.heldout])
    assert everything.min() == -1
    assert everything.max() == 1
    back = ((everything + 1) * 8).flatten(1).numpy()
    assert sorted(map(tuple, back)) == sorted(map(tuple, source.images.reshape(-1, 64)))


def test_digits_split_is_stratified():
    digits = data.load("digits")
    train, heldout = digits.train_labels.bincount(), digits.heldout_labels.bincount()
    assert (train + heldout).sum() == 1797
    assert ((heldout / (train + heldout)) - 0.25).abs().max() < 0.01


@pytest.mark.parametrize("name", data.POINTS)
def test_mixtures_repeat_and_differ_by_seed(name):
    one, two = (
        data.load({"name": name, "n": 500, "n_heldout": 100}),
        data.load({"name": name, "n": 500, "n_heldout": 100}),
    )
    other = data.load({"name": name, "n": 500, "n_heldout": 100, "seed": 1})
    assert one.train.shape == (500, 2)
    assert one.heldout.shape == (100, 2)
    assert torch.equal(one.train, two.train)
    assert not torch.equal(one.train, other.train)
    assert not torch.equal(one.train[:100], one.heldout)
    assert one.config == {"name": name, "n": 500, "n_heldout": 100}


def test_eight_gaussians_lie_on_their_circle():
    dataset = data.eight_gaussians(n=8000)
    for label in range(8):
        points = dataset.train[dataset.train_labels == label]
        angle = torch.tensor(label * torch.pi / 4)
        assert (points.mean(0) - 2 * torch.stack([angle.cos(), angle.sin()])).abs().max() < 0.02
        assert (points.std(0) - 0.1).abs().max() < 0.01


def test_moons_lie_on_two_half_circles():
    dataset = data.moons(n=2000, scale=0.0)
    for label, centre, side in ((0, (-0.5, -0.25), 1), (1, (0.5, 0.25), -1)):
        relative = dataset.train[dataset.train_labels == label] - torch.tensor(centre)
        torch.testing.assert_close(relative.norm(dim=1), torch.ones(len(relative)))
        assert (relative[:, 1] * side >= -1e-6).all()


def test_checkerboard_fills_dark_squares_only():
    points = data.checkerboard(n=4000).train
    squares = ((points + 2) / 1.0).floor()
    assert (squares.sum(1) % 2 == 0).all()
    assert len({tuple(square) for square in squares.int().tolist()}) == 8


def test_samples_repeat_with_the_generator_and_have_no_doubles():
    digits = data.load("digits")
    one, labels = digits.sample(64, torch.Generator().manual_seed(3))
    two, _ = digits.sample(64, torch.Generator().manual_seed(3))
    three, _ = digits.sample(64, torch.Generator().manual_seed(4))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert labels.shape == (64,)
    whole, _ = digits.sample(len(digits))
    assert torch.equal(whole.flatten(1).sum(1).sort().values, digits.train.flatten(1).sum(1).sort().values)


def test_batches_pass_over_the_data_before_repeating():
    dataset = data.Dataset("numbers", torch.arange(10.0)[:, None], torch.zeros(1, 1))
    stream = dataset.batches(3, torch.Generator().manual_seed(0))
    one_pass = torch.cat([x for x, _ in itertools.islice(stream, 3)]).flatten()
    assert len(one_pass.unique()) == 9
    again = dataset.batches(3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([x for x, _ in itertools.islice(again, 3)]).flatten(), one_pass)
    assert not torch.equal(torch.cat([x for x, _ in itertools.islice(stream, 3)]).flatten(), one_pass)


def test_bytes_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_bytes(data.to_float(values)), values)
    assert data.to_float(values).min() == -1
    assert data.to_float(values).max() == 1


def write_image(path, width, height, colour):
    Image.new("RGB", (width, height), colour).save(path)


def test_folder_reads_images_of_any_size(tmp_path):
    (tmp_path / "sub").mkdir()
    write_image(tmp_path / "a.png", 40, 20, (255, 0, 0))
    write_image(tmp_path / "sub" / "b.jpg", 7, 30, (0, 255, 0))
    write_image(tmp_path / "c.bmp", 16, 16, (0, 0, 255))
    (tmp_path / "notes.txt").write_text("no image")
    dataset = data.load({"name": "folder", "path": str(tmp_path), "size": 16, "heldout_every": 3})
    assert dataset.train.shape == (2, 3, 16, 16)
    assert dataset.heldout.shape == (1, 3, 16, 16)
    assert dataset.train.dtype == torch.uint8
    red, _ = dataset.pixels()[:1], dataset
    assert red[:, 0].min() == 1
    assert red[:, 1:].max() == -1


def test_folder_keeps_the_centre(tmp_path):
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = data.folder(tmp_path, size=8, channels=1)
    assert dataset.train.shape == (1, 1, 8, 8)
    assert dataset.train.min() == 255
    assert torch.equal(dataset.heldout, dataset.train)


def write_cifar(folder, records=4, label=None):
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        rows = generator.integers(0, 256, (records, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(records) % 10 if label is None else label
        rows.tofile(folder / name)


@pytest.mark.parametrize("nested", [False, True])
def test_cifar_reads_channels_first(tmp_path, nested):
    folder = tmp_path / "cifar-10-batches-bin" if nested else tmp_path
    write_cifar(folder)
    dataset = data.load({"name": "cifar10", "path": str(tmp_path)})
    assert dataset.train.shape == (20, 3, 32, 32)
    assert dataset.heldout.shape == (4, 3, 32, 32)
    raw = np.fromfile(folder / "data_batch_1.bin", dtype=np.uint8).reshape(4, 3073)
    assert dataset.train[2, 1, 3, 5] == raw[2, 1 + 1024 + 3 * 32 + 5]
    assert dataset.train_labels[:4].tolist() == [0, 1, 2, 3]


def test_errors_name_the_argument(tmp_path):
    digits = data.load("digits")
    with pytest.raises(UserError, match="batch 1353 is larger than data set 'digits', which has 1352"):
        digits.sample(1353)
    with pytest.raises(UserError, match="batch 1353"):
        digits.batches(1353)
    with pytest.raises(UserError, match="batch must be at least 1"):
        digits.sample(0)
    with pytest.raises(UserError, match="split must be"):
        digits.pixels("test")
    with pytest.raises(UserError, match="name must be one of digits"):
        data.load("mnist")
    with pytest.raises(UserError, match="argument it cannot use"):
        data.load({"name": "digits", "size": 3})
    for name in ("folder", "idx", "cifar10", "packed"):
        with pytest.raises(UserError, match=f"data.path must be given with data.name={name}"):
            data.load(name)
    with pytest.raises(UserError, match="there is no folder"):
        data.load({"name": "folder", "path": str(tmp_path / "none")})
    with pytest.raises(UserError, match="holds no images"):
        data.load({"name": "folder", "path": str(tmp_path)})
    with pytest.raises(UserError, match="size must be positive"):
        data.folder(tmp_path, size=0)
    with pytest.raises(UserError, match="heldout_every"):
        data.folder(tmp_path, heldout_every=1)
    with pytest.raises(UserError, match="cells"):
        data.checkerboard(cells=1)
    with pytest.raises(UserError, match="n and n_heldout"):
        data.moons(n=0)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        data.folder(tmp_path)


def test_cifar_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        data.cifar10(tmp_path / "none")
    with pytest.raises(UserError, match="holds no CIFAR-10"):
        data.cifar10(tmp_path)
    write_cifar(tmp_path)
    with (tmp_path / "data_batch_3.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"data_batch_3\.bin is truncated"):
        data.cifar10(tmp_path)
    write_cifar(tmp_path, label=17)
    with pytest.raises(UserError, match="has a label 17"):
        data.cifar10(tmp_path)


def test_paired_digits():
    pairs, plain = data.load("digit_pairs"), data.digits()
    assert pairs.paired
    assert torch.equal(pairs.train, plain.train)
    assert torch.equal(pairs.heldout_labels, plain.heldout_labels)
    coarse = pairs.heldout_endpoints
    assert coarse.shape == plain.heldout.shape
    assert torch.equal(coarse[:, :, :4, 4:], plain.heldout[:, :, :4, 4:].mean((2, 3), True).expand(-1, -1, 4, 4))
    masked = data.load({"name": "digit_pairs", "corruption": "mask", "amount": 3})
    assert torch.equal(masked.train_endpoints[:, :, :5], plain.train[:, :, :5])
    assert (masked.train_endpoints[:, :, 5:] == -1).all()
    noisy, again = (data.load({"name": "digit_pairs", "corruption": "noise", "amount": 0.5}) for _ in range(2))
    assert torch.equal(noisy.train_endpoints, again.train_endpoints)
    assert float((noisy.train_endpoints - plain.train).std()) == pytest.approx(0.5, rel=0.02)
    for settings, sentence in (
        ({"corruption": "blur"}, "corruption must be downsample, mask or noise, got 'blur'"),
        ({"amount": 3}, "amount must be one of 2, 4, 8 to downsample, got 3"),
        ({"corruption": "noise", "amount": -1.0}, "amount must be positive to noise"),
    ):
        with pytest.raises(UserError, match=sentence):
            data.load({"name": "digit_pairs", **settings})


def test_points_from_one_set_to_another():
    moons = data.load({"name": "transport", "n": 500})
    assert moons.train_endpoints.shape == moons.train.shape
    assert not moons.paired
    # Drawn apart: no endpoint knows its sample's class.
    centred = moons.train_endpoints - moons.train_endpoints.mean(0)
    product = centred.T @ (moons.train - moons.train.mean(0)) / 500
    assert float(product.abs().max()) < 5 * 0.9 * 1.5 / 500**0.5
    with pytest.raises(UserError, match="source must be one of eight_gaussians, moons, checkerboard"):
        data.load({"name": "transport", "source": "digits"})


# Images as strangers' folders hold them: how each mode is saved, and the grey value or colour that it then has.
def save_grey_16(file):
    Image.fromarray(np.full((6, 6), 257 * 100, np.uint16)).save(file)


def save_transparent(file):
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[:, :, 0], pixels[:, :, 3] = 200, 0
    Image.fromarray(pixels).save(file)


def save_half_transparent(file):
    Image.fromarray(np.full((6, 6, 2), (0, 128), np.uint8), "LA").save(file)


def save_palette(file):
    picture = Image.new("P", (6, 6), 1)
    picture.putpalette([9, 9, 9, 10, 200, 30])
    picture.save(file, **({"transparency": 1} if "hidden" in file.name else {}))


def save_mode(mode, colour):
    return lambda file: Image.new(mode, (6, 6), colour).save(file)


def save_grey_12(file):
    """Twelve bits a pixel, 2,048 of 4,095, as microscopes write TIFF."""
    rows = b"\x80\x08\x00" * 3 * 6
    entries = [(256, 6), (257, 6), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 6), (279, len(rows))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + b"\0\0\0\0"
    file.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + directory)


def save_pgm_16(file):
    file.write_bytes(b"P5 6 6 1000\n" + struct.pack(">36H", *[500] * 36))


@pytest.mark.parametrize(
    ("name", "save", "colour"),
    [
        ("grey16.png", save_grey_16, (100, 100, 100)),
        ("grey16.tif", save_grey_16, (100, 100, 100)),
        ("grey12.tif", save_grey_12, (128, 128, 128)),
        ("grey16.pgm", save_pgm_16, (128, 128, 128)),
        ("transparent.png", save_transparent, (255, 255, 255)),
        ("half.png", save_half_transparent, (127, 127, 127)),
        ("palette.png", save_palette, (10, 200, 30)),
        ("hidden.png", save_palette, (255, 255, 255)),
        ("hidden.gif", save_palette, (255, 255, 255)),
        ("cmyk.tif", save_mode("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        ("bits.png", save_mode("1", 1), (255, 255, 255)),
        ("grey.bmp", save_mode("L", 77), (77, 77, 77)),
        ("opaque.webp", save_mode("RGBA", (255, 255, 255, 255)), (255, 255, 255)),
    ],
)
def test_images_of_every_mode_keep_their_colours(tmp_path, name, save, colour):
    """By the folder loader and by pack: 16 bits are scaled, transparent pixels lie over white."""
    save(tmp_path / name)
    found = data.folder(tmp_path, size=4).train
    assert found[0].flatten(1).unique(dim=1).tolist() == [[value] for value in colour]
    packing.pack(tmp_path, tmp_path.parent / f"{tmp_path.name}-packed", size=4)
    again = data.packed(tmp_path.parent / f"{tmp_path.name}-packed")
    assert torch.equal(again.train[torch.tensor([0])], found)


@pytest.mark.parametrize(
    ("mode", "sentence"), [("F", "pixels are floating point"), ("I", "pixels are whole numbers of 32 bits")]
)
def test_images_without_a_range_are_refused_by_name(tmp_path, mode, sentence):
    save_mode(mode, 7)(tmp_path / "a.tif")
    for read in (data.folder, lambda path: packing.pack(path, tmp_path / "packed")):
        with pytest.raises(UserError, match=rf"a\.tif cannot be read as an image \(its {sentence}"):
            read(tmp_path)


def test_damaged_images_are_counted_and_left_out_where_asked(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        write_image(images / f"{i:02}.png", 8, 8, (10 * i, 0, 0))
    raw = (images / "03.png").read_bytes()
    (images / "03.png").write_bytes(raw[: len(raw) // 2])
    (images / "09.png").write_bytes(b"no image")
    whole = [10 * i for i in range(20) if i not in (3, 9, 19)]
    with pytest.raises(UserError, match=r"03\.png cannot be read as an image .*data\.skip_damaged=true leaves"):
        data.load({"name": "folder", "path": str(images), "size": 8})
    with pytest.warns(UserWarning, match=r"2 of 20 images were left out; the first: .*03\.png cannot be read"):
        found = data.load({"name": "folder", "path": str(images), "size": 8, "skip_damaged": True})
    # The others stay in their part of the split.
    assert found.train[:, 0, 0, 0].tolist() == whole
    assert found.heldout[:, 0, 0, 0].tolist() == [190]
    with pytest.raises(UserError, match=r"03\.png cannot be read as an image .*--skip-damaged leaves"):
        packing.pack(images, tmp_path / "packed", size=8)
    with pytest.warns(UserWarning, match="2 of 20 images were left out"):
        manifest = packing.pack(images, tmp_path / "packed", size=8, skip_damaged=True)
    assert (manifest.train.count, manifest.heldout.count) == (17, 1)
    assert manifest.source == "20 images of images, 2 of them left out"
    stored.verify(tmp_path / "packed")
    assert np.array_equal(np.load(tmp_path / "packed" / "train_images.npy"), found.train.numpy())


def write_split(root, **folders):
    """One image for every name, of a grey value of its own; the values by name."""
    values = {}
    for i, name in enumerate(name for names in folders.values() for name in names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(root / name, 8, 8, (10 * i, 0, 0))
        values[10 * i] = name
    return values


@pytest.mark.parametrize("packs", [False, True])
def test_the_split_of_the_folders_is_the_split(tmp_path, packs):
    names = {
        "train": "train/cats/1.png train/cats/2.png train/dogs/1.png",
        "left": "val/cats/1.png",
        "heldout": "test/cats/1.png test/dogs/3.png",
    }
    values = write_split(tmp_path / "images", **names)
    if packs:
        manifest = packing.pack(tmp_path / "images", tmp_path / "packed", size=8)
        assert manifest.classes == ("cats", "dogs")
        found = data.packed(tmp_path / "packed")
    else:
        found = data.folder(tmp_path / "images", size=8)
    for split, labels in (("train", [0, 0, 1]), ("heldout", [0, 1])):
        rows = getattr(found, split)[torch.arange(len(labels))]
        assert [values[int(row)] for row in rows[:, 0, 0, 0]] == names[split].split()
        assert getattr(found, f"{split}_labels").tolist() == labels
    refused = {"heldout_every": 5}
    with pytest.raises(UserError, match="heldout_every cannot be given: the folders of the images make the split"):
        data.folder(tmp_path / "images", size=8, **refused)
    with pytest.raises(UserError, match="heldout_every cannot be given"):
        packing.pack(tmp_path / "images", tmp_path / "other", size=8, **refused)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Without test, val is held out; a folder around all of it and capitals make no difference.
        (("x/Train/a/1.png", "x/Val/a/1.png", "x/Val/b/1.png"), (("a", "b"), [0, 0, 1], [0, 2, 2])),
        (("train/1.png", "test/1.png"), ((), [], [0, 2])),
        # No split: nothing to hold out, or classes of these names beside another.
        (("train/a/1.png", "train/b/1.png"), (("a", "b"), [0, 1], [])),
        (("val/1.png", "test/1.png"), (("test", "val"), [1, 0], [])),
    ],
)
def test_folders_that_make_a_split(names, expected):
    found = folders.layout(names)
    assert (found.classes, found.numbers, found.splits) == expected


def test_what_lies_beside_a_split_is_refused(tmp_path):
    for other in ("cover.png", "unlabelled/1.png"):
        with pytest.raises(UserError, match=rf"{other} lies beside the folders test, train, which make a split"):
            folders.layout(["train/1.png", "test/1.png", other])
    assert folders.layout([f"{part}/{i}.png" for part in ("test", "train") for i in range(5)], limit=2).splits == [
        2,
        2,
        0,
        0,
    ]


def test_hidden_files_are_no_images(tmp_path):
    write_image(tmp_path / "a.png", 8, 8, (1, 2, 3))
    (tmp_path / "._a.png").write_bytes(b"what another system leaves")
    (tmp_path / ".thumbnails").mkdir()
    write_image(tmp_path / ".thumbnails" / "a.png", 4, 4, (1, 2, 3))
    assert len(data.folder(tmp_path, size=4)) == 1


def test_links_and_folders_that_cannot_be_read(tmp_path, monkeypatch):
    for i in range(20):
        file = tmp_path / "real" / ("a", "b")[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_image(file, 8, 8, (10 * i, 0, 0))
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for file in (tmp_path / "real" / "a").iterdir():
        (root / "a" / file.name).symlink_to(file)
    (root / "b").symlink_to(tmp_path / "real" / "b")
    (tmp_path / "real" / "b" / "around").symlink_to(root)
    settings = {"name": "folder", "size": 4}
    linked, plain = data.load({**settings, "path": str(root)}), data.load({**settings, "path": str(tmp_path / "real")})
    assert linked.classes == 2
    # The link back to the folder adds nothing to the linked folder, and to the real one those of a once more.
    assert (len(linked), len(linked.heldout)) == (18, 2)
    assert len(plain) + len(plain.heldout) == 30
    manifest = packing.pack(root, tmp_path / "packed", size=4)
    assert manifest.classes == ("a", "b")
    assert np.array_equal(np.load(tmp_path / "packed" / "train_images.npy"), linked.train.numpy())

    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a/gone\.png cannot be read as an image \(No such file or directory\)"):
        data.load({**settings, "path": str(root)})
    with pytest.raises(UserError, match=r"a/gone\.png cannot be read as an image \(No such file or directory\)"):
        packing.pack(root, tmp_path / "other", size=4)
    (root / "c").symlink_to(tmp_path / "nowhere")
    with (
        pytest.warns(UserWarning, match="images/c leads to nothing that can be read"),
        pytest.warns(UserWarning, match="1 of 21 images were left out"),
    ):
        found = data.load({**settings, "path": str(root), "skip_damaged": True})
    assert (len(found), len(found.heldout)) == (18, 2)

    scan = os.scandir

    def closed(folder):
        if str(folder) == str(root / "b"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="images/b cannot be read: Permission denied"):
        data.load({**settings, "path": str(root)})


def test_few_images_are_held_out_with_a_word(tmp_path):
    for i in range(12):
        write_image(tmp_path / f"{i:02}.png", 8, 8, (10 * i, 0, 0))
    settings = {"name": "folder", "path": str(tmp_path), "size": 4}
    with pytest.warns(UserWarning, match=r"fewer than heldout_every = 10 images \(here 9\) the training images are"):
        few = data.load({**settings, "limit": 9})
    assert few.heldout is few.train
    with pytest.raises(UserError, match=r"at least 2 held-out samples .* a smaller data\.heldout_every holds out more"):
        Measure(data.load(settings))


def write_idx(file, values):
    raw = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)


def write_mnist(root, end="", point="-", side=28):
    """A small set in the four files, and what is in them."""
    generator, sets = np.random.default_rng(0), []
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 12), ("t10k", 5)):
        images = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(root / f"{split}-images{point}idx3-ubyte{end}", images)
        write_idx(root / f"{split}-labels{point}idx1-ubyte{end}", labels)
        sets.append((images, labels))
    return sets


@pytest.mark.parametrize(
    ("place", "end", "point"), [("", "", "-"), ("", ".gz", "-"), ("MNIST/raw", ".gz", "-"), ("", "", ".")]
)
def test_mnists_files_are_read_and_packed(tmp_path, place, end, point):
    """In a folder of their own and where torchvision puts them, compressed or not."""
    (train, train_labels), (heldout, heldout_labels) = write_mnist(tmp_path / "set" / place, end, point)
    found = data.load({"name": "idx", "path": str(tmp_path / "set")})
    assert found.shape == (1, 28, 28)
    assert found.classes == 10
    assert np.array_equal(found.train[:, 0].numpy(), train)
    assert np.array_equal(found.heldout[:, 0].numpy(), heldout)
    assert found.train_labels.tolist() == train_labels.tolist()
    assert found.heldout_labels.tolist() == heldout_labels.tolist()
    manifest = packing.pack(tmp_path / "set", tmp_path / "packed")
    assert manifest.classes == tuple("0123456789")
    stored.verify(tmp_path / "packed")
    again = data.packed(tmp_path / "packed")
    assert torch.equal(again.train[torch.arange(12)], found.train)
    assert again.heldout_labels.tolist() == heldout_labels.tolist()


def test_mnists_images_are_padded_or_scaled(tmp_path):
    (train, _), _ = write_mnist(tmp_path / "set")
    wide = data.idx(tmp_path / "set", size=32, channels=3)
    assert wide.shape == (3, 32, 32)
    assert np.array_equal(wide.train[:, 1, 2:30, 2:30].numpy(), train)
    assert int(wide.train[:, :, :2].max()) == 0
    small = data.idx(tmp_path / "set", size=14)
    Image.fromarray(train[3]).save(tmp_path / "3.png")
    assert np.array_equal(small.train[3].numpy(), data.square(tmp_path / "3.png", 14, 1))
    # From 28 to 14 pixels, a box's mean is that of four pixels. Pillow rounds to bytes twice, once for each axis.
    mean = train.reshape(12, 14, 2, 14, 2).mean((2, 4))
    assert np.abs(data.idx(tmp_path / "set", size=14, filter="box").train[:, 0].numpy() - mean).max() <= 1
    with pytest.raises(UserError, match="filter must be one of lanczos, bicubic, bilinear, box; got 'cubic'"):
        data.idx(tmp_path / "set", size=14, filter="cubic")
    packed = packing.pack(tmp_path / "set", tmp_path / "small", kind="idx", size=14, filter="box")
    assert packed.preprocessing == "1x14x14, padded with black or scaled down (box)"
    again = data.packed(tmp_path / "small").train[torch.arange(12)][:, 0].numpy()
    assert np.abs(again - mean).max() <= 1
    manifest = packing.pack(tmp_path / "set", tmp_path / "packed", kind="idx", size=32)
    assert manifest.shape == (1, 32, 32)
    assert manifest.preprocessing == "1x32x32, padded with black or scaled down (lanczos)"


def test_idx_files_that_cannot_be_used_are_named(tmp_path):
    root = tmp_path / "set"
    with pytest.raises(UserError, match="there is no folder"):
        data.idx(root)
    root.mkdir()
    with pytest.raises(UserError, match="does not hold the four IDX files train-images-idx3-ubyte"):
        data.idx(root)
    write_mnist(root)
    file = root / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for raw, sentence in (
        (b"", "is no IDX file"),
        (b"\x89PNG" + whole[4:], "is no IDX file"),
        (whole[:2] + b"\x0d" + whole[3:], "holds values of type 0x0d; only bytes"),
        (whole[:3] + b"\x01" + whole[4:], "holds an array of 1 dimensions, wanted are 3"),
        (whole[:9], "is cut short in its header"),
        (whole[:-1], "is cut short: it has fewer than the 9408 values"),
        (whole + b"x", "holds more than the 9408 values"),
        (whole[:4] + b"\xff" * 12, "says that it holds 4294967295x4294967295x4294967295 values"),
        (whole[:4] + b"\0" * 12, "says that it holds 0x0x0 values: none"),
    ):
        file.write_bytes(raw)
        with pytest.raises(UserError, match=rf"train-images-idx3-ubyte {sentence}"):
            data.idx(root)
    file.unlink()
    for raw in (gzip.compress(whole)[:-400], b"\x1f\x8b" + whole, gzip.compress(whole)[:60] + b"\xff" * 60):
        (root / "train-images-idx3-ubyte.gz").write_bytes(raw)
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is a damaged gzip file"):
            data.idx(root)
    (root / "train-images-idx3-ubyte.gz").unlink()
    write_idx(file, np.zeros((11, 28, 28), np.uint8))
    with pytest.raises(UserError, match="holds 11 images, train-labels-idx1-ubyte 12"):
        data.idx(root)
    write_idx(file, np.zeros((12, 20, 28), np.uint8))
    with pytest.raises(UserError, match="are not alike in size"):
        data.idx(root)
    for name in ("MNIST", "FashionMNIST"):
        write_mnist(tmp_path / "both" / name / "raw")
    with pytest.raises(UserError, match=r"holds several sets of IDX files \(FashionMNIST/raw, MNIST/raw\)"):
        data.idx(tmp_path / "both")
    with pytest.raises(UserError, match="IDX files are packed whole: leave crop"):
        packing.pack(tmp_path / "both" / "MNIST", tmp_path / "packed", limit=3)


@pytest.mark.skipif(
    "REALUID_FAST_MNIST" not in os.environ, reason="REALUID_FAST_MNIST names no folder of MNIST's files"
)
def test_the_published_mnist_files():
    found = data.idx(os.environ["REALUID_FAST_MNIST"])
    assert (len(found.train), len(found.heldout)) == (60_000, 10_000)
    # The first label is 5, the means are those of the published set.
    assert found.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert float(found.train.float().mean()) / 255 == pytest.approx(0.1307, abs=1e-4)
    assert found.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
