"""Launches, copies and bytes of the CIFAR-10 recipe's networks, against the committed counts."""

import json

import pytest

from . import networks
from .alone import alone

COMMITTED = json.loads(networks.FILE.read_text())["ways"]["eager"]


@pytest.fixture(scope="module")
def found():
    return alone(networks.eager)


@pytest.mark.parametrize("turn", networks.TURNS)
def test_a_turn_launches_and_moves_what_is_committed(found, turn):
    assert found[turn] == COMMITTED[turn]
