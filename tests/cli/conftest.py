"""A folder with what the command line takes, for its tests."""

import pytest
import torch
import yaml

from realuid_fast import teachers
from realuid_fast.networks import build

NETWORK = {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1, "num_classes": 10}
CONFIG = {
    "data": {"name": "digits"},
    "network": NETWORK,
    "teacher": {"batch": 8, "updates": 4, "ema": [0.9], "export": 0.9},
    "distill": {"batch": 8, "updates": 4, "fake_turns": 1, "ema": [0.9], "export": 0.9},
    "run": {"evaluate_every": 2, "evaluate_samples": 40, "tensorboard": False, "progress": False, "teacher_steps": 2},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a configuration, a teacher and a student in it, as the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = build(NETWORK)
    for role in teachers.ROLES:
        described = teachers.Description(
            NETWORK, role=role, data={"name": "digits"}, t_start=0.28, teacher="teacher.safetensors"
        )
        teachers.save(f"{role}.safetensors", net.state_dict(), described)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path
