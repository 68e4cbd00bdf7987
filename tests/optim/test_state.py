"""FusedAdam's state: torch's own, loaded in place, copied and pickled; settings and tensors that are refused."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from realuid_fast.errors import UserError
from realuid_fast.optim import FusedAdam, Optimiser

from .networks import assert_close, conv_net, give_gradients, make_net, make_params, set_gradients


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
        ({"lr": "1e-3"}, "lr must be a finite number"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"lr": torch.tensor(-1.0)}, "lr as a tensor must hold finite numbers"),
        ({"lr": torch.tensor([0.1, math.nan])}, "lr as a tensor must hold finite numbers"),
        ({"betas": None}, "betas must be two numbers"),
        ({"betas": ("a", 0.9)}, "betas must be two numbers"),
        ({"eps": "x"}, "eps must be a positive number"),
        ({"weight_decay": None}, "weight_decay must be"),
        ({"clip": None}, "clip must be a number"),
        ({"ema_decays": 0.9}, "ema_decays must be a tuple or a list"),
        ({"ema_decays": ("a",)}, "ema_decays must be different numbers"),
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


@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_a_state_of_other_shapes_is_refused_before_anything_changes(shape):
    def stepped(*shapes):
        params = [nn.Parameter(torch.ones(each)) for each in shapes]
        optimiser = FusedAdam(params)
        give_gradients(params, 0)
        optimiser.step()
        return optimiser

    mine, other = stepped((4,), (3,)), stepped((4,), shape)
    other.state[other.param_groups[0]["params"][0]]["exp_avg"].fill_(5.0)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(UserError, match=rf"exp_avg of shape \({shape[0]},\) for the parameter 1, not \(3,\)"):
        mine.load_state_dict(other.state_dict())
    for key, values in before["state"].items():
        for name, value in values.items():
            assert torch.equal(value, mine.state_dict()["state"][key][name])
    mine.step()
    assert before["counts"].tolist() == [1, 0]
    for junk in (None, {}):
        with pytest.raises(UserError, match="state_dict must be the state of a FusedAdam"):
            mine.load_state_dict(junk)
    with pytest.raises(UserError, match="no betas in its param_groups: it is of another optimiser"):
        mine.load_state_dict(torch.optim.SGD(make_params()[:2]).state_dict())
    assert mine.param_groups[0]["betas"] == (0.9, 0.999)


def test_the_state_is_not_the_counts_that_go_on():
    params = make_params()
    optimiser = FusedAdam(params)
    state = optimiser.state_dict()
    give_gradients(params, 0)
    optimiser.step()
    assert state["counts"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("move", "words"),
    [
        (lambda net: net.to(memory_format=torch.channels_last), "parameter 0 has changed its layout in memory"),
        (lambda net: net.double(), r"parameter 0 has changed its type .* from torch\.float32 to torch\.float64"),
    ],
)
def test_a_network_that_was_moved_after_its_optimiser_was_built_is_named(move, words):
    net = nn.Conv2d(3, 4, 3)
    optimiser = FusedAdam(net.parameters())
    move(net)
    net(torch.randn(2, 3, 5, 5, dtype=net.weight.dtype)).square().sum().backward()
    with pytest.raises(UserError, match=words + ".*build the optimiser after the network is moved"):
        optimiser.step()


def test_schedulers_of_torch_are_refused_for_a_table_of_rates():
    optimiser = FusedAdam(make_params(), lr=torch.linspace(0.1, 0.01, 5))
    with pytest.raises(UserError, match="lr is a table, a schedule of its own"):
        torch.optim.lr_scheduler.StepLR(optimiser, 2)
