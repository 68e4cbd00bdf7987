"""Runs that are killed or get a signal, and the page that lists all faults."""

import json
import os
import re
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bench import kills
from realuid_fast import teachers
from realuid_fast.train import hooks
from realuid_fast.train.checkpoint import Checkpoints
from realuid_fast.train.logging import read_csv

from .runs import ROOT, end_of


def killed(tmp_path, *words):
    """The result of the command. Its lives are forked from this process, which has imported what they need."""
    out = tmp_path / "kills.json"
    assert kills.main([*words, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_a_run_killed_again_and_again_ends_as_if_left_alone(tmp_path):
    result = killed(tmp_path, "--kills", "5", "--updates", "24", "--every", "0")
    assert result["same"] is True
    assert result["checkpoints_lost"] == 0
    assert len(result["kills"]) == 5
    assert {kill["kind"] for kill in result["kills"]} == set(kills.KINDS)


def test_a_run_killed_at_every_call_that_changes_its_folder_ends_as_if_left_alone(run, tmp_path):
    """A small network: the calls are those of any run. The committed result is of the digits' U-Net."""
    settings = tmp_path / "c.yaml"
    content = yaml.safe_load((run("run") / "config.yaml").read_text())
    settings.write_text(yaml.safe_dump({key: content[key] for key in ("data", "distill")}))
    told = killed(tmp_path, "--kills", "0", "--every", "8", "--config", str(settings))["calls"]
    made = {kill["call"] for each in told.values() for kill in each["kills"]}
    assert {call.split()[0] for call in made} >= {"fsync", "replace", "mkdir", "unlink"}
    assert all(kill["wrong"] == [] for each in told.values() for kill in each["kills"])


def test_the_committed_kills_left_nothing_wrong():
    """At every call, before and after it; ``python -m bench.kills`` makes the file."""
    result = json.loads((ROOT / "bench/results/kills.json").read_text())
    assert len(result["kills"]) >= 40
    assert result["same"] is True
    assert result["checkpoints_lost"] == 0
    for each in result["calls"].values():
        assert len(each["kills"]) == 2 * each["calls"]
        assert all(kill["wrong"] == [] for kill in each["kills"])


def test_a_signal_does_not_wait_for_an_evaluation(run, after):
    straight = run("straight")
    after(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(hooks.Interrupted):
        run("broken")
    broken = straight.parent / "broken"
    assert [row["update"] for row in read_csv(broken / "distances.csv")] == [0, 4]
    run("broken", resume=True)
    assert end_of(straight) == end_of(broken)


def test_a_signal_in_the_last_update_leaves_the_evaluation_to_the_resumed_run(run, after):
    after(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(hooks.Interrupted):
        run("broken")
    assert end_of(run("broken", resume=True)) == end_of(run("straight"))


def test_a_terminal_that_closes_is_a_signal_to_save(run, after, tmp_path):
    """It sends SIGHUP more than once."""
    straight, before = run("straight"), signal.getsignal(signal.SIGHUP)

    def close():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)

    after(8, close)
    with pytest.raises(hooks.Interrupted, match="stopped by SIGHUP") as stop:
        run("broken")
    assert stop.value.code == 129
    assert signal.getsignal(signal.SIGHUP) == before
    assert end_of(run("broken", resume=True)) == end_of(straight)
    # As nohup does it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after(8, close)
        assert end_of(run("ignored")) == end_of(straight)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_clock_that_is_set_back_changes_nothing(run, monkeypatch):
    straight = run("straight")
    now = 2e9

    def backwards():
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(time, "time", backwards)
    jumped = run("jumped")
    assert end_of(straight) == end_of(jumped)
    rows = read_csv(jumped / "log.csv")
    assert all(0 < row["seconds"] < 60 and row["images_per_second"] > 0 for row in rows)


def test_the_best_network_is_kept(run, monkeypatch):
    folder = run("run")
    distances = {row["update"]: row["distance"] for row in read_csv(folder / "distances.csv")}
    best = min(distances, key=distances.get)
    saved = Checkpoints(folder / "checkpoints").load()["best"]
    assert saved["update"] == best
    assert saved["distance"] == distances[best]
    kept = load_file(str(folder / "best.safetensors"))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in saved["network"].items())
    assert teachers.load(folder / "best.safetensors").description.role == "student"


def test_every_fault_on_the_page_names_tests_that_exist():
    page = (ROOT / "docs/faults.md").read_text().partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split("|")[-2])
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / file).read_text(), (file, name)
