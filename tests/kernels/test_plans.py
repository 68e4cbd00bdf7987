"""Calls planned once: a plan hands its kernels what planning the same call anew would, whatever tensors it is given."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

import torch
from triton.compiler import CompiledKernel

from realuid_fast.kernels import plans, tiles
from realuid_fast.objectives import RealUID
from realuid_fast.ops import triton_backend

LAUNCHES: list[tuple[Any, ...]] = []


class Compiled(CompiledKernel):
    """In place of a compiled kernel: it notes its grid and its arguments."""

    module = None

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: LAUNCHES.append((self.name, grid, arguments))


def launch(call: tiles.Call) -> Compiled:
    given = {**call.arguments, **call.constants}
    kernel = Compiled(call.kernel.__name__)
    kernel[(*call.grid, 1, 1)[:3]](*(given[name] for name in call.kernel.arg_names))
    return kernel


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles.Call, "run", launch)
    monkeypatch.setattr(triton_backend, "PLANS", {})
    LAUNCHES.clear()


def arguments(op: str, dim: int, alike: bool, offset: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of a call on six rows; with ``alike`` one tensor is given for all that have its shape."""
    one = torch.randn(6 * dim + offset)[offset:].to(dtype).view(6, dim)

    def x() -> torch.Tensor:
        return one if alike else torch.randn(6 * dim + offset)[offset:].to(dtype).view(6, dim)

    coef, key, scales = torch.randn(6, 9), torch.tensor([3, 4]), torch.randn(6)
    weight, shift = torch.randn(dim), torch.randn(6, dim)
    halves = (0.9, 1.0, -0.3, 1.2, 0.1, 0.2, 0.0, 0.4)
    return {
        "normal_like": lambda: (key, x(), 6),
        "interpolate": lambda: (x(), coef, x(), x(), 6),
        "interpolate_grads": lambda: (x(), coef, True, False),
        "mean_abs_error": lambda: (x(), x(), None, coef, x(), scales),
        "matching": lambda: (x(), x(), x(), coef, key, None, 6, True, True),
        "fake": lambda: (x(), x(), None, coef, key, x(), None, x(), scales, 3, 2, *halves, True, True),
        "generator": lambda: (
            *(x(), x(), x(), None, coef, key, x(), None, None, scales),
            *(*RealUID(0.9, 0.8).generator_scalars, True, True, False, True, False, False),
        ),
        "norm_silu": lambda: (x(), shift, weight, weight if alike else torch.randn(dim), 2, 1e-5),
        "norm_silu_grads": lambda: (x(), x(), None, weight, torch.randn(dim), torch.randn(6, 2, 2)),
        "group_norm": lambda: (x(), weight, weight if alike else torch.randn(dim), 2, 1e-5),
        "group_norm_grads": lambda: (x(), x(), weight, torch.randn(6, 2, 2)),
        "scale_grads_": lambda: ([x(), x(), x()], scales),
    }[op]()


def described(given: Any, results: Any) -> list[Any]:
    """Launches since the last look: tensors by their place among what was given and returned, or by their kind."""
    flat = [each for value in given for each in (value if isinstance(value, list) else [value])]
    flat += results if isinstance(results, tuple) else [results]
    places = {each.data_ptr(): i for i, each in enumerate(flat) if isinstance(each, torch.Tensor) and each.numel()}

    def word(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return places.get(value.data_ptr(), "own"), value.shape, value.stride(), value.dtype

    found = [(name, grid, tuple(map(word, values))) for name, grid, values in LAUNCHES]
    LAUNCHES.clear()
    return found


@pytest.mark.parametrize("dim", [60, 3072])
@pytest.mark.parametrize("op", [*triton_backend._HOMES, "scale_grads_"])
def test_a_plan_is_what_planning_anew_would_be(op: str, dim: int) -> None:
    call = triton_backend.launcher(op)
    first = arguments(op, dim, alike=True)
    call(*first)
    LAUNCHES.clear()
    assert len(triton_backend.PLANS) == 1

    given = arguments(op, dim, alike=False)
    repeated = call(*given)
    by_plan = described(given, repeated)
    assert len(triton_backend.PLANS) == 1
    triton_backend.PLANS.clear()
    anew = call(*given)
    assert by_plan == described(given, anew)
    assert by_plan

    def kinds(results: Any) -> list[Any]:
        listed = results if isinstance(results, tuple) else [results]
        return [each if each is None else (each.shape, each.stride(), each.dtype) for each in listed]

    assert kinds(repeated) == kinds(anew)


def test_what_a_plan_follows_from_makes_another() -> None:
    call = triton_backend.launcher("interpolate")
    x, coef, noise, y, rows = arguments("interpolate", 60, alike=False)
    images = x.view(6, 3, 4, 5)
    last = images.contiguous(memory_format=torch.channels_last)
    calls = [
        (x, coef, noise, y, rows),
        (x, coef, noise, None, rows),
        (x, coef, noise, None, 3),
        (x[:4], coef[:4], noise, None, 4),
        (images, coef, images, None, rows),
        (last, coef, last, None, rows),
        (x, coef, torch.tensor([1, 2]), None, rows),
        arguments("interpolate", 60, alike=False, dtype=torch.bfloat16),
        arguments("interpolate", 60, alike=False, offset=1),
    ]
    for number, given in enumerate(calls, 1):
        for _ in range(2):
            call(*given)
            assert len(triton_backend.PLANS) == number


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_MOST_PLANS", 4)
    call, (x, coef, noise, y, _) = triton_backend.launcher("interpolate"), arguments("interpolate", 60, alike=False)
    for rows in range(1, 7):
        for _ in range(2):
            call(x[:rows], coef[:rows], noise[:rows], y[:rows], rows)
            assert len(triton_backend.PLANS) <= 4


def test_a_key_with_gaps_is_planned_with_a_copy() -> None:
    call, (x, coef, _, y, rows) = triton_backend.launcher("interpolate"), arguments("interpolate", 60, alike=False)
    apart = torch.tensor([[3, 0], [4, 0]])[:, 0]
    for _ in range(2):
        call(x, coef, apart, y, rows)
        (_, _, given) = LAUNCHES[-1]
        assert any(isinstance(each, torch.Tensor) and each.tolist() == [3, 4] for each in given if each is not None)
        assert not any(each is apart for each in given)


def test_a_call_without_launches_has_no_plan() -> None:
    x, coef = torch.zeros(0, 4), torch.randn(0, 9)
    for _ in range(2):
        loss, *_ = triton_backend.launcher("matching")(x, x, None, coef, torch.tensor([1, 2]), None, 0, True, True)
        assert loss == 0
    assert not triton_backend.PLANS


class Launcher:
    """Like Triton's: it hands what never changes to ``launch``, with the stream and the kernel's arguments between."""

    def __init__(self, launch: Any, packed: bool) -> None:
        self.launch, self.packed = launch, packed

    def __call__(self, x: int, y: int, z: int, stream: Any, function: int, *rest: Any) -> None:
        constants, arguments = rest[:4], rest[4:]
        self.launch(x, y, z, stream, function, *constants, *((arguments,) if self.packed else arguments))


@pytest.mark.parametrize(("packed", "change"), [(True, None), (True, "hook"), (False, None), (True, "scratch")])
def test_a_planned_launch_calls_the_driver(packed: bool, change: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is passed by, but not where it has something to do besides or calls the driver in another way."""
    native: list[Any] = []
    by_triton: list[Any] = []
    run = Launcher(lambda *given: native.append(given), packed)
    if change == "scratch":
        run.global_scratch_size = 128
    if change == "hook":
        monkeypatch.setattr(plans.knobs.runtime, "launch_enter_hook", print)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)

    class Kernel(SimpleNamespace):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given: by_triton.append((grid, given))

    launch = plans._launch(Kernel(run=run, function=5, packed_metadata="packed"), (2, 3, 1), torch.device("cuda", 1))
    launch("pointer", 0.5)
    if packed and change is None:
        assert native == [(2, 3, 1, 71, 5, "packed", None, None, None, ("pointer", 0.5))]
        assert not by_triton
    else:
        assert by_triton == [((2, 3, 1), ("pointer", 0.5))]
        assert not native
