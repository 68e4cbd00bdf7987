"""Networks sharded over ranks: the same numbers as whole copies, a share of the memory each."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, so that forked ranks need not
from torch import nn

from realuid_fast import data, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build
from realuid_fast.optim import FusedAdam
from realuid_fast.train import distributed, sharding
from realuid_fast.train.distill import Distiller
from realuid_fast.train.logging import read_csv

from ...helpers import POINTS
from .ranks import (
    NETWORK,
    SHARD,
    config,
    on_ranks,
    run_on_ranks,
    trainer_in,
    whole,
)


@pytest.mark.parametrize("job", ["distill", "train-teacher"])
@pytest.mark.parametrize("place", ["points", "labelled images"], indirect=True)
def test_a_sharded_run_ends_as_one_with_whole_copies(place, job):
    # With clip, accumulation, a rounded teacher, evaluation, pictures, and the average that is exported.
    sections = {"run": {"accumulate": 2, "sample_every": 4}, "distill": {"teacher_precision": "bf16"}}
    if place.name != "points":
        # A sharded U-Net adds the gradients of its skip connections in another order, which bf16 rounds to 0.5 %, and
        # its filters are contiguous in whatever layout the images are.
        sections = {"run": {"accumulate": 2, "sample_every": 4, "channels_last": False}}
        sections |= {"distill": {"updates": 4}, "teacher": {"updates": 4}}
    apart = run_on_ranks(place, "apart", 2, job=job, **configs.merge(sections, {"run": SHARD}))
    copies = run_on_ranks(place, "copies", 2, job=job, **sections)
    name = "student" if job == "distill" else "teacher"
    for file in (f"{name}.safetensors", "best.safetensors"):
        a, b = (list(teachers.load(folder / file).net.parameters()) for folder in (apart, copies))
        for one, other in zip(a, b, strict=True):
            # Eight steps on float32 gradients whose sums are in another order.
            if place.name == "points":
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            else:
                # Adam divides a gradient by its size, so that one element near 0 moves by more than its rounding.
                assert torch.linalg.vector_norm(one - other) <= 1e-4 * torch.linalg.vector_norm(other)
    for one, other in zip(*(read_csv(folder / "log.csv") for folder in (apart, copies)), strict=True):
        clocks = ("images_per_second", "seconds")
        assert {k: v for k, v in one.items() if k not in clocks} == pytest.approx(
            {k: v for k, v in other.items() if k not in clocks}, rel=1e-3
        )
    a, b = ([row["distance"] for row in read_csv(folder / "distances.csv")] for folder in (apart, copies))
    assert a == pytest.approx(b, rel=1e-3)


def held_bytes():
    """Bytes of all tensors that this process holds."""
    gc.collect()
    memory = {}
    for each in gc.get_objects():
        # Tensors that earlier tests of this process left behind may be sparse or of the device meta: without memory.
        plain = type(each) in (torch.Tensor, nn.Parameter) and each.layout is torch.strided
        if plain and each.device.type != "meta" and each.untyped_storage().nbytes():
            storage = each.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
        elif type(each).__name__ == "DTensor":
            storage = each.to_local().untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
    return sum(memory.values())


def test_a_rank_holds_its_share_of_everything(place):
    wide = {"kind": "mlp", "shape": [2], "width": 256, "depth": 2}
    teachers.save(place / "teacher.safetensors", build(wide).state_dict(), teachers.Description(wide, data=POINTS))
    parameters = sum(p.numel() for p in build(wide).parameters())

    def work(rank):
        before = held_bytes()
        trainer = trainer_in(place, Distiller, run=SHARD)
        trainer.update()
        trainer.sample(torch.randn(4, 2))
        return held_bytes() - before

    # Teacher; fake model and generator with the one moment of beta1 = 0; an average.
    everything = 4 * parameters * (1 + 2 * 2 + 1)
    for size in (2, 4):
        for held in on_ranks(place, size, work):
            # Beside it batches, the tripwires' directions, streams: some kB.
            assert held == pytest.approx(everything / size, rel=0.01, abs=16384)


def test_fused_adam_on_shards_is_fused_adam(place):
    """Clip, both moments, weight decay, averages; and what is not finite on one rank is skipped by all."""

    def net():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))

    settings = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "clip": 0.5, "ema_decays": (0.5, 0.9)}
    expected, single = [], net()
    adam = FusedAdam(single.parameters(), **settings)
    for i in range(3):
        single(torch.full((4, 5), i + 1.0)).square().sum().backward()
        adam.step()
        adam.zero_grad()
        expected.append(float(adam.norm))
    averages = [adam.averages(0.9)[p] for p in single.parameters()]

    def work(rank):
        sharded = sharding.shard(net(), torch.device("cpu"))
        adam, norms = FusedAdam(sharded.parameters(), **settings), []
        for i in range(3):
            sharded(torch.full((4, 5), i + 1.0)).square().sum().backward()
            adam.step()
            adam.zero_grad()
            norms.append(float(adam.norm))
        sharded(torch.ones(4, 5)).sum().backward()
        if rank == 1:
            next(sharded.parameters()).grad.to_local()[0] = float("inf")
        before = [p.to_local().clone() for p in sharded.parameters()]
        adam.step()
        assert all(map(torch.equal, before, [p.to_local() for p in sharded.parameters()]))
        assert adam.counts.tolist() == [4, 1]
        rows = {name: value.full_tensor() for name, value in adam.state_dict()["state"][0].items() if name != "step"}
        with pytest.raises(UserError, match="params must be alike, got sharded and whole ones"):
            FusedAdam([*sharded.parameters(), nn.Parameter(torch.zeros(2))])
        with pytest.raises(UserError, match="flat storage is for parameters that a process holds whole"):
            FusedAdam(sharded.parameters(), flat=True)
        with pytest.raises(UserError, match="state_dict holds a whole exp_avg, the parameters are sharded"):
            FusedAdam(sharded.parameters(), **settings).load_state_dict(
                {**adam.state_dict(), "state": {0: {"step": torch.ones(()), "exp_avg": torch.zeros(7, 5)}}}
            )
        with torch.no_grad():
            return norms, [p.full_tensor() for p in sharded.parameters()], rows

    for norms, params, rows in on_ranks(place, 2, work):
        assert norms == pytest.approx(expected, rel=1e-5)
        for a, b in zip(params, single.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows["ema"][1], averages[0], rtol=1e-5, atol=1e-6)
        assert rows["ema"].shape == (2, 7, 5)
        assert rows["exp_avg"].shape == (7, 5)


def test_a_network_stands_in_and_is_frozen_and_is_as_before(place):
    def work(rank):
        net, same = build(NETWORK), build(NETWORK)
        with torch.no_grad():
            for p in same.parameters():
                p.fill_(0.1)
        average = same.state_dict()
        sharding.shard(net, torch.device("cpu"))
        before = [p.to_local().clone() for p in net.parameters()]
        parts = {name: average[name][sharding.rows_of(len(average[name]), rank, 2)].clone() for name in average}
        t, x = torch.full((3,), 0.5), torch.ones(3, 2, requires_grad=True)
        with sharding.standing_in(net, parts), torch.no_grad():
            assert not net.training
            torch.testing.assert_close(net(t, x), same(t, x))
            exported = sharding.whole(net.state_dict())
        assert net.training
        assert all(map(torch.equal, before, [p.to_local() for p in net.parameters()]))
        expected = average if rank == 0 else {}
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
        frozen, kept = sharding.frozen(net), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            out = frozen(t, x)
        held = len(kept)
        (g,) = torch.autograd.grad(out.sum(), x)
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            out = net(t, x)
        # The inputs of its linear layers are kept for their gradients, which a frozen one does not ask for.
        assert len(kept) - held > held
        out.sum().backward()
        torch.testing.assert_close(x.grad, g)
        assert all(p.grad is not None for p in net.parameters())

    on_ranks(place, 2, work)


@pytest.mark.parametrize(
    "network",
    [
        {"kind": "song-unet", "dim": [1, 8, 8], "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
        | {
            "attn_resolutions": [4],
            "label_dim": 3,
            "augment_dim": 9,
            "encoder_type": "residual",
            "embedding_type": "fourier",
        },
        {"kind": "dhariwal-unet", "dim": [1, 8, 8], "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1}
        | {"attn_resolutions": [4], "label_dim": 3},
    ],
    ids=lambda network: network["kind"],
)
def test_other_networks_are_the_same_when_sharded(place, network):
    """Their blocks are in dictionaries, of which each item is a part."""

    def work(rank):
        torch.manual_seed(0)
        net = build(network).requires_grad_(True)
        sharded = sharding.shard(copy.deepcopy(net), torch.device("cpu"))
        t, x, y = torch.tensor([0.2, 0.8]), torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
        for each in (net, sharded):
            each.eval()(t, x, y).square().sum().backward()
        assert len(sharding.blocks(sharded)) > 10
        for a, b in zip(net.parameters(), sharded.parameters(), strict=True):
            # The weight of augmentation labels, which no forward pass reads, has none.
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                # Float32 sums in another order.
                torch.testing.assert_close(whole(b.grad), a.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()))

    on_ranks(place, 2, work)


def test_rows_are_cut_as_torch_cuts_chunks():
    for length in range(1, 20):
        for size in range(1, 9):
            chunks = [len(part) for part in torch.arange(length).chunk(size)]
            rows = [sharding.rows_of(length, rank, size) for rank in range(size)]
            assert [r.stop - r.start for r in rows] == chunks + [0] * (size - len(chunks))


@pytest.mark.parametrize("sections", [{"shard": True}, {"offload_teacher": True, "device": "cuda"}])
@pytest.mark.parametrize("mode", ["compiled", "graphs"])
def test_what_is_brought_together_in_parts_runs_eagerly(place, sections, mode):
    (name, *_) = sections
    with pytest.raises(UserError, match=rf"run\.{name} must be false with run\.mode {mode}"):
        config(place, run={**sections, "mode": mode})


def test_a_teacher_that_is_offloaded_is_the_same_teacher(place):
    with pytest.raises(UserError, match=r"run\.offload_teacher must be false with run\.device cpu"):
        config(place, run={"offload_teacher": True})
    plain = trainer_in(place, Distiller)
    plain.update()
    with distributed.joined("cpu", alone=True):
        asked = config(place)
        # The setting is for GPUs; what it does runs here.
        object.__setattr__(asked.run, "offload_teacher", True)
        offloaded = trainers.distiller(asked, data.load(POINTS), teachers.load(place / "teacher.safetensors"))
        assert distributed.size() == 1
        assert not offloaded.sharded
        offloaded.update()
        assert all(hasattr(p, "to_local") for p in offloaded.teacher.parameters())
    assert not dist.is_initialized()
    for a, b in zip(plain.generator.parameters(), offloaded.generator.parameters(), strict=True):
        assert torch.equal(a, b)
