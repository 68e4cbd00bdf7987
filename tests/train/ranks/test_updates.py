"""An update on several ranks or in parts is that of the whole batch; how gradients travel."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, so that forked ranks need not
from torch import nn

from realuid_fast import data, teachers
from realuid_fast.errors import UserError
from realuid_fast.jobs import trainers
from realuid_fast.models import pairs
from realuid_fast.noise import normal
from realuid_fast.optim import FusedAdam, Optimiser, mean
from realuid_fast.train import distill, distributed, regression
from realuid_fast.train.distill import Distiller
from realuid_fast.train.teacher import TeacherTrainer

from ...helpers import POINTS
from .ranks import config, gradients_of, on_ranks, trainer_in, whole


def recorded(trainer, record):
    """Keep what a trainer draws, in order: normals for the generator, times, real rows, noise of the interpolants."""
    draw, times, keys, rows = distill.normal, trainer.path.sample_time, trainer.noise.next_key, trainer.batches.next

    def kept(name, call, *given, **named):
        record.setdefault(name, []).append(call(*given, **named))
        return record[name][-1]

    distill.normal = partial(kept, "z", draw)
    object.__setattr__(trainer.path, "sample_time", partial(kept, "t", times))
    trainer.noise.next_key = partial(kept, "keys", keys)
    trainer.batches.next = partial(kept, "real", rows)


def assert_as_on_one(place, monkeypatch, found, z, t, real, noise, **sections):
    """``found`` are the gradients that one process gets on the batches of 16 that the draws make up."""
    single, keys = trainer_in(place, Distiller, **sections), [None, noise[0], noise[1], None, noise[2]]
    monkeypatch.setattr(distill, "normal", lambda key, like: z.pop(0))
    object.__setattr__(single.path, "sample_time", lambda *_: t.pop(0))
    monkeypatch.setattr(single.noise, "next_key", lambda: keys.pop(0))
    monkeypatch.setattr(single.batches, "next", lambda: (real.pop(0), None))
    expected = gradients_of(single)
    assert {name: len(steps) for name, steps in expected.items()} == {"fake": 2, "generator": 1}
    for name, steps in expected.items():
        for one, other in zip(steps, found[name], strict=True):
            for a, b in zip(one, other, strict=True):
                # Float32 sums of 16 rows in another order.
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


GAN = {"gan": {"weight_fake": 3.0, "weight_generator": 2.0}, "objective": {"name": "uid"}}


@pytest.mark.parametrize(
    ("place", "shard", "settings"),
    [("points", False, {}), ("images", False, {}), ("images", True, {}), ("points", False, GAN), ("images", True, GAN)],
    ids=["points", "images", "images-shard", "gan", "gan-shard"],
    indirect=["place"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_an_update_on_ranks_equals_one_on_the_concatenated_batch(place, size, shard, settings, monkeypatch):
    def work(rank):
        trainer, record = trainer_in(place, Distiller, run={"shard": shard}, distill=settings), {}
        assert trainer.batch == 16 // size
        recorded(trainer, record)
        gradients = gradients_of(trainer)
        # The noise of the interpolants is what the keys that made no z stand for.
        record["n"] = [normal(key, trainer._like) for i, key in enumerate(record.pop("keys")) if i in (1, 2, 4)]
        record["real"] = [rows for rows, _ in record["real"]]
        weights = [*trainer.fake.state_dict().values(), *trainer.generator.state_dict().values()]
        return record, gradients, [whole(tensor) for tensor in weights]

    ranks = on_ranks(place, size, work)
    for _, _, weights in ranks[1:]:
        assert all(map(torch.equal, weights, ranks[0][2]))
    gradients = ranks[0][1]
    if shard:
        # Ranks hold the rows of a gradient one below another.
        gradients = {
            name: [[torch.cat(rows) for rows in zip(*step, strict=True)] for step in zip(*steps, strict=True)]
            for name, steps in ((name, [r[1][name] for r in ranks]) for name in gradients)
        }
    # No rank draws what another does.
    for name in ("z", "t", "n", "real"):
        values = torch.cat([record[name][0] for record, *_ in ranks])
        # Pixels of digits have 17 values, so of images whole rows must differ.
        values = values.flatten() if place.name == "points" else values.view(len(values), -1)
        assert len(values.unique(dim=0)) == len(values), name
    drawn = {name: [list(parts) for parts in zip(*(r[0][name] for r in ranks), strict=True)] for name in ranks[0][0]}
    # Samples of a rank's fake turns lie one after another: its first turn's rows belong to the first turn here.
    turns = [torch.cat([z[i * 16 // size :][: 16 // size] for z in drawn["z"][0]]) for i in range(2)]
    t, real, noise = ([torch.cat(parts) for parts in drawn[name]] for name in ("t", "real", "n"))
    z = [torch.cat(turns), torch.cat(drawn["z"][1])]
    assert_as_on_one(place, monkeypatch, gradients, z, t, real, noise, distill=settings)


@pytest.mark.parametrize(
    "distill",
    [
        GAN,
        {"objective": {"name": "regression"}, "regression": {"steps": 3}},
    ],
    ids=["gan", "regression"],
)
def test_every_objective_has_one_state_on_all_ranks(place, distill):
    def made(**run):
        asked = config(place, distill=distill, run=run)
        return trainers.trainer("distill", asked, data.load(POINTS), teachers.load(place / "teacher.safetensors"))

    def weights(trainer):
        nets = [trainer.network, *([trainer.judged] if "gan" in distill else [])]
        return [p.detach().clone() for net in nets for p in net.parameters()]

    def work(rank):
        trainer = made()
        assert trainer.batch == 8
        first = None
        for _ in range(3):
            gradients = gradients_of(trainer)
            first = first or gradients
        return first, weights(trainer), trainer.draws.get_state(), trainer.noise.state

    (first, one, draws, noise), (other_first, two, other_draws, other_noise) = on_ranks(place, 2, work)
    assert all(map(torch.equal, one, two))
    assert not torch.equal(draws, other_draws)
    assert not torch.equal(noise, other_noise)
    # The mean over the ranks is what both step along.
    for name, steps in first.items():
        for a, b in zip(steps, other_first[name], strict=True):
            assert all(map(torch.equal, a, b))
    assert any(not torch.equal(a, b) for a, b in zip(one, weights(made()), strict=True))


def test_a_regression_on_ranks_equals_one_on_the_concatenated_batch(place, monkeypatch):
    def made():
        asked = config(place, distill={"objective": {"name": "regression"}, "regression": {"steps": 3}})
        return trainers.regression(asked, data.load(POINTS), teachers.load(place / "teacher.safetensors"))

    def work(rank):
        trainer, drawn = made(), []
        draw = regression.normal
        regression.normal = lambda *given: drawn.append(draw(*given)) or drawn[-1]
        return gradients_of(trainer), drawn

    ranks = on_ranks(place, 2, work)
    z = torch.cat([drawn[0] for _, drawn in ranks])
    assert len(z.unique()) == z.numel() == 32
    monkeypatch.setattr(regression, "normal", lambda *_: z)
    ((expected,),) = gradients_of(made()).values()
    ((found,),) = ranks[0][0].values()
    for a, b in zip(expected, found, strict=True):
        # Float32 sums of 16 rows in another order.
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_set_out_while_the_backward_pass_goes_on(place, parts, flat, monkeypatch):
    """In pieces of any size they are what all of them at once are, for two ranks to the bit; one may have no part."""
    layers, reduce = 6, dist.all_reduce

    def gradients(rank, least, order):
        monkeypatch.setattr(mean, "PIECE", least)
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(layers)))
        net.register_parameter("idle", nn.Parameter(torch.ones(3)))
        optimiser, found = Optimiser(net, 0.1), []
        optimiser.adam = FusedAdam(net.parameters(), 0.1, flat=flat)
        mean.average(optimiser, distributed.size(), parts)
        averaged = optimiser.adam.reduce

        def keep(given):
            averaged(given)
            found.extend(p.grad.clone() for p in net.parameters() if p.grad is not None)

        optimiser.adam.reduce = keep
        monkeypatch.setattr(dist, "all_reduce", lambda *given, **named: order.append("sent") or reduce(*given, **named))
        for i, layer in enumerate(net):
            layer.weight.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
        rows = torch.arange(20.0).view(4, 5).sin() + rank
        for _ in range(3):
            for _ in range(parts):
                net(rows).square().sum().backward()
            order.append("step")
            optimiser.adam.step()
            optimiser.adam.zero_grad()
            # Ranks' weights part where one steps along gradients of its own.
            found.extend(p.detach().clone() for p in net.parameters())
        monkeypatch.setattr(dist, "all_reduce", reduce)
        return found

    def work(rank):
        orders = {2**40: [], 200: [], 1: []}
        found = [gradients(rank, least, order) for least, order in orders.items()]
        for again in found[1:]:
            assert all(map(torch.equal, again, found[0]))
        return *orders.values(), found[0]

    (at_once, in_twos, singly, found), (*_, other) = on_ranks(place, 2, work)
    assert found
    assert all(map(torch.equal, found, other))
    before = [*reversed(range(layers))] * (parts - 1)
    # What has no gradient is waited for until the step. A layer here is 100 bytes.
    assert at_once == [*before, 5, 4, 3, 2, 1, 0, "step", "sent"] * 3
    assert in_twos == [*before, 5, "sent", 4, 3, "sent", 2, 1, "sent", 0, "step"] * 3
    assert singly == [*before, *(x for i in reversed(range(layers)) for x in ("sent", i)), "step"] * 3


def test_pieces_are_neighbours_from_the_end():
    assert mean.pieces([4, 4, 4, 4, 4], 8) == [slice(3, 5), slice(1, 3), slice(0, 1)]
    assert mean.pieces([1, 9], 8) == [slice(1, 2), slice(0, 1)]
    assert mean.pieces([9, 1], 100) == [slice(0, 2)]
    assert mean.pieces([], 8) == []


def test_a_gradient_that_changes_after_it_has_set_out_is_noticed(place):
    def work(rank):
        net = nn.Linear(2, 1)
        optimiser = Optimiser(net, 0.1)
        mean.average(optimiser, distributed.size())
        net(torch.ones(1, 2)).backward()
        with pytest.raises(RuntimeError, match="1 a step"):
            net(torch.ones(1, 2)).backward()
        return True

    assert on_ranks(place, 2, work) == [True, True]


def test_a_batch_in_parts_is_the_same_batch(place, monkeypatch):
    trainer, record = trainer_in(place, Distiller, run={"accumulate": 2}), {}
    assert trainer.batch == 8
    # As for fp16: what the seeds carry is divided out of the sum of all parts, and changes no bit in float32.
    trainer._seed_scale = 4.0
    assert trainer.images_per_update == trainer_in(place, Distiller).images_per_update
    monkeypatch.setattr(distill, "normal", distill.normal)
    recorded(trainer, record)
    found, like = gradients_of(trainer), torch.empty(8, 2)
    monkeypatch.undo()
    noise = [normal(key, like) for i, key in enumerate(record["keys"]) if i in (1, 2, 3, 4, 6, 8)]
    t, real, noise = (
        [torch.cat(pair) for pair in zip(each[::2], each[1::2], strict=True)]
        for each in (record["t"], [rows for rows, _ in record["real"]], noise)
    )
    assert_as_on_one(place, monkeypatch, found, [record["z"][0], torch.cat(record["z"][1:])], t, real, noise)


def test_a_teacher_in_parts_takes_one_step_an_update(place):
    whole, parts = trainer_in(place, TeacherTrainer), trainer_in(place, TeacherTrainer, run={"accumulate": 4})
    assert (whole.batch, parts.batch) == (16, 4)
    for trainer in (whole, parts):
        # One batch twice over, with the same draws for each part, is the mean of one.
        trainer.batches.next = lambda n=trainer.batch: (torch.ones(16, 2)[:n], None)
        object.__setattr__(trainer.path, "sample_time", lambda n, *_: torch.full((n,), 0.5))
        trainer.noise.next_key = lambda n=trainer.batch: torch.zeros(n, 2)
    (a,), (b,) = (gradients_of(trainer)["network"] for trainer in (whole, parts))
    assert whole.optimiser.steps == parts.optimiser.steps == 1
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_batch_that_does_not_divide_is_refused(place):
    with pytest.raises(UserError, match=r"distill\.batch 16 does not divide by 1 rank times run\.accumulate 3"):
        trainer_in(place, Distiller, run={"accumulate": 3})
    with pytest.raises(UserError, match=r"run\.accumulate must be 1 with run\.mode graphs"):
        config(place, run={"accumulate": 2, "mode": "graphs"})


def test_seeds_of_ranks_differ(monkeypatch):
    seeds = set()
    for rank in range(1024):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seeds |= {distributed.seed(common) for common in (0, 1, 2)}
    assert len(seeds) == 3 * 1024
    assert all(0 <= seed < 2**63 for seed in seeds)
    monkeypatch.undo()
    assert distributed.seed(7) == 7


@pytest.mark.parametrize("place", ["labelled images"], indirect=True)
def test_what_stands_beside_an_objective_is_averaged_over_ranks(place):
    """A critic and stored pairs, sharded and whole: after two updates each network is the same."""
    pairs.write(place / "pairs.safetensors", *torch.randn(2, 64, 1, 8, 8), torch.arange(64) % 10)
    gan = {"weight_fake": 1.0, "weight_generator": 2.0, "features": "digits", "loss": "hinge", "r1": 0.5}
    distill = {"objective": {"name": "dmd"}, "gan": gan, "regression": {"pairs": str(place / "pairs.safetensors")}}

    def work(rank):
        found = []
        for shard in (False, True):
            sections = {"path": {"match": "x0"}, "run": {"shard": shard, "channels_last": False}}
            trainer = trainer_in(place, Distiller, distill=distill, **sections)
            for _ in range(2):
                trainer.update()
            nets = trainer.generator, trainer.fake, trainer.critic
            found.append([[whole(p).detach().clone() for p in net.parameters()] for net in nets])
        return found

    ranks = on_ranks(place, 2, work)
    for mode in range(2):
        one, other = ([p for net in found[mode] for p in net] for found in ranks)
        assert all(map(torch.equal, one, other))
    for copies, shards in zip(*ranks[0], strict=True):
        for one, other in zip(copies, shards, strict=True):
            # Sums in another order; Adam divides a gradient by its size.
            assert torch.linalg.vector_norm(one - other) <= 1e-3 * torch.linalg.vector_norm(one) + 1e-5
