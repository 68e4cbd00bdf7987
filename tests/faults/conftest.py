"""Runs of a few updates, to which a fault is brought at a chosen moment."""

import resource

import pytest
import torch

from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import train
from realuid_fast.train.distill import Distiller

from ..helpers import POINTS, save_teacher


@pytest.fixture
def run(tmp_path):
    """Distils in a folder by name; keywords are settings of ``run``. The folder."""
    save_teacher(tmp_path / "teacher.safetensors")

    def start(name, resume=False, data=POINTS, teacher="teacher.safetensors", **settings):
        config = {
            "data": data,
            "distill": {
                "teacher": str(tmp_path / teacher),
                "batch": 8,
                "updates": 12,
                "fake_turns": 1,
                "ema": [0.9],
                "export": 0.9,
            },
            "run": {
                "log_every": 1,
                "evaluate_every": 4,
                "evaluate_samples": 20,
                "checkpoint_every": 5,
                "tensorboard": False,
                "progress": False,
                **settings,
            },
        }
        torch.manual_seed(0)
        train("distill", configs.from_mapping(config), tmp_path / name, resume, False, "")
        return tmp_path / name

    return start


@pytest.fixture
def after(monkeypatch):
    """Call something after the chosen update, once."""

    def prepare(step, act):
        update = Distiller.update

        def acting(self):
            update(self)
            if self.step == step:
                monkeypatch.setattr(Distiller, "update", update)
                act()

        monkeypatch.setattr(Distiller, "update", acting)

    return prepare


@pytest.fixture
def file_limit():
    """Files cannot grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
