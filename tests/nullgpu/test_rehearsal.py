"""The benchmark of a GPU comes to its end on the null GPU, and says why of every row without a figure."""

import json

from . import rehearsal
from .alone import alone


def test_whole_updates_in_every_way_but_the_compiled(tmp_path):
    only = ["optimiser", "cycle-8", "variants"]
    # It asks for the device itself, and a process forked from one that has a device has none.
    assert alone(rehearsal.main, ["--only", *only, "--seconds", "400", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["sections"] == dict.fromkeys(only, "done")
    left_out = {row["way"]: row["left_out"] for row in content["rows"] if "left_out" in row}
    # The null GPU has no cuDNN.
    assert set(left_out) == {"attention by cuDNN"}
    assert "cuDNN" in left_out["attention by cuDNN"]
    figures = [row["median_ms"] for row in content["rows"] if row["way"] not in left_out]
    assert len(figures) == 2 + 3 + 6
    assert min(figures) > 0
    memory = [row["peak_MB"] for row in content["rows"] if "peak_MB" in row]
    assert max(memory) < 60_000
