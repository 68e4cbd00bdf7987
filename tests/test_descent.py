"""The gradients of a generator's turn that descends an f-divergence, in closed form on Gaussians."""

import math

import numpy as np
import pytest
import torch

from realuid_fast import descent, paths
from realuid_fast.errors import UserError
from realuid_fast.objectives import DIVERGENCES, UID, DiffInstruct, SiD, divergence_weight

DATA = (0.3, 1.0)


def log_density(y, mean, deviation, t):
    """``log p(x_t)`` for ``x ~ N(mean, deviation^2)`` and ``x_t = x + t n``."""
    variance = deviation**2 + t**2
    return -((y - mean) ** 2) / (2 * variance) - 0.5 * (2 * math.pi * variance).log()


def tensors(*values):
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def expansion(divergence, student, t):
    """``E_{p_g} h(r) (s_d - s_g)^2`` by quadrature on a line."""
    y = torch.linspace(-14, 14, 20001, dtype=torch.float64)
    data, own = log_density(y, *tensors(*DATA), t), log_density(y, *student, t)
    scores = -(y - DATA[0]) / (DATA[1] ** 2 + t**2), -(y - student[0]) / (student[1] ** 2 + t**2)
    values = own.exp() * divergence_weight(divergence, data - own) * (scores[0] - scores[1]) ** 2
    return values.sum() * (y[1] - y[0])


@pytest.mark.parametrize("student", [(0.0, 0.8, 0.5), (0.8, 1.2, 0.3)])
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_sid_descends_the_expansion_of_a_divergence(divergence, student):
    """In mean and in deviation: the mean alone would not show whether the ratio is differentiated."""
    *student, t = tensors(*student)
    by_differences = []
    for i in range(2):
        step = [1e-5 if j == i else 0.0 for j in range(2)]
        above, below = (expansion(divergence, [v + sign * s for v, s in zip(student, step, strict=True)], t)
                        for sign in (1, -1))  # fmt: skip
        by_differences.append(float(above - below) / 2e-5)

    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(60))
    z, n = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    mass = (weights[:, None] * weights).flatten() / weights.sum() ** 2
    parameters = torch.stack(student).requires_grad_()
    x = parameters[0] + parameters[1] * z
    draw = paths.VE().draw(x.detach(), n, match="x0", predict="x0", t=t.expand(len(z)))
    x_t = draw.x_t.detach().requires_grad_()
    teacher, fake = (x_t - t**2 * (x_t - m) / (s**2 + t**2) for m, s in (DATA, student))
    ratio = log_density(x_t, *tensors(*DATA), t) - log_density(x_t, *student, t)
    grads = descent.generator_grads(
        SiD(1.0, scaled=False), draw, teacher.detach(), fake.detach(), divergence, ratio.detach()
    )
    (through,) = torch.autograd.grad([teacher, fake], x_t, [grads.teacher_out, grads.fake_out])
    whole = (grads.x + through) * len(z) / t**4  # delta is t^2 times the scores' difference
    (mine,) = torch.autograd.grad(x, parameters, mass[:, None] * whole)
    assert mine.tolist() == pytest.approx(by_differences, rel=1e-6, abs=1e-7)


def test_without_a_divergence_it_is_the_plain_call():
    x, n, a, b = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    draw = paths.Linear().draw(x, n, match="x0", t=torch.rand(3))
    for objective in (SiD(1.0), DiffInstruct()):
        plain = descent.losses.generator_grads(objective, draw, a, b)
        for more in ((), ("forward-kl", None), ("reverse-kl", torch.randn(3))):
            found = descent.generator_grads(objective, draw, a, b, *more)
            for mine, theirs in zip(found, plain, strict=True):
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)
    with pytest.raises(UserError, match="divergence must be one of reverse-kl"):
        descent.generator_grads(SiD(1.0), draw, a, b, "kl", torch.randn(3))
    with pytest.raises(UserError, match="objective must be SiD, or one whose gradient flows through x alone; not UID"):
        descent.generator_grads(UID(), draw, a, b, "forward-kl", torch.randn(3))
    velocity = paths.Linear().draw(x, n, t=torch.rand(3))
    with pytest.raises(UserError, match=r"draw must be of a one-sided path in x0 space .* not of Linear in velocity"):
        descent.generator_grads(SiD(1.0, scaled=False), velocity, a, b, "forward-kl", torch.randn(3))
