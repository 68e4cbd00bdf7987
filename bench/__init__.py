"""Benchmarks: they time, the tests never do."""
