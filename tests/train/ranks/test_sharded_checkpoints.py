"""Checkpoints of sharded runs: read on any number of ranks, whole or set aside."""

import shutil

import pytest
import torch
import torch.distributed.fsdp  # here, so that forked ranks need not

from realuid_fast.errors import UserError
from realuid_fast.train.checkpoint import Checkpoints, read
from realuid_fast.train.distill import Distiller

from .ranks import NETWORK, SHARD, on_ranks, trainer_in, wholes

_saved = {}


def saved_by_ranks(place, size, shard):
    """A checkpoint after two updates on so many ranks, in a folder of its own, and the state that it holds.

    Runs of one kind are alike: the first one's checkpoint is copied for all tests of this file.
    """
    folder, kind = place / f"by{size}{shard}", (place.name, size, shard)

    def work(rank):
        trainer = trainer_in(place, Distiller, distill={"batch": 12}, run={"shard": shard})
        trainer.update()
        trainer.update()
        checkpoints = Checkpoints(kept, sharded=shard)
        state = trainer.state_dict()
        if shard or rank == 0:
            checkpoints.save(2, {"trainer": state})
        checkpoints.close()
        return wholes(trainer)

    if kind not in _saved:
        kept = place / f"{folder.name} untouched"
        _saved[kind] = kept, on_ranks(place, size, work)[0]
    kept, state = _saved[kind]
    shutil.copytree(kept, folder)
    return folder, state


@pytest.mark.parametrize(
    ("place", "before", "after"),
    [
        ("points", (4, True), (3, True)),
        ("points", (4, True), (2, False)),
        ("points", (3, True), (1, True)),
        ("points", (2, False), (4, True)),
        ("images", (2, True), (1, True)),
        ("images", (1, False), (2, True)),
    ],
    ids=["4 to 3", "4 to whole on 2", "3 to 1", "whole to 4", "images 2 to 1", "images whole to 2"],
    indirect=["place"],
)
def test_any_number_of_ranks_reads_a_checkpoint_sharded_or_whole(place, before, after):
    folder, expected = saved_by_ranks(place, *before)
    size, shard = after

    def work(rank):
        trainer = trainer_in(place, Distiller, distill={"batch": 12}, run={"shard": shard})
        trainer.load_state_dict(Checkpoints(folder).load()["trainer"])
        found = wholes(trainer)
        trainer.update()
        return found

    for found in on_ranks(place, size, work):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[keys], tensor) for keys, tensor in expected.items())


def test_a_sharded_checkpoint_is_there_when_it_is_whole(place):
    folder, _ = saved_by_ranks(place, 2, True)
    (file,), shards = folder.glob("*.pt"), sorted(folder.glob("*.shard"))
    assert len(shards) == 2
    # Nobody writes what another does: all of it is there once.
    numel = sum(tensor.numel() for tensor in read(file)["trainer"]["fake"]["first.weight"][:])
    assert numel == 2 * NETWORK["width"]
    # A kill before the last file leaves the others of its step.
    left = [folder / shard.name.replace("00000002", "00000003") for shard in shards]
    left += [folder / "update-00000003.rank0", folder / "update-00000003.rank1.part"]
    for name in left:
        name.write_bytes(shards[0].read_bytes()[:100])
    assert Checkpoints(folder).load()["trainer"]["step"] == 2

    def work(rank):
        trainer, checkpoints = trainer_in(place, Distiller, run=SHARD), Checkpoints(folder, keep=1, sharded=True)
        # Again, which must not touch what is there; and on, which clears away what is not of use any more.
        for step in (2, 4):
            trainer.step = step
            checkpoints.save(step, {"trainer": trainer.state_dict()})
        checkpoints.close()

    on_ranks(place, 2, work)
    assert [file.name for file in folder.glob("*.pt")] == ["update-00000004.pt"]
    assert {file.name[:15] for file in folder.iterdir()} == {"update-00000004"}
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("harm", ["flip", "cut", "swap", "gone"])
def test_a_damaged_shard_sets_its_checkpoint_aside(place, harm):
    folder, _ = saved_by_ranks(place, 2, True)
    for file in list(folder.iterdir()):
        (folder / file.name.replace("00000002", "00000001")).write_bytes(file.read_bytes())
    # The earlier checkpoint names its own files.
    content = torch.load(folder / "update-00000001.pt", weights_only=True)
    content["shards"] = [name.replace("00000002", "00000001") for name in content["shards"]]
    Checkpoints(folder, keep=9).save(1, {k: v for k, v in content.items() if k not in ("torch_rng",)})
    first, second = sorted(folder.glob("update-00000002.*.shard"))
    data = bytearray(first.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
    elif harm == "cut":
        first.write_bytes(data[:-1])
    elif harm == "swap":
        first.write_bytes(second.read_bytes())
    else:
        first.unlink()
    with pytest.warns(UserWarning, match=rf"update-00000002\.pt is damaged \({first.name[:15]}"):
        saved = Checkpoints(folder).load()
    assert saved["trainer"]["fake"]["first.weight"][:].shape == (8, 2)
    assert not list(folder.glob("update-00000002.*shard"))
    assert len(list(folder.glob("update-00000002.*damaged*"))) == 2 + (harm != "gone")


def test_a_rank_that_cannot_write_stops_all_and_the_checkpoint_before_stays(place):
    folder, _ = saved_by_ranks(place, 2, True)

    def work(rank):
        trainer, checkpoints = trainer_in(place, Distiller, run=SHARD), Checkpoints(folder, sharded=True)
        if rank:
            from realuid_fast.train import checkpoint

            def full(*_):
                raise OSError(28, "No space left on device")

            checkpoint._write_verified = full
        with pytest.raises(UserError, match=r"update-00000003\.pt cannot be written: No space left on device"):
            checkpoints.save(3, {"trainer": trainer.state_dict()})
        checkpoints.close()

    on_ranks(place, 2, work)
    assert [file.name for file in folder.glob("*.pt")] == ["update-00000002.pt"]
    assert Checkpoints(folder).load()["trainer"]["step"] == 2


def test_a_log_that_does_not_reach_the_disk_stops_all_ranks(place):
    """It is rank 0's alone; the others would wait for what it has to say about its shard."""
    folder, _ = saved_by_ranks(place, 2, True)

    def work(rank):
        trainer, checkpoints = trainer_in(place, Distiller, run=SHARD), Checkpoints(folder, sharded=True)

        def full():
            if rank == 0:
                raise OSError(28, "No space left on device")

        with pytest.raises(UserError, match=r"update-00000003\.pt cannot be written: No space left on device"):
            checkpoints.save(3, {"trainer": trainer.state_dict()}, full)
        checkpoints.close()

    on_ranks(place, 2, work)
    assert [file.name for file in folder.glob("*.pt")] == ["update-00000002.pt"]
