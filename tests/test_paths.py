"""Paths: coefficients against autograd, conversions against the formulas, bad input."""

import itertools

import pytest
import torch

import realuid_fast as rf
from realuid_fast.paths import COLUMNS, MATCH_SPACES, PREDICTIONS, Linear

PATHS = [Linear()]


def times(path, n=33):
    low, high = path.t_range
    return torch.linspace(low, high, n + 2, dtype=torch.float64)[1:-1]


def derivative(function, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_rates_are_the_derivatives_of_scales(path):
    t = times(path)
    for index in range(2):
        expected = derivative(lambda t, index=index: path.scales(t)[index], t)
        torch.testing.assert_close(path.rates(t)[index], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("match", "predict"), list(itertools.product(MATCH_SPACES, PREDICTIONS)))
def test_exact_predictions_become_the_target(path, match, predict):
    """Whatever the network predicts, its exact value at x_t maps to the target in the match space."""
    t = times(path)
    coef = dict(zip(COLUMNS, path.coefficients(t, match, predict).unbind(1), strict=True))
    generator = torch.Generator().manual_seed(1)
    x, n = torch.randn(2, len(t), dtype=torch.float64, generator=generator)
    (a, c), (da, dc) = path.scales(t), path.rates(t)
    x_t = a * x + c * n
    exact = {"velocity": da * x + dc * n, "x0": x, "noise": n, "score": -n / c}

    torch.testing.assert_close(coef["a"] * x + coef["c"] * n, x_t)
    torch.testing.assert_close(coef["p"] * x + coef["s"] * n, exact[match])
    # 1e-10: near the ends of time the conversions divide by a or c, at least 1/34 on this grid.
    torch.testing.assert_close(coef["k_out"] * exact[predict] + coef["k_x"] * x_t, exact[match], rtol=1e-10, atol=1e-10)
    assert path.reads_x_t(match, predict) == bool((coef["k_x"] != 0).any())
    assert (coef["b"] == 0).all()
    assert (coef["q"] == 0).all()
    assert (coef["w"] == 1).all()


def test_coefficients_dtype_and_weight():
    t = torch.rand(5)
    coef = Linear().coefficients(t, weight=lambda t: 1 + t)
    assert coef.dtype == torch.float32
    assert coef.shape == (5, 9)
    torch.testing.assert_close(coef[:, 8], 1 + t)
    assert Linear().coefficients(t.double()).dtype == torch.float64
    assert Linear().coefficients(t.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_time_samplers_are_uniform_and_follow_their_generator(sampler):
    path = Linear(sampler=sampler)
    t = path.sample_time(4096, torch.Generator().manual_seed(0))
    assert torch.equal(t, path.sample_time(4096, torch.Generator().manual_seed(0)))
    assert t.min() >= 0
    assert t.max() <= 1
    # Four standard errors of the mean of 4096 uniform draws; stratified draws do better.
    assert abs(t.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 64
    if sampler == "stratified":
        assert torch.equal((t * 4096).long().sort().values, torch.arange(4096))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda p: p.coefficients(torch.tensor([0.5, 1.5])),
            r"t must lie inside the path's range \[0, 1\], got values",
        ),
        (lambda p: p.coefficients(torch.tensor([0.5, float("nan")])), "got NaN"),
        (lambda p: p.coefficients(torch.tensor([[0.5]])), r"t must be a floating tensor of shape \(R,\)"),
        (lambda p: p.coefficients(torch.tensor([1])), "t must be a floating tensor"),
        (lambda p: p.coefficients(torch.rand(2), match="data"), "match must be one of velocity, x0, noise"),
        (lambda p: p.coefficients(torch.rand(2), predict="data"), "predict must be one of"),
        (lambda p: p.coefficients(torch.rand(2), weight=lambda t: t.sum()), "weight must return one value a row"),
        (lambda p: Linear(sampler="gauss").sample_time(3), "sampler must be 'uniform' or 'stratified'"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(rf.errors.UserError, match=sentence):
        call(Linear())
