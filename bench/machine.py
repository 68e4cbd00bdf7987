"""What a timing was taken on: processor, instruction set, bandwidth, versions, load."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from realuid_fast import extension

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """The machine and the software, as plain values for a JSON file; bandwidth in GB/s (10^9 bytes), one thread."""
    bandwidth = extension.native.bandwidth(megabytes=256, repeats=5, threads=1) if extension.native else {}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": extension.isa(),
        "copy_GBps": round(bandwidth.get("copy", 0.0), 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": _revision(),
    }


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
