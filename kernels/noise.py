"""The counter-based noise on the device: Philox4x32-10, one call for four elements, and Box and Muller's transform.

``realuid_fast/ops/philox.py`` defines the numbers. On NVIDIA sine, cosine, logarithm and square root are the hardware's
approximate instructions, whose argument needs no range reduction here. Angles skip the truncation to 24 bits, which
moves them by less than ``2 pi 2^-24``. Near ``u1 = 1`` the approximate logarithm has an absolute error of 2^-22, too
much for the small radius there; since ``-2 ln u >= 2 (1 - u)``, with equality in the limit, the larger of that bound
and the logarithm taken a little low is within 2e-5 of the radius everywhere, and never negative. That bound is
absolute: beside a radius near zero it is larger, 1.7e-4 of it at worst.

On AMD and in the interpreter logarithm and square root are those of Triton's library, which on AMD are single
instructions. Sine and cosine are polynomials, because the accuracy of AMD's instructions for them is not documented.

The cost of a key: one Philox call serves four elements if ``D`` is divisible by four, and in tiles inside one row,
which begin at a multiple of four for it. That takes about 20 instructions an element on NVIDIA and 40 on AMD. Short
rows of another length begin inside a group of four, and each element draws a group for itself, which takes about 80.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ROW_COUNTS, Call, noise_row, place, row_length, tiling, write

# Inline PTX works only with a compiler for NVIDIA, not in the interpreter and not on ROCm.
_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret


@triton.jit
def _philox(g, seed, stream):
    """Ten rounds for the 64-bit counters ``g``; four tensors of 32-bit words."""
    c0 = g.to(tl.uint32)
    c1 = (g >> 32).to(tl.uint32)
    c2 = stream.to(tl.uint32)
    c3 = (stream >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One widening multiplication gives both halves of the product.
        left = c0.to(tl.uint64) * 0xD2511F53
        right = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = right.to(tl.uint32)
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = left.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _ptx(ASM: tl.constexpr, x):
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _circle(word):
    """Cosine and sine of ``2 pi word 2^-32``. The library's would spend a hundred instructions to reduce the argument.

    Here the reduction is exact: an eighth of a turn is added, then the word's two top bits are the quadrant, and the
    others count from -pi/4 to pi/4. In that range minimax polynomials are within 1e-7.
    """
    turned = tl.add(word, 0x20000000, sanitize_overflow=False)
    x = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 1.4629180792671596e-09
    z = x * x
    s = ((z * -0.00019503988733049482 + 0.008332036435604095) * z - 0.16666650772094727) * (z * x) + x
    c = ((z * -0.00135858787689358 + 0.041655026376247406) * z - 0.4999985694885254) * z + 1.0
    swap = (turned & 0x40000000) != 0
    cosine = tl.where(swap, s, c).to(tl.uint32, bitcast=True)
    sine = tl.where(swap, c, s).to(tl.uint32, bitcast=True)
    cosine ^= tl.add(turned, 0x40000000, sanitize_overflow=False) & 0x80000000
    sine ^= turned & 0x80000000
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def _pair(radius_word, angle_word, PTX: tl.constexpr):
    """Two normals from two words."""
    m = (radius_word >> 8).to(tl.float32)
    if PTX:
        u = m * 5.9604644775390625e-08 + 5.9604644775390625e-08
        log2 = _ptx("lg2.approx.ftz.f32 $0, $1;", u)
        # The bound 2 (1 - u) is exact. The logarithm is lowered by its own error bound, 2^-21.
        bound = m * -1.1920928955078125e-07 + 1.99999988079071044921875
        radius = _ptx(
            "sqrt.approx.ftz.f32 $0, $1;", tl.maximum(log2 * -1.3862943611198906 - 4.76837158203125e-07, bound)
        )
        # 2 pi 2^-32
        angle = angle_word.to(tl.float32) * 1.4629180792671596e-09
        cosine = _ptx("cos.approx.ftz.f32 $0, $1;", angle)
        sine = _ptx("sin.approx.ftz.f32 $0, $1;", angle)
    else:
        # m counts in units of 2^-24, as in the definition. -2 ln u is computed from the base-2 logarithm, which
        # processors have.
        radius = tl.sqrt(tl.log2((m + 1.0) * 5.9604644775390625e-08) * -1.3862943611198906)
        cosine, sine = _circle(angle_word)
    return radius * cosine, radius * sine


@triton.jit
def _four(g, seed, stream, PTX: tl.constexpr):
    w0, w1, w2, w3 = _philox(g, seed, stream)
    n0, n1 = _pair(w0, w1, PTX)
    n2, n3 = _pair(w2, w3, PTX)
    return n0, n1, n2, n3


@triton.jit
def reads_before_noise(KEYED: tl.constexpr, PTX: tl.constexpr, ALIGN: tl.constexpr):
    """Keep the reads above this line before the noise that is drawn below it, on NVIDIA.

    The noise needs no tensor, so the compiler would put the reads behind it. Memory then idles while noise is drawn.
    """
    if KEYED and PTX and ALIGN >= 4:
        tl.debug_barrier()


@triton.jit
def noise_tile(
    noise_ptr,
    row,
    begin,
    offsets,
    inside,
    noise_rows,
    units,
    KEYED: tl.constexpr,
    SHARED: tl.constexpr,
    PTX: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The tile's normals in float32: read from a tensor, or drawn from the key at ``noise_ptr``."""
    dim = row_length(units, ALIGN, ROWS)
    row = noise_row(row, noise_rows, SHARED)
    if KEYED:
        seed = tl.load(noise_ptr)
        stream = tl.load(noise_ptr + 1)
        if ALIGN >= 4 or ROWS == 1:
            if ROWS == 1:
                # A multiple of 4, by :func:`place`.
                g = (row * dim + begin >> 2) + tl.arange(0, BLOCK_D // 4)
            else:
                g = (row * dim >> 2) + tl.arange(0, BLOCK_D // 4)[None, :]
            n0, n1, n2, n3 = _four(g, seed, stream, PTX)
            quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))
            if ROWS == 1:
                noise = tl.reshape(quads, (BLOCK_D,))
            else:
                noise = tl.reshape(quads, (ROWS, BLOCK_D))
        else:
            i = row * dim + tl.arange(0, BLOCK_D)[None, :]
            w0, w1, w2, w3 = _philox(i >> 2, seed, stream)
            late = (i & 2) != 0
            cosine, sine = _pair(tl.where(late, w2, w0), tl.where(late, w3, w1), PTX)
            noise = tl.where((i & 1) != 0, sine, cosine)
    else:
        if ROWS == 1:
            noise = tl.load(noise_ptr + tl.multiple_of(row * dim + begin, ALIGN) + offsets)
        else:
            if SHARED != 0:
                where = row * dim + tl.arange(0, BLOCK_D)[None, :]
            else:
                where = tl.multiple_of(tl.program_id(0).to(tl.int64) * ROWS * dim, ALIGN) + offsets
            noise = tl.load(noise_ptr + where, mask=inside, other=0.0)
        noise = noise.to(tl.float32)
    return noise


@triton.jit(do_not_specialize=ROW_COUNTS)
def _normal_kernel(
    key_ptr,
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
    n = noise_tile(
        key_ptr, row, begin, offsets, inside, noise_rows, units, KEYED, SHARED, PTX, ALIGN, ROWS, BLOCK_D, EVEN
    )
    write(out_ptr, start, offsets, fresh, n, ROWS, EVEN)


def noise_constants(noise: Tensor, noise_rows: int, rows: int, ptx: bool | None) -> dict[str, Any]:
    """The compile-time facts of a call's noise: drawn or read, by which instructions, and how rows share it.

    ``SHARED`` is 0 if every row has its own noise, 1 if two halves share it (a subtraction then gives the noise's row),
    and 2 otherwise (a division gives it).
    """
    shared = 0 if noise_rows >= rows else 1 if 2 * noise_rows >= rows else 2
    return {
        "KEYED": not noise.is_floating_point(),
        "SHARED": shared,
        "PTX": _PTX if ptx is None else ptx,
    }


def normal_like(key: Tensor, like: Tensor, noise_rows: int, ptx: bool | None = None) -> tuple[list[Call], Tensor]:
    """The launch that fills a tensor like ``like`` with the stream's normals, row ``i`` with those of ``i mod N``."""
    out = torch.empty_like(like)
    if like.numel() == 0:
        return [], out
    rows, dim = like.shape[0], like.numel() // like.shape[0]
    cut = tiling(rows, dim)
    arguments = {
        "key_ptr": key,
        "out_ptr": out,
        "n_rows": rows,
        "units": dim // cut.constants["ALIGN"],
        "noise_rows": noise_rows,
    }
    constants = {**noise_constants(key, noise_rows, rows, ptx), **cut.constants}
    return [Call(_normal_kernel, cut.grid, arguments, constants, cut.warps)], out
