"""The fake model's loss and its gradient in one pass.

``l = w (A ||f||^2 - 2 <f, B tgt + D f*> + C ||tgt||^2)``, with one set of ``A, B, D, C`` for generated rows, one for
real rows. The teacher is not read in a half whose ``D`` is zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import K_OUT, K_X, P, Q, S, W
from .noise import noise_constants, noise_tile, reads_before_noise
from .reduce import finish, loss_outputs
from .tiles import ROW_COUNTS, Call, column, place, read, read_where, row_number, single, tiling, write, write_sum


@triton.jit(do_not_specialize=ROW_COUNTS)
def _fake_kernel(
    fake_ptr,
    x_ptr,
    x_t_ptr,
    teacher_ptr,
    endpoint_ptr,
    coef_ptr,
    noise_ptr,
    uncond_ptr,
    guidance_ptr,
    g_fake_ptr,
    partial_ptr,
    n_rows,
    n_gen,
    units,
    noise_rows,
    a_gen,
    b_gen,
    d_gen,
    c_gen,
    a_real,
    b_real,
    d_real,
    c_real,
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
    fake = read(fake_ptr, start, offsets, inside, ROWS, EVEN)
    x = read(x_ptr, start, offsets, inside, ROWS, EVEN)
    k_out = column(coef_ptr, row, n_rows, K_OUT, ROWS, EVEN)
    w = column(coef_ptr, row, n_rows, W, ROWS, EVEN)
    reads_before_noise(KEYED, PTX, ALIGN)
    n = noise_tile(
        noise_ptr, row, begin, offsets, inside, noise_rows, units, KEYED, SHARED, PTX, ALIGN, ROWS, BLOCK_D, EVEN
    )
    generated = row < n_gen
    a = single(tl.where(generated, a_gen, a_real))
    b = single(tl.where(generated, b_gen, b_real))
    c = single(tl.where(generated, c_gen, c_real))

    tgt = column(coef_ptr, row, n_rows, P, ROWS, EVEN) * x + column(coef_ptr, row, n_rows, S, ROWS, EVEN) * n
    if endpoint_ptr is not None:
        y = read(endpoint_ptr, start, offsets, inside, ROWS, EVEN)
        tgt += column(coef_ptr, row, n_rows, Q, ROWS, EVEN) * y
    f = k_out * fake
    linear = b * tgt
    if x_t_ptr is not None:
        k_x = column(coef_ptr, row, n_rows, K_X, ROWS, EVEN)
        shift = k_x * read_where(k_x != 0, x_t_ptr, start, offsets, inside, ROWS, EVEN)
        f += shift
    if teacher_ptr is not None:
        d = single(tl.where(generated, d_gen, d_real))
        teacher = read_where(d != 0, teacher_ptr, start, offsets, inside, ROWS, EVEN)
        if uncond_ptr is not None:
            u = read_where(d != 0, uncond_ptr, start, offsets, inside, ROWS, EVEN)
            teacher = u + row_number(guidance_ptr, row, n_rows, ROWS, EVEN) * (teacher - u)
        teacher = k_out * teacher
        if x_t_ptr is not None:
            teacher += shift
        linear += d * teacher
    slope = a * f - linear
    write_sum(partial_ptr, row, n_rows, fresh, f * (slope - linear) + c * tgt * tgt, w, ROWS, EVEN)
    if g_fake_ptr is not None:
        write(g_fake_ptr, start, offsets, fresh, 2.0 * single(scale) * k_out * w * slope, ROWS, EVEN)


def fake(
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    teacher_out: Tensor | None,
    endpoint: Tensor | None,
    teacher_uncond: Tensor | None,
    guidance: Tensor | None,
    noise_rows: int,
    n_real: int,
    a_gen: float,
    b_gen: float,
    d_gen: float,
    c_gen: float,
    a_real: float,
    b_real: float,
    d_real: float,
    c_real: float,
    mean: bool,
    want_fake: bool,
    ptx: bool | None = None,
) -> tuple[list[Call], tuple[Tensor, ...]]:
    """The launches of the operator ``fake`` and its outputs; a gradient not wanted is empty.

    Raises:
        ValueError: no ``teacher_out`` for a half with rows and ``D`` different from zero.
    """
    rows = x.shape[0]
    n_gen = rows - n_real
    reads_teacher = (d_gen != 0 and n_gen > 0) or (d_real != 0 and n_real > 0)
    if reads_teacher and teacher_out is None:
        raise ValueError("teacher_out is needed: this objective's d is different from 0")
    g_fake = torch.empty_like(fake_out) if want_fake else fake_out.new_empty(0)
    if x.numel() == 0:
        return [], (coef.new_zeros(()), coef.new_zeros(rows), g_fake)
    dim = x.numel() // rows
    cut = tiling(rows, dim)
    partial, row_losses, loss = loss_outputs(x, cut.blocks)
    arguments = {
        "fake_ptr": fake_out,
        "x_ptr": x,
        "x_t_ptr": x_t,
        "teacher_ptr": teacher_out if reads_teacher else None,
        "endpoint_ptr": endpoint,
        "coef_ptr": coef,
        "noise_ptr": noise,
        "uncond_ptr": teacher_uncond if reads_teacher else None,
        "guidance_ptr": guidance if reads_teacher else None,
        "g_fake_ptr": g_fake if want_fake else None,
        "partial_ptr": partial,
        "n_rows": rows,
        "n_gen": n_gen,
        "units": dim // cut.constants["ALIGN"],
        "noise_rows": noise_rows,
        "a_gen": a_gen,
        "b_gen": b_gen,
        "d_gen": d_gen,
        "c_gen": c_gen,
        "a_real": a_real,
        "b_real": b_real,
        "d_real": d_real,
        "c_real": c_real,
        "scale": 1.0 / max(n_gen, 1) if mean else 1.0,
    }
    constants = {**noise_constants(noise, noise_rows, rows, ptx), **cut.constants}
    # Every element of an odd row draws a group of four for itself. Beside all inputs at once that leaves too few
    # registers for 16 elements a thread, so a second warp takes half of them.
    crowded = cut.constants["ALIGN"] < 4 and endpoint is not None and teacher_uncond is not None
    main = Call(_fake_kernel, cut.grid, arguments, constants, cut.warps * (1 + crowded))
    return [main, finish(partial, row_losses, loss, n_gen)], (loss, row_losses, g_fake)
