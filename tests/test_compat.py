"""Drop-in losses against the published formulas, written out here."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from realuid_fast import compat
from realuid_fast.errors import UserError
from realuid_fast.networks import build


def case(seed=0, batch=3):
    torch.manual_seed(seed)
    nets = [build({"kind": "mlp", "shape": [1, 4, 4], "width": 8, "depth": 1, "num_classes": 3}) for _ in range(2)]
    for net in nets:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
    x0, gen, data = (torch.randn(batch, 1, 4, 4) for _ in range(3))
    return *nets, torch.rand(batch), x0, gen.requires_grad_(), data, torch.arange(batch) % 3


def written_out(u, teacher, t, x0, gen, data, y, a, b, g, kappa, generator_turn, plain):
    s = t.view(-1, 1, 1, 1)
    total = 0.0
    halves = [(gen, a, b, g)] + ([] if generator_turn else [(data, 1 - a, 1 - b, None if g is None else 1 - g)])
    for x, a, b, g in halves:
        if a == 0:
            continue
        x_t, v = s * x + (1 - s) * x0, x - x0
        f = u(t, x_t, y)
        if plain:
            total = total - a * (f - b / a * v).square().sum()
            if generator_turn:
                total = total + a * (teacher(t, x_t, y) - b / a * v).square().sum()
        else:
            f_star = teacher(t, x_t, y)
            d = kappa * (f - f_star)
            total = total - g * (d * d).sum() + 2 * b * (d * v).sum() - 2 * a * (d * f_star).sum()
    return total / len(x0)


@pytest.mark.parametrize("generator_turn", [True, False])
@pytest.mark.parametrize(
    ("a", "b", "g", "how"),
    [(1, 1, None, ""), (0.92, 0.94, None, ""), (0.92, 0.94, 0.8, "standard"), (0.92, 0.94, 0.92, "beta"),
     (0.9, 0.88, 0.9, "standard"), (1.0, 1.0, 1.0, "standard")],
)  # fmt: skip
def test_losses_are_the_published_ones(a, b, g, how, generator_turn):
    u, teacher, t, x0, gen, data, y = case()
    arguments = (u, teacher, t, x0, gen if generator_turn else gen.detach(), data, y)
    if g is None:
        ours = compat.dist_loss(*arguments, a, b, generator_turn)
    else:
        ours = compat.general_dist_loss(*arguments, a, b, g, how, generator_turn)
    theirs = written_out(*arguments, a, b, g, b if how == "beta" else 1, generator_turn, g is None)
    wanted = [gen] if generator_turn else []
    wanted += list(u.parameters())
    # Float32 sums in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    for left, right in zip(
        torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_gan_loss():
    u, _, t, x0, gen, data, y = case()
    head = types.SimpleNamespace(forward_head=lambda t, x, y: u(t, x, y).mean((1, 2, 3)))
    s = t.view(-1, 1, 1, 1)
    on_gen, on_data = (head.forward_head(t, s * x + (1 - s) * x0, y) for x in (gen, data))
    torch.testing.assert_close(compat.GANloss(head, t, x0, gen, data, y), (1 + (-on_gen).exp()).log().mean())
    expected = -(1 + on_gen.exp()).log().mean() - (1 + (-on_data).exp()).log().mean()
    torch.testing.assert_close(compat.GANloss(head, t, x0, gen, data, y, generator_turn=False), expected)


def test_what_cannot_be_maximised_is_refused():
    arguments = case()
    with pytest.raises(UserError, match="alpha = 1 requires beta = 1"):
        compat.dist_loss(*arguments, 1.0, 0.9)
    with pytest.raises(UserError, match="gamma = 1"):
        compat.general_dist_loss(*arguments, 0.9, 0.92)
    with pytest.raises(UserError, match="parametrization"):
        compat.general_dist_loss(*arguments, parametrization="delta")


@pytest.fixture(scope="module")
def torchcfm():
    """torchcfm's matchers, loaded without the optimal-transport package that they import."""
    spec = importlib.util.find_spec("torchcfm")
    if spec is None:
        pytest.skip("torchcfm is not installed")
    before = {name: module for name, module in sys.modules.items() if name.startswith("torchcfm")}
    package, transport = types.ModuleType("torchcfm"), types.ModuleType("torchcfm.optimal_transport")
    package.__path__ = list(spec.submodule_search_locations)
    transport.OTPlanSampler = lambda *_, **__: None
    sys.modules |= {"torchcfm": package, "torchcfm.optimal_transport": transport}
    try:
        return importlib.import_module("torchcfm.conditional_flow_matching")
    finally:
        for name in [name for name in sys.modules if name.startswith("torchcfm")]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize(
    "name",
    ["ConditionalFlowMatcher", "ExactOptimalTransportConditionalFlowMatcher", "TargetConditionalFlowMatcher",
     "SchrodingerBridgeConditionalFlowMatcher", "VariancePreservingConditionalFlowMatcher"],
)  # fmt: skip
def test_torchcfm_matchers(torchcfm, name, sigma):
    """Their own states and targets from the same draws, through our coefficients."""
    if name == "SchrodingerBridgeConditionalFlowMatcher" and sigma == 0:
        pytest.skip("it asks for a sigma")
    matcher = getattr(torchcfm, name)(sigma)
    path = compat.from_torchcfm(matcher)
    generator = torch.Generator().manual_seed(0)
    x0, x1, eps = torch.randn(3, 6, 4, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    state = matcher.sample_xt(x0, x1, t, eps)
    target = matcher.compute_conditional_flow(x0, x1, t, state)

    a, b, c, p, q, s = (column[:, None] for column in path.coefficients(t)[:, :6].unbind(1))
    # With b = 0 their source is our noise, but for the target matcher, which draws the noise in any case.
    noise = eps if b.any() or name.startswith("Target") else x0
    torch.testing.assert_close(a * x1 + b * x0 + c * noise, state)
    torch.testing.assert_close(p * x1 + q * x0 + s * noise, target)


def test_flow_matching_paths():
    """Samples and velocities of the package's own path objects."""
    schedulers = pytest.importorskip("flow_matching.path.scheduler", reason="flow_matching is not installed")
    from flow_matching.path import AffineProbPath, CondOTProbPath

    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    made = [CondOTProbPath()]
    made += [
        AffineProbPath(scheduler)
        for scheduler in (
            schedulers.CondOTScheduler(),
            schedulers.CosineScheduler(),
            schedulers.PolynomialConvexScheduler(n=2.0),
            schedulers.LinearVPScheduler(),
            schedulers.VPScheduler(beta_min=0.2, beta_max=15.0),
        )
    ]
    for theirs in made:
        sample = theirs.sample(x_0=x0, x_1=x1, t=t)
        coef = compat.from_flow_matching(theirs).coefficients(t)
        a, c, p, s = (coef[:, i : i + 1] for i in (0, 2, 3, 5))
        name = type(theirs.scheduler).__name__
        torch.testing.assert_close(a * x1 + c * x0, sample.x_t, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(p * x1 + s * x0, sample.dx_t, msg=lambda m, name=name: f"{name}: {m}")


def test_flow_matching_schedulers():
    class PolynomialConvexScheduler:
        def __call__(self, t):
            return types.SimpleNamespace(alpha_t=t**2, sigma_t=1 - t**2, d_alpha_t=2 * t, d_sigma_t=-2 * t)

    class VPScheduler:
        beta_min, beta_max = 0.1, 20.0

        def __call__(self, t):
            raise AssertionError("known in closed form")

    t = torch.tensor([0.2, 0.7])
    path = compat.from_flow_matching(types.SimpleNamespace(scheduler=PolynomialConvexScheduler()))
    torch.testing.assert_close(path.scales(t), (t**2, 1 - t**2))
    path = compat.from_flow_matching(types.SimpleNamespace(scheduler=VPScheduler()))
    a, c = path.scales(t)
    torch.testing.assert_close(a, torch.exp(-((1 - t) * 0.1 + (1 - t) ** 2 * 9.95) / 2))
    torch.testing.assert_close(a**2 + c**2, torch.ones(2))
    with pytest.raises(UserError, match="affine path"):
        compat.from_flow_matching(object())
    with pytest.raises(UserError, match="conditional flow matchers"):
        compat.from_torchcfm(object())
