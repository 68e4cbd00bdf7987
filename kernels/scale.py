"""Gradients times the incoming gradient, in place. The factor is read on the device; with 1 no memory is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import triton
import triton.language as tl
from torch import Tensor

from .tiles import PER_THREAD, ROW_COUNTS, TILE, Call, grid_row, over_two_axes, row_length

# Tiles that a program walks over. With a factor of 1 only few programs start, and they stop at once.
_STEPS = 8
# One launch serves this many gradients of one size, as many as any loss has.
_AT_ONCE = 4


@triton.jit
def _scale_tile(pointer, where, mask, factor):
    value = tl.load(pointer + where, mask=mask, other=0.0)
    tl.store(pointer + where, (value.to(tl.float32) * factor).to(value.dtype), mask=mask)


@triton.jit(do_not_specialize=(*ROW_COUNTS, "units"))
def _scale_kernel(
    g0_ptr,
    g1_ptr,
    g2_ptr,
    g3_ptr,
    scale_ptr,
    n_rows,
    units,
    COUNT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    dim = row_length(units, ALIGN, ROWS)
    offsets = tl.arange(0, ROWS * BLOCK_D)
    first_row = grid_row() * ROWS
    if ROWS == 1:
        if PER_ROW:
            factor = tl.load(scale_ptr + first_row, mask=first_row < n_rows, other=1.0).to(tl.float32)
        else:
            factor = tl.load(scale_ptr).to(tl.float32)
        if factor != 1.0:
            for step in range(STEPS):
                left = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_D
                mask = offsets < tl.minimum(dim - left, BLOCK_D).to(tl.int32)
                where = tl.multiple_of(first_row * dim + left, ALIGN) + offsets
                _scale_tile(g0_ptr, where, mask, factor)
                if COUNT > 1:
                    _scale_tile(g1_ptr, where, mask, factor)
                if COUNT > 2:
                    _scale_tile(g2_ptr, where, mask, factor)
                if COUNT > 3:
                    _scale_tile(g3_ptr, where, mask, factor)
    else:
        local = tl.arange(0, ROWS)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        row = first_row + local
        factors = tl.load(scale_ptr + row, mask=row < n_rows, other=1.0).to(tl.float32)
        mask = (factors != 1.0) & (d < dim)
        where = tl.multiple_of(first_row * dim, ALIGN) + (local * dim + d)
        _scale_tile(g0_ptr, where, mask, factors)
        if COUNT > 1:
            _scale_tile(g1_ptr, where, mask, factors)
        if COUNT > 2:
            _scale_tile(g2_ptr, where, mask, factors)
        if COUNT > 3:
            _scale_tile(g3_ptr, where, mask, factors)


def scale_grads_(grads: Sequence[Tensor], scale: Tensor) -> list[Call]:
    """The launches of the operator ``scale_grads_``: one for up to four gradients of one shape and dtype.

    Args:
        grads: float32, bfloat16 or float16, each ``[R, D]`` in memory order. scale: one element, or ``R``.
    """
    calls = []
    filled = [grad for grad in grads if grad.numel()]
    for (shape, _), group in groupby(filled, key=lambda grad: (grad.shape, grad.dtype)):
        alike = list(group)
        for i in range(0, len(alike), _AT_ONCE):
            calls.append(_scale_call(alike[i : i + _AT_ONCE], scale, shape[0] if scale.numel() > 1 else 1))
    return calls


def _scale_call(grads: list[Tensor], scale: Tensor, rows: int) -> Call:
    dim = grads[0].numel() // rows
    short = rows > 1 and dim < 512
    block_d = max(4, triton.next_power_of_2(dim)) if short else TILE
    tile_rows = TILE // block_d
    # By the length of a sample's row also where one factor makes all rows one, so that their number compiles nothing.
    align = math.gcd(grads[0].numel() // grads[0].shape[0], 16)
    groups = -(-rows // tile_rows)
    grid = (1 if short else -(-dim // (TILE * _STEPS)), *over_two_axes(groups))
    padded = [*grads, *[grads[0]] * (_AT_ONCE - len(grads))]
    arguments = {
        **{f"g{i}_ptr": grad for i, grad in enumerate(padded)},
        "scale_ptr": scale,
        "n_rows": rows,
        "units": dim // align,
    }
    constants = {
        "COUNT": len(grads),
        "ALIGN": align,
        "ROWS": tile_rows,
        "BLOCK_D": block_d,
        "STEPS": _STEPS,
        "PER_ROW": rows > 1,
    }
    return Call(_scale_kernel, grid, arguments, constants, TILE // (32 * PER_THREAD))
