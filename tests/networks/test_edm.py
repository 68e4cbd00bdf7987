"""EDM's networks: published names and sizes, and outputs against the formulas written out on their state dicts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from realuid_fast.errors import UserError
from realuid_fast.networks import build
from realuid_fast.networks.unet import timestep_embedding

SONG = {"kind": "song-unet", "dim": [3, 8, 8], "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
SONG |= {"attn_resolutions": [4], "dropout": 0.0}
ADM = {"kind": "dhariwal-unet", "dim": [3, 8, 8], "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1}
ADM |= {"attn_resolutions": [4], "dropout": 0.0}
NCSN = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
VARIANTS = {
    "ddpm++": SONG,
    "ncsn++": SONG | NCSN | {"resample_filter": [1, 3, 3, 1]},
    "skip": SONG | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 1, 2]},
    "skip, wide filter": SONG | {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]},
    "labels": SONG | {"label_dim": 5, "null_label": True, "augment_dim": 9},
    "adm": ADM,
    "adm, labels, variance": ADM | {"label_dim": 5, "out_channels": 6, "augment_dim": 9},
}


class Written:
    """The networks' forward from Karras et al.'s appendix, one operation after another, on a state dict alone."""

    def __init__(self, state, config):
        self.state, self.config = state, config
        self.song = config["kind"] == "song-unet"
        self.taps = config.get("resample_filter", [1, 1])

    def has(self, prefix):
        return any(name.startswith(prefix + ".") for name in self.state)

    def linear(self, name, x):
        bias = self.state.get(f"{name}.bias")
        return x @ self.state[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(self, name, x):
        groups, (batch, channels, *_) = min(32, x.shape[1] // 4), x.shape
        rows = x.reshape(batch, groups, -1)
        variance = rows.var(-1, unbiased=False, keepdim=True)
        rows = (rows - rows.mean(-1, keepdim=True)) / (variance + (1e-6 if self.song else 1e-5)).sqrt()
        weight, bias = (self.state[f"{name}.{part}"].view(1, channels, 1, 1) for part in ("weight", "bias"))
        return rows.reshape(x.shape) * weight + bias

    def filtered(self, x, up, padding):
        f = torch.tensor(self.taps, dtype=x.dtype)
        f = torch.outer(f, f) / f.sum() ** 2
        weight = f.repeat(x.shape[1], 1, 1, 1)
        if up:
            return F.conv_transpose2d(x, 4 * weight, groups=x.shape[1], stride=2, padding=padding)
        return F.conv2d(x, weight, groups=x.shape[1], stride=2, padding=padding)

    def conv(self, name, x, up=False, down=False, late=False):
        margin = (len(self.taps) - 1) // 2
        weight, bias = self.state.get(f"{name}.weight"), self.state.get(f"{name}.bias")
        if late:
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2 + margin)
            return self.filtered(x, False, 0) + bias.view(1, -1, 1, 1)
        if up or down:
            x = self.filtered(x, up, margin)
        return x if weight is None else F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def block(self, name, x, e, **resample):
        skip_scale = math.sqrt(0.5) if self.song else 1
        h = self.conv(f"{name}.conv0", F.silu(self.norm(f"{name}.norm0", x)), **resample)
        params = self.linear(f"{name}.affine", e)[:, :, None, None]
        if self.song:
            h = self.norm(f"{name}.norm1", h + params)
        else:
            scale, shift = params.chunk(2, 1)
            h = self.norm(f"{name}.norm1", h) * (scale + 1) + shift
        h = self.conv(f"{name}.conv1", F.silu(h))
        x = (h + (self.conv(f"{name}.skip", x, **resample) if self.has(f"{name}.skip") else x)) * skip_scale
        if not self.has(f"{name}.qkv"):
            return x
        batch, channels = x.shape[:2]
        heads = 1 if self.song else channels // 64
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x))
        q, k, v = qkv.reshape(batch * heads, channels // heads, 3, -1).unbind(2)
        weights = (torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(q.shape[1])).softmax(2)
        a = torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
        return (x + self.conv(f"{name}.proj", a)) * skip_scale

    def embedding(self, t, y):
        fourier = self.config.get("embedding_type") == "fourier"
        half = self.state["map_layer0.weight"].shape[1] // 2
        if fourier:
            rates = 2 * math.pi * self.state["map_noise.freqs"]
        else:
            rates = torch.tensor([1e-4 ** (i / (half - self.song)) for i in range(half)], dtype=t.dtype)
        angle = t[:, None] * rates
        parts = [angle.sin(), angle.cos()] if self.song else [angle.cos(), angle.sin()]
        e = torch.cat(parts, 1)
        if self.song and y is not None:
            e = e + self.linear("map_label", y * math.sqrt(y.shape[1]))
        e = self.linear("map_layer1", F.silu(self.linear("map_layer0", e)))
        if not self.song and y is not None:
            e = e + self.linear("map_label", y)
        return F.silu(e)

    def __call__(self, t, x, y=None):
        e, image = self.embedding(t, y), x
        names = []
        for name in self.state:
            if name.startswith(("enc.", "dec.")) and (stem := ".".join(name.split(".")[:2])) not in names:
                names.append(stem)
        skips, out, kept = [], None, None
        for name in names:
            kind = name.split("_", 1)[1]
            if kind == "conv":
                skips.append(x := self.conv(name, x))
            elif kind == "down":
                skips.append(x := self.block(name, x, e, down=True))
            elif kind == "aux_down":
                image = self.conv(name, image, down=True)
            elif kind == "aux_skip":
                x = skips[-1] = x + self.conv(name, image)
            elif kind == "aux_residual":
                x = skips[-1] = image = (x + self.conv(name, image, down=True, late=True)) / math.sqrt(2)
            elif kind == "aux_up":
                out = self.conv(name, out, up=True)
            elif kind == "aux_norm":
                kept = self.norm(name, x)
            elif kind == "aux_conv":
                out = self.conv(name, F.silu(kept)) + (0 if out is None else out)
            elif kind == "up":
                x = self.block(name, x, e, up=True)
            elif name.startswith("enc."):
                skips.append(x := self.block(name, x, e))
            else:
                x = self.block(name, x if kind in ("in0", "in1") else torch.cat([x, skips.pop()], 1), e)
        assert not skips
        return out if self.song else self.conv("out_conv", F.silu(self.norm("out_norm", x)))


def shaken(config, seed=0):
    """The network in float64 with every parameter moved, so that zero-initialised layers take part."""
    torch.manual_seed(seed)
    net = build(config).double().eval()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_outputs_are_those_of_the_formulas_written_out(config):
    net = shaken(config)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    # The embedding is computed in float32: times that it holds exactly, with small angles.
    t = torch.tensor([-0.75, 0.125, 0.5], dtype=torch.float64)
    y = torch.tensor([4, 0, 2]) if config.get("label_dim") else None
    rows = None if y is None else F.one_hot(y, 5).double()
    expected = Written(net.state_dict(), config)(t, x, rows)[:, :3]
    actual = net(t, x, y)
    assert actual.std() > 0.01
    # 1e-5: float32 sines and cosines; the NCSN++ frequencies make angles of several hundred.
    torch.testing.assert_close(actual, expected, rtol=1e-4 if "embedding_type" in config else 1e-5, atol=1e-4)
    if config.get("null_label"):
        assert net.null_label == 5
        absent = Written(net.state_dict(), config)(t, x, torch.zeros(3, 5).double())
        torch.testing.assert_close(net(t, x, torch.full((3,), 5)), absent, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["skip", "adm"])
def test_gradients_agree_with_the_formulas_written_out(name):
    net, x = shaken(VARIANTS[name], 1), torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    t, seed = torch.tensor([-0.5, 0.25], dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    state = {name: value.requires_grad_() for name, value in net.state_dict().items()}
    found = torch.autograd.grad((net(t, x) * seed).sum(), [x, *net.parameters()])
    written = (Written(state, VARIANTS[name])(t, x)[:, :3] * seed).sum()
    expected = torch.autograd.grad(written, [x, *(state[name] for name, _ in net.named_parameters())])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-8)


def test_published_sizes():
    """CIFAR-10's DDPM++ and ImageNet's ADM have 56 and 296 million parameters (Karras et al., table 7)."""
    cifar = {"kind": "song-unet", "dim": [3, 32, 32], "augment_dim": 9, "channel_mult": [2, 2, 2], "dropout": 0.13}
    with torch.device("meta"):
        song, adm = build(cifar), build({"kind": "dhariwal-unet", "dim": [3, 64, 64], "label_dim": 1000})
    sizes = {name: tuple(v.shape) for name, v in song.state_dict().items() if not name.endswith("resample_filter")}
    assert sum(math.prod(shape) for shape in sizes.values()) == 55_733_891
    assert sum(p.numel() for p in adm.parameters()) == 295_899_267
    assert sizes["map_augment.weight"] == (128, 9)
    assert sizes["enc.32x32_block0.norm0.weight"] == (128,)
    assert sizes["enc.16x16_block3.qkv.weight"] == (768, 256, 1, 1)
    assert sizes["dec.8x8_in0.proj.bias"] == (256,)
    assert sizes["dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)
    assert tuple(song.state_dict()["enc.16x16_down.skip.resample_filter"].shape) == (1, 1, 2, 2)


@pytest.mark.parametrize("name", ["ncsn++", "labels"])
def test_channels_last_and_bfloat16_give_the_same_function(name):
    config = VARIANTS[name]
    net = shaken(config).float()
    t, x = torch.tensor([-0.5, 0.25]), torch.randn(2, 3, 8, 8)
    y = torch.tensor([1, 3]) if config.get("label_dim") else None
    expected = net(t, x, y)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        net(t, x.contiguous(memory_format=torch.channels_last), y), expected, rtol=1e-4, atol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(t, x, y)
    assert half.dtype == torch.float32
    assert (half - expected).norm() < 0.05 * expected.norm()  # 8 bits of a bfloat16 through a few dozen layers


@pytest.mark.parametrize("config", [VARIANTS["ncsn++"], VARIANTS["labels"], ADM | {"label_dim": 5}])
def test_a_guidance_scale_is_a_shift_of_the_embedding(config):
    """A network starts as the published one at every scale; then a scale acts as another bias of ``map_layer1``."""
    plain, net = shaken(config), build(config | {"guided": True}).double().eval()
    told = net.load_state_dict(plain.state_dict(), strict=False)
    assert told.missing_keys == [f"scale_embed.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    t, x = torch.tensor([-0.5, 0.25]).double(), torch.randn(2, 3, 8, 8).double()
    y = torch.tensor([1, 3]) if config.get("label_dim") else None
    assert torch.equal(net(t, x, y, guidance=3.0), plain(t, x, y))
    last = net.scale_embed[2].weight
    last.data.copy_(0.1 * torch.randn(last.shape, generator=torch.Generator().manual_seed(0)))
    # 1e-12: the bias is added before and not after the product's rounding.
    both = net(t, x, y, guidance=torch.tensor([1.0, 3.0]))
    width = net.scale_embed[0].in_features
    for row, scale in enumerate((1.0, 3.0)):
        moved = copy.deepcopy(plain)
        moved.map_layer1.bias.data += net.scale_embed(timestep_embedding(torch.tensor([scale]), width).double())[0]
        wanted = moved(t, x, y)
        assert not torch.allclose(wanted, plain(t, x, y), rtol=1e-3)
        torch.testing.assert_close(net(t, x, y, guidance=scale), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both[row], wanted[row], rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match=r"guidance must be a number or have shape \(2,\), got \(3,\)"):
        net(t, x, y, guidance=torch.ones(3))


def test_every_parameter_has_a_gradient():
    """Weights that play no part, those of augmentation labels, are buffers: averages and DDP see parameters only."""
    for config in (VARIANTS["labels"], VARIANTS["adm, labels, variance"]):
        net = shaken(config).float().train()
        net(torch.zeros(2), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert "map_augment.weight" in net.state_dict()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SONG | {"dim": [3, 8, 4]}, "dim must be"),
        (SONG | {"dim": [3, 9, 9]}, "divisible by 2"),
        (SONG | {"num_blocks": 10**9}, "num_blocks must be from 1 to"),
        (SONG | {"encoder_type": "other"}, "encoder_type must be one of"),
        (SONG | {"resample_filter": [1, 2, 1]}, "even number of taps"),
        (SONG | {"null_label": True}, "null_label needs"),
        (ADM | {"out_channels": 1}, "out_channels must be at least"),
    ],
)
def test_settings_are_refused_in_a_sentence(config, words):
    with pytest.raises(UserError, match=words):
        build(config)


def test_inputs_are_refused_in_a_sentence():
    net, labelled = build(SONG), build(VARIANTS["labels"])
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(UserError, match="x must have shape"):
        net(torch.zeros(2), x[:, :2])
    with pytest.raises(UserError, match="t must have shape"):
        net(torch.zeros(3), x)
    with pytest.raises(UserError, match="y must be given"):
        net(torch.zeros(2), x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="y must be given"):
        labelled(torch.zeros(2), x)
    assert torch.equal(net.eval()(torch.tensor(0.5), x), net(torch.full((2,), 0.5), x))
