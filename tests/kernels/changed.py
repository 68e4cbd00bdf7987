"""Changes the emitted PTX, one place at a time, and says whether the execution finds it; run by test_executed.py.

Prints one line of JSON a change: what was changed, in which kernel and place, and by what it was found.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import torch
from agreement import KEY
from executed import install
from ptx.launch import Executor, Failure, watched

from realuid_fast.kernels import reduce
from realuid_fast.ops import triton_backend

CHANGES = {
    "barrier dropped": (r"bar\.sync[^;]*;", ""),
    "store widened": (r"st\.global\.b32 (\[[^\]]*\]), \{ (%r\d+) \}", r"st.global.v2.b32 \1, { \2, \2 }"),
    "predicate turned round": (r"@(%p\d+) (?=(?:ld|st)\.global)", r"@!\1 "),
}


def rows() -> tuple[torch.Tensor, ...]:
    """Odd rows that two warps share: every access is of one element, and the loss is summed through shared memory."""
    with watched():
        x, coef = torch.linspace(-2, 2, 2 * 2047).view(2, 2047), torch.linspace(0.5, 2, 18).view(2, 9)
        coef[:, [1, 4, 7]] = 0
        return triton_backend.launcher("matching")(x, x.flip(1), None, coef, KEY, None, 2, False, True)


def sums() -> tuple[torch.Tensor, ...]:
    """Sums of more rows than one turn of the loop takes."""
    with watched():
        losses, loss = torch.empty(1100), torch.empty(())
        reduce.finish(torch.linspace(0, 1, 1100)[:, None] ** 2, losses, loss, 1100).run()
    return losses, loss


def places(text: str, pattern: str, most: int) -> list[tuple[int, str]]:
    """Texts with one place changed, spread evenly over all places, and the places' numbers."""
    found = list(re.finditer(pattern, text))
    instead = next(new for old, new in CHANGES.values() if old == pattern)
    chosen = sorted({round(i * (len(found) - 1) / max(1, most - 1)) for i in range(most)}) if found else []
    return [(i, text[: found[i].start()] + found[i].expand(instead) + text[found[i].end() :]) for i in chosen]


def outcome(call: Callable[[], tuple[torch.Tensor, ...]], want: tuple[torch.Tensor, ...]) -> str:
    """By what a wrong kernel is found, or nothing."""
    try:
        same = all(torch.equal(a, b) for a, b in zip(call(), want, strict=True))
    except (Failure, RuntimeError) as error:
        return str(error)
    return "" if same else "another result"


def main() -> None:
    for call, kernel in ((rows, "_matching_kernel"), (sums, "_finish_kernel")):
        sound = Executor()
        install(sound)
        want = call()
        (text,) = (text for text in sound.kernels if f".entry {kernel}(" in text)
        for change, (pattern, _) in CHANGES.items():
            for i, wrong in places(text, pattern, most=8):
                executor = Executor(change=lambda given, text=text, wrong=wrong: wrong if given == text else given)
                executor.texts = sound.texts
                install(executor)
                row = {"change": change, "kernel": kernel, "place": i, "found": outcome(call, want)[:200]}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
