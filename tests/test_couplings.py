"""Optimal-transport couplings: exact against all permutations, inside classes, bad input."""

import itertools
import sys

import pytest
import torch

import realuid_fast as rf
from realuid_fast.couplings import couple


def cost(x, y):
    return float(((x - y) ** 2).sum())


def pair(n, shape=(2, 3), seed=0, dtype=torch.float64):
    return torch.randn(2, n, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).unbind(0)


def is_permutation(j):
    return torch.equal(j.sort().values, torch.arange(len(j)))


@pytest.mark.parametrize("seed", range(4))
def test_no_permutation_is_cheaper(seed):
    x, y = pair(6, seed=seed)
    j = couple(x, y)
    assert j.dtype == torch.int64
    assert is_permutation(j)
    best = min(cost(x, y[list(p)]) for p in itertools.permutations(range(6)))
    assert cost(x, y[j]) == pytest.approx(best, rel=1e-12)


def test_on_a_line_the_coupling_is_the_sorted_one():
    x, y = pair(200, shape=(1,))
    j = couple(x, y)
    assert torch.equal(y[j][x[:, 0].argsort()], y.sort(0).values)


def test_far_from_the_origin_the_pairs_stay():
    """Distances as differences of large squares would lose the pairing in float32."""
    x, y = pair(50)
    expected = couple(x, y)
    assert torch.equal(couple((x + 300).float(), (y - 500).float()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_solved_in_float32(dtype):
    x, y = (v.to(dtype) for v in pair(40))
    assert torch.equal(couple(x, y), couple(x.double(), y.double()))


@pytest.mark.parametrize("seed", range(3))
def test_pairs_form_inside_classes_and_are_best_there(seed):
    x, y = pair(7, seed=seed)
    labels = torch.tensor([0, 2, 0, 1, 2, 2, 0])
    j = couple(x, y, labels)
    assert is_permutation(j)
    assert torch.equal(labels[j], labels)
    allowed = (p for p in itertools.permutations(range(7)) if torch.equal(labels[list(p)], labels))
    assert cost(x, y[j]) == pytest.approx(min(cost(x, y[list(p)]) for p in allowed), rel=1e-12)
    assert cost(x, y[couple(x, y)]) <= cost(x, y[j])


def test_coupled_noise_straightens_a_flow():
    """The purpose of a coupling: two random draws agree better after it, and the noise is still the same numbers."""
    x, n = pair(128)
    j = couple(x, n)
    assert cost(x, n[j]) < 0.7 * cost(x, n)
    path = rf.paths.ICFM()
    coef = path.coefficients(torch.full((128,), 0.5, dtype=torch.float64))
    x_t = rf.interpolate(x, coef, torch.zeros_like(x), endpoint=n[j])
    torch.testing.assert_close(x_t, (x + n[j]) / 2)


def test_empty_and_single_batches():
    assert couple(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    assert couple(torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([4])).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x, y: couple(x, y[:3]),
            r"y must be like x, torch.float64 of shape \(5, 2, 3\) on cpu, not .*\(3, 2, 3\)",
        ),
        (lambda x, y: couple(x, y.float()), "y must be like x"),
        (lambda x, y: couple(x.long(), y), "x must be a floating batch"),
        (lambda x, y: couple(x, y, torch.zeros(4)), r"labels must have shape \(5,\) on cpu, not \(4,\) on cpu"),
        (lambda x, y: couple(x * float("nan"), y), "x and y must be finite to be coupled"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(rf.errors.UserError, match=sentence):
        call(*pair(5))


def test_a_missing_solver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    sentence = r"scipy is not installed: run pip install 'realuid-fast\[train\]'"
    with pytest.raises(rf.errors.UserError, match=sentence):
        couple(*pair(3))
