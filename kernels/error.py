"""The teacher's error on the generator's samples, ``mean |x - f*|`` for every row. SiD and DMD divide by it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .columns import K_OUT, K_X
from .reduce import finish, row_outputs
from .tiles import ROW_COUNTS, Call, column, guide, place, read, read_where, row_number, single, tiling, write_sum


@triton.jit(do_not_specialize=ROW_COUNTS)
def _error_kernel(
    teacher_ptr,
    x_ptr,
    x_t_ptr,
    coef_ptr,
    uncond_ptr,
    guidance_ptr,
    partial_ptr,
    n_rows,
    units,
    inverse_dim,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, start, offsets, inside, fresh, _ = place(n_rows, units, ALIGN, ROWS, BLOCK_D, EVEN)
    k_out = column(coef_ptr, row, n_rows, K_OUT, ROWS, EVEN)
    teacher = read(teacher_ptr, start, offsets, inside, ROWS, EVEN)
    if uncond_ptr is not None:
        scales = row_number(guidance_ptr, row, n_rows, ROWS, EVEN)
        teacher = guide(teacher, uncond_ptr, scales, start, offsets, inside, ROWS, EVEN)
    gap = read(x_ptr, start, offsets, inside, ROWS, EVEN) - k_out * teacher
    if x_t_ptr is not None:
        k_x = column(coef_ptr, row, n_rows, K_X, ROWS, EVEN)
        gap -= k_x * read_where(k_x != 0, x_t_ptr, start, offsets, inside, ROWS, EVEN)
    write_sum(partial_ptr, row, n_rows, fresh, tl.abs(gap), single(inverse_dim), ROWS, EVEN)


def mean_abs_error(
    teacher_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    teacher_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
) -> tuple[list[Call], Tensor]:
    """The launches of the operator ``mean_abs_error`` and its rows ``(R,)``."""
    if x.numel() == 0:
        return [], coef.new_zeros(x.shape[0])
    rows, dim = x.shape[0], x.numel() // x.shape[0]
    cut = tiling(rows, dim)
    partial, errors = row_outputs(x, cut.blocks)
    arguments = {
        "teacher_ptr": teacher_out,
        "x_ptr": x,
        "x_t_ptr": x_t,
        "coef_ptr": coef,
        "uncond_ptr": teacher_uncond,
        "guidance_ptr": guidance,
        "partial_ptr": partial,
        "n_rows": rows,
        "units": dim // cut.constants["ALIGN"],
        "inverse_dim": 1.0 / dim,
    }
    main = Call(_error_kernel, cut.grid, arguments, cut.constants, cut.warps)
    return [main] if partial is errors else [main, finish(partial, errors, None, rows)], errors
