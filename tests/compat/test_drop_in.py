"""Other frameworks' losses against their formulas, written out here under autograd: values, gradients, digits."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, so that forked ranks need not
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from realuid_fast.compat import dmd2, fastgen, modelopt, sid
from realuid_fast.errors import UserError

from ..train.ranks.ranks import on_ranks

VSD = {"fastgen": fastgen.variational_score_distillation_loss, "modelopt": modelopt.vsd_loss}
PREDICTIONS = ("x0", "eps", "v", "flow")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def wide(value):
    """The same in float64, where it is a tensor of floating-point numbers."""
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_near(found, expected, tolerance=1e-6):
    """The relative distance, over the whole tensor, is below the tolerance."""
    found, expected = wide(found), wide(expected)
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    assert float(expected.norm()) > 0


def vsd(x, teacher, fake, scale=None):
    """Half the mean square of ``x - (x - g)``, ``g`` held fixed, in the tensors' own dtype; the weight in float32."""
    with torch.no_grad():
        own = [v if v.dtype == torch.float64 else v.float() for v in (x, teacher)]
        weight = 1 / ((own[0] - own[1]).abs().flatten(1).mean(1) + 1e-6)
        weight = (weight if scale is None else weight * scale.to(weight.dtype)).to(x.dtype).view(-1, 1, 1, 1)
        pseudo = x - (fake - teacher) * weight
    return 0.5 * F.mse_loss(x, pseudo)


def dsm(kind, pred, x0, eps, alpha, sigma):
    alpha, sigma = (v.to(x0.dtype).view(-1, 1, 1, 1) for v in (alpha, sigma))
    return F.mse_loss({"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind], pred)


def gradient(loss, of):
    (found,) = torch.autograd.grad(loss, of)
    return found


def case(gap=0.3, dtype=torch.float32, shape=(6, 3, 5, 4), layout="contiguous"):
    """Generated samples, the teacher's and the fake model's prediction, which differ by ``gap``."""
    torch.manual_seed(0)
    teacher = torch.randn(shape)
    made = teacher + 0.5 * torch.randn(shape), teacher, teacher + gap * torch.randn(shape)
    x, teacher, fake = (v.to(dtype, memory_format=LAYOUTS[layout]) for v in made)
    return x.requires_grad_(), teacher, fake


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.7), torch.linspace(0.2, 3, 6)], ids=["none", "one", "rows"])
@pytest.mark.parametrize("name", VSD)
def test_variational_score_distillation(name, scale, layout):
    x, teacher, fake = case(layout=layout)
    loss = VSD[name](x, teacher, fake, scale)
    exact = wide(x).requires_grad_()
    expected = vsd(exact, wide(teacher), wide(fake), scale)
    assert loss.dtype == torch.float32
    assert_near(loss, expected)
    assert_near(gradient(loss, x), gradient(expected, exact))
    # Noise, and predictions, may come in another layout.
    other = VSD[name](x, teacher.contiguous(), fake.contiguous(memory_format=torch.channels_last), scale)
    assert_near(other, expected)
    assert torch.equal(VSD[name](x.detach(), teacher, fake, scale), loss)
    assert VSD[name](exact, wide(teacher), wide(fake), scale).dtype == torch.float64


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_denoising_score_matching(kind):
    pred, x0, eps = case(2.0)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    alpha, sigma = lambda t: torch.cos(t), lambda t: torch.sin(t)
    exact = wide(pred).requires_grad_()
    expected = dsm(kind, exact, wide(x0), wide(eps), alpha(t), sigma(t))
    expected_gradient = gradient(expected, exact)
    given = {name: tensor for name, tensor in (("x0", x0), ("eps", eps)) if kind in (name, "v", "flow")}
    schedule = SimpleNamespace(alpha=alpha, sigma=sigma) if kind == "v" else None
    for loss in (
        fastgen.denoising_score_matching_loss(kind, pred, noise_scheduler=schedule, t=t, **given),
        modelopt.dsm_loss(kind, pred, **given, t=t, alpha_fn=alpha, sigma_fn=sigma),
    ):
        assert_near(loss, expected)
        assert_near(gradient(loss, pred), expected_gradient)


@pytest.mark.parametrize(("gap", "restated"), [(0.3, 0.003), (0.1, 0.006), (0.03, 0.015), (0.01, 0.04)])
def test_bf16_gradients_keep_their_digits_where_the_fake_model_is_near(gap, restated):
    """The pseudo target is rounded to bf16 as the samples are, and the gradient is its small distance from them."""
    x, teacher, fake = case(gap, torch.bfloat16, (16, 3, 16, 16))
    exact = wide(x).requires_grad_()
    expected = gradient(vsd(exact, wide(teacher), wide(fake)), exact)
    found = gradient(fastgen.variational_score_distillation_loss(x, teacher, fake), x)
    assert found.dtype == torch.bfloat16
    assert_near(found, expected, 0.002)
    theirs = gradient(vsd(x, teacher, fake), x)
    assert float((wide(theirs) - expected).norm() / expected.norm()) > restated


RATIOS = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r.clamp(min=1e-8),
    "sh": torch.sqrt,
    "jf": lambda r: 1 + r,
}


@pytest.mark.parametrize("name", RATIOS)
def test_f_distill_weights(name):
    r = torch.tensor([1e-9, 0.1, 0.7, 1.0, 3.0, 20.0, 2e4])
    assert_near(fastgen.all_f_div_weighting_function[name](r), RATIOS[name](r.double()))
    assert fastgen.all_f_div_weighting_function.keys() == RATIOS.keys()


def model_of(name, normalised, bins=4):
    settings = SimpleNamespace(
        ratio_lower=0.1, ratio_upper=20.0, ratio_normalization=normalised, ratio_ema_rate=0.3, f_div=name
    )
    schedule = SimpleNamespace(min_t=0.002, max_t=80.0)
    return SimpleNamespace(
        config=SimpleNamespace(f_distill=settings),
        f_div_weighting_function=fastgen.all_f_div_weighting_function[name],
        net=SimpleNamespace(noise_scheduler=schedule, bins=torch.linspace(0.5, 2, bins)),
        bin_num=bins,
    )


def normalised_weights(name, logits, t, bins, normalised):
    """The weights and the running means after them, in float64, bucket by bucket."""
    r, bins = logits.double().mean(1).clamp(-10, 10).exp().clamp(0.1, 20), bins.double()
    if normalised:
        bucket = ((t.double() - 0.002) / (80.0 - 0.002) * len(bins)).long().clamp(0, len(bins) - 1)
        for i in range(len(bins)):
            if (inside := r[bucket == i]).numel():
                bins[i] = 0.3 * bins[i] + 0.7 * inside.sum() / (len(inside) + 1e-6)
        r = r / (bins[bucket] + 1e-6)
    h = RATIOS[name](r)
    return h / (h.mean() + 1e-6), bins


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", ["js", "kl", "rkl"])
def test_f_distill_weights_are_normalised_over_the_batch_and_by_time(name, normalised):
    torch.manual_seed(0)
    logits, t, model = 3 * torch.randn(9, 2), torch.rand(9) * 30, model_of(name, normalised)
    expected, bins = normalised_weights(name, logits, t, model.net.bins.clone(), normalised)
    assert_near(fastgen.get_f_div_weighting_h(model, logits, t), expected)
    # Half of the range of times has no sample, and its means stay as they are.
    assert_near(model.net.bins, bins)


class Net(torch.nn.Module):
    """A network in the formula's own dtype: some function of the noisy samples, with a gradient."""

    def __init__(self, at, seed, size=0.3):
        super().__init__()
        self.at, self.out = at, torch.randn(at.shape, generator=torch.Generator().manual_seed(seed), dtype=at.dtype)
        self.shift = torch.nn.Parameter(torch.zeros((), dtype=at.dtype))
        self.size, self.seen = size, []

    def forward(self, x_t, sigma, labels=None, augment_labels=None):
        self.seen.append(x_t.detach())
        return self.at.to(x_t.dtype) + self.size * self.out.to(x_t.dtype) + torch.tanh(x_t / (1 + sigma)) + self.shift


def sid_generator(true, fake, x, alpha, tmax):
    share = torch.rand([len(x), 1, 1, 1]).to(x.dtype) * tmax / 1000
    sigma = (80 ** (1 / 7) * share + 0.002 ** (1 / 7) * (1 - share)) ** 7
    x_t = x + sigma * torch.randn(x.shape).to(x.dtype)
    f_true, f_fake = true(x_t, sigma), fake(x_t, sigma)
    weight = (x - f_true).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5).detach()
    return ((f_true - f_fake) * (f_true - x - alpha * (f_true - f_fake)) / weight).sum()


def sid_fake(fake, x, data):
    sigma = (torch.randn([len(x), 1, 1, 1]).to(x.dtype) * 1.2 - 1.2).exp()
    x_t = x + sigma * torch.randn(x.shape).to(x.dtype)
    return ((sigma**2 + data**2) / (sigma * data) ** 2 * (fake(x_t, sigma) - x) ** 2).sum()


def same_draws(ours, theirs):
    found = []
    for function in (ours, theirs):
        torch.manual_seed(1)
        found.append(function())
    return found


def wide_copy(net):
    other = Net(wide(net.at), 0)
    other.out = wide(net.out)
    return other


@pytest.mark.parametrize("alpha", [1.0, 1.2, 0.0])
def test_sid_generator_loss(alpha):
    x, at, _ = case()
    true, fake, exact = Net(at, 1), Net(at, 2), wide(x).requires_grad_()
    true64, fake64 = wide_copy(true), wide_copy(fake)
    loss, expected = same_draws(
        lambda: sid.SID_EDMLoss().generator_loss(true, fake, x, alpha=alpha, tmax=700),
        lambda: sid_generator(true64, fake64, exact, alpha, 700),
    )
    assert loss.shape == (6,)
    assert_near(true.seen[0], true64.seen[0])
    assert_near(loss.sum(), expected)
    # Both networks round their outputs to float32, which the difference between them shows.
    assert_near(gradient(loss.sum(), x), gradient(expected, exact), 2e-6)


def test_sid_fake_loss():
    x, at, _ = case()
    x, fake = x.detach(), Net(at, 1)
    fake64 = wide_copy(fake)
    loss, expected = same_draws(
        lambda: sid.SID_EDMLoss(sigma_data=0.6)(fake, x), lambda: sid_fake(fake64, wide(x), 0.6)
    )
    assert loss.shape == (6,)
    assert_near(loss.sum(), expected)
    assert_near(gradient(loss.sum(), fake.shift), gradient(expected, fake64.shift))


def test_sid_leaves_samples_with_nan_out():
    x, at, _ = case()
    loss_of = sid.SID_EDMLoss(drop_nan=True)
    true, fake = Net(at, 1), Net(at, 2)
    fake.out[2, 0, 1] = math.nan
    torch.manual_seed(1)
    rows = loss_of.generator_loss(true, fake, x)
    assert (rows[2], rows.isnan().any()) == (0, False)
    g = gradient(rows.sum(), x)
    assert not g.isnan().any()
    assert [bool(row.any()) for row in g] == [True, True, False, True, True, True]
    assert int(loss_of(fake, x.detach()).isnan().sum()) == 0
    assert int(sid.SID_EDMLoss(drop_nan=False)(fake, x.detach()).isnan().sum()) == 1


def guidance(real, fake, dtype=torch.float32):
    ramp = torch.linspace(0, 1, 100, dtype=dtype)
    sigmas = (80 ** (1 / 7) * ramp + 0.002 ** (1 / 7) * (1 - ramp)) ** 7
    return SimpleNamespace(
        real_unet=real, fake_unet=fake, karras_sigmas=sigmas, min_step=2, max_step=98, num_train_timesteps=100,
        sigma_data=0.5,
    )  # fmt: skip


def matching_restated(model, x):
    with torch.no_grad():
        steps = torch.randint(2, 99, [len(x), 1, 1, 1])
        sigma = model.karras_sigmas[steps]
        x_t = x + sigma * torch.randn(x.shape).to(x.dtype)
        to_real, to_fake = (x - net(x_t, sigma) for net in (model.real_unet, model.fake_unet))
        g = torch.nan_to_num((to_real - to_fake) / to_real.abs().mean((1, 2, 3), keepdim=True))
    return 0.5 * F.mse_loss(x, (x - g).detach()), g


def fake_restated(model, x):
    noise = torch.randn(x.shape).to(x.dtype)
    sigma = model.karras_sigmas[torch.randint(0, 100, [len(x), 1, 1, 1])]
    return ((sigma**-2 + 4) * (model.fake_unet(x + sigma * noise, sigma) - x) ** 2).mean()


def test_dmd2_losses():
    x, at, _ = case()
    nets = [Net(at, 1), Net(at, 2)]
    exact, wider = wide(x).requires_grad_(), [wide_copy(net) for net in nets]
    model, model64 = guidance(*nets), guidance(*wider)
    model64.karras_sigmas = wide(model.karras_sigmas)
    (losses, log), (expected, g) = same_draws(
        lambda: dmd2.compute_distribution_matching_loss(model, x, None), lambda: matching_restated(model64, exact)
    )
    assert_near(losses["loss_dm"], expected)
    assert_near(gradient(losses["loss_dm"], x), gradient(expected, exact))
    assert_near(log["dmtrain_grad"], g)
    assert_near(log["dmtrain_gradient_norm"], g.norm())
    assert_near(log["dmtrain_pred_fake_image"], log["dmtrain_noisy_latents"].div(1 + sigma_of(model, log)).tanh()
                + at + 0.3 * nets[1].out)  # fmt: skip
    (losses, log), expected = same_draws(
        lambda: dmd2.compute_loss_fake(model, x, None), lambda: fake_restated(model64, wide(x))
    )
    assert_near(losses["loss_fake_mean"], expected)
    assert_near(gradient(losses["loss_fake_mean"], nets[1].shift), gradient(expected, wider[1].shift))
    assert log.keys() == {"faketrain_latents", "faketrain_noisy_latents", "faketrain_x0_pred"}


def sigma_of(model, log):
    return model.karras_sigmas[log["dmtrain_timesteps"]]


def test_dmd2_counts_nan_as_nothing():
    x, at, _ = case()
    nets = Net(at, 1), Net(at, 2)
    nets[0].out[4, 2, 2, 2] = math.nan
    losses, _ = dmd2.compute_distribution_matching_loss(guidance(*nets), x, None)
    assert torch.isfinite(losses["loss_dm"])
    assert [bool(row.any()) for row in gradient(losses["loss_dm"], x)] == [True, True, True, True, False, True]


def everything(x, teacher, fake):
    """Every loss of other frameworks on these tensors, each ready for a backward pass."""
    t = x.new_full((len(x),), 0.3)
    shape = {"x0": teacher.detach(), "eps": fake.detach()}
    for kind in PREDICTIONS:
        yield modelopt.dsm_loss(kind, x, **shape, t=t, alpha_fn=torch.cos, sigma_fn=torch.sin)
    model = model_of("js", True)
    h = fastgen.get_f_div_weighting_h(model, x.detach().flatten(1), t)
    yield fastgen.variational_score_distillation_loss(x, teacher, fake, h)
    nets = Net(teacher, 1), Net(teacher, 2)
    yield sid.SID_EDMLoss().generator_loss(*nets, x).sum()
    yield sid.SID_EDMLoss()(nets[0], x.detach()).sum()
    yield dmd2.compute_distribution_matching_loss(guidance(*nets), x, None)[0]["loss_dm"]
    yield dmd2.compute_loss_fake(guidance(*nets), x, None)[0]["loss_fake_mean"]


def test_nothing_is_read_on_the_host():
    """Tensors without numbers refuse to be read, so a call that a CUDA graph could not hold fails on them."""
    with FakeTensorMode():
        x, teacher, fake = (torch.empty(6, 3, 5, 4) for _ in range(3))
        found = list(everything(x.requires_grad_(), teacher, fake))
        assert len(found) == 9
        for loss in found:
            loss.backward()
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            float(found[0].detach())


def test_torch_compile_takes_them_whole():
    x, teacher, fake = case()
    for loss_of in (
        lambda x: modelopt.vsd_loss(x, teacher, fake),
        lambda x: modelopt.dsm_loss("flow", x, x0=teacher, eps=fake),
    ):
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        expected = loss_of(x)
        assert_near(compiled(x), expected)
        assert_near(gradient(3 * compiled(x), x), 3 * gradient(expected, x))


def test_gradients_are_handed_on_as_often_as_asked_for():
    x, teacher, fake = case()
    loss = modelopt.vsd_loss(x, teacher, fake)
    (third,) = torch.autograd.grad(loss, x, torch.tensor(3.0), retain_graph=True)
    third = third.clone()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(once, again)
    torch.testing.assert_close(third, 3 * once)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(modelopt.vsd_loss(x, teacher, fake), x, create_graph=True)
    with pytest.raises(UserError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: modelopt.vsd_loss(x, teacher, fake), (x.detach(),), (teacher,))
    # As in the source, nothing flows into the predictions.
    leaf = teacher.clone().requires_grad_()
    assert torch.autograd.grad(modelopt.vsd_loss(x, leaf, fake), leaf, allow_unused=True) == (None,)


def test_bad_input_is_named():
    x, teacher, fake = case()
    three, leaf, both = teacher[:3], teacher.clone().requires_grad_(), {"x0": teacher, "eps": fake}
    scales = {"alpha_fn": torch.cos, "sigma_fn": torch.sin}
    model, loss, net = model_of("js", True), sid.SID_EDMLoss(), Net(teacher, 1)
    refused = (
        (lambda: modelopt.vsd_loss(x, three, fake), r"teacher_x0 must have gen_data's shape .*not \(3, 3, 5, 4\)"),
        (lambda: modelopt.vsd_loss(x, teacher, None), "fake_score_x0 must be a torch.Tensor, not NoneType"),
        (lambda: modelopt.vsd_loss(x.long(), teacher, fake), "gen_data must hold floating-point numbers"),
        (lambda: modelopt.vsd_loss(x, teacher, fake, torch.ones(4)), r"additional_scale must hold one number or 6"),
        (lambda: modelopt.dsm_loss("score", x), "pred_type must be one of x0, eps, v, flow; got 'score'"),
        (lambda: modelopt.dsm_loss("flow", x, x0=teacher), "eps must be given for pred_type 'flow'"),
        (lambda: modelopt.dsm_loss("x0", x, x0=leaf), r"gives no gradient in x0: pass x0\.detach\(\)"),
        (lambda: modelopt.dsm_loss("v", x, **both, t=torch.ones(6)), "alpha_fn must be given for pred_type 'v'"),
        (lambda: modelopt.dsm_loss("v", x, **both, **scales), "t must be a torch.Tensor, not NoneType"),
        (lambda: modelopt.dsm_loss("v", x, **both, **scales, t=torch.ones(2)), r"sigma\(t\) must hold one number or 6"),
        (lambda: fastgen.denoising_score_matching_loss("v", x, teacher, fake), "t must be a torch.Tensor"),
        (
            lambda: fastgen.denoising_score_matching_loss("v", x, teacher, fake, t=torch.ones(6)),
            "noise_scheduler must be",
        ),
        (lambda: fastgen.get_f_div_weighting_h(model, x[:, 0, 0], torch.ones(5)), r"t \(R,\), not \(6, 4\) and \(5,\)"),
        (lambda: loss.generator_loss(net, net, [1.0]), "images must be a torch.Tensor, not list"),
        (lambda: loss.generator_loss(net, net, x, alpha="1"), "alpha must be a number, not '1'"),
        (lambda: loss(lambda *_, **__: three, x.detach()), r"fake_score must have images's shape .*not \(3, 3, 5, 4\)"),
        (lambda: dmd2.compute_loss_fake(guidance(net, net), 3, None), "latents must be a torch.Tensor, not int"),
    )
    for call, words in refused:
        with pytest.raises(UserError, match=words):
            call()


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_on_two_ranks_gradients_and_weights_are_those_of_the_whole_batch(tmp_path, shard):
    torch.manual_seed(0)
    z, teacher, fake = torch.randn(3, 8, 16)
    logits, t = torch.randn(8, 1), torch.rand(8) * 80

    def student():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))

    def step(net, rows):
        model = model_of("js", True)
        h = fastgen.get_f_div_weighting_h(model, logits[rows], t[rows])
        fastgen.variational_score_distillation_loss(net(z[rows]), teacher[rows], fake[rows], h).backward()
        return h, model.net.bins

    def work(rank):
        net = student()
        if shard:
            net = torch.distributed.fsdp.fully_shard(net)
            h, bins = step(net, slice(4 * rank, 4 * rank + 4))
            return h, bins, [p.grad.full_tensor() for p in net.parameters()]
        h, bins = step(DistributedDataParallel(net), slice(4 * rank, 4 * rank + 4))
        return h, bins, [p.grad for p in net.parameters()]

    ranks, net = on_ranks(tmp_path, 2, work), student()
    h, bins = step(net, slice(8))
    assert not dist.is_initialized()
    assert_near(torch.cat([rank[0] for rank in ranks]), h)
    for _, found, grads in ranks:
        assert_near(found, bins)
        for one, p in zip(grads, net.parameters(), strict=True):
            assert_near(one, p.grad)
