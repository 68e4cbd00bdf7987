"""Runs the Triton kernels' emitted PTX against the float64 formulas; a script, run by test_executed.py.

    python executed.py TARGET SET         TARGET: sm_80, sm_90 or sm_100; SET: short or full

Prints one line of JSON a case, as ``agreement`` does, and last how much was executed. It ends with an error at the
first access that no kernel may make.
"""

from __future__ import annotations

import gc
import json
import sys

import agreement
import large
import torch
from ptx.launch import Executor, watched

from realuid_fast.kernels import noise, tiles


def install(executor: Executor) -> None:
    """Have every launch of the package executed, with the instructions that a GPU has for the noise."""
    tiles.Call.run = lambda call: executor.run(call)
    noise._PTX = True
    agreement.surroundings = watched


def short(executor: Executor) -> None:
    """Every operator, dtype and way of cutting rows, each once; small enough for the ordinary suite."""
    agreement.check_empty()
    agreement.check_second_grid_axis()
    agreement.check_shapes(["odd_short", "overlapping_tail", "odd_row"])
    executor.order = "reverse"
    agreement.check_switches(every=7)
    executor.order = "together"
    agreement.check_optimiser_of_many()
    agreement.check_optimiser((64,), 0, 0.0, True, False, 1e-3)
    agreement.check_optimiser((1, 4099), 2, 0.9, False, True, 1e3)
    agreement.check_norms(["odd", "parts"])
    agreement.offset = 1
    agreement.check_shapes(["short"])
    agreement.check_norms(["even"])


def full(executor: Executor) -> None:
    """All that the interpreter runs too; warps in other orders; noise at its error bounds; views at odd elements."""
    agreement.check_all()
    for executor.order in ("forward", "reverse", "together"):
        agreement.check_shapes(["overlapping_tail", "odd_row"])
    for executor.error in (-1, 1, 0):
        agreement.check_normals()
    agreement.offset = 1
    agreement.check_shapes(list(agreement.SHAPES))


def main() -> None:
    target, which = sys.argv[1:]
    torch.manual_seed(0)
    executor = Executor(target)
    install(executor)
    # Imported modules are no garbage. Without this the collector looks through them again for every kernel.
    gc.freeze()
    gc.set_threshold(100_000, 50)
    {"short": short, "full": full}[which](executor)
    agreement.offset = 0
    large.check(executor, dims=(3072,) if which == "short" else (3072, 1027, 60))
    if which == "full":
        large.check_optimiser(executor)
    print(json.dumps({"kernels": len(executor.kernels), **executor.counts}))


if __name__ == "__main__":
    sys.exit(main())
