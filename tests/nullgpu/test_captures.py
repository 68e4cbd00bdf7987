"""Every mode of the trainers on the null GPU: captures that CUDA accepts, and updates that wait for nothing."""

import pytest
import torch

from realuid_fast.models import pairs

from . import device, turns
from .alone import alone

GUIDED = {
    "network": {"class_cond": True, "null_label": True},
    "distill": {"guidance": 2.0, "objective": {"name": "uid"}},
}
EDM = {
    "kind": "song-unet",
    "dim": [1, 8, 8],
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "label_dim": 10,
}
CASES = {
    "one class, fresh fake model": {
        "network": {"class_cond": False},
        "distill": {"fake_start": "fresh", "fake_turns": 3},
    },
    "bf16 and fp16": {"distill": {"fake_precision": "bf16", "generator_precision": "fp16"}},
    "tf32 and a bf16 teacher": {
        "distill": {"fake_precision": "tf32", "generator_precision": "tf32", "teacher_precision": "bf16"}
    },
    "discriminator": {"distill": {"gan": {"weight_fake": 3.0, "weight_generator": 2.0, "least_share": 0.2}}},
    "f-divergence": {
        "path": {"match": "x0"},
        "distill": {"objective": {"name": "dmd"}, "gan": {"weight_fake": 1.0}, "divergence": "forward-kl"},
    },
    "guided teacher": GUIDED,
    "labels of the batch, two steps": {"distill": {"labels": "batch", "times": [0.5, 0.75]}},
    "no fake model": {"path": {"match": "x0"}, "distill": {"objective": {"name": "sds"}}},
    "points": {"base": "mixture"},
    "a network of EDM": {"network": EDM, "distill": {"objective": {"name": "uid"}}},
    "sid": {"path": {"match": "x0"}, "distill": {"objective": {"name": "sid"}, "t_start": 0.5}},
    "heads on frozen features": {
        "path": {"match": "x0"},
        "network": {"class_cond": False},
        "distill": {
            "objective": {"name": "sds"},
            "gan": {"weight_fake": 1.0, "weight_generator": 1.0, "loss": "hinge", "features": "digits", "r1": 0.1},
        },
    },
    "stored pairs": {"network": {"class_cond": False}, "distill": {"regression": {"pairs": "FILE"}}},
    "real samples' own draws": {"distill": {"shared_draws": False}},
}
SMALL = {"distill": {"batch": 16, "updates": 100, "fake_turns": 2}}


def content(case, mode):
    return turns.configs.merge(turns.configs.merge(SMALL, case), {"run": {"mode": mode}})


def check_captures(found, names):
    """Captures of three generations: all turns, the same work each time, and a memory pool of its own."""
    assert not found["violations"]
    assert found["recorded"].keys() == names
    for name, (first, *others) in found["recorded"].items():
        assert first.total() > 10, name
        assert [first] * 2 == others, name
    pools = [set(found["pools"][i : i + len(names)]) for i in range(0, 3 * len(names), len(names))]
    assert [len(pool) for pool in pools] == [1, 1, 1]
    assert len(set.union(*pools)) == 3


@pytest.mark.parametrize("case", CASES)
def test_eager_networks_captured(case, tmp_path):
    made = content(CASES[case], "graphs-eager")
    if case == "stored pairs":
        file = tmp_path / "pairs.safetensors"
        pairs.write(file, torch.randn(64, 1, 8, 8), torch.randn(64, 1, 8, 8))
        made["distill"]["regression"]["pairs"] = str(file)
    found = alone(turns.run, made, tmp_path)
    names = {"generate_rows", "fake_step_plain", "generator_step_plain"}
    check_captures(found, {"generator_step_plain"} if case == "no fake model" else names)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["graphs", "compiled"])
def test_compiled_networks(mode, tmp_path):
    """With inductor's kernels counted and not compiled; on a network of one level, which takes a minute to write."""

    def run():
        device.inductor.install()
        both = turns.configs.merge(CASES["bf16 and fp16"], CASES["discriminator"])
        return turns.run(turns.configs.merge(content(both, mode), {"network": {"channel_mult": [1]}}), tmp_path)

    found = alone(run)
    if mode == "compiled":
        assert not found["violations"]
        assert not found["recorded"]
        assert found["update"]["inductor pointwise"] > 50
        return
    check_captures(found, {"generate_rows", "fake_step_plain", "generator_step_plain"})
    for names, *_ in found["recorded"].values():
        assert names["inductor pointwise"] > 5
        assert any(name.startswith("triton ") for name in names)


@pytest.mark.parametrize("case", ["one class, fresh fake model", "bf16 and fp16", "discriminator", "guided teacher"])
def test_an_eager_update_waits_for_nothing(case, tmp_path):
    found = alone(turns.run, content(CASES[case], "eager"), tmp_path)
    assert not found["violations"]
    assert not found["recorded"]
    assert found["update"].total() > 500


@pytest.mark.parametrize(
    ("job", "case"),
    [
        ("train-teacher", {"teacher": {"batch": 16, "label_dropout": 0.1}}),
        ("distill", {"distill": {"objective": {"name": "regression"}, "regression": {"steps": 3}}}),
    ],
    ids=["teacher", "regression"],
)
def test_trainers_of_one_turn_wait_for_nothing(job, case, tmp_path):
    found = alone(turns.run, content(case, "eager"), tmp_path, job)
    assert not found["violations"]
    assert found["update"].total() > 200
