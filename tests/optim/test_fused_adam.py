"""FusedAdam follows torch.optim.Adam on every backend, with its groups, schedules and flat storage."""

import copy
import itertools
import math

import pytest
import torch

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.models.frozen import frozen_view
from realuid_fast.optim import FlatParameters, FusedAdam

from .networks import assert_close, conv_net, give_gradients, make_params

BACKENDS = [row.name for row in rf.backends.report() if row.name in ("torch", "cpp") and row.why_not is None]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


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
