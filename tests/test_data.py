"""Data sets: splits and scaling, deterministic draws, image folders, CIFAR-10 files, and errors in a
sentence.
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from realuid_fast import data
from realuid_fast.errors import UserError


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


@pytest.mark.parametrize("name", ["eight_gaussians", "moons", "checkerboard"])
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
    with pytest.raises(UserError, match="argument it cannot use"):
        data.load("folder")
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
