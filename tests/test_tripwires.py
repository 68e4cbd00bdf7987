"""Tripwires in a loop of one's own: formulas, sums over updates, ranks, nothing read on the host, refusals."""

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.noise import normal
from realuid_fast.tripwires import MOST, Tripwires

PATH = rf.paths.Linear()


def turn(seed=0, rows=8, gap=0.1, dtype=torch.float32):
    """A drawn batch, a teacher's output and a fake model's, a share ``gap`` away from it."""
    torch.manual_seed(seed)
    x, teacher, away = torch.randn(3, rows, 3, 4, 4)
    draw = PATH.draw(x.to(dtype), rf.NoiseStream(seed).next_key())
    return draw, teacher.to(dtype), (teacher + gap * away).to(dtype)


def formulas(turns):
    """The numbers of some turns in float64, over all of them."""
    gaps, above, below, errors = [], torch.zeros(4).double(), torch.zeros(4).double(), torch.zeros(2).double()
    for draw, teacher, fake in turns:
        teacher, fake = teacher.double(), fake.double()
        gaps.append(float((fake - teacher).norm() / teacher.norm()))
        target = draw.x.double() - normal(draw.noise, draw.x.float()).double()
        errors += torch.stack([(out - target).square().sum() / len(draw.x) for out in (fake, teacher)])
        for i, t in enumerate(draw.t):
            above[int(4 * t)] += (fake - teacher)[i].norm()
            below[int(4 * t)] += teacher[i].norm()
    return [sum(gaps) / len(gaps), *(above / below).tolist(), float(errors[0] / errors[1])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_of_some_turns_are_their_formulas(dtype):
    wires, turns = Tripwires(), [turn(seed, rows, dtype=dtype) for seed, rows in ((0, 64), (1, 48))]
    for each in turns:
        wires.update(*each)
    reading = wires.fetch()
    assert reading.ready
    assert list(reading.values()) == list(wires.names)
    assert list(reading.values().values()) == pytest.approx(formulas(turns), rel=1e-4)
    # A reading keeps its numbers, and the sums start again.
    wires.update(*turns[0])
    assert list(wires.fetch().values().values()) == pytest.approx(formulas(turns[:1]), rel=1e-4)
    assert list(reading.values().values()) == pytest.approx(formulas(turns), rel=1e-4)
    assert all(value != value for value in wires.fetch().values().values())


def test_samples_are_compared_with_held_out_ones():
    held = torch.randn(8, 3, 4, 4)
    wires = Tripwires(heldout=held, batch=8)
    draw, teacher, fake = turn()
    wires.update(dataclasses.replace(draw, x=held.flip(0)), teacher, fake)
    assert wires.fetch().values()["sliced distance"] == pytest.approx(0, abs=1e-6)
    wires.update(dataclasses.replace(draw, x=held + 1), teacher, fake)
    assert 0.1 < wires.fetch().values()["sliced distance"] < 10
    # A large set costs no more than a bounded part of it.
    assert Tripwires(heldout=held.repeat(MOST, 1, 1, 1), batch=8)._quantiles.shape == (8, 64)


def test_a_precision_that_outgrows_the_gap_is_said():
    for precision, gap, concerned in (("bf16", 0.02, True), ("bf16", 0.5, False), ("float32", 0.02, False)):
        wires = Tripwires(precision=precision)
        wires.update(*turn(gap=gap))
        said = wires.fetch().concern()
        assert (said is not None) == concerned
    wires = Tripwires(precision="bf16")
    wires.update(*turn(gap=0.02))
    assert wires.fetch().concern().startswith("bf16 is too coarse: fake model and teacher differ by 1.8")


def test_other_ranks_sums_are_added_before_they_are_copied():
    """Of two ranks' sums, as ``torch.distributed.all_reduce`` would add them."""
    turns = [turn(0, 32), turn(1, 32)]
    one, other = Tripwires(), Tripwires()
    one.update(*turns[0])
    other.update(*turns[1])
    theirs = []
    other.fetch(theirs.append)
    found = one.fetch(lambda sums: sums.add_(theirs[0])).values()
    assert list(found.values()) == pytest.approx(formulas(turns), rel=1e-4)


def test_an_update_reads_nothing_on_the_host():
    """Tensors without numbers refuse to be read."""
    with FakeTensorMode():
        wires = Tripwires(heldout=torch.empty(20, 3, 4, 4), batch=8)
        for each in (turn(), turn(dtype=torch.bfloat16)):
            wires.update(*each)


def test_what_does_not_fit_is_named():
    draw, teacher, fake = turn()
    wires = Tripwires(heldout=draw.x, batch=8)
    real = PATH.draw(draw.x, draw.noise, real=draw.x)
    for call, words in (
        (lambda: wires.update(draw.x, teacher, fake), r"draw must be an Interpolant from path\.draw"),
        (lambda: wires.update(real, teacher, fake), "draw must hold no real rows"),
        (lambda: wires.update(draw, teacher[:3], fake), r"teacher_out must have shape \(8, 3, 4, 4\) .*\(3, 3, 4, 4\)"),
        (lambda: wires.update(draw, teacher, None), "fake_out must be a torch.Tensor, not NoneType"),
        (lambda: wires.update(*turn(rows=5)), "draw must hold 8 samples, the batch of the sliced distance, not 5"),
        (
            lambda: Tripwires(heldout=torch.zeros(5, 3), batch=8).update(draw, teacher, fake),
            r"draw must hold samples of shape \(3,\) like heldout, not \(3, 4, 4\)",
        ),
        (lambda: Tripwires(precision="half"), "precision must be one of float32, tf32, bf16, fp16; got 'half'"),
        (lambda: Tripwires(heldout=draw.x), "batch must be a whole number, not NoneType"),
        (lambda: Tripwires(heldout=draw.x, batch=0), "batch must be at least 1"),
        (lambda: Tripwires(device="nowhere"), "device must be a torch.device or the name of one"),
    ):
        with pytest.raises(UserError, match=words):
            call()
