"""The generator's loss and all its gradients in one pass.

``l = w (-Q kappa^2 ||D||^2 + 2 kappa <D, alpha f* - beta tgt>)`` through ``D = f* - f``, where ``x_t`` cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import K_OUT, K_X, P, Q, S, W
from .noise import noise_constants, noise_tile
from .reduce import finish, loss_outputs
from .tiles import (
    ROW_COUNTS,
    Call,
    column,
    guide,
    place,
    read,
    read_where,
    row_number,
    single,
    tiling,
    write,
    write_sum,
)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _generator_kernel(
    teacher_ptr, fake_ptr, x_ptr, x_t_ptr, endpoint_ptr, coef_ptr, noise_ptr,
    g_teacher_ptr, g_fake_ptr, g_x_ptr, g_x_t_ptr,
    uncond_ptr, guidance_ptr, g_uncond_ptr, q_rows_ptr, partial_ptr,
    n_rows, units, noise_rows,
    two_kappa_alpha, two_kappa_beta, q_kappa2, scale,
    KEYED: tl.constexpr, SHARED: tl.constexpr, PTX: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    two_kappa_alpha, two_kappa_beta = single(two_kappa_alpha), single(two_kappa_beta)
    q_kappa2, scale = single(q_kappa2), single(scale)
    row, start, offsets, inside, fresh, begin = place(
        n_rows, units, ALIGN, ROWS, BLOCK_D, EVEN, noise_rows, KEYED, SHARED
    )
    teacher = read(teacher_ptr, start, offsets, inside, ROWS, EVEN)
    if uncond_ptr is not None:
        scales = row_number(guidance_ptr, row, n_rows, ROWS, EVEN)
        teacher = guide(teacher, uncond_ptr, scales, start, offsets, inside, ROWS, EVEN)
    fake = read(fake_ptr, start, offsets, inside, ROWS, EVEN)
    x = read(x_ptr, start, offsets, inside, ROWS, EVEN)
    p = column(coef_ptr, row, n_rows, P, ROWS, EVEN)
    s = column(coef_ptr, row, n_rows, S, ROWS, EVEN)
    k_out = column(coef_ptr, row, n_rows, K_OUT, ROWS, EVEN)
    w = column(coef_ptr, row, n_rows, W, ROWS, EVEN)
    n = noise_tile(
        noise_ptr, row, begin, offsets, inside, noise_rows, units, KEYED, SHARED, PTX, ALIGN, ROWS, BLOCK_D, EVEN
    )

    if q_rows_ptr is not None:
        q_kappa2 *= row_number(q_rows_ptr, row, n_rows, ROWS, EVEN)
    # Products of a row's constants are computed once for the row, so an element costs eleven multiply-adds.
    raw = teacher - fake  # D = k_out raw
    r = two_kappa_alpha * k_out * teacher - two_kappa_beta * p * x - two_kappa_beta * s * n  # 2 kappa r
    if endpoint_ptr is not None:
        y = read(endpoint_ptr, start, offsets, inside, ROWS, EVEN)
        r -= two_kappa_beta * column(coef_ptr, row, n_rows, Q, ROWS, EVEN) * y
    if x_t_ptr is not None or g_x_t_ptr is not None:
        k_x = column(coef_ptr, row, n_rows, K_X, ROWS, EVEN)
    if x_t_ptr is not None:
        x_t = read_where(k_x != 0, x_t_ptr, start, offsets, inside, ROWS, EVEN)
        r += two_kappa_alpha * k_x * x_t
    square = q_kappa2 * k_out * raw
    gap = r - square
    write_sum(partial_ptr, row, n_rows, fresh, raw * gap, w * k_out, ROWS, EVEN)

    weight = scale * w * k_out
    both = weight * two_kappa_alpha * raw
    if g_teacher_ptr is not None or g_fake_ptr is not None or g_uncond_ptr is not None:
        g_fake = weight * (square - gap)
        if g_fake_ptr is not None:
            write(g_fake_ptr, start, offsets, fresh, g_fake, ROWS, EVEN)
        if g_teacher_ptr is not None or g_uncond_ptr is not None:
            g_teacher = k_out * both - g_fake
            if uncond_ptr is not None:
                g_guided = g_teacher
                g_teacher = scales * g_guided
                if g_uncond_ptr is not None:
                    write(g_uncond_ptr, start, offsets, fresh, g_guided - g_teacher, ROWS, EVEN)
            if g_teacher_ptr is not None:
                write(g_teacher_ptr, start, offsets, fresh, g_teacher, ROWS, EVEN)
    if g_x_ptr is not None:
        write(g_x_ptr, start, offsets, fresh, -weight * p * two_kappa_beta * raw, ROWS, EVEN)
    if g_x_t_ptr is not None:
        write(g_x_t_ptr, start, offsets, fresh, k_x * both, ROWS, EVEN)


def generator(
    teacher_out: Tensor,
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None,
    teacher_uncond: Tensor | None,
    guidance: Tensor | None,
    q_rows: Tensor | None,
    alpha: float,
    beta: float,
    q: float,
    kappa: float,
    mean: bool,
    want_teacher: bool,
    want_fake: bool,
    want_x: bool,
    want_x_t: bool,
    want_uncond: bool,
    ptx: bool | None = None,
) -> tuple[list[Call], tuple[Tensor, ...]]:
    """The launches of the operator ``generator`` and its outputs; a gradient not wanted is empty."""
    wants = want_teacher, want_fake, want_x, want_x_t, want_uncond and teacher_uncond is not None
    grads = [torch.empty_like(x) if want else x.new_empty(0) for want in wants]
    if x.numel() == 0:
        return [], (coef.new_zeros(()), coef.new_zeros(x.shape[0]), *grads)
    rows, dim = x.shape[0], x.numel() // x.shape[0]
    cut = tiling(rows, dim)
    partial, row_losses, loss = loss_outputs(x, cut.blocks)
    g_teacher, g_fake, g_x, g_x_t, g_uncond = (grad if want else None for grad, want in zip(grads, wants, strict=True))
    arguments = {
        "teacher_ptr": teacher_out,
        "fake_ptr": fake_out,
        "x_ptr": x,
        "x_t_ptr": x_t,
        "endpoint_ptr": endpoint,
        "coef_ptr": coef,
        "noise_ptr": noise,
        "g_teacher_ptr": g_teacher,
        "g_fake_ptr": g_fake,
        "g_x_ptr": g_x,
        "g_x_t_ptr": g_x_t,
        "uncond_ptr": teacher_uncond,
        "guidance_ptr": guidance,
        "g_uncond_ptr": g_uncond,
        "q_rows_ptr": q_rows,
        "partial_ptr": partial,
        "n_rows": rows,
        "units": dim // cut.constants["ALIGN"],
        "noise_rows": rows,
        "two_kappa_alpha": 2 * kappa * alpha,
        "two_kappa_beta": 2 * kappa * beta,
        # If every row has its own Q, the kernel multiplies by it.
        "q_kappa2": kappa**2 * (q if q_rows is None else 1.0),
        "scale": 1.0 / rows if mean else 1.0,
    }
    constants = {**noise_constants(noise, rows, rows, ptx), **cut.constants}
    main = Call(_generator_kernel, cut.grid, arguments, constants, cut.warps)
    return [main, finish(partial, row_losses, loss, rows)], (loss, row_losses, *grads)
