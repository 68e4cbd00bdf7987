"""A whole command on the null GPU: data, updates, logs, evaluations between replays, checkpoints, and a resumed run."""

import warnings

from realuid_fast.train.logging import read_csv

from .. import helpers
from . import turns
from .alone import alone


def test_a_run_and_its_resumption(tmp_path):
    def run():
        teacher = helpers.save_teacher(tmp_path / "teacher.safetensors", helpers.UNET, {"name": "digits"})
        constant = {"warmup": 3, "decay": "constant"}
        sections = {
            "data": {"name": "digits"},
            "distill": {"updates": 12, "generator": constant},
            "run": {"device": "cuda", "mode": "graphs-eager"},
        }
        watched = turns.Watched()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that nobody computed
            helpers.run_in(tmp_path / "run", helpers.settings(teacher, **sections))
            sections["distill"]["updates"] = 20
            helpers.run_in(tmp_path / "run", helpers.settings(teacher, **sections), resume=True)
        watched.counted()
        return watched

    watched = alone(run)
    assert not watched.violations
    assert {name: len(captures) for name, captures in watched.recorded.items()} == {
        "generate_rows": 2,
        "fake_step_plain": 2,
        "generator_step_plain": 2,
    }
    assert [int(row["update"]) for row in read_csv(tmp_path / "run" / "log.csv")] == [5, 10, 12, 15, 20]
