"""Several ranks on gloo: a run shared out, its gradients, streams and checkpoints; a rank that dies under torchrun."""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, so that forked ranks need not
import yaml
from torch import nn

from realuid_fast import data, teachers
from realuid_fast.errors import UserError
from realuid_fast.networks import build
from realuid_fast.noise import normal
from realuid_fast.optim import FusedAdam, Optimiser
from realuid_fast.train import checkpoint, distill, distributed, regression, sharding
from realuid_fast.train import config as configs
from realuid_fast.train.checkpoint import Checkpoints, read
from realuid_fast.train.distill import Distiller
from realuid_fast.train.jobs import train
from realuid_fast.train.logging import read_csv
from realuid_fast.train.loop import Interrupted
from realuid_fast.train.regression import RegressionTrainer
from realuid_fast.train.teacher import TeacherTrainer

from . import helpers
from .helpers import MLP, POINTS, save_teacher

NETWORK = MLP
UNET = helpers.UNET | {"time_scale": 100.0, "attention_resolutions": [4]}
SHARD = {"shard": True}
DIGITS = {"name": "digits"}
# The network and the data of a test, by the name of the folder that it works in.
KINDS = {
    "points": (NETWORK, POINTS),
    "images": (UNET, DIGITS),
    "labelled images": (UNET | {"class_cond": True, "num_classes": 10}, DIGITS),
}


def config(place, /, **sections):
    network, points = KINDS[place.name]
    base = {
        "data": points,
        "network": network,
        "distill": {
            "teacher": str(place / "teacher.safetensors"),
            "batch": 16,
            "updates": 8,
            "fake_turns": 2,
            "ema": [0.9],
            "export": 0.9,
        },
        "teacher": {"batch": 16, "updates": 8, "ema": [0.9], "export": 0.9},
        "run": {
            "log_every": 2,
            "evaluate_every": 4,
            "evaluate_samples": 20,
            "checkpoint_every": 3,
            "tensorboard": False,
            "progress": False,
        },
    }
    return configs.from_mapping(configs.merge(base, sections))


@pytest.fixture
def place(tmp_path, request):
    """A folder named after one of :data:`KINDS`, the first unless a test asks for another, with a teacher in it."""
    place = tmp_path / getattr(request, "param", "points")
    place.mkdir()
    network, points = KINDS[place.name]
    save_teacher(place / "teacher.safetensors", network, points)
    # Here too, so that forked ranks find imported what these import: seconds for each rank otherwise.
    data.load(points)
    teachers.load(place / "teacher.safetensors")
    return place


def on_ranks(place, size, work):
    """Run ``work(rank)`` in forked processes that meet through a file; what each returned."""
    meeting = place / f"meeting-{time.monotonic_ns()}"
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
                torch.save(work(rank), f"{meeting}.{rank}")
                dist.destroy_process_group()
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * size
    return [torch.load(f"{meeting}.{rank}", weights_only=False) for rank in range(size)]


def trainer_in(place, cls, **sections):
    held = data.load(KINDS[place.name][1])
    if cls is TeacherTrainer:
        return TeacherTrainer(config(place, **sections), held)
    return Distiller(config(place, **sections), held, teachers.load(place / "teacher.safetensors"))


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


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_of(trainer):
    """The gradients that each optimiser of a trainer gets in an update, after the mean over ranks and parts."""
    found = {}
    for name, optimiser in trainer.optimisers.items():
        reduce = optimiser.adam.reduce

        def keep(given, name=name, reduce=reduce):
            if reduce is not None:
                reduce(given)
            found.setdefault(name, []).append([g.clone() for g in given])

        optimiser.adam.reduce = keep
    trainer.update()
    return found


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
    [("points", False, {}), ("images", False, {}), ("images", True, {}), ("points", False, GAN)],
    ids=["points", "images", "images-shard", "gan"],
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
        cls = RegressionTrainer if "regression" in distill else Distiller
        return cls(asked, data.load(POINTS), teachers.load(place / "teacher.safetensors"))

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
        return RegressionTrainer(asked, data.load(POINTS), teachers.load(place / "teacher.safetensors"))

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
        monkeypatch.setattr(distributed, "PIECE", least)
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(layers)))
        net.register_parameter("idle", nn.Parameter(torch.ones(3)))
        optimiser, found = Optimiser(net, 0.1), []
        optimiser.adam = FusedAdam(net.parameters(), 0.1, flat=flat)
        distributed.average(optimiser, parts)
        mean = optimiser.adam.reduce

        def keep(given):
            mean(given)
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


def test_an_error_of_one_rank_does_not_wait_for_a_group_that_cannot_end(monkeypatch):
    """NCCL's end waits for all ranks; what was stopped by a signal comes to it with all of them."""
    ended, left = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("group"))
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "_left", left)
    for backend, error, wanted in (
        ("cpu:gloo,cuda:nccl", UserError("the disk is full"), ([], ["cpu:gloo,cuda:nccl"])),
        ("cpu:gloo,cuda:nccl", Interrupted(15, Path("runs")), (["group"], [])),
        ("gloo", UserError("the disk is full"), (["group"], [])),
    ):
        ended.clear()
        left.clear()
        with pytest.raises(type(error)), distributed.group(backend):
            raise error
        assert (ended, left) == wanted
    monkeypatch.setattr(distributed, "_left", ["nccl"])
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code))
    distributed.leave(2)
    assert ended == ["group", 2]


def test_a_device_with_a_number_is_refused_where_ranks_have_their_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.device("cuda") == "cuda:1"
    assert distributed.device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"run\.device must be cuda .* got cuda:0"):
        distributed.device("cuda:0")


def test_pieces_are_neighbours_from_the_end():
    assert distributed.pieces([4, 4, 4, 4, 4], 8) == [slice(3, 5), slice(1, 3), slice(0, 1)]
    assert distributed.pieces([1, 9], 8) == [slice(1, 2), slice(0, 1)]
    assert distributed.pieces([9, 1], 100) == [slice(0, 2)]
    assert distributed.pieces([], 8) == []


def test_a_gradient_that_changes_after_it_has_set_out_is_noticed(place):
    def work(rank):
        net = nn.Linear(2, 1)
        optimiser = Optimiser(net, 0.1)
        distributed.average(optimiser)
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


def run_on_ranks(place, name, size, resume=False, job="distill", **sections):
    def work(rank):
        torch.manual_seed(0)
        train(job, config(place, **sections), place / name, resume, False, "")

    on_ranks(place, size, work)
    return place / name


def end_of(folder):
    clocks = {"images_per_second": 0.0, "seconds": 0.0}
    return (
        (folder / "student.safetensors").read_bytes(),
        (folder / "distances.csv").read_bytes(),
        [{**row, **clocks} for row in read_csv(folder / "log.csv")],
    )


def stopping(step):
    """A rank other than the first gets a signal in the middle of a log interval."""
    update = Distiller.update

    def stop(self):
        update(self)
        if self.step == step and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Distiller.update = stop
    return lambda: setattr(Distiller, "update", update)


@pytest.mark.parametrize(
    ("place", "shard", "ranks"),
    [("points", False, 4), ("points", True, 4), ("labelled images", True, 2)],
    ids=["points", "points-shard", "images-shard"],
    indirect=["place"],
)
def test_a_run_on_ranks_stops_together_and_resumes_on_as_many_or_fewer(place, shard, ranks):
    run, less = {"shard": shard}, {} if place.name == "points" else {"fake_turns": 1}
    straight = run_on_ranks(place, "straight", ranks, run=run, distill=less)
    undo = stopping(5)
    try:

        def work(rank):
            torch.manual_seed(0)
            with pytest.raises(train_interrupted(), match="SIGTERM"):
                train("distill", config(place, run=run, distill=less), place / "broken", False, False, "")

        on_ranks(place, ranks, work)
    finally:
        undo()
    broken = place / "broken"
    files = Checkpoints(broken / "checkpoints").files()
    # Asked after update 5, agreed at the next row of the log.
    assert [file.name for file in files] == ["update-00000003.pt", "update-00000006.pt"]
    assert len(read(files[-1])["ranks"]) == ranks
    for size in {ranks // 2, 1}:
        fewer = place / f"on{size}"
        subprocess.run(["cp", "-r", str(broken), str(fewer)], check=True)
        run_on_ranks(place, fewer.name, size, resume=True, run=run, distill=less)
        assert read(Checkpoints(fewer / "checkpoints").files()[-1])["trainer"]["step"] == 8
        assert [row["update"] for row in read_csv(fewer / "log.csv")] == [2, 4, 6, 8]
        assert len(read(Checkpoints(fewer / "checkpoints").files()[-1])["ranks"]) == size
    run_on_ranks(place, "broken", ranks, resume=True, run=run, distill=less)
    assert end_of(straight) == end_of(broken)


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


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"distill": {"generator": {"lr": 0.5}}}, r"distill\.generator\.lr is 0\.0\d* on rank 0 and 0\.5 on rank 1"),
        ({"distill": {"batch": 8}}, "distill.batch is 16 on rank 0 and 8 on rank 1"),
        # Rank 1 would wait in the collectives of a sharded network, the other in those of its batches.
        ({"run": SHARD}, "run.shard is False on rank 0 and True on rank 1"),
        ({"network": {"dropout": 0.1}}, "network.dropout is not there on rank 0 and 0.1 on rank 1"),
        ("train-teacher", "command is 'distill' on rank 0 and 'train-teacher' on rank 1"),
        ("resume", "--resume is False on rank 0 and True on rank 1"),
        ("code", r"realuid_fast is '\S+ \(\w+\)' on rank 0 and 'other' on rank 1"),
    ],
    ids=["rate", "batch", "shard", "network", "command", "resume", "code"],
)
@pytest.mark.parametrize("place", ["images"], indirect=True)
def test_ranks_with_different_settings_do_not_begin(place, sections, words, monkeypatch):
    def work(rank):
        asked, job = config(place, **(sections if rank and isinstance(sections, dict) else {})), "distill"
        if rank and sections == "code":
            monkeypatch.setattr(distributed, "_code", lambda: "other")
        if rank and sections == "train-teacher":
            job = sections
        with pytest.raises(UserError, match=words) as error:
            train(job, asked, place / "run", bool(rank and sections == "resume"), False, "")
        assert error.value.of_all_ranks
        return str(error.value)

    said, other = on_ranks(place, 2, work)
    assert said == other
    assert not (place / "run").exists()


def test_ranks_may_name_their_own_gpu(place):
    def work(rank):
        distributed.check_alike({"run": {"device": f"cuda:{rank}", "limit": float("nan"), "steps": [1, 2]}})
        return True

    assert on_ranks(place, 2, work) == [True, True]


def train_interrupted():
    from realuid_fast.train.loop import Interrupted

    return Interrupted


def test_a_group_leaves_no_thread_behind():
    """Threads of gloo that outlive it abort the process where they are still there while the interpreter winds up."""
    work = """
import os, torch, torch.distributed as dist
from realuid_fast.train import distributed

def threads():
    return [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]

with distributed.joined("cpu", alone=True):
    import torch.distributed.fsdp
    from torch.distributed.tensor import DTensor
    for _ in range(20):
        dist.all_reduce(torch.ones(1000), async_op=True).wait()
    assert any("gloo" in name for name in threads())
assert not [name for name in threads() if "gloo" in name], threads()
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize("shard", [False, True])
def test_a_killed_rank_ends_the_job_and_torchrun_goes_on(place, shard):
    sections = {"distill": {"updates": 150}, "run": {"evaluate_every": 0, "shard": shard}}
    (place / "c.yaml").write_text(yaml.safe_dump(configs.to_mapping(config(place, **sections))))
    out = place / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=3", "-m", "realuid_fast.cli", "distill", "--config", "c.yaml", "--out", str(out)]
    job = subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.poll() is None and not list(out.glob("checkpoints/update-*.pt")):
        time.sleep(0.01)
    first = json.loads((out / ".lock").read_text())["pid"]
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (other,) = (int(pid) for pid in children if int(pid) != first)
    os.kill(other, signal.SIGKILL)
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 0, said
    assert "Signal 9 (SIGKILL)" in said or "exitcode: -9" in said
    assert "lost another rank" in said
    assert [row["update"] for row in read_csv(out / "log.csv")][-1] == 150
    run_on_ranks(place, "straight", 2, **sections)
    state, expected = (
        read(Checkpoints(folder / "checkpoints").files()[-1])["trainer"]["generator"]
        for folder in (out, place / "straight")
    )
    assert all(torch.equal(state[name][:], tensor[:]) for name, tensor in expected.items())


# -- sharded networks


def wholes(trainer):
    """Every tensor of a trainer's state but the streams', whole, by its keys."""
    found = {}

    def walk(tree, keys):
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, (*keys, key))
            elif isinstance(value, torch.Tensor):
                found[*keys, key] = whole(value).clone()

    state = trainer.state_dict()
    walk({name: state[name] for name in ("generator", "fake", "generator_optimiser", "fake_optimiser")}, ())
    return found


def saved_by_ranks(place, size, shard):
    """A checkpoint after two updates on so many ranks, in a folder of its own, and the state that it holds."""
    folder = place / f"by{size}{shard}"

    def work(rank):
        trainer = trainer_in(place, Distiller, distill={"batch": 12}, run={"shard": shard})
        trainer.update()
        trainer.update()
        checkpoints = Checkpoints(folder, sharded=shard)
        if shard or rank == 0:
            checkpoints.save(2, {"trainer": trainer.state_dict()})
        checkpoints.close()
        return wholes(trainer)

    return folder, on_ranks(place, size, work)[0]


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
        saved = Checkpoints(folder).load()["trainer"]
        trainer.load_state_dict(sharding.taken(trainer.state_dict(), saved))
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


def held_bytes():
    """Bytes of all tensors that this process holds."""
    gc.collect()
    memory = {}
    for each in gc.get_objects():
        # Tensors that earlier tests of this process left behind may be sparse; those have no storage.
        if type(each) in (torch.Tensor, nn.Parameter) and each.layout is torch.strided:
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
        parts = {name: average[name][checkpoint.rows_of(len(average[name]), rank, 2)].clone() for name in average}
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
        assert len(sharding.parts(sharded)) > 10
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
            rows = [checkpoint.rows_of(length, rank, size) for rank in range(size)]
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
        offloaded = Distiller(asked, data.load(POINTS), teachers.load(place / "teacher.safetensors"))
        assert distributed.size() == 1
        assert not offloaded.sharded
        offloaded.update()
        assert all(hasattr(p, "to_local") for p in offloaded.teacher.parameters())
    assert not dist.is_initialized()
    for a, b in zip(plain.generator.parameters(), offloaded.generator.parameters(), strict=True):
        assert torch.equal(a, b)
