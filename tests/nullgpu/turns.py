"""Trainers on the null GPU, and what their turns record when they are captured."""

from collections import Counter

import torch

from realuid_fast import data, teachers
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.jobs.networks import network_for
from realuid_fast.networks import build
from realuid_fast.train import modes
from realuid_fast.train.checkpoint import Checkpoints

from . import device


def ingredients(content, cifar=False):
    """The configuration, the data and a teacher for a trainer on the null GPU.

    Args:
        content: sections of a configuration, and the shipped one below them as ``base``, by default ``digits``.
        cifar: whether images of CIFAR-10's size stand in for the configured data.
    """
    content = configs.merge(content, {"run": {"device": "cuda"}})
    base = configs.to_mapping(configs.load(content.pop("base", "digits")))
    config = configs.from_mapping(configs.merge(base, content))
    if cifar:
        pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
        dataset = data.Dataset("cifar10", pixels, pixels[:8], torch.arange(512) % 10, torch.arange(8))
    else:
        dataset = data.load(config.data)
    network = network_for(config, dataset)
    return config, dataset, teachers.Model(build(network), teachers.Description(network, data=dataset.config))


def trainer(content, job="distill", cifar=False):
    """The trainer of a job, ``distill`` or ``train-teacher``, on :func:`ingredients`."""
    config, dataset, teacher = ingredients(content, cifar)
    return trainers.trainer(job, config, dataset, *([] if job == "train-teacher" else [teacher]))


class Watched:
    """Counts what every capture records, from now on, and what was refused at any time.

    Attributes:
        recorded: what the captures of a turn recorded, in their order, by the turn's name.
        violations: sentences.
    """

    def __init__(self):
        self.recorded, self.violations = {}, []
        plain = modes.CudaRecorder.capture

        def capture(recorder, turn):
            self.counted()
            result = plain(recorder, turn)
            self.recorded.setdefault(turn.__name__.strip("_"), []).append(self.counted().recorded)
            return result

        modes.CudaRecorder.capture = capture
        device.reset()

    def counted(self):
        """What was counted since the last call."""
        counts = device.counts()
        device.reset()
        self.violations += counts.violations
        return counts


def update(trainer, watched):
    """Launches of one update, in which nothing may wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    watched.counted()
    trainer.update()
    torch.cuda.set_sync_debug_mode("default")
    counts = watched.counted()
    waits = [name for name in counts.called if "Synchronize" in name or name == "cudaMemcpy"]
    assert not waits, waits
    return counts.done


def generation(trainer, watched):
    """Launches of an update after the warm-up and, in a mode that captures, after the captures."""
    for _ in range(modes.WARM_UP + 1):
        trainer.update()
    return update(trainer, watched)


def run(content, folder, job="distill", cifar=False):
    """Three generations of a trainer: from the start, after loading a checkpoint, and after forgetting its graphs.

    Results of the first generation are kept through the second.

    Returns:
        ``update``, the launches of a settled update; ``recorded``, those that the captures of each turn recorded, by
        the turn's name and the generation; ``pools``, the memory pool of every capture; and ``violations``.
    """
    torch.manual_seed(0)
    watched = Watched()
    made = trainer(content, job, cifar)
    updates = [generation(made, watched)]
    kept = [optimiser.norm for optimiser in made.optimisers.values()]
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"trainer": made.state_dict()})
    made.load_state_dict(checkpoints.load()["trainer"])
    updates.append(generation(made, watched))
    del kept
    made.forget_graphs()
    updates.append(generation(made, watched))
    assert updates[0] == updates[1] == updates[2]
    return {
        "update": updates[0],
        "recorded": watched.recorded,
        "pools": device.pools.taken,
        "violations": watched.violations,
    }


def once(content, job="distill", cifar=False):
    """The launches of the turns of a trainer and of its settled update, by name: the rows of a budget."""
    torch.manual_seed(0)
    watched = Watched()
    made = trainer(content, job, cifar)
    settled = generation(made, watched)
    assert not watched.violations, watched.violations
    rows = {name: recorded for name, (recorded,) in watched.recorded.items()}
    return {**rows, "update": Counter(settled)}
