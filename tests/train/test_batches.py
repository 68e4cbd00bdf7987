"""Batches: samples on disk come as those in memory do, go on where they stopped, and fail in a sentence."""

import gc
import os
import threading

import pytest
import torch

from realuid_fast import data
from realuid_fast.data.stored import Stored
from realuid_fast.errors import UserError
from realuid_fast.evaluate import measure
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import train
from realuid_fast.models.conditions import labels_to_draw
from realuid_fast.train import batches as batches_module
from realuid_fast.train import distill, distributed
from realuid_fast.train.batches import AHEAD, Batches

from ..data.test_packed import write

CPU = torch.device("cpu")


@pytest.fixture
def sets(tmp_path):
    """The same images on disk and in memory."""
    images = write(tmp_path, train=20)
    stored = data.packed(tmp_path)
    return stored, data.Dataset("numbers", images, images, stored.train_labels, stored.train_labels)


def drawn(batches, count):
    return [batches.next() for _ in range(count)]


def same(one, two):
    return all(torch.equal(a, b) for pair in zip(one, two, strict=True) for a, b in zip(*pair, strict=True))


def test_disk_and_memory_give_the_same_batches(sets):
    one, two = (drawn(Batches(each, 6, 3, CPU), 10) for each in sets)
    assert same(one, two)
    # Three batches a pass, each sample at most once.
    rows = torch.cat([x for x, _ in one[:3]]).flatten(1)
    assert len(rows.unique(dim=0)) == 18


@pytest.mark.parametrize("handed_out", [0, 1, 3, 5, 7])
def test_what_was_read_ahead_is_read_again(sets, handed_out):
    """The state is that of the batches handed out, also across the passes that reading ahead has begun."""
    stored, _ = sets
    assert AHEAD > 3
    straight = drawn(Batches(stored, 6, 3, CPU), 14)
    batches = Batches(stored, 6, 3, CPU)
    drawn(batches, handed_out)
    state = batches.state_dict()
    resumed = Batches(stored, 6, 99, CPU)
    drawn(resumed, 2)
    resumed.load_state_dict(state)
    assert same(drawn(resumed, 14 - handed_out), straight[handed_out:])
    # One that goes on is none the worse for having been asked.
    assert same(drawn(batches, 14 - handed_out), straight[handed_out:])


def test_memory_and_disk_resume_each_other_never(sets):
    stored, memory = sets
    with pytest.raises(UserError, match="the run was started on other training samples than the data set has now"):
        Batches(stored, 6, 0, CPU).load_state_dict(Batches(memory, 6, 0, CPU).state_dict())
    state = Batches(memory, 6, 0, CPU).state_dict()
    state["samples"] = ""  # as checkpoints were before samples in memory had a checksum
    Batches(memory, 6, 0, CPU).load_state_dict(state)
    with pytest.raises(UserError, match="the run was started on other training samples"):
        Batches(stored, 6, 0, CPU).load_state_dict(state)
    del state["samples"]  # as checkpoints were before samples could lie on disk
    Batches(memory, 6, 0, CPU).load_state_dict(state)


def test_another_packing_is_noticed(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", seed=1)
    state = Batches(data.packed(tmp_path / "one"), 4, 0, CPU).state_dict()
    with pytest.raises(UserError, match="the run was started on other training samples"):
        Batches(data.packed(tmp_path / "two"), 4, 0, CPU).load_state_dict(state)


def test_reading_stays_few_batches_ahead(sets, monkeypatch):
    stored, _ = sets
    read, rows = Stored.read, []
    monkeypatch.setattr(Stored, "read", lambda self, index, out: (rows.append(index), read(self, index, out))[1])
    batches = Batches(stored, 6, 0, CPU)
    assert not rows
    for taken in range(1, 8):
        batches.next()
        [reading.result() for reading, _, _ in batches._ahead]
        assert len(rows) == taken + AHEAD - 1


def test_the_thread_is_one_and_goes_with_the_batches(sets):
    stored, memory = sets
    before = set(threading.enumerate())
    batches = Batches(stored, 6, 0, CPU)
    drawn(batches, 10)
    drawn(Batches(memory, 6, 0, CPU), 2)
    (thread,) = set(threading.enumerate()) - before
    del batches
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_file_cut_short_surfaces_and_nothing_is_skipped(sets, tmp_path):
    stored, memory = sets
    expected = drawn(Batches(memory, 2, 5, CPU), 30)
    batches = Batches(stored, 2, 5, CPU)
    file, taken = tmp_path / "train_images.npy", drawn(batches, 2)
    whole = file.read_bytes()
    os.truncate(file, len(whole) - 10 * 192)

    def until_it_fails():
        while True:
            taken.append(batches.next())

    with pytest.raises(OSError, match="was cut short") as error:
        until_it_fails()
    assert error.value.filename == str(file)
    state = batches.state_dict()
    with pytest.raises(OSError, match="was cut short"):
        batches.next()
    file.write_bytes(whole)
    resumed = Batches(stored, 2, 0, CPU)
    resumed.load_state_dict(state)
    for each in (batches, resumed):
        assert same(taken + drawn(each, 30 - len(taken)), expected)


def test_a_run_never_reads_a_split_at_once(tmp_path, monkeypatch):
    """A run compares samples with a bounded part of the set, whatever the set's size."""
    write(tmp_path / "packed", train=200, heldout=100)
    monkeypatch.setattr(measure, "STORED", 12)
    monkeypatch.setattr(measure, "MOST", 11)
    monkeypatch.setattr(distill, "MOST", 10)
    read, rows = Stored.read, []

    def counted(self, index, out):
        # Another test's batches may still be read ahead, by a thread of their own.
        if tmp_path in self.file.parents:
            rows.append(len(index))
        return read(self, index, out)

    monkeypatch.setattr(Stored, "read", counted)
    network = {"kind": "mlp", "shape": [3, 8, 8], "width": 8, "depth": 1, "num_classes": 3}
    config = {
        "data": {"name": "packed", "path": str(tmp_path / "packed"), "flip": True},
        "network": network,
        "teacher": {"batch": 9, "updates": 4, "ema": [0.9], "export": 0.9},
        "distill": {"teacher": str(tmp_path / "teacher" / "teacher.safetensors"), "batch": 8, "updates": 4},
        "run": {
            "evaluate_every": 2,
            "evaluate_samples": 20,
            "sample_every": 2,
            "tensorboard": False,
            "progress": False,
        },
    }
    for job, folder in (("train-teacher", "teacher"), ("distill", "student")):
        _, judge = train(job, configs.from_mapping(config), tmp_path / folder, False, False, "")
    assert len(judge.train) == len(judge.heldout) == 12
    assert judge.floor().distance > 0
    assert set(rows) == {8, 9, 10, 11, 12}


def test_ranks_read_rows_apart(sets, monkeypatch):
    stored, _ = sets
    monkeypatch.setattr(distributed, "size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seen.append(torch.cat([x for x, _ in drawn(Batches(stored, 2, 0, CPU), 3)]))
    rows = torch.cat(seen).flatten(1)
    assert len(rows.unique(dim=0)) == 18
    with pytest.raises(UserError, match="batch 21 is larger than data set 'packed', which has 20"):
        Batches(stored, 7, 0, CPU)


def test_half_of_the_images_are_mirrored_by_the_runs_own_coins(sets):
    stored, memory = sets
    stored.flip = memory.flip = True
    plain = drawn(Batches(data.Dataset("numbers", memory.train, memory.train), 10, 0, CPU), 40)

    def flipped(dataset, seed):
        return drawn(Batches(dataset, 10, 0, CPU, torch.Generator().manual_seed(seed)), 40)

    one = flipped(stored, 1)
    assert same(one, flipped(memory, 1))
    assert not same(one, flipped(stored, 2))
    mirrored = 0
    for (x, _), (original, _) in zip(one, plain, strict=True):
        for image, source in zip(x, original, strict=True):
            assert torch.equal(image, source) or torch.equal(image, source.flip(-1))
            mirrored += not torch.equal(image, source)
    # 400 coins: within four standard deviations.
    assert abs(mirrored - 200) < 40


def test_classes_are_drawn_evenly(tmp_path):
    labels = torch.tensor([0] * 50 + [2] * 5 + [3] * 2)
    dataset = data.Dataset("numbers", torch.arange(57.0)[:, None], torch.zeros(2, 1), labels, balance=True)
    batches = Batches(dataset, 19, 0, CPU)
    for _ in range(4):
        rows, seen = (torch.cat(part) for part in zip(*drawn(batches, 3), strict=True))
        assert seen.bincount(minlength=4).tolist() == [19, 0, 19, 19]
        assert torch.equal(labels[rows.flatten().long()], seen)
        # No sample of a large enough class comes twice. All samples of a small class come equally often, or once more.
        counts = rows.flatten().long().bincount(minlength=57)
        assert counts[:50].max() == 1
        assert counts[50:55].min() == 3
        assert counts[55:].tolist() in ([9, 10], [10, 9])
    visited = torch.cat([x for x, _ in drawn(Batches(dataset, 19, 1, CPU), 90)]).unique()
    assert len(visited) == 57
    state = batches.state_dict()
    resumed = Batches(dataset, 19, 5, CPU)
    resumed.load_state_dict(state)
    assert same(drawn(batches, 5), drawn(resumed, 5))


def test_remainders_of_classes_differ_by_at_most_one():
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    order = batches_module._balanced(labels, 8, torch.Generator().manual_seed(0))
    assert sorted(labels[order].bincount().tolist()) == [2, 3, 3]
    assert len(batches_module._balanced(torch.arange(9), 4, torch.Generator().manual_seed(0)).unique()) == 4


def test_labels_of_balanced_data_are_the_classes():
    class Net(torch.nn.Module):
        num_classes = 4

    labels = torch.tensor([0, 0, 0, 3])
    dataset = data.Dataset("numbers", torch.zeros(4, 1), torch.zeros(2, 1), labels)
    assert torch.equal(labels_to_draw(Net(), dataset, CPU), labels)
    dataset.balance = True
    assert labels_to_draw(Net(), dataset, CPU).tolist() == [0, 3]
