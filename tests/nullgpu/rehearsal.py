"""Rehearses ``python -m bench.gpu`` on the null GPU, whole: ``make nullgpu-rehearsal`` writes gpu_rehearsal.md.

It is the same program in the same sections with the same limits. The clock is the host's: a section's seconds are what
the device's time comes on top of, and its milliseconds are those of launching. Kernels are compiled as for a GPU. Tests
run to their end, because what they compare are numbers that nobody computed; their time is what is looked for.
"""

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

from bench import report
from bench.gpu import __main__ as suite
from bench.gpu import device as clock

from .device import PRELOADED

OUT = Path("build") / "gpu_rehearsal"
SAID = re.compile(r"^=+ (.*) in [\d.]+s.*=+$", re.MULTILINE)
run_tests = suite.tests


class Host(clock.Cuda):
    """The null GPU by the host's clock, because an event's time is always 1 ms there."""

    def _events(self, function, rounds):
        taken = []
        for _ in range(rounds):
            begun = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - begun))
        return taken

    def spans(self, function, calls, rounds):
        def call():
            for _ in range(calls):
                function()

        return median(self._events(call, rounds)) / calls


def tests(dry, seconds, out, name):
    """How the tests ended: how many failed, where they came to their end."""
    ended = run_tests(dry, seconds, out, name)
    said = SAID.findall((out / f"{name}.tests.log").read_text())
    return ended | ({"tests": f"came to its end: {said[-1]}"} if said else {})


def table(content):
    """The time that each section took, and how many of its rows were measured."""
    measured = Counter(row["section"] for row in content["rows"] if "left_out" not in row)
    planned = Counter(row["section"] for row in content["rows"])
    cells = []
    for name, state in content["sections"].items():
        rows = f"{measured[name]} of {planned[name]}" if planned[name] else ""
        cells.append([name, report.number(content["seconds"].get(name)), rows, state])
    described = content["machine"]
    versions = f"torch {described['torch']}, triton {described['triton']}, {described['threads']} thread"
    made = report.markdown(["section", "host, s", "rows measured", "how it ended"], cells)
    return f"{made}\n`make nullgpu-rehearsal` at revision {described['revision']}, {versions}."


def main(argv):
    """Run ``bench.gpu`` with the arguments, each of its sections by this module too."""
    assert PRELOADED
    suite.COMMAND = [sys.executable, "-m", "tests.nullgpu.rehearsal"]
    suite.PYTEST = [*(each for each in suite.PYTEST if "maxfail" not in each), "-p", "tests.nullgpu.device"]
    suite.Cuda, suite.tests = Host, tests
    return suite.main(argv)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(main(sys.argv[1:]))
    main(["--out", str(OUT)])
    said = table(json.loads((OUT / "gpu.json").read_text()))
    (report.RESULTS / "gpu_rehearsal.md").write_text(said + "\n")
    print("\n" + said)
