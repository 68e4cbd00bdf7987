"""Samplers of times: their laws by Kolmogorov-Smirnov tests with fixed seeds, strata, ranges, bad input."""

import pytest
import torch
from scipy import stats

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.paths import DDBMVE, VE, VP, Linear, StochasticInterpolant, Trigonometric
from realuid_fast.paths.samplers import (
    SAMPLERS,
    Beta,
    Discrete,
    Karras,
    LogitNormal,
    LogNormal,
    Shifted,
    Uniform,
    build,
)

N = 8192


def fraction(t, path):
    low, high = path.t_range
    return (t.double() - low) / (high - low)


def noise_level(t, path):
    a, c = path.scales(t.double())
    return c / a


# Sampler, path, and the draws' distribution function under the stated law.
LAWS = {
    "uniform": (Uniform, Linear, lambda t, p: stats.uniform.cdf(fraction(t, p))),
    "uniform-ve": (Uniform, VE, lambda t, p: stats.uniform.cdf(fraction(t, p))),
    "logit-normal": (LogitNormal, Linear, lambda t, p: stats.norm.cdf(torch.logit(fraction(t, p)))),
    "logit-normal-0.5": (
        lambda **k: LogitNormal(0.5, 1.4, **k),
        StochasticInterpolant,
        lambda t, p: stats.norm.cdf(torch.logit(fraction(t, p)), 0.5, 1.4),
    ),
    "log-normal-ve": (LogNormal, VE, lambda t, p: stats.norm.cdf(t.double().log(), -1.2, 1.2)),
    "log-normal-vp": (LogNormal, VP, lambda t, p: stats.norm.cdf(noise_level(t, p).log(), -1.2, 1.2)),
    # Noise falls with time here, and so does the quantile.
    "log-normal-linear": (LogNormal, Linear, lambda t, p: stats.norm.cdf(noise_level(t, p).log(), -1.2, 1.2)),
    "karras": (
        Karras,
        VE,
        lambda t, p: (t.double() ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7)),
    ),
    "karras-0.8": (
        lambda **k: Karras(share=0.8, **k),
        VE,
        lambda t, p: (t.double() ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 0.8,
    ),
    "karras-5": (
        lambda **k: Karras(0.01, 50.0, 5.0, **k),
        Trigonometric,
        lambda t, p: (noise_level(t, p) ** 0.2 - 0.01**0.2) / (50**0.2 - 0.01**0.2),
    ),
    "shifted": (Shifted, lambda **k: Linear(data_at=0, **k), lambda t, p: fraction(t, p) / (3 - 2 * fraction(t, p))),
    "shifted-down": (
        lambda **k: Shifted(0.5, **k),
        Linear,
        lambda t, p: fraction(t, p) / (0.5 + 0.5 * fraction(t, p)),
    ),
}


@pytest.mark.parametrize(("sampler", "path", "law"), LAWS.values(), ids=LAWS.keys())
def test_draws_follow_their_law(sampler, path, law):
    path = path(sampler=sampler())
    t = path.sample_time(N, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert torch.equal(t, path.sample_time(N, torch.Generator().manual_seed(0)))
    low, high = path.t_range
    assert float(t.min()) >= float(torch.tensor(low))
    assert float(t.max()) <= float(torch.tensor(high))
    # One draw of a fixed seed: a right law fails at this level once in a thousand seeds, a wrong one always.
    assert stats.kstest(law(t, path), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("sampler", "path", "law"), LAWS.values(), ids=LAWS.keys())
def test_stratified_draws_put_one_in_every_bin(sampler, path, law):
    path = path(sampler=sampler(stratified=True))
    n = 512
    t = path.sample_time(n, torch.Generator().manual_seed(3))
    ranks = torch.as_tensor(law(t, path)).sort().values
    middles = (torch.arange(n) + 0.5) / n
    # Half a bin, and float32 rounding of the time carried through the distribution function.
    assert ((ranks - middles).abs() <= 0.5 / n + 2e-5).all()
    assert not torch.equal(t, t.sort().values)


@pytest.mark.parametrize(("a", "b"), [(2.0, 5.0), (0.5, 0.5), (1.0, 1.0)])
def test_beta_draws(a, b):
    t = VP(sampler=Beta(a, b)).sample_time(N, torch.Generator().manual_seed(1))
    assert stats.kstest(fraction(t, VP()), stats.beta(a, b).cdf).pvalue > 1e-3


def test_discrete_draws_every_time_of_the_table_equally():
    table = (0.125, 0.5, 0.75, 1.0)
    t = Linear(sampler=Discrete(table)).sample_time(N, torch.Generator().manual_seed(1))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == list(table)
    assert stats.chisquare(counts).pvalue > 1e-3
    stratified = Linear(sampler=Discrete(table, stratified=True)).sample_time(400, torch.Generator().manual_seed(1))
    assert stratified.unique(return_counts=True)[1].tolist() == [100] * 4


def test_names_are_samplers_and_keep_their_draws():
    """The two names that configurations used before samplers were classes draw what they always drew."""
    for name in SAMPLERS:
        assert torch.isfinite(VE(sampler=name).sample_time(16)).all()
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(64, generator=generator)
    assert torch.equal(Linear().sample_time(64, torch.Generator().manual_seed(0)), u)
    stratified = (torch.randperm(64, generator=generator) + u) / 64
    assert torch.equal(Linear(sampler="stratified").sample_time(64, torch.Generator().manual_seed(0)), stratified)


def test_noise_levels_outside_the_range_are_clipped_to_it():
    path = VE(sampler=LogNormal(mean=0.0, std=30.0))
    t = path.sample_time(1000, torch.Generator().manual_seed(0))
    low, high = (torch.tensor(end) for end in path.t_range)
    assert {float(low), float(high)} <= set(t.tolist())
    assert torch.isfinite(path.coefficients(t)).all()


def test_a_bridge_in_its_diffusions_time_takes_laws_of_the_noise_level():
    t = DDBMVE(sampler=Karras()).sample_time(N, torch.Generator().manual_seed(0))
    inside = t[t < t.max()].double() ** (1 / 7)
    assert stats.kstest((inside - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7)), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: LogitNormal(std=0.0), "std must lie above 0, got 0"),
        (lambda: LogNormal(mean="0"), "mean must be a finite number, not '0'"),
        (lambda: Karras(sigma_min=2.0, sigma_max=1.0), "sigma_max must lie above 2, got 1"),
        (lambda: Karras(share=1.5), "share must be at most 1, got 1.5"),
        (lambda: Shifted(-1.0), "shift must lie above 0"),
        (lambda: Beta(0.0, 1.0), "a must lie above 0"),
        (lambda: Discrete(), "times must hold at least one path time"),
        (lambda: Discrete((0.5, float("nan"))), r"times\[1\] must be a finite number"),
        (
            lambda: Linear(sampler=Discrete((0.5, 2.0))).sample_time(3),
            r"times must lie inside the path's range \[0, 1\]",
        ),
        (lambda: StochasticInterpolant(sampler="karras").sample_time(3), "StochasticInterpolant has no noise level"),
        (lambda: Linear(sampler="gauss"), "sampler must be a Sampler or one of uniform, stratified"),
    ],
)
def test_bad_numbers_get_a_sentence(call, sentence):
    with pytest.raises(rf.errors.UserError, match=sentence):
        call()


def test_samplers_by_name_and_numbers():
    assert build("stratified") == Uniform(stratified=True)
    assert build("log-normal", {"mean": 0.5, "stratified": True}) == LogNormal(0.5, 1.2, stratified=True)
    assert build("beta", {"a": 2.0}) == Beta(2.0, 1.0)
    assert build("discrete", {"times": [0.1, 0.2]}) == Discrete((0.1, 0.2))
    with pytest.raises(UserError, match="the sampler 'karras' has no setting 'mean'; it takes stratified, sigma_min"):
        build("karras", {"mean": 1.0})
    with pytest.raises(UserError, match="rho must lie above 0"):
        build("karras", {"rho": -1.0})
