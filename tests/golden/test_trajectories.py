"""Short runs of every trainer end as they did: on a machine with committed hashes to the bit, elsewhere to 1e-4."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("golden_trajectories", Path(__file__).parent / "trajectories.py")
trajectories = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trajectories)


@pytest.mark.parametrize("name", trajectories.CASES)
def test_a_trajectory_is_the_committed_one(name):
    """To make numbers that change on purpose the expected ones: ``python tests/golden/trajectories.py --write``."""
    found = trajectories.computed(name)
    assert trajectories.differences(name, found) == []
    if trajectories.WIDER.get(name, 0) is None and trajectories.machine() not in trajectories.read(trajectories.HASHES):
        # Nothing is committed that this machine could be compared with: a second process must find the same.
        script = f"import sys, json, trajectories; print(json.dumps(trajectories.computed({name!r})))"
        again = subprocess.check_output([sys.executable, "-c", script], cwd=Path(__file__).parent, text=True)
        assert json.loads(again.splitlines()[-1]) == found


def test_every_case_is_committed_and_a_changed_number_is_named():
    logs = trajectories.read(trajectories.LOGS)
    assert set(logs) == set(trajectories.CASES)
    for hashes in trajectories.read(trajectories.HASHES).values():
        assert set(hashes) == set(trajectories.CASES)
    log = {column: list(values) for column, values in logs["points"].items()}
    log["gap"][-1] = str(float(log["gap"][-1]) + 1.1e-4 * max(map(float, log["gap"])))
    said = trajectories.differences("points", {"hashes": {}, "log": log})
    assert said[0].startswith("'gap' in log.csv is 1.1e-04 off")
    del log["gap"]
    said = trajectories.differences("points", {"hashes": {}, "log": log})
    assert said[0] == "log.csv has 0 rows of 'gap', not 4"
