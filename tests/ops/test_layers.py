"""The networks' operators against torch in float64: values, gradients, types, odd sizes, refusals."""

import pytest
import torch
import torch.nn.functional as F

import realuid_fast as rf
from realuid_fast.networks import UNet
from realuid_fast.networks.layers import Conv1x1, Conv3x3, GroupNorm, norm_silu_conv, serves
from realuid_fast.networks.unet import ResBlock
from realuid_fast.ops import NormSiluConv3x3, extension, reference

needs_extension = pytest.mark.skipif(extension.why_missing() is not None, reason=str(extension.why_missing()))
pytestmark = needs_extension

ops = torch.ops.realuid_fast
LAST = torch.channels_last

# Relative L2 error of a whole tensor. float32: transformed filters and patches cancel five-fold in a convolution, and a
# filter's gradient is the difference of sums over all tiles, so a few units of 6e-8 become 1e-6 and 3e-6. bfloat16 and
# float16 add one rounding of the output.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-8 + 5e-6, torch.float16: 2**-11 + 5e-6, torch.float64: 1e-13}
# batch, in, out, height, width: one pixel, less than a tile, ragged tiles, channels below, at and beyond vectors and
# panels, several blocks of tiles.
CONVOLUTIONS = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 2, 3),
    (3, 16, 32, 4, 4),
    (2, 33, 17, 5, 9),
    (1, 8, 40, 7, 1),
    (4, 64, 96, 8, 8),
    (2, 7, 65, 33, 30),
]
# batch, channels, groups, height, width: groups of one channel, across vectors, one group; more pixels than one sum.
NORMS = [(1, 1, 1, 3, 2), (2, 6, 3, 3, 5), (3, 32, 32, 4, 4), (2, 33, 11, 5, 7), (2, 96, 4, 8, 8), (1, 128, 32, 17, 19)]


def real(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=LAST) if len(shape) == 4 else values.to(dtype)


def assert_near(found, expected, dtype, times=1.0):
    assert found.shape == expected.shape
    error = (found.double() - expected).norm()
    assert error <= times * TOLERANCE[dtype] * expected.norm().clamp(min=1e-30), f"error {error / expected.norm():.1e}"


def poison(*like):
    """Leave NaN in the memory that the next allocations of these sizes get."""
    for tensor in like:
        junk = [torch.full_like(tensor, float("nan")) for _ in range(6)]
        del junk


def convolution(shape, dtype, filters=LAST):
    batch, channels, out, height, width = shape
    x, grad = draw(batch, channels, height, width, dtype=dtype), draw(batch, out, height, width, dtype=dtype, seed=1)
    weight = draw(out, channels, 3, 3, dtype=real(dtype), seed=2).contiguous(memory_format=filters)
    bias = draw(out, dtype=real(dtype), seed=3)
    poison(x, grad, weight)
    return x, weight, bias, grad


@pytest.mark.parametrize("filters", [LAST, torch.contiguous_format], ids=["filters last", "filters first"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv3x3(shape, dtype, filters):
    x, weight, bias, grad = convolution(shape, dtype, filters)
    x64, weight64, bias64 = (t.double().requires_grad_() for t in (x, weight, bias))
    expected = F.conv2d(x64, weight64, bias64, padding=1)
    g_x64, g_weight64, g_bias64 = torch.autograd.grad(expected, (x64, weight64, bias64), grad.double())

    y = ops.conv3x3(x, weight, bias)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    assert_near(y, expected.detach(), dtype)
    assert_near(ops.conv3x3(x, weight, None), (expected - bias64[:, None, None]).detach(), dtype, 2)
    g_x, g_weight = ops.conv3x3_grads(grad, x, weight, True, True)
    assert g_x.dtype == dtype
    assert g_x.is_contiguous(memory_format=LAST)
    assert g_weight.dtype == weight.dtype
    assert g_weight.stride() == weight.stride()
    assert_near(g_x, g_x64, dtype)
    assert_near(g_weight, g_weight64, real(dtype))
    for want_x, want_weight in ((True, False), (False, True), (False, False)):
        only = ops.conv3x3_grads(grad, x, weight, want_x, want_weight)
        assert torch.equal(only[0], g_x) if want_x else only[0].numel() == 0
        assert torch.equal(only[1], g_weight) if want_weight else only[1].numel() == 0
    for a, g in zip((x, weight, bias), (g_x64, g_weight64, g_bias64), strict=True):
        leaves = [t.detach().requires_grad_(t is a) for t in (x, weight, bias)]
        (found,) = torch.autograd.grad(ops.conv3x3(*leaves), [t for t in leaves if t.requires_grad], grad)
        # Half types: a bias' gradient sums what was rounded once, exactly as the float64 one here does.
        assert_near(found, g, dtype if a is x else real(dtype))


def normalisation(shape, dtype, shifted, offset=0.0):
    batch, channels, groups, height, width = shape
    x = (offset + draw(batch, channels, height, width, dtype=torch.float64)).to(dtype).contiguous(memory_format=LAST)
    grad = draw(batch, channels, height, width, dtype=dtype, seed=1)
    shift = draw(batch, channels, dtype=real(dtype), seed=2) if shifted else None
    weight, bias = 1 + draw(channels, dtype=real(dtype), seed=3), draw(channels, dtype=real(dtype), seed=4)
    poison(x, weight)
    return x, shift, weight, bias, groups, grad


def plain_norm(x, shift, weight, bias, groups):
    h = x if shift is None else x + shift[:, :, None, None]
    return F.silu(F.group_norm(h, groups, weight, bias, 1e-5))


@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_norm_silu(shape, dtype, shifted):
    x, shift, weight, bias, groups, grad = normalisation(shape, dtype, shifted)
    inputs = [t.double().requires_grad_() for t in (x, shift, weight, bias) if t is not None]
    x64, *rest = inputs
    expected = plain_norm(x64, rest[0] if shifted else None, *rest[-2:], groups)
    expected_grads = torch.autograd.grad(expected, inputs, grad.double())

    y, statistics = ops.norm_silu(x, shift, weight, bias, groups, 1e-5)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    assert statistics.dtype == real(dtype)
    assert_near(y, expected.detach(), dtype)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, shift, weight, bias)]
    out = ops.norm_silu(*leaves, groups, 1e-5)[0]
    found = torch.autograd.grad(out, [t for t in leaves if t is not None], grad)
    for got, wanted, of in zip(found, expected_grads, inputs, strict=True):
        if wanted.norm() > 1e-9 * of.shape[0] * grad.double().norm():
            # The input's gradient loses its mean and its part along n: up to two thirds of it at these sizes.
            assert_near(got, wanted, dtype if of is x64 else real(dtype), 4)
    partial = [None if t is None else t.detach() for t in (x, shift, weight, bias)]
    partial[2].requires_grad_()
    (only,) = torch.autograd.grad(ops.norm_silu(*partial, groups, 1e-5)[0], partial[2], grad)
    assert torch.equal(only, found[-2])


def test_norm_silu_keeps_the_digits_of_a_deviation_beside_a_large_mean():
    x, _, weight, bias, groups, _ = normalisation((2, 32, 4, 8, 8), torch.float32, False, offset=1000.0)
    expected = plain_norm(x.double(), None, weight.double(), bias.double(), groups)
    # The deviation is 1, an input's last place 6e-5, and the last place of x * factor + offset as much again.
    torch.testing.assert_close(
        ops.norm_silu(x, None, weight, bias, groups, 1e-5)[0].double(), expected, rtol=0, atol=5e-4
    )


def test_norm_silu_of_extremes():
    x = torch.tensor([-1e30, -200.0, -80.0, 0.0, 80.0, 200.0, 1e30, float("nan")]).view(1, 1, 1, 8)
    one = torch.ones(1)
    # One image of one pixel normalises to zero, so the value comes in through the bias.
    for value in x.flatten():
        y, _ = ops.norm_silu(torch.zeros(1, 1, 1, 1), None, one, value.reshape(1), 1, 1e-5)
        torch.testing.assert_close(y.flatten(), F.silu(value).reshape(1), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("op", ["conv3x3", "norm_silu", "group_norm"])
def test_gradcheck(op):
    x, shift = draw(2, 4, 5, 3, dtype=torch.float64).requires_grad_(), draw(2, 4, dtype=torch.float64, seed=1)
    weight, bias = draw(6, 4, 3, 3, dtype=torch.float64, seed=2), draw(6, dtype=torch.float64, seed=3)
    if op == "conv3x3":
        inputs = (x, weight.requires_grad_(), bias.requires_grad_())
        assert torch.autograd.gradcheck(ops.conv3x3, inputs)
    elif op == "group_norm":
        inputs = (x, bias[:4].clone().requires_grad_(), bias[2:].clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda *a: ops.group_norm(*a, 2, 1e-5)[0], inputs)
        torch.testing.assert_close(ops.group_norm(*inputs, 2, 1e-5)[0], F.group_norm(x, 2, *inputs[1:], 1e-5))
    else:
        inputs = (x, shift.requires_grad_(), bias[:4].clone().requires_grad_(), bias[2:].clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda *a: ops.norm_silu(*a, 2, 1e-5)[0], inputs)


@pytest.mark.parametrize("library", ["realuid_fast", "realuid_fast_reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(library, dtype):
    namespace = getattr(torch.ops, library)
    x, weight, bias, grad = convolution((2, 3, 5, 4, 6), dtype)
    torch.library.opcheck(namespace.conv3x3.default, (x.requires_grad_(), weight.requires_grad_(), bias))
    torch.library.opcheck(namespace.conv3x3_grads.default, (grad, x.detach(), weight.detach(), True, False))
    x, shift, weight, bias, groups, grad = normalisation((2, 6, 3, 3, 5), dtype, True)
    inputs = (x.requires_grad_(), shift.requires_grad_(), weight.requires_grad_(), bias)
    torch.library.opcheck(namespace.norm_silu.default, (*inputs, groups, 1e-5))
    detached = [t.detach() for t in inputs]
    statistics = namespace.norm_silu(*detached, groups, 1e-5)[1]
    torch.library.opcheck(namespace.norm_silu_grads.default, (grad, *detached, statistics))
    torch.library.opcheck(namespace.group_norm.default, (inputs[0], *inputs[2:], groups, 1e-5))
    torch.library.opcheck(namespace.group_norm_grads.default, (grad, detached[0], detached[2], statistics))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)], ids=str)
def test_empty_images(shape):
    x = draw(*shape)
    weight = draw(4, shape[1], 3, 3)
    y = ops.conv3x3(x, weight, None)
    assert y.shape == (shape[0], 4, *shape[2:])
    assert torch.equal(y, torch.zeros_like(y))
    g_x, g_weight = ops.conv3x3_grads(torch.ones_like(y), x, weight, True, True)
    assert g_x.shape == x.shape
    assert torch.equal(g_weight, torch.zeros_like(weight))
    if shape[1]:
        ones = torch.ones(shape[1])
        y, statistics = ops.norm_silu(x, None, ones, ones, 1, 1e-5)
        assert y.shape == x.shape
        assert all(g.isfinite().all() for g in ops.norm_silu_grads(x, x, None, ones, ones, statistics))


def test_one_thread_and_several_give_the_same_bits():
    x, weight, bias, grad = convolution((6, 40, 48, 16, 16), torch.float32)
    values = draw(40), draw(40, seed=1)

    def everything():
        y, statistics = ops.norm_silu(x, None, *values, 8, 1e-5)
        grads = ops.norm_silu_grads(x, x, None, *values, statistics)
        return (ops.conv3x3(x, weight, bias), *ops.conv3x3_grads(grad, x, weight, True, True), y, statistics, *grads)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        for _ in range(3):
            for a, b in zip(alone, everything(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


BAD = {
    "x must be channels_last": ("conv3x3", 0, lambda t: t.contiguous()),
    "x must have four dimensions": ("conv3x3", 0, lambda t: t[0]),
    "x must be float32, bfloat16, float16 or float64": ("conv3x3", 0, lambda t: t.int()),
    "weight must be a CPU tensor of 3x3": ("conv3x3", 1, lambda t: t[:, :, :2]),
    "weight must have 6 input channels": ("conv3x3", 1, lambda t: t[:, :5]),
    "weight must be float32": ("conv3x3", 1, lambda t: t.double()),
    "bias must be": ("conv3x3", 2, lambda t: t[:-1]),
    "grad must have the dtype": ("conv3x3_grads", 0, lambda t: t.double()),
    "grad must be channels_last": ("conv3x3_grads", 0, lambda t: t.contiguous()),
    "groups must divide": ("norm_silu", 4, lambda t: 4),
    "groups must": ("norm_silu", 4, lambda t: 0),
    "shift must be": ("norm_silu", 1, lambda t: t[:, :3]),
    "weight must be a contiguous": ("norm_silu", 2, lambda t: t[:3]),
    "bias must be a contiguous": ("norm_silu", 3, lambda t: t.double()),
    "statistics must be": ("norm_silu_grads", 5, lambda t: t[..., :1]),
    "statistics must belong": ("norm_silu_grads", 5, lambda t: t[:1]),
    "grad must have the dtype and": ("norm_silu_grads", 0, lambda t: t[:1]),
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_does_not_fit_is_refused_by_name(sentence):
    op, place, change = BAD[sentence]
    x, weight, bias, grad = convolution((2, 6, 4, 4, 4), torch.float32)
    one, shift = torch.ones(6), torch.ones(2, 6)
    arguments = {
        "conv3x3": [x, weight, bias],
        "conv3x3_grads": [grad, x, weight, True, True],
        "norm_silu": [x, shift, one, one, 3, 1e-5],
        "norm_silu_grads": [x, x, shift, one, one, torch.ones(2, 3, 2)],
    }[op]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=sentence):
        getattr(ops, op)(*arguments)


def test_freed_memory_is_refused():
    x, weight, bias, _ = convolution((2, 6, 4, 4, 4), torch.float32)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight has no memory"):
        ops.conv3x3(x, weight, bias)
    # Also where there are no pixels to read it for.
    x, ones, statistics = draw(1, 4, 0, 3), torch.ones(4), torch.ones(1, 2, 2)
    statistics.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="statistics has no memory"):
        ops.norm_silu_grads(x, x, None, ones, ones, statistics)


def test_there_is_no_second_derivative():
    x, weight, bias, _ = convolution((2, 6, 4, 4, 4), torch.float32)
    x, ones = x.requires_grad_(), torch.ones(6)
    for y in (ops.conv3x3(x, weight, bias), ops.norm_silu(x, None, ones, ones, 3, 1e-5)[0]):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def assert_module(module, plain, x, *arguments):
    """The module's output and gradients on channels_last images are those of plain torch."""
    x = x.requires_grad_()
    assert serves(x, module.weight)
    with rf.backend("torch"):
        expected = plain(x, *arguments)
    found = module(x, *arguments) if isinstance(module, (Conv1x1, Conv3x3)) else module.silu(x, *arguments)
    grad = torch.randn_like(found)
    parameters = [x, *module.parameters()]
    for a, b in zip(
        (found, *torch.autograd.grad(found, parameters, grad)),
        (expected, *torch.autograd.grad(expected, parameters, grad)),
        strict=True,
    ):
        assert_near(a, b.detach().double(), torch.float32, 2)


def test_modules_run_the_operators_and_agree_with_torch():
    torch.manual_seed(0)
    conv, norm = Conv3x3(16, 24), GroupNorm(4, 16)
    assert_module(conv, conv, draw(4, 16, 8, 8))
    assert type(conv(draw(4, 16, 8, 8).requires_grad_()).grad_fn).__name__ != "ConvolutionBackward0"
    pointwise = Conv1x1(16, 24)
    assert_module(pointwise, pointwise, draw(4, 16, 8, 8))
    assert pointwise(draw(4, 16, 8, 8)).is_contiguous(memory_format=LAST)
    assert_module(norm, norm.silu, draw(4, 16, 8, 8))
    assert_module(norm, norm.silu, draw(4, 16, 8, 8), draw(4, 16, seed=5))
    # Contiguous images and the torch backend are torch's own layers.
    assert type(conv(draw(4, 16, 8, 8).contiguous().requires_grad_()).grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_is_the_same_function_on_the_operators(dtype):
    torch.manual_seed(0)
    options = {
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 2),
        "attention_resolutions": "4",
        "norm_groups": 8,
    }
    net = UNet((3, 8, 8), **options)
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    net = net.to(memory_format=LAST)
    t, x = torch.rand(24), draw(24, 3, 8, 8)
    results = []
    for backend in ("torch", "cpp"):
        with rf.backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = net(t, x)
        assert out.dtype == torch.float32
        results.append((out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))))
    # bfloat16 rounds the images between the layers in both, the operands of torch's products beside.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    whole = torch.stack([g.norm() for g in results[0][1:]]).norm()
    for a, b in zip(*results, strict=True):
        # A key's bias has no gradient, only rounding.
        assert (a - b).norm() <= tolerance * torch.maximum(b.norm(), 1e-3 * whole)


def pair(dtype=torch.float32, channels=16, out=24):
    """A normalisation and a convolution with parameters of every size, images and a shift."""
    torch.manual_seed(0)
    norm, conv = GroupNorm(4, channels), Conv3x3(channels, out)
    for parameter in norm.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    x, shift = draw(4, channels, 24, 20, dtype=dtype), draw(4, channels, dtype=real(dtype), seed=5)
    return norm.to(real(dtype)), conv.to(real(dtype)), x, shift


@pytest.mark.parametrize("wanted", ["all", "images", "filters", "bias", "norm", "shift"])
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_joined_is_the_two_operators_to_the_bit(dtype, shifted, wanted, monkeypatch):
    monkeypatch.setattr("realuid_fast.networks.layers._has_matrix_unit", lambda: False)
    norm, conv, x, shift = pair(dtype)
    inputs = {"images": [x], "shift": [shift] if shifted else [], "filters": [conv.weight], "bias": [conv.bias]}
    inputs["norm"] = list(norm.parameters())
    inputs["all"] = [tensor for group in inputs.values() for tensor in group]
    for tensor in (x, shift, *conv.parameters(), *norm.parameters()):
        tensor.requires_grad_(False)
    for tensor in inputs[wanted]:
        tensor.requires_grad_()
    arguments = (x, shift) if shifted else (x,)
    expected = conv(norm.silu(*arguments))
    found = norm_silu_conv(norm, x, conv, *arguments[1:])
    assert torch.equal(found, expected)
    if not inputs[wanted]:
        assert not found.requires_grad
        return
    assert type(found.grad_fn).__name__ == "NormSiluConv3x3Backward"
    grad = torch.randn_like(found)
    poison(x, found)
    of_found = torch.autograd.grad(found, inputs[wanted], grad)
    for a, b in zip(of_found, torch.autograd.grad(expected, inputs[wanted], grad), strict=True):
        assert torch.equal(a, b)


def kept_for_the_backward(call):
    """Bytes of the tensors that the graph of ``call()`` holds, each once, parameters apart."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def test_joined_keeps_images_and_a_byte_a_value_of_dropout():
    norm, conv, x, shift = pair()
    x.requires_grad_()
    statistics = 4 * 4 * 2 * 4
    apart = kept_for_the_backward(lambda: conv(norm.silu(x, shift)))
    assert apart == 2 * x.nbytes + shift.nbytes + statistics
    assert kept_for_the_backward(lambda: norm_silu_conv(norm, x, conv, shift)) == apart - x.nbytes
    assert kept_for_the_backward(lambda: norm_silu_conv(norm, x, conv, shift, 0.1)) == apart - x.nbytes + x.numel()


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_joined_dropout_draws_what_torch_draws(dtype, dropout, monkeypatch):
    monkeypatch.setattr("realuid_fast.networks.layers._has_matrix_unit", lambda: False)
    norm, conv, x, shift = pair(dtype)
    x.requires_grad_()
    inputs = [x, *norm.parameters(), *conv.parameters()]
    torch.manual_seed(3)
    expected = conv(F.dropout(norm.silu(x, shift), dropout))
    torch.manual_seed(3)
    found = norm_silu_conv(norm, x, conv, shift, dropout)
    assert type(found.grad_fn).__name__ == "NormSiluConv3x3Backward"
    grad = torch.randn_like(found)
    draws = torch.get_rng_state()
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, grad)),
        (expected, *torch.autograd.grad(expected, inputs, grad)),
        strict=True,
    )
    assert torch.equal(draws, torch.get_rng_state())
    for a, b in pairs:
        # Half types: the scale is rounded to them in torch's mask, and not here.
        assert_near(a, b.detach().double(), dtype, 2)


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}, {"resample": "down"}, {"dropout": 0.5}], ids=str)
def test_a_residual_block_joins_what_nothing_stands_between(options):
    torch.manual_seed(0)
    block = ResBlock(16, 32, 16, 4, **options).to(memory_format=LAST)
    for parameter in block.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x, embedding = draw(4, 16, 24, 24).requires_grad_(), torch.randn(4, 32)

    def joins(training):
        block.train(training)
        # All are held to the end: in torch 2.11 a Python node cannot be asked once the nodes that led to it are gone.
        nodes = [block(x, embedding).grad_fn]
        for node in nodes:
            nodes += [before for before, _ in node.next_functions if before is not None]
        return sum(type(node).__name__ == "NormSiluConv3x3Backward" for node in nodes)

    assert joins(True) == joins(False) == (1 if "scale_shift" in options or "resample" in options else 2)
    # A hook on the convolution is for its call.
    block.out_layers[3].register_forward_hook(lambda *_: None)
    assert joins(False) == ("resample" not in options)


def test_joined_outside_the_operators_is_the_two_modules():
    norm, conv, x, shift = pair()
    x.requires_grad_()
    with rf.backend("torch"):
        assert type(norm_silu_conv(norm, x, conv, shift).grad_fn).__name__ == "ConvolutionBackward0"
    plain = norm_silu_conv(norm, x.contiguous(), conv, shift)
    torch.testing.assert_close(plain, norm_silu_conv(norm, x, conv, shift), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_silu_conv(norm, x, conv, shift).dtype == torch.bfloat16


def test_joined_gradcheck():
    norm, conv, x, shift = pair(torch.float64, 4, 4)
    norm, x = GroupNorm(2, 4).double(), draw(1, 4, 4, 5, dtype=torch.float64)
    shift = draw(1, 4, dtype=torch.float64, seed=5)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, shift, *norm.parameters(), *conv.parameters())]

    def joined(x, shift, norm_weight, norm_bias, weight, bias, dropout=0.0):
        torch.manual_seed(0)
        return NormSiluConv3x3.apply(x, shift, norm_weight, norm_bias, 2, 1e-5, weight, bias, dropout)

    assert torch.autograd.gradcheck(joined, inputs)
    assert torch.autograd.gradcheck(lambda *inputs: joined(*inputs, 0.4), inputs)
    with pytest.raises(RuntimeError, match="norm_silu with conv3x3 has no second derivative"):
        torch.autograd.grad(joined(*inputs).sum(), inputs, create_graph=True)


def test_compiled_networks_hold_the_operators():
    torch.manual_seed(0)
    conv, norm = Conv3x3(16, 16), GroupNorm(4, 16)

    def both(x):
        return conv(norm.silu(x)).square().sum() + norm_silu_conv(norm, x, conv).sum()

    x = draw(4, 16, 8, 8).requires_grad_()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(both(x), x), torch.autograd.grad(compiled(x), x), strict=True):
        torch.testing.assert_close(a, b)


def test_references_compute_the_same():
    x, weight, bias, grad = convolution((2, 6, 4, 5, 6), torch.float32)
    one, shift = draw(6, seed=6), draw(2, 6, seed=7)
    _, statistics = ops.norm_silu(x, shift, one, one, 3, 1e-5)
    calls = {
        "conv3x3": (x, weight, bias),
        "conv3x3_grads": (grad, x, weight, True, True),
        "norm_silu": (x, shift, one, one, 3, 1e-5),
        "norm_silu_grads": (x, x, shift, one, one, statistics),
    }
    for op, arguments in calls.items():
        found, expected = getattr(ops, op)(*arguments), getattr(reference, op)(*arguments)
        for a, b in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
