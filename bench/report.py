"""The one writer of results: a JSON file that :mod:`bench.compare_results` reads, and Markdown tables beside it.

A results file holds ``format``, ``benchmark``, ``machine`` (with the command), ``rows``, and what else was found. A row
is one way of computing one case, as :func:`bench.timing.measure` returns it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from realuid_fast.errors import UserError
from realuid_fast.ops import extension

from . import machine, timing

FORMAT = 1
RESULTS = Path(__file__).resolve().parent / "results"
OURS, COPIES = "realuid_fast", ("copy, Tensor.copy_", "copy, streaming stores")
ROW_KEYS: dict[str, type | tuple[type, ...]] = {"case": str, "way": str, "ours": bool, "median_ms": (int, float)}
Row = dict[str, Any]


@dataclass
class Results:
    """One run of one benchmark; ``extra`` holds its results beyond the rows."""

    benchmark: str
    machine: dict[str, Any]
    rows: list[Row]
    extra: dict[str, Any] = field(default_factory=dict)


def parser(module: str, text: str | None, seconds: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have; ``seconds`` says what ``--seconds`` limits."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer cases, less time for each")
    made.add_argument("--seconds", type=float, help=seconds)
    made.add_argument("--only", default="", help="only what has this in its name")
    made.add_argument("--out", type=_folder, default=RESULTS, help="folder for the results (default bench/results)")
    return made


def threads(text: str) -> int:
    """A number of threads from a command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def seconds(args: argparse.Namespace, usual: float, quick: float) -> float:
    """``--seconds``, or the usual value of a full or a quick run."""
    return args.seconds if args.seconds is not None else quick if args.quick else usual


def _folder(text: str) -> Path:
    """A folder that can be written, made if need be. It is tried before the benchmark's minutes, not after them."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{folder} cannot be written: {error.strerror or error}") from None


def start(module: str, argv: Sequence[str] | None, threads: int) -> dict[str, Any]:
    """Set the process up as every benchmark wants it, and describe the machine and the command for the results."""
    torch.set_num_threads(threads)
    described = machine.describe()
    extension.keep_freed_memory()
    return described | {"clock": timing.clock_name(), "command": _command(module, argv)}


def _command(module: str, argv: Sequence[str] | None) -> str:
    """The command that was run, without the folder it wrote to."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return shlex.join(["python", "-m", module, *words])


def named(benchmark: str, threads: int) -> str:
    """The name of a benchmark's files: on one thread its own."""
    return benchmark if threads == 1 else f"{benchmark}_{threads}_threads"


def write(results: Results, folder: Path, tables: Mapping[str, str]) -> None:
    """``<benchmark>.json`` and ``<name>.md`` for every table in ``folder``."""
    content = {
        "format": FORMAT,
        "benchmark": results.benchmark,
        "machine": results.machine,
        "rows": results.rows,
        **results.extra,
    }
    (folder / f"{results.benchmark}.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text)


def read(file: Path) -> Results:
    """A results file, checked.

    Raises:
        UserError: there is no such file, or it is no results file of this format.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{file} is no JSON file") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("rows"), list):
        raise UserError(f"{file} is no results file of format {FORMAT}")
    for number, row in enumerate(content["rows"]):
        for key, kind in ROW_KEYS.items():
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                raise UserError(f"{file}: row {number} has no usable '{key}'")
    extra = {key: value for key, value in content.items() if key not in ("format", "benchmark", "machine", "rows")}
    return Results(content.get("benchmark", ""), content.get("machine", {}), content["rows"], extra)


def by_case(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The rows of every case by the name of the way, cases in order."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(identity(row), {})[row["way"]] = row
    return list(cases.values())


def identity(row: Row) -> tuple[Any, ...]:
    """The values that identify a row's case in every run."""
    return row["case"], shape(row), kind(row), row.get("threads", 1)


def shape(row: Row) -> str:
    return "x".join(map(str, row.get("shape", ())))


def kind(row: Row) -> str:
    """Type and, where it is not the usual one, layout."""
    layout = row.get("layout", "contiguous")
    return row.get("dtype", "float32") + ("" if layout == "contiguous" else f", {layout}")


def share_of_copy(ways: Mapping[str, Row]) -> float | None:
    """Our speed as a share of the faster copy of the same bytes; None where none was timed."""
    speeds = [ways[name]["GBps"] for name in COPIES if name in ways]
    return ways[OURS]["GBps"] / max(speeds) if speeds else None


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A Markdown table whose first ``words`` columns are text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * words + "---:|" * (len(header) - words)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Three digits, never as a power of ten; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
