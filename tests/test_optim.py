"""The optimiser step against torch's own pieces: clip, Adam, schedules, averages, skipped steps, saved state."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.generator import frozen_view
from realuid_fast.optim import FlatParameters, FusedAdam, Optimiser

BACKENDS = [row.name for row in rf.backends.report() if row.name in ("torch", "cpp") and row.why_not is None]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
# Sizes that are no multiple of any vector, a scalar, nothing, several pieces for threads to share.
SHAPES = [(3, 5), (), (0, 4), (67,), (4, 3, 3, 3), (90, 101)]
# Relative to the tensor's size, after tens of steps: float32 rounds each of them by 6e-8.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def set_gradients(net: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator).to(p.device)


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


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params, n):
    generator = torch.Generator().manual_seed(1000 + n)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def assert_close(mine, theirs, dtype):
    for a, b in zip(mine, theirs, strict=True):
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * (1 + b.double().norm())


def bits(tensors):
    return [t.detach().clone().view(torch.int32) for t in tensors]


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999), (0.5, 0.9)], ids=str)
@pytest.mark.parametrize(
    ("decays", "weight_decay", "maximize"), [((), 0.0, False), ((0.9,), 0.1, False), ((0.9, 0.99, 0.5), 0.03, True)]
)
def test_trajectories_are_torchs(backend, dtype, betas, decays, weight_decay, maximize):
    """Thirty steps against torch.optim.Adam in float64 on clipped gradients, and averages by lerp."""
    settings = {"lr": 1e-2, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
    params, peers = make_params(dtype), make_params(torch.float64)
    mine = FusedAdam(params, **settings, clip=96.0, ema_decays=decays)
    adam = torch.optim.Adam(peers, **settings)
    averages = [[p.detach().clone() for p in peers] for _ in decays]
    clipped = 0
    for n in range(30):
        give_gradients(params, n)
        give_gradients(peers, n)
        norm = torch.cat([p.grad.flatten() for p in peers]).norm()
        clipped += int(norm > 96)
        for p in peers:
            p.grad *= min(1.0, 96.0 / float(norm))
        with rf.backend(backend):
            mine.step()
        adam.step()
        for d, average in zip(decays, averages, strict=True):
            for a, p in zip(average, peers, strict=True):
                a.lerp_(p.detach(), 1 - d)
        assert_close([mine.norm], [norm], dtype)
    assert 0 < clipped < 30
    assert_close(params, peers, dtype)
    for d, average in zip(decays, averages, strict=True):
        assert_close(mine.averages(d).values(), average, dtype)
    assert all(("exp_avg" in state) == (betas[0] > 0) for state in mine.state.values())


@EVERY_BACKEND
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_leaves_every_bit(backend, beta1, value):
    params = make_params()
    optimiser = FusedAdam(params, betas=(beta1, 0.99), weight_decay=0.1, clip=1.0, ema_decays=(0.9, 0.99))
    # The very first step too, when no bias correction exists yet.
    for n, bad in enumerate((True, False, True, True, False)):
        give_gradients(params, n)
        if bad:
            params[-1].grad[-1, -1] = value
        state = [*params, *(t for s in optimiser.state.values() for t in s.values())]
        before = bits(state)
        with rf.backend(backend):
            optimiser.step()
        same = [torch.equal(a, b) for a, b in zip(bits(state), before, strict=True)]
        assert all(same) if bad else not all(same)
    assert optimiser.counts.tolist() == [5, 3]
    assert all(state["step"] == 2 for state in optimiser.state.values())
    assert all(p.isfinite().all() for p in params)


@EVERY_BACKEND
def test_threads_change_no_bit(backend):
    """Block sums are added in one order; torch's own reductions, the reference, may differ from one thread to more."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            params = make_params(shapes=[(300, 301), (7,), (1000, 99)])
            optimiser = FusedAdam(params, clip=1.0, ema_decays=(0.9,))
            for n in range(3):
                give_gradients(params, n)
                with rf.backend(backend):
                    optimiser.step()
            results.append([optimiser.norm, *params, *optimiser.averages(0.9).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[3:] if backend == "torch" else results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[1], other, strict=True))
    if backend == "cpp":
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


@EVERY_BACKEND
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_opcheck(backend, beta1):
    namespace = torch.ops.realuid_fast if backend == "cpp" else torch.ops.realuid_fast_reference
    shapes = [(3, 5), (4,)]
    lists = [[torch.rand(shape) for shape in shapes] for _ in range(4)]
    if beta1 == 0:
        lists[2] = []
    emas = [torch.rand(2, *shape) for shape in shapes]
    step, counts = torch.tensor(3.0), torch.tensor([4, 1])
    torch.library.opcheck(namespace.begin_step_.default, (lists[1], [step], counts))
    rates, decays = torch.tensor([0.1, 0.2]), torch.tensor([0.9, 0.99], dtype=torch.float64)
    numbers = (1.0, beta1, 0.99, 1e-8, 0.1, False, True)
    arguments = (*lists, emas, torch.tensor(2.0), step, rates, counts, decays, *numbers)
    torch.library.opcheck(namespace.adam_.default, arguments)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_torchs_schedulers_set_the_rate(as_tensor):
    params, peers = make_params(), make_params()
    mine = FusedAdam(params, lr=torch.tensor(0.1) if as_tensor else 0.1)
    adam = torch.optim.Adam(peers, lr=0.1)
    schedules = []
    for optimiser in (mine, adam):
        warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.2, total_iters=4)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12)
        schedules.append(torch.optim.lr_scheduler.SequentialLR(optimiser, [warm, fall], [4]))
    for n in range(15):
        for optimiser, schedule, tensors in zip((mine, adam), schedules, (params, peers), strict=True):
            give_gradients(tensors, n)
            optimiser.step()
            schedule.step()
        assert float(mine.param_groups[0]["lr"]) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-6)
    assert_close(params, peers, torch.float32)


@EVERY_BACKEND
def test_a_tensor_of_rates_is_a_schedule(backend):
    rates = torch.tensor([0.1, 0.0, 0.02, 0.05], dtype=torch.float64)
    params, peers = make_params(), make_params()
    mine, adam = FusedAdam(params, lr=rates, betas=(0.0, 0.9)), torch.optim.Adam(peers, betas=(0.0, 0.9))
    for n in range(7):
        give_gradients(params, n)
        give_gradients(peers, n)
        adam.param_groups[0]["lr"] = float(rates[min(n, 3)])
        with rf.backend(backend):
            mine.step()
        adam.step()
    assert_close(params, peers, torch.float32)
    assert mine.state_dict()["param_groups"][0]["lr"] == 0.05


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_run_of_torchs_adam_goes_on_here_and_back(beta1):
    settings = {"lr": 1e-2, "betas": (beta1, 0.99), "weight_decay": 0.1}

    def train(optimiser, params, seeds):
        for n in seeds:
            give_gradients(params, n)
            optimiser.step()

    straight = make_params()
    train(torch.optim.Adam(straight, **settings), straight, range(12))

    params = make_params()
    first = torch.optim.Adam(params, **settings)
    train(first, params, range(4))
    # lr and the rest come with the state.
    second = FusedAdam(params, lr=1.0, betas=(0.5, 0.5), ema_decays=(0.9,))
    second.load_state_dict(first.state_dict())
    assert second.counts.tolist() == [4, 0]
    train(second, params, range(4, 8))
    third = torch.optim.Adam(params)
    third.load_state_dict(second.adam_state_dict())
    saved = copy.deepcopy(second.state_dict())
    train(third, params, range(8, 12))
    assert_close(params, straight, torch.float32)
    # Adam went on with a copy of the state.
    for k, values in saved["state"].items():
        for name, value in values.items():
            assert torch.equal(value, second.state_dict()["state"][k][name])
    assert all(state["step"] == 12 for state in third.state.values())


def test_loading_stays_in_place_and_continues_bit_for_bit():
    settings = {"lr": 1e-2, "clip": 1.0, "ema_decays": (0.9, 0.99), "ema_warmup": True}

    def train(optimiser, params, seeds):
        for n in seeds:
            give_gradients(params, n)
            if n % 3 == 1:
                params[0].grad = None
            optimiser.step()

    straight = make_params()
    one = FusedAdam(straight, **settings)
    train(one, straight, range(9))
    params = make_params()
    before = FusedAdam(params, **settings)
    train(before, params, range(5))
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    after = FusedAdam(copies, **settings)
    places = [t.data_ptr() for p in copies for name, t in after.state[p].items() if name != "step"]
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert places == [t.data_ptr() for p in copies for name, t in after.state[p].items() if name != "step"]
    train(after, copies, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(straight, copies, strict=True))
    for d in (0.9, 0.99):
        pairs = zip(one.averages(d).values(), after.averages(d).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(one.counts, after.counts)


@EVERY_BACKEND
def test_groups_and_missing_gradients_are_torchs(backend):
    """Each parameter counts its own steps, and each group has its own settings."""
    params, peers = make_params(torch.float64), make_params(torch.float64)

    def groups(tensors):
        return [
            {"params": tensors[:3], "lr": 1e-2, "betas": (0.0, 0.9)},
            {"params": tensors[3:], "weight_decay": 0.1, "eps": 1e-3, "maximize": True},
        ]

    mine = FusedAdam(groups(params), lr=1e-3, ema_decays=(0.9,))
    adam = torch.optim.Adam(groups(peers), lr=1e-3)
    averages = [p.detach().clone() for p in peers]
    for n in range(12):
        if n == 7:
            mine.load_state_dict(copy.deepcopy(mine.state_dict()))
        give_gradients(params, n)
        give_gradients(peers, n)
        for i in range(len(params)):
            if i and n % (i + 2) == 0:
                params[i].grad = peers[i].grad = None
        with rf.backend(backend):
            mine.step()
        adam.step()
        for a, p in zip(averages, peers, strict=True):
            a.lerp_(p.detach(), 0.1)
    assert_close(params, peers, torch.float64)
    assert_close(mine.averages(0.9).values(), averages, torch.float64)
    for p, q in zip(params, peers, strict=True):
        assert mine.state[p]["step"] == adam.state[q]["step"]


def test_parameters_that_join_later_are_trained():
    params = make_params()
    optimiser = FusedAdam(params[:2])
    optimiser.add_param_group({"params": params[2:], "lr": 0.5})
    before = bits(params)
    give_gradients(params, 0)
    optimiser.step()
    moved = [not torch.equal(a, b) for a, b in zip(bits(params), before, strict=True)]
    assert moved == [p.numel() > 0 for p in params]
    with pytest.raises(UserError, match="alike"):
        optimiser.add_param_group({"params": make_params(torch.float64)})
    assert len(optimiser.param_groups) == 2


# -- flat storage


def conv_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(28, 3))
    return net.to(memory_format=torch.channels_last)


def backward(net, n):
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(n))
    net(x.to(memory_format=torch.channels_last)).square().sum().backward()


def test_flat_parameters_keep_values_strides_and_views():
    net = conv_net()
    values = {name: (t.clone(), t.stride()) for name, t in net.state_dict().items()}
    flat = FlatParameters(net.parameters())
    view = frozen_view(net)
    for (name, p), seen in zip(net.named_parameters(), view.parameters(), strict=True):
        assert torch.equal(p, values[name][0])
        assert p.stride() == values[name][1]
        assert p.untyped_storage().data_ptr() == flat.data.untyped_storage().data_ptr()
        assert p.data_ptr() % 256 == flat.data.data_ptr() % 256
        assert seen.data_ptr() == p.data_ptr()
    assert flat.data.count_nonzero() == sum(p.numel() for p in net.parameters())
    assert not flat.gather()
    backward(net, 0)
    assert flat.gather()
    expected = [p.grad.clone() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(flat.views(flat.grad), expected, strict=True))

    # Attached, backward adds to the flat memory itself.
    flat.attach()
    backward(net, 0)
    assert all(torch.equal(a, 2 * b) for a, b in zip(flat.views(flat.grad), expected, strict=True))
    net.double()
    with pytest.raises(UserError, match="left its flat buffer"):
        flat.gather()


@EVERY_BACKEND
@pytest.mark.parametrize("attached", [False, True])
def test_flat_storage_changes_nothing_but_where_things_lie(backend, attached):
    results = []
    for flat in (False, True):
        net = conv_net()
        optimiser = FusedAdam(net.parameters(), 1e-2, clip=0.5, ema_decays=(0.9, 0.99), flat=flat)
        view = frozen_view(net)
        if flat and attached:
            optimiser.flat_storage[0].attach()
        for n in range(6):
            backward(net, n)
            if n == 3 and not attached:
                net[0].bias.grad = None
            with rf.backend(backend):
                optimiser.step()
            optimiser.zero_grad(set_to_none=not (flat and attached))
        assert all(torch.equal(a, b) for a, b in zip(view.parameters(), net.parameters(), strict=True))
        saved = copy.deepcopy(optimiser.state_dict())
        optimiser.load_state_dict(saved)
        averages = itertools.chain(*(optimiser.averages(d).values() for d in (0.9, 0.99)))
        results.append([*net.parameters(), *averages])
        if flat:
            data = optimiser.flat_storage[0].data.untyped_storage().data_ptr()
            assert all(p.untyped_storage().data_ptr() == data for p in net.parameters())
    # The gradients' squares are added in another order, and the clip with them.
    assert_close(*results, torch.float32)


# -- what was saved before


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_checkpoints_of_torchs_fused_adam_load(beta1):
    """The state that this class saved when it still ran torch.optim.Adam(fused=True)."""
    net, peer = make_net(), make_net()
    rate = torch.tensor(1e-2)
    adam = torch.optim.Adam(peer.parameters(), lr=rate, betas=(beta1, 0.99), fused=True)
    for n in range(4):
        set_gradients(peer, n)
        adam.step()
    averages = {name: t.detach().clone() + 1 for name, t in peer.state_dict().items()}
    old = {"adam": adam.state_dict(), "steps": 5, "skipped": torch.tensor(1.0), "ema": {0.9: averages}}
    net.load_state_dict(peer.state_dict())
    optimiser = Optimiser(net, lr=1e-2, betas=(beta1, 0.99), clip=0.0, ema_decays=(0.9,), warmup=1)
    optimiser.load_state_dict(copy.deepcopy(old))
    assert (optimiser.steps, int(optimiser.skipped), optimiser.lr) == (5, 1, 1e-2)
    assert all(torch.equal(optimiser.ema[0.9][name], t) for name, t in averages.items())
    for n in range(4, 8):
        set_gradients(net, n)
        set_gradients(peer, n)
        optimiser.step()
        adam.step()
    assert_close(net.parameters(), peer.parameters(), torch.float32)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": torch.zeros(0)}, "lr"),
        ({"lr": torch.tensor(1)}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip": math.nan}, "clip"),
        ({"ema_decays": (0.9, 0.9)}, "ema_decays"),
    ],
)
def test_settings_of_adam_outside_their_range_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        FusedAdam(make_params(), **settings)


def copied(net, optimiser, how):
    return copy.deepcopy((net, optimiser)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, optimiser)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_copy_steps_like_the_original(how, flat, beta1):
    net = conv_net()
    groups = [{"params": list(net[0].parameters()), "lr": 3e-2}, {"params": list(net[1:].parameters())}]
    optimiser = FusedAdam(groups, 1e-2, (beta1, 0.9), clip=0.5, ema_decays=(0.9, 0.99), flat=flat)
    optimiser.reduce = optimiser.settle = lambda *_: pytest.fail("a hook of the original")
    optimiser.register_step_pre_hook(lambda *_: pytest.fail("a hook of the original"))
    fresh, young = copied(net, optimiser, how)
    optimiser = FusedAdam(optimiser.param_groups, 1e-2, clip=0.5, ema_decays=(0.9, 0.99), flat=flat)
    twin, of_twin = fresh, young
    for n in range(7):
        if n == 4:
            twin, of_twin = copied(fresh, young, how)
        for each, own in {id(net): (net, optimiser), id(fresh): (fresh, young), id(twin): (twin, of_twin)}.values():
            set_gradients(each, n)
            if n == 2:
                each[0].bias.grad = None
            own.step()
    for each, own in ((fresh, young), (twin, of_twin)):
        assert [*own._parameters()] == [*each.parameters()]
        assert own.counts.tolist() == optimiser.counts.tolist() == [7, 0]
        for mine, theirs in zip(net.parameters(), each.parameters(), strict=True):
            assert mine is not theirs
            assert torch.equal(mine, theirs)
            for decay in (0.9, 0.99):
                assert torch.equal(optimiser.averages(decay)[mine], own.averages(decay)[theirs])
        for storage, group in zip(own.flat_storage, own.param_groups, strict=True):
            assert (storage is not None) == flat
            if flat:
                places = {p.untyped_storage().data_ptr() for p in group["params"]}
                assert places == {storage.data.untyped_storage().data_ptr()}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_copied_optimiser_keeps_its_schedule_and_its_averages(how, flat, monkeypatch):
    if flat:
        whole = FusedAdam.__init__
        monkeypatch.setattr(FusedAdam, "__init__", lambda *a, **k: whole(*a, **{**k, "flat": True}))
    net = make_net()
    optimiser = Optimiser(net, lr=1e-2, warmup=3, total=9, decay="cosine", ema_decays=(0.9,))
    for n in range(4):
        set_gradients(net, n)
        optimiser.step()
    twin, of_twin = copied(net, optimiser, how)
    for n in range(4, 8):
        for each, own in ((net, optimiser), (twin, of_twin)):
            each(torch.randn(6, 5, generator=torch.Generator().manual_seed(n)))
            set_gradients(each, n)
            own.step()
    assert of_twin.steps == 8
    assert of_twin.lr == optimiser.lr
    for name, value in net.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
        assert torch.equal(of_twin.ema[0.9][name], optimiser.ema[0.9][name]), name


@pytest.mark.parametrize("flat", [False, True])
def test_sparse_gradients_are_refused_before_anything_changes(flat):
    table = nn.Embedding(5, 3, sparse=True)
    optimiser, before = FusedAdam(table.parameters(), flat=flat), table.weight.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError, match="a gradient is sparse"):
        optimiser.step()
    assert torch.equal(table.weight, before)
    assert optimiser.counts.tolist() == [0, 0]


def test_parameters_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"float32 or float64, got torch\.bfloat16: keep the parameters in float32"):
        FusedAdam(make_params(torch.bfloat16))
    with pytest.raises(UserError, match="amsgrad must be False"):
        FusedAdam(make_params(), amsgrad=True)
    with pytest.raises(UserError, match="no gaps"):
        FusedAdam([nn.Parameter(torch.zeros(4, 6)[:, ::2])])
    with pytest.raises(UserError, match="at least one"):
        FusedAdam([{"params": []}])
    with pytest.raises(UserError, match="without gradients"):
        FusedAdam(make_params()).step()
    with pytest.raises(UserError, match="decay must be one of"):
        FusedAdam(make_params(), ema_decays=(0.9,)).averages(0.5)


def test_state_that_cannot_be_is_refused():
    params = make_params()
    give_gradients(params, 0)
    adam = torch.optim.Adam(params, amsgrad=True)
    adam.step()
    with pytest.raises(UserError, match="amsgrad"):
        FusedAdam(params).load_state_dict(adam.state_dict())
    with pytest.raises(UserError, match="1 averages, this has 2"):
        FusedAdam(params, ema_decays=(0.5, 0.9)).load_state_dict(FusedAdam(params, ema_decays=(0.5,)).state_dict())


# -- on a GPU

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


def on_gpu(flat):
    """Six steps on the GPU, one of them skipped, and the same on CPU."""
    results = []
    for device in ("cpu", "cuda"):
        net = conv_net().to(device)
        settings = {"weight_decay": 0.1, "clip": 0.5, "ema_decays": (0.9, 0.99), "ema_warmup": True}
        optimiser = FusedAdam(net.parameters(), 1e-2, (0.5, 0.9), flat=flat and device == "cuda", **settings)
        for n in range(6):
            set_gradients(net, n)
            if n == 2:
                net[0].weight.grad[0, 0, 0, 0] = math.inf
            optimiser.step()
        averages = itertools.chain(*(optimiser.averages(d).values() for d in (0.9, 0.99)))
        results.append([t.detach().cpu() for t in (*net.parameters(), *averages)])
        assert optimiser.counts.tolist() == [6, 1]
    return results


@pytest.mark.parametrize("flat", [pytest.param(flat, marks=GPU) for flat in (False, True)])
def test_gpu_agrees_with_cpu(flat):
    assert_close(*on_gpu(flat), torch.float32)


@pytest.mark.parametrize("flat", [pytest.param(flat, marks=GPU) for flat in (False, True)])
def test_replayed_graph_goes_on(flat):
    """Rates, bias corrections and averages of a replay are the next step's, not those of the captured one."""
    rates = torch.tensor([0.1, 0.01, 0.05, 0.02], dtype=torch.float64)
    results = []
    for graphed in (False, True):
        params = [nn.Parameter(p.detach().cuda()) for p in make_params(shapes=[(3, 5), (67,), (90, 101)])]
        optimiser = FusedAdam(params, rates.cuda(), clip=1.0, ema_decays=(0.9,), ema_warmup=True, flat=flat)
        grads = [torch.zeros_like(p) for p in params]
        graph, state = torch.cuda.CUDAGraph(), copy.deepcopy(optimiser.state_dict())
        values = [p.detach().clone() for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimiser.step()
        if graphed:
            with torch.cuda.graph(graph):
                optimiser.step()
        optimiser.load_state_dict(state)
        with torch.no_grad():
            torch._foreach_copy_(params, values)
        for n in range(5):
            generator = torch.Generator().manual_seed(n)
            for grad in grads:
                grad.copy_(torch.randn(grad.shape, generator=generator))
            graph.replay() if graphed else optimiser.step()
        results.append([t.cpu() for t in (*params, *optimiser.averages(0.9).values())])
        assert optimiser.counts.tolist() == [5, 0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("flat", [False, True])
def test_loading_a_state_keeps_hooks_and_memory(flat):
    """Averaging over ranks or parts of a batch is a hook of the optimiser, and graphs hold its addresses."""
    net = conv_net()
    optimiser = FusedAdam(net.parameters(), 1e-2, flat=flat)
    set_gradients(net, 0)
    optimiser.step()
    optimiser.reduce = optimiser.settle = hook = lambda *_: None
    storage, places = optimiser.flat_storage, [p.data_ptr() for p in net.parameters()]
    optimiser.load_state_dict(optimiser.state_dict())
    assert optimiser.reduce is optimiser.settle is hook
    assert optimiser.flat_storage is storage
    assert [p.data_ptr() for p in net.parameters()] == places
