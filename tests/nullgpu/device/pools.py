"""Watches the memory of captures: which pool each takes, and what it allocates beside it."""

from __future__ import annotations

import weakref

import torch

from . import counts

# The graphs that were captured into each pool, by the pool's handle.
_graphs: dict[tuple[int, int], weakref.WeakSet] = {}
# The pool of every capture so far, in their order.
taken: list[tuple[int, int]] = []
_before: set[int] = set()
_begin, _end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end


def _in_use(without: tuple[int, int] | None = None) -> set[int]:
    """Addresses of the blocks in use outside the pool ``without``."""
    segments = (each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) != without)
    return {
        block["address"] for segment in segments for block in segment["blocks"] if block["state"] == "active_allocated"
    }


def _capture_begin(graph, pool=None, *arguments, **options):
    global _before
    if pool is not None and tuple(pool) in _graphs and not _graphs[tuple(pool)]:
        counts.violate("a capture takes the memory pool of graphs that are gone, whose results may be in use")
    _before = _in_use()
    _begin(graph, pool, *arguments, **options)


def _capture_end(graph):
    _end(graph)
    pool = tuple(graph.pool())
    _graphs.setdefault(pool, weakref.WeakSet()).add(graph)
    taken.append(pool)
    if added := len(_in_use(pool) - _before):
        counts.violate(f"a capture keeps {added} block(s) of memory outside its pool, which others may be given")


def install() -> None:
    """Watch every capture from now on."""
    torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end = _capture_begin, _capture_end
