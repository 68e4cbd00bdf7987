"""Describes the machine of a timing: processor, instruction set, bandwidth, versions, load."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from realuid_fast.ops import extension

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """The machine and the software, as plain values for a JSON file; bandwidth in GB/s (10^9 bytes), one thread."""
    return {
        **kind(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "copy_GBps": round(streaming_copy(2 << 28, threads=1) or 0.0, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def kind() -> dict[str, Any]:
    """Processor, instruction set and software, on which the bits of a result depend."""
    return {
        "processor": _processor(),
        "isa": extension.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": _revision(),
    }


def sentence(described: Mapping[str, Any]) -> str:
    """The machine in a line, for below a table, with the revision that ran there."""
    return (
        f"{described['processor']}, {described['threads']} thread(s) of {described['cores']} cores, "
        f"{described['isa']}, torch {described['torch']}, load average {described['load_average']} at the start, "
        f"revision {described['revision'] or 'unknown'}"
    )


def streaming_copy(size: int, repeats: int = 5, threads: int | None = None) -> float | None:
    """GB/s of reads and writes in copying ``size / 2`` bytes with streaming stores, as the kernels write.

    ``size`` is the working set in bytes, rounded to 2 MiB; the best of ``repeats`` by the wall. None where that is
    nothing, since the kernels stream larger tensors only, and without the compiled library. ``threads``: torch's where
    not given.
    """
    megabytes = round(size / 2**21)
    if extension.native is None or megabytes < 1:
        return None
    threads = torch.get_num_threads() if threads is None else threads
    return float(extension.native.bandwidth(megabytes=megabytes, repeats=repeats, threads=threads)["copy"])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
