"""Compares two results files, fails on a regression: ``python -m bench.compare_results OLD.json NEW.json --ratio 1.2``.

A case is a regression where our time grew to more than ``--ratio`` times the old one. ``--by time`` compares
milliseconds, for two runs on one machine in one state. ``--by peers`` compares our time divided by the other ways' of
the same case in the same run (the geometric mean over the ways that both files have), which a slower machine or a busy
neighbour moves little. A case that is no longer there fails too. The exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from realuid_fast.errors import UserError

from . import report
from .report import Row


@dataclass(frozen=True)
class Verdict:
    """One case of the old file, with the new value divided by the old; None if the case is gone or has no peers."""

    name: str
    ratio: float | None
    failed: bool
    text: str


def verdicts(old: Sequence[Row], new: Sequence[Row], ratio: float, by: str = "time") -> list[Verdict]:
    """Every case of ``old``, in order, judged against ``new``.

    Raises:
        UserError: a ratio below 1, or an old file without a row of ours.
    """
    if not ratio >= 1:
        raise UserError(f"--ratio must be at least 1, got {ratio:g}")
    ours = {(*report.identity(row), row["way"]): row for row in old if row["ours"]}
    if not ours:
        raise UserError("the old file has no row of realuid_fast")
    return [_verdict(row, old, new, ratio, by) for row in ours.values()]


def _verdict(was: Row, old: Sequence[Row], new: Sequence[Row], ratio: float, by: str) -> Verdict:
    case, shape, kind, threads = report.identity(was)
    name = ", ".join(filter(None, (case, shape, kind, f"{threads} threads" if threads != 1 else "")))
    ways_then, ways_now = (_ways(rows, was) for rows in (old, new))
    now = ways_now.get(was["way"])
    if now is None:
        return Verdict(name, None, True, "gone from the new file")
    grown = now["median_ms"] / was["median_ms"]
    text = f"{report.number(was['median_ms'])} ms, now {report.number(now['median_ms'])} ms"
    if by == "peers":
        shared = [way for way, row in ways_then.items() if way in ways_now and not row["ours"]]
        if not shared:
            return Verdict(name, None, False, "no other way in both files")
        peers = math.prod(ways_now[way]["median_ms"] / ways_then[way]["median_ms"] for way in shared)
        grown /= peers ** (1 / len(shared))
        text += f", beside {len(shared)} other ways"
    return Verdict(name, grown, grown > ratio, f"{grown:.2f} times: {text}")


def _ways(rows: Sequence[Row], like: Row) -> Mapping[str, Row]:
    """The ways of computing the same case as the row ``like``."""
    wanted = report.identity(like)
    return {row["way"]: row for row in rows if report.identity(row) == wanted}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare_results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="results to compare with")
    parser.add_argument("new", type=Path, help="results to judge")
    parser.add_argument("--ratio", type=float, default=1.2, help="growth that fails (default 1.2)")
    parser.add_argument("--by", choices=("time", "peers"), default="time", help="what is compared (default time)")
    args = parser.parse_args(argv)
    try:
        old, new = report.read(args.old), report.read(args.new)
        if old.benchmark != new.benchmark:
            raise UserError(f"{args.old} holds '{old.benchmark}', {args.new} holds '{new.benchmark}'")
        found = verdicts(old.rows, new.rows, args.ratio, args.by)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machines = [results.machine.get("processor") for results in (old, new)]
    if args.by == "time" and machines[0] != machines[1]:
        print(
            f"the machines differ ({machines[0]}, {machines[1]}): --by peers is the fairer comparison", file=sys.stderr
        )
    failed = [verdict for verdict in found if verdict.failed]
    for verdict in failed or sorted(found, key=lambda v: v.ratio or 0.0)[-1:]:
        print(f"{'FAILED' if verdict.failed else 'slowest'}: {verdict.name}: {verdict.text}")
    print(f"{len(failed)} of {len(found)} cases failed at the ratio {args.ratio:g}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
