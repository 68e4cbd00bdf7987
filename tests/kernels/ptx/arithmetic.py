"""Arithmetic and conversions, as the machine rounds them.

A float32 ``fma`` is a float64 product and sum, rounded once more. Approximate instructions give the exact result; the
machine can move it by the error that NVIDIA documents, one way or the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .instructions import F32, F64, TYPES, U16, U32, U64, Step, builds, source, step_of
from .program import Instruction, Program, Unsupported

if TYPE_CHECKING:
    from .machine import Array, Machine

# The largest errors that the PTX documentation gives. Those of sines are absolute, within a turn. Those of logarithms
# are absolute between 1/2 and 2 and relative elsewhere. All others are relative: two units in the last place for ex2
# and div.
ERRORS = {
    "sqrt": 2.0**-23,
    "rsqrt": 2.0**-22.9,
    "ex2": 2.0**-22,
    "div": 2.0**-22,
    "sin": 2.0**-20.5,
    "cos": 2.0**-20.5,
    "lg2": 2.0**-22,
}
EXACT: dict[str, Callable[..., Any]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda value: 1 / np.sqrt(value),
    "ex2": np.exp2,
    "div": np.divide,
    "sin": np.sin,
    "cos": np.cos,
    "lg2": np.log2,
}
SMALLEST_NORMAL = np.float32(2.0**-126)


def fused(a: Array, b: Array, c: Array) -> Array:
    return (np.asarray(a, F64) * np.asarray(b, F64) + np.asarray(c, F64)).astype(F32)


FLOATS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "fma": fused,
}
INTEGERS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "rem": np.fmod,
    "div": lambda a, b: (np.asarray(a) - np.fmod(a, b)) // b,  # towards zero, also where a sign differs
    "mad": lambda a, b, c: a * b + c,
}


@builds("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs", "div", "rem")
@builds("sqrt", "rsqrt", "lg2", "ex2", "sin", "cos")
def arithmetic(ins: Instruction, program: Program) -> Step:
    name, last, count = ins.parts[0], ins.parts[-1], len(ins.operands) - 1
    if {"sat", "rz", "rm", "rp", "NaN"} & set(ins.parts):
        raise Unsupported(ins.text)
    if last == "f32x2":
        return _pairs(ins, program)
    if last in ("bf16", "f16"):
        return _widened(ins, program)
    kind = TYPES[last]
    if kind.kind == "f":
        if name in EXACT and (name not in FLOATS or {"approx", "full"} & set(ins.parts)):
            return _approximate(ins, program)
        if name == "fma" and kind != F32:
            raise Unsupported(ins.text)
        return step_of(ins, program, [kind] * count, FLOATS[name], kind)
    if "wide" in ins.parts:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")

        def multiply(a: Array, b: Array, c: Any = 0) -> Array:
            return np.asarray(a).astype(wide) * np.asarray(b).astype(wide) + np.asarray(c).astype(wide)

        return step_of(ins, program, [kind, kind, wide][:count], multiply, wide)
    if "hi" in ins.parts:
        if name != "mul" or kind.itemsize != 4:
            raise Unsupported(ins.text)
        wide = np.dtype(f"{kind.kind}8")

        def upper(a: Array, b: Array) -> Array:
            return np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> wide.type(32)

        return step_of(ins, program, [kind, kind], upper, kind)
    if name in ("mul", "mad") and "lo" not in ins.parts:
        raise Unsupported(ins.text)
    return step_of(ins, program, [kind] * count, INTEGERS[name], kind)


def _approximate(ins: Instruction, program: Program) -> Step:
    name, flush = ins.parts[0], "ftz" in ins.parts
    if ins.parts[-1] != "f32":
        raise Unsupported(ins.text)
    sources = [source(text, F32, program) for text in ins.operands[1:]]

    def step(machine: Machine, active: Array | None) -> None:
        given = [np.asarray(each(machine)).astype(F64) for each in sources]
        if flush:
            given = [np.where(np.abs(each) < SMALLEST_NORMAL, np.copysign(0.0, each), each) for each in given]
        value, error = EXACT[name](*given), machine.error * ERRORS[name]
        near = name in ("sin", "cos") or (name == "lg2" and (given[0] > 0.5) & (given[0] < 2))
        machine.write(ins.operands[0], (value + error * np.where(near, 1.0, np.abs(value))).astype(F32), active)

    return step


def _pairs(ins: Instruction, program: Program) -> Step:
    """Two float32 in a 64-bit register."""
    function = FLOATS[ins.parts[0]]

    def both(*given: Array) -> Array:
        pairs = [np.ascontiguousarray(np.atleast_1d(each)).view(F32).reshape(-1, 2) for each in given]
        return np.ascontiguousarray(function(*pairs)).view(U64).reshape(-1)

    return step_of(ins, program, [U64] * (len(ins.operands) - 1), both)


def _widened(ins: Instruction, program: Program) -> Step:
    """A sum whose first operand is widened to float32, which the second one is."""
    if ins.parts[-2] != "f32" or ins.parts[0] not in ("add", "sub"):
        raise Unsupported(ins.text)
    function, half = FLOATS[ins.parts[0]], ins.parts[-1]
    return step_of(ins, program, [U16, F32], lambda a, b: function(wide(a, half), b), F32)


def wide(value: Array, half: str) -> Array:
    """bfloat16 or float16, as bits, in float32."""
    value = np.ascontiguousarray(value)
    return (value.astype(U32) << np.uint32(16)).view(F32) if half == "bf16" else value.view(np.float16).astype(F32)


def narrow(value: Array, half: str) -> Array:
    """float32 rounded to bfloat16 or float16, to the nearest and even, as bits."""
    value = np.ascontiguousarray(value, F32)
    if half == "f16":
        bits = value.astype(np.float16).view(U16)
    else:
        whole = value.view(U32).astype(U64)
        bits = (whole + np.uint64(0x7FFF) + (whole >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)).astype(U16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


@builds("cvt")
def cvt(ins: Instruction, program: Program) -> Step:
    into, of = ins.parts[-2:]
    if of == "f32" and into in ("bf16x2", "f16x2", "bf16", "f16"):
        if "rn" not in ins.parts:
            raise Unsupported(ins.text)
        half = into.removesuffix("x2")
        if half == into:
            return step_of(ins, program, [F32], lambda value: narrow(value, half))

        def both(high: Array, low: Array) -> Array:
            return narrow(high, half).astype(U32) << np.uint32(16) | narrow(low, half).astype(U32)

        return step_of(ins, program, [F32, F32], both)
    if of in ("bf16", "f16") and into == "f32":
        return step_of(ins, program, [U16], lambda value: wide(value, of))
    given, wanted = TYPES[of], TYPES[into]
    rounds = wanted.kind == "f" and wanted.itemsize <= given.itemsize and "rn" not in ins.parts
    if (given.kind == "f" and wanted.kind != "f") or rounds:
        raise Unsupported(ins.text)
    return step_of(ins, program, [given], lambda value: value, wanted)
