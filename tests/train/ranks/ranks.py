"""Work on several gloo ranks in forked processes, and trainers and runs for it."""

import os
import signal
import sys
import time
import traceback

import torch
import torch._dynamo  # here, like fsdp, so that forked ranks need not: sharding imports it
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from realuid_fast import cli, data, teachers
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.jobs.train import train
from realuid_fast.train import distributed
from realuid_fast.train.distill import Distiller
from realuid_fast.train.logging import read_csv
from realuid_fast.train.teacher import TeacherTrainer

from ... import helpers
from ...helpers import MLP, POINTS

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
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * size
    return [torch.load(f"{meeting}.{rank}", weights_only=False) for rank in range(size)]


def torchrun(place, words, said, interpreters):
    """A process in which torchrun's agent runs the command on two ranks and starts them again: its number.

    Without ``interpreters`` the agent's process is forked from this one, and its ranks from it. So they need not import
    what this process has imported, which takes longer than all that they do.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(place)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        if interpreters:
            agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            agent += ["--max-restarts=3", "-m", "realuid_fast.cli"]
            os.execv(agent[0], [*agent, *words])
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        settings = LaunchConfig(
            1, 1, 2, run_id="forked", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
        )
        elastic_launch(settings, lambda: sys.exit(cli.main(words)))()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def trainer_in(place, cls, **sections):
    held = data.load(KINDS[place.name][1])
    if cls is TeacherTrainer:
        return trainers.teacher_trainer(config(place, **sections), held)
    return trainers.distiller(config(place, **sections), held, teachers.load(place / "teacher.safetensors"))


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
