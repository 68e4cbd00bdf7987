"""Drop-in losses against the published formulas, written out here, alone and in a training script."""

import copy
import importlib
import importlib.util
import math
import sys
import types

import pytest
import torch

from realuid_fast import compat
from realuid_fast.errors import UserError
from realuid_fast.networks import build

NETWORKS = {
    "labels": {"kind": "mlp", "shape": [1, 4, 4], "width": 8, "depth": 1, "num_classes": 3},
    "no labels": {"kind": "mlp", "shape": [1, 4, 4], "width": 8, "depth": 1},
    # Without attention, whose keys' biases have no gradient but rounding.
    "channels_last": {"kind": "unet", "dim": [2, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4,
                      "middle_attention": False},
}  # fmt: skip
NETWORKS["channels_last, labels"] = {**NETWORKS["channels_last"], "class_cond": True, "num_classes": 3}
every_network = pytest.mark.parametrize("name", NETWORKS)


def shape(name):
    return NETWORKS[name].get("shape") or NETWORKS[name]["dim"]


def laid_out(tensor_or_net, name):
    return tensor_or_net.to(memory_format=torch.channels_last) if "channels_last" in name else tensor_or_net


def case(name="labels", seed=0, batch=3):
    """Fake model, teacher, times, noise, generated and real samples, labels."""
    torch.manual_seed(seed)
    nets = [laid_out(build(NETWORKS[name]), name) for _ in range(2)]
    for net in nets:
        for p in net.parameters():
            # Convolutions sum over more.
            torch.nn.init.normal_(p, std=0.1 if "channels_last" in name else 0.3)
    x0, gen, data = (laid_out(torch.randn(batch, *shape(name)), name) for _ in range(3))
    assert x0.is_contiguous() == ("channels_last" not in name)
    y = torch.arange(batch) % 3 if "num_classes" in NETWORKS[name] else None
    return *nets, torch.rand(batch), x0, gen.requires_grad_(), data, y


def exact(arguments):
    """The same in float64, networks and all, with leaves of its own."""
    moved = []
    for value in arguments:
        if isinstance(value, torch.nn.Module):
            value = copy.deepcopy(value).double()
        elif value is not None and value.is_floating_point():
            value = value.detach().double().requires_grad_(value.requires_grad)
        moved.append(value)
    return moved


def outputs_of(net):
    """A float64 network for float32 samples, so that what is rounded is the loss."""
    return lambda t, x, y: net(t.double(), x.double(), y).to(x.dtype)


def close(found, expected):
    """Within 1e-5 of the largest number."""
    found, expected = found.detach().double(), expected.detach().double()
    size = float(expected.abs().max())
    assert size > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * size)


def written_out(u, teacher, t, x0, gen, data, y, a, b, g, kappa, generator_turn):
    """RealUID by two squares, or with a ``g`` the general loss by ``d``: what the turn maximises or minimises."""
    s = t.view(-1, 1, 1, 1)
    total = 0.0
    halves = [(gen, a, b, g)] + ([] if generator_turn else [(data, 1 - a, 1 - b, None if g is None else 1 - g)])
    for x, a, b, g in halves:
        x_t, v = s * x + (1 - s) * x0, x - x0
        f = u(t, x_t, y)
        if g is not None:
            f_star = teacher(t, x_t, y)
            d = kappa * (f - f_star)
            total = total - g * (d * d).sum() + 2 * b * (d * v).sum() - 2 * a * (d * f_star).sum()
        elif a != 0:
            total = total - a * (f - b / a * v).square().sum()
            if generator_turn:
                total = total + a * (teacher(t, x_t, y) - b / a * v).square().sum()
    return total / len(x0)


def losses(arguments, a, b, g, how, generator_turn):
    """Ours in float32 and the formula in float64, and what each is differentiated in."""
    given = list(arguments)
    if not generator_turn:
        given[4] = given[4].detach()
    theirs = exact(given)
    given[:2] = map(outputs_of, theirs[:2])
    if g is None:
        ours = compat.dist_loss(*given, a, b, generator_turn)
    else:
        ours = compat.general_dist_loss(*given, a, b, g, how, generator_turn)
    formula = written_out(*theirs, a, b, g, b if how == "beta" else 1, generator_turn)
    parameters = list(theirs[0].parameters())
    leaves = [[x[4], *parameters] if generator_turn else parameters for x in (given, theirs)]
    return ours, formula, *leaves


@every_network
@pytest.mark.parametrize("generator_turn", [True, False])
@pytest.mark.parametrize(
    ("a", "b", "g", "how"),
    [(1, 1, None, ""), (0.92, 0.94, None, ""), (0.92, 0.94, 0.8, "standard"), (0.92, 0.94, 0.92, "beta"),
     (0.9, 0.88, 0.9, "standard"), (1.0, 1.0, 1.0, "standard"), (1.0, 1.0, 0.8, "standard"), (1.0, 0.9, 0.8, "beta")],
)  # fmt: skip
def test_losses_are_the_published_ones(name, a, b, g, how, generator_turn):
    ours, formula, leaves, theirs = losses(case(name), a, b, g, how, generator_turn)
    close(ours, formula)
    for left, right in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(formula, theirs), strict=True):
        close(left, right)


@pytest.mark.parametrize(
    ("a", "b", "g", "how"),
    [(1.0, 0.9, None, ""), (1.2, 0.9, None, ""), (0.9, -0.5, None, ""), (0.9, 0.92, 1.0, "standard"),
     (1.0, 0.9, 1.0, "beta"), (0.9, 0.92, 1.3, "standard"), (0.0, 0.9, -0.5, "standard")],
)  # fmt: skip
def test_the_generators_formula_takes_any_numbers(a, b, g, how):
    """Those too whose other turn has no maximum: there is no real half here that could lack its square."""
    ours, formula, leaves, theirs = losses(case(), a, b, g, how, generator_turn=True)
    close(ours, formula)
    close(torch.autograd.grad(ours, leaves)[0], torch.autograd.grad(formula, theirs)[0])
    with pytest.raises(UserError):
        losses(case(), a, b, g, how, generator_turn=False)


def test_what_has_no_maximum_has_none_on_a_batch():
    """A multiple of the real samples' target, added to the fake model where they are, raises the formula for ever.

    It is what the refusals below are about; with a square on the real half it falls in the end.
    """
    u, teacher, t, x0, gen, data, y = exact(case())
    s = t.view(-1, 1, 1, 1)
    x_t, v = s * data + (1 - s) * x0, data - x0

    def value(size, a, b, g):
        def moved(t, x, y):
            return u(t, x, y) + (size * v if torch.equal(x, x_t) else 0)

        return float(written_out(moved, teacher, t, x0, gen.detach(), data, y, a, b, g, 1, False).detach())

    for a, b, g, bounded in ((1.0, 0.9, 1.0, False), (1.0, 0.9, 0.8, True), (0.9, 0.92, 0.9, True)):
        values = [value(size, a, b, g) for size in (0.0, 1e3, 1e6)]
        assert (values[2] < values[0]) == bounded, (a, b, g, values)
        assert (values[1] < values[2]) != bounded
    # Whatever their sign, for one of the two.
    up, down = (value(size, 0.9, 0.92, 1.0) for size in (1e6, -1e6))
    assert max(up, down) > 1e3


def test_what_cannot_be_maximised_is_refused_in_the_fake_turn_alone():
    arguments = case()
    for a, b, words in (
        (1.0, 0.9, "alpha = 1 requires beta = 1.*unbounded"),
        (1.2, 0.9, r"alpha must lie in \(0, 1\]"),
        (0.0, 0.9, r"alpha must lie in \(0, 1\]"),
    ):
        with pytest.raises(UserError, match=words):
            compat.dist_loss(*arguments, a, b, generator_turn=False)
    for a, b, g, words in (
        (0.9, 0.92, 1.0, "gamma = 1 requires alpha = beta = 1.*unbounded"),
        (1.0, 0.92, 1.0, "alpha = 1 requires beta = 1.*unbounded"),
        (0.9, 0.92, 1.1, r"gamma must lie in \(0, 1\]"),
        (1.0, 1.0, 1.1, r"gamma must lie in \(0, 1\]"),
        (0.9, 0.92, 0.0, r"gamma must lie in \(0, 1\]"),
    ):
        with pytest.raises(UserError, match=words):
            compat.general_dist_loss(*arguments, a, b, g, generator_turn=False)
    for turn in (True, False):
        with pytest.raises(UserError, match="parametrization must be 'standard' or 'beta', not 'delta'"):
            compat.general_dist_loss(*arguments, parametrization="delta", generator_turn=turn)
        with pytest.raises(UserError, match="alpha must be a finite number"):
            compat.dist_loss(*arguments, alpha=float("nan"), generator_turn=turn)
    with pytest.raises(UserError, match="alpha must not be 0: the formula divides by it"):
        compat.dist_loss(*arguments, alpha=0.0)


def test_real_samples_may_be_missing_where_they_play_no_part():
    arguments = list(case())
    expected = compat.dist_loss(*arguments, generator_turn=False)
    arguments[5] = None
    assert torch.equal(compat.dist_loss(*arguments, generator_turn=False), expected)
    assert torch.isfinite(compat.dist_loss(*arguments, 0.9, 0.92))
    assert torch.isfinite(compat.general_dist_loss(*arguments, generator_turn=False))
    with pytest.raises(UserError, match=r"x1_data must be given with alpha = 0\.9, gamma = 0\.9"):
        compat.dist_loss(*arguments, 0.9, 0.92, generator_turn=False)
    with pytest.raises(UserError, match=r"x1_data must be given with alpha = 1, gamma = 0\.8"):
        compat.general_dist_loss(*arguments, 1.0, 1.0, 0.8, generator_turn=False)


@pytest.mark.parametrize("generator_turn", [True, False])
def test_the_general_loss_keeps_its_digits_where_the_fake_model_is_near_the_teacher(generator_turn):
    _, _, t, x0, gen, data, y = case()
    f_star = torch.randn(3 if generator_turn else 6, *x0.shape[1:])
    f = (f_star + 1e-4 * torch.randn_like(f_star)).requires_grad_()
    given = (lambda *_: f, lambda *_: f_star, t, x0, gen.detach(), data, y)
    found = compat.general_dist_loss(*given, 0.92, 0.94, 0.8, "standard", generator_turn)
    total, wide = 0.0, f.detach().double().requires_grad_()
    for half, (x, a, b, g) in enumerate(((gen, 0.92, 0.94, 0.8), (data, 0.08, 0.06, 0.2))[: len(f) // 3]):
        rows = slice(3 * half, 3 * half + 3)
        d, v = wide[rows] - f_star[rows].double(), (x - x0).detach().double()
        total = total + (-g * d * d + 2 * b * d * v - 2 * a * d * f_star[rows]).sum() / 3
    close(found, total)
    close(torch.autograd.grad(found, f)[0], torch.autograd.grad(total, wide)[0])


def head(net):
    return types.SimpleNamespace(forward_head=lambda t, x, y: net(t, x, y).sum((1, 2, 3)))


def cross_entropy(u, t, x0, gen, data, y, generator_turn):
    """The non-saturating loss of the head's logits: minimised by the generator, maximised by the head."""
    s = t.view(-1, 1, 1, 1)
    on_gen, on_data = (u.forward_head(t, s * x + (1 - s) * x0, y) for x in (gen, data))
    if generator_turn:
        return -on_gen.sigmoid().log().mean()
    return (1 - on_gen.sigmoid()).log().mean() + on_data.sigmoid().log().mean()


@every_network
@pytest.mark.parametrize("generator_turn", [True, False])
def test_gan_loss(name, generator_turn):
    u, _, *others = case(name)
    u, *exactly = exact([u, *others])
    ours = compat.GANloss(head(outputs_of(u)), *others, generator_turn=generator_turn)
    formula = cross_entropy(head(u), *exactly, generator_turn)
    assert ours.dtype == torch.float32
    close(ours, formula)
    leaves, theirs = ([x[2], *u.parameters()] if generator_turn else list(u.parameters()) for x in (others, exactly))
    for left, right in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(formula, theirs), strict=True):
        close(left, right)
    if not generator_turn:
        # As published, the head's turn leaves the samples out of the graph.
        loss = compat.GANloss(head(outputs_of(u)), *others, generator_turn=False)
        assert torch.autograd.grad(loss, others[2], allow_unused=True) == (None,)


@pytest.mark.parametrize("generator_turn", [True, False])
@pytest.mark.parametrize("name", ["transposed", "channels_last", "channels_last_3d"])
def test_every_layout_gives_the_same(name, generator_turn):
    """Samples in one layout, noise and networks' outputs in another."""
    torch.manual_seed(0)
    gen, *others = torch.randn(5, 3, 4, *([2] if "3d" in name else []), 6, 6)
    if name == "transposed":
        moved = gen.mT.contiguous().mT
    else:
        moved = gen.to(memory_format=getattr(torch, name))
    assert not moved.is_contiguous()
    x0, data, f, f_star = others
    rows, t = 1 if generator_turn else 2, torch.rand(3)
    seen = []

    def net(out):
        return lambda t, x, y: seen.append(x) or torch.cat([out] * rows)

    for loss in (compat.dist_loss, compat.general_dist_loss):
        numbers = {"alpha": 0.92, "beta": 0.94, "generator_turn": generator_turn}
        numbers |= {"gamma": 0.8} if loss is compat.general_dist_loss else {}
        plain, again = (loss(net(f), net(f_star), t, x0, x1, data, **numbers) for x1 in (gen, moved))
        torch.testing.assert_close(again, plain)
    assert len({x.stride() for x in seen}) == (1 if name == "transposed" else 2)


PLAIN = types.SimpleNamespace(
    dist_loss=lambda u, teacher, t, x0, gen, data, y, a, b, generator_turn: written_out(
        u, teacher, t, x0, gen, data, y, a, b, None, 1, generator_turn
    ),
    general_dist_loss=lambda u, teacher, t, x0, gen, data, y, a, b, g, how, generator_turn: written_out(
        u, teacher, t, x0, gen, data, y, a, b, g, b if how == "beta" else 1, generator_turn
    ),
    GANloss=lambda u, t, x0, gen, data, y, generator_turn: cross_entropy(u, t, x0, gen, data, y, generator_turn),
)


class Headed(torch.nn.Module):
    def __init__(self, net, size):
        super().__init__()
        self.net, self.head = net, torch.nn.Linear(size, 1)

    def forward(self, t, x, y=None):
        return self.net(t, x, y)

    def forward_head(self, t, x, y=None):
        return self.head(self.net(t, x, y).flatten(1))


def script(imported, name, dtype, numbers, how, adversarial, turns=18):
    """A training script in miniature: five turns of ``u``, one of the generator; everything that it has trained."""
    torch.manual_seed(1)
    size = math.prod(shape(name))
    u, teacher, generator = (laid_out(Headed(case(name, seed)[0], size), name).to(dtype) for seed in range(3))
    teacher.requires_grad_(False)
    start = [p.detach().clone() for net in (u, generator) for p in net.parameters()]
    adam = {"lr": 1e-3, "betas": (0.0, 0.999)}
    optim_u = torch.optim.Adam(u.parameters(), maximize=True, **adam)
    optim_generator = torch.optim.Adam(generator.parameters(), **adam)
    images = laid_out(torch.randn(12, *shape(name)).to(dtype), name)
    labels = torch.arange(12) % 3 if "num_classes" in NETWORKS[name] else None
    for turn in range(turns):
        rows = torch.randperm(12)[:4]
        data, y = laid_out(images[rows], name), None if labels is None else labels[rows]
        x0, z = (torch.randn_like(data) for _ in range(2))
        t, late = torch.rand(4, dtype=dtype), 1 - 0.2 * torch.rand(4, dtype=dtype)
        gen = z + generator(torch.zeros(4, dtype=dtype), z, y)
        generator_turn = turn % 6 == 5
        net, optimiser = (generator, optim_generator) if generator_turn else (u, optim_u)
        gen = gen if generator_turn else gen.detach()
        optimiser.zero_grad()
        loss_of = imported.dist_loss if len(numbers) == 2 else imported.general_dist_loss
        loss = loss_of(u, teacher, t, x0, gen, data, y, *numbers, *how, generator_turn=generator_turn)
        if adversarial:
            loss = loss + 3 * imported.GANloss(u, late, x0, gen, data, y, generator_turn=generator_turn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    return start, [p.detach() for net in (u, generator) for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "numbers", "how", "adversarial"),
    [
        ("labels", (1.0, 1.0), (), False),
        ("labels", (0.92, 0.94), (), True),
        ("no labels", (0.92, 0.94, 0.8), ("beta",), False),
        ("channels_last", (0.92, 0.94), (), False),
        ("channels_last, labels", (1.0, 0.94, 0.8), ("standard",), True),
    ],
)
def test_one_changed_import_trains_the_same_networks(name, numbers, how, adversarial, dtype):
    start, plain = script(PLAIN, name, dtype, numbers, how, adversarial)
    again, ours = script(compat, name, dtype, numbers, how, adversarial)
    moved, apart = [], []
    for begin, same, one, two in zip(start, again, plain, ours, strict=True):
        assert torch.equal(begin, same)
        moved.append((one - begin).flatten())
        apart.append((one - two).flatten())
    share = float(torch.cat(apart).norm() / torch.cat(moved).norm())
    assert float(torch.cat(moved).norm()) > 0.01
    # Adam without a first moment moves a parameter by the rate however small its gradient is, and so rounding shows.
    # Found: up to 1e-5 and 8e-15.
    assert share < {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]


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
    class AffineProbPath:
        def __init__(self, scheduler):
            self.scheduler = scheduler

    class PolynomialConvexScheduler:
        def __call__(self, t):
            return types.SimpleNamespace(alpha_t=t**2, sigma_t=1 - t**2, d_alpha_t=2 * t, d_sigma_t=-2 * t)

    class VPScheduler:
        beta_min, beta_max = 0.1, 20.0

        def __call__(self, t):
            raise AssertionError("known in closed form")

    VPScheduler.__module__ = "flow_matching.path.scheduler.scheduler"
    t = torch.tensor([0.2, 0.7])
    path = compat.from_flow_matching(AffineProbPath(PolynomialConvexScheduler()))
    torch.testing.assert_close(path.scales(t), (t**2, 1 - t**2))
    path = compat.from_flow_matching(AffineProbPath(VPScheduler()))
    a, c = path.scales(t)
    torch.testing.assert_close(a, torch.exp(-((1 - t) * 0.1 + (1 - t) ** 2 * 9.95) / 2))
    torch.testing.assert_close(a**2 + c**2, torch.ones(2))
    for other in (object(), types.SimpleNamespace(scheduler=VPScheduler())):
        with pytest.raises(UserError, match="path must be an AffineProbPath of flow_matching"):
            compat.from_flow_matching(other)

    class CosineScheduler(PolynomialConvexScheduler):
        """A class of a user's own under a name of the package."""

    path = compat.from_flow_matching(AffineProbPath(CosineScheduler()))
    torch.testing.assert_close(path.scales(t), (t**2, 1 - t**2))
    with pytest.raises(UserError, match="conditional flow matchers"):
        compat.from_torchcfm(object())


def test_only_affine_paths_of_flow_matching_are_taken():
    """Geodesics and discrete mixtures have a scheduler too, and a subclass may draw its samples in another way."""
    theirs = pytest.importorskip("flow_matching.path", reason="flow_matching is not installed")
    from flow_matching.path.scheduler import CondOTScheduler, PolynomialConvexScheduler
    from flow_matching.utils.manifolds import Sphere

    class Bent(theirs.AffineProbPath):
        def sample(self, x_0, x_1, t):
            return super().sample(x_0, x_1, t**2)

    for path in (
        theirs.GeodesicProbPath(CondOTScheduler(), Sphere()),
        theirs.MixtureDiscreteProbPath(PolynomialConvexScheduler(n=2.0)),
        Bent(CondOTScheduler()),
    ):
        with pytest.raises(UserError, match=rf"path must be an AffineProbPath .*, not {type(path).__name__}: no other"):
            compat.from_flow_matching(path)


def test_times_near_an_end_are_clipped_and_not_refused(torchcfm):
    """A row there is the row of the clipped time: on CPU times outside a path's range would be an error."""
    schedulers = pytest.importorskip("flow_matching.path.scheduler", reason="flow_matching is not installed")
    from flow_matching.path import AffineProbPath

    t = torch.cat(
        [torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0]), torch.rand(4096, generator=torch.Generator().manual_seed(0))]
    )
    for scheduler, low in (
        (schedulers.PolynomialConvexScheduler(n=0.5), 1e-4),
        (schedulers.LinearVPScheduler(), 1e-4),
        (schedulers.VPScheduler(), 0.0),
    ):
        clipped = t.double().clamp(low, 1 - 1e-4)
        found = compat.from_flow_matching(AffineProbPath(scheduler)).coefficients(t.double())
        out = scheduler(clipped)
        expected = torch.stack([out.alpha_t, out.sigma_t, out.d_alpha_t, out.d_sigma_t], 1)
        torch.testing.assert_close(found[:, [0, 2, 3, 5]], expected)
        assert torch.isfinite(compat.from_flow_matching(AffineProbPath(scheduler)).coefficients(t)).all()
    path = compat.from_torchcfm(torchcfm.SchrodingerBridgeConditionalFlowMatcher(0.5))
    found, at = path.coefficients(t.double()), t.double().clamp(1e-4, 1 - 1e-4)
    root = torch.sqrt(at * (1 - at))
    expected = [at, 1 - at, 0.5 * root, torch.ones_like(at), -torch.ones_like(at), 0.25 * (1 - 2 * at) / root]
    torch.testing.assert_close(found[:, :6], torch.stack(expected, 1))


@pytest.mark.parametrize("generator_turn", [True, False])
def test_times_are_taken_in_every_form_that_the_published_code_takes(generator_turn):
    u, teacher, t, x0, gen, data, y = case()
    losses = (
        lambda t: compat.dist_loss(u, teacher, t, x0, gen, data, y, 0.92, 0.94, generator_turn),
        lambda t: compat.general_dist_loss(u, teacher, t, x0, gen, data, y, 0.92, 0.94, 0.8, "beta", generator_turn),
        lambda t: compat.GANloss(head(u), t, x0, gen, data, y, generator_turn),
    )
    for loss in losses:
        expected = loss(t)
        for form in (t.double(), t.view(3, 1, 1, 1), t.double().view(3, 1, 1, 1)):
            assert torch.equal(loss(form), expected)
        same = loss(torch.full((3,), 0.25))
        for form in (
            0.25,
            torch.tensor(0.25),
            torch.tensor([0.25], dtype=torch.float64),
            torch.full((1, 1, 1, 1), 0.25),
        ):
            assert torch.equal(loss(form), same)
        for form in (0, 1):
            assert torch.isfinite(loss(form))
        for wrong, words in ((torch.rand(2), r"shape \(2,\)"), ([0.1, 0.2, 0.3], r"\[0\.1, 0\.2, 0\.3\]")):
            with pytest.raises(UserError, match=rf"t must be a number or a tensor of one time or of 3, .*got {words}"):
                loss(wrong)
    # float32 times of float64 samples.
    given = exact([u, teacher, x0, gen, data])
    loss = compat.dist_loss(*given[:2], t, *given[2:], y, 0.92, 0.94, generator_turn)
    assert loss.dtype == torch.float64
    close(loss, losses[0](t))


def test_the_published_loss_at_alpha_one_has_a_maximum_without_real_data():
    """Its real half is left out there: the maximum is beta times the target, and the generator ends at u* / beta."""
    _, teacher, t, x0, gen, data, y = exact(case())
    s, v, beta = t.view(-1, 1, 1, 1), (gen - x0).detach(), 0.96
    at, best = (s * gen + (1 - s) * x0).detach(), beta * v

    def value(f, real, generator_turn=False):
        fake = lambda t, x, y: f  # noqa: E731
        return written_out(fake, teacher, t, x0, gen.detach(), real, y, 1.0, beta, None, 1, generator_turn)

    top = value(best, data)
    assert float(top) == 0
    for size in (-1e3, -0.1, 0.1, 1e3):
        assert value(best + size * v, data) < top
        assert value(best + size * v, data) == value(best + size * v, 7 * data)
    # The generator's turn there is the distance of its own field, here v, to u* / beta.
    with torch.no_grad():
        distance = beta**2 * (v - teacher(t, at, y) / beta).square().sum() / 3
        torch.testing.assert_close(value(best, data, True), distance)
    with pytest.raises(
        UserError, match=r"alpha = 1 requires beta = 1, got beta = 0\.96: .* leaves its real half out there"
    ):
        compat.dist_loss(*case(), 1.0, beta, generator_turn=False)
