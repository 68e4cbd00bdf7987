"""Launches of every turn and call by name, and the host time of the calls, against the committed budget."""

import json

import pytest

from . import budget
from .alone import alone

# Runs of one revision on two hardware threads, beside up to six busy processes, lay within a tenth of each other.
TOLERANCE = 1.3
BUDGET = json.loads(budget.FILE.read_text())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", budget.CASES)
def test_launches_of_turns(case):
    """To the launch: a new one is a change on purpose, or a mistake."""
    found = alone(budget.launches_of, case)
    assert found.keys() == BUDGET["launches"][case].keys()
    for turn, names in found.items():
        assert dict(names) == BUDGET["launches"][case][turn], turn


def test_launches_of_calls():
    assert alone(budget.launches_of_calls) == BUDGET["calls"]


def test_host_times():
    """Faster is no failure; ``make nullgpu-budget`` lowers the budget."""
    ratios, _ = alone(budget.host_times)
    assert ratios.keys() == BUDGET["host"].keys()
    slow = {name: (ratio, BUDGET["host"][name]) for name, ratio in ratios.items()}
    assert not {name: pair for name, pair in slow.items() if pair[0] > TOLERANCE * pair[1]}
