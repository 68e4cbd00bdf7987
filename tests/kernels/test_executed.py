"""The PTX that Triton emits, executed on guarded memory and compared with float64; and that a wrong kernel is found.

``REALUID_FAST_FUZZ`` (``make fuzz``) runs all cases on all NVIDIA targets, the ordinary suite a short list on sm_90.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")
if importlib.util.find_spec("bench") is None:
    pytest.skip("bench/ is not importable: run python -m pytest from the source tree", allow_module_level=True)

HERE = Path(__file__).parent
FULL = "REALUID_FAST_FUZZ" in os.environ
OPS = ["interpolate", "matching", "fake", "generator", "guided_fake", "guided_generator", "mean_abs_error", "scale"]
OPS += ["begin_step_", "adam_", "large"]


def script(name: str, *words: str) -> list[dict[str, object]]:
    """The rows of JSON that a script prints. A process of its own: it replaces how the package launches kernels."""
    paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    # The compiler emits the same instructions without the places in the source, and in one thread, in less time.
    environment |= {"TRITON_DISABLE_LINE_INFO": "1", "MLIR_DISABLE_MULTITHREADING": "1"}
    command = [sys.executable, str(HERE / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("target", ["sm_90", *(["sm_80", "sm_100"] if FULL else [])])
def test_what_is_emitted_agrees_with_float64(target: str) -> None:
    *cases, counts = script("executed.py", target, "full" if FULL else "short")
    wrong = [case for case in cases if not case["error"] <= case["tolerance"]]
    assert not wrong
    ran = {str(case["case"]).split("/")[0] for case in cases}
    assert set(OPS) <= ran
    assert counts["kernels"] > 50
    assert counts["launches"] > counts["kernels"]


@pytest.mark.timeout(600)
def test_a_changed_kernel_is_found() -> None:
    """A barrier dropped, a store widened, the predicate of an access turned round: one place at a time."""
    found = script("changed.py")
    kinds = {str(row["change"]) for row in found}
    assert kinds == {"barrier dropped", "store widened", "predicate turned round"}
    missed = Counter((str(row["change"]), str(row["kernel"])) for row in found if not row["found"])
    assert not [change for change, _ in missed if change == "barrier dropped"]
    # A few changes change nothing: all threads hold a sum that one of them stores, and a thread that stores too much
    # may store the neighbour's right value afterwards.
    assert max(missed.values(), default=0) <= 2
    assert len(found) - missed.total() >= 20
