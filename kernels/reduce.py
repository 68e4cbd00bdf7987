"""The second launch of a loss: partial sums to rows' losses and the mean, on the device, in one fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ROW_COUNTS, TILE, Call


@triton.jit(do_not_specialize=ROW_COUNTS)
def _finish_kernel(
    partial_ptr, rows_ptr, loss_ptr, n_rows, blocks, inverse_count, CHUNK_R: tl.constexpr, CHUNK_B: tl.constexpr
):
    total = tl.zeros((CHUNK_R, 1), tl.float64)
    for top in range(0, n_rows, CHUNK_R):
        row = (top + tl.arange(0, CHUNK_R)[:, None]).to(tl.int64)
        acc = tl.zeros((CHUNK_R, CHUNK_B), tl.float64)
        for left in range(0, blocks, CHUNK_B):
            block = left + tl.arange(0, CHUNK_B)[None, :]
            there = (row < n_rows) & (block < blocks)
            acc += tl.load(partial_ptr + row * blocks + block, mask=there, other=0.0).to(tl.float64)
        sums = tl.sum(acc, axis=1, keep_dims=True)
        if rows_ptr is not None:
            tl.store(rows_ptr + row, sums.to(tl.float32), mask=row < n_rows)
        total += sums
    if loss_ptr is not None:
        tl.store(loss_ptr, (tl.sum(total) * inverse_count).to(tl.float32))


def finish(partial: Tensor, rows: Tensor, loss: Tensor | None, count: int) -> Call:
    """``rows = sum(partial, 1)`` and ``loss = sum(rows) / count``; one program, float64 sums.

    Args:
        partial: float32 ``[R, blocks]``.
        rows: float32 ``(R,)``, written unless it is ``partial`` itself.
        loss: float32 ``()``, written; None where only the rows are wanted.
        count: the number that the sum is divided by for the mean.
    """
    n_rows = rows.numel()
    blocks = partial.numel() // n_rows
    chunk_b = min(1024, triton.next_power_of_2(blocks))
    # By the length of a row alone, so that another number of rows compiles nothing.
    chunk_r = TILE // chunk_b
    arguments = {
        "partial_ptr": partial,
        "rows_ptr": None if rows is partial else rows,
        "loss_ptr": loss,
        "n_rows": n_rows,
        "blocks": blocks,
        "inverse_count": 1.0 / max(count, 1),
    }
    return Call(_finish_kernel, (1,), arguments, {"CHUNK_R": chunk_r, "CHUNK_B": chunk_b}, 16)


def row_outputs(x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Uninitialised memory for partial sums ``[R, blocks]`` and rows ``(R,)``, both float32.

    A row that is one block is its own partial sum: the two are then one tensor, which the main kernel writes.
    """
    rows = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return rows if blocks == 1 else torch.empty((x.shape[0], blocks), dtype=torch.float32, device=x.device), rows


def loss_outputs(x: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`row_outputs`, and memory for the loss, float32 ``()``."""
    return *row_outputs(x, blocks), torch.empty((), dtype=torch.float32, device=x.device)
