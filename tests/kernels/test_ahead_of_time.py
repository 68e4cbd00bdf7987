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

from bench import ahead_of_time
from bench import kernels_report as report
from bench.ahead_of_time import TARGETS, compile_calls, specialise
from realuid_fast.objectives import RealUID

BUDGET = json.loads(report.BUDGET.read_text())
SAME_COMPILER = triton.__version__ == BUDGET["triton"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", report.VARIANTS)
def test_code_within_budget(name: str, target: str) -> None:
    figures = report.measure(target)[name]
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
    """The kernel that adds partial sums has no figure per element, but it must compile too, without spills."""
    from realuid_fast.kernels import optimiser, reduce

    number, counts = torch.empty((), device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    norm = optimiser.begin_step_([torch.empty(1 << 20, device="meta")], number, counts)[0][-1]
    loss = reduce.finish(torch.empty(256, 2, device="meta"), torch.empty(256, device="meta"), number, 256)
    assert norm.grid == loss.grid == (1,)
    assert [code.local for code in compile_calls((norm, loss), target)] == [0, 0]


def calls_of_every_operator(rows: int, dim: int, noise_rows: int, dtype: torch.dtype) -> list[Any]:
    """Launches of every kernel, each with all that its operator can ask of it."""
    from realuid_fast.kernels import (
        error,
        fake,
        generator,
        interpolate,
        matching,
        noise,
        norm,
        optimiser,
        reduce,
        scale,
    )

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, coef, key = meta(rows, dim), meta(rows, 9, of=torch.float32), meta(2, of=torch.int64)
    drawn, numbers = meta(noise_rows, dim), meta(rows, of=torch.float32)
    number = meta(of=torch.float32)
    halves, scalars = (0.9, 1.0, 0.1, 1.2, 0.1, 0.1, 0.1, 0.4), RealUID(0.9, 0.94).generator_scalars
    planned = [noise.normal_like(key, x, noise_rows)[0]]
    for given in (key, drawn):
        planned += [
            interpolate.interpolate(x, coef, given, x, noise_rows)[0],
            matching.matching(x, x, x, coef, given, x, noise_rows, True, True)[0],
            fake.fake(x, x, x, coef, given, x, x, x, numbers, noise_rows, 1, *halves, True, True)[0],
        ]
    planned += [
        interpolate.interpolate_grads(x, coef, True, True)[0],
        error.mean_abs_error(x, x, x, coef, x, numbers)[0],
        generator.generator(
            x, x, x, x, coef, key, x, x, numbers, numbers, *scalars, True, True, True, True, True, True
        )[0],
        generator.generator(x, x, x, None, coef, key, *[None] * 4, *scalars, *[True] * 5, False)[0],
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
    images = meta(rows, 2 * dim, 1, 1).to(memory_format=torch.channels_last)
    of_channels, shift = meta(2 * dim, of=torch.float32), meta(rows, 2 * dim, of=torch.float32)
    statistics = meta(rows, 2, 2, of=torch.float32)
    planned += [
        norm.norm_silu(images, shift, of_channels, of_channels, 2, 1e-5)[0],
        norm.norm_silu_grads(images, images, shift, of_channels, of_channels, statistics)[0],
        norm.group_norm(images, of_channels, of_channels, 2, 1e-5)[0],
        norm.group_norm_grads(images, images, of_channels, statistics)[0],
    ]
    return [call for calls in planned for call in calls]


@pytest.mark.parametrize(
    ("rows", "dim", "noise_rows"),
    [(1, 1, 1), (3, 16, 1), (1, 512, 1), (3, 513, 1)],
)
def test_every_kernel_compiles_where_integers_are_one(rows: int, dim: int, noise_rows: int) -> None:
    """An integer argument that is 1 is a constant of the compiler, of another type. The interpreter knows no such."""
    calls = [call for call in calls_of_every_operator(rows, dim, noise_rows, torch.float16) if ones(call)]
    assert {call.kernel.__name__ for call in calls} >= {
        "_finish_kernel",
        "_norm_silu_kernel",
        "_norm_silu_grads_kernel",
    }
    assert [code.local for code in compile_calls(calls, "sm_90")] == [0] * len(calls)


def ones(call: Any) -> list[str]:
    """The integers of a launch that the compiler gets as the constant 1."""
    source, _, _ = specialise(call, "sm_90")
    constants = {name for name, kind in source.signature.items() if kind == "constexpr"}
    return [name for name, value in call.arguments.items() if name in constants and value == 1]


@pytest.mark.parametrize("dim", [1296, 1024])
def test_overlapping_tiles_write_an_element_once(dim: int) -> None:
    """Two programs that wrote an element could differ in its last bit: sm_100 mixes paired and single instructions.

    In the emitted code every store of a tile that may overlap another is under a predicate, and none is where tiles do
    not overlap; that the predicates leave nothing out is for the interpreter, whose outputs begin as NaN.
    """
    first = {}
    for call in calls_of_every_operator(40, dim, 40, torch.float16):
        first.setdefault(call.kernel.__name__, call)
    for name in ("_generator_kernel", "_fake_kernel", "_matching_kernel", "_interpolate_kernel", "_normal_kernel"):
        source, options, _ = specialise(first[name], "sm_100")
        ptx = triton.compile(source, target=TARGETS["sm_100"], options=options).asm["ptx"]
        tiles = [line for line in ptx.splitlines() if "st.global.v" in line]
        assert tiles
        assert {line.strip().startswith("@") for line in tiles} == {dim == 1296}, name


@pytest.mark.parametrize("dim", [2, 192, 256, 1296, 3072])
def test_another_number_of_rows_compiles_nothing(dim: int) -> None:
    """The key under which Triton keeps a compiled kernel: for a batch, for a last and smaller one, for a tiny one."""
    keys: dict[Any, set[str]] = {}
    for rows in (256, 250, 249, 2):
        of_losses = [
            call
            for noise_rows in (rows, -(-rows // 2))
            for call in calls_of_every_operator(rows, dim, noise_rows, torch.bfloat16)
            if call.kernel.__name__ not in ("_squares_kernel", "_norm_kernel", "_adam_kernel")
        ]
        for i, call in enumerate(of_losses):
            keys.setdefault((i, call.kernel.__name__), set()).add(specialise(call, "sm_90")[2])
    assert len(keys) == len(of_losses)
    assert {name: len(found) for name, found in keys.items() if len(found) > 1} == {}


def test_the_gate_specialises_as_a_launch_does() -> None:
    """On AMD tensors below 2 GiB have 32-bit offsets; rows are never specialised on, other integers by 16 and by 1."""

    def attributes(numel: int, target: str) -> dict[str, list[Any]]:
        params = torch.empty(numel, device="meta")
        number, counts = torch.empty((), device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
        from realuid_fast.kernels import optimiser

        call = optimiser.begin_step_([params], number, counts)[0][0]
        source, _, _ = specialise(call, target)
        return {call.kernel.arg_names[path[0]]: found for path, found in source.attrs.items()}

    aligned, short = ["tt.divisibility", 16], ["tt.pointer_range", 32]
    assert attributes(1 << 20, "gfx942")["grad_ptr"] == [aligned, short]
    assert attributes(1 << 30, "gfx942")["grad_ptr"] == [aligned]
    assert attributes(1 << 20, "sm_90")["grad_ptr"] == [aligned]
    assert attributes(1 << 20, "sm_90")["units"] == [aligned]
    assert attributes((1 << 20) + 16, "sm_90")["units"] == []


@pytest.mark.parametrize("name", ["generator/bfloat16/guided", "norm_silu_grads/float32"])
def test_a_shared_front_end_changes_no_instruction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of sm_100, begun at what the front end made for sm_80, is that of a compilation from the source."""
    call, shared = report.VARIANTS[name].plan(True), {}
    monkeypatch.setattr(ahead_of_time, "_front_ends", shared)
    compile_calls([call], "sm_80")
    assert len(shared) == 1
    begun = compile_calls([call], "sm_100")
    shared.clear()
    assert begun == compile_calls([call], "sm_100")


def test_figures_of_a_loop_are_those_of_an_element() -> None:
    """The pass over the gradients reads, squares and adds: its loop over eight tiles is unrolled on these targets."""
    for target in ("sm_80", "sm_90"):
        assert report.measure(target)["begin_step_/float32"].instructions < 4


def test_gate_sees_narrow_access() -> None:
    """Rows of odd length cannot be read 128 bits at a time, and the gate says so."""
    figures = report.measure("sm_90")["generator/float32/odd rows"]
    assert not figures.wide_loads
    assert not figures.wide_stores
