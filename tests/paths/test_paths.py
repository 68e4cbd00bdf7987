"""Paths: coefficients against autograd and the published formulas, conversions, preconditioning, bad input."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast.paths import (
    COLUMNS,
    DDBMVE,
    DDBMVP,
    I2SB,
    ICFM,
    MATCH_SPACES,
    PREDICTIONS,
    VE,
    VP,
    BrownianBridge,
    DiscreteVP,
    FlowMatching,
    Linear,
    StochasticInterpolant,
    Trigonometric,
    VPCosine,
    custom,
)

ONE_SIDED = {
    "linear": Linear(),
    "linear-reversed": Linear(data_at=0),
    "flow-matching": FlowMatching(sigma=0.1),
    "flow-matching-0": FlowMatching(),
    "trigonometric": Trigonometric(),
    "vp": VP(),
    "vp-cosine": VPCosine(),
    "vp-discrete": DiscreteVP(),
    "vp-discrete-cosine": DiscreteVP(schedule="squaredcos_cap_v2", steps=50),
    "vp-discrete-table": DiscreteVP(alphas_cumprod=(0.9, 0.7, 0.3, 0.1, 0.02)),
    "ve": VE(),
    "custom": custom(lambda t: 1 - t**2, torch.sqrt, t_range=(0.05, 0.95)),
}
NOISELESS = {
    "i-cfm-0": ICFM(),
    "interpolant-zero": StochasticInterpolant(gamma="zero"),
}
TWO_SIDED = {
    "i-cfm": ICFM(sigma=0.3),
    "brownian": BrownianBridge(),
    "brownian-long": BrownianBridge(eps=0.7, T=2.5),
    "i2sb": I2SB(),
    "i2sb-1": I2SB(beta_max=1.0),
    "ddbm-ve": DDBMVE(covariance=0.1),
    "ddbm-ve-1": DDBMVE(sigma_max=1.0),
    "ddbm-vp": DDBMVP(sigma_end=0.7, covariance=-0.2),
    "interpolant-root": StochasticInterpolant(),
    "interpolant-parabola": StochasticInterpolant(gamma="parabola"),
    "interpolant-sin2": StochasticInterpolant(mix="trigonometric", gamma="sin2"),
    "custom-two-sided": custom(
        lambda t: t**2, lambda t: 0.1 + t * (1 - t), lambda t: 1 - t**2, da=lambda t: 2 * t, db=lambda t: -2 * t
    ),
}
PATHS = ONE_SIDED | NOISELESS | TWO_SIDED
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
one_sided_path = pytest.mark.parametrize("path", ONE_SIDED.values(), ids=ONE_SIDED.keys())
PAIRS = list(itertools.product(MATCH_SPACES, PREDICTIONS))


def permitted(path):
    """The pairs that DESIGN's mathematics allows, written down a second time."""
    if path in ONE_SIDED.values():
        return {(match, predict) for match, predict in PAIRS if predict != "residual"}
    if path in NOISELESS.values():
        return {("velocity", "velocity"), ("velocity", "x0"), ("x0", "x0"), ("x0", "velocity"), ("x0", "edm")}
    pairs = {("velocity", "velocity"), ("x0", "x0"), ("x0", "edm"), ("noise", "noise"), ("noise", "score")}
    return pairs | ({("x0", "residual")} if isinstance(path, (BrownianBridge, I2SB)) else set())


def times(path, n=33):
    """Inside the range, dense towards both ends, in float64."""
    low, high = path.t_range
    inward = torch.cat([torch.logspace(-4, -1, n // 2, dtype=torch.float64), torch.linspace(0.15, 0.5, n // 2)])
    return low + (high - low) * torch.cat([inward, 1 - inward]).sort().values


def columns(coef):
    return dict(zip(COLUMNS, coef.unbind(1), strict=True))


def derivative(function, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


def exact_values(path, t, x, y, n):
    """x_t and every quantity a network may predict, from their definitions."""
    a, b, c, da, db, dc = (column.squeeze() for column in (*path._scales(t), *path._rates(t)))
    x_t = a * x + b * y + c * n
    exact = {"velocity": da * x + db * y + dc * n, "x0": x, "noise": n, "score": -n / c, "v": a * n - c * x}
    exact |= {"vp": n, "ve": -n}
    edm = path.preconditioning(t)
    exact["edm"] = (x - edm.c_skip * x_t) / edm.c_out
    if isinstance(path, rf.paths.OneSidedPath):
        # The same without a difference of nearly equal numbers, which loses its digits where c is small.
        exact["edm"] = edm.c_in / path.sigma_data * (c * x - a * path.sigma_data**2 * n)
    if isinstance(path, BrownianBridge):
        exact["residual"] = (x_t - x) / torch.sqrt(path.eps * t)
    if isinstance(path, I2SB):
        exact["residual"] = (x_t - x) / torch.sqrt(c**2 / a)  # r = sqrt(g), c^2 = g h / g(T), a = h / g(T)
    return x_t, exact


@every_path
def test_rates_are_the_derivatives_of_scales(path):
    t = times(path)
    for index, rate in enumerate(path._rates(t)):
        expected = derivative(lambda t, index=index: path._scales(t)[index] + 0 * t, t)
        # 1e-11: where c goes to zero, autograd divides by its rounding.
        torch.testing.assert_close(rate, expected, rtol=1e-11, atol=1e-11)


@every_path
@pytest.mark.parametrize(("match", "predict"), PAIRS)
def test_exact_predictions_become_the_target(path, match, predict):
    """For every prediction, the exact value at x_t maps to the target in the match space."""
    t = times(path).clamp(*path.time_range("x0", "edm"))
    if (match, predict) not in permitted(path):
        with pytest.raises(rf.errors.UserError, match=r"(match|predict)[^ ]* (must not be|cannot be taken)"):
            path.coefficients(t, match, predict)
        return
    coef = columns(path.coefficients(t, match, predict))
    generator = torch.Generator().manual_seed(1)
    x, y, n = torch.randn(3, len(t), dtype=torch.float64, generator=generator)
    x_t, exact = exact_values(path, t, x, y, n)

    torch.testing.assert_close(coef["a"] * x + coef["b"] * y + coef["c"] * n, x_t)
    torch.testing.assert_close(coef["p"] * x + coef["q"] * y + coef["s"] * n, exact[match])
    found = coef["k_out"] * exact[predict] + coef["k_x"] * x_t
    # Two terms that may cancel: the bound is relative to their sizes.
    size = (coef["k_out"] * exact[predict]).abs() + (coef["k_x"] * x_t).abs() + exact[match].abs()
    assert ((found - exact[match]).abs() <= 1e-12 * (1 + size)).all()
    assert path.reads_x_t(match, predict) == bool((coef["k_x"] != 0).any())
    assert (coef["w"] == 1).all()


@one_sided_path
@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(MATCH_SPACES, 2)))
def test_conversions_there_and_back_are_the_identity(path, one, other):
    t = times(path).clamp(*path.time_range(one, other)).clamp(*path.time_range(other, one))
    there, back = columns(path.coefficients(t, one, other)), columns(path.coefficients(t, other, one))
    torch.testing.assert_close(there["k_out"] * back["k_out"], torch.ones_like(t), rtol=1e-12, atol=0)
    leftover = there["k_out"] * back["k_x"] + there["k_x"]
    assert (leftover.abs() <= 1e-12 * (1 + there["k_x"].abs())).all()


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_everything_is_finite_on_the_whole_range(path, dtype):
    low, high = path.t_range
    inward = torch.cat([torch.zeros(1), torch.logspace(-8, -0.4, 60, dtype=torch.float64)])
    t = (low + (high - low) * torch.cat([inward, 1 - inward])).to(dtype)
    for match, predict in permitted(path):
        weight = path.edm_weight if predict == "edm" else None
        coef = path.coefficients(t, match, predict, weight)
        assert torch.isfinite(coef).all(), (match, predict)
        assert torch.isfinite(path.network_time(t, predict)).all()
        assert torch.isfinite(path.network_input(torch.ones_like(t), t, predict)).all()


@every_path
def test_float32_coefficients_are_those_of_float64(path):
    t = times(path).float()
    for match, predict in permitted(path):
        found, expected = path.coefficients(t, match, predict), path.coefficients(t.double(), match, predict)
        # Scales and conversions to a few roundings of float32; 1 - t and its like are exact, so ends cost nothing.
        # Where a rate or a conversion crosses zero its error is that of the terms it is the sum of, of order one.
        bound = 3e-6 * expected.abs() + 1e-6
        assert ((found - expected).abs() <= bound).all(), (match, predict)


@every_path
def test_no_value_is_read_on_the_host(path):
    """Meta tensors hold no values, so whatever runs on them cannot stall a device."""
    t = path.sample_time(5, device="meta")
    for match, predict in permitted(path):
        assert path.coefficients(t, match, predict).shape == (5, 9)
        assert path.network_input(torch.empty(5, 3, 2, device="meta"), t, predict).shape == (5, 3, 2)
        assert path.network_time(t, predict).shape == (5,)


@every_path
def test_preconditioning_makes_input_and_target_unit_variance(path):
    """With the assumed second moments c_skip is the best linear guess of x and c_in, c_out are inverse deviations."""
    t = times(path).clamp(*path.time_range("x0", "edm"))
    a, b, c = path._scales(t)
    sx, sy, sxy = path.sigma_data**2, 0.0, 0.0
    if not isinstance(path, rf.paths.OneSidedPath):
        sy, sxy = path.sigma_end**2, path.covariance
    edm = path.preconditioning(t)
    variance = a**2 * sx + b**2 * sy + 2 * a * b * sxy + c**2
    torch.testing.assert_close(edm.c_in**2 * variance, torch.ones_like(t))
    covariance = a * sx + b * sxy
    torch.testing.assert_close(covariance - edm.c_skip * variance, torch.zeros_like(t), rtol=0, atol=1e-9)
    left = sx - 2 * edm.c_skip * covariance + edm.c_skip**2 * variance
    # The difference of nearly equal variances on the left loses digits where x_t tells almost all about x.
    torch.testing.assert_close(edm.c_out**2, left, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(path.edm_weight(t) * edm.c_out**2, torch.ones_like(t))


def test_edm_preconditioning_is_table_1():
    sigma, sd = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64), 0.4
    path = VE(sigma_data=sd)
    edm = path.preconditioning(sigma)
    total = sigma**2 + sd**2
    torch.testing.assert_close(edm.c_skip, sd**2 / total)
    torch.testing.assert_close(edm.c_out, sigma * sd / total.sqrt())
    torch.testing.assert_close(edm.c_in, 1 / total.sqrt())
    torch.testing.assert_close(edm.c_noise, sigma.log() / 4)
    torch.testing.assert_close(path.edm_weight(sigma), total / (sigma * sd) ** 2)
    torch.testing.assert_close(path.network_time(sigma, "edm"), sigma.log() / 4)
    torch.testing.assert_close(path.network_time(sigma, "ve"), (sigma / 2).log())
    x_t = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(path.network_input(x_t, sigma, "vp"), x_t / (1 + sigma**2).sqrt()[:, None, None])
    assert path.network_input(x_t, sigma, "x0") is x_t
    for predict, c_out in (("vp", -sigma), ("ve", sigma)):
        coef = columns(path.coefficients(sigma, "x0", predict))
        torch.testing.assert_close(coef["k_out"], c_out)
        torch.testing.assert_close(coef["k_x"], torch.ones_like(sigma))


def test_vp_network_time_on_its_own_path_is_the_time():
    """The "vp" preconditioning recovers the VP path's time from the noise level, whatever path that came from."""
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(VP().network_time(t, "vp"), 999 * t)
    a, c = VP().scales(t)
    torch.testing.assert_close(VE(sigma_max=1000.0).network_time(c / a, "vp"), 999 * t)


@one_sided_path
def test_preconditioned_networks_see_the_same_on_every_path(path):
    """At one noise level sigma = c / a all one-sided paths call an EDM network alike, and get the same x0 from it."""
    t = times(path).clamp(*path.time_range("x0", "edm"))
    a, c = path.scales(t)
    ve = VE(sigma_min=1e-9, sigma_max=1e9)
    x_t = torch.randn(len(t), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for predict in ("edm", "vp", "ve"):
        torch.testing.assert_close(path.network_time(t, predict), ve.network_time(c / a, predict))
        seen = ve.network_input(x_t / a[:, None], c / a, predict)
        torch.testing.assert_close(path.network_input(x_t, t, predict), seen)
        out = torch.sin(seen)
        data = [
            coef["k_out"][:, None] * out + coef["k_x"][:, None] * z
            for coef, z in (
                (columns(path.coefficients(t, "x0", predict)), x_t),
                (columns(ve.coefficients(c / a, "x0", predict)), x_t / a[:, None]),
            )
        ]
        torch.testing.assert_close(*data)


@pytest.mark.parametrize("name", [name for name in ONE_SIDED if name != "custom"])
def test_time_at_sigma_inverts_the_noise_level(name):
    path = ONE_SIDED[name]
    t = times(path)
    a, c = path.scales(t)
    # 1e-9: near the noise end the noise level of some barely moves with time, and its inverse amplifies rounding.
    torch.testing.assert_close(path.time_at_sigma(c / a), t, rtol=1e-9, atol=1e-12)
    # In float32 to some of its roundings, amplified alike.
    found = path.time_at_sigma((c / a).float())
    torch.testing.assert_close(found.double(), t, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_numbered_steps_are_the_table_and_their_number_what_the_network_sees(schedule):
    path = DiscreteVP(schedule=schedule, beta_start=0.00085, beta_end=0.012)
    k = torch.arange(1000, dtype=torch.float64)
    if schedule == "squaredcos_cap_v2":
        product = [1.0]
        for i in range(1000):
            after, before = (math.cos((j / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (i + 1, i))
            product.append(product[-1] * (1 - min(1 - after / before, 0.999)))
        table = torch.tensor(product[1:], dtype=torch.float64)
    else:
        power = 1 if schedule == "linear" else 2
        first, last = 0.00085 ** (1 / power), 0.012 ** (1 / power)
        table = torch.cumprod(1 - torch.linspace(first, last, 1000, dtype=torch.float64) ** power, 0)
    a, c = path.scales(k / 999)
    # 1e-10: a hundred roundings of k / 999 on the steepest step of the cosine schedule.
    torch.testing.assert_close(a**2, table, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(c**2, 1 - table, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(path.network_time(k / 999), k)
    same = DiscreteVP(alphas_cumprod=tuple(table.tolist()))
    t = torch.linspace(0, 1, 77)
    torch.testing.assert_close(same.coefficients(t, "x0", "v"), path.coefficients(t, "x0", "v"))
    # Between steps it falls monotonically, like the table.
    between = path.scales(torch.linspace(0, 1, 5000, dtype=torch.float64))[0]
    assert (between.diff() < 0).all()


def test_network_times_of_each_convention():
    t = torch.tensor([0.25, 0.5])
    assert torch.equal(Linear().network_time(t), t)
    assert torch.equal(Linear(data_at=0).network_time(t), 1000 * t)
    assert torch.equal(Linear(data_at=0, time_scale=1.0).network_time(t), t)
    assert torch.equal(VP().network_time(t, "noise"), 999 * t)
    torch.testing.assert_close(DDBMVP().network_time(t, "edm"), 250 * t.log())
    assert torch.equal(I2SB().network_time(t, "residual"), 1000 * t)


def test_reversed_linear_is_linear_with_time_turned_round():
    t = times(Linear())
    forward, backward = columns(Linear().coefficients(t)), columns(Linear(data_at=0).coefficients(1 - t))
    for name in ("a", "c"):
        torch.testing.assert_close(forward[name], backward[name])
    for name in ("p", "s"):
        torch.testing.assert_close(forward[name], -backward[name])


def test_vp_is_the_solution_of_its_sde():
    """E[x_t | x] and the variance obey d/dt mean = -beta/2 mean and d/dt var = beta (1 - var)."""
    t, path = times(VP()), VP(beta_min=0.3, beta_max=7.0)
    (a, c), (da, dc) = path.scales(t), path.rates(t)
    beta = 0.3 + 6.7 * t
    torch.testing.assert_close(da, -beta / 2 * a)
    torch.testing.assert_close(2 * c * dc, beta * (1 - c**2))
    torch.testing.assert_close(a**2 + c**2, torch.ones_like(t))


def test_vp_cosine_is_the_published_alpha_bar():
    t = torch.linspace(0.001, 0.999, 40, dtype=torch.float64)
    f = [torch.cos((v + 0.008) / 1.008 * math.pi / 2) ** 2 for v in (t, torch.zeros_like(t))]
    a, c = VPCosine().scales(t)
    torch.testing.assert_close(a**2, f[0] / f[1])
    torch.testing.assert_close(c**2, 1 - f[0] / f[1])


def test_i2sb_is_the_continuum_of_its_thousand_steps():
    steps = 1000
    beta = np.linspace(0.0001**0.5, (0.3 / steps) ** 0.5, steps) ** 2
    beta = np.concatenate([beta[: steps // 2], beta[: steps // 2][::-1]])
    forward, backward = np.cumsum(beta), np.cumsum(beta[::-1])[::-1]
    # After step i the sum holds i + 1 of the 1000 terms, the mirrored one 1000 - i: half a step either side.
    t = torch.from_numpy((np.arange(steps) + 0.5) / steps)
    a, b, c = I2SB().scales(t)
    expected = (backward, forward, np.sqrt(forward * backward * (forward + backward)))
    for found, value in zip((a, b, c), expected, strict=True):
        # At the ends c grows like a square root: that of half a step's variance, 0.1 / 2000, is 0.007.
        assert np.abs(found.numpy() - value / (forward + backward)).max() < 1.2e-2
    # Inside, half a step's variance is at most 0.19 / 2000 of a total of 0.14.
    inner = slice(50, -50)
    for found, value in zip((a, b, c), expected, strict=True):
        assert np.abs(found.numpy() - value / (forward + backward))[inner].max() < 1.5e-3


@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_ddbm_is_the_published_bridge(kind):
    """mean = (SNR_T/SNR_t) (alpha_t/alpha_T) y + alpha_t (1 - SNR_T/SNR_t) x, variance sigma_t^2 (1 - SNR_T/SNR_t)."""
    path = DDBMVE(sigma_max=3.0) if kind == "ve" else DDBMVP()
    t = times(path)
    end = torch.tensor(3.0 if kind == "ve" else 1.0, dtype=torch.float64)

    def schedule(t):
        if kind == "ve":
            return torch.ones_like(t), t
        log = 0.5 * 2.0 * t**2 + 0.1 * t
        return torch.exp(-log / 2), torch.sqrt(1 - torch.exp(-log))

    (alpha, sigma), (alpha_end, sigma_end) = schedule(t), schedule(end)
    ratio = (alpha_end / sigma_end) ** 2 / (alpha / sigma) ** 2
    a, b, c = path.scales(t)
    torch.testing.assert_close(b, ratio * alpha / alpha_end)
    # The published form cancels near the end; ours is the one without loss.
    torch.testing.assert_close(a, alpha * (1 - ratio), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c**2, sigma**2 * (1 - ratio), rtol=1e-9, atol=1e-9)


MOMENTS = {"x": (0.4, 0.8), "y": (-0.7, 1.3), "n": (0.0, 1.0)}


def posterior(path, t, x_t):
    """E[x | x_t] and E[v | x_t] for independent Gaussian ends, by conditioning a Gaussian vector on x_t."""
    g, rates = torch.stack(path._scales(t)), torch.stack(path._rates(t))
    mean = torch.tensor([m for m, _ in MOMENTS.values()], dtype=torch.float64)[:, None]
    variance = torch.tensor([s**2 for _, s in MOMENTS.values()], dtype=torch.float64)[:, None]
    gain = variance * g / (variance * g**2).sum(0)
    given = mean + gain * (x_t - (g * mean).sum(0))
    return given[0], (rates * given).sum(0), given[2]


@every_path
def test_gaussian_posteriors_against_quadrature(path):
    """Conditional means in closed form, by quadrature over the data, and through the path's own conversions."""
    low, high = path.t_range
    t = low + (high - low) * torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    if isinstance(path, (VE, DDBMVE)):
        t = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    scales, rates = (torch.stack(values)[..., None] for values in (path._scales(t), path._rates(t)))
    x_t = torch.tensor([-0.8, 0.2, 1.1], dtype=torch.float64)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(200))
    (mx, sx), (my, sy), _ = MOMENTS.values()
    x = mx + sx * nodes

    # Given x, x_t is Gaussian around a x + b E[y]; y and n are its linear regressions on what is left over.
    a, b, c = scales
    rest = x_t[:, None] - a * x - b * my
    spread = (b * sy) ** 2 + c**2
    likelihood = weights * torch.exp(-0.5 * rest**2 / spread)
    likelihood = likelihood / likelihood.sum(1, keepdim=True)
    y, n = my + b * sy**2 / spread * rest, c / spread * rest
    by_quadrature = {
        "x0": (likelihood * x).sum(1),
        "velocity": (likelihood * (rates[0] * x + rates[1] * y + rates[2] * n)).sum(1),
        "noise": (likelihood * n).sum(1),
    }
    closed = dict(zip(("x0", "velocity", "noise"), posterior(path, t, x_t), strict=True))
    for name, value in by_quadrature.items():
        torch.testing.assert_close(closed[name], value, rtol=1e-9, atol=1e-9)

    edm = path.preconditioning(t)
    mean = {
        "edm": (closed["x0"] - edm.c_skip * x_t) / edm.c_out,
        "vp": closed["noise"],
        "ve": -closed["noise"],
    } | closed
    a, b, c = (v.squeeze(-1) for v in scales)
    mean |= {"score": -closed["noise"] / c, "v": a * closed["noise"] - c * closed["x0"]}
    mean["residual"] = (x_t - closed["x0"]) / torch.sqrt(c**2 / a)
    for match, predict in permitted(path):
        coef = columns(path.coefficients(t, match, predict))
        torch.testing.assert_close(coef["k_out"] * mean[predict] + coef["k_x"] * x_t, closed[match])


def test_coefficients_dtype_and_weight():
    t = torch.rand(5, generator=torch.Generator().manual_seed(0))
    coef = Linear().coefficients(t, weight=lambda t: 1 + t)
    assert coef.dtype == torch.float32
    assert coef.shape == (5, 9)
    torch.testing.assert_close(coef[:, 8], 1 + t)
    assert Linear().coefficients(t.double()).dtype == torch.float64
    assert Linear().coefficients(t.bfloat16()).dtype == torch.float32


def test_singular_pairs_are_clipped_and_others_are_not():
    assert Linear().time_range() == (0.0, 1.0)
    assert Linear().time_range("velocity", "x0") == (0.0, 1 - 1e-4)
    assert Linear().time_range("velocity", "noise") == (1e-4, 1.0)
    assert Linear().time_range("x0", "edm") == (1e-4, 1 - 1e-4)
    assert Linear(data_at=0).time_range("velocity", "x0") == (1e-4, 1.0)
    assert ICFM().time_range("velocity", "x0") == (0.0, 1 - 1e-4)
    end = torch.ones(1, dtype=torch.float64)
    clipped = Linear().coefficients(end, "velocity", "x0")
    assert torch.equal(clipped, Linear().coefficients(end - 1e-4, "velocity", "x0"))


def test_custom_path_with_given_derivatives_is_the_named_one():
    by_hand = custom(lambda t: t, lambda t: 1 - t, da=torch.ones_like, dc=lambda t: -torch.ones_like(t))
    by_autograd = custom(lambda t: t, lambda t: 1 - t, sampler="stratified", sigma_data=0.7)
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    for match, predict in permitted(Linear()):
        if predict != "edm":
            expected = Linear().coefficients(t, match, predict)
            torch.testing.assert_close(by_hand.coefficients(t, match, predict), expected)
            torch.testing.assert_close(by_autograd.coefficients(t, match, predict), expected)
    expected = Linear(sigma_data=0.7).coefficients(t, "x0", "edm")
    torch.testing.assert_close(by_autograd.coefficients(t, "x0", "edm"), expected)


def test_every_named_path_builds_and_runs():
    for name, build in rf.paths.PATHS.items():
        path = build(sampler="stratified")
        coef = path.coefficients(path.sample_time(4, torch.Generator().manual_seed(0)), "x0", "x0")
        assert torch.isfinite(coef).all(), name


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: Linear().coefficients(torch.tensor([0.5, 1.5])),
            r"t must lie inside the path's range \[0, 1\], got values",
        ),
        (lambda: VP().coefficients(torch.zeros(1)), r"range \[1e-05, 1\], got values from 0 to 0"),
        (lambda: Linear().coefficients(torch.tensor([0.5, float("nan")])), "got NaN"),
        (lambda: Linear().coefficients(torch.tensor([[0.5]])), r"t must be a floating tensor of shape \(R,\)"),
        (lambda: Linear().coefficients(torch.tensor([1])), "t must be a floating tensor"),
        (lambda: Linear().coefficients(torch.rand(2), match="data"), "match must be one of velocity, x0, noise"),
        (lambda: Linear().coefficients(torch.rand(2), predict="data"), "predict must be one of"),
        (lambda: Linear().coefficients(torch.rand(2), weight=lambda t: t.sum()), "weight must return one value a row"),
        (lambda: Linear().network_time(torch.rand(2), "data"), "predict must be one of"),
        (lambda: Linear().reads_x_t("x0", "residual"), "predict must not be residual on Linear: only bridges"),
        (lambda: Linear(sampler="gauss"), "sampler must be a Sampler or one of uniform, stratified"),
        (lambda: Linear(sampler=3), "sampler must be a name or a Sampler, not 3"),
        (lambda: Linear(data_at=2), "data_at must be 0 or 1"),
        (lambda: Linear(time_scale=0.0), "time_scale must lie above 0, got 0"),
        (lambda: VE(sigma_data=float("nan")), "sigma_data must be a finite number"),
        (lambda: VE(sigma_data=np.float32(0.5)), r"sigma_data must be a finite number, .*: pass float\(sigma_data\)"),
        (lambda: VE(sigma_min=1.0, sigma_max=0.5), "sigma_max must lie above 1, got 0.5"),
        (lambda: VP(beta_max=0.05), "beta_max must lie above 0.1"),
        (lambda: VPCosine(offset="0"), "offset must be a finite number, not '0'"),
        (lambda: DiscreteVP(schedule="cosine"), "schedule must be one of linear, scaled_linear, squaredcos_cap_v2"),
        (lambda: DiscreteVP(steps=2), "steps must be a whole number from 3 to 100000, got 2"),
        (lambda: DiscreteVP(beta_end=1.0), "beta_end must lie between 0 and 1"),
        (lambda: DiscreteVP(alphas_cumprod=(0.9, 0.5, 0.5)), "alphas_cumprod must fall strictly"),
        (lambda: DiscreteVP(alphas_cumprod=(0.9, 0.5, 0.0)), r"stay inside \(0, 1\)"),
        (lambda: DiscreteVP(alphas_cumprod=(0.9, None, 0.0)), "alphas_cumprod must hold numbers"),
        (lambda: FlowMatching(sigma=1.0), r"sigma must lie in \[0, 1\), got 1"),
        (lambda: ICFM(sigma=-1.0), "sigma must not be negative"),
        (lambda: BrownianBridge(eps=0.0), "eps must lie above 0"),
        (lambda: DDBMVE(covariance=0.3), "covariance must not exceed sigma_data sigma_end = 0.25 in size, got 0.3"),
        (lambda: StochasticInterpolant(gamma="one"), "gamma must be one of root, parabola, sin2, zero"),
        (lambda: StochasticInterpolant(mix="one"), "mix must be linear or trigonometric"),
        (
            lambda: DDBMVP().coefficients(torch.rand(2), "velocity", "x0"),
            "predict='x0' cannot be taken into match='velocity' on DDBMVP: that needs the endpoint y",
        ),
        (lambda: StochasticInterpolant().coefficients(torch.rand(2), "x0", "residual"), "match='x0' takes x0, edm$"),
        (lambda: ICFM().coefficients(torch.rand(2), "noise", "noise"), "on ICFM with c = 0: x_t holds no noise"),
        (lambda: DDBMVP().network_time(torch.rand(2), "vp"), "predict must not be vp on DDBMVP"),
        (lambda: I2SB().time_at_sigma(torch.rand(2)), "I2SB has no noise level"),
        (lambda: custom(torch.sin, torch.cos, db=torch.cos), "db must not be given without b"),
        (lambda: custom(torch.sin, torch.cos, t_range=(1.0, 0.0)), "t_range must hold a lower and an upper time"),
        (lambda: custom(torch.sin, lambda t: 1.0), "c must return one value a time, as a tensor"),
        (lambda: custom(torch.sqrt, torch.cos), r"da must be finite on t_range \[0, 1\]: clip its ends off"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(rf.errors.UserError, match=sentence):
        call()


def test_coefficients_are_reached_by_name():
    x = torch.randn(5, 2, 3)
    rows = Linear().coefficients(torch.linspace(0.1, 0.9, 5), "velocity", "x0")
    numbers = rf.paths.Coefficients(rows)
    for name, column in columns(rows).items():
        assert torch.equal(getattr(numbers, name), column)
    assert torch.equal(numbers.scales, torch.stack([numbers.a, numbers.b, numbers.c], 1))
    assert rf.paths.Coefficients(rows, like=x).k_x.shape == (5, 1, 1)
    assert rf.paths.Coefficients(rows[2]).a == rows[2, COLUMNS.index("a")]
    # Each is a view: writing into it writes into the row, and the row's numbers cannot be replaced by others.
    numbers.w.mul_(3)
    assert torch.equal(rows[:, COLUMNS.index("w")], torch.full((5,), 3.0))
    with pytest.raises(AttributeError):
        numbers.w = torch.zeros(5)
    with pytest.raises(AttributeError, match="no number 'z', only a, b, c"):
        _ = numbers.z


def test_no_file_of_the_package_names_a_coefficient_by_its_place():
    """Columns have names in Python (``Coefficients``), Triton (constants) and C++ (an enum)."""
    root = Path(rf.__file__).resolve().parent.parent
    files = [file for folder in ("realuid_fast", "bench", "examples", "csrc") for file in (root / folder).rglob("*.*")]
    files = [file for file in (*files, *(root / "kernels").glob("*.py")) if file.suffix in (".py", ".h", ".cpp")]
    assert len(files) > 100
    bare = [
        r"coef\w*(\([^()]*\))?\[[^\]]*,\s*\[?\d",  # coef[:, 8], path.coefficients(t)[0, 6:8]
        r"coef\w*\[\d",  # coef[8] of a row in C++
        r"column\((coef_ptr|coef), [^)]*\b\d\b",  # column(coef_ptr, row, n_rows, 8, ...)
        r"coef_ptr \+ row \* \w+ \+ \d",
    ]
    for file in files:
        found = re.search("|".join(bare), file.read_text())
        assert found is None, f"{file.relative_to(root)}: {found and found.group()}"
