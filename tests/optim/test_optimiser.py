"""The trainer's optimiser: clip, Adam, schedule and averages against torch's, to the bit after a resume."""

import math

import pytest
import torch
from torch import nn

from realuid_fast.errors import UserError
from realuid_fast.optim import Optimiser

from .networks import make_net, set_gradients


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e3])
def test_equals_clip_and_adam_of_torch(betas, clip):
    net, peer = make_net(), make_net()
    optimiser = Optimiser(net, lr=1e-2, betas=betas, clip=clip)
    adam = torch.optim.Adam(peer.parameters(), lr=1e-2, betas=betas, foreach=False)
    for seed in range(5):
        set_gradients(net, seed)
        set_gradients(peer, seed)
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), clip or math.inf)
        adam.step()
        optimiser.step()
        assert optimiser.norm == pytest.approx(float(norm), rel=1e-6)
    for mine, theirs in zip(net.parameters(), peer.parameters(), strict=True):
        # Adam divides by the gradient's own size, so the clip's rounding (torch adds 1e-6 to the norm) stays tiny.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_channels_last_networks_train_alike():
    """The fused kernel walks memory: parameters and gradients must agree on where an element lies."""

    def train(layout, seed=0):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).to(memory_format=layout)
        optimiser = Optimiser(net, lr=1e-2, clip=0.5)
        for n in range(4):
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(n)).to(memory_format=layout)
            net(x).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        return net

    for a, b in zip(*(train(f).parameters() for f in (torch.channels_last, torch.contiguous_format)), strict=True):
        # Adam's first steps are signs: an element in the wrong place would be off by 1e-2.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_schedule_warms_up_and_falls_to_its_floor():
    optimiser = Optimiser(make_net(), lr=2.0, warmup=4, total=10, decay="cosine", floor=0.1)
    rates = []
    for _ in range(12):
        rates.append(optimiser.lr)
        optimiser.steps += 1
    assert rates[0] == pytest.approx(2.0 / 4)
    assert rates[2] == pytest.approx(2.0 * 0.75 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2))))
    assert rates[5] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[10] == rates[11] == pytest.approx(0.2)
    linear = Optimiser(make_net(), lr=2.0, total=10, decay="linear")
    linear.steps = 3
    assert linear.lr == pytest.approx(1.4)


def test_averages_follow_their_recursion_and_buffers_are_copied():
    net = make_net()
    optimiser = Optimiser(net, lr=1e-2, ema_decays=(0.5, 0.999))
    expected = {d: [p.detach().clone().double() for p in net.parameters()] for d in (0.5, 0.999)}
    for n in range(6):
        set_gradients(net, n)
        net[1].running_mean.fill_(n)
        optimiser.step()
        for d, average in expected.items():
            rate = 1 - min(d, (1 + n) / (10 + n))
            for e, p in zip(average, net.parameters(), strict=True):
                e += rate * (p.detach().double() - e)
    for d, average in expected.items():
        for (name, _), e in zip(net.named_parameters(), average, strict=True):
            torch.testing.assert_close(optimiser.ema[d][name].double(), e, rtol=1e-5, atol=1e-7)
        assert torch.equal(optimiser.ema[d]["1.running_mean"], torch.full((7,), 5.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    net = make_net()
    optimiser = Optimiser(net, lr=1e-2, ema_decays=(0.9,))
    set_gradients(net, 0)
    optimiser.step()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in optimiser.ema[0.9].items()}
    moments = optimiser.adam.state_dict()["state"][0]["exp_avg_sq"].clone()
    set_gradients(net, 1)
    next(net.parameters()).grad[0, 0] = value
    optimiser.step()
    assert float(optimiser.skipped) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in optimiser.ema[0.9].items())
    assert torch.equal(optimiser.adam.state_dict()["state"][0]["exp_avg_sq"], moments)
    set_gradients(net, 2)
    optimiser.step()
    assert float(optimiser.skipped) == 1
    assert not torch.equal(next(net.parameters()), before["0.weight"])


def test_saved_state_continues_bit_for_bit():
    def take(optimiser, net, seeds):
        for seed in seeds:
            set_gradients(net, seed)
            optimiser.step()

    settings = {"lr": 1e-2, "ema_decays": (0.9,), "warmup": 3, "total": 8, "decay": "cosine"}
    straight = make_net()
    one = Optimiser(straight, **settings)
    take(one, straight, range(8))

    first, second = make_net(), make_net()
    before, after = Optimiser(first, **settings), Optimiser(second, **settings)
    take(before, first, range(4))
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    take(after, second, range(4, 8))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(tensor, after.ema[0.9][name]) for name, tensor in one.ema[0.9].items())
    with pytest.raises(UserError, match="ema_decays"):
        Optimiser(make_net(), lr=1.0, ema_decays=(0.8,)).load_state_dict(before.state_dict())


def test_adams_state_is_torchs_own():
    net = make_net()
    optimiser = Optimiser(net, lr=1e-2, betas=(0.9, 0.99))
    set_gradients(net, 0)
    optimiser.step()
    adam = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    adam.load_state_dict(optimiser.state_dict()["adam"])
    assert adam.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "betas"),
        ({"lr": 1.0, "clip": -1.0}, "clip"),
        ({"lr": 1.0, "decay": "step"}, "decay"),
        ({"lr": 1.0, "decay": "cosine"}, "total"),
        ({"lr": 1.0, "floor": 2.0}, "floor"),
        ({"lr": 1.0, "ema_decays": (1.0,)}, "ema_decays"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        Optimiser(make_net(), **settings)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UserError, match="no parameters"):
        Optimiser(make_net().requires_grad_(False), lr=1.0)
    with pytest.raises(UserError, match="without gradients"):
        Optimiser(make_net(), lr=1.0).step()
