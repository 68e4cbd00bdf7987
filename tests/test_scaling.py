"""The scaling model: its parts by hand, its simulation against it, and the page that shows it."""

import pytest

from bench import scaling
from bench.scaling import H200, Job, Machine, all_reduce, cycle, simulate

SLOW = Machine("slow", operations=1e9, memory_bandwidth=1e9, memory=1e9, wires=1e6, network=1e5, node=2)


def test_an_all_reduce_by_hand():
    # Two GPUs of a node send each other half of it, twice.
    assert all_reduce(1e6, 2, SLOW, latency=0.0) == pytest.approx(1.0)
    # Two nodes: the same inside, and each GPU's half goes through its adapter, 2 (1/2) 5e5 / 1e5.
    assert all_reduce(1e6, 4, SLOW, latency=0.0) == pytest.approx(1.0 + 5.0)
    assert all_reduce(0.0, 8, SLOW, latency=1.0) == pytest.approx(2 * 3)


def test_a_cycle_by_hand():
    job = Job(parameters=1000, forward=1e6, batch=10, fake_turns=2, averages=1)
    one = cycle(job, 1, SLOW)
    assert one.generate == pytest.approx(2 * 10 * 1e6 / 1e9)
    assert one.fake == pytest.approx(20 * 3 * 1e6 / 1e9)
    assert one.generator == pytest.approx(10 * 7 * 1e6 / 1e9)
    assert one.steps == pytest.approx(4 * 1000 * (2 * 6 + 8) / 1e9)
    assert one.total == one.compute == pytest.approx(0.02 + 2 * 0.06 + 0.07 + 8e-5)
    two = cycle(job, 2, SLOW, latency=0.0)
    assert two.total == pytest.approx(one.total + 3 * 4e3 / 1e6)
    assert cycle(job, 1, SLOW, share=0.5).fake == 2 * one.fake


def test_a_sharded_cycle_by_hand():
    job = Job(parameters=1000, forward=1e6, batch=10, fake_turns=2, averages=1)
    # Samples; two fake turns forward and back; the generator forward and back, teacher and fake model likewise.
    assert sum(job.passes()) == pytest.approx(job.generate + 2 * job.fake_turn + job.generator_turn)
    assert len(job.passes()) == 1 + 2 * 2 + 2 + 4
    assert job.sharded(4) == job.state / 4
    alone = cycle(job, 1, SLOW)
    assert scaling.sharded(job, 1, SLOW) == pytest.approx((alone.total, alone.total))
    # Two GPUs gather half of 4 kB for each of eleven passes, and scatter three gradients; a step takes half as long.
    hidden, bare = scaling.sharded(job, 2, SLOW, latency=0.0)
    moved = 2e3 / 1e6
    assert bare == pytest.approx(alone.compute - alone.steps / 2 + 14 * moved)
    # Every pass takes longer than what it gathers.
    assert hidden == pytest.approx(alone.compute - alone.steps / 2 + 3 * moved)


def test_the_simulation_is_the_model_where_ranks_are_alike_and_slower_where_not():
    job = Job(parameters=10**6, forward=1e9, batch=8, fake_turns=3)
    one = cycle(job, 16, H200)
    assert simulate(one, 16, spread=0.0, cycles=5) == pytest.approx(one.total)
    few, many = (simulate(one, gpus, spread=0.1, cycles=50) for gpus in (2, 256))
    assert one.total < few < many


def test_the_page_shows_what_the_command_prints(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(scaling.PAGE.read_text())
    scaling.write(page, scaling.report())
    assert page.read_text() == scaling.PAGE.read_text()
