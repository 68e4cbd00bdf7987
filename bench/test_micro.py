"""The micro-benchmarks under pytest-benchmark: ``pytest bench``; ``python -m bench.micro`` also has compiled peers."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from bench import micro

ENTRIES = [replace(entry, compiled=False) for entry in micro.entries(quick=True)]
# The ways of a case do not depend on its size, so they are collected on small tensors.
WAYS = [
    pytest.param(entry, way.name, id=f"{entry.call} {entry.shape} {str(entry.dtype)[6:]}: {way.name}")
    for entry in ENTRIES
    for way in micro.build(replace(entry, shape=micro.TINY)).ways
    if not way.times_itself and (entry.shape in (micro.TINY, micro.SMALL) or way.name not in micro.SMALL_PARTS)
]
built = functools.lru_cache(maxsize=1)(micro.build)


@pytest.mark.parametrize(("entry", "name"), WAYS)
def test_micro(benchmark: Any, entry: micro.Entry, name: str) -> None:
    way = next(way for way in built(entry).ways if way.name == name)
    benchmark.group = f"{entry.call} {'x'.join(map(str, entry.shape))} {str(entry.dtype)[6:]}"
    benchmark.pedantic(way.run, rounds=20, iterations=1, warmup_rounds=3)
