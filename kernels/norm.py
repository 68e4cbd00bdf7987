"""``SiLU(norm(x + shift))`` or ``norm(x)``, and gradients: group normalisation on channels_last images, in float32.

An image is ``[P, C]`` in memory: pixels, and their channels next to each other. A program has all pixels of a few whole
groups of one image, so that it needs nothing of another program:

- The groups' channels together fill ``LANES`` columns, at least the 32 bytes that memory is read in, where there are as
  many groups. A group whose width is no power of two is padded with columns that are masked.
- If the pixels times the columns are at most 32 KiB, they stay in registers, and the tensors are read once. Otherwise
  the program goes over them twice, ``PIXELS`` pixels at a time; the second time they are in the cache. It takes half as
  many at a time, because the loop and the masks take registers too.
- Where no pixel and no column is left over (``EVEN``), nothing is masked.

With ``h = x + shift``, ``n = (h - mean) rstd``, ``z = n weight + bias`` and ``y = z sigmoid(z)``, or ``y = z`` without
SiLU, the gradients need of an image only each channel's sums of ``g_z`` and ``g_z n``. With ``g_n = g_z weight``, the
gradient is ``g_x = rstd (g_n - mean(g_n) - n mean(g_n n))``. The sums are the image's part of the gradients in the bias
and the weight. They are added over the images in a fixed order, so that a gradient has the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ROW_COUNTS, Call

TILE_BYTES = 32768
PER_THREAD = 32
LEAST_BYTES, MOST_BYTES = 32, 128  # of neighbouring channels that a program reads of a pixel
COLUMNS = 32  # of the kernel that adds the images' parts
ROWS = 64


@triton.jit
def _place(channels, groups, blocks, WIDTH: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr):
    """The program's image, its columns' channels and groups, and which columns exist."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * (LANES // PADDED)
    lane = tl.arange(0, LANES)
    group = first + lane // PADDED
    if WIDTH == PADDED:
        channel = first * WIDTH + lane
        exists = channel < channels
    else:
        channel = group * WIDTH + lane % PADDED
        exists = (lane % PADDED < WIDTH) & (group < groups)
    return image, channel, group, exists, (lane % PADDED == 0) & exists


@triton.jit
def _of_groups(values, PADDED: tl.constexpr, LANES: tl.constexpr):
    """Each group's sum of a vector over the columns, in all columns of the group."""
    sums = tl.sum(tl.reshape(values, (LANES // PADDED, PADDED)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(sums, (LANES // PADDED, PADDED)), (LANES,))


@triton.jit
def _tile(start, pixels, channels, channel, exists, PIXELS: tl.constexpr):
    """The offsets of some pixels of the program's columns in the image, and a mask of those that exist."""
    pixel = start + tl.arange(0, PIXELS)[:, None]
    return pixel * channels + channel[None, :], (pixel < pixels) & exists[None, :]


@triton.jit
def _read(pointer, offsets, inside, EVEN: tl.constexpr):
    """A tile in float32; elements that do not exist are 0."""
    if EVEN:
        value = tl.load(pointer + offsets)
    else:
        value = tl.load(pointer + offsets, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _write(pointer, offsets, inside, value, EVEN: tl.constexpr):
    """Store a tile, rounded to the storage type."""
    value = value.to(pointer.dtype.element_ty)
    if EVEN:
        tl.store(pointer + offsets, value)
    else:
        tl.store(pointer + offsets, value, mask=inside)


@triton.jit
def _sum_pixels(values, inside, EVEN: tl.constexpr):
    """The columns' sums over the pixels that exist."""
    if not EVEN:
        values = tl.where(inside, values, 0.0)
    return tl.sum(values, axis=0)


@triton.jit
def _vector(pointer, offsets, exists):
    return tl.load(pointer + offsets, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _activated(z, SILU: tl.constexpr):
    if SILU:
        z *= tl.sigmoid(z)
    return z


@triton.jit
def _norm_silu_kernel(
    x_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    statistics_ptr,
    pixels,
    channels,
    groups,
    blocks,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
):
    image, channel, group, exists, leads = _place(channels, groups, blocks, WIDTH, PADDED, LANES)
    weight, bias = _vector(weight_ptr, channel, exists), _vector(bias_ptr, channel, exists)
    shift = tl.zeros((LANES,), tl.float32)
    if shift_ptr is not None:
        shift = _vector(shift_ptr, image * channels + channel, exists)
    x_ptr += image * pixels * channels
    y_ptr += image * pixels * channels
    mean, squares, count = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32), 0.0
    if WHOLE:
        offsets, inside = _tile(0, pixels, channels, channel, exists, PIXELS)
        h = _read(x_ptr, offsets, inside, EVEN) + shift[None, :]
        count = tl.cast(pixels * WIDTH, tl.float32)
        mean = _of_groups(_sum_pixels(h, inside, EVEN), PADDED, LANES) / count
        apart = h - mean[None, :]
        squares = _of_groups(_sum_pixels(apart * apart, inside, EVEN), PADDED, LANES)
    else:
        for start in range(0, pixels, PIXELS):
            offsets, inside = _tile(start, pixels, channels, channel, exists, PIXELS)
            h = _read(x_ptr, offsets, inside, EVEN) + shift[None, :]
            # Two means and two sums of squares are joined without losing digits (Chan, Golub and LeVeque, 1979).
            more = (tl.minimum(pixels - start, PIXELS) * WIDTH).to(tl.float32)
            here = _of_groups(_sum_pixels(h, inside, EVEN), PADDED, LANES) / more
            apart, gap = h - here[None, :], here - mean
            squares += _of_groups(_sum_pixels(apart * apart, inside, EVEN), PADDED, LANES)
            squares += gap * gap * (count * more / (count + more))
            mean += gap * (more / (count + more))
            count += more
    rstd = tl.rsqrt(squares / count + eps)
    of_group = statistics_ptr + (image * groups + group) * 2
    tl.store(of_group, mean, mask=leads)
    tl.store(of_group + 1, rstd, mask=leads)
    scale = rstd * weight
    if WHOLE:
        z = (h - mean[None, :]) * scale[None, :] + bias[None, :]
        _write(y_ptr, offsets, inside, _activated(z, SILU), EVEN)
    else:
        for start in range(0, pixels, PIXELS):
            offsets, inside = _tile(start, pixels, channels, channel, exists, PIXELS)
            h = _read(x_ptr, offsets, inside, EVEN) + shift[None, :]
            z = (h - mean[None, :]) * scale[None, :] + bias[None, :]
            _write(y_ptr, offsets, inside, _activated(z, SILU), EVEN)


@triton.jit
def _before_silu(x, grad, less, rstd, weight, bias, SILU: tl.constexpr):
    """The normalised value and the gradient before SiLU; ``less`` is the group's mean without the shift."""
    n = (x - less[None, :]) * rstd[None, :]
    if SILU:
        z = n * weight[None, :] + bias[None, :]
        gate = tl.sigmoid(z)
        grad = grad * gate * (1 + z * (1 - gate))
    return n, grad


@triton.jit
def _norm_silu_grads_kernel(
    grad_ptr,
    x_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    g_x_ptr,
    g_shift_ptr,
    parts_ptr,
    pixels,
    channels,
    groups,
    blocks,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
):
    image, channel, group, exists, _leads = _place(channels, groups, blocks, WIDTH, PADDED, LANES)
    weight, bias = _vector(weight_ptr, channel, exists), tl.zeros((LANES,), tl.float32)
    if SILU:
        bias = _vector(bias_ptr, channel, exists)
    of_group = (image * groups + group) * 2
    less, rstd = _vector(statistics_ptr, of_group, exists), _vector(statistics_ptr, of_group + 1, exists)
    if shift_ptr is not None:
        less -= _vector(shift_ptr, image * channels + channel, exists)
    x_ptr += image * pixels * channels
    grad_ptr += image * pixels * channels
    g_x_ptr += image * pixels * channels
    of_z = tl.zeros((LANES,), tl.float32)
    of_zn = tl.zeros((LANES,), tl.float32)
    g_shift = tl.zeros((LANES,), tl.float32)
    if WHOLE:
        offsets, inside = _tile(0, pixels, channels, channel, exists, PIXELS)
        x, grad = _read(x_ptr, offsets, inside, EVEN), _read(grad_ptr, offsets, inside, EVEN)
        n, g_z = _before_silu(x, grad, less, rstd, weight, bias, SILU)
        # The gradient of a pixel that does not exist was read as 0.
        of_z = tl.sum(g_z, axis=0)
        of_zn = tl.sum(g_z * n, axis=0)
    else:
        for start in range(0, pixels, PIXELS):
            offsets, inside = _tile(start, pixels, channels, channel, exists, PIXELS)
            x, grad = _read(x_ptr, offsets, inside, EVEN), _read(grad_ptr, offsets, inside, EVEN)
            n, g_z = _before_silu(x, grad, less, rstd, weight, bias, SILU)
            of_z += tl.sum(g_z, axis=0)
            of_zn += tl.sum(g_z * n, axis=0)
    tl.store(parts_ptr + image * 2 * channels + channel, of_zn, mask=exists)
    tl.store(parts_ptr + (image * 2 + 1) * channels + channel, of_z, mask=exists)
    count = tl.cast(pixels * WIDTH, tl.float32)
    mean = _of_groups(of_z * weight, PADDED, LANES) / count
    slope = _of_groups(of_zn * weight, PADDED, LANES) / count
    if WHOLE:
        g_x = rstd[None, :] * (g_z * weight[None, :] - mean[None, :] - n * slope[None, :])
        _write(g_x_ptr, offsets, inside, g_x, EVEN)
        if g_shift_ptr is not None:
            g_shift = _sum_pixels(g_x, inside, EVEN)
    else:
        for start in range(0, pixels, PIXELS):
            offsets, inside = _tile(start, pixels, channels, channel, exists, PIXELS)
            x, grad = _read(x_ptr, offsets, inside, EVEN), _read(grad_ptr, offsets, inside, EVEN)
            n, g_z = _before_silu(x, grad, less, rstd, weight, bias, SILU)
            g_x = rstd[None, :] * (g_z * weight[None, :] - mean[None, :] - n * slope[None, :])
            _write(g_x_ptr, offsets, inside, g_x, EVEN)
            if g_shift_ptr is not None:
                g_shift += _sum_pixels(g_x, inside, EVEN)
    if g_shift_ptr is not None:
        tl.store(g_shift_ptr + image * channels + channel, g_shift, mask=exists)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _add_images_kernel(
    parts_ptr, g_weight_ptr, g_bias_ptr, n_rows, channels, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """The images' parts ``[N, 2, C]``, added in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < 2 * channels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_rows, ROWS):
        image = start + tl.arange(0, ROWS)[:, None]
        inside = (image < n_rows) & exists[None, :]
        total += tl.load(parts_ptr + image.to(tl.int64) * 2 * channels + column[None, :], mask=inside, other=0.0)
    found = tl.sum(total, axis=0)
    tl.store(g_weight_ptr + column, found, mask=column < channels)
    tl.store(g_bias_ptr + (column - channels), found, mask=(column >= channels) & exists)


def _cut(x: Tensor, groups: int) -> tuple[int, dict[str, int], dict[str, int | bool], int]:
    """Programs, arguments, constants and warps of a launch over images ``[N, P, C]``, by the rule above."""
    images, channels = x.shape[0], x.shape[1]
    pixels, width = x.numel() // (images * channels), channels // groups
    padded, size = triton.next_power_of_2(width), x.element_size()
    most = max(TILE_BYTES // triton.next_power_of_2(pixels), LEAST_BYTES)
    lanes = min(min(most, MOST_BYTES) // size, padded * triton.next_power_of_2(groups))
    lanes = max(lanes, padded)
    tile = min(triton.next_power_of_2(pixels), max(TILE_BYTES // (size * lanes), 1))
    even = pixels % tile == 0 and width == padded and channels % lanes == 0
    if not even or pixels > tile:
        tile = min(tile, max(TILE_BYTES // (2 * size * lanes), 1))
    blocks = -(-groups // (lanes // padded))
    arguments = {"pixels": pixels, "channels": channels, "groups": groups, "blocks": blocks}
    constants = {"WIDTH": width, "PADDED": padded, "LANES": lanes, "PIXELS": tile}
    constants |= {"WHOLE": pixels <= tile, "EVEN": even}
    return images * blocks, arguments, constants, max(1, min(16, tile * lanes // (32 * PER_THREAD)))


def norm_silu(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[list[Call], tuple[Tensor, Tensor]]:
    """The launch of the operator ``norm_silu`` and its outputs."""
    return _forward(x, shift, weight, bias, groups, eps, silu=True)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[list[Call], tuple[Tensor, Tensor]]:
    """The launch of the operator ``group_norm`` and its outputs."""
    return _forward(x, None, weight, bias, groups, eps, silu=False)


def norm_silu_grads(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[list[Call], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launches of the operator ``norm_silu_grads`` and its outputs; without a shift its gradient is empty."""
    g_shift = weight.new_empty(0) if shift is None else torch.empty_like(shift)
    calls, (g_x, g_weight, g_bias) = _backward(grad, x, shift, weight, bias, statistics, g_shift)
    if not calls:
        g_shift.zero_()
    return calls, (g_x, g_shift, g_weight, g_bias)


def group_norm_grads(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[list[Call], tuple[Tensor, Tensor, Tensor]]:
    """The launches of the operator ``group_norm_grads`` and its outputs."""
    return _backward(grad, x, None, weight, None, statistics, None)


def _forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[list[Call], tuple[Tensor, Tensor]]:
    if x.numel() == 0:
        return [], (torch.empty_like(x), weight.new_zeros(x.shape[0], groups, 2))
    y = torch.empty_like(x)
    statistics = torch.empty((x.shape[0], groups, 2), dtype=weight.dtype, device=weight.device)
    programs, arguments, constants, warps = _cut(x, groups)
    tensors = {"x_ptr": x, "shift_ptr": shift, "weight_ptr": weight, "bias_ptr": bias, "y_ptr": y}
    tensors |= {"statistics_ptr": statistics}
    constants["SILU"] = silu
    call = Call(_norm_silu_kernel, (programs,), {**tensors, **arguments, "eps": eps}, constants, warps)
    return [call], (y, statistics)


def _backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    g_shift: Tensor | None,
) -> tuple[list[Call], tuple[Tensor, Tensor, Tensor]]:
    """Launches and gradients in the images, the weight and the bias; without a ``bias`` there is no SiLU."""
    images, channels = x.shape[:2]
    make = torch.zeros_like if x.numel() == 0 else torch.empty_like
    results = g_x, g_weight, g_bias = make(x), make(weight), make(weight)
    if x.numel() == 0:
        return [], results
    programs, arguments, constants, warps = _cut(x, statistics.shape[1])
    parts = torch.empty((images, 2, channels), dtype=weight.dtype, device=weight.device)
    tensors = {"grad_ptr": grad, "x_ptr": x, "shift_ptr": shift, "weight_ptr": weight, "bias_ptr": bias}
    tensors |= {"statistics_ptr": statistics, "g_x_ptr": g_x, "parts_ptr": parts}
    tensors["g_shift_ptr"] = None if shift is None else g_shift
    constants["SILU"] = bias is not None
    adding = {"parts_ptr": parts, "g_weight_ptr": g_weight, "g_bias_ptr": g_bias, "n_rows": images}
    return [
        Call(_norm_silu_grads_kernel, (programs,), {**tensors, **arguments}, constants, warps),
        Call(
            _add_images_kernel,
            (-(-2 * channels // COLUMNS),),
            {**adding, "channels": channels},
            {"COLUMNS": COLUMNS, "ROWS": ROWS},
            4,
        ),
    ], results
