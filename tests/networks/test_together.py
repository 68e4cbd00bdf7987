"""The U-Nets' ways on a GPU, here run on a CPU: shifts as one product, casts as one, attention of pixels."""

import copy

import pytest
import torch
from torch._dynamo import lookup_backend

from realuid_fast.errors import UserError
from realuid_fast.networks import recompute, together
from realuid_fast.networks.compiling import compiled
from realuid_fast.networks.edm_layers import Block
from realuid_fast.networks.unet import UNet
from realuid_fast.ops import backends

from ..helpers import random_network

CONFIG = {"kind": "unet", "dim": [3, 8, 8], "num_channels": 16, "channel_mult": [1, 2], "norm_groups": 4}
LAST = torch.channels_last


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    def switch(layer):
        monkeypatch.setattr(backends, "_CUDA_ALONE", {*backends._CUDA_ALONE} - {layer})

    return switch


def gradients(net, autocast=False):
    """The output, and all gradients by the parameters' names."""
    generator = torch.Generator().manual_seed(1)
    t, x, weight = (torch.rand(2, *shape, generator=generator) for shape in ((), (3, 8, 8), (3, 8, 8)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net(t, x.to(memory_format=LAST))
    (out * weight).sum().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}, {"resblock_updown": True}], ids=str)
def test_shifts_of_all_blocks_are_those_of_each(as_on_a_gpu, options):
    net = random_network({**CONFIG, **options}).to(memory_format=LAST)
    alone, at_once = net, copy.deepcopy(net)
    out, grads = gradients(alone)
    as_on_a_gpu("shifts")
    called = []
    hook = at_once.middle_block.register_forward_pre_hook(lambda module, inputs: called.append(type(inputs[1])))
    found, found_grads = gradients(at_once)
    hook.remove()
    assert called == [tuple]
    torch.testing.assert_close(found, out)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, msg=name)


def test_layers_that_were_replaced_or_hooked_are_called(as_on_a_gpu):
    as_on_a_gpu("shifts")
    net = random_network(CONFIG)
    called = []
    net.middle_block[0].emb_layers[1].register_forward_hook(lambda *_: called.append(True))
    gradients(net)
    assert called


def test_casts_at_once_are_autocast_s(as_on_a_gpu):
    net = random_network(CONFIG).to(memory_format=LAST)
    one_by_one, at_once = net, copy.deepcopy(net)
    out, grads = gradients(one_by_one, autocast=True)
    as_on_a_gpu("casts")
    before = dict(at_once.named_parameters())
    found, found_grads = gradients(at_once, autocast=True)
    assert all(p is before[name] for name, p in at_once.named_parameters())
    torch.testing.assert_close(found, out, rtol=0.02, atol=0.02)
    for name, grad in grads.items():
        assert found_grads[name].dtype == torch.float32
        assert (found_grads[name] - grad).norm() <= 0.02 * grad.norm() + 1e-6, name


def test_compiled_casts_are_the_same_ones(as_on_a_gpu):
    """torch.compile takes them into its graph as one call, without a look at the tensors."""
    as_on_a_gpu("casts")
    net = random_network({**CONFIG, "channel_mult": [1]}).to(memory_format=LAST)
    out, grads = gradients(net, autocast=True)
    again, nodes = copy.deepcopy(net), []

    def backend(graph, inputs):
        nodes.extend(node.target for node in graph.graph.nodes)
        return lookup_backend("aot_eager")(graph, inputs)

    again.zero_grad()
    run = compiled(again, backend)
    run.named_parameters = again.named_parameters
    found, found_grads = gradients(run, autocast=True)
    assert nodes.count(together.cast_at_once) == 1
    torch.testing.assert_close(found, out)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, msg=name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inputs = torch.rand(2), torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(run(*inputs), net(*inputs))
    assert nodes.count(together.cast_at_once) == 1


def test_a_call_that_fails_leaves_the_parameters(as_on_a_gpu):
    as_on_a_gpu("casts")
    net = random_network(CONFIG)
    before = dict(net.named_parameters())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="endpoint"):
        net(torch.zeros(1), torch.zeros(1, 3, 8, 8), None, torch.zeros(1, 3, 8, 8))
    assert all(p is before[name] for name, p in net.named_parameters())


def test_a_guidance_scale_reaches_the_network_with_cast_parameters(as_on_a_gpu):
    as_on_a_gpu("casts")
    net = random_network({**CONFIG, "guided": True})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (net(torch.zeros(1), torch.zeros(1, 3, 8, 8), guidance=scale) for scale in (1.0, 3.0))
    assert one.dtype == torch.float32
    assert (one - other).norm() > 0.01 * one.norm()


def test_when_parameters_are_cast_at_once(as_on_a_gpu):
    net, x = UNet(**{key: value for key, value in CONFIG.items() if key != "kind"}), torch.zeros(1)

    def wanted():
        with torch.autocast("cpu", torch.bfloat16):
            return together.casts(net, x)

    assert not wanted()
    as_on_a_gpu("casts")
    assert wanted()
    assert not together.casts(net, x)
    hook = net.register_forward_hook(lambda *_: None)
    assert not wanted()
    hook.remove()
    recompute.recompute(net)
    assert not wanted()
    recompute.recompute(net, False)
    assert wanted()
    net.time_embed[0].weight.data = net.time_embed[0].weight.data.bfloat16()
    assert not wanted()


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_of_pixels_is_that_of_images(heads):
    block = Block(16, 16, 8, heads=heads).double()
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(block._attention_of_pixels(x.to(memory_format=LAST)), block._attention(x))
