"""How a tensor of rows is cut into tiles, and the device functions that read, write and sum one tile.

A launch sees ``[R, D]`` in memory order. The rule, in closed form, no autotuning:

- ``D >= 512``: a program works inside one row on ``BLOCK_D`` elements, the largest of 2048, 1024 and 512 that makes
  the last tile of a row overlap the one before by at most 1/16 of the row (512 if none does). The last tile is moved
  back to end with its row, so that every read is whole and unmasked. What it repeats is summed and written by the tile
  before alone: the compiler may compute an element by other instructions in another place of a tile, and two programs
  that wrote it could differ in its last bit. If noise is drawn and ``D`` is no multiple of 4, tiles begin at multiples
  of 4 of the noise instead, reads and writes are masked, and up to three elements at either end are not the row's.
- ``D < 512``: a program works on ``ROWS = 2048 / BLOCK_D`` whole rows, ``BLOCK_D`` the power of two from ``D`` up,
  under a mask of the rows and, where ``BLOCK_D`` is not ``D``, of the columns.

Nothing that is compiled depends on how many rows there are, so that a last, smaller batch compiles nothing.

A thread always has 16 elements: enough to spread the cost of a program over, few enough to stay in registers.
``ALIGN``, the largest power of two up to 16 that divides ``D``, tells the compiler how wide an access may be.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accesses import keep_answers
from .columns import WIDTH

TILE = 2048
PER_THREAD = 16
# The largest second axis of a grid. More rows are spread over the third axis too.
GRID_ROWS = 65535
# Arguments of the kernels that count rows: no launch is compiled for a value of theirs.
ROW_COUNTS = ("n_rows", "n_gen", "noise_rows")


class Tiling(NamedTuple):
    """Grid, constants and warps of a launch over ``[R, D]``, and how many partial sums a row gets."""

    grid: tuple[int, int, int]
    constants: dict[str, Any]
    warps: int
    blocks: int


class Call(NamedTuple):
    """One complete kernel launch. The ahead-of-time gate compiles from it exactly what a GPU would run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int

    def run(self) -> Any:
        """Launch the kernel, and return what Triton compiled for it."""
        return self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps)

    def trace(self) -> None:
        """Put the launch into the graph that torch.compile is tracing."""
        keep_answers()
        traceable = torch.library.wrap_triton(self.kernel)
        traceable[self.grid](**self.arguments, **self.constants, num_warps=self.warps)


def tiling(rows: int, dim: int) -> Tiling:
    """The tiling of ``[rows, dim]``, both at least 1, by the rule above."""
    align = math.gcd(dim, 16)
    if dim >= 512:
        # A tile of noise may begin up to three elements early (:func:`place`), and the last one has to reach the end.
        reach = dim + 3 if align < 4 else dim
        fits = (block for block in (2048, 1024) if block <= dim and -reach % block <= dim // 16)
        block_d, tile_rows = next(fits, 512), 1
        blocks = -(-reach // block_d)
        even = dim % block_d == 0
        grid = (blocks, *over_two_axes(rows))
    else:
        block_d = max(4, triton.next_power_of_2(dim))
        tile_rows, blocks = TILE // block_d, 1
        even = dim == block_d
        grid = (-(-rows // tile_rows), 1, 1)
    constants = {"ALIGN": align, "ROWS": tile_rows, "BLOCK_D": block_d, "EVEN": even}
    return Tiling(grid, constants, block_d * tile_rows // (32 * PER_THREAD), blocks)


def over_two_axes(rows: int) -> tuple[int, int]:
    """The second and third axis of a grid over rows, chosen so that as few programs as possible have no row."""
    layers = -(-rows // GRID_ROWS)
    return -(-rows // layers), layers


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context that makes the tensors' device the current one; on CPU, under the interpreter, it does nothing."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@triton.jit
def single(number):
    """A launch's number in float32, as Triton takes it. Code that torch.compile wrote hands it over in float64."""
    return tl.cast(number, tl.float32)


@triton.jit
def row_length(units, ALIGN: tl.constexpr, ROWS: tl.constexpr):
    """Elements of a row, in 64 bits if it may be long: 2^31 elements do not fit into 32 bits, though their units do."""
    if ROWS == 1:
        units = tl.cast(units, tl.int64)
    return units * ALIGN


@triton.jit
def grid_row():
    """The program's number on the grid's second and third axis together."""
    return tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)


@triton.jit
def noise_row(row, noise_rows, SHARED: tl.constexpr):
    """The row whose noise ``row`` has (``SHARED`` as of :func:`noise.noise_constants`)."""
    if SHARED == 1:
        row = tl.where(row >= noise_rows, row - noise_rows, row)
    elif SHARED == 2:
        # 64-bit division costs a hundred instructions.
        row = (row.to(tl.uint32) % noise_rows.to(tl.uint32)).to(tl.int64)
    return row


@triton.jit
def place(
    n_rows,
    units,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    noise_rows=0,
    KEYED: tl.constexpr = False,
    SHARED: tl.constexpr = 0,
):
    """The program's place: row, first element, offsets from it, mask of elements to read, mask to sum, first column.

    Inside a row ``row`` is a scalar and the rest ``[BLOCK_D]``, and so is the mask of elements to read if all exist.
    Over short rows they are ``[ROWS, 1]`` and ``[ROWS, BLOCK_D]``. What to sum is also what to write. A call that draws
    noise gives the last three arguments.
    """
    dim = row_length(units, ALIGN, ROWS)
    if ROWS == 1:
        # The third axis can overshoot; the last row is then written again, by the same instructions.
        row = tl.minimum(grid_row(), n_rows - 1)
        first = tl.program_id(0).to(tl.int64) * BLOCK_D
        offsets = tl.arange(0, BLOCK_D)
        inside = row < n_rows
        if EVEN:
            begin = first
            fresh = inside
        elif KEYED and ALIGN < 4:
            # Noise is drawn for four elements at a time. So the tile begins where four of its noise do, up to three
            # elements early, and ends up to three after its row.
            top = noise_row(row, noise_rows, SHARED) * dim
            first -= top & 3
            begin = tl.minimum(first, dim - BLOCK_D + (-(top + dim) & 3))
            inside = offsets < (dim - begin).to(tl.int32)
            fresh = inside & (offsets >= (tl.maximum(first, 0) - begin).to(tl.int32))
        else:
            # ALIGN divides both arguments of the minimum. The compiler cannot see that, so it is told.
            begin = tl.multiple_of(tl.minimum(first, dim - BLOCK_D), ALIGN)
            fresh = offsets >= (first - begin).to(tl.int32)
        start = tl.multiple_of(row * dim + begin, ALIGN)
    else:
        local = tl.arange(0, ROWS)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        top = tl.program_id(0).to(tl.int64) * ROWS
        row = top + local
        offsets = local * dim + d
        inside = row < n_rows
        if not EVEN:
            inside = inside & (d < dim)
        fresh = inside
        start = tl.multiple_of(top * dim, ALIGN)
        begin = tl.full((), 0, tl.int64)
    return row, start, offsets, inside, fresh, begin


@triton.jit
def column(coef_ptr, row, n_rows, J: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Coefficient ``J`` of the program's row or rows."""
    if ROWS == 1:
        value = tl.load(coef_ptr + row * WIDTH + J)
    else:
        value = tl.load(coef_ptr + row * WIDTH + J, mask=row < n_rows, other=0.0)
    return value


@triton.jit
def row_number(pointer, row, n_rows, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """The entries of a vector ``[R]`` for the program's row or rows."""
    if ROWS == 1:
        value = tl.load(pointer + row)
    else:
        value = tl.load(pointer + row, mask=row < n_rows, other=0.0)
    return value


@triton.jit
def guide(conditional, uncond_ptr, scale, start, offsets, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A tile of the teacher with guidance, ``u + scale (c - u)``."""
    u = read(uncond_ptr, start, offsets, inside, ROWS, EVEN)
    return u + scale * (conditional - u)


@triton.jit
def read(pointer, start, offsets, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A tile of storage in float32."""
    if ROWS == 1 and not inside.type.is_block():
        value = tl.load(pointer + start + offsets)
    else:
        value = tl.load(pointer + start + offsets, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def read_where(wanted, pointer, start, offsets, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A tile in float32. If the row's ``wanted`` is false, memory is not read and the tile is zeros."""
    if ROWS > 1:
        mask = wanted & inside
    elif inside.type.is_block():
        mask = tl.where(wanted, inside, False)
    else:
        mask = wanted
    return tl.load(pointer + start + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(pointer, start, offsets, fresh, value, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Store a tile's fresh elements, rounded to the storage type."""
    value = value.to(pointer.dtype.element_ty)
    if ROWS == 1 and EVEN:
        tl.store(pointer + start + offsets, value)
    else:
        tl.store(pointer + start + offsets, value, mask=fresh)


@triton.jit
def write_sum(partial_ptr, row, n_rows, fresh, value, weight, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Store the tile's sum, times the row's weight, in its place in ``partial``, ``[R, blocks]``."""
    if not EVEN:
        value = tl.where(fresh, value, 0.0)
    if ROWS == 1:
        tl.store(partial_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(value) * weight)
    else:
        total = tl.sum(value, axis=1, keep_dims=True) * weight
        tl.store(partial_ptr + row, total, mask=row < n_rows)
