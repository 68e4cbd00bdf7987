"""Facts of the theory, computed through the fused calls: pi/4, the inner optimum, the generator's gradient.

Data and generator are Gaussian, so every field is known; expectations over time, latent and noise are Gauss quadrature
whose weights travel in the coefficients' w column, so nothing here is a Monte Carlo estimate.
"""

import math

import numpy as np
import pytest
import torch

import realuid_fast as rf

PATH = rf.paths.Linear()


def field(x_t, t, mean, std):
    """E[x - n | x_t] on the linear path for data N(mean, std^2)."""
    variance = (t * std) ** 2 + (1 - t) ** 2
    return mean + (t * std**2 - (1 - t)) / variance * (x_t - t * mean)


def density(x_t, t, mean, std):
    variance = (t * std) ** 2 + (1 - t) ** 2
    return torch.exp(-0.5 * (x_t - t * mean) ** 2 / variance) / torch.sqrt(2 * math.pi * variance)


def quadrature(n_t, n_z, n_noise):
    """Nodes (t, z, n) of a product rule over uniform t and normal z, n, with weights that sum to one; all (R,)."""
    t, w_t = np.polynomial.legendre.leggauss(n_t)
    z, w_z = np.polynomial.hermite_e.hermegauss(n_z)
    n, w_n = np.polynomial.hermite_e.hermegauss(n_noise)
    grid = np.meshgrid((t + 1) / 2, z, n, indexing="ij")
    weights = np.einsum("i,j,k->ijk", w_t / 2, w_z / w_z.sum(), w_n / w_n.sum())
    return (*(torch.from_numpy(g.ravel()) for g in grid), torch.from_numpy(weights.ravel()))


def weighted_coefficients(t, weights):
    """Rows whose mean loss is the weighted sum: w carries weight times the number of rows."""
    return PATH.coefficients(t, weight=lambda t: weights * len(t))


@pytest.mark.parametrize("gap", [0.3, 1.0, -2.5])
def test_inner_maximum_of_uid_is_pi_over_4_times_the_squared_distance(gap):
    teacher_mean, mean = 0.7 + gap, 0.7
    t, z, n, weights = quadrature(64, 12, 12)
    coef, x, noise = weighted_coefficients(t, weights), (mean + z)[:, None], n[:, None]
    x_t = rf.interpolate(x, coef, noise)
    teacher, fake = (field(x_t, t[:, None], m, 1.0) for m in (teacher_mean, mean))
    loss = rf.generator_loss(teacher, fake, x, None, coef, noise, rf.objectives.UID())
    # 64 Legendre nodes integrate 1 / (2 t^2 - 2 t + 1) to rounding; the rest is polynomial, hence exact.
    assert float(loss) == pytest.approx(math.pi / 4 * gap**2, rel=1e-9)


OBJECTIVES = [
    rf.objectives.UID(),
    rf.objectives.RealUID(0.92, 0.94),
    rf.objectives.RealUID(0.9, 0.84),
    rf.objectives.GeneralRealUID(0.9, 0.95, 0.8),
    rf.objectives.GeneralRealUID(0.9, 0.95, 0.7, kappa=0.95),
]
IDS = ["UID", "RealUID-up", "RealUID-down", "general", "general-kappa"]

DATA, GENERATED = (0.4, 0.8), (-0.5, 1.1)  # mean and standard deviation


def delta(x_t, t, objective, data, generated):
    """The inner optimum's numerator and denominator, m and N of delta = m / N, at x_t."""
    p_d, p_g = density(x_t, t, *data), density(x_t, t, *generated)
    f_d, f_g = field(x_t, t, *data), field(x_t, t, *generated)
    alpha, beta, gamma = objective.alpha, objective.beta, objective.gamma
    numerator = (alpha * p_g + (beta - alpha) * p_d) * f_d - beta * p_g * f_g
    return numerator, gamma * p_g + (1 - gamma) * p_d


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
def test_fake_loss_is_stationary_and_minimal_at_the_inner_optimum(objective, t):
    """At one x_t the expected fake loss is a weighted sum of two rows, one drawn from each density.

    The loss is quadratic in f and linear in tgt given x_t up to a constant, so each density's conditional draw may be
    replaced by its conditional mean.
    """
    x_t = torch.linspace(-3, 3, 25, dtype=torch.float64)
    time = torch.full_like(x_t, t)
    m, n = delta(x_t, time, objective, DATA, GENERATED)
    teacher = field(x_t, time, *DATA)
    optimum = teacher - m / n / objective.kappa

    halves = [GENERATED, DATA] if objective.needs_real else [GENERATED]
    rows, n_real = len(x_t) * len(halves), len(x_t) * (len(halves) - 1)
    fields = torch.cat([field(x_t, time, *half) for half in halves])
    # x - n = f and t x + (1 - t) n = x_t give the pair whose target is the conditional mean.
    noise = x_t.repeat(len(halves)) - t * fields
    densities = torch.cat([density(x_t, time, *half) for half in halves])
    coef = PATH.coefficients(time.repeat(len(halves)), weight=lambda _: densities)

    def grads(f):
        return rf.fake_grads(
            f.repeat(len(halves))[:, None],
            (fields + noise)[:, None],
            None,
            coef,
            noise[:, None],
            objective,
            n_real=n_real,
            teacher_out=teacher.repeat(len(halves))[:, None] if objective.needs_teacher else None,
        )

    at_optimum = grads(optimum)
    assert at_optimum.fake_out.shape == (rows, 1)
    total = at_optimum.fake_out.view(len(halves), -1).sum(0)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-14)
    for step in (0.1, -0.1):
        assert grads(optimum + step).loss > at_optimum.loss


def inner_maximum(objective, generated, n_t=48):
    """The value of the inner maximum, the integral of m^2 / N over x_t and t, on a grid."""
    t, w_t = np.polynomial.legendre.leggauss(n_t)
    t, w_t = torch.from_numpy((t + 1) / 2)[:, None], torch.from_numpy(w_t / 2)
    x_t = torch.linspace(-9, 9, 2401, dtype=torch.float64)[None]
    m, n = delta(x_t, t, objective, DATA, generated)
    # Where both densities vanish so does m^2 / N, faster.
    inner = torch.where(n > 1e-200, m**2 / n.clamp_min(1e-200), torch.zeros_like(n)).sum(1) * (x_t[0, 1] - x_t[0, 0])
    return float((w_t * inner).sum())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_generator_gradient_is_the_derivative_of_the_distance(objective):
    """With the fake model at its inner optimum, autograd through both networks, x_t and x gives d max / d theta."""
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in GENERATED)
    t, z, n, weights = quadrature(48, 48, 48)
    coef, x, noise = weighted_coefficients(t, weights), (mean + std * z)[:, None], n[:, None]
    x_t = rf.interpolate(x, coef, noise)
    time = t[:, None]
    teacher = field(x_t, time, *DATA)
    m, normaliser = delta(x_t, time, objective, DATA, GENERATED)
    fake = teacher - m / normaliser / objective.kappa
    loss = rf.generator_loss(teacher, fake, x, None, coef, noise, objective)
    found = torch.autograd.grad(loss, (mean, std))

    h = 1e-4
    for index, gradient in enumerate(found):
        low, high = ([v + s * h * (i == index) for i, v in enumerate(GENERATED)] for s in (-1, 1))
        numerical = (inner_maximum(objective, high) - inner_maximum(objective, low)) / (2 * h)
        # 1e-5: the central difference's h^2 error and the quadrature of the posterior tails.
        assert float(gradient) == pytest.approx(numerical, rel=1e-5, abs=1e-6)
