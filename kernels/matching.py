"""The universal matching loss ``w ||f - tgt||^2`` and its gradient in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import K_OUT, K_X, P, Q, S, W
from .noise import noise_constants, noise_tile, reads_before_noise
from .reduce import finish, loss_outputs
from .tiles import ROW_COUNTS, Call, column, place, read, read_where, single, tiling, write, write_sum


@triton.jit(do_not_specialize=ROW_COUNTS)
def _matching_kernel(
    out_ptr,
    x_ptr,
    x_t_ptr,
    endpoint_ptr,
    coef_ptr,
    noise_ptr,
    g_out_ptr,
    partial_ptr,
    n_rows,
    units,
    noise_rows,
    scale,
    KEYED: tl.constexpr,
    SHARED: tl.constexpr,
    PTX: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, start, offsets, inside, fresh, begin = place(
        n_rows, units, ALIGN, ROWS, BLOCK_D, EVEN, noise_rows, KEYED, SHARED
    )
    out = read(out_ptr, start, offsets, inside, ROWS, EVEN)
    x = read(x_ptr, start, offsets, inside, ROWS, EVEN)
    k_out = column(coef_ptr, row, n_rows, K_OUT, ROWS, EVEN)
    w = column(coef_ptr, row, n_rows, W, ROWS, EVEN)
    reads_before_noise(KEYED, PTX, ALIGN)
    n = noise_tile(
        noise_ptr, row, begin, offsets, inside, noise_rows, units, KEYED, SHARED, PTX, ALIGN, ROWS, BLOCK_D, EVEN
    )
    tgt = column(coef_ptr, row, n_rows, P, ROWS, EVEN) * x + column(coef_ptr, row, n_rows, S, ROWS, EVEN) * n
    if endpoint_ptr is not None:
        y = read(endpoint_ptr, start, offsets, inside, ROWS, EVEN)
        tgt += column(coef_ptr, row, n_rows, Q, ROWS, EVEN) * y
    gap = k_out * out - tgt
    if x_t_ptr is not None:
        k_x = column(coef_ptr, row, n_rows, K_X, ROWS, EVEN)
        gap += k_x * read_where(k_x != 0, x_t_ptr, start, offsets, inside, ROWS, EVEN)
    write_sum(partial_ptr, row, n_rows, fresh, gap * gap, w, ROWS, EVEN)
    if g_out_ptr is not None:
        write(g_out_ptr, start, offsets, fresh, 2.0 * single(scale) * k_out * w * gap, ROWS, EVEN)


def matching(
    out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None,
    noise_rows: int,
    mean: bool,
    want_out: bool,
    ptx: bool | None = None,
) -> tuple[list[Call], tuple[Tensor, ...]]:
    """The launches of the operator ``matching`` and its outputs; a gradient not wanted is empty."""
    g_out = torch.empty_like(out) if want_out else out.new_empty(0)
    if x.numel() == 0:
        return [], (coef.new_zeros(()), coef.new_zeros(x.shape[0]), g_out)
    rows, dim = x.shape[0], x.numel() // x.shape[0]
    cut = tiling(rows, dim)
    partial, row_losses, loss = loss_outputs(x, cut.blocks)
    arguments = {
        "out_ptr": out,
        "x_ptr": x,
        "x_t_ptr": x_t,
        "endpoint_ptr": endpoint,
        "coef_ptr": coef,
        "noise_ptr": noise,
        "g_out_ptr": g_out if want_out else None,
        "partial_ptr": partial,
        "n_rows": rows,
        "units": dim // cut.constants["ALIGN"],
        "noise_rows": noise_rows,
        "scale": 1.0 / rows if mean else 1.0,
    }
    constants = {**noise_constants(noise, noise_rows, rows, ptx), **cut.constants}
    main = Call(_matching_kernel, cut.grid, arguments, constants, cut.warps)
    return [main, finish(partial, row_losses, loss, rows)], (loss, row_losses, g_out)
