"""The Triton kernels compiled for four GPUs without one, and their code held to a committed budget.

A kernel that got worse fails here until ``python -m bench.kernels_report --update`` changes the budget on purpose.
"""

import importlib.util
import json
import os

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


def test_gate_sees_narrow_access() -> None:
    """Rows of odd length cannot be read 128 bits at a time, and the gate says so."""
    figures = report.measure("generator/float32/odd rows", "sm_90")
    assert not figures.wide_loads
    assert not figures.wide_stores
