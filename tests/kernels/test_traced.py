"""torch.compile's graphs of the operators on CUDA, without a GPU: they hold the launches, not the operator."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from realuid_fast.objectives import RealUID
from realuid_fast.ops import triton_backend

SHAPE = (64, 3, 32, 32)


@pytest.fixture(scope="module", autouse=True)
def shown() -> Iterator[None]:
    """The rule as a CUDA build of torch has it."""
    library = torch.library.Library("realuid_fast", "IMPL")
    if not triton_backend._libraries:
        triton_backend.show_to_torch_compile(library)
    yield
    library._destroy()


def arguments(op: str, device: str, dtype: torch.dtype, gaps: bool = False) -> tuple[Any, ...]:
    x = torch.empty(SHAPE, device=device, dtype=dtype)
    coef = torch.empty(SHAPE[0], 9, device=device, dtype=torch.promote_types(dtype, torch.float32))
    key = torch.empty_strided((2,), (2 if gaps else 1,), device=device, dtype=torch.int64)
    halves, scalars = (0.9, 1.0, -0.3, 1.2, 0.1, 0.2, 0.0, 0.4), RealUID(0.9, 0.8).generator_scalars
    images = torch.empty(8, 16, 4, 4, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight, shift, statistics = (coef.new_empty(shape) for shape in ((16,), (8, 16), (8, 4, 2)))
    return {
        "normal_like": (key, x, 64),
        "interpolate": (x, coef, key, None, 64),
        "interpolate_grads": (x, coef, True, False),
        "mean_abs_error": (x, x, None, coef, None, None),
        "matching": (x, x, None, coef, key, None, 64, True, True),
        "fake": (x, x, None, coef, key, x, None, None, None, 32, 32, *halves, True, True),
        "generator": (x, x, x, None, coef, key, *[None] * 4, *scalars, *[True] * 4, False, False),
        "norm_silu": (images, shift, weight, weight, 4, 1e-5),
        "norm_silu_grads": (images, images, shift, weight, weight, statistics),
        "group_norm": (images, weight, weight, 4, 1e-5),
        "group_norm_grads": (images, images, weight, statistics),
    }[op]


def graph(op: str, device: str, dtype: torch.dtype, gaps: bool = False) -> tuple[torch.fx.Graph, list[Any], list[Any]]:
    """The traced graph of a call on fake tensors, its results and what the operator says of them."""
    with FakeTensorMode():
        given = arguments(op, device, dtype, gaps)
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        results = []

        def call(*some: torch.Tensor) -> Any:
            rest = iter(some)
            found = getattr(torch.ops.realuid_fast, op)(
                *(next(rest) if isinstance(each, torch.Tensor) else each for each in given)
            )
            results.extend(found if isinstance(found, tuple) else [found])
            return found

        traced = make_fx(dispatch_functionalize(call), tracing_mode="fake")(*tensors).graph
        expected = getattr(torch.ops.realuid_fast, op)(*given)
    return traced, results, list(expected) if isinstance(expected, tuple) else [expected]


def launches(traced: torch.fx.Graph) -> list[str]:
    nodes = [node for node in traced.nodes if node.target is triton_kernel_wrapper_functional]
    return [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__ for node in nodes]


@pytest.mark.parametrize("op", triton_backend._HOMES)
def test_the_graph_holds_the_launches(op: str) -> None:
    traced, results, expected = graph(op, "cuda", torch.float32)
    kernels = launches(traced)
    others = {"normal_like": "normal", "mean_abs_error": "error"}
    others |= {"group_norm": "norm_silu", "group_norm_grads": "norm_silu_grads"}
    assert kernels[0] == f"_{others.get(op, op)}_kernel"
    second = dict.fromkeys(("mean_abs_error", "matching", "fake", "generator"), "_finish_kernel")
    second |= dict.fromkeys(("norm_silu_grads", "group_norm_grads"), "_add_images_kernel")
    assert kernels[1:] == ([second[op]] if op in second else [])
    assert not [node for node in traced.nodes if "realuid_fast" in str(node.target)]
    for mine, theirs in zip(results, expected, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float64), ("cpu", torch.float32)])
@pytest.mark.parametrize("op", triton_backend._HOMES)
def test_elsewhere_the_operator_stays_one_node(op: str, device: str, dtype: torch.dtype) -> None:
    traced, _, _ = graph(op, device, dtype)
    assert not launches(traced)
    named = Counter(str(node.target) for node in traced.nodes if "realuid_fast" in str(node.target))
    assert named == {f"realuid_fast.{op}.default": 1}


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch without CUDA copies no CUDA tensor, not even a fake one"
)
def test_a_key_with_gaps_is_copied_first() -> None:
    for gaps in (False, True):
        traced, _, _ = graph("interpolate", "cuda", torch.float32, gaps)
        copies = [node for node in traced.nodes if "clone" in str(node.target)]
        (launch,) = (node for node in traced.nodes if node.target is triton_kernel_wrapper_functional)
        assert (launch.kwargs["kwargs"]["noise_ptr"] in copies) == gaps


def test_torch_asks_once_what_a_kernel_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    graph("group_norm_grads", "cuda", torch.float16)
    asked, plain = [], triton_kernel_wrap.generate_ttir

    def counted(kernel: Any, *rest: Any) -> Any:
        asked.append(kernel.fn.fn.__name__)
        return plain(kernel, *rest)

    monkeypatch.setattr(triton_kernel_wrap, "generate_ttir", counted)
    again, _, _ = graph("group_norm_grads", "cuda", torch.float16)
    assert len(launches(again)) == 2
    assert not asked
    # Another type is another question, but the sum over images is of float32 as before.
    graph("group_norm_grads", "cuda", torch.bfloat16)
    assert asked == ["_norm_silu_grads_kernel"]


def test_no_kernel_writes_a_tensor_without_dimensions() -> None:
    """inductor fills such a tensor first, by a launch of its own."""
    traced, _, _ = graph("matching", "cuda", torch.float32)
    for node in traced.nodes:
        if node.target is triton_kernel_wrapper_functional:
            for value in node.kwargs["kwargs"].values():
                assert not isinstance(value, torch.fx.Node) or value.meta["val"].dim()
