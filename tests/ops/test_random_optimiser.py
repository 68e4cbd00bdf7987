"""Random calls of the optimiser's step: each gives what float64 gives, or refuses by name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .random_calls import LONG, check_list_op, fuzzed, needs_extension, ops, schema


def parameters(draw, generator, dtype):
    """Shapes and layouts of a few parameters, as a function that draws tensors like them."""
    count = draw(st.integers(1, 4))
    shapes = [tuple(draw(st.lists(st.integers(0, 5), max_size=4))) for _ in range(count)]
    if draw(st.integers(0, 3)) == 0:
        shapes[0] = (draw(st.sampled_from(LONG)),)
    orders = [draw(st.permutations(range(len(shape)))) for shape in shapes]

    def like(*lead):
        tensors = []
        for shape, order in zip(shapes, orders, strict=True):
            strides, step = [0] * len(shape), 1
            for d in reversed(order):
                strides[d] = step
                step *= max(shape[d], 1)
            room = torch.randn(math.prod(lead) * step + 3, generator=generator).to(dtype)
            tensors.append(room.as_strided((*lead, *shape), (*[step] * len(lead), *strides), draw(st.integers(0, 3))))
        return tensors

    return like


@needs_extension
@fuzzed
@given(st.data())
def test_begin_step(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    grads = parameters(draw, generator, draw(st.sampled_from((torch.float32, torch.float64))))()
    if draw(st.integers(0, 9)) == 0 and grads[0].numel():
        grads[0][(0,) * grads[0].dim()] = math.inf
    steps = [torch.tensor(float(draw(st.integers(0, 9)))) for _ in range(draw(st.integers(0, 3)))]
    counts = torch.tensor([draw(st.integers(0, 9)), 0])
    written = ("steps", "counts")

    def exact(wide):
        """The norm: the reference's own sum in float64 is off by more places than the kernel's."""
        squares = (value * value for grad in wide["grads"] for value in grad.flatten().tolist())
        return wide["grads"][0].new_tensor(math.sqrt(math.fsum(squares)), dtype=torch.float64)

    arguments = {"grads": grads, "steps": steps, "counts": counts}
    check_list_op("begin_step_", written, arguments, draw, exact)


@needs_extension
@fuzzed
@given(st.data())
def test_adam(data):
    draw = data.draw
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    like = parameters(draw, generator, dtype)
    rows, beta1 = draw(st.integers(0, 3)), draw(st.sampled_from((0.0, 0.5, 0.9)))
    arguments = {
        "params": like(),
        "grads": like(),
        "exp_avgs": like() if beta1 or draw(st.booleans()) else [],
        "exp_avg_sqs": [t.square_() for t in like()],
        "emas": like(rows) if rows else [],
        "norm": torch.tensor(draw(st.sampled_from((0.0, 0.5, 3.0, math.inf, math.nan))), dtype=dtype),
        "step": torch.tensor(float(draw(st.integers(1, 9)))),
        "lr": torch.rand(draw(st.integers(1, 3)), generator=generator, dtype=torch.float64),
        "counts": torch.tensor([draw(st.integers(1, 9)), 0]),
        "ema_decays": torch.rand(rows, generator=generator, dtype=torch.float64),
        "clip": draw(st.sampled_from((0.0, 1.0))),
        "beta1": beta1,
        "beta2": draw(st.sampled_from((0.9, 0.999))),
        "eps": draw(st.sampled_from((1e-8, 1e-2))),
        "weight_decay": draw(st.sampled_from((0.0, 0.1))),
        "maximize": draw(st.booleans()),
        "ema_warmup": draw(st.booleans()),
    }
    for argument in schema("adam_"):
        if argument.name not in arguments and not argument.has_default_value():
            arguments[argument.name] = []
    lists = ["params", "grads", "exp_avgs", "exp_avg_sqs", "emas"]
    written = [name for name in lists if name != "grads"]
    check_list_op("adam_", written, arguments, draw)


@needs_extension
@fuzzed
@given(st.data())
def test_adam_refuses_memory_that_it_would_write_twice(data):
    draw = data.draw
    like = parameters(draw, torch.Generator().manual_seed(0), torch.float32)
    lists = {name: like() for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    lists["emas"] = like(2)
    one, other = draw(st.permutations(sorted(lists)))[:2]
    i = draw(st.integers(0, len(lists["params"]) - 1))
    tensor = lists[other][i][0] if other == "emas" else lists[other][i]
    if tensor.numel() == 0:
        return
    room = tensor.as_strided((2, *tensor.shape), (0, *tensor.stride())) if one == "emas" else tensor
    lists[one] = [room if k == i else t for k, t in enumerate(lists[one])]
    numbers = [
        torch.tensor(1.0),
        torch.tensor(1.0),
        torch.tensor([0.1]),
        torch.tensor([1, 0]),
        torch.tensor([0.9, 0.99]),
    ]
    with pytest.raises(RuntimeError, match="must not share memory with"):
        ops.adam_(*(lists[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")), *numbers,
                  1.0, 0.5, 0.9, 1e-8, 0.0, False, False)  # fmt: skip
