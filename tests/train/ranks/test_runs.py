"""Runs on several ranks: stopped, resumed, killed under torchrun, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, so that forked ranks need not
import yaml

from realuid_fast.errors import UserError
from realuid_fast.jobs import alike
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import train
from realuid_fast.train import distributed
from realuid_fast.train.checkpoint import Checkpoints, read
from realuid_fast.train.hooks import Interrupted
from realuid_fast.train.logging import read_csv

from .ranks import SHARD, config, end_of, on_ranks, run_on_ranks, stopping, torchrun


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
    assert len(read(files[-1])["trainer"]["ranks"]) == ranks
    for size in {ranks // 2, 1}:
        fewer = place / f"on{size}"
        subprocess.run(["cp", "-r", str(broken), str(fewer)], check=True)
        run_on_ranks(place, fewer.name, size, resume=True, run=run, distill=less)
        assert read(Checkpoints(fewer / "checkpoints").files()[-1])["trainer"]["step"] == 8
        assert [row["update"] for row in read_csv(fewer / "log.csv")] == [2, 4, 6, 8]
        assert len(read(Checkpoints(fewer / "checkpoints").files()[-1])["trainer"]["ranks"]) == size
    run_on_ranks(place, "broken", ranks, resume=True, run=run, distill=less)
    assert end_of(straight) == end_of(broken)


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
            monkeypatch.setattr(alike, "_code", lambda: "other")
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
        alike.check_alike({"run": {"device": f"cuda:{rank}", "limit": float("nan"), "steps": [1, 2]}})
        return True

    assert on_ranks(place, 2, work) == [True, True]


def train_interrupted():
    from realuid_fast.train.hooks import Interrupted

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


# Enough updates that the job is still at work when it is killed. A sharded update takes ten times as long.
@pytest.mark.parametrize(("shard", "updates"), [(False, 100), (True, 16)])
def test_a_killed_rank_ends_the_job_and_torchrun_goes_on(place, shard, updates):
    sections = {"distill": {"updates": updates}, "run": {"evaluate_every": 0, "shard": shard}}
    (place / "c.yaml").write_text(yaml.safe_dump(configs.to_mapping(config(place, **sections))))
    out, said, deadline = place / "run", place / "said", time.monotonic() + 300
    words = ["distill", "--config", "c.yaml", "--out", str(out)]
    job = torchrun(place, words, said, interpreters=not shard)
    ended = 0
    while not (ended or list(out.glob("checkpoints/update-*.pt"))):
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.01)
        ended, _ = os.waitpid(job, os.WNOHANG)
    assert not ended, said.read_text()
    first = json.loads((out / ".lock").read_text())["pid"]
    children = Path(f"/proc/{job}/task/{job}/children").read_text().split()
    (other,) = (int(pid) for pid in children if int(pid) != first)
    os.kill(other, signal.SIGKILL)
    while not ended:
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.01)
        ended, status = os.waitpid(job, os.WNOHANG)
    assert os.waitstatus_to_exitcode(status) == 0, said.read_text()
    assert "lost another rank" in said.read_text()
    # The agent's own words go to the stream that its interpreter began with.
    assert shard or "Signal 9 (SIGKILL)" in said.read_text() or "exitcode: -9" in said.read_text()
    assert [row["update"] for row in read_csv(out / "log.csv")][-1] == updates
    run_on_ranks(place, "straight", 2, **sections)
    state, expected = (
        read(Checkpoints(folder / "checkpoints").files()[-1])["trainer"]["generator"]
        for folder in (out, place / "straight")
    )
    assert all(torch.equal(state[name][:], tensor[:]) for name, tensor in expected.items())
