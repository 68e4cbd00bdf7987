"""``x_t = a x + b y + c n`` and its gradients in ``x`` and ``y``, one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import A, B, C
from .noise import noise_constants, noise_tile, reads_before_noise
from .tiles import ROW_COUNTS, Call, column, place, read, tiling, write


@triton.jit(do_not_specialize=ROW_COUNTS)
def _interpolate_kernel(
    x_ptr,
    endpoint_ptr,
    coef_ptr,
    noise_ptr,
    out_ptr,
    n_rows,
    units,
    noise_rows,
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
    x = read(x_ptr, start, offsets, inside, ROWS, EVEN)
    reads_before_noise(KEYED, PTX, ALIGN)
    n = noise_tile(
        noise_ptr, row, begin, offsets, inside, noise_rows, units, KEYED, SHARED, PTX, ALIGN, ROWS, BLOCK_D, EVEN
    )
    mixed = column(coef_ptr, row, n_rows, A, ROWS, EVEN) * x + column(coef_ptr, row, n_rows, C, ROWS, EVEN) * n
    if endpoint_ptr is not None:
        y = read(endpoint_ptr, start, offsets, inside, ROWS, EVEN)
        mixed += column(coef_ptr, row, n_rows, B, ROWS, EVEN) * y
    write(out_ptr, start, offsets, fresh, mixed, ROWS, EVEN)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _interpolate_grads_kernel(
    grad_ptr,
    coef_ptr,
    g_x_ptr,
    g_endpoint_ptr,
    n_rows,
    units,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, start, offsets, inside, fresh, _begin = place(n_rows, units, ALIGN, ROWS, BLOCK_D, EVEN)
    grad = read(grad_ptr, start, offsets, inside, ROWS, EVEN)
    if g_x_ptr is not None:
        g_x = column(coef_ptr, row, n_rows, A, ROWS, EVEN) * grad
        write(g_x_ptr, start, offsets, fresh, g_x, ROWS, EVEN)
    if g_endpoint_ptr is not None:
        g_endpoint = column(coef_ptr, row, n_rows, B, ROWS, EVEN) * grad
        write(g_endpoint_ptr, start, offsets, fresh, g_endpoint, ROWS, EVEN)


def interpolate(
    x: Tensor, coef: Tensor, noise: Tensor, endpoint: Tensor | None, noise_rows: int, ptx: bool | None = None
) -> tuple[list[Call], Tensor]:
    """The launch of the operator ``interpolate`` and its output."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return [], out
    rows, dim = x.shape[0], x.numel() // x.shape[0]
    cut = tiling(rows, dim)
    arguments = {
        "x_ptr": x,
        "endpoint_ptr": endpoint,
        "coef_ptr": coef,
        "noise_ptr": noise,
        "out_ptr": out,
        "n_rows": rows,
        "units": dim // cut.constants["ALIGN"],
        "noise_rows": noise_rows,
    }
    constants = {**noise_constants(noise, noise_rows, rows, ptx), **cut.constants}
    return [Call(_interpolate_kernel, cut.grid, arguments, constants, cut.warps)], out


def interpolate_grads(
    grad: Tensor, coef: Tensor, want_x: bool, want_endpoint: bool
) -> tuple[list[Call], tuple[Tensor, Tensor]]:
    """The launch of the operator ``interpolate_grads`` and its outputs; a gradient not wanted is empty."""
    outputs = tuple(torch.empty_like(grad) if want else grad.new_empty(0) for want in (want_x, want_endpoint))
    g_x, g_endpoint = outputs
    if grad.numel() == 0 or not (want_x or want_endpoint):
        return [], (g_x, g_endpoint)
    rows, dim = grad.shape[0], grad.numel() // grad.shape[0]
    cut = tiling(rows, dim)
    arguments = {
        "grad_ptr": grad,
        "coef_ptr": coef,
        "g_x_ptr": g_x if want_x else None,
        "g_endpoint_ptr": g_endpoint if want_endpoint else None,
        "n_rows": rows,
        "units": dim // cut.constants["ALIGN"],
    }
    return [Call(_interpolate_grads_kernel, cut.grid, arguments, cut.constants, cut.warps)], (g_x, g_endpoint)
