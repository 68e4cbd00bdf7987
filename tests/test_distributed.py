"""Several ranks on gloo: a run shared out, its gradients, streams and checkpoints; a rank that dies under torchrun."""

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
from realuid_fast.train import config as configs
from realuid_fast.train import distill, distributed, sharding
from realuid_fast.train.checkpoint import Checkpoints, read
from realuid_fast.train.distill import Distiller
from realuid_fast.train.jobs import train
from realuid_fast.train.logging import read_csv
from realuid_fast.train.teacher import TeacherTrainer

NETWORK = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
SHARD = {"shard": True}
POINTS = {"name": "eight_gaussians", "n": 200, "n_heldout": 50}


def config(place, /, **sections):
    base = {
        "data": POINTS,
        "network": NETWORK,
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
def place(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(NETWORK)
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
    teachers.save(tmp_path / "teacher.safetensors", net.state_dict(), teachers.Description(NETWORK, data=POINTS))
    return tmp_path


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
    held = data.load(POINTS)
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


def assert_as_on_one(place, monkeypatch, found, z, t, real, noise):
    """``found`` are the gradients that one process gets on the batches of 16 that the draws make up."""
    single, keys = trainer_in(place, Distiller), [None, noise[0], noise[1], None, noise[2]]
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


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_an_update_on_ranks_equals_one_on_the_concatenated_batch(place, size, shard, monkeypatch):
    def work(rank):
        trainer, record = trainer_in(place, Distiller, run={"shard": shard}), {}
        assert trainer.batch == 16 // size
        recorded(trainer, record)
        gradients = gradients_of(trainer)
        # The noise of the interpolants is what the keys that made no z stand for.
        like = torch.empty(trainer.batch, 2)
        record["n"] = [normal(key, like) for i, key in enumerate(record.pop("keys")) if i in (1, 2, 4)]
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
        values = torch.cat([record[name][0].flatten() for record, *_ in ranks])
        assert len(values.unique()) == len(values), name
    drawn = {name: [list(parts) for parts in zip(*(r[0][name] for r in ranks), strict=True)] for name in ranks[0][0]}
    # Samples of a rank's fake turns lie one after another: its first turn's rows belong to the first turn here.
    turns = [torch.cat([z[i * 16 // size :][: 16 // size] for z in drawn["z"][0]]) for i in range(2)]
    t, real, noise = ([torch.cat(parts) for parts in drawn[name]] for name in ("t", "real", "n"))
    z = [torch.cat(turns), torch.cat(drawn["z"][1])]
    assert_as_on_one(place, monkeypatch, gradients, z, t, real, noise)


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


def test_a_run_on_ranks_stops_together_and_resumes_on_as_many_or_fewer(place):
    straight = run_on_ranks(place, "straight", 4)
    undo = stopping(5)
    try:

        def work(rank):
            torch.manual_seed(0)
            with pytest.raises(train_interrupted(), match="SIGTERM"):
                train("distill", config(place), place / "broken", False, False, "")

        on_ranks(place, 4, work)
    finally:
        undo()
    broken = place / "broken"
    files = Checkpoints(broken / "checkpoints").files()
    # Asked after update 5, agreed at the next row of the log.
    assert [file.name for file in files] == ["update-00000003.pt", "update-00000006.pt"]
    assert len(read(files[-1])["ranks"]) == 4
    for size in (2, 1):
        fewer = place / f"on{size}"
        subprocess.run(["cp", "-r", str(broken), str(fewer)], check=True)
        run_on_ranks(place, fewer.name, size, resume=True)
        assert read(Checkpoints(fewer / "checkpoints").files()[-1])["trainer"]["step"] == 8
        assert [row["update"] for row in read_csv(fewer / "log.csv")] == [2, 4, 6, 8]
        assert len(read(Checkpoints(fewer / "checkpoints").files()[-1])["ranks"]) == size
    run_on_ranks(place, "broken", 4, resume=True)
    assert end_of(straight) == end_of(broken)


def student(folder):
    return torch.cat([p.flatten() for p in teachers.load(folder / "student.safetensors").net.parameters()])


@pytest.mark.parametrize("job", ["distill", "train-teacher"])
def test_a_sharded_run_ends_as_one_with_whole_copies(place, job):
    # With clip, accumulation, evaluation, pictures, and the average that is exported.
    sections = {"run": {"accumulate": 2, "sample_every": 4}}
    apart = run_on_ranks(place, "apart", 2, job=job, **configs.merge(sections, {"run": SHARD}))
    copies = run_on_ranks(place, "copies", 2, job=job, **sections)
    name = "student" if job == "distill" else "teacher"
    for file in (f"{name}.safetensors", "best.safetensors"):
        a, b = (list(teachers.load(folder / file).net.parameters()) for folder in (apart, copies))
        for one, other in zip(a, b, strict=True):
            # Eight steps on float32 gradients whose sums are in another order.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(read_csv(folder / "log.csv") for folder in (apart, copies)), strict=True):
        clocks = ("images_per_second", "seconds")
        assert {k: v for k, v in one.items() if k not in clocks} == pytest.approx(
            {k: v for k, v in other.items() if k not in clocks}, rel=1e-3
        )
    a, b = ([row["distance"] for row in read_csv(folder / "distances.csv")] for folder in (apart, copies))
    assert a == pytest.approx(b, rel=1e-3)


def train_interrupted():
    from realuid_fast.train.loop import Interrupted

    return Interrupted


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


def test_a_killed_rank_ends_the_job_and_torchrun_goes_on(place):
    (place / "c.yaml").write_text(
        yaml.safe_dump(configs.to_mapping(config(place, distill={"updates": 150}, run={"evaluate_every": 0})))
    )
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
    run_on_ranks(place, "straight", 2, distill={"updates": 150}, run={"evaluate_every": 0})
    state, expected = (
        read(Checkpoints(folder / "checkpoints").files()[-1])["trainer"]["generator"]
        for folder in (out, place / "straight")
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
