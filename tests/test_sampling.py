"""Sampling: orders of convergence on a closed form, the generator as one Euler step, errors."""

import itertools
import math

import pytest
import torch
from torch import nn

from realuid_fast import paths, sampling
from realuid_fast.errors import UserError
from realuid_fast.models import solvers
from realuid_fast.models.few_steps import FewSteps
from realuid_fast.models.halving import Halving
from realuid_fast.networks import build
from realuid_fast.noise import NoiseStream, normal


class GaussianVelocity(nn.Module):
    """Exact velocity of the linear path for data N(m, s^2): E[x - n | x_t]."""

    def __init__(self, mean=1.5, std=0.5):
        super().__init__()
        self.mean, self.std, self.calls = mean, std, 0

    def forward(self, t, x, y=None):
        self.calls += 1
        t = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        variance = t**2 * self.std**2 + (1 - t) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / variance * (x - t * self.mean)


def test_solvers_converge_at_their_order():
    """The flow of a Gaussian maps noise n to mean + std n."""
    net, noise = GaussianVelocity(), torch.randn(50, 3, dtype=torch.float64)
    exact = net.mean + net.std * noise
    error = {
        (solver, steps): (sampling.integrate(net, noise, steps, solver) - exact).abs().max().item()
        for solver in ("euler", "heun", "midpoint", "ddim")
        for steps in (64, 128)
    }
    assert math.log2(error["euler", 64] / error["euler", 128]) == pytest.approx(1, abs=0.15)
    assert math.log2(error["heun", 64] / error["heun", 128]) == pytest.approx(2, abs=0.3)
    # On this flow the term of second order happens to vanish for the midpoint rule.
    assert math.log2(error["midpoint", 64] / error["midpoint", 128]) > 1.7
    assert error["heun", 64] < error["euler", 128]
    # On the linear path a step of DDIM is one of Euler.
    assert error["ddim", 64] == pytest.approx(error["euler", 64], rel=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "ddim"])
def test_evaluations_are_counted(solver):
    net = GaussianVelocity()
    sampling.integrate(net, torch.randn(4, 2), 5, solver)
    assert net.calls == sampling.evaluations(5, solver)


@pytest.mark.parametrize("t_start", [0.0, 0.28])
def test_one_step_is_one_euler_step(t_start):
    net, z = GaussianVelocity(), torch.randn(6, 1, 4, 4)
    expected = sampling.integrate(net, (1 - t_start) * z, 1, t_start=t_start)
    torch.testing.assert_close(sampling.one_step(net, z, t_start), expected)
    assert net.calls == 2


def test_one_step_carries_gradients_and_labels():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 2))

        def forward(self, t, x, y=None):
            return self.table[y] - x

    net, y = Labelled(), torch.tensor([0, 2])
    sampling.one_step(net, torch.randn(2, 2), 0.5, y).sum().backward()
    assert torch.equal(net.table.grad, torch.tensor([[0.5, 0.5], [0, 0], [0.5, 0.5]]))
    assert torch.equal(sampling.integrate(net, torch.randn(2, 2), 1, labels=y), torch.zeros(2, 2))


MEAN, STD = 0.4, 0.6
FIRST_MEAN, FIRST_STD = -0.7, 1.1  # of the endpoint, where the path has one


class Posterior(nn.Module):
    """A perfect network: the expectation of its native prediction for Gaussian data (and endpoint), called as such."""

    def __init__(self, path, predict):
        super().__init__()
        self.path, self.predict, self.calls = path, predict, 0

    def time(self, called_with):
        if self.predict not in paths.base.PRECONDITIONED or not isinstance(self.path, paths.OneSidedPath):
            return called_with / self.path.network_time(torch.ones(1, dtype=torch.float64), "x0")
        if self.predict == "vp":
            t = called_with / 999
            sigma = torch.sqrt(torch.expm1(0.1 * t + 9.95 * t**2))
        else:
            sigma = torch.exp(4 * called_with) if self.predict == "edm" else 2 * torch.exp(called_with)
        return self.path.time_at_sigma(sigma)

    def forward(self, time, x_in, y=None):
        self.calls += 1
        assert time.shape == (len(x_in),)
        low, high = self.path.t_range
        t = self.time(time[:1].double()).clamp(low, high)
        x_t = x_in.double() / self.path.network_input(torch.ones(1, 1).double(), t, self.predict)
        match = "velocity" if sampling.follows_flow(self.path, self.predict) else "x0"
        a, b, c, p, q, s, k_out, k_x, _ = self.path.coefficients(t, match, self.predict)[0]
        mean, variance = a * MEAN + b * FIRST_MEAN, (a * STD) ** 2 + (b * FIRST_STD) ** 2 + c**2
        covariance = p * a * STD**2 + q * b * FIRST_STD**2 + s * c
        target = p * MEAN + q * FIRST_MEAN + covariance / variance * (x_t - mean)
        return ((target - k_x * x_t) / k_out).to(x_in.dtype)


PATHS = {
    "linear": paths.Linear(),
    "linear, data at 0": paths.Linear(data_at=0),
    "flow matching": paths.FlowMatching(sigma=0.1),
    "trigonometric": paths.Trigonometric(),
    "vp": paths.VP(),
    "vp cosine": paths.VPCosine(),
    "ve": paths.VE(),
}
TWO_SIDED_FLOWS = {
    "i-cfm": paths.ICFM(sigma=0.3),
    "i-cfm without noise": paths.ICFM(),
    "bridge": paths.BrownianBridge(eps=0.5),
    "interpolant": paths.StochasticInterpolant(),
    "interpolant, sin2": paths.StochasticInterpolant(gamma="sin2", mix="trigonometric"),
}


def transported(path, start):
    """The state at the data's end to which the exact flow of Gaussians takes a state at the path's start."""
    times = sampling.ends(path)
    where = []
    for t in times:
        a, b, c = path.coefficients(torch.tensor([t], dtype=torch.float64), "x0", "x0")[0, :3].tolist()
        mean = a * MEAN + b * FIRST_MEAN
        where.append((mean, math.sqrt((a * STD) ** 2 + (b * FIRST_STD) ** 2 + c**2)))
    (m0, s0), (m1, s1) = where
    return m1 + s1 / s0 * (start - m0)


@pytest.mark.parametrize("name", PATHS)
def test_every_prediction_follows_the_exact_flow_of_gaussians(name):
    """From noise to data in closed form, up to 3.5 deviations of noise out.

    At 80 steps Heun's error is below 2 % of the data's deviation everywhere; Euler's, of first order, below 15 %.
    """
    path, noise = PATHS[name], torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = sampling.ends(path).start
    c = path.coefficients(torch.tensor([start], dtype=torch.float64), "x0", "x0")[0, 2]
    for predict in [p for p in paths.PREDICTIONS if p != "residual"]:
        net = Posterior(path, predict)
        second = (("heun", 0.02), ("midpoint", 0.02), ("ddim", 0.15))
        for solver, most in (("euler", 0.15), *second)[predict != "velocity" :]:
            net.calls = 0
            made = sampling.integrate(net, noise, 80, solver, path=path, predict=predict)
            assert net.calls == sampling.evaluations(80, solver, path, predict)
            assert (made - transported(path, c * noise)).abs().max() < most * STD, (predict, solver)


@pytest.mark.parametrize("name", TWO_SIDED_FLOWS)
def test_velocities_between_two_gaussians_follow_the_exact_flow(name):
    path, generator = TWO_SIDED_FLOWS[name], torch.Generator().manual_seed(0)
    noise, y = torch.randn(2, 20, 3, generator=generator, dtype=torch.float64)
    y = FIRST_MEAN + FIRST_STD * y
    start = torch.tensor([sampling.ends(path).start], dtype=torch.float64)
    _, b, c = path.coefficients(start, "x0", "x0")[0, :3]
    made = sampling.integrate(Posterior(path, "velocity"), noise, 80, "heun", path=path, endpoint=y)
    assert (made - transported(path, b * y + c * noise)).abs().max() < 0.02 * STD


@pytest.mark.parametrize(
    "path", [paths.BrownianBridge(eps=0.5), paths.I2SB(), paths.DDBMVP(), paths.DDBMVE(sigma_max=1.0)], ids=str
)
def test_bridges_walk_from_endpoints_to_the_law_of_the_data(path):
    """Independent Gaussian ends: the stochastic walk arrives at the data's mean and deviation.

    8000 x 3 samples have a standard error of 0.004; 60 steps leave a few per cent.
    """
    generator = torch.Generator().manual_seed(0)
    noise, y = torch.randn(2, 8000, 3, generator=generator)
    y = FIRST_MEAN + FIRST_STD * y
    for predict in ("x0", "residual") if isinstance(path, paths.Bridge) else ("x0",):
        made = sampling.integrate(Posterior(path, predict), noise, 60, path=path, predict=predict, endpoint=y)
        assert float(made.mean()) == pytest.approx(MEAN, abs=0.03)
        assert float(made.std()) == pytest.approx(STD, rel=0.06)


class Seeing(nn.Module):
    """The exact prediction of Gaussian data from ``x_t`` and the endpoint, in float64."""

    endpoint = True

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, t, x, labels, y):
        a, b, c = (scale[:, None] for scale in self.path.scales(t.double()))
        # At t = 0 the state is the endpoint, and says nothing.
        variance = (a**2 * STD**2 + c**2).clamp(min=1e-300)
        return MEAN + a * STD**2 / variance * (x - a * MEAN - b * y)


@pytest.mark.parametrize("mix", ["linear", "trigonometric"])
@pytest.mark.parametrize("gamma", ["parabola", "sin2"])
def test_interpolants_walk_to_the_law_of_the_data_given_the_endpoint(mix, gamma):
    """With ``sin2`` the noise falls faster than the endpoint's share: 100 steps leave 2.5 % of the data's deviation."""
    path, y = paths.StochasticInterpolant(mix=mix, gamma=gamma), torch.full((20000, 1), -0.5, dtype=torch.float64)
    noise = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = sampling.integrate(Seeing(path), noise, 100, path=path, predict="x0", endpoint=y)
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(made.std()) == pytest.approx(STD, rel=0.04)
    if gamma == "sin2":
        with pytest.raises(UserError, match="net must take the endpoint"):
            sampling.integrate(Posterior(path, "x0"), noise, 100, path=path, predict="x0", endpoint=y)


class Nothing(nn.Module):
    def forward(self, t, x, y=None):
        return torch.zeros_like(x)


def test_rounding_puts_no_step_outside_the_paths_range():
    """Ends whose seventh root and seventh power, or whose shift, used to be rounded out of the range."""
    net, z, few = Nothing(), torch.randn(2, 2), {"predict": "edm"}
    for high in (3.0, 10.0, 14.3):
        for solver in ("ddim", "dpmpp"):
            sampling.integrate(net, z, 18, solver, path=paths.VE(sigma_max=high), **few)
        Halving(net, 4, paths.VE(sigma_max=high), "edm", torch.device("cpu"))
        FewSteps(net, (3,), None, paths.VE(sigma_max=high), "edm")(z)
        sampling.integrate(net, z, 18, path=paths.DDBMVE(sigma_max=high), predict="x0", endpoint=z)
    for low, high in ((0.01, 1348.0), (0.01, 348.0), (0.01, 90.0)):
        made = sampling.integrate(net, z, 18, "edm", path=paths.VE(sigma_min=low, sigma_max=high), **few)
        assert made.isfinite().all()
    for shift in (0.1, 0.2):
        sampling.integrate(net, z, 5, "ddim", path=paths.Linear(shift=shift), predict="x0")


def test_one_step_is_the_data_prediction():
    z = torch.randn(6, 3, dtype=torch.float64)
    for path in PATHS.values():
        t0 = sampling.default_start(path)
        a, _, c = path.coefficients(torch.tensor([t0], dtype=torch.float64), "x0", "x0")[0, :3]
        if path != paths.FlowMatching(sigma=0.1):
            assert float(c / a) == pytest.approx(2.5)
        x_t = c * z
        expected = MEAN + a * STD**2 / (a**2 * STD**2 + c**2) * (x_t - a * MEAN)
        for predict in [p for p in paths.PREDICTIONS if p != "residual"]:
            made = sampling.one_step(Posterior(path, predict), z, t0, path=path, predict=predict)
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_one_step_on_two_sided_paths():
    z, y = torch.randn(2, 6, 3)
    net = nn.Module()
    net.forward = lambda t, x, labels: 0.5 * x
    bridge = paths.BrownianBridge()
    t0 = sampling.default_start(bridge)
    assert t0 == pytest.approx(0.9, abs=1e-4)
    x = y + math.sqrt(t0 * (1 - t0)) * z
    torch.testing.assert_close(sampling.one_step(net, z, t0, None, bridge, "x0", y), 0.5 * x)
    residual = x - math.sqrt(t0) * 0.5 * x
    torch.testing.assert_close(sampling.one_step(net, z, t0, None, bridge, "residual", y), residual)
    # A velocity: one Euler step, from the endpoint itself where there is no noise.
    assert sampling.default_start(paths.ICFM()) == 0
    torch.testing.assert_close(sampling.one_step(net, z, 0.0, None, paths.ICFM(), "velocity", y), 1.5 * y)


def test_the_linear_path_is_computed_as_ever():
    """Every number of the first version, to the bit: Euler, Heun and the generator on the linear path."""
    net, z = GaussianVelocity(), torch.randn(7, 3)
    x = y = z
    for i in range(6):
        t = torch.full((7,), i * (1 / 6))
        x = torch.add(x, net(t, x), alpha=1 / 6)
        slope = net(t, y)
        ahead = net(t + 1 / 6, torch.add(y, slope, alpha=1 / 6))
        y = torch.add(y, slope + ahead, alpha=1 / 12)
    assert torch.equal(sampling.integrate(net, z, 6), x)
    assert torch.equal(sampling.integrate(net, z, 6, "heun"), y)
    for t0 in (0.0, 0.28, 0.3, 0.57, 0.9):
        x = z * (1.0 - t0) if t0 else z
        expected = torch.add(x, net(torch.full((7,), t0), x), alpha=1.0 - t0)
        assert torch.equal(sampling.one_step(net, z, t0), expected)


def test_errors_name_the_argument():
    net, noise = GaussianVelocity(), torch.zeros(2, 2)
    with pytest.raises(UserError, match="steps must be at least 1"):
        sampling.integrate(net, noise, 0)
    with pytest.raises(UserError, match="solver must be one of euler, heun"):
        sampling.integrate(net, noise, 3, "rk4")
    with pytest.raises(UserError, match="t_start"):
        sampling.integrate(net, noise, 3, t_start=1.0)
    with pytest.raises(UserError, match="t_start"):
        sampling.one_step(net, noise, -0.1)
    bridge, y = paths.BrownianBridge(), torch.zeros(2, 2)
    with pytest.raises(UserError, match="endpoint must be given on BrownianBridge"):
        sampling.integrate(net, noise, 3, path=bridge)
    with pytest.raises(UserError, match="endpoint must not be given on Linear"):
        sampling.one_step(net, noise, 0.5, endpoint=y)
    with pytest.raises(UserError, match="solver must be euler for x0 on BrownianBridge"):
        sampling.integrate(net, noise, 3, "heun", path=bridge, predict="x0", endpoint=y)
    with pytest.raises(UserError, match="score gives neither velocity nor data"):
        sampling.integrate(net, noise, 3, path=bridge, predict="score", endpoint=y)
    with pytest.raises(UserError, match=r"t_start must lie in \(0.002, 80\]"):
        sampling.one_step(net, noise, 0.002, path=paths.VE(), predict="edm")


EDM = {"kind": "song-unet", "dim": [1, 8, 8], "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1,
       "attn_resolutions": [4], "dropout": 0.0}  # fmt: skip


def karras(net, latents, steps, noise, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """Algorithm 2 of Karras et al. (2206.00364) line by line; without churning algorithm 1. ``noise()`` draws."""
    rho, sigma_min, sigma_max, sigma_data = 7, 0.002, 80, 0.5

    def denoiser(x, sigma):
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        c_in = 1 / (sigma_data**2 + sigma**2).sqrt()
        return c_skip * x + c_out * net((sigma.log() / 4).expand(len(x)), c_in * x)

    i = torch.arange(steps, dtype=torch.float64)
    t = (sigma_max ** (1 / rho) + i / (steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    t = torch.cat([t, torch.zeros(1, dtype=torch.float64)])
    x = latents * t[0]
    for i in range(steps):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2).sqrt() * s_noise * noise() if gamma else x
        d = (x_hat - denoiser(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - denoiser(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize(
    "churn", [{}, {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}, {"s_churn": 2.0}], ids=str
)
def test_edms_sampler_is_the_papers(churn):
    """18 steps and 35 evaluations, on an EDM teacher and in float64; the second row is the paper's for ImageNet."""
    torch.manual_seed(0)
    net = build(EDM).double().eval()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    latents, stream = torch.randn(2, 1, 8, 8, dtype=torch.float64), NoiseStream(5)
    with torch.no_grad():
        expected = karras(net, latents, 18, lambda: normal(stream.next_key(), latents), **churn)
    calls.clear()
    found = sampling.edm_sampler(net, latents, 18, stream=NoiseStream(5), **churn)
    assert len(calls) == sampling.evaluations(18, "edm", paths.VE(), "edm") == 35
    assert expected.std() > 0.1
    # The network's embedding of the time is float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if not churn:
        again = sampling.integrate(net, latents, 18, "edm", path=paths.VE(), predict="edm")
        assert torch.equal(again, found)
        single = sampling.integrate(net.float(), latents.float(), 18, "edm", path=paths.VE(), predict="edm")
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-3)


def test_edms_sampler_takes_every_prediction_and_follows_the_exact_flow():
    path, noise = paths.VE(), torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # All the way to noise level 0, where the others end at sigma_min.
    exact = MEAN + STD / math.hypot(STD, 80) * (80 * noise - MEAN)
    for predict in [p for p in paths.PREDICTIONS if p != "residual"]:
        made = sampling.integrate(Posterior(path, predict), noise, 80, "edm", path=path, predict=predict)
        assert (made - exact).abs().max() < 0.02 * STD, predict


def test_midpoint_and_ddim_are_their_formulas():
    net, x = Posterior(paths.VP(), "noise"), torch.randn(5, 3, dtype=torch.float64)
    path, times = paths.VP(), [t for t, _ in solvers.grid(paths.VP(), 1.0, 1e-5, 3)] + [1e-5]
    ddim = x * float(path.scales(torch.tensor([1.0], dtype=torch.float64))[1])
    for now, then in itertools.pairwise(times):
        (a, c), (a_s, c_s) = (path.scales(torch.tensor([t], dtype=torch.float64)) for t in (now, then))
        with torch.no_grad():
            n = net(torch.full((5,), 999 * now, dtype=torch.float32), ddim)
        # Song et al. (2010.02502), equation 12 with sigma = 0.
        ddim = a_s * (ddim - c * n) / a + c_s * n
    torch.testing.assert_close(
        sampling.integrate(net, x, 3, "ddim", path=path, predict="noise"), ddim, rtol=1e-4, atol=1e-4
    )

    net, middle = GaussianVelocity(), x
    for i in range(3):
        half = middle + net(torch.full((5,), i / 3), middle) / 6
        middle = middle + net(torch.full((5,), i / 3 + 1 / 6), half) / 3
    torch.testing.assert_close(sampling.integrate(net, x, 3, "midpoint"), middle, rtol=1e-6, atol=1e-6)


def test_a_shift_moves_the_steps_and_nothing_else():
    """Share u of the noise left becomes shift u / (1 + (shift - 1) u), in either direction of time."""
    net, x = GaussianVelocity(), torch.randn(5, 3, dtype=torch.float64)
    shifted = [1 - 3 * (1 - i / 4) / (1 + 2 * (1 - i / 4)) for i in range(5)]
    seen = []
    hook = net.register_forward_pre_hook(lambda _, given: seen.append(float(given[0][0])))
    sampling.integrate(net, x, 4, path=paths.Linear(shift=3.0))
    assert seen == pytest.approx(shifted[:-1])
    seen.clear()
    backwards = nn.Module()
    backwards.forward = lambda t, x, y: seen.append(float(t[0])) or -net(1 - t / 1000, x)
    hook.remove()
    made = sampling.integrate(backwards, x, 4, path=paths.Linear(data_at=0, shift=3.0))
    assert seen == pytest.approx([1000 * (1 - t) for t in shifted[:-1]])
    torch.testing.assert_close(made, sampling.integrate(net, x, 4, path=paths.Linear(shift=3.0)))
    assert torch.equal(sampling.one_step(net, x, 0.3, path=paths.Linear(shift=3.0)), sampling.one_step(net, x, 0.3))
    with pytest.raises(UserError, match="shift must lie above 0, got 0"):
        paths.Linear(shift=0.0)


def test_solvers_that_a_path_does_not_have_are_named():
    net, noise = GaussianVelocity(), torch.zeros(2, 2)
    with pytest.raises(UserError, match="solver must not be edm on Linear: it needs the path ve"):
        sampling.integrate(net, noise, 3, "edm")
    with pytest.raises(UserError, match="solver must not be ddim on ICFM: it needs a path from noise alone to data"):
        sampling.integrate(net, noise, 3, "ddim", path=paths.ICFM(), endpoint=noise)
    with pytest.raises(UserError, match="t_start must not be given with the solver edm"):
        sampling.integrate(net, noise, 3, "edm", path=paths.VE(), predict="edm", t_start=3.0)
    with pytest.raises(UserError, match="s_churn and s_noise not negative; got 7, -1, 1"):
        sampling.edm_sampler(net, noise, s_churn=-1.0)
