"""FusedAdam on a GPU: agreement with the CPU, replayed graphs, loading a state."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from realuid_fast.optim import FusedAdam

from .networks import assert_close, conv_net, make_params, set_gradients

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
