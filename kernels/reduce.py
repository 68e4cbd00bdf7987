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
        tl.store(rows_ptr + row, sums.to(tl.float32), mask=row < n_rows)
        total += sums
    tl.store(loss_ptr, (tl.sum(total) * inverse_count).to(tl.float32))


def finish(partial: Tensor, rows: Tensor, loss: Tensor, count: int) -> Call:
    """``rows = sum(partial, 1)`` and ``loss = sum(rows) / count``; one program, float64 sums.

    Args:
        partial: float32 ``[R, blocks]``. rows: float32 ``(R,)``, written. loss: float32 ``()``, written.
        count: the number that the sum is divided by for the mean.
    """
    n_rows, blocks = partial.shape
    chunk_b = min(1024, triton.next_power_of_2(blocks))
    # By the length of a row alone, so that another number of rows compiles nothing.
    chunk_r = TILE // chunk_b
    arguments = {
        "partial_ptr": partial,
        "rows_ptr": rows,
        "loss_ptr": loss,
        "n_rows": n_rows,
        "blocks": blocks,
        "inverse_count": 1.0 / max(count, 1),
    }
    return Call(_finish_kernel, (1,), arguments, {"CHUNK_R": chunk_r, "CHUNK_B": chunk_b}, 16)


def loss_outputs(x: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised memory for partial sums ``[R, blocks]``, rows ``(R,)`` and loss ``()``, all float32."""
    partial = torch.empty((x.shape[0], blocks), dtype=torch.float32, device=x.device)
    rows = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return partial, rows, torch.empty((), dtype=torch.float32, device=x.device)
