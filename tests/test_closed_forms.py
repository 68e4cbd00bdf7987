"""Facts of the theory, computed through the fused calls: pi/4, the inner optimum, the generator's gradient.

Data, generator and second endpoint are Gaussian, so every field is known; expectations over time, latent and noise are
Gauss quadrature whose weights travel in the coefficients' w column, so nothing here is a Monte Carlo estimate.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast.jobs import config as configs
from realuid_fast.paths import (
    COLUMNS,
    DDBMVP,
    VE,
    VP,
    BrownianBridge,
    DiscreteVP,
    Linear,
    Path,
    StochasticInterpolant,
    Trigonometric,
    VPCosine,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A path, the match space of the distance, and the interval that times are uniform on."""

    path: Path
    match: str = "velocity"
    low: float = 0.0
    high: float = 1.0

    def columns(self, t):
        coef = self.path.coefficients(t.reshape(-1), self.match, self.match)
        return {name: v.reshape(t.shape) for name, v in zip(COLUMNS, coef.unbind(1), strict=True)}


SETTINGS = {
    "linear": Setting(Linear()),
    "linear-reversed-x0": Setting(Linear(data_at=0), "x0"),
    "vp-velocity": Setting(VP(), low=0.05),
    "vp-noise": Setting(VPCosine(), "noise", low=0.05),
    "vp-discrete": Setting(DiscreteVP(schedule="scaled_linear", beta_end=0.012), low=0.05),
    "edm": Setting(VE(), "x0", 0.3, 2.5),
    "brownian-bridge": Setting(BrownianBridge(eps=0.5), "x0", 0.05, 0.95),
    "ddbm-vp": Setting(DDBMVP(), "x0", 0.05, 0.95),
    "interpolant": Setting(StochasticInterpolant(gamma="sin2"), "velocity"),
    "interpolant-root": Setting(StochasticInterpolant(mix="trigonometric"), "velocity", 0.05, 0.95),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
LINEAR = SETTINGS["linear"]

ENDPOINT = (0.3, 0.9)  # mean and standard deviation of y, independent of x; it has no part where b = 0


def moments(setting, t, mean, std):
    """Mean and variance of x_t at times t for data N(mean, std^2)."""
    k = setting.columns(t)
    return k["a"] * mean + k["b"] * ENDPOINT[0], (k["a"] * std) ** 2 + (k["b"] * ENDPOINT[1]) ** 2 + k["c"] ** 2


def field(setting, x_t, t, mean, std):
    """E[tgt | x_t] for data N(mean, std^2)."""
    k = setting.columns(t)
    centre, variance = moments(setting, t, mean, std)
    covariance = k["p"] * k["a"] * std**2 + k["q"] * k["b"] * ENDPOINT[1] ** 2 + k["s"] * k["c"]
    return k["p"] * mean + k["q"] * ENDPOINT[0] + covariance / variance * (x_t - centre)


def density(setting, x_t, t, mean, std):
    centre, variance = moments(setting, t, mean, std)
    return torch.exp(-0.5 * (x_t - centre) ** 2 / variance) / torch.sqrt(2 * math.pi * variance)


def legendre(setting, n):
    """Nodes and weights of the mean over the setting's times."""
    t, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy(setting.low + (setting.high - setting.low) * (t + 1) / 2), torch.from_numpy(w / 2)


def quadrature(setting, n_t, n_z, n_noise):
    """Nodes (t, z, e) of a product rule over uniform t and normal z, e, with weights that sum to one; all (R,)."""
    t, w_t = legendre(setting, n_t)
    z, w_z = np.polynomial.hermite_e.hermegauss(n_z)
    e, w_e = np.polynomial.hermite_e.hermegauss(n_noise)
    grid = np.meshgrid(t.numpy(), z, e, indexing="ij")
    weights = np.einsum("i,j,k->ijk", w_t.numpy(), w_z / w_z.sum(), w_e / w_e.sum())
    return (*(torch.from_numpy(g.ravel()) for g in grid), torch.from_numpy(weights.ravel()))


def draws(setting, t, e, weights):
    """Coefficients whose mean loss is the weighted sum, endpoints and noise for a normal e; all with R rows.

    x_t holds y and n only as b y + c n; what is left of them is independent of it with mean zero and the losses are
    linear in it, so given b (y - E[y]) + c n = spread e both may be put at their conditional means.
    """
    coef = setting.path.coefficients(t, setting.match, setting.match, weight=lambda t: weights * len(t))
    k = setting.columns(t)
    mean, std = ENDPOINT
    spread = torch.sqrt((k["b"] * std) ** 2 + k["c"] ** 2)
    return coef, (mean + k["b"] * std**2 / spread * e)[:, None], (k["c"] / spread * e)[:, None]


def shrunk(k):
    """The integral over [0, 1] of ``e^(-k I)`` for VP's ``I = t / 10 + 19.9 t^2 / 2``."""
    low, slope = 0.1, 19.9
    root, shift = math.sqrt(k * slope / 2), low / slope
    gap = math.erf(root * (1 + shift)) - math.erf(root * shift)
    return math.exp(k * low**2 / (2 * slope)) * math.sqrt(math.pi) / (2 * root) * gap


INNER_MAXIMA = {
    # The integral of (c W / (a^2 + c^2))^2 over time for one-sided paths in velocity space.
    "linear": (LINEAR, math.pi / 4),
    "trigonometric": (Setting(Trigonometric()), math.pi**2 / 8),
    # In noise space of (a c)^2, where a^2 + c^2 = 1.
    "vp": (Setting(VP(), "noise"), shrunk(1) - shrunk(2)),
    # In x0 space of (c^2 / (1 + c^2))^2.
    "edm": (
        Setting(VE(), "x0", 0.1, 3.0),
        sum(s * (v - 1.5 * math.atan(v) + v / (2 * (1 + v**2))) for s, v in ((1, 3.0), (-1, 0.1))) / 2.9,
    ),
    # With y ~ N(0, 1), var x_t = 1 - t + t^2 on both: of (t / var)^2 in x0, of ((1 - t/2) / var)^2 in velocity space.
    "brownian-bridge": (Setting(BrownianBridge(), "x0"), 4 * math.pi / (9 * math.sqrt(3)) - 1 / 3),
    "interpolant": (Setting(StochasticInterpolant()), 1 / 4 + math.pi / (3 * math.sqrt(3))),
}


@pytest.mark.parametrize(("setting", "distance"), INNER_MAXIMA.values(), ids=INNER_MAXIMA.keys())
@pytest.mark.parametrize("gap", [0.3, -2.5])
def test_inner_maximum_of_uid_is_a_known_multiple_of_the_squared_distance(setting, distance, gap, monkeypatch):
    """pi/4 for the linear path; unit variances throughout."""
    monkeypatch.setitem(globals(), "ENDPOINT", (0.0, 1.0))
    teacher_mean, mean = 0.7 + gap, 0.7
    t, z, e, weights = quadrature(setting, 64, 12, 12)
    (coef, endpoint, noise), x = draws(setting, t, e, weights), (mean + z)[:, None]
    x_t = rf.interpolate(x, coef, noise, endpoint)
    teacher, fake = (field(setting, x_t, t[:, None], m, 1.0) for m in (teacher_mean, mean))
    loss = rf.functional.generator_loss(
        rf.objectives.UID(),
        teacher_out=teacher,
        fake_out=fake,
        x=x,
        x_t=None,
        coef=coef,
        noise=noise,
        endpoint=endpoint,
    )
    # 64 Legendre nodes integrate these rational functions of t to rounding; the rest is polynomial, hence exact.
    assert float(loss) == pytest.approx(distance * gap**2, rel=1e-9)


@pytest.mark.parametrize("turn", ["fake", "generator"])
def test_the_inner_maximum_under_the_law_and_the_weight_of_a_turn(turn):
    """For unit variances it is ``gap^2`` times the mean of ``w h^2``, ``h = sigma^2 / (1 + sigma^2)``, over the law."""
    matching, gap, n = configs.load("presets/sid-edm").path.turns()[turn], 0.8, 8192
    t = matching.path.sampler.quantile((torch.arange(n, dtype=torch.float64) + 0.5) / n, matching.path)
    # The loss is linear in z and e at a fixed time, so their means do for them: x and x_t are the generator's mean.
    x = torch.full((n, 1), 0.7, dtype=torch.float64)
    h = (t**2 / (1 + t**2))[:, None]
    coef = matching.path.coefficients(t, "x0", "x0", matching.weight)
    loss = rf.functional.generator_loss(
        rf.objectives.UID(), teacher_out=x + h * gap, fake_out=x, x=x, x_t=None, coef=coef, noise=torch.zeros_like(x)
    )
    if turn == "fake":
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        sigma, w = np.exp(-1.2 + 1.2 * nodes), lambda s: (s**2 + 0.25) / (0.5 * s) ** 2
    else:
        nodes, weights = np.polynomial.legendre.leggauss(64)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        sigma, w = (low + 0.8 * (nodes + 1) / 2 * (high - low)) ** 7, np.ones_like
    expected = (weights * w(sigma) * (sigma**2 / (1 + sigma**2)) ** 2).sum() / weights.sum()
    # 1e-3: the midpoint rule in the quantiles against the quadrature.
    assert float(loss) == pytest.approx(gap**2 * expected, rel=1e-3)


@pytest.mark.parametrize(("c", "p"), [(0.2, 1.0), (0.5, 1.5), (0.0, 2.0)])
def test_sim_has_the_gradient_of_its_distance_at_a_fixed_law_of_x_t(c, p):
    """For unit variances the fields of x0 space are ``h (mean* - mean)`` apart with ``h = sigma^2 / (1 + sigma^2)``."""
    setting, gap = SETTINGS["edm"], 0.8
    t, z, e, weights = quadrature(setting, 48, 12, 12)
    (coef, _, noise), mean = draws(setting, t, e, weights), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = mean + z[:, None]
    x_t = rf.interpolate(x, coef, noise)
    teacher, fake = (field(setting, x_t, t[:, None], m, 1.0) for m in (0.7 + gap, 0.7))
    loss = rf.functional.generator_loss(
        rf.objectives.SIM(c, p), teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=coef, noise=noise
    )
    (found,) = torch.autograd.grad(loss, mean)
    h = t**2 / (1 + t**2)
    slope = (h * gap) * ((h * gap) ** 2 + c**2) ** (p / 2 - 1)
    assert float(found) == pytest.approx(float(-(weights * h * slope).sum()), rel=1e-9)


OBJECTIVES = [
    rf.objectives.UID(),
    rf.objectives.RealUID(0.92, 0.94),
    rf.objectives.RealUID(0.9, 0.84),
    rf.objectives.GeneralRealUID(0.9, 0.95, 0.8),
    rf.objectives.GeneralRealUID(0.9, 0.95, 0.7, kappa=0.95),
    rf.objectives.GeneralRealUID(1.0, 0.9, 0.8),
]
# With an exact teacher the optimum is that of the sampled target.
TEACHER_TARGET = rf.objectives.GeneralRealUID(0.9, 0.95, 0.7, kappa=0.95, teacher_target=True)
IDS = ["UID", "RealUID-up", "RealUID-down", "general", "general-kappa", "general-whole"]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)


def test_inner_maximum_of_normalised_uid_is_a_multiple_of_the_distance():
    """The fields differ by ``c W / (a^2 + c^2)`` times the gap of the means, on the linear path pi/4 on average."""
    gap, setting = torch.tensor([0.3, -2.5, 1.1], dtype=torch.float64), LINEAR
    t, z, e, weights = quadrature(setting, 64, 2, 2)
    coef, _, noise = draws(setting, t, e, weights)
    # The loss is linear in z and e, since the direction depends on neither: coordinates may share them.
    x, noise = (0.7 + z)[:, None].expand(-1, 3).contiguous(), noise.expand(-1, 3).contiguous()
    x_t = rf.interpolate(x, coef, noise)
    fake = field(setting, x_t, t[:, None], 0.7, 1.0)
    k = setting.columns(t[:, None])
    teacher = fake + gap * (k["p"] - (k["p"] * k["a"] + k["s"] * k["c"]) / (k["a"] ** 2 + k["c"] ** 2) * k["a"])
    loss = rf.functional.generator_loss(
        rf.objectives.NormalisedRealUID(1.0, 1.0),
        teacher_out=teacher,
        fake_out=fake,
        x=x,
        x_t=None,
        coef=coef,
        noise=noise,
    )
    assert float(loss) == pytest.approx(math.pi / 4 * float(gap.norm()), rel=1e-9)


DATA, GENERATED = (0.4, 0.8), (-0.5, 1.1)  # mean and standard deviation


def delta(setting, x_t, t, objective, data, generated):
    """The inner optimum's numerator and denominator, m and N of delta = m / N, at x_t."""
    p_d, p_g = density(setting, x_t, t, *data), density(setting, x_t, t, *generated)
    f_d, f_g = field(setting, x_t, t, *data), field(setting, x_t, t, *generated)
    alpha, beta, gamma = objective.alpha, objective.beta, objective.gamma
    numerator = (alpha * p_g + (beta - alpha) * p_d) * f_d - beta * p_g * f_g
    return numerator, gamma * p_g + (1 - gamma) * p_d


@every_setting
@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES, rf.objectives.NormalisedRealUID(0.9, 0.84), TEACHER_TARGET],
    ids=[*IDS, "normalised", "teacher-target"],
)
@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_fake_loss_is_stationary_and_minimal_at_the_inner_optimum(setting, objective, share):
    """At one x_t the expected fake loss is a weighted sum of two rows, one drawn from each density.

    The loss is quadratic in f and linear in tgt given x_t up to a constant, so each density's conditional draw may be
    replaced by one whose target is the conditional mean.
    """
    x_t = torch.linspace(-3, 3, 25, dtype=torch.float64)
    time = torch.full_like(x_t, setting.low + share * (setting.high - setting.low))
    m, n = delta(setting, x_t, time, objective, DATA, GENERATED)
    teacher = field(setting, x_t, time, *DATA)
    optimum = teacher - m / n / objective.kappa

    halves = [GENERATED, DATA] if objective.needs_real else [GENERATED]
    rows, n_real = len(x_t) * len(halves), len(x_t) * (len(halves) - 1)
    fields = torch.cat([field(setting, x_t, time, *half) for half in halves])
    k = setting.columns(time.repeat(len(halves)))
    # Any x and n with p x + s n at the field's value will do: the larger of p and s carries it, y = 0 takes no part.
    by_x = k["p"].abs() >= k["s"].abs()
    value = fields / torch.where(by_x, k["p"], k["s"])
    x, noise = value * by_x, value * ~by_x
    densities = torch.cat([density(setting, x_t, time, *half) for half in halves])
    coef = setting.path.coefficients(time.repeat(len(halves)), setting.match, setting.match, weight=lambda _: densities)

    def grads(f):
        return rf.functional.fake_grads(
            objective,
            fake_out=f.repeat(len(halves))[:, None],
            x=x[:, None],
            x_t=None,
            coef=coef,
            noise=noise[:, None],
            n_real=n_real,
            teacher_out=teacher.repeat(len(halves))[:, None] if objective.needs_teacher else None,
            endpoint=torch.zeros_like(x)[:, None],
        )

    at_optimum = grads(optimum)
    assert at_optimum.fake_out.shape == (rows, 1)
    total = at_optimum.fake_out.view(len(halves), -1).sum(0)
    # Rounding of the two halves' gradients, which scale with the fields.
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-14 * float(1 + fields.abs().max()))
    for step in (0.1, -0.1):
        assert grads(optimum + step).loss > at_optimum.loss


def inner_maximum(setting, objective, generated, n_t=48):
    """The value of the inner maximum, the integral of m^2 / N over x_t and t, on a grid of x_t at every time.

    A thousand steps give the integral of such a smooth function to rounding.
    """
    t, w_t = legendre(setting, n_t)
    t = t[:, None]
    spans = [(centre, variance.sqrt()) for centre, variance in (moments(setting, t, *d) for d in (DATA, generated))]
    low, high = (torch.stack([centre + s * 12 * deviation for centre, deviation in spans]) for s in (-1, 1))
    low, high = low.min(0).values, high.max(0).values
    x_t = low + (high - low) * torch.linspace(0, 1, 1001, dtype=torch.float64)[None]
    m, n = delta(setting, x_t, t.expand_as(x_t), objective, DATA, generated)
    # Where both densities vanish so does m^2 / N, faster.
    inner = torch.where(n > 1e-200, m**2 / n.clamp_min(1e-200), torch.zeros_like(n)).sum(1) * (high - low)[:, 0] / 1000
    return float((w_t * inner).sum())


@every_setting
@every_objective
def test_generator_gradient_is_the_derivative_of_the_distance(setting, objective):
    """With the fake model at its inner optimum, autograd through both networks, x_t and x gives d max / d theta."""
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in GENERATED)
    t, z, e, weights = quadrature(setting, 48, 32, 32)
    (coef, endpoint, noise), x = draws(setting, t, e, weights), (mean + std * z)[:, None]
    x_t = rf.interpolate(x, coef, noise, endpoint)
    time = t[:, None]
    teacher = field(setting, x_t, time, *DATA)
    m, normaliser = delta(setting, x_t, time, objective, DATA, GENERATED)
    fake = teacher - m / normaliser / objective.kappa
    loss = rf.functional.generator_loss(
        objective, teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=coef, noise=noise, endpoint=endpoint
    )
    if not objective.needs_real:  # else the real rows of the fake turn hold a part of the value, none of the gradient
        assert float(loss.detach()) == pytest.approx(inner_maximum(setting, objective, GENERATED), rel=1e-5)
    found = torch.autograd.grad(loss, (mean, std))

    h = 1e-4
    for index, gradient in enumerate(found):
        low, high = ([v + s * h * (i == index) for i, v in enumerate(GENERATED)] for s in (-1, 1))
        numerical = (inner_maximum(setting, objective, high) - inner_maximum(setting, objective, low)) / (2 * h)
        # 1e-5: the central difference's h^2 error and the quadrature of the posterior tails.
        assert float(gradient) == pytest.approx(numerical, rel=1e-5, abs=1e-6)


@every_setting
@every_objective
def test_fake_loss_falls_by_the_inner_maximum(setting, objective):
    """From ``f = f*``, where what is maximised is 0, to the optimum, on generated and real rows, at any weights."""
    t, z, e, weights = quadrature(setting, 48, 32, 32)
    coef, endpoint, noise = draws(setting, t, e, weights)
    halves = [GENERATED, DATA] if objective.needs_real else [GENERATED]
    x = torch.cat([(mean + std * z)[:, None] for mean, std in halves])
    coef, endpoint, noise, time = (v.repeat(len(halves), 1) for v in (coef, endpoint, noise, t[:, None]))
    x_t = rf.interpolate(x, coef, noise, endpoint)
    teacher = field(setting, x_t, time, *DATA)
    m, normaliser = delta(setting, x_t, time, objective, DATA, GENERATED)

    def loss(fake):
        given = teacher if objective.needs_teacher else None
        real = len(x) - len(t)
        return rf.functional.fake_loss(
            objective,
            fake_out=fake,
            x=x,
            x_t=None,
            coef=coef,
            noise=noise,
            n_real=real,
            teacher_out=given,
            endpoint=endpoint,
        )

    fall = float(loss(teacher) - loss(teacher - m / normaliser / objective.kappa))
    # 1e-5: as for the gradient, the quadrature of the posterior tails.
    assert fall == pytest.approx(inner_maximum(setting, objective, GENERATED), rel=1e-5)


class Plane:
    """A pair of independent Gaussians in the plane, generated and data, for what takes a direction."""

    data, objective = ((0.4, 0.8), (1.2, 0.8)), rf.objectives.NormalisedRealUID(0.6, 0.8)

    def __init__(self, setting, generated):
        self.setting, self.generated = setting, generated

    def parts(self, x_t, t):
        """Fields ``(R, 2)`` and densities ``(R, 1)`` at ``x_t`` ``(R, 2)``, of the data and of the generator."""
        found = []
        for two in (self.data, self.generated):
            f = [field(self.setting, x_t[:, i : i + 1], t, *two[i]) for i in range(2)]
            p = [density(self.setting, x_t[:, i : i + 1], t, *two[i]) for i in range(2)]
            found += [torch.cat(f, dim=1), p[0] * p[1]]
        return found

    def m(self, x_t, t):
        f_d, p_d, f_g, p_g = self.parts(x_t, t)
        alpha, beta = self.objective.alpha, self.objective.beta
        return (alpha * p_g + (beta - alpha) * p_d) * f_d - beta * p_g * f_g, alpha * p_g + (1 - alpha) * p_d

    def maximum(self, t, w_t, nodes=161, reach=7.0):
        """The integral of ``||m||`` over ``x_t`` and times."""
        total = 0.0
        for time, weight in zip(t, w_t, strict=True):
            axes = []
            for two in zip(self.data, self.generated, strict=True):
                ends = [(float(c), float(v) ** 0.5) for c, v in (moments(self.setting, time, *pair) for pair in two)]
                low, high = min(c - reach * s for c, s in ends), max(c + reach * s for c, s in ends)
                axes.append(torch.linspace(low, high, nodes, dtype=torch.float64))
            grid = torch.cartesian_prod(*axes)
            area = math.prod(float(axis[1] - axis[0]) for axis in axes)
            total += float(weight) * float(self.m(grid, time.expand(len(grid), 1))[0].norm(dim=1).sum()) * area
        return total


def test_realuids_fake_model_maximises_the_normalised_loss():
    """No direction does better than that of RealUID's optimum, which reaches ``||m||``."""
    plane = Plane(LINEAR, ((-0.5, 0.9), (-0.3, 0.7)))
    generator = torch.Generator().manual_seed(0)
    x_t = 2 * torch.randn(50, 2, dtype=torch.float64, generator=generator)
    t = torch.rand(50, 1, dtype=torch.float64, generator=generator)
    f_d, p_d, f_g, p_g = plane.parts(x_t, t)
    m, normaliser = plane.m(x_t, t)
    alpha, beta = plane.objective.alpha, plane.objective.beta
    # Rows of the loss, one half drawn from either density: <D, r> / ||D|| times densities.
    halves = ((p_g, alpha, beta, f_g), (p_d, 1 - alpha, 1 - beta, f_d))

    def value(d):
        return sum((p * d / d.norm(dim=1, keepdim=True) * (a * f_d - b * f)).sum(1) for p, a, b, f in halves)

    best = value(m / normaliser)
    torch.testing.assert_close(best, m.norm(dim=1), rtol=1e-12, atol=1e-14)
    for angle in torch.linspace(0.1, 6.1, 7, dtype=torch.float64):
        turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2)
        assert (value(m @ turn) < best).all()


@pytest.mark.parametrize("setting", [Setting(Linear(), high=0.6), SETTINGS["edm"]], ids=["linear", "edm"])
def test_gradient_of_the_normalised_loss_is_the_derivative_of_the_distance(setting):
    """With real data, through the norm as well: with the norm held fixed it is another one."""
    generated = ((-0.5, 0.9), (-0.3, 0.7))
    t, w_t = legendre(setting, 4)
    nodes, w = np.polynomial.hermite_e.hermegauss(14)
    w = torch.from_numpy(w / w.sum())
    nodes = torch.from_numpy(nodes)
    z, e = (torch.cartesian_prod(nodes, nodes) for _ in range(2))
    pair = (w[:, None] * w).reshape(-1)
    times, z = t.repeat_interleave(len(z) ** 2), z.repeat_interleave(len(e), dim=0).repeat(len(t), 1)
    noise = e.repeat(len(pair) * len(t), 1)
    weights = (w_t[:, None, None] * pair[:, None] * pair).reshape(-1)
    leaves = torch.tensor(generated, dtype=torch.float64, requires_grad=True)
    x = leaves[:, 0] + leaves[:, 1] * z
    coef = setting.path.coefficients(times, setting.match, setting.match, weight=lambda t: weights * len(t))
    plane = Plane(setting, generated)
    x_t = rf.interpolate(x, coef, noise)
    m, normaliser = plane.m(x_t, times[:, None])
    teacher = plane.parts(x_t, times[:, None])[0]
    fake = teacher - m / normaliser
    loss = rf.functional.generator_loss(
        plane.objective, teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=coef, noise=noise
    )
    (found,) = torch.autograd.grad(loss, leaves, retain_graph=True)
    weighed = coef.clone()
    weighed[:, COLUMNS.index("w")] /= 2 * (teacher - fake).detach().norm(dim=1)
    held = rf.functional.generator_loss(
        rf.objectives.RealUID(0.6, 0.8), teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=weighed, noise=noise
    )
    assert (torch.autograd.grad(held, leaves)[0] - found).abs().min() > 1e-3

    h = 1e-3
    for i in range(2):
        for j in range(2):
            low, high = ([list(two) for two in generated] for _ in range(2))
            low[i][j] -= h
            high[i][j] += h
            numerical = (Plane(setting, high).maximum(t, w_t) - Plane(setting, low).maximum(t, w_t)) / (2 * h)
            # 1e-5: the central difference's h^2 error; m vanishes nowhere near the bulk, else quadrature would fail.
            assert float(found[i, j]) == pytest.approx(numerical, rel=1e-5, abs=1e-5)
