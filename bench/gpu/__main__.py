"""Measures the GPU path in nine minutes: ``python -m bench.gpu``; writes gpu.json and gpu.md, prints a summary last.

Sections run in order, each in a process of its own with a time limit. What a user is told to run comes first. A row is
on disk as soon as it is measured, so a section that hangs, fails or runs out of time loses only the rest of its rows;
each of these stands in the results with the reason. Time that a section leaves over goes to the next one. ``--only``
with a longer ``--seconds`` gives long sections more time. The tests' output is beside the results, in NAME.tests.log,
NAME.sanitizer.log and NAME.slow.log.

========= ==========================================================================================
build     the C++ libraries, where they are missing
tests     those marked gpu, on several processes where pytest-xdist is installed; the kernels' smallest under
          compute-sanitizer where that is; those that compile networks
kernels   copy bandwidth; each fused call against it, the plain formulas and torch.compile of them
optimiser the optimiser step against torch's fused pieces
cycle-256 the CIFAR-10 recipe at batch 256: turns and cycles as published and as recommended, graphs of eager networks
cycle-8   the same at batch 8
variants  the recommended way with one thing changed: cuDNN's benchmark, attention, torch's layers, NCHW, no graphs
compiled  the recipe with compiled networks, only where the time for compiling them is left
tune      kernels over tile sizes; only when asked for
========= ==========================================================================================

``--dry`` runs the same code on the CPU with tiny shapes and no figures. ``make nullgpu-rehearsal`` runs all of it on a
CUDA that runs nothing (docs/without_gpu.md).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from realuid_fast.ops import extension
from realuid_fast.train import modes

from .. import machine, report
from ..report import Row
from . import kernels, steps
from .device import Cuda, Deadline, Device, Dry

Write = Callable[[Row], None]


@dataclass(frozen=True)
class Section:
    """A section: the function that measures, and its rows without figures, in the order of measuring."""

    measure: Callable[[Device, Deadline, Write], None]
    planned: Callable[[bool], Iterable[Row]]


def _updates(case: str, batch: int, ways: Sequence[steps.Way]) -> Section:
    return Section(
        functools.partial(steps.updates, case=case, batch=batch, ways=ways),
        functools.partial(steps.planned_updates, case, batch, ways),
    )


SECTIONS = {
    "kernels": Section(kernels.measure, kernels.planned),
    "optimiser": Section(steps.optimiser, steps.planned_optimiser),
    "cycle-256": _updates("update, batch 256", 256, steps.MAIN),
    "cycle-8": _updates("update, batch 8", 8, steps.MAIN),
    "variants": _updates("one thing changed, batch 256", 256, steps.VARIANTS),
    "compiled": _updates("update, batch 256", 256, steps.COMPILED),
    "tune": Section(kernels.tune, lambda dry: ()),
}
CALLS = ("kernels", "optimiser", "tune")  # the other sections measure whole updates
# Seconds of a full run; what is left over moves on. "compiled" has what all others leave.
SHARES = {
    "build": 60,
    "tests": 90,
    "kernels": 75,
    "optimiser": 20,
    "cycle-256": 90,
    "cycle-8": 60,
    "variants": 110,
    "compiled": 0,
}
# The recipe's first compiled update took 113 s of one processor core, before any kernel was compiled. Several cores
# share the kernels.
COMPILING = 150
# How a section and the tests are started in processes of their own; a rehearsal has a module of its own for either.
COMMAND = [sys.executable, "-m", "bench.gpu"]
PYTEST = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
TESTS, SANITIZED = ("tests/gpu", "tests/optim"), "tests/gpu/test_kernels.py"


def describe(device: Device, revision: str | None) -> dict[str, Any]:
    """Machine, driver and versions."""
    described = machine.describe() | {"clock": "CUDA events", "command": "python -m bench.gpu"}
    described["revision"] = revision or described["revision"]
    if isinstance(device, Cuda):
        properties = torch.cuda.get_device_properties(device.device)
        described |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_GB": round(properties.total_memory / 1e9, 1),
            "l2_MB": round(properties.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        }
    try:
        import triton

        described["triton"] = triton.__version__
    except ImportError:
        described["triton"] = None
    return described


def _answer(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run_section(name: str, device: Device, seconds: float, part: Path) -> None:
    """Measure one section in this process; every row is a line of ``part`` as soon as it is there."""
    with part.open("a") as lines:

        def write(row: Row) -> None:
            lines.write(json.dumps({"section": name, **row}) + "\n")
            lines.flush()
            print(_line(row), flush=True)

        if not device.dry:
            SECTIONS[name].measure(device, Deadline(seconds), write)
            return
        # Trace, but generate no code: that takes minutes on a CPU and is not what a GPU would run.
        compiled = functools.partial(modes.compiled, backend="eager")
        with mock.patch.object(modes, "compiled", compiled), mock.patch.object(kernels, "BACKEND", "eager"):
            SECTIONS[name].measure(device, Deadline(seconds), write)


def _line(row: Row) -> str:
    words = [row["case"], report.shape(row), row["dtype"], row["way"]]
    if "left_out" in row:
        return " | ".join([*words, f"left out: {row['left_out']}"])
    named = (("median_ms", "ms"), ("GBps", "GB/s"), ("share_of_copy", "of the copy"), ("ratio", "times realuid_fast"))
    steps_named = (("idle_share", "idle"), ("launches", "launches"))
    figures = [f"{report.number(row[key])} {unit}" for key, unit in (*named, *steps_named) if row.get(key) is not None]
    return " | ".join([*words, *figures])


def _in_a_process(name: str, dry: bool, seconds: float, part: Path) -> str:
    """Run a section apart from this process; how it ended."""
    command = [*COMMAND, "--section", name, "--seconds", f"{seconds:.0f}", "--part", str(part)]
    # The limit is longer than the section's own, because the section reads its clock only between measurements.
    return _ended([*command, *(["--dry"] if dry else [])], seconds + 15)


def _ended(
    command: Sequence[str], seconds: float, environment: dict[str, str] | None = None, log: Path | None = None
) -> str:
    """Run a command with a limit; how it ended, with the last lines where it failed.

    All it says goes to ``log``; without one its output is on ours, its errors are kept.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    with tempfile.TemporaryFile("w+") if log is None else log.open("w+") as said:
        # A session of its own, which ends with all that the command had started.
        running = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=environment,
            stdout=None if log is None else said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = running.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        if code == 0:
            return "done"
        said.seek(0)
        return f"failed with {code}: " + " / ".join(said.read().strip().splitlines()[-6:])


def build(seconds: float) -> str:
    """Build the C++ extension in place, where it is missing."""
    if extension.why_missing() is None:
        return "done: it was there"
    return _ended([sys.executable, "setup.py", "build_ext", "--inplace"], seconds)


def tests(dry: bool, seconds: float, out: Path, name: str) -> dict[str, str]:
    """Run tests/gpu: all that compile no network, the kernels' on small tensors under compute-sanitizer, the rest."""
    end = time.monotonic() + seconds
    # Most of their time is compiling kernels, on one core a process.
    parallel = ["-n", "auto", "--maxprocesses", "8"] if importlib.util.find_spec("xdist") is not None else []
    quick = [*PYTEST, *parallel, "-m", "gpu and not slow", *(["--collect-only"] if dry else []), *TESTS]
    ended = {"tests": _ended(quick, seconds, log=out / f"{name}.tests.log")}

    def then(run: list[str], log: str, needed: float, environment: dict[str, str] | None = None) -> str:
        left = end - time.monotonic()
        if dry:
            return "left out: a dry run"
        return _ended(run, left, environment, out / f"{name}.{log}.log") if left > needed else "left out: no time"

    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    ended["compute-sanitizer"] = "left out: it is not installed"
    if dry or sanitizer is not None:
        # Without torch's caching allocator every tensor is an allocation whose bounds are watched. Torch asks the
        # driver for things that it may not have: that is no error.
        watch = [str(sanitizer), "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
        small = [*watch, *PYTEST, "-x", "-m", "gpu", SANITIZED, "-k", "small"]
        ended["compute-sanitizer"] = then(small, "sanitizer", 20, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    ended["slow tests"] = then([*PYTEST, "-m", "gpu and slow", *TESTS], "slow", 60)
    return ended


def summary(content: dict[str, Any]) -> str:
    """The summary, which is printed last and written to gpu.md."""
    described = content["machine"]
    head = f"{described.get('gpu', 'no GPU')}, driver {described.get('driver')}, torch {described['torch']}"
    lines = [f"{head}, triton {described['triton']}, revision {described['revision']}", ""]
    if content["dry"]:
        lines += ["A dry run on the CPU: no figures.", ""]
    for name, state in content["sections"].items():
        seconds = content["seconds"].get(name)
        lines.append(f"- {name}: {state}" + ("" if seconds is None else f" ({seconds:.0f} s)"))
    header = ["case", "shape", "type", "way", "ms", "GB/s", "of the copy", "times realuid_fast", "call, ms", "left out"]
    keys = ("median_ms", "GBps", "share_of_copy", "ratio", "call_ms")
    plain = [row for row in content["rows"] if row["section"] in CALLS]
    cells = [
        [row["case"], report.shape(row), row["dtype"], row["way"], *_figures(row, keys), row.get("left_out", "")]
        for row in plain
    ]
    lines += ["", report.markdown(header, cells, words=4)]
    names = ["ms", "fake turn", "generator turn", "launches", "kernels", "idle share", "peak MB", "published / this"]
    turns = ("median_ms", "fake_turn_ms", "generator_turn_ms", "launches", "kernels", "idle_share", "peak_MB")
    cells = [
        [row["case"], row["way"], *_figures(row, (*turns, "published_over_this")), row.get("left_out", "")]
        for row in content["rows"]
        if row["section"] not in CALLS
    ]
    return "\n".join([*lines, report.markdown(["case", "way", *names, "left out"], cells, words=2)])


def _figures(row: Row, keys: Sequence[str]) -> list[str]:
    return [report.number(row.get(key)) for key in keys]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("OUT") or report.RESULTS)
    parser.add_argument("--out", type=Path, default=default, help="folder (default $OUT, or bench/results)")
    parser.add_argument("--only", nargs="+", choices=[*SHARES, "tune"], default=list(SHARES), help="sections to run")
    parser.add_argument("--seconds", type=float, default=530.0, help="for everything (default 530)")
    parser.add_argument("--name", default="gpu", help="name of the files (default gpu)")
    parser.add_argument("--revision", help="what is measured, where there is no git repository")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, no figures")
    parser.add_argument("--section", choices=list(SECTIONS), help="run one section in this process")
    parser.add_argument("--part", type=Path, help="where --section writes its rows")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry runs the suite without one")
    if args.section:
        if args.part is None:
            parser.error("--section needs --part")
        run_section(args.section, Dry() if args.dry else Cuda(), args.seconds, args.part)
        return 0
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"format": report.FORMAT, "benchmark": "gpu", "dry": args.dry}
    content |= {"sections": {}, "seconds": {}, "rows": []}
    content["machine"] = describe(Dry() if args.dry else Cuda(), args.revision)
    if not args.dry:
        torch.cuda.empty_cache()
    chosen = [name for name in (*SHARES, "tune") if name in args.only]
    for i, name in enumerate(chosen):
        begun = time.monotonic()
        left = args.seconds - (begun - start)
        seconds = left - sum(SHARES.get(later, 60) for later in chosen[i + 1 :])
        # Tests are to be over soon: what they leave is time for figures.
        most = SHARES[name] if name == "tests" and chosen[i + 1 :] else left
        seconds = min(left, most, max(seconds, SHARES.get(name, 60)))
        if name == "build":
            content["sections"][name] = build(seconds) if seconds > 5 else "left out: no time"
        elif name == "tests":
            content["sections"] |= tests(args.dry, seconds, args.out, args.name)
        else:
            _section(content, name, args.dry, seconds, args.out / f"{args.name}.{name}.rows")
        content["seconds"][name] = round(time.monotonic() - begun, 1)
        _compare(content["rows"])
        (args.out / f"{args.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    text = summary(content)
    (args.out / f"{args.name}.md").write_text(text)
    print("\n" + text)
    return 0


def _key(row: Row) -> tuple[Any, ...]:
    return row["case"], tuple(row["shape"]), row["dtype"], row["way"]


def _section(content: dict[str, Any], name: str, dry: bool, seconds: float, part: Path) -> None:
    """Run a section and add its rows, measured or with the reason why not."""
    part.unlink(missing_ok=True)
    needed = COMPILING if name == "compiled" and not dry else 5
    if seconds < needed:
        state = f"left out: no time, it needs {needed} s"
    else:
        state = _in_a_process(name, dry, seconds, part)
    content["sections"][name] = state
    measured = {}
    if part.exists():
        found = [json.loads(line) for line in part.read_text().splitlines() if line.endswith("}")]
        measured = {_key(row): row for row in found}
        part.unlink()
    reason = "no time in its section" if state == "done" else state.removeprefix("left out: ")
    for row in SECTIONS[name].planned(dry):
        missing = {"section": name, **row, "left_out": reason}
        content["rows"].append(measured.pop(_key(row), missing))
    content["rows"] += measured.values()


def _compare(rows: Sequence[Row]) -> None:
    """Say of every update how many times as fast it is as the published one of its batch."""
    updates = [row for row in rows if row["section"] not in CALLS]
    published = {row["shape"][0]: row["median_ms"] for row in updates if row["way"] == steps.PUBLISHED.name}
    for row in updates:
        first = published.get(row["shape"][0])
        row["published_over_this"] = first / row["median_ms"] if first and row["median_ms"] else None


if __name__ == "__main__":
    sys.exit(main())
