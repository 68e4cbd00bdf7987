"""Objectives: scalars, each preset against its paper's loss in plain torch, match spaces, refusals and warnings."""

import dataclasses
import warnings

import pytest
import torch

import realuid_fast as rf
from realuid_fast.coefficients import Coefficients
from realuid_fast.jobs import config as configs
from realuid_fast.objectives import (
    DMD,
    FGM,
    IBMD,
    PRESETS,
    SDS,
    SIM,
    UID,
    DiffInstruct,
    GeneralRealUID,
    MomentMatching,
    NormalisedRealUID,
    Objective,
    RealBridge,
    RealSiD,
    RealUID,
    SiD,
    SmoothPower,
    divergence_weight,
)
from realuid_fast.paths import DDBMVP, VE, VP, BrownianBridge, Linear
from realuid_fast.settings import ObjectiveConfig


def test_uid_has_no_real_half_and_needs_no_teacher_in_the_fake_turn():
    uid = UID()
    assert tuple(uid.generated) == (1, 1, 0, 1)
    assert tuple(uid.real) == (0, 0, 0, 0)
    assert not uid.needs_real
    assert not uid.needs_teacher
    assert (uid.alpha, uid.beta, uid.Q, uid.kappa) == (1, 1, 1, 1)


def test_realuid_rows_are_perfect_squares():
    """With gamma = alpha the fake loss is A ||f - (B/A) tgt||^2, so C = B^2 / A and the teacher is not needed."""
    objective = RealUID(0.92, 0.94)
    for row in (objective.generated, objective.real):
        assert row.D == 0
        assert pytest.approx(row.B**2 / row.A, rel=1e-12) == row.C
    assert tuple(objective.generated)[:2] == (0.92, 0.94)
    assert tuple(objective.real)[:2] == pytest.approx((0.08, 0.06))
    assert objective.needs_real
    assert not objective.needs_teacher


@pytest.mark.parametrize(("gamma", "kappa"), [(0.9, 1.0), (0.8, 1.0), (0.9, 0.95)])
def test_general_realuid_rows(gamma, kappa):
    alpha, beta = 0.9, 0.95
    objective = GeneralRealUID(alpha, beta, gamma, kappa)
    expected = {
        "generated": (gamma * kappa**2, kappa * beta, kappa * (gamma * kappa - alpha), beta**2 / alpha),
        "real": (
            (1 - gamma) * kappa**2,
            kappa * (1 - beta),
            kappa * ((1 - gamma) * kappa - (1 - alpha)),
            (1 - beta) ** 2 / (1 - alpha),
        ),
    }
    for half, values in expected.items():
        assert tuple(getattr(objective, half)) == pytest.approx(values, abs=1e-12)
    assert gamma == objective.Q
    assert objective.needs_teacher == (gamma != alpha or kappa != 1)


@pytest.mark.parametrize("kappa", [1.0, 0.95])
def test_a_teachers_target_takes_over_the_rows_of_real_data(kappa):
    """``B tgt + D f*`` with ``tgt := f*`` is ``(B + D) f*``; generated rows and the generator's loss stay."""
    plain, other = (GeneralRealUID(0.9, 0.95, 0.8, kappa, teacher_target=chosen) for chosen in (False, True))
    assert other.real == (plain.real.A, 0.0, pytest.approx(kappa * (0.2 * kappa - 0.05)), 0.0)
    assert (other.generated, other.generator_scalars) == (plain.generated, plain.generator_scalars)
    assert GeneralRealUID(0.9, 0.95, 0.9, teacher_target=True).needs_teacher
    with pytest.raises(rf.errors.UserError, match="teacher_target must be false without real rows"):
        GeneralRealUID(1.0, 1.0, 1.0, teacher_target=True)


@pytest.mark.parametrize("kappa", [1.0, 0.9])
def test_general_realuid_has_real_rows_at_alpha_one_where_gamma_is_less(kappa):
    """``-(1 - gamma) ||d||^2 + 2 (1 - beta) <d, tgt>`` is left of them; C, a constant, is not told by it."""
    objective = GeneralRealUID(1.0, 0.9, 0.8, kappa)
    assert tuple(objective.real) == pytest.approx((0.2 * kappa**2, 0.1 * kappa, 0.2 * kappa**2, 0.0))
    assert objective.needs_real
    assert objective.needs_teacher
    zeros = torch.zeros(B, D)
    with pytest.raises(rf.errors.UserError, match="n_real must not be 0 for General RealUID with alpha = 1"):
        rf.functional.fake_loss(objective, fake_out=zeros, x=zeros, x_t=None, coef=torch.zeros(B, 9), noise=zeros)
    assert not GeneralRealUID(1.0, 1.0, 1.0).needs_real


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: RealUID(1.0, 0.9), "alpha = 1 requires beta = 1.*unbounded"),
        (lambda: RealUID(1.2, 0.9), r"alpha must lie in \(0, 1\]"),
        (lambda: RealUID(0.0, 0.9), r"alpha must lie in \(0, 1\]"),
        (lambda: RealUID(0.9, 0.0), "beta must be positive"),
        (lambda: RealUID(float("nan"), 0.9), "alpha must be a finite number"),
        (lambda: RealUID("0.9", 0.9), "alpha must be a finite number"),
        (lambda: GeneralRealUID(0.9, 0.95, 1.0), "gamma = 1 requires alpha = beta = 1"),
        (lambda: GeneralRealUID(1.0, 0.9, 1.0), "alpha = 1 requires beta = 1"),
        (lambda: GeneralRealUID(0.9, 0.95, 0.0), r"gamma must lie in \(0, 1\]"),
        (lambda: GeneralRealUID(1.0, 1.0, 2.0), r"gamma must lie in \(0, 1\], got 2"),
        (lambda: Objective("", 1.0, 0.9, 2.0, 1.0), "alpha = 1 requires beta = 1"),
        (lambda: GeneralRealUID(0.9, 0.95, 0.9, kappa=0.5), "kappa must be 1 or beta"),
        (lambda: FGM(1.0, 0.0), "l2 must be positive, got 0: the loss is divided by it"),
        (lambda: FGM(float("inf"), 1.0), "l1 must be a finite number"),
        (lambda: DMD(1.5), "alpha must lie in"),
        (lambda: Objective("", 1.0, 1.0, 1.0, 1.0, flows="y"), "flows must be 'all' or 'x', not 'y'"),
        (lambda: Objective("", 1.0, 1.0, 1.0, 1.0, sample_scale=-1.0), "sample_scale must not be negative, got -1"),
        (lambda: SiD(0.0), "alpha_sid must be positive, got 0"),
        (lambda: SiD("1"), "alpha_sid must be a finite number, not '1'"),
        (lambda: RealSiD(0.9, 0.95, -1.0), "alpha_sid must be positive"),
        (lambda: SIM(0.1, p=0.5), "p must be at least 1, got 0.5"),
        (lambda: SIM(0.0), "c must be positive, got 0"),
        (lambda: SIM(-1.0, p=2.0), "c must be positive, got -1"),
        (lambda: dataclasses.replace(SIM(), sample_scale=1.0), "objective with a distance has its own scale"),
        (lambda: dataclasses.replace(SIM(), kappa=2.0), "kappa must be 1 with a distance"),
        (lambda: RealBridge(1.0, 0.9), "alpha = 1 requires beta = 1"),
        (lambda: NormalisedRealUID(1.0, 0.9), "alpha = 1 requires beta = 1"),
        (
            lambda: Objective("", 1.0, 1.0, 1.0, 1.0, sample_scale=1.0, normalised=True),
            "normalised objective has its own",
        ),
    ],
)
def test_unbounded_or_meaningless_choices_are_refused(build, sentence):
    with pytest.raises(rf.errors.UserError, match=sentence):
        build()


def test_ratio_one_warns_that_real_data_is_idle():
    with pytest.warns(UserWarning, match="carries no signal"):
        RealUID(0.9, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UID()
        RealUID(0.92, 0.94)


@pytest.mark.parametrize(
    "build", [RealUID, lambda a, b: GeneralRealUID(a, b, 0.9), NormalisedRealUID, RealSiD, RealBridge]
)
def test_beta_above_one_warns_that_it_is_outside_the_papers_range(build):
    with pytest.warns(
        UserWarning, match=r"beta = 1\.1 is outside \(0, 1\], the range of the RealUID paper \(arXiv 2509"
    ):
        built = build(0.92, 1.1)
    assert built.beta == 1.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(0.92, 1.0)


def test_strong_sid_with_real_data_warns():
    with pytest.warns(UserWarning, match=r"alpha_sid = 1.2 with beta = 0.94 is reported unstable"):
        RealSiD(0.92, 0.94, alpha_sid=1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SiD(1.2)
        RealSiD(0.92, 0.94)


def scalars(objective):
    return dataclasses.replace(objective, name="")


def test_presets_that_are_the_same_numbers():
    plain_sid = SiD(0.5, scaled=False)
    assert scalars(UID()) == scalars(FGM(1, 1)) == scalars(FGM(0.3, 0.3)) == scalars(plain_sid) == scalars(IBMD())
    assert scalars(FGM(0, 1)) == scalars(SiD(1.0, scaled=False))
    plain_real = RealSiD(0.92, 0.94, 0.5, scaled=False)
    assert scalars(RealUID(0.92, 0.94)) == scalars(plain_real) == scalars(RealBridge(0.92, 0.94))
    assert scalars(RealSiD(1, 1, 0.8)) == scalars(SiD(0.8))
    assert scalars(GeneralRealUID(0.92, 0.94, 0.92)) == scalars(RealUID(0.92, 0.94))


# Literal transcriptions. Networks are fixed smooth functions; x is the generator's output and the leaf.
B, D = 4, 3


def network(seed):
    weight = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda time, seen: torch.tanh(seen @ weight + torch.sin(time)[:, None])


TEACHER, FAKE, UNCONDITIONAL = network(1), network(2), network(3)


def draw(path, rows):
    generator = torch.Generator().manual_seed(5)
    x, y, n = torch.randn(3, rows, D, dtype=torch.float64, generator=generator)
    low, high = path.t_range
    share = 0.1 + 0.8 * torch.rand(rows, dtype=torch.float64, generator=generator)
    t = low + (min(high, 5.0) - low) * share
    return t, x.requires_grad_(), y, n


def fused_generator(path, match, predict, objective, weight=None):
    """Value and gradient in x through the package."""
    t, x, y, n = draw(path, B)
    coef = path.coefficients(t, match, predict, weight)
    x_t = rf.interpolate(x, coef, n, y)
    seen, time = path.network_input(x_t, t, predict), path.network_time(t, predict)
    loss = rf.functional.generator_loss(
        objective,
        teacher_out=TEACHER(time, seen),
        fake_out=FAKE(time, seen),
        x=x,
        x_t=x_t,
        coef=coef,
        noise=n,
        endpoint=y,
    )
    return loss, torch.autograd.grad(loss, x)[0]


def fused_fake(path, match, predict, objective, n_real, weight=None):
    """Value and gradient in the fake model's output through the package."""
    t, x, y, n = draw(path, B + n_real)
    x = x.detach()
    coef = path.coefficients(t, match, predict, weight)
    x_t = rf.interpolate(x, coef, n, y)
    out = FAKE(path.network_time(t, predict), path.network_input(x_t, t, predict)).requires_grad_()
    loss = rf.functional.fake_loss(objective, fake_out=out, x=x, x_t=x_t, coef=coef, noise=n, n_real=n_real, endpoint=y)
    return loss, torch.autograd.grad(loss, out)[0]


def square(v):
    return (v * v).sum(1)


def inner(u, v):
    return (u * v).sum(1)


def agree(found, loss, leaf):
    expected = loss, torch.autograd.grad(loss, leaf)[0]
    for one, other in zip(found, expected, strict=True):
        # 1e-12: rounding of a hundred float64 operations.
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("l1", "l2"), [(1.0, 1.0), (0.0, 1.0), (0.5, 2.0)])
def test_fgm_is_its_paper_on_the_linear_path(l1, l2):
    """Huang et al. (2410.19310) put data at t = 0: u_t(x_t | x_0) = x_1 - x_0 with noise x_1."""
    path = Linear(data_at=0, time_scale=1.0)
    t, x0, _, x1 = draw(path, B)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
    u, v, u_cond = TEACHER(t, x_t), FAKE(t, x_t), x1 - x0
    loss = (l1 * square(u - v) + l2 * 2 * inner(u - v, v - u_cond)).mean() / l2
    agree(fused_generator(path, "velocity", "velocity", FGM(l1, l2)), loss, x0)

    v = v.detach().requires_grad_()
    agree(fused_fake(path, "velocity", "velocity", FGM(l1, l2), 0), square(v - u_cond.detach()).mean(), v)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_is_its_paper_in_edm_form(alpha, scaled):
    """Zhou et al. (2404.04057), with EDM's denoisers; without the division by mean |x - f*| ours is twice theirs."""
    sigma_data = 0.5
    path = VE(sigma_data=sigma_data)
    sigma, x, _, n = draw(path, B)
    s = sigma[:, None]
    x_t = x + s * n

    def denoise(network):
        total = s**2 + sigma_data**2
        out = network(sigma.log() / 4, x_t / total.sqrt())
        return sigma_data**2 / total * x_t + s * sigma_data / total.sqrt() * out

    f_phi, f_psi = denoise(TEACHER), denoise(FAKE)
    scale = 1 / (x - f_phi).abs().mean(1).detach() if scaled else 2
    loss = (scale * (-alpha * square(f_phi - f_psi) + inner(f_phi - f_psi, f_phi - x))).mean()
    agree(fused_generator(path, "x0", "edm", SiD(alpha, scaled)), loss, x)

    # The fake model is trained by EDM's own weighted denoising loss, in its raw output.
    total, weight = s**2 + sigma_data**2, (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    out = FAKE(sigma.log() / 4, (x_t / total.sqrt()).detach()).requires_grad_()
    f_psi = (sigma_data**2 / total * x_t).detach() + s * sigma_data / total.sqrt() * out
    loss = (weight * square(f_psi - x.detach())).mean()
    agree(fused_fake(path, "x0", "edm", SiD(alpha), 0, path.edm_weight), loss, out)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_sid_for_edm_is_its_published_code(dtype, rtol):
    """mingyuanzhou/SiD at revision 01fbb13, ``training/sid_loss.py``: levels, weight, value, gradient of each turn.

    The levels are those of the preset sid-edm. In float32 the published formula has the same tensors in float64.
    """
    settings = configs.load("presets/sid-edm")
    turns = settings.path.turns()
    objective, path = settings.distill.objective.build(), turns["fake"].path
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(B, dtype=dtype, generator=generator)
    x, n, true, fake = torch.randn(4, B, D, dtype=dtype, generator=generator)
    low, high, alpha = 0.002 ** (1 / 7), 80 ** (1 / 7), 1.2

    sigma = (high + (1 - u.double() * 800 / 1000) * (low - high)) ** 7
    t = turns["generator"].path.sampler.quantile(u, turns["generator"].path)
    torch.testing.assert_close(t.double(), sigma, rtol=10 * rtol, atol=0)
    coef = turns["generator"].coefficients(t)
    assert bool((Coefficients(coef).w == 1).all())
    y, y_real, y_fake = (v.detach().double().requires_grad_() for v in (x, true, fake))
    factor = (y - y_real).abs().mean(1, keepdim=True).clip(min=0.00001).detach()
    loss = ((y_real - y_fake) * ((y_real - y) - alpha * (y_real - y_fake)) / factor).sum() / B
    expected = loss, *torch.autograd.grad(loss, (y, y_real, y_fake))
    # The rows have the x0 space's prediction, which the published loss is given.
    given = path.coefficients(t, "x0", "x0")
    ours = [v.detach().requires_grad_() for v in (x, true, fake)]
    value = rf.functional.generator_loss(
        objective, x=ours[0], teacher_out=ours[1], fake_out=ours[2], x_t=None, coef=given, noise=n
    )
    for one, other in zip((value, *torch.autograd.grad(value, ours)), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=rtol * float(other.detach().abs().max()))

    sigma = (torch.special.ndtri(u.double()) * 1.2 - 1.2).exp()
    t = turns["fake"].path.sampler.quantile(u, path)
    torch.testing.assert_close(t.double(), sigma, rtol=10 * rtol, atol=0)
    sigma = t.double()
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    given = path.coefficients(t, "x0", "x0", turns["fake"].weight)
    ours, y_fake = fake.clone().requires_grad_(), fake.double().requires_grad_()
    value = rf.functional.fake_loss(objective, fake_out=ours, x=x, x_t=None, coef=given, noise=n)
    loss = (weight[:, None] * (y_fake - x.double()) ** 2).sum() / B
    found = value, torch.autograd.grad(value, ours)[0]
    for one, other in zip(found, (loss, torch.autograd.grad(loss, y_fake)[0]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=rtol * float(other.detach().abs().max()))


def test_realuid_is_its_two_squared_distances():
    path, alpha, beta = Linear(), 0.92, 0.94
    t, x, _, n = draw(path, B)
    x_t = t[:, None] * x + (1 - t)[:, None] * n
    gap = [alpha * square(net(t, x_t) - beta / alpha * (x - n)) for net in (TEACHER, FAKE)]
    agree(fused_generator(path, "velocity", "velocity", RealUID(alpha, beta)), (gap[0] - gap[1]).mean(), x)

    t, x, _, n = draw(path, 2 * B)
    x = x.detach()
    v = FAKE(t, t[:, None] * x + (1 - t)[:, None] * n).requires_grad_()
    target = x - n
    loss = alpha * square(v[:B] - beta / alpha * target[:B]).sum() / B
    loss = loss + (1 - alpha) * square(v[B:] - (1 - beta) / (1 - alpha) * target[B:]).sum() / B
    agree(fused_fake(path, "velocity", "velocity", RealUID(alpha, beta), B), loss, v)


@pytest.mark.parametrize("teacher_target", [False, True])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
@pytest.mark.parametrize("kappa", [1.0, 0.95])
def test_general_realuid_is_its_max_over_delta(kappa, alpha, teacher_target):
    """``-gamma ||delta||^2 + 2 <delta, alpha f* - beta tgt>`` with ``delta = kappa (f* - f)``: what the fake model
    maximises over both halves, and the generator minimises over its own.
    """
    path, beta, gamma = Linear(), 0.95, 0.7
    objective = GeneralRealUID(alpha, beta, gamma, kappa, teacher_target)

    def value(alpha, beta, gamma, teacher, fake, target):
        delta = kappa * (teacher - fake)
        return -gamma * square(delta) + 2 * inner(delta, alpha * teacher - beta * target)

    t, x, _, n = draw(path, B)
    x_t = t[:, None] * x + (1 - t)[:, None] * n
    loss = value(alpha, beta, gamma, TEACHER(t, x_t), FAKE(t, x_t), x - n).mean()
    agree(fused_generator(path, "velocity", "velocity", objective), loss, x)

    t, x, _, n = draw(path, 2 * B)
    x, target = x.detach(), (x - n).detach()
    coef = path.coefficients(t)
    x_t = rf.interpolate(x, coef, n)
    teacher, fake = TEACHER(t, x_t), FAKE(t, x_t).requires_grad_()
    of_each = (alpha, beta, gamma), (1 - alpha, 1 - beta, 1 - gamma)
    if teacher_target:
        target = torch.cat([target[:B], teacher[B:]])
    maximised = sum(
        value(*numbers, teacher[half], fake[half], target[half]).sum() / B
        for numbers, half in zip(of_each, (slice(B), slice(B, None)), strict=True)
    )
    fused = rf.functional.fake_loss(
        objective, fake_out=fake, x=x, x_t=None, coef=coef, noise=n, n_real=B, teacher_out=teacher
    )
    # The values differ by what does not depend on the fake model.
    for one, other in zip(*(torch.autograd.grad(v, fake) for v in (fused, -maximised)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("path", "match"), [(Linear(), "velocity"), (VE(), "x0"), (BrownianBridge(), "x0")])
def test_normalised_realuid_is_the_inner_product_with_a_direction(path, match, guided):
    """``w <D / ||D||, alpha f* - beta tgt>`` with everything differentiated, the norm too."""
    alpha, beta, objective = 0.9, 0.95, NormalisedRealUID(0.9, 0.95)
    t, x, y, n = draw(path, B)

    def weight(t):
        return 1 / (1 + t)

    coef = path.coefficients(t, match, match, weight)
    a, b, c, p, q, s, k_out, _, w = (column[:, None] for column in coef.unbind(1))
    state, target = a * x + b * y + c * n, p * x + q * y + s * n
    teacher, fake = k_out * TEACHER(t, state), k_out * FAKE(t, state)
    if guided:
        teacher = torch.lerp(k_out * UNCONDITIONAL(t, state), teacher, 1.7)
    d = teacher - fake
    rows = w[:, 0] * inner(d / d.norm(dim=1, keepdim=True), alpha * teacher - beta * target)
    mixed = torch.linspace(-1, 2, B, dtype=torch.float64) * rows

    for reduction, expected in (("mean", rows.mean()), ("none", mixed.sum())):
        x_t = rf.interpolate(x, coef, n, y)
        guidance = {"teacher_uncond": UNCONDITIONAL(t, x_t), "guidance": 1.7} if guided else {}
        loss = rf.functional.generator_loss(
            objective, teacher_out=TEACHER(t, x_t), fake_out=FAKE(t, x_t), x=x, x_t=x_t, coef=coef, noise=n, endpoint=y,
            reduction=reduction, **guidance,
        )  # fmt: skip
        if reduction == "none":
            torch.testing.assert_close(loss, rows, rtol=1e-12, atol=1e-12)
            loss = (torch.linspace(-1, 2, B, dtype=torch.float64) * loss).sum()
        found = loss, torch.autograd.grad(loss, x)[0]
        for one, other in zip(found, (expected, torch.autograd.grad(expected, x, retain_graph=True)[0]), strict=True):
            # 1e-10: <D, r> / ||D||^2 is large where D is small.
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    # The gradient that autograd brings to x through the networks is the one that the explicit gradients seed.
    x_t = rf.interpolate(x.detach(), coef, n, y).requires_grad_()
    outs = [TEACHER(t, x_t), FAKE(t, x_t)] + ([UNCONDITIONAL(t, x_t)] if guided else [])
    last = {"teacher_uncond": outs[2].detach(), "guidance": 1.7} if guided else {}
    grads = rf.functional.generator_grads(
        objective, teacher_out=outs[0].detach(), fake_out=outs[1].detach(), x=x.detach(), x_t=x_t.detach(), coef=coef,
        noise=n, endpoint=y, **last,
    )  # fmt: skip
    seeds = [grads.teacher_out, grads.fake_out] + ([grads.teacher_uncond] if guided else [])
    (g_x_t,) = torch.autograd.grad(outs, x_t, seeds)
    expected = torch.autograd.grad(rows.mean(), x)[0]
    torch.testing.assert_close(grads.x + a * (g_x_t + grads.x_t), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads.loss, rows.mean(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads.rows, rows, rtol=1e-10, atol=1e-10)


@dataclasses.dataclass(frozen=True)
class LogCosh:
    """``d(v) = log cosh ||v||``, a convex function of a user's."""

    def gain(self, squares):
        return squares.sqrt().tanh() / squares.sqrt()

    def bend(self, squares):
        norm = squares.sqrt()
        return (1 / (norm.sinh() * norm.cosh()) - 1 / norm) / (2 * norm)

    def __call__(self, v):
        return v.norm(dim=1).cosh().log()


def pseudo_huber(v, c):
    return (square(v) + c**2).sqrt() - c


DISTANCES = {
    "pseudo-huber": (SIM(0.3), lambda v, s: pseudo_huber(v * s, 0.3) / s[:, 0]),
    "cubic": (SIM(0.0, p=3.0), lambda v, s: square(v * s) ** 1.5 / 3 / s[:, 0]),
    "log-cosh": (dataclasses.replace(SIM(), distance=LogCosh()), lambda v, s: LogCosh()(v * s) / s[:, 0]),
}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("objective", "distance"), DISTANCES.values(), ids=DISTANCES.keys())
@pytest.mark.parametrize("match", ["x0", "noise"])
def test_sim_is_its_paper_in_scores(match, objective, distance, guided):
    """Luo et al. (2410.16794): ``-<d'(y), s_fake(x_t) - s(x_t | x)>``, ``y = s_fake - s*``, on VE, w and c as stated.

    ``d`` is evaluated at ``k y`` for ``D = k y``, times ``1 / k``; ``d'`` is by autograd and is differentiated once
    more.
    """
    path = VE()
    sigma, x, _, n = draw(path, B)
    s, k = sigma[:, None], sigma[:, None] ** (2 if match == "x0" else 1)
    x_t = x + s * n
    teacher = TEACHER(sigma, x_t)
    if guided:
        teacher = torch.lerp(UNCONDITIONAL(sigma, x_t), teacher, 1.7)
    # Networks predict in the match space: x0 = x_t + sigma^2 score, noise = -sigma score.
    scores = [(out - x_t) / s**2 if match == "x0" else -out / s for out in (teacher, FAKE(sigma, x_t))]
    y = scores[1] - scores[0]
    (slope,) = torch.autograd.grad(distance(y, k).sum(), y, create_graph=True)
    rows = -inner(slope, scores[1] - (x - x_t) / s**2)
    # In x0 space <d'(D), f - tgt> is k = sigma^2 times this loss, in noise space k = sigma times it.
    loss = (k[:, 0] * rows).mean()
    coef = path.coefficients(sigma, match, match)
    at = rf.interpolate(x, coef, n)
    outs = TEACHER(sigma, at), FAKE(sigma, at)
    last = {"teacher_uncond": UNCONDITIONAL(sigma, at), "guidance": 1.7} if guided else {}
    value = rf.functional.generator_loss(
        objective, teacher_out=outs[0], fake_out=outs[1], x=x, x_t=None, coef=coef, noise=n, **last
    )
    expected = loss, torch.autograd.grad(loss, x, retain_graph=True)[0]
    for one, other in zip((value, torch.autograd.grad(value, x)[0]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_sim_with_half_the_square_is_half_of_sid_at_one():
    x, n, teacher, fake = torch.randn(4, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    given = {"x": x, "x_t": None, "noise": n, "coef": VE().coefficients(torch.linspace(0.5, 2, B).double(), "x0", "x0")}
    sim, sid = (
        rf.functional.generator_grads(objective, teacher_out=teacher, fake_out=fake, **given)
        for objective in (SIM(0.0, p=2.0), SiD(1.0, scaled=False))
    )
    for one, other in ((sim.loss, sid.loss), (sim.x, sid.x), (sim.fake_out, sid.fake_out)):
        torch.testing.assert_close(2 * one, other, rtol=1e-12, atol=1e-12)
    assert SIM().generated == UID().generated
    assert SmoothPower(0.1) == SIM().distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sim_is_finite_where_fake_model_and_teacher_agree(dtype):
    x, n, out = torch.randn(3, B, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    coef = Linear().coefficients(torch.linspace(0.1, 0.9, B))
    grads = rf.functional.generator_grads(
        SIM(), teacher_out=out, fake_out=out.clone(), x=x, x_t=None, coef=coef, noise=n
    )
    assert grads.loss == 0
    assert torch.isfinite(grads.fake_out).all()
    assert grads.fake_out.any()


def test_normalised_realuid_trains_realuids_fake_model():
    """Whose optimum is a positive multiple of the direction that the maximum asks for: the closed forms show it."""
    normalised, plain = NormalisedRealUID(0.9, 0.95), RealUID(0.9, 0.95)
    assert (normalised.generated, normalised.real) == (plain.generated, plain.real)
    assert not normalised.needs_teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_normalised_loss_is_finite_where_fake_model_and_teacher_agree(dtype):
    """As they do at the start, where the fake model is the teacher's copy."""
    x, n, out = torch.randn(3, B, D).to(dtype)
    coef = Linear().coefficients(torch.linspace(0.1, 0.9, B))
    grads = rf.functional.generator_grads(
        NormalisedRealUID(0.9, 0.95), teacher_out=out, fake_out=out.clone(), x=x, x_t=None, coef=coef, noise=n
    )
    assert grads.loss == 0
    assert not grads.x.any()
    torch.testing.assert_close(grads.fake_out, -grads.teacher_out, rtol=0, atol=0)
    assert torch.isfinite(grads.fake_out).all()


def test_realsid_changes_the_square_alone():
    """RealUID's loss with its weight on ||f* - f||^2 taken from alpha to 2 alpha_sid alpha."""
    path, alpha, beta, alpha_sid = VE(), 0.9, 0.95, 0.8
    sigma, x, _, n = draw(path, B)
    x_t = x + sigma[:, None] * n
    teacher, fake = TEACHER(sigma, x_t), FAKE(sigma, x_t)
    loss = alpha * (square(teacher - beta / alpha * x) - square(fake - beta / alpha * x))
    loss = (loss - (2 * alpha_sid - 1) * alpha * square(teacher - fake)).mean()
    agree(fused_generator(path, "x0", "x0", RealSiD(alpha, beta, alpha_sid, scaled=False)), loss, x)

    plain = RealUID(alpha, beta)
    halved = fused_generator(path, "x0", "x0", RealSiD(alpha, beta, 0.5))
    scale = 0.5 / (x - teacher).abs().mean(1).detach()
    whole = fused_generator(path, "x0", "x0", plain, weight=lambda _: scale)
    for one, other in zip(halved, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "alpha", "scaled"),
    [(DiffInstruct(), 1.0, False), (DMD(), 1.0, True), (DMD(0.8), 0.8, True), (MomentMatching(), 1.0, False)],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("predict", ["x0", "noise"])
def test_x_alone_moves_by_the_difference_of_the_fields(objective, alpha, scaled, predict):
    """dl/dx = w alpha (f - f*), DMD's divided by mean |x - f*|; x enters the networks, but nothing flows back there."""
    path = VE()
    sigma, x, _, n = draw(path, B)
    s, fixed = sigma[:, None], x.detach()
    x_t = fixed + s * n
    seen, time = path.network_input(x_t, sigma, predict), path.network_time(sigma, predict)
    outs = TEACHER(time, seen), FAKE(time, seen)
    teacher, fake = outs if predict == "x0" else (x_t - s * out for out in outs)
    weight = 1 / s[:, 0]
    scale = 1 / (fixed - teacher).abs().mean(1) if scaled else 1
    loss = (weight * scale * alpha * inner(fake - teacher, x)).mean()
    (expected,) = torch.autograd.grad(loss, x)
    value, gradient = fused_generator(path, "x0", predict, objective, lambda sigma: 1 / sigma)
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)

    coef = path.coefficients(sigma, "x0", predict, lambda sigma: 1 / sigma)
    teacher_out, fake_out = outs
    grads = rf.functional.generator_grads(
        objective, teacher_out=teacher_out, fake_out=fake_out, x=fixed, x_t=x_t, coef=coef, noise=n
    )
    assert grads.teacher_out is grads.fake_out is grads.x_t is None
    torch.testing.assert_close(grads.x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predict", ["x0", "noise"])
def test_score_distillation_needs_no_fake_model(predict):
    """dl/dx = w (x - f*), the sample in the fake model's place; nothing of the fake model is asked for."""
    path = VE()
    sigma, x, _, n = draw(path, B)
    s, fixed = sigma[:, None], x.detach()
    x_t = fixed + s * n
    out = TEACHER(path.network_time(sigma, predict), path.network_input(x_t, sigma, predict))
    teacher = out if predict == "x0" else x_t - s * out
    coef = path.coefficients(sigma, "x0", predict, lambda sigma: 1 / sigma)
    at = x_t if path.reads_x_t("x0", predict) else None
    objective = SDS()
    grads = rf.functional.generator_grads(
        objective, teacher_out=out, fake_out=None, x=fixed, x_t=at, coef=coef, noise=n
    )
    torch.testing.assert_close(grads.x, (fixed - teacher) / s / B, rtol=1e-10, atol=1e-12)
    rf.functional.generator_loss(objective, teacher_out=out, fake_out=None, x=x, x_t=at, coef=coef, noise=n).backward()
    torch.testing.assert_close(x.grad, grads.x, rtol=1e-12, atol=0)
    own = rf.sample_output(fixed, at, coef)
    torch.testing.assert_close(coef[:, 6:7] * own + coef[:, 7:8] * x_t, fixed, rtol=1e-10, atol=1e-12)

    with pytest.raises(rf.errors.UserError, match="SDS has no fake model"):
        rf.functional.fake_loss(objective, fake_out=out, x=fixed, x_t=at, coef=coef, noise=n)
    with pytest.raises(rf.errors.UserError, match="fake_out must be given for Diff-Instruct"):
        rf.functional.generator_loss(
            DiffInstruct(), teacher_out=out, fake_out=None, x=fixed, x_t=at, coef=coef, noise=n
        )


def test_divergence_weights_are_the_second_derivative():
    """h(r) = r^2 f''(r), by differentiating each divergence's f twice."""
    functions = {
        "reverse-kl": lambda r: -r.log(),
        "forward-kl": lambda r: r * r.log(),
        "pearson": lambda r: (1 - r) ** 2 / 2,
        "jeffreys": lambda r: (r - 1) * r.log(),
        "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        "squared-hellinger": lambda r: (1 - r.sqrt()) ** 2,
        "softened-reverse-kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
        "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    }
    assert set(functions) == set(rf.objectives.DIVERGENCES)
    u = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for name, f in functions.items():
        r = u.exp().requires_grad_()
        (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), r)
        torch.testing.assert_close(divergence_weight(name, u), (r**2 * second).detach(), rtol=1e-10, atol=1e-12)
    # FastGen's table of the same weights, as functions of the ratio.
    theirs = {"softened-reverse-kl": lambda r: 1 / (1 + r), "neyman": lambda r: 1 / r, "forward-kl": lambda r: r}
    for name, weight in theirs.items():
        torch.testing.assert_close(divergence_weight(name, u), weight(u.exp()))
    assert not divergence_weight("forward-kl", u.clone().requires_grad_()).requires_grad
    with pytest.raises(rf.errors.UserError, match="divergence must be one of reverse-kl"):
        divergence_weight("kl", u)


def test_the_fake_model_of_dmd_tracks_the_mixture():
    """Denoising with weight alpha on generated and 1 - alpha on real rows, over the number of generated ones."""
    path, alpha = VE(), 0.8
    sigma, x, _, n = draw(path, 2 * B)
    x_t = (x + sigma[:, None] * n).detach()
    out = FAKE(sigma, x_t).requires_grad_()
    weight = torch.tensor([alpha] * B + [1 - alpha] * B, dtype=torch.float64)
    loss = (weight * square(out - x.detach())).sum() / B
    agree(fused_fake(path, "x0", "x0", DMD(alpha), B), loss, out)


def test_the_fake_model_of_moment_matching_is_drawn_to_the_teacher():
    """Salimans et al. (2406.04103), alternating algorithm: ||f - x||^2 + ||f - f*||^2."""
    path, objective = VE(), MomentMatching()
    sigma, x, _, n = draw(path, B)
    x = x.detach()
    x_t = x + sigma[:, None] * n
    teacher, fake = TEACHER(sigma, x_t), FAKE(sigma, x_t).requires_grad_()
    assert objective.needs_teacher
    assert not objective.needs_real
    fused = rf.functional.fake_loss(
        objective, fake_out=fake, x=x, x_t=x_t, coef=path.coefficients(sigma, "x0", "x0"), noise=n, teacher_out=teacher
    )
    literal = (square(fake - x) + square(fake - teacher)).mean()
    # The values differ by ||f*||^2, which does not depend on the fake model.
    expected = torch.autograd.grad(literal, fake)[0]
    torch.testing.assert_close(torch.autograd.grad(fused, fake)[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused, literal - square(teacher).mean(), rtol=1e-12, atol=1e-12)


def test_ibmd_is_its_paper_on_the_brownian_bridge():
    """Gushchin et al. (2502.01362): both regress x on x_t; their difference is what the generator minimises."""
    eps, path = 0.7, BrownianBridge(eps=0.7)
    t, x0, x1, n = draw(path, B)
    s = t[:, None]
    x_t = (1 - s) * x0 + s * x1 + torch.sqrt(eps * s * (1 - s)) * n
    weight = 1 / t**2  # their drift (x_t - x0) / t
    drifts = [(x_t - net(t, x_t)) / s for net in (TEACHER, FAKE)]
    loss = square(drifts[0] - (x_t - x0) / s) - square(drifts[1] - (x_t - x0) / s)
    agree(fused_generator(path, "x0", "x0", IBMD(), lambda t: t**-2), loss.mean(), x0)

    estimate = FAKE(t, x_t.detach()).requires_grad_()
    loss = (weight * square(estimate - x0.detach())).mean()
    agree(fused_fake(path, "x0", "x0", IBMD(), 0, lambda t: t**-2), loss, estimate)


def test_real_bridge_takes_pairs_as_real_rows():
    path, alpha, beta = DDBMVP(), 0.9, 0.95
    t, x, y, n = draw(path, 2 * B)
    x = x.detach()
    a, b, c = (v[:, None] for v in path.scales(t))
    edm = [v[:, None] for v in path.preconditioning(t)]
    x_t = a * x + b * y + c * n
    out = FAKE(250 * t.log(), edm[2] * x_t).requires_grad_()
    f = edm[0] * x_t + edm[1] * out
    loss = alpha * square(f[:B] - beta / alpha * x[:B]).sum() / B
    loss = loss + (1 - alpha) * square(f[B:] - (1 - beta) / (1 - alpha) * x[B:]).sum() / B
    agree(fused_fake(path, "x0", "edm", RealBridge(alpha, beta), B), loss, out)


@pytest.mark.parametrize(
    "objective",
    [
        UID(),
        SiD(0.8, scaled=False),
        RealUID(0.92, 0.94),
        GeneralRealUID(0.9, 0.95, 0.8),
        GeneralRealUID(0.9, 0.95, 0.7, kappa=0.95),
    ],
    ids=lambda o: o.name,
)
@pytest.mark.parametrize("path", [Linear(), VP(), VE()], ids=lambda p: type(p).__name__)
def test_match_spaces_differ_by_what_the_theory_gives(path, objective):
    """With f = k f0 + m x_t between the spaces and k^2 in the weight, the velocity loss is the x0 loss plus

    ``2 kappa k m (alpha - beta) <f0* - f0, x_t>``: nothing where alpha = beta. The fake model's gradient differs by
    ``2 k m kappa (alpha - beta) x_t`` in generated rows and by its opposite in real ones.
    """
    n_real = B if objective.needs_real else 0
    t, x, _, n = draw(path, B + n_real)
    x = x.detach()
    x_t = path._scales(t)[0][:, None] * x + path._scales(t)[2][:, None] * n
    teacher, fake = TEACHER(t, x_t), FAKE(t, x_t)
    velocity = path.coefficients(t, "velocity", "x0")
    k, m = velocity[:, 6], velocity[:, 7]
    data = path.coefficients(t, "x0", "x0", weight=lambda _: k**2)

    def generator(coef):
        return rf.functional.generator_grads(
            objective, teacher_out=teacher[:B], fake_out=fake[:B], x=x[:B], x_t=x_t[:B], coef=coef[:B], noise=n[:B]
        ).rows

    shift = objective.kappa * (objective.alpha - objective.beta) * 2 * k * m
    expected = shift[:B] * inner(teacher - fake, x_t)[:B]
    torch.testing.assert_close(generator(velocity) - generator(data), expected, rtol=1e-9, atol=1e-12)
    if objective.alpha != objective.beta:
        assert expected.abs().min() > 1e-6

    def gradient(coef):
        return (
            rf.functional.fake_grads(
                objective, fake_out=fake, x=x, x_t=x_t, coef=coef, noise=n, n_real=n_real, teacher_out=teacher
            ).fake_out
            * B
        )

    sign = torch.cat([torch.ones(B), -torch.ones(n_real)]).double()
    expected = (sign * shift)[:, None] * x_t
    torch.testing.assert_close(gradient(velocity) - gradient(data), expected, rtol=1e-9, atol=1e-12)


def test_presets_by_name_take_their_own_settings():
    config = ObjectiveConfig
    assert config().build() == RealUID(0.92, 0.94)
    assert config("realuid", alpha=0.9, beta=0.88).build() == RealUID(0.9, 0.88)
    assert config("sid").build() == SiD()
    assert config("realsid", alpha_sid=0.8).build() == RealSiD(0.92, 0.94, 0.8)
    assert config("fgm", l1=0.5).build() == FGM(0.5)
    assert config("dmd").build() == DMD()
    assert len({config(name).build().name for name in PRESETS}) == len(PRESETS)
