"""The benchmarks, without their timings: equal work of all ways, results files, comparisons, fits, command line."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("bench") is None:
    pytest.skip("the benchmarks lie in the source checkout only", allow_module_level=True)

import realuid_fast as rf
from bench import (
    compare_results,
    drop_in,
    growth,
    micro,
    optimiser,
    peers,
    plots,
    readme,
    report,
    step,
    timing,
)
from realuid_fast import cli
from realuid_fast.cli import tools
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.noise import normal

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOSSES = [call for call in micro.CALLS if "loss" in call]
UNET = {"kind": "unet", "num_channels": 8, "channel_mult": [1], "norm_groups": 4, "middle_attention": False}
TINY = step.Problem("tiny network", UNET, (1, 4, 4), distill={"batch": 4, "ema": (0.9,), "export": 0.0})


def entry(call, dtype=torch.float32, layout="contiguous"):
    return micro.Entry(call, (6, 3, 4, 4), dtype, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_peers_of_the_losses_compute_ours(name, dtype, layout):
    setting = micro.Setting(entry(name, dtype, layout))
    call = micro.CALLS[name](setting)
    # Ours draws its noise in float32 whatever the type of the samples.
    noise = call.draw() if "given" in name else normal(setting.key, call.draw().float())
    call = replace(call, draw=lambda: noise)
    loss, _, *gradients = call.ours()
    gradients = [gradient for gradient in gradients if gradient is not None]
    # Sums of some hundred terms in float32; gradients of bfloat16 are rounded to 8 bits, at most twice.
    sums = {"rtol": 1e-4, "atol": 1e-4}
    each = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-3}
    compared = [peer for peer in call.peers if peer.draws]
    assert len(compared) >= 3
    for peer in compared:
        result = peer.function(*call.inputs, noise=noise, **peer.bound)
        value, *theirs = result if isinstance(result, tuple) else (result,)
        torch.testing.assert_close(value, loss, **sums, msg=lambda m, p=peer: f"{p.name}: {m}")
        theirs = micro.runner(call, peer)() if peer.autograd else theirs
        assert len(theirs) == len(gradients)
        for mine, other in zip(gradients, theirs, strict=True):
            assert other.dtype == dtype
            torch.testing.assert_close(other, mine, **each, msg=lambda m, p=peer: f"{p.name}: {m}")


def test_the_peer_with_noise_inside_draws_and_then_does_the_same():
    setting = micro.Setting(entry(LOSSES[0]))
    inputs = micro.CALLS[LOSSES[0]](setting).inputs
    torch.manual_seed(0)
    drawn = torch.randn_like(inputs[2])
    torch.manual_seed(0)
    inside = peers.generator_noise_inside(*inputs, coef=setting.coef)
    torch.testing.assert_close(inside, peers.generator_table(*inputs, drawn, setting.coef), rtol=0, atol=0)


def test_peers_of_interpolate_compute_ours():
    setting = micro.Setting(entry("interpolate, noise drawn"))
    call = micro.CALLS["interpolate, noise drawn"](setting)
    noise = normal(setting.key, call.draw())
    for peer in call.peers:
        # One rounding more or less of numbers near one.
        result = peer.function(*call.inputs, noise=noise, **peer.bound)
        torch.testing.assert_close(result, call.ours(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("entry", drop_in.ENTRIES, ids=lambda entry: entry.name)
def test_drop_in_losses_and_their_sources_formulas_agree(entry):
    for gap in entry.gaps:
        found = drop_in.errors(entry.ours, entry, drop_in.tensors(entry, gap, torch.float32, (6, 3, 4, 4)))
        assert max(found.values()) < 1e-6


def test_the_committed_drop_in_losses_keep_their_digits():
    rows = report.read(report.RESULTS / "drop_in.json").rows
    ours = [row for row in rows if row["ours"]]
    assert {row["loss"] for row in ours} == {entry.name for entry in drop_in.ENTRIES}
    assert all(row["gradient_error"] < (1e-6 if row["dtype"] == "float32" else 0.002) for row in ours)
    # The figures that the README quotes.
    name, text = drop_in.ENTRIES[0].name, " ".join((report.RESULTS.parent.parent / "README.md").read_text().split())
    at = [row for row in rows if (row["loss"], row["gap"], row["dtype"]) == (name, 0.01, "bfloat16")]
    errors = {row["way"]: f"{row['gradient_error']:.1%}" for row in at}
    assert f"{errors[report.OURS]} off, and {errors[drop_in.SOURCE]} by the source's formula" in text


@pytest.mark.parametrize("name", micro.CALLS)
def test_bytes_are_the_budget(name):
    """One-sided path, noise from a key, per element: generator 3 reads and 3 writes, fake and matching 2 and 1."""
    tensors = {"generator": 6, "fake": 3, "matching": 3, "interpolate": 2, "normals": 1}[name.split()[0].rstrip(",")]
    tensors += "noise given" in name
    for dtype in (torch.float32, torch.bfloat16):
        assert micro.build(entry(name, dtype)).bytes == tensors * 6 * 48 * dtype.itemsize


def test_the_cases_cover_sizes_types_layouts_and_compiled_peers():
    cases = list(micro.entries())
    sizes = {torch.Size(case.shape).numel() for case in cases}
    assert min(sizes) == 8
    assert max(sizes) == 2**26
    assert (8, 1, 8, 8) in {case.shape for case in cases}
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
    assert {case.layout for case in cases} == set(LAYOUTS.values())
    assert {case.call for case in cases if case.compiled} == set(micro.CALLS)
    assert len(cases) == len(set(cases))
    assert set(micro.entries(quick=True)) != set(cases)


def fixed(name, ms, ours=False):
    return timing.Way(name, lambda: ms / 1000, ours=ours, times_itself=True)


def test_a_row_is_medians_ratio_and_speed():
    case = timing.Case("sum", (2, 3), [fixed("ours", 2.0, ours=True), fixed("other", 5.0)], bytes=10**6)
    mine, other = timing.measure(case, rounds=3)
    assert mine["median_ms"] == pytest.approx(2.0)
    assert mine["GBps"] == pytest.approx(0.5)
    assert (mine["ratio"], other["ratio"]) == (1.0, pytest.approx(2.5))
    assert (mine["case"], mine["shape"], mine["dtype"], mine["ours"], other["ours"]) == (
        "sum", [2, 3], "float32", True, False,
    )  # fmt: skip


@pytest.mark.parametrize(("seconds", "expected"), [(float("inf"), 1 + 7), (0.0, 1 + 3)])
def test_long_calls_are_made_once_a_round_until_the_time_is_up(seconds, expected):
    calls = []
    way = timing.Way("ours", lambda: calls.append(0), ours=True)
    timing.measure(timing.Case("calls", (), [way]), rounds=7, calls=1, seconds=seconds, least=3)
    assert len(calls) == expected


def test_micro_writes_what_the_tools_read(tmp_path, capsys):
    words = ["--quick", "--only", "normals", "--seconds", "0", "--no-compile", "--out", str(tmp_path)]
    assert micro.main(words) == 0
    results = report.read(tmp_path / "micro.json")
    assert results.machine["command"] == "python -m bench.micro --quick --only normals --seconds 0 --no-compile"
    assert {row["case"] for row in results.rows} == {"normals"}
    assert (tmp_path / "micro_all.md").read_text() in capsys.readouterr().out
    assert "bfloat16" not in (tmp_path / "micro.md").read_text()
    for name in ("micro_time.png", "micro_share.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert compare_results.main([str(tmp_path / "micro.json")] * 2) == 0


def test_share_is_of_the_faster_copy():
    rows = {micro.OURS: {"GBps": 12.0}, micro.COPIES[0]: {"GBps": 15.0}, micro.COPIES[1]: {"GBps": 24.0}}
    assert report.share_of_copy(rows) == 0.5
    assert report.share_of_copy({micro.OURS: {"GBps": 12.0}}) is None


def test_the_optimisers_benchmark_writes_what_the_tools_read(tmp_path, capsys):
    assert optimiser.bytes_moved(10, 3) == 4 * (10 + 60 + 50)
    assert optimiser.main(["--quick", "--only", "0 averages", "--seconds", "0", "--out", str(tmp_path)]) == 0
    results = report.read(tmp_path / "optimiser.json")
    assert {row["case"] for row in results.rows} == {optimiser.name(0)}
    assert {row["way"] for row in results.rows} >= set(optimiser.WAYS)
    assert f"**{optimiser.name(0)}**" in capsys.readouterr().out


def row(case, ms, way="realuid_fast", **more):
    return {"case": case, "way": way, "ours": way == "realuid_fast", "median_ms": ms, "shape": [4], **more}


def write(folder, name, rows, benchmark="micro", **machine):
    report.write(report.Results(benchmark, machine, rows, {"more": [1]}), folder, {})
    return str((folder / f"{benchmark}.json").rename(folder / name))


def test_results_survive_the_file(tmp_path):
    rows = [row("a", 1.5), row("a", 3.0, "eager", GBps=2.0)]
    read = report.read(Path(write(tmp_path, "r.json", rows, processor="P")))
    assert read == report.Results("micro", {"processor": "P"}, rows, {"more": [1]})
    for content, sentence in (
        ("{", "no JSON"),
        ("[]", "no results file"),
        ('{"rows": []}', "no results file of format 1"),
        ('{"format": 1, "rows": [{"case": "a"}]}', "row 0 has no usable 'way'"),
        ('{"format": 1, "rows": [{"case": "a", "way": "b", "ours": true, "median_ms": "1"}]}', "'median_ms'"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=sentence):
            report.read(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"gone\.json cannot be read: No such file"):
        report.read(tmp_path / "gone.json")


def test_comparison_by_time():
    old = [row("a", 1.0), row("b", 1.0), row("c", 1.0), row("a", 9.0, "eager"), row("b", 1.0, threads=2)]
    new = [row("a", 1.19), row("b", 1.21), row("new", 5.0), row("a", 99.0, "eager"), row("b", 0.5, threads=2)]
    found = {verdict.name: verdict for verdict in compare_results.verdicts(old, new, 1.2)}
    assert {name: verdict.failed for name, verdict in found.items()} == {
        "a, 4, float32": False,
        "b, 4, float32": True,
        "c, 4, float32": True,
        "b, 4, float32, 2 threads": False,
    }
    assert found["b, 4, float32"].ratio == pytest.approx(1.21)
    assert "gone" in found["c, 4, float32"].text


def test_comparison_by_peers_leaves_the_machine_out():
    old = [row("a", 1.0), row("a", 4.0, "eager"), row("a", 2.0, "compiled")]
    slower_machine = [row("a", 3.0), row("a", 12.0, "eager"), row("a", 6.0, "compiled")]
    (verdict,) = compare_results.verdicts(old, slower_machine, 1.2, by="peers")
    assert verdict.ratio == pytest.approx(1.0)
    assert not verdict.failed
    slower_code = [row("a", 3.9), row("a", 12.0, "eager"), row("a", 6.0, "other")]
    (verdict,) = compare_results.verdicts(old, slower_code, 1.2, by="peers")
    assert verdict.ratio == pytest.approx(1.3)
    assert verdict.failed
    (alone,) = compare_results.verdicts(old, [row("a", 9.0)], 1.2, by="peers")
    assert (alone.ratio, alone.failed) == (None, False)


def test_comparison_refuses(tmp_path):
    with pytest.raises(UserError, match=r"--ratio must be at least 1, got 0\.5"):
        compare_results.verdicts([row("a", 1.0)], [], 0.5)
    with pytest.raises(UserError, match="--ratio"):
        compare_results.verdicts([row("a", 1.0)], [], float("nan"))
    with pytest.raises(UserError, match="no row of realuid_fast"):
        compare_results.verdicts([row("a", 1.0, "eager")], [], 1.2)


def run(*words):
    """The exit code of a command."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def test_comparison_on_the_command_line(tmp_path, capsys):
    old = write(tmp_path, "old.json", [row("a", 1.0), row("b", 1.0)], processor="P")
    new = write(tmp_path, "new.json", [row("a", 1.5), row("b", 1.0)], processor="Q")
    assert run("bench", "compare", old, old) == 0
    assert "0 of 2 cases failed at the ratio 1.2" in capsys.readouterr().out
    assert run("bench", "compare", old, new) == 1
    said = capsys.readouterr()
    assert "FAILED: a, 4, float32: 1.50 times: 1 ms, now 1.5 ms" in said.out
    assert "FAILED: b" not in said.out
    assert "the machines differ (P, Q)" in said.err
    assert run("bench", "compare", old, new, "--ratio", 1.6) == 0
    assert run("bench", "compare", old, tmp_path / "gone.json") == 2
    assert "error: " in capsys.readouterr().err
    other = write(tmp_path, "step.json", [row("a", 1.0)], benchmark="step")
    assert run("bench", "compare", old, other) == 2
    assert "old.json holds 'micro'" in capsys.readouterr().err


def test_bench_on_the_command_line(tmp_path, monkeypatch, capsys):
    assert run("bench", "--help") == 0
    assert "compare" in capsys.readouterr().out
    for which in ("micro", "optimiser", "step", "growth"):
        assert run("bench", which, "--help") == 0
        assert f"python -m bench.{which}" in capsys.readouterr().out
        assert run("bench", which, "--threads", "0", "--out", tmp_path) == 2
        assert "--threads: must be a whole number of at least 1, got 0" in capsys.readouterr().err
        assert run("bench", which, "--only", "nonsense", "--out", tmp_path) == 2
        assert "'nonsense' in its name" in capsys.readouterr().err
        (tmp_path / "file").touch()
        assert run("bench", which, "--out", tmp_path / "file" / "under") == 2
        assert "under cannot be written" in capsys.readouterr().err
    assert run("bench", "compare", "--help") == 0
    assert run("bench", "dance") == 2

    monkeypatch.chdir(tmp_path)
    seen = []
    for which in ("micro", "optimiser", "step", "growth"):
        monkeypatch.setattr(f"bench.{which}.main", lambda options, name=which: seen.append((name, *options)))
    assert run("bench") == 0
    assert seen == [(name, "--out", "runs/bench") for name in ("micro", "optimiser", "step", "growth")]
    seen.clear()
    assert run("bench", "step", "--quick", "--out", "here") == 0
    assert seen == [("step", "--quick", "--out", "here")]

    capsys.readouterr()
    monkeypatch.setattr(tools, "CHECKOUT", tmp_path)
    assert run("bench", "micro") == 2
    assert "error: the benchmarks are not installed with the package" in capsys.readouterr().err


def test_fits_find_lines_and_powers():
    n = [1, 2, 4, 8, 16]
    line = growth.fit(n, [3 + 0.5 * x for x in n])
    assert (line.model, line.a, line.b) == ("linear", pytest.approx(3), pytest.approx(0.5))
    # The closed form through exact points: nothing but rounding is left.
    assert line.error < 1e-9
    assert str(line) == "3 ms + 0.5 ms n"
    power = growth.fit(n, [2 * x**1.7 for x in n])
    assert (power.model, power.a, power.b) == ("power", pytest.approx(2), pytest.approx(1.7))
    assert str(power) == "2 ms n^1.70"
    assert power([4]) == [pytest.approx(2 * 4**1.7)]
    off = growth.fit(n, [3.5, 4 * 1.1, 5, 7, 11])
    # One point a tenth off: the fit takes part of it, the statement owns to the rest.
    assert 0.03 < off.error < 0.1


def test_growth_of_a_tiny_update(tmp_path):
    points = [(n, replace(TINY, distill={**TINY.distill, "batch": n})) for n in (2, 4, 8)]
    rows, curve = growth.measure("batch", points, seconds=0.0)
    assert [row["shape"] for row in rows] == [[2], [4], [8]]
    assert all(row["ours"] and row["median_ms"] > 0 for row in rows)
    assert curve["n"] == [2, 4, 8]
    assert curve["ms"] == [row["median_ms"] for row in rows]
    described = {
        "command": "C",
        "processor": "P",
        "threads": "1",
        "cores": 2,
        "isa": "x",
        "torch": "2",
        "load_average": 0,
        "revision": "abc1234",
    }
    table = growth.table([curve], described)
    assert "| batch | 2 to 8 | 1 | " in table
    assert "revision abc1234" in table
    plots.growth([curve], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
    json.dumps([rows, curve])


def test_every_axis_of_growth_grows_and_can_be_built():
    for axis, points in growth.axes().items():
        assert len(points) >= 4
        sizes = [n for n, _ in points]
        assert sizes == sorted(set(sizes))
        config, dataset, _ = points[-1][1].make()
        assert config.distill.batch <= len(dataset)
        assert axis
    assert [len(problem.make()[0].distill.ema) for _, problem in growth.axes()["averages"]] == [1, 2, 4, 8]


def test_step_benchmark_of_a_tiny_network(tmp_path, monkeypatch):
    monkeypatch.setitem(step.PROBLEMS, "tiny", TINY)
    monkeypatch.setattr(
        step, "_peak_in_a_process", lambda *_: {"held_MB": 10.0, "peak_MB": 30.0, "update_peak_MB": 40.0}
    )
    rows = step.measure("tiny", rounds=3, seconds=0.0)
    assert [row["way"] for row in rows] == step.ways()
    for found in rows:
        assert found["shape"] == [4, 1, 4, 4]
        assert all(taken >= 0 for taken in found["phases"].values())
        assert {"generate", "fake forward", "fake optimiser", "generator optimiser"} <= set(found["phases"])
    described = {
        "command": "C",
        "processor": "P",
        "threads": 1,
        "cores": 2,
        "isa": "x",
        "torch": "2",
        "load_average": 0,
        "revision": "abc1234",
    }
    text = step.table(rows, {**described, "clock": "clock"})
    assert "| tiny network | 4x1x4x4 | as published | " in text
    assert text.count("| 30 | 20 | 40 |") == len(rows)
    assert "| fake backward | " in step.phase_table(rows)
    plots.breakdown(rows, tmp_path / "phases.png")
    assert (tmp_path / "phases.png").stat().st_size > 1000
    json.dumps(rows)


@pytest.mark.parametrize("way", step.ways())
def test_memory_of_an_update_and_of_its_fake_turns(way, monkeypatch):
    trained, order = step.trainer(TINY, way), []
    generator_turn, resident = type(trained).generator_turn, step._resident
    monkeypatch.setattr(type(trained), "generator_turn", lambda *given: order.append("turn") or generator_turn(*given))
    monkeypatch.setattr(step, "_resident", lambda entry: order.append(entry) or resident(entry))
    try:
        found = step.peaks(trained)
    except OSError as error:
        pytest.skip(f"a process' peak memory cannot be reset here: {error}")
    assert order == ["turn", "VmRSS", "VmHWM", "turn", "VmHWM"]
    assert 0 < found["held_MB"] <= found["peak_MB"] + 0.1
    assert found["update_peak_MB"] > 0


def test_the_cifar_problem_is_the_published_one_but_for_its_batch():
    problem = step.PROBLEMS["cifar10"]
    with torch.device("meta"):
        net = rf.networks.build({**problem.network, "dim": problem.shape})
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(35.7e6, rel=0.01)
    recipe = configs.load("recipes/cifar10").distill
    assert recipe.fake_turns == 5
    assert replace(recipe, **problem.distill) == replace(recipe, batch=16)


def test_a_table_without_its_results_is_a_sentence():
    with pytest.raises(SystemExit, match=r"the table 'nothing', and there is no bench/results/nothing\.md"):
        readme.rendered("<!-- table: nothing -->\n<!-- end -->")
