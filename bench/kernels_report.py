"""``python -m bench.kernels_report``: the compiled code of the Triton kernels in numbers, and times predicted from it.

Prints registers, local memory, access widths and instructions an element of every variant on every target, and the
time that bytes and instructions allow on four GPUs. ``--update`` rewrites the budget that the tests hold kernels to.

No GPU is needed. Times are predicted from counts, not measured. A time is a lower bound: the longest of bytes by memory
bandwidth, instructions by four warps a clock and multiprocessor, special functions by 16 lanes and integer multiplies
by 64. The rates are peaks from NVIDIA's publications, named at :class:`Gpu`.

The last table is about noise: a turn needs the same normals for the interpolant and for the loss. It can draw them from
a key in both calls, or write them once and read them twice. ``realuid_fast/noise.py`` states which is cheaper.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from bench.ahead_of_time import TARGETS, Code, compile_calls
from realuid_fast.objectives import RealUID

BUDGET = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "budget.json"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IMAGES = (256, 3, 32, 32)
SMALL_IMAGES = (256, 3, 8, 8)
VIDEO = (4, 16, 21, 60, 104)
OVERLAP = (8, 1, 36, 36)
PARAMETERS = (36 << 20,)


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of switches.

    Attributes:
        plan: builds the launch; called with whether to use NVIDIA's own instructions.
        reads, writes: tensors a pass reads and writes, each element once.
        wide: whether all those accesses must be 128 bits wide (rows of odd length cannot be).
    """

    plan: Callable[[bool], Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    reads: int
    writes: int
    wide: bool = True


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a device: bytes and clocks a second, multiprocessors, and the target compiled for it.

    Sources: data sheets of the H200 SXM (4.8 TB/s), the H100 SXM (3.35 TB/s), the A100 80GB SXM (2,039 GB/s) and the
    B200 (8 TB/s); but for the last, multiprocessors and boost clocks from the white papers of Hopper (132, 1.98 GHz)
    and Ampere (108, 1.41 GHz); the B200's (148, 1.965 GHz) are in no data sheet, but what its driver is known to
    report.
    """

    target: str
    bandwidth: float
    clock: float
    processors: int


GPUS = {
    "H200": Gpu("sm_90", 4.8e12, 1.98e9, 132),
    "H100": Gpu("sm_90", 3.35e12, 1.98e9, 132),
    "A100": Gpu("sm_80", 2.039e12, 1.41e9, 108),
    "B200": Gpu("sm_100", 8.0e12, 1.965e9, 148),
}


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _noise(shape: tuple[int, ...], dtype: torch.dtype, keyed: bool) -> torch.Tensor:
    return _meta((2,), torch.int64) if keyed else _meta(shape, dtype)


def _interpolate(
    dtype: torch.dtype,
    keyed: bool = True,
    endpoint: bool = False,
    shape: tuple[int, ...] = IMAGES,
    noise_rows: int | None = None,
) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import interpolate

        x, coef = _meta(shape, dtype), _meta((shape[0], 9), F32)
        noise = _noise(shape, dtype, keyed)
        return interpolate.interpolate(x, coef, noise, x if endpoint else None, noise_rows or shape[0], ptx)[0][0]

    return Variant(plan, dtype, shape, 1 + (not keyed) + endpoint, 1)


def _interpolate_grads(dtype: torch.dtype, endpoint: bool) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import interpolate

        return interpolate.interpolate_grads(_meta(IMAGES, dtype), _meta((IMAGES[0], 9), F32), True, endpoint)[0][0]

    return Variant(plan, dtype, IMAGES, 1, 1 + endpoint)


def _normal(dtype: torch.dtype, shape: tuple[int, ...] = IMAGES) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import noise

        return noise.normal_like(_meta((2,), torch.int64), _meta(shape, dtype), shape[0], ptx)[0][0]

    return Variant(plan, dtype, shape, 0, 1)


def _error(dtype: torch.dtype, x_t: bool = False, guided: bool = False) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import error

        x, coef = _meta(IMAGES, dtype), _meta((IMAGES[0], 9), F32)
        guidance = (x, _meta((IMAGES[0],), F32)) if guided else ()
        return error.mean_abs_error(x, x, x if x_t else None, coef, *guidance)[0][0]

    return Variant(plan, dtype, IMAGES, 2 + x_t + guided, 0)


def _matching(dtype: torch.dtype, x_t: bool = False) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import matching

        x, coef = _meta(IMAGES, dtype), _meta((IMAGES[0], 9), F32)
        key = _meta((2,), torch.int64)
        return matching.matching(x, x, x if x_t else None, coef, key, None, IMAGES[0], True, True, ptx)[0][0]

    return Variant(plan, dtype, IMAGES, 2 + x_t, 1)


def _fake(dtype: torch.dtype, keyed: bool = True, teacher: bool = False, guided: bool = False) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import fake

        rows = IMAGES[0]
        x, coef = _meta(IMAGES, dtype), _meta((rows, 9), F32)
        noise = _noise((rows // 2, *IMAGES[1:]), dtype, keyed)
        other = x if teacher else None
        halves = (0.9, 1.0, 0.1 * teacher, 1.2, 0.1, 0.1, 0.0, 0.4)
        guidance = (x, _meta((rows,), F32)) if guided else (None, None)
        rest = (*guidance, rows // 2, rows // 2, *halves, True, True, ptx)
        return fake.fake(x, x, None, coef, noise, x if guided else other, None, *rest)[0][0]

    return Variant(plan, dtype, IMAGES, 2 + (not keyed) + teacher + guided, 1)


def _generator(
    dtype: torch.dtype,
    shape: tuple[int, ...] = IMAGES,
    keyed: bool = True,
    x_t: bool = False,
    endpoint: bool = False,
    wants: int = 3,
    wide: bool = True,
    guided: bool = False,
    q_rows: bool = False,
) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import generator

        x, coef = _meta(shape, dtype), _meta((shape[0], 9), F32)
        noise, state, other = _noise(shape, dtype, keyed), x if x_t else None, x if endpoint else None
        inputs, scalars = (x, x, x, state, coef, noise, other), RealUID(0.92, 0.94).generator_scalars
        switches = (True, wants > 0, wants > 1, wants > 2, x_t)
        uncond, numbers = x if guided else None, _meta((shape[0],), F32)
        extra = (uncond, numbers if guided else None, numbers if q_rows else None)
        return generator.generator(*inputs, *extra, *scalars, *switches, guided, ptx)[0][0]

    return Variant(plan, dtype, shape, 3 + (not keyed) + x_t + endpoint + guided, wants + x_t + guided, wide)


def _scale(dtype: torch.dtype, per_row: bool) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import scale

        factors = _meta((IMAGES[0],) if per_row else (), F32)
        return scale.scale_grads_([_meta(IMAGES, dtype) for _ in range(3)], factors)[0]

    return Variant(plan, dtype, IMAGES, 3, 3)


def _squares() -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import optimiser

        return optimiser.begin_step_([_meta(PARAMETERS, F32)], _meta((), F32), _meta((2,), torch.int64))[0][0]

    return Variant(plan, F32, PARAMETERS, 1, 0)


def _adam(first_moment: bool, averages: int) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import optimiser

        p, number = _meta(PARAMETERS, F32), _meta((), F32)
        emas = [_meta((averages, *PARAMETERS), F32)] if averages else []
        rates, decays = _meta((1,), torch.float64), _meta((averages,), torch.float64)
        counts, beta1 = _meta((2,), torch.int64), 0.9 * first_moment
        lists = [p], [p], [p] if first_moment else [], [p], emas
        shared = number, number, rates, counts, decays
        return optimiser.adam_(*lists, *shared, 1.0, beta1, 0.999, 1e-8, 0.01, maximize=False, ema_warmup=True)[0]

    written = 2 + first_moment + averages
    return Variant(plan, F32, PARAMETERS, 1 + written, written)


FEATURES = (256, 128, 32, 32)  # of the CIFAR-10 network's first level


def _norm(
    dtype: torch.dtype, gradients: bool, shape: tuple[int, ...] = FEATURES, groups: int = 32, silu: bool = True
) -> Variant:
    def plan(ptx: bool) -> Any:
        from realuid_fast.kernels import norm

        x = _meta(shape, dtype).to(memory_format=torch.channels_last)
        weight, shift, statistics = _meta(shape[1:2], F32), _meta(shape[:2], F32), _meta((shape[0], groups, 2), F32)
        if not silu:
            if gradients:
                return norm.group_norm_grads(x, x, weight, statistics)[0][0]
            return norm.group_norm(x, weight, weight, groups, 1e-5)[0][0]
        if gradients:
            return norm.norm_silu_grads(x, x, shift, weight, weight, statistics)[0][0]
        return norm.norm_silu(x, shift, weight, weight, groups, 1e-5)[0][0]

    return Variant(plan, dtype, shape, 1 + gradients, 1, wide=shape[1] // groups % 4 == 0)


VARIANTS: dict[str, Variant] = {
    "normal_like/float32": _normal(F32),
    "interpolate/float32": _interpolate(F32),
    "interpolate/bfloat16": _interpolate(BF16),
    "interpolate/bfloat16/noise tensor": _interpolate(BF16, keyed=False),
    "interpolate/bfloat16/endpoint": _interpolate(BF16, endpoint=True),
    "interpolate/float32/a third of the noise": _interpolate(F32, noise_rows=86),
    "interpolate/float32/one row of noise": _interpolate(F32, noise_rows=1),
    "interpolate_grads/bfloat16": _interpolate_grads(BF16, True),
    "error/float32": _error(F32),
    "error/bfloat16/x_t": _error(BF16, x_t=True),
    "error/bfloat16/guided": _error(BF16, guided=True),
    "matching/float32": _matching(F32),
    "matching/bfloat16": _matching(BF16),
    "matching/bfloat16/x_t": _matching(BF16, x_t=True),
    "fake/float32": _fake(F32),
    "fake/bfloat16": _fake(BF16),
    "fake/bfloat16/teacher": _fake(BF16, teacher=True),
    "fake/float16/noise tensor": _fake(F16, keyed=False),
    "fake/bfloat16/guided": _fake(BF16, teacher=True, guided=True),
    "generator/float32": _generator(F32),
    "generator/bfloat16": _generator(BF16),
    "generator/float16": _generator(F16),
    "generator/float32/x_t": _generator(F32, x_t=True),
    "generator/bfloat16/x_t, endpoint": _generator(BF16, x_t=True, endpoint=True),
    "generator/bfloat16/noise tensor": _generator(BF16, keyed=False),
    "generator/bfloat16/loss only": _generator(BF16, wants=0),
    "generator/bfloat16/video": _generator(BF16, VIDEO),
    "generator/bfloat16/small images": _generator(BF16, SMALL_IMAGES),
    "generator/float32/overlapping tail": _generator(F32, OVERLAP),
    "generator/float32/odd rows": _generator(F32, (256, 3, 15, 15), wide=False),
    "generator/float32/guided": _generator(F32, guided=True),
    "generator/bfloat16/guided": _generator(BF16, guided=True),
    "generator/bfloat16/Q by row": _generator(BF16, q_rows=True),
    "scale_grads_/bfloat16": _scale(BF16, False),
    "scale_grads_/float32/per row": _scale(F32, True),
    "begin_step_/float32": _squares(),
    "adam_/float32": _adam(False, 0),
    "adam_/float32/3 averages": _adam(False, 3),
    "adam_/float32/first moment, 3 averages": _adam(True, 3),
    "norm_silu/bfloat16": _norm(BF16, False),
    "norm_silu/float32": _norm(F32, False),
    "norm_silu/bfloat16/64x64": _norm(BF16, False, (64, 128, 64, 64)),
    "norm_silu/bfloat16/groups of 6": _norm(BF16, False, (256, 24, 32, 32), 4),
    "norm_silu_grads/bfloat16": _norm(BF16, True),
    "norm_silu_grads/float32": _norm(F32, True),
    "norm_silu_grads/bfloat16/64x64": _norm(BF16, True, (64, 128, 64, 64)),
    "group_norm/bfloat16": _norm(BF16, False, (256, 256, 16, 16), silu=False),
    "group_norm_grads/bfloat16": _norm(BF16, True, (256, 256, 16, 16), silu=False),
}


# The two calls of a generator turn that need noise, with a key and with a tensor, and the call that writes the tensor,
# for several alignments of a row.
ROWS = {"divisible by 4": IMAGES, "odd": (256, 3, 15, 15), "2": (256, 2)}
TURNS: dict[str, Variant] = {
    f"{call}/{dtype}/{rows}": variant
    for dtype in (F32, BF16)
    for rows, shape in ROWS.items()
    for call, variant in {
        "interpolate": _interpolate(dtype, shape=shape),
        "interpolate given": _interpolate(dtype, keyed=False, shape=shape),
        "generator": _generator(dtype, shape, wide=False),
        "generator given": _generator(dtype, shape, keyed=False, wide=False),
        "write": _normal(dtype, shape),
    }.items()
}


@dataclass(frozen=True)
class Figures:
    """One variant on one target, in the units of the budget."""

    instructions: float  # an element
    registers: int
    local: int
    wide_loads: bool
    wide_stores: bool
    code: Code


@functools.cache
def measure(target: str, turns: bool = False) -> dict[str, Figures]:
    """Compile :data:`VARIANTS`, or :data:`TURNS`, and reduce each to the budget's figures."""
    variants = TURNS if turns else VARIANTS
    calls = [variant.plan(not target.startswith("gfx")) for variant in variants.values()]
    codes = compile_calls(calls, target)
    return {
        name: _figures(variant, call, code, target)
        for (name, variant), call, code in zip(variants.items(), calls, codes, strict=True)
    }


def _figures(variant: Variant, call: Any, code: Code, target: str) -> Figures:
    lanes = TARGETS[target].warp_size * call.warps
    rows, columns = ("PIXELS", "LANES") if "PIXELS" in call.constants else ("ROWS", "BLOCK_D")
    elements = call.constants[rows] * call.constants[columns] // lanes
    bits = elements * variant.dtype.itemsize * 8
    if "STEPS" in call.constants:
        # An unrolled loop over tiles reads several of them in one pass through the code.
        elements *= max(1, sum(code.loads) // (bits * variant.reads))

    def wide(widths: tuple[int, ...], tensors: int) -> bool:
        return sum(width for width in widths if width >= 128) >= bits * tensors

    return Figures(
        instructions=round(code.instructions / elements, 2),
        registers=code.registers,
        local=code.local,
        wide_loads=wide(code.loads, variant.reads),
        wide_stores=wide(code.stores, variant.writes),
        code=code,
    )


def predict(name: str, figures: Figures, gpu: Gpu, numel: int) -> tuple[float, str]:
    """Least seconds for ``numel`` elements, and the resource that sets them; predicted from counts, not measured."""
    variant = (VARIANTS | TURNS)[name]
    elements = figures.code.instructions / figures.instructions
    lane_clocks = gpu.clock * gpu.processors * elements
    limits = {
        "memory": (variant.reads + variant.writes) * variant.dtype.itemsize * numel / gpu.bandwidth,
        "issue": figures.code.instructions * numel / (128 * lane_clocks),
        "special functions": figures.code.special * numel / (16 * lane_clocks),
        "integer multiplies": figures.code.multiplies * numel / (64 * lane_clocks),
    }
    limit = max(limits, key=lambda resource: limits[resource])
    return limits[limit], limit


def _print_table(figures: dict[str, dict[str, Figures]]) -> None:
    print(f"triton {triton.__version__}; instructions an element, registers, local memory")
    print(f"{'variant':38}" + "".join(f"{target:>20}" for target in TARGETS))
    for name, row in figures.items():
        cells = [f"{f.instructions:.1f} / {f.registers} / {f.local}" for f in row.values()]
        print(f"{name:38}" + "".join(f"{cell:>20}" for cell in cells))
    numel = 1 << 26
    print(f"\nleast time for {numel >> 20} M elements, and what limits it: predicted from counts, not measured")
    print(f"{'variant':38}" + "".join(f"{gpu:>32}" for gpu in GPUS))
    for name, row in figures.items():
        cells = []
        for gpu in GPUS.values():
            seconds, limit = predict(name, row[gpu.target], gpu, numel)
            cells.append(f"{seconds * 1e6:.0f} us {limit}")
        print(f"{name:38}" + "".join(f"{cell:>32}" for cell in cells))


def noise_of_a_turn(gpu: Gpu, dtype: torch.dtype, rows: str, numel: int) -> tuple[float, float]:
    """Least seconds of interpolant and generator loss with noise drawn in both, and with noise written and read."""

    def seconds(*names: str) -> float:
        full = [f"{name}/{dtype}/{rows}" for name in names]
        return sum(predict(name, measure(gpu.target, turns=True)[name], gpu, numel)[0] for name in full)

    drawn = seconds("interpolate", "generator")
    return drawn, seconds("write", "interpolate given", "generator given")


def _print_noise() -> None:
    numel = 1 << 26
    print(f"\na turn's noise drawn twice / written and read twice, {numel >> 20} M elements: predicted, not measured")
    print(f"{'type, elements a row':38}" + "".join(f"{gpu:>32}" for gpu in GPUS))
    for dtype in (F32, BF16):
        for rows in ROWS:
            pairs = [noise_of_a_turn(gpu, dtype, rows, numel) for gpu in GPUS.values()]
            cells = [f"{drawn * 1e6:.0f} / {given * 1e6:.0f} us" for drawn, given in pairs]
            print(f"{str(dtype)[6:] + ', ' + rows:38}" + "".join(f"{cell:>32}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update", action="store_true", help=f"rewrite {BUDGET.name} with these figures")
    arguments = parser.parse_args()
    figures = {name: {target: measure(target)[name] for target in TARGETS} for name in VARIANTS}
    _print_table(figures)
    _print_noise()
    if arguments.update:
        budget = {
            name: {target: [f.instructions, f.registers, f.local] for target, f in row.items()}
            for name, row in figures.items()
        }
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in budget.items())
        BUDGET.write_text(
            f'{{\n  "triton": "{triton.__version__}",\n'
            f'  "figures": "instructions an element, registers, local memory",\n  "variants": {{\n{lines}\n  }}\n}}\n'
        )


if __name__ == "__main__":
    main()
