"""Random calls of the layers: each gives what float64 gives, or refuses by name."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from realuid_fast import ops as operators

from .random_calls import (
    DTYPES,
    assert_agrees,
    check_operator,
    fuzzed,
    largest,
    needs_extension,
    norm,
    ops,
    reference,
    strided,
    widened_all,
)

# Those with a kernel in C++: on a CPU the others are torch's own layers.
LAYERS = [
    operator.name
    for operator in operators.LAYERS
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"realuid_fast::{operator.name}", "CPU")
]
# Below, at and beyond a vector and a panel.
CHANNELS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 33)


class Layer:
    """Images of one call, each with its own offset and perhaps in the same memory, and the parameters beside them."""

    def __init__(self, draw, least=0):
        self.batch, self.height, self.width = (draw(st.integers(least, most)) for most in (3, 9, 9))
        self.channels, self.out = (draw(st.sampled_from([c for c in CHANNELS if c >= least])) for _ in range(2))
        self.dtype = draw(st.sampled_from(DTYPES))
        self.real = torch.float64 if self.dtype == torch.float64 else torch.float32
        seed = draw(st.integers(0, 2**32))
        self.generator, self.pick = torch.Generator().manual_seed(seed), random.Random(seed)
        self.groups = self.pick.choice([g for g in range(1, self.channels + 1) if self.channels % g == 0] or [1])
        self.scale = self.pick.choice((1.0, 1.0, 0.0, 1e-2, 30.0))
        self.pool = self.random(self.batch * max(self.channels, self.out) * self.height * self.width + 9)

    def random(self, *shape, dtype=None):
        return (torch.randn(shape, generator=self.generator) * self.scale).to(dtype or self.dtype)

    def images(self, channels):
        shape = (self.batch, channels, self.height, self.width)
        memory = self.pool if self.pick.randrange(4) == 0 else self.random(math.prod(shape) + 9)
        strides = [channels * self.height * self.width, 1, channels * self.width, channels]
        # The stride of a dimension of size 1 says nothing.
        strides = [self.pick.choice((0, 1, s, 1000)) if n == 1 else s for n, s in zip(shape, strides, strict=True)]
        return memory.as_strided(shape, strides, self.pick.randrange(9))

    def filters(self):
        """3x3 filters with their dimensions in any order, perhaps with gaps, perhaps some of them the same memory."""
        sizes, order = (self.out, self.channels, 3, 3), self.pick.sample(range(4), 4)
        weight = self.random(*(sizes[d] for d in order), dtype=self.real).permute([order.index(d) for d in range(4)])
        return self.pick.choice((weight, weight, strided(weight), weight[:1, :1].expand(sizes)))

    def of_channels(self, channels):
        return self.random(channels, dtype=self.real)

    def maybe(self, value):
        return self.pick.choice((None, value))

    def arguments(self, op):
        x = self.images(self.channels)
        if op.startswith("conv"):
            weight = self.filters()
            if op == "conv3x3":
                return {"x": x, "weight": weight, "bias": self.maybe(self.of_channels(self.out))}
            wants = {name: self.pick.choice((True, False)) for name in ("want_x", "want_weight")}
            return {"grad": self.images(self.out), "x": x, "weight": weight, **wants}
        shift = self.maybe(self.random(self.batch, self.channels, dtype=self.real))
        weight, bias = self.of_channels(self.channels), self.of_channels(self.channels)
        common = {"x": x, "shift": shift, "weight": weight, "bias": bias}
        if op == "norm_silu":
            return {**common, "groups": self.groups, "eps": self.pick.choice((1e-5, 1e-2))}
        statistics = self.random(self.batch, self.groups, 2, dtype=self.real)
        return {"grad": self.images(self.channels), **common, "statistics": statistics}


@needs_extension
@pytest.mark.parametrize("op", LAYERS)
@fuzzed
@given(st.data())
def test_layer_operator(op, data):
    layer = Layer(data.draw)
    if op.startswith("norm") and layer.channels == 0:
        with pytest.raises(RuntimeError, match="groups must divide the 0 channels of x"):
            getattr(ops, op)(**layer.arguments(op))
        return
    check_operator(op, layer.arguments(op), data.draw, layer_terms)


def layer_terms(arguments):
    return norm_terms(arguments) if "shift" in arguments else conv_terms(arguments)


def conv_terms(arguments):
    """What a convolution's results are made of by Winograd's filtering: of whole filters and whole patches.

    Of an image of one pixel only the filters' middle counts. The others' part of it cancels but for its rounding, which
    is all there is to see where they are large beside the middle.
    """
    wide = widened_all(arguments)
    if "grad" not in wide:
        return {0: norm(wide["x"]) * norm(wide["weight"])}
    return {0: norm(wide["grad"]) * norm(wide["weight"]), 1: norm(wide["grad"]) * norm(wide["x"])}


def norm_terms(arguments):
    """What a normalisation's results are made of, which cancels where a group has but few values.

    ``z = h weight rstd + (bias - mean weight rstd)`` loses the mean; a gradient in ``h`` its mean over the group and
    its part along ``n``, of which ``h rstd`` is a term.
    """
    wide = widened_all(arguments)
    x, shift, weight = wide["x"], wide["shift"], wide["weight"]
    statistics = wide.get("statistics")
    if statistics is None:
        statistics = reference.norm_silu(**{name: wide[name] for name in wide if name != "grad"})[1]
    rstd, h = largest(statistics[..., 1]), x if shift is None else x + shift[..., None, None]
    if "grad" not in arguments:
        return {0: norm(h) * rstd * largest(weight)}
    size = norm(wide["grad"]) * (1 + rstd) * (1 + largest(weight)) * (1 + rstd * largest(h))
    return dict.fromkeys(range(4), size)


def plain_conv3x3(x, weight, bias):
    # torch's own way back refuses filters in some orders.
    return F.conv2d(x, weight.contiguous(), bias, padding=1)


def plain_norm_silu(x, shift, weight, bias, groups, eps):
    # Written out: torch's own way back reads memory it has not got where its input wants no gradient.
    h = x if shift is None else x + shift[..., None, None]
    grouped = h.reshape(h.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    n = centred * (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    return F.silu(n.reshape(h.shape) * weight[:, None, None] + bias[:, None, None])


PLAIN = {"conv3x3": plain_conv3x3, "norm_silu": plain_norm_silu}


@needs_extension
@pytest.mark.parametrize("op", PLAIN)
@fuzzed
@given(st.data())
def test_layer_gradients(op, data):
    """Whatever requires a gradient and in whatever layout the incoming one comes: torch's own layers in float64."""
    layer = Layer(data.draw, least=1)
    arguments = layer.arguments(op)
    floats = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    wanted = [name for name in floats if layer.pick.randrange(2)]
    channels = layer.out if op == "conv3x3" else layer.channels
    grad = layer.images(channels)
    grad = layer.pick.choice((grad, grad.contiguous(), grad[:1, :1, :1, :1].expand(grad.shape)))

    def results(function):
        def evaluate(arguments):
            arguments = dict(arguments)
            grad = arguments.pop("grad")
            leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
            y = function(**arguments | leaves)
            y = y[0] if isinstance(y, tuple) else y
            assert y.requires_grad == bool(wanted)
            return [y.detach(), *(torch.autograd.grad(y, list(leaves.values()), grad) if wanted else ())]

        return evaluate

    arguments["grad"] = grad
    found = results(getattr(ops, op))(arguments)
    of_y = layer_terms({name: value for name, value in arguments.items() if name != "grad"})
    of_grads = layer_terms(arguments)
    if op == "conv3x3":
        of_grads = dict(zip(("x", "weight"), of_grads.values(), strict=True))
        terms = of_y | {i: of_grads[name] for i, name in enumerate(wanted, 1) if name in of_grads}
    else:
        terms = dict.fromkeys(range(len(found)), of_grads[0]) | of_y
    assert_agrees(found, results(PLAIN[op]), arguments, terms)
