"""Times updates of a run that is planned, in batches that fit into the memory and into the time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..networks import memory
from ..settings import Config
from ..train.trainer import Trainer

if TYPE_CHECKING:
    from .plan import Plan

BOUND = 120.0  # seconds that a measurement may take; a longer one is cut down
LEAST = 3  # updates that a measurement times at least


@dataclass(frozen=True)
class Measured:
    """Updates that were timed: their number, batch and median seconds.

    ``remark`` says how and why their number or batch differs from what was asked for.
    """

    updates: int
    batch: int
    seconds: float
    remark: str = ""


def measure(plan: Plan, trainer: Callable[[int], Trainer], config: Config, steps: int, bound: float) -> Measured:
    device, parts = torch.device(config.run.device), config.run.accumulate

    def warmed(batch: int) -> Trainer:
        made = trainer(batch)
        for _ in range(1 if config.run.mode == "eager" else 4):
            made.update()
        return made

    sizes = [plan.batch]
    while sizes[-1] % (2 * parts) == 0:
        sizes.append(sizes[-1] // 2)
    free = memory.free_bytes(device)
    growing = sum(size for name, size in plan.memory.items() if name.startswith(("activations", "batch")))
    fixed = sum(plan.memory.values()) - growing
    made: Trainer | None = None
    batch, taken, why = 0, 0.0, "the batch does not fit into the free memory"

    def fits(size: int) -> bool:
        return free is None or fixed + growing * size / plan.batch <= free

    def tried(size: int) -> Trainer | None:
        # A trainer is part of reference cycles. Its memory is not free before the garbage collector has run.
        gc.collect()
        try:
            return warmed(size)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            return None

    if device.type == "cuda":
        # On a GPU every batch size is compiled and captured again, which takes minutes. So try the largest that should
        # fit first.
        for size in [size for size in sizes if fits(size)] or sizes[-1:]:
            made = tried(size)
            if made is not None:
                batch, taken = size, _timed(made, device)
                break
    else:
        # On a CPU go from the smallest batch up, as long as the next one's updates should end in time.
        for size in reversed(sizes):
            if batch and not fits(size):
                break
            if batch and 2 * taken * steps > bound:
                why = f"{steps} updates of a larger batch would take longer than {bound:g} s"
                break
            made = None
            made = tried(size)
            if made is None:
                if batch:
                    made = warmed(batch)
                break
            batch, taken = size, _timed(made, device)
    if made is None:
        raise UserError(f"updates of batch {sizes[-1]} do not fit into the memory of {device}")
    done = max(min(steps, int(bound / taken)), min(steps, LEAST))
    seconds = median(_timed(made, device) for _ in range(done))
    remarks = [f"in place of {plan.batch}: {why}; its time is taken to be {plan.batch / batch:g} times as long"]
    remarks = remarks if batch < plan.batch else []
    if done < steps:
        remarks.append(f"{done} updates in place of {steps}: more would take longer than {bound:g} s")
    return Measured(done, batch, seconds, "; ".join(remarks))


def _timed(trainer: Trainer, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    trainer.update()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
