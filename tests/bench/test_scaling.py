"""The scaling model: its parts by hand, its simulation against it, and the page that shows it."""

import multiprocessing

import pytest
import torch

from bench import ranks, report, scaling
from bench.scaling import H200, Job, Machine, all_reduce, cycle, simulate

SLOW = Machine("slow", operations=1e9, memory_bandwidth=1e9, memory=1e9, wires=1e6, network=1e5, node=2)


def test_an_all_reduce_by_hand():
    # Two GPUs of a node send each other half of it, twice.
    assert all_reduce(1e6, 2, SLOW, latency=0.0) == pytest.approx(1.0)
    # Two nodes: the same inside, and each GPU's half goes through its adapter, 2 (1/2) 5e5 / 1e5.
    assert all_reduce(1e6, 4, SLOW, latency=0.0) == pytest.approx(1.0 + 5.0)
    assert all_reduce(0.0, 8, SLOW, latency=1.0) == pytest.approx(2 * 3)


def test_operations_do_not_depend_on_the_layout(monkeypatch):
    found, zeros = scaling.count(), torch.zeros

    def laid_out(*size):
        return zeros(*size).contiguous(memory_format=torch.channels_last if len(size) == 4 else torch.contiguous_format)

    monkeypatch.setattr(torch, "zeros", laid_out)
    assert scaling.count() == found


def test_a_cycle_by_hand():
    job = Job(parameters=1000, forward=1e6, batch=10, fake_turns=2, averages=1)
    one = cycle(job, 1, SLOW)
    assert one.generate == pytest.approx(2 * 10 * 1e6 / 1e9)
    assert one.fake == pytest.approx(20 * 3 * 1e6 / 1e9)
    assert one.generator == pytest.approx(10 * 7 * 1e6 / 1e9)
    assert one.steps == pytest.approx(4 * 1000 * (2 * 6 + 8) / 1e9)
    assert one.total == one.compute == pytest.approx(0.02 + 2 * 0.06 + 0.07 + 8e-5)
    # A gradient of 4 kB goes round in one piece, which sets out when all of it is there.
    two = cycle(job, 2, SLOW, latency=0.0)
    assert two.total == two.one_after_another == pytest.approx(one.total + 3 * 4e3 / 1e6)
    assert cycle(job, 1, SLOW, share=0.5).fake == 2 * one.fake


def test_what_a_backward_pass_hides_by_hand(monkeypatch):
    # Four pieces of 1 s set out after 2, 4, 6 and 8 s: the last one is left. After 0.5, 1, 1.5 and 2 s: all but 1.5 s.
    assert scaling.exposed(4.0, 4, 8.0) == 1.0
    assert scaling.exposed(4.0, 4, 2.0) == 2.5
    assert scaling.exposed(4.0, 1, 8.0) == 4.0
    monkeypatch.setattr(scaling, "PIECE", 1000)
    job = Job(parameters=1000, forward=1e6, batch=10, fake_turns=2, averages=1)
    one, two = cycle(job, 1, SLOW), cycle(job, 2, SLOW, latency=1e-5)
    # 4 kB in four pieces, 1 ms and a message to and fro each; 40 and 20 ms of backward passes hide three of them.
    piece = 1e-3 + 2e-5
    assert two.all_reduce == pytest.approx(4 * piece)
    assert two.exposed == pytest.approx(3 * piece)
    assert two.total == pytest.approx(one.total + 3 * piece)
    assert two.one_after_another == pytest.approx(one.total + 12 * piece)


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


def test_the_page_shows_what_the_commands_print(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(scaling.PAGE.read_text())
    scaling.write(page, scaling.report())
    scaling.write(page, ranks.table(report.read(report.RESULTS / "ranks.json").extra["found"]), "ranks")
    assert page.read_text() == scaling.PAGE.read_text()
    for name in ("scaling", "ranks"):
        assert f"<!-- table: {name} -->" in page.read_text()


def test_what_is_measured_gives_the_models_inputs_back():
    # 20 us each way, 2 GB/s.
    points = [(4, 2 * 2e-5), (10**6, 2 * 2e-5 + 5e-4), (10**8, 2 * 2e-5 + 5e-2)]
    latency, bandwidth = ranks.fit(points)
    assert (latency, bandwidth) == pytest.approx((2e-5, 2e9))
    machine = Machine("two", operations=1e9, memory_bandwidth=1e9, memory=1e9, wires=bandwidth, network=1e5, node=2)
    for size, seconds in points[1:]:
        assert all_reduce(size, 2, machine, latency) == pytest.approx(seconds)
    found = ranks.summary(0.09, 0.1, 0.11, points)
    assert found["turns"] == 2
    assert found["expected_2"] == pytest.approx(0.1 + 2 * all_reduce(found["gradient"], 2, machine, latency))
    assert "the model expects" in ranks.table(found)


def test_ranks_are_timed(monkeypatch):
    # Forked ranks need not import what this process has imported.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(ranks.multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(ranks, "ROUNDS", 2)
    update, reduced = ranks.on_processes(2, (4, 4096), 0.0)
    assert update > 0
    assert len(reduced) == 2
    assert all(seconds > 0 for seconds in reduced)
