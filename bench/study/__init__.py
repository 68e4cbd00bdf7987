"""Experiments: several runs whose ends are compared, each written to bench/results."""
