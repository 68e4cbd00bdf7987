"""Networks: published parameter layout and outputs, conditioning, memory formats, and errors in a
sentence.
"""

import pytest
import torch

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.networks import MLP, UNet, build, layers

SMALL = {"dim": (3, 8, 8), "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
VARIANTS = {
    "plain": {},
    "attention": {"attention_resolutions": "8,4", "num_heads": 4, "num_head_channels": 16},
    "heads": {"attention_resolutions": "4", "num_heads": 2, "num_heads_upsample": 4},
    "new order": {"attention_resolutions": "4", "num_heads": 2, "use_new_attention_order": True},
    "conditional": {"class_cond": True, "num_classes": 10},
    "scale shift": {"use_scale_shift_norm": True, "learn_sigma": True},
    "resblock updown": {"resblock_updown": True, "use_scale_shift_norm": True, "num_res_blocks": 2},
}


def shaken(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network with every parameter moved, so that zero-initialised layers take part."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(dim=(3, 8, 8), batch=3, classes=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t, x = torch.rand(batch, generator=generator), torch.randn(batch, *dim, generator=generator)
    return t, x, torch.randint(classes, (batch,), generator=generator) if classes else None


@pytest.mark.parametrize("name", VARIANTS)
def test_unet_exchanges_state_with_the_published_layout(peer, name):
    options = {**SMALL, **VARIANTS[name]}
    ours, theirs = shaken(UNet(**options), 1).eval(), shaken(peer(**options), 2).eval()
    t, x, y = inputs(classes=10 if options.get("class_cond") else 0)

    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(t, x, y), theirs(t, x, y), rtol=1e-5, atol=1e-5)

    theirs.load_state_dict(shaken(ours, 3).state_dict())
    torch.testing.assert_close(ours(t, x, y), theirs(t, x, y), rtol=1e-5, atol=1e-5)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_default_multipliers_match_the_published_cifar_network(peer):
    options = {
        "dim": (3, 32, 32),
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_head_channels": 64,
        "attention_resolutions": "16",
    }
    with torch.device("meta"):
        ours, theirs = UNet(**options), peer(**options)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_unet_is_the_same_function_in_channels_last(name):
    options = {**SMALL, **VARIANTS[name]}
    net = shaken(UNet(**options)).eval()
    t, x, y = inputs(classes=10 if options.get("class_cond") else 0)
    expected = net(t, x, y)
    net = net.to(memory_format=torch.channels_last)
    actual = net(t, x.contiguous(memory_format=torch.channels_last), y)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_is_traced_under_autocast_on_a_cpu(dtype):
    """The layers ask which convolution this processor has for half types: torch.compile cannot trace the question."""
    net = rf.load("mnist-teacher").net.to(memory_format=torch.channels_last)
    t, x = torch.rand(8), torch.randn(8, 1, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        # The backend changes no arithmetic: what is asked is whether the program is whole.
        traced = torch.compile(net, backend="eager", fullgraph=True)(t, x)
        assert torch.equal(traced, net(t, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_doubled_by_views_equal_torchs_operator(dtype):
    """As on CUDA: values to the bit, the gradient within its rounding, and both stay channels_last."""
    x = torch.randn(3, 5, 4, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    seed = torch.randn(3, 5, 8, 12).to(dtype).contiguous(memory_format=torch.channels_last)
    ours, theirs = layers._doubled_pixels(x), torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(ours, theirs)
    (g_ours,), (g_theirs,) = (torch.autograd.grad(out, x, seed) for out in (ours, theirs))
    # Both add four numbers: two roundings of sums of at most some units.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(g_ours, g_theirs, rtol=tolerance, atol=4 * tolerance)
    for tensor in (ours, g_ours):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_unet_gradients_agree_with_differences_in_float64():
    net = shaken(UNet((1, 4, 4), 4, channel_mult=(1, 2), norm_groups=2, time_scale=3.0)).double()
    t, x, _ = inputs((1, 4, 4), batch=2)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(t.double(), x), (x,), atol=1e-5)


def test_options_change_the_function():
    torch.manual_seed(0)
    base = {"dim": (1, 8, 8), "num_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}
    t, x, _ = inputs((1, 8, 8))
    reference = shaken(UNet(**base))
    for change in ({"time_scale": 100.0}, {"norm_groups": 8}):
        other = UNet(**{**base, **change})
        other.load_state_dict(reference.state_dict())
        assert (other(t, x) - reference(t, x)).abs().max() > 1e-3
    lean = UNet(**base, middle_attention=False)
    assert set(lean.state_dict()) == {k for k in reference.state_dict() if not k.startswith("middle_block.1.")}
    assert torch.equal(reference(t[:1], x[:1]), reference(t[0], x[:1]))


def test_fresh_networks_predict_zero():
    for net in (UNet((1, 8, 8), 8, channel_mult=(1, 2), norm_groups=4), MLP((1, 8, 8), 16)):
        t, x, _ = inputs((1, 8, 8))
        assert torch.equal(net(t, x), torch.zeros_like(x))


def test_mlp_uses_time_and_label():
    net = shaken(MLP((2,), 16, 2, num_classes=3))
    t, x, y = inputs((2,), classes=3)
    out = net(t, x, y)
    assert out.shape == x.shape
    assert (net(t + 0.3, x, y) - out).abs().max() > 1e-3
    assert (net(t, x, (y + 1) % 3) - out).abs().max() > 1e-3


def test_mlp_fits_a_linear_velocity():
    """On a point mass at c the velocity is (c - x_t) / (1 - t): a short training run gets close to it."""
    torch.manual_seed(0)
    net, c = MLP((2,), 64, 2), torch.tensor([1.0, -0.5])
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        n, t = torch.randn(256, 2), torch.rand(256) * 0.8
        loss = (net(t, t[:, None] * c + (1 - t[:, None]) * n) - (c - n)).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "unet", "dim": [1, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4},
        {"kind": "mlp", "shape": [2], "width": 8},
    ],
)
def test_build_reads_plain_mappings(config):
    before = dict(config)
    net = build(config)
    assert config == before
    assert isinstance(net, UNet if config["kind"] == "unet" else MLP)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kind": "transformer"}, "kind must be one of unet, mlp"),
        ({}, "kind"),
        ({"kind": "mlp", "widht": 3}, "no setting widht"),
        ({"kind": "unet", "dim": [1, 8, 8]}, "needs the setting num_channels"),
        ({"kind": "unet", "dim": [8, 8], "num_channels": 32}, "dim must be"),
        ({"kind": "unet", "dim": [1, 9, 9], "num_channels": 32, "channel_mult": [1, 2]}, "divisible by 2"),
        ({"kind": "unet", "dim": [1, 10, 10], "num_channels": 32}, "channel_mult must be given"),
        ({"kind": "unet", "dim": [1, 8, 8], "num_channels": 20}, "norm_groups"),
        ({"kind": "unet", "dim": [1, 8, 8], "num_channels": 32, "num_heads": 5}, "num_heads"),
        (
            {"kind": "unet", "dim": [1, 8, 8], "num_channels": 32, "num_head_channels": 48},
            "num_head_channels",
        ),
        ({"kind": "mlp", "width": 0}, "positive"),
    ],
)
def test_build_explains_what_is_wrong(config, words):
    with pytest.raises(UserError, match=words):
        build(config)


def test_networks_explain_wrong_inputs():
    unet = UNet((1, 8, 8), 8, channel_mult=(1, 2), norm_groups=4)
    conditional = MLP((2,), 8, num_classes=3)
    t, x, _ = inputs((1, 8, 8))
    with pytest.raises(UserError, match="x must have shape"):
        unet(t, x.expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="t must have shape"):
        unet(t[:2], x)
    with pytest.raises(UserError, match="y must be given"):
        unet(t, x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match="y must be given"):
        conditional(t, torch.zeros(3, 2))
    with pytest.raises(UserError, match="x must have shape"):
        conditional(t, x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match="t must have shape"):
        conditional(t[:2], torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    "network",
    [
        {"kind": "mlp", "shape": [1, 8, 8], "width": 8, "depth": 1},
        {"kind": "unet", "dim": [1, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "norm_groups": 4},
    ],
)
def test_networks_that_see_the_endpoint(network):
    torch.manual_seed(0)
    net, plain = build({**network, "endpoint": True}), build(network)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    t, x, y = torch.rand(2), torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    assert net(t, x, None, y).shape == x.shape
    assert not torch.allclose(net(t, x, None, y), net(t, x, None, -y))
    for wrong in (lambda: net(t, x), lambda: plain(t, x, None, y), lambda: net(t, x, None, y[:1])):
        with pytest.raises(UserError, match="endpoint must"):
            wrong()
