"""The optimiser step: the gradients' global norm, then clip, Adam and every moving average in one pass.

There are three launches: sums of squares, one program that adds them up and counts the step, and the update. The update
reads on the device whether the norm is finite, how many steps were taken, and the learning rate.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import PER_THREAD, TILE, Call, row_length

# Most tensors that get a launch each. Longer lists are left to torch's foreach functions.
LAUNCHES = 4
# A program sums the squares of this many tiles.
_STEPS = 8
_WARPS = TILE // (32 * PER_THREAD)


@triton.jit
def _squares_kernel(
    grad_ptr,
    partial_ptr,
    first,
    units,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    numel = row_length(units, ALIGN, ROWS)
    offsets = tl.arange(0, BLOCK_D)
    top = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(STEPS):
        left = top + step * BLOCK_D
        mask = offsets < tl.minimum(numel - left, BLOCK_D).to(tl.int32)
        g = tl.load(grad_ptr + left + offsets, mask=mask, other=0.0)
        total += g * g
    tl.store(partial_ptr + first + tl.program_id(0), tl.sum(total))


@triton.jit
def _norm_kernel(partial_ptr, norm_ptr, step_ptr, counts_ptr, n_partial, CHUNK: tl.constexpr):
    acc = tl.zeros((CHUNK,), tl.float64)
    for left in range(0, n_partial, CHUNK):
        i = left + tl.arange(0, CHUNK)
        acc += tl.load(partial_ptr + i, mask=i < n_partial, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(acc)).to(tl.float32)
    tl.store(norm_ptr, norm)
    finite = norm < float("inf")
    tl.store(step_ptr, tl.load(step_ptr) + tl.where(finite, 1.0, 0.0))
    tl.store(counts_ptr, tl.load(counts_ptr) + 1)
    tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + tl.where(finite, 0, 1))


@triton.jit
def _correction(step, log_beta):
    """``1 - beta^step`` without cancellation: a small difference is computed from its series."""
    x = tl.maximum(step * log_beta, -100.0)
    series = 1.0 + x / 8.0
    for i in tl.static_range(6):
        series = 1.0 + x / (7.0 - i) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _adam_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    ema_ptr,
    norm_ptr,
    step_ptr,
    lr_ptr,
    counts_ptr,
    decays_ptr,
    units,
    ema_units,
    last_rate,
    sign,
    clip,
    rest1,
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    eps,
    weight_decay,
    MOMENT: tl.constexpr,
    EMAS: tl.constexpr,
    WARMUP: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    norm = tl.load(norm_ptr)
    if norm < float("inf"):
        left = tl.program_id(0).to(tl.int64) * BLOCK_D
        offsets = tl.arange(0, BLOCK_D)
        mask = offsets < tl.minimum(row_length(units, ALIGN, ROWS) - left, BLOCK_D).to(tl.int32)
        where = left + offsets
        x = tl.load(param_ptr + where, mask=mask)
        g = tl.load(grad_ptr + where, mask=mask)
        v = tl.load(exp_avg_sq_ptr + where, mask=mask)

        before = tl.load(counts_ptr) - 1
        step = tl.load(step_ptr)
        rate = tl.load(lr_ptr + tl.minimum(before, last_rate)).to(tl.float32)
        factor = tl.where((clip > 0) & (norm > clip), clip / norm, 1.0) * sign

        g = factor * g + weight_decay * x
        v = beta2 * v + (rest2 * g) * g
        tl.store(exp_avg_sq_ptr + where, v, mask=mask)
        if MOMENT:
            m = tl.load(exp_avg_ptr + where, mask=mask)
            m += rest1 * (g - m)
            tl.store(exp_avg_ptr + where, m, mask=mask)
            rate = rate / _correction(step, log_beta1)
        else:
            m = g
        x -= rate * m / (tl.sqrt(v) / tl.sqrt(_correction(step, log_beta2)) + eps)
        tl.store(param_ptr + where, x, mask=mask)

        stride = row_length(ema_units, ALIGN, ROWS)
        n = before.to(tl.float64)
        for k in tl.static_range(EMAS):
            decay = tl.load(decays_ptr + k)
            if WARMUP:
                decay = tl.minimum(decay, (1.0 + n) / (10.0 + n))
            weight = (1.0 - decay).to(tl.float32)
            row_ptr = ema_ptr + k * stride
            e = tl.load(row_ptr + where, mask=mask)
            tl.store(row_ptr + where, e + weight * (x - e), mask=mask)


def begin_step_(grads: list[Tensor], step: Tensor, counts: Tensor) -> tuple[list[Call], Tensor]:
    """The launches of the operator ``begin_step_`` for one step counter, and the norm, float32 ``()``.

    Args:
        grads: float32, each without gaps in memory. step: float32 ``()``. counts: int64 ``(2,)``.
    """
    programs = [-(-grad.numel() // (TILE * _STEPS)) for grad in grads]
    partial = torch.empty(max(sum(programs), 1), dtype=torch.float32, device=counts.device)
    norm = torch.empty((), dtype=torch.float32, device=counts.device)
    calls, first = [], 0
    for grad, count in zip(grads, programs, strict=True):
        if not count:
            continue
        align = math.gcd(grad.numel(), 16)
        arguments = {"grad_ptr": grad, "partial_ptr": partial, "first": first, "units": grad.numel() // align}
        constants = {"ALIGN": align, "ROWS": 1, "BLOCK_D": TILE, "STEPS": _STEPS}
        calls.append(Call(_squares_kernel, (count,), arguments, constants, _WARPS))
        first += count
    arguments = {
        "partial_ptr": partial,
        "norm_ptr": norm,
        "step_ptr": step,
        "counts_ptr": counts,
        "n_partial": first,
    }
    calls.append(Call(_norm_kernel, (1,), arguments, {"CHUNK": 1024}, 4))
    return calls, norm


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    norm: Tensor,
    step: Tensor,
    lr: Tensor,
    counts: Tensor,
    ema_decays: Tensor,
    clip: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    ema_warmup: bool,
) -> list[Call]:
    """The launches of the operator ``adam_``, one for each of ``params``; all float32, laid out alike, without gaps."""
    calls = []
    for i, p in enumerate(params):
        if not p.numel():
            continue
        # A pointer that the switches leave unused gets the parameter itself.
        stride = emas[i].stride(0) if emas else 0
        align = math.gcd(p.numel(), stride, 16)
        arguments = {
            "param_ptr": p,
            "grad_ptr": grads[i],
            "exp_avg_ptr": exp_avgs[i] if exp_avgs else p,
            "exp_avg_sq_ptr": exp_avg_sqs[i],
            "ema_ptr": emas[i] if emas else p,
            "norm_ptr": norm,
            "step_ptr": step,
            "lr_ptr": lr,
            "counts_ptr": counts,
            "decays_ptr": ema_decays,
            "units": p.numel() // align,
            "ema_units": stride // align,
            "last_rate": lr.numel() - 1,
            "sign": -1.0 if maximize else 1.0,
            "clip": clip,
            "rest1": 1.0 - beta1,
            "log_beta1": _log(beta1),
            "beta2": beta2,
            "rest2": 1.0 - beta2,
            "log_beta2": _log(beta2),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        constants = {
            "MOMENT": bool(exp_avgs),
            "EMAS": ema_decays.numel(),
            "WARMUP": ema_warmup,
            "ALIGN": align,
            "ROWS": 1,
            "BLOCK_D": TILE,
        }
        calls.append(Call(_adam_kernel, (-(-p.numel() // TILE),), arguments, constants, _WARPS))
    return calls


def _log(beta: float) -> float:
    # log(0) is replaced by a number whose exponential is 0 in float32: with beta = 0 nothing is left after one step.
    return math.log(beta) if beta > 0 else -1e30
