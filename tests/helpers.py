"""Helpers of several test files: small networks and data, trainers of them, short runs and their results."""

import torch
from safetensors.torch import load_file

from realuid_fast import data, teachers
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.jobs import trainers
from realuid_fast.networks import build
from realuid_fast.train.logging import read_csv

MLP = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
LABELLED = {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1, "num_classes": 10}
NULL = {**LABELLED, "null_label": True}
SEEING = {**LABELLED, "endpoint": True}
UNET = {"kind": "unet", "dim": [1, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4}
POINTS = {"name": "eight_gaussians", "n": 200, "n_heldout": 50}
PAIRS = {"name": "digit_pairs"}


def random_network(network, std=0.3, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(network)
        for p in net.parameters():
            # Fresh networks return zero: give every parameter something to say.
            torch.nn.init.normal_(p, std=std)
    return net


def save_teacher(file, network=MLP, dataset=None):
    described = teachers.Description(network, data=dataset or POINTS)
    teachers.save(file, random_network(network).state_dict(), described)
    return file


def trainer_of(network, dataset, model=None, std=0.3, **sections):
    """The trainer that these sections of a configuration ask for. Unless ``model`` is given, its teacher is random."""
    held = data.load(dataset)
    model = model or teachers.Model(random_network(network, std), teachers.Description(network, data=held.config))
    config = configs.from_mapping({"data": held.config, **sections})
    return trainers.trainer("distill", config, held, model)


def settings(teacher_file, /, **sections):
    """A configuration of few updates, of every kind of job."""
    base = {
        "data": POINTS,
        "distill": {
            "teacher": str(teacher_file),
            "batch": 8,
            "updates": 12,
            "fake_turns": 2,
            "generator": {"warmup": 3, "decay": "cosine"},
            "ema": [0.9],
            "export": 0.9,
        },
        "teacher": {"batch": 8, "updates": 12, "ema": [0.9], "export": 0.9},
        "run": {
            "log_every": 5,
            "evaluate_every": 4,
            "evaluate_samples": 20,
            "checkpoint_every": 5,
            "tensorboard": False,
            "progress": False,
        },
    }
    return configs.merge(base, sections)


def distiller(network=UNET, dataset="digits", **sections):
    """A trainer by :func:`settings`."""
    content = settings("x", data=data.load(dataset).config, **sections)
    return trainer_of(network, content.pop("data"), **content)


def run_in(folder, config, resume=False, job="distill"):
    torch.manual_seed(0)
    return jobs.train(job, configs.from_mapping(config), folder, resume, False, "realuid-fast distill")[0]


def results(folder):
    """Everything of a run that must repeat: weights, distances, and the log without its clock."""
    log = [
        {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")}
        for row in read_csv(folder / "log.csv")
    ]
    (file,) = set(folder.glob("*.safetensors")) - {folder / "best.safetensors"}
    return load_file(str(file)), (folder / "distances.csv").read_text(), log


def assert_same(a, b):
    """Two :func:`results` are equal to the bit."""
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(tensor, b[0][name]) for name, tensor in a[0].items())
    assert a[1] == b[1]
    assert a[2] == b[2]


def drawn_again(trainer, state):
    """The real rows, their labels, the times, coefficients and key that a fake turn of 8 rows drew in ``state``."""
    trainer.draws.set_state(state["ranks"][0]["draws"])
    trainer.noise.load_state_dict(state["noise"])
    trainer.batches.load_state_dict(state["batches"])
    real, labels = trainer.batches.next()
    t = trainer.path.sample_time(8, trainer.draws)
    t = torch.cat([t, t if trainer.shared_draws else trainer.path.sample_time(8, trainer.draws)])
    return real, labels, t, trainer.path.coefficients(t), trainer.noise.next_key()
