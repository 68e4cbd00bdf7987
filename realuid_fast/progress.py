"""Progress bars that suit a terminal and a log file alike."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from .extras import extra

with extra():
    from tqdm import tqdm


def bar(total: int, unit: str, shown: bool = True, **settings: Any) -> tqdm[Any]:
    """A bar on stderr; where that is no terminal, it writes a line every 15 seconds."""
    pause = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, unit=unit, disable=not shown, mininterval=pause, dynamic_ncols=True, **settings)


@contextlib.contextmanager
def counting(net: nn.Module, progress: tqdm[Any]) -> Iterator[None]:
    """Move ``progress`` on by a batch's size with every evaluation of ``net``."""

    def count(_: nn.Module, __: Any, out: Any) -> None:
        progress.update(len(out))

    hook = net.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
