"""Tensors of more than 2^32 elements, which no memory holds: chosen programs of their launches, against float64.

An element reads as a function of its index, and what is stored is kept element by element. The programs chosen are the
first and the last one and those whose elements pass 2^31 and 2^32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from agreement import F16, F32, KEY, SCALARS, compare
from ptx.launch import Executor

from realuid_fast.kernels import fake, generator, interpolate, matching, optimiser, scale
from realuid_fast.ops import reference
from realuid_fast.ops.philox import normals

SALTS = {"x": 1, "out": 2, "other": 3, "coef": 4, "noise": 5}
HALVES = (0.9, 1.0, -0.3, 1.2, 0.1, 0.2, 0.0, 0.4)


def number(salt: int, index: Any) -> Any:
    """A multiple of 1/64 in [-2, 2), exact in every dtype, that depends on all bits of the index."""
    mixed = (np.asarray(index, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)) * np.uint64(
        0xD1342543DE82EF95
    )
    return (mixed >> np.uint64(56)).astype(np.float64) / 64 - 2


def coefficient(index: Any) -> Any:
    """The coefficients of a path without an endpoint and without a term in x_t."""
    return np.where(np.isin(np.asarray(index) % 9, (1, 4, 7)), 0.0, number(SALTS["coef"], index))


def check(executor: Executor, dims: tuple[int, ...]) -> None:
    for dim in dims:
        for dtype in (F32, F16):
            check_one(executor, dim, dtype)


def check_one(executor: Executor, dim: int, dtype: torch.dtype) -> None:
    rows = 2**32 // dim + 3
    x = torch.empty(rows, dim, dtype=dtype, device="meta")
    coef = torch.empty(rows, 9, device="meta")
    settings = (None, None, None, *SCALARS, False, True, True, True, False, False)
    planned = {
        "interpolate/key": interpolate.interpolate(x, coef, KEY, None, rows, ptx=True),
        "interpolate/tensor": interpolate.interpolate(x, coef, x, None, rows, ptx=True),
        "matching/key": matching.matching(x, x, None, coef, KEY, None, rows, False, True, ptx=True),
        "fake/tensor": fake.fake(x, x, None, coef, x, x, None, None, None, rows, 0, *HALVES, False, True, ptx=True),
        "generator/key": generator.generator(x, x, x, None, coef, KEY, None, *settings, ptx=True),
    }
    for name, (calls, results) in planned.items():
        call, outputs = calls[0], [results] if isinstance(results, torch.Tensor) else results[2:]
        fills = fill(call, dtype)
        stored = executor.run(call, programs(call, rows, dim), fills)
        found = {id(value): buffer for value, buffer in zip(tensors(call), stored, strict=True)}
        for i, output in enumerate(outputs):
            if output.numel():
                agree(f"{name}/{dim}/{dtype}/{i}", name.split("/")[0], found[id(output)].found, rows, dim, dtype, i)
    check_scale(executor, x, rows, dim, dtype)


def tensors(call: Any) -> list[Any]:
    """The call's tensors with elements, in the order of their buffers: meta tensors have one each."""
    return [value for value in call.arguments.values() if isinstance(value, torch.Tensor) and value.numel()]


def fill(call: Any, dtype: torch.dtype) -> dict[str, Any]:
    kinds = {"x_ptr": "x", "out_ptr": "out", "fake_ptr": "out", "teacher_ptr": "other", "noise_ptr": "noise"}

    def of(name: str) -> Any:
        if name == "coef_ptr":
            return lambda index: coefficient(index).astype(np.float32)
        kind = np.float32 if dtype == F32 else np.float16
        return lambda index: number(SALTS[kinds.get(name, "x")], index).astype(kind)

    return {name: of(name) for name in call.arguments}


def programs(call: Any, rows: int, dim: int) -> list[int]:
    """Numbers of the programs at the ends and where the elements' numbers pass 31 and 32 bits."""
    blocks, total = call.grid[0], math.prod(call.grid)
    chosen: set[int] = set()
    for element in (0, 2**31, 2**32, rows * dim - 1):
        row = element // dim
        if dim >= 512:
            chosen |= {row * blocks + block for block in range(blocks)}
        else:
            chosen.add(row // call.constants["ROWS"])
    return sorted(each for each in chosen if each < total)


def agree(name: str, op: str, found: dict[int, Any], rows: int, dim: int, dtype: torch.dtype, output: int) -> None:
    """Compare what was stored with the formula on whole rows in float64."""
    index = np.array(sorted(found))
    assert index[0] == 0, name
    assert index[-1] == rows * dim - 1, name
    some = np.unique(index // dim)
    assert len(index) == len(some) * dim, f"{name}: rows are stored whole"
    place = some[:, None] * dim + np.arange(dim)
    given = {key: torch.from_numpy(number(salt, place)) for key, salt in SALTS.items()}
    coef = torch.from_numpy(coefficient(some[:, None] * 9 + np.arange(9)))
    noise = given["noise"]
    if "/key/" in name:
        # The definition begins at multiples of 4.
        drawn = [normals(KEY, dim + 4, torch.float64, at - at % 4)[at % 4 :][:dim] for at in (some * dim).tolist()]
        noise = torch.stack(drawn)
    x, n = given["x"], len(some)
    settings = (None, None, None, *SCALARS, False, True, True, True, False, False)
    want = {
        "interpolate": lambda: (reference.interpolate(x, coef, noise, None, n),),
        "matching": lambda: reference.matching(given["out"], x, None, coef, noise, None, n, False, True)[2:],
        "fake": lambda: reference.fake(
            given["out"], x, None, coef, noise, given["other"], None, None, None, n, 0, *HALVES, False, True
        )[2:],
        "generator": lambda: reference.generator(given["other"], given["out"], x, None, coef, noise, None, *settings)[
            2:
        ],
    }[op]()[output]
    compare(f"large/{name}", dtype, (numbers(found, index, dtype).view(n, dim),), (want.view(n, dim),))


def numbers(found: dict[int, Any], index: Any, dtype: torch.dtype) -> torch.Tensor:
    """The values stored at ``index``, in float32."""
    bits = np.array([found[k] for k in index.tolist()])
    stored = bits.astype(np.uint32).view(np.float32) if dtype == F32 else bits.astype(np.uint16).view(np.float16)
    return torch.from_numpy(stored.astype(np.float32))


def check_scale(executor: Executor, x: torch.Tensor, rows: int, dim: int, dtype: torch.dtype) -> None:
    """Gradients of more than 2^32 elements, in place."""
    (call,) = scale.scale_grads_([x], torch.tensor(0.37))
    total = math.prod(call.grid)
    stored = executor.run(call, [0, total // 2, total - 1], fill(call, dtype))
    (sparse,) = (buffer for buffer in stored if getattr(buffer, "found", None))
    index = np.array(sorted(sparse.found))
    assert index[-1] == rows * dim - 1
    want = torch.from_numpy(number(SALTS["x"], index)) * torch.tensor(0.37).double()
    compare(f"large/scale/{dim}/{dtype}", dtype, (numbers(sparse.found, index, dtype),), (want,))


def check_optimiser(executor: Executor) -> None:
    """A step over one tensor of more than 2^32 elements, with averages and without, of even and odd size."""
    check_step(executor, 2**32 + 4096 + 64, decays=[0.9, 0.9999], beta1=0.9)
    check_step(executor, 2**32 + 4099, decays=[], beta1=0.0)


def check_step(executor: Executor, size: int, decays: list[float], beta1: float) -> None:
    param = torch.empty(size, device="meta")
    emas = [torch.empty(len(decays), size, device="meta")] if decays else []
    norm, step, counts = torch.tensor(9.0), torch.tensor(3.0), torch.tensor([4, 1])
    lr, averaged = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64), torch.tensor(decays, dtype=torch.float64)
    given = {"param_ptr": 1, "grad_ptr": 2, "exp_avg_ptr": 3, "exp_avg_sq_ptr": 4, "ema_ptr": 5}

    def element(name: str, index: Any) -> Any:
        value = number(given[name], index)
        return abs(value) if name == "exp_avg_sq_ptr" else value

    fills = {name: lambda index, name=name: element(name, index).astype(np.float32) for name in given}
    marks = (0, 2**31, 2**32, size - 1)
    tag = f"{size - 2**32}"

    calls, _ = optimiser.begin_step_([param], step, counts)
    share = optimiser.TILE * optimiser._STEPS
    chosen = sorted({mark // share for mark in marks})
    executor.run(calls[0], chosen, fills)
    squares = [np.sum(element("grad_ptr", np.arange(i * share, min((i + 1) * share, size))) ** 2) for i in chosen]
    compare(f"large/begin_step_/{tag}", F32, (calls[0].arguments["partial_ptr"][chosen],), (torch.tensor(squares),))

    settings = 2.0, beta1, 0.999, 1e-8, 0.01, False, False
    moments = [param.clone()] if beta1 else []
    (call,) = optimiser.adam_(
        [param], [param.clone()], moments, [param.clone()], emas, norm, step, lr, counts, averaged, *settings
    )
    tile = optimiser.TILE
    chosen = sorted({mark // tile for mark in marks})
    stored = executor.run(call, chosen, fills)
    found = {buffer.name: buffer.found for buffer in stored if getattr(buffer, "found", None)}
    place = np.concatenate([np.arange(i * tile, min((i + 1) * tile, size)) for i in chosen])
    twin = {name: torch.from_numpy(element(name, place)) for name in given}
    rows = [torch.from_numpy(element("ema_ptr", k * size + place)) for k in range(len(decays))]
    kept = [torch.stack(rows)] if rows else []
    reference.adam_(
        [twin["param_ptr"]], [twin["grad_ptr"]], [twin["exp_avg_ptr"]] if beta1 else [], [twin["exp_avg_sq_ptr"]],
        kept, norm.double(), step.double(), lr, counts, averaged, *settings,
    )  # fmt: skip
    want = {"param_ptr": twin["param_ptr"], "exp_avg_sq_ptr": twin["exp_avg_sq_ptr"]}
    want |= {"exp_avg_ptr": twin["exp_avg_ptr"]} if beta1 else {}
    want |= {"ema_ptr": kept[0].flatten()} if rows else {}
    places = {"ema_ptr": np.concatenate([k * size + place for k in range(len(decays))])} if rows else {}
    assert found.keys() == want.keys()
    for name, values in want.items():
        index = places.get(name, place)
        assert sorted(found[name]) == index.tolist(), f"{name}: the chosen programs' elements and no others are stored"
        compare(f"large/adam_/{tag}/{name}", F32, (numbers(found[name], index, F32),), (values,))
