"""The Triton kernels compiled for four GPUs without one, and their code held to a committed budget.

A kernel that got worse fails here until ``python -m bench.kernels_report --update`` changes the budget on purpose.
"""

import importlib.util
import json
import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
if importlib.util.find_spec("bench") is None:
    pytest.skip("bench/ is not importable: run python -m pytest from the source tree", allow_module_level=True)

import torch
import triton

from bench import kernels_report as report
from bench.ahead_of_time import TARGETS, compile_call

BUDGET = json.loads(report.BUDGET.read_text())
SAME_COMPILER = triton.__version__ == BUDGET["triton"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", report.VARIANTS)
def test_code_within_budget(name: str, target: str) -> None:
    figures = report.measure(name, target)
    assert figures.local == 0, "spills or local memory"
    if report.VARIANTS[name].wide:
        assert figures.wide_loads, figures.code.loads
        assert figures.wide_stores, figures.code.stores
    if SAME_COMPILER:
        instructions, registers, local = BUDGET["variants"][name][target]
        assert figures.instructions <= instructions
        assert figures.registers <= registers
        assert figures.local <= local


@pytest.mark.parametrize("name", ["generator/float32", "generator/bfloat16", "generator/float16"])
def test_keyed_generator_is_below_fifty_instructions_an_element(name: str) -> None:
    for target in ("sm_80", "sm_90", "sm_100"):
        assert BUDGET["variants"][name][target][0] < 50


def test_budget_and_variants_name_the_same_kernels() -> None:
    assert set(BUDGET["variants"]) == set(report.VARIANTS)


@pytest.mark.parametrize("target", TARGETS)
def test_single_program_launches_compile(target: str) -> None:
    """What adds partial sums up has no figure an element, but must compile too, without spills."""
    from realuid_fast.kernels import optimiser, reduce

    number, counts = torch.empty((), device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    norm = optimiser.begin_step_([torch.empty(1 << 20, device="meta")], number, counts)[0][-1]
    loss = reduce.finish(torch.empty(256, 2, device="meta"), torch.empty(256, device="meta"), number, 256)
    for call in (norm, loss):
        assert call.grid == (1,)
        assert compile_call(call, target).local == 0


def calls_of_every_operator(rows: int, dim: int, noise_rows: int, dtype: torch.dtype) -> list[Any]:
    """Launches of every kernel, each with all that its operator can ask of it."""
    from realuid_fast.kernels import error, fake, generator, interpolate, matching, noise, optimiser, reduce, scale

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, coef, key = meta(rows, dim), meta(rows, 9, of=torch.float32), meta(2, of=torch.int64)
    drawn, numbers = meta(noise_rows, dim), meta(rows, of=torch.float32)
    number = meta(of=torch.float32)
    halves = (0.9, 1.0, 0.1, 1.2, 0.1, 0.1, 0.1, 0.4)
    planned = [noise.normal_like(key, x, noise_rows)[0]]
    for given in (key, drawn):
        planned += [
            interpolate.interpolate(x, coef, given, x, noise_rows)[0],
            matching.matching(x, x, x, coef, given, x, noise_rows, True, True)[0],
            fake.guided_fake(x, x, x, coef, given, x, x, x, numbers, noise_rows, 1, *halves, True, True)[0],
        ]
    planned += [
        interpolate.interpolate_grads(x, coef, True, True)[0],
        error.mean_abs_error(x, x, x, coef, x, numbers)[0],
        generator.guided_generator(
            x, x, x, x, coef, key, x, x, numbers, numbers, 0.9, 0.9, 1.0, 1.0, True, True, True, True, True, True
        )[0],
        generator.generator(x, x, x, None, coef, key, None, 0.9, 0.9, 1.0, 1.0, True, True, True, True, True)[0],
        [reduce.finish(meta(rows, 1, of=torch.float32), numbers, number, rows)],
        scale.scale_grads_([x], number),
        scale.scale_grads_([x], numbers),
    ]
    flat, rates, counts = meta(rows * dim, of=torch.float32), meta(1, of=torch.float64), meta(2, of=torch.int64)
    emas = [meta(1, rows * dim, of=torch.float32)]
    shared = number, number, rates, counts, rates
    planned += [
        optimiser.begin_step_([flat], number, counts)[0],
        optimiser.adam_([flat], [flat], [flat], [flat], emas, *shared, 1.0, 0.9, 0.999, 1e-8, 0.0, False, True),
    ]
    return [call for calls in planned for call in calls]


@pytest.mark.parametrize(
    ("rows", "dim", "noise_rows"),
    [(1, 1, 1), (3, 16, 1), (1, 512, 1), (3, 513, 1)],
)
def test_every_kernel_compiles_where_integers_are_one(rows: int, dim: int, noise_rows: int) -> None:
    """An integer argument that is 1 is a constant of the compiler, of another type. The interpreter knows no such."""
    for call in calls_of_every_operator(rows, dim, noise_rows, torch.float16):
        assert compile_call(call, "sm_90").local == 0


def test_gate_sees_narrow_access() -> None:
    """Rows of odd length cannot be read 128 bits at a time, and the gate says so."""
    figures = report.measure("generator/float32/odd rows", "sm_90")
    assert not figures.wide_loads
    assert not figures.wide_stores
