"""The GPU suite: ``python -m bench.gpu``; ``__main__`` has the sections, one process each."""
