"""The GPU suite without a GPU: its dry run goes everywhere, and what fails or hangs costs only itself."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("bench") is None:
    pytest.skip("bench/ is not importable: run python -m pytest from the source tree", allow_module_level=True)

from bench.gpu import __main__ as suite
from bench.gpu import kernels, steps
from bench.report import OURS
from realuid_fast.train.modes import MODES


def test_dry_run_goes_everywhere_and_has_no_figures(tmp_path, capfd, monkeypatch):
    apart = suite._in_a_process

    def mostly_here(name, dry, seconds, part):
        """One section in a process of its own, as a user runs all of them: starting one takes longer than most do."""
        if name == "kernels":
            return apart(name, dry, seconds, part)
        suite.run_section(name, suite.Dry(), seconds, part)
        return "done"

    monkeypatch.setattr(suite, "_in_a_process", mostly_here)
    only = ["build", "tests", "kernels", "optimiser", "cycle-8", "variants", "compiled"]
    assert suite.main(["--dry", "--out", str(tmp_path), "--only", *only]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["dry"] is True
    assert content["machine"]["torch"]
    states = content["sections"]
    assert set(states) == {*only, "compute-sanitizer", "slow tests"}
    assert states.pop("compute-sanitizer") == states.pop("slow tests") == "left out: a dry run"
    assert "<Module test_turns.py>" in (tmp_path / "gpu.tests.log").read_text()
    # Without a compiler there is no extension, and the suite goes on.
    states.pop("build")
    assert set(states.values()) == {"done"}, states

    rows = content["rows"]
    assert not [row for row in rows if "left_out" in row]
    assert all(row[key] is None for row in rows for key in ("median_ms", "GBps", "busy_ms", "idle_share") if key in row)
    by_section = {name: {row["way"] for row in rows if row["section"] == name} for name in only[2:]}
    assert by_section["kernels"] >= {OURS, kernels.GIVEN, kernels.EAGER, kernels.COMPILED, kernels.BY_HAND}
    assert by_section["cycle-8"] == {way.name for way in steps.MAIN}
    assert by_section["variants"] == {way.name for way in steps.VARIANTS}
    assert by_section["compiled"] == {way.name for way in steps.COMPILED}
    assert len(by_section["optimiser"]) == 2
    cases = {row["case"] for row in rows if row["section"] == "kernels"}
    assert cases == {
        "copy",
        "generator loss and gradients",
        "fake loss and gradients",
        "matching loss and gradients",
        "interpolate",
        "normals",
    }
    # The summary is printed last and written.
    said = capfd.readouterr().out
    assert said.rstrip().endswith((tmp_path / "gpu.md").read_text().rstrip())
    assert "A dry run on the CPU: no figures." in said


def test_the_measured_networks_are_those_that_the_results_describe():
    """Students without dropout; and the first of our rows is a mode that a run can have."""
    config, _, teacher = steps.PROBLEMS["cifar10"].make()
    assert config.distill.dropout == 0
    said = " ".join((Path(steps.__file__).parents[1] / "results" / "README.md").read_text().split())
    assert "head width 64, dropout 0 as the recipe distils it" in said
    assert (teacher.net.num_channels, teacher.net.dim) == (128, (3, 32, 32))
    assert next(way for way in steps.MAIN if way.name.startswith(OURS)).mode == "graphs-eager"
    assert {way.mode for way in (*steps.MAIN, *steps.VARIANTS, *steps.COMPILED)} == set(MODES) - {"compiled"}


def test_a_section_that_fails_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    states = [
        suite._ended([sys.executable, "-c", "raise SystemExit('out of memory')"], 60),
        suite._ended([sys.executable, "-c", "import time; time.sleep(60)"], 1),
    ]
    assert states == ["failed with 1: out of memory", "stopped after 1 s"]

    def half_done(name, dry, seconds, part):
        row = {"case": "copy", "shape": [4096], "dtype": "uint8", "way": "Tensor.copy_", "median_ms": 1.0}
        part.write_text(json.dumps({"section": "kernels", **row}) + '\n{"section": "ker')
        return "stopped after 9 s"

    monkeypatch.setattr(suite, "_in_a_process", half_done)
    content = {"sections": {}, "rows": []}
    part = tmp_path / "rows"
    part.write_text("of an earlier run")
    suite._section(content, "kernels", True, 9, part)
    assert not part.exists()
    assert content["sections"] == {"kernels": "stopped after 9 s"}
    copied, *others = content["rows"]
    assert copied["median_ms"] == 1
    assert "left_out" not in copied
    assert others
    assert {row["left_out"] for row in others} == {"stopped after 9 s"}


def test_every_row_that_was_not_measured_has_its_reason(tmp_path):
    only = ["kernels", "cycle-256", "cycle-8"]
    assert suite.main(["--dry", "--out", str(tmp_path), "--only", *only, "--seconds", "1", "--name", "short"]) == 0
    content = json.loads((tmp_path / "short.json").read_text())
    reasons = {row["left_out"] for row in content["rows"]}
    assert reasons == {"no time, it needs 5 s"}
    assert set(content["sections"].values()) == {f"left out: {reason}" for reason in reasons}
    assert set(content["seconds"]) == set(only)
    ways = [row["way"] for row in content["rows"] if row["section"] == "cycle-8"]
    assert ways == [way.name for way in steps.MAIN]


def test_what_is_recommended_is_measured_before_what_is_compiled(tmp_path):
    """Two sizes of every call first; whole updates with compiled networks only in the time that all others leave."""
    rows = list(kernels.planned(dry=False))
    shapes = [tuple(row["shape"]) for row in rows if row["way"] not in (kernels.BY_HAND, kernels.COMPILED)]
    assert list(dict.fromkeys(shapes))[1:3] == list(kernels.SHAPES[:2])
    first_compiled = next(i for i, row in enumerate(rows) if row["way"] == kernels.BY_HAND)
    of_two = [row for row in rows if tuple(row["shape"]) in kernels.SHAPES[:2] and row["way"] == OURS]
    assert len(of_two) == 2 * 2 * 5
    assert all(rows.index(row) < first_compiled for row in of_two)
    assert list(suite.SHARES)[-1] == "compiled"
    assert sum(suite.SHARES.values()) <= 530
    content = {"sections": {}, "rows": []}
    suite._section(content, "compiled", False, suite.COMPILING - 1, tmp_path / "rows")
    assert content["sections"]["compiled"] == "left out: no time, it needs 150 s"
    assert [row["way"] for row in content["rows"]] == [way.name for way in steps.COMPILED]


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path)])
    assert "torch finds no GPU; --dry runs the suite without one" in capsys.readouterr().err
