"""The micro-benchmarks under pytest-benchmark: ``pytest bench``; ``python -m bench.micro`` also has compiled peers."""

from typing import Any

import pytest

from bench import micro

WAYS = [(case, way) for case in micro.cases(compile_peers=False) for way in case.ways]


@pytest.mark.parametrize(("case", "way"), WAYS, ids=[f"{c.name} {c.shape[0]}: {w.name}" for c, w in WAYS])
def test_micro(benchmark: Any, case: micro.Case, way: micro.Way) -> None:
    benchmark.group = f"{case.name} {'x'.join(map(str, case.shape))}"
    benchmark.pedantic(way.run, rounds=20, iterations=1, warmup_rounds=3)
