"""Logs, meters, tripwires, phases and pictures of a run."""

import dataclasses
import math
import time

import pytest
import torch

from realuid_fast import data, teachers
from realuid_fast.meters import Fetched, Meters
from realuid_fast.models.pictures import convergence_plot, grid, picture
from realuid_fast.noise import normal
from realuid_fast.phases import Phases
from realuid_fast.train.distill import Distiller
from realuid_fast.train.logging import CsvLog, Events, plot_distances, read_csv
from realuid_fast.tripwires import Tripwires

from ..helpers import LABELLED, distiller, results, run_in, save_teacher, settings


def test_a_run_leaves_its_logs_and_pictures(tmp_path):
    config = settings(save_teacher(tmp_path / "t.safetensors", LABELLED), data={"name": "digits"})
    config["run"] = {**config["run"], "sample_every": 6, "tensorboard": True, "timings": True}
    config["distill"]["updates"] = 6
    file = run_in(tmp_path / "run", config)
    names = {f.name for f in (tmp_path / "run").iterdir()}
    assert names == {
        "best.safetensors",
        "checkpoints",
        "config.yaml",
        "distances.csv",
        "events",
        "log.csv",
        "samples",
        "student.safetensors",
        "timings.json",
    }
    assert (tmp_path / "run/samples/update-00000006.png").stat().st_size > 1000
    log = read_csv(tmp_path / "run/log.csv")
    assert [row["update"] for row in log] == [5, 6]
    assert all(math.isfinite(value) for row in log for value in row.values())
    assert log[-1]["images_per_second"] > 0
    assert "fake backward" in (tmp_path / "run/timings.json").read_text()
    assert plot_distances(tmp_path / "run", {"floor": 3.0}, "distance").stat().st_size > 1000
    student = teachers.load(file, role="student")
    assert student.description.t_start == pytest.approx(2 / 7)  # noise level 2.5 on the linear path
    assert student.description.teacher == config["distill"]["teacher"]


def test_meters_give_means_and_start_afresh():
    meters = Meters(("a", "b"))
    meters.add("a", torch.tensor(1.0))
    meters.add("a", torch.tensor(3.0))
    read = meters.read()
    assert read["a"] == 2.0
    assert math.isnan(read["b"])
    assert math.isnan(meters.read()["a"])


def test_meters_divide_sums_by_sums():
    meters = Meters(("loss", "a", "b"))
    meters.add("loss", torch.tensor(2.0))
    meters.add("a", torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    meters.add("a", torch.tensor([[5.0, 0.0], [2.0, 0.0]]))
    read = meters.read()
    assert (read["loss"], read["a"]) == (2.0, 1.5)
    assert math.isnan(read["b"])


def test_tripwires_equal_their_formulas(monkeypatch):
    trainer, seen = distiller(), {}
    trainer.update()
    trainer.meters.read()
    sums = trainer.tripwires.sums

    def watched(*given):
        seen["given"] = given
        return sums(*given)

    monkeypatch.setattr(trainer.tripwires, "sums", watched)
    trainer.update()
    row = trainer.meters.read()
    draw, teacher_out, fake_out = seen["given"]
    t, tgt = draw.t, draw.x - normal(draw.noise, draw.x)
    for i, name in enumerate(trainer.tripwires.names[1:5]):
        inside = (t >= i / 4) & (t < (i + 1) / 4)
        above = (fake_out - teacher_out)[inside].flatten(1).norm(dim=1).sum()
        assert row[name] == pytest.approx(float(above / teacher_out[inside].flatten(1).norm(dim=1).sum()), rel=1e-5)
    ratio = (fake_out - tgt).square().sum() / (teacher_out - tgt).square().sum()
    assert row["error ratio"] == pytest.approx(float(ratio), rel=1e-4)
    # As many held-out samples as the batch: the quantiles are the sorted samples themselves.
    held = data.load("digits")
    few = Tripwires(heldout=held.pixels("heldout")[:8], batch=8)
    moved = dataclasses.replace(draw, x=held.pixels("heldout")[:8].flip(0) + 0.5)
    distance = few.sums(moved, teacher_out, fake_out)[0, -1]
    shift = 0.5 * few._directions.sum(0)
    assert float(distance) == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-4)


def test_a_row_is_written_when_the_device_has_sent_it(tmp_path, monkeypatch):
    """A device that is behind: rows come one interval late, all of them before a checkpoint and at the end."""
    config = settings(save_teacher(tmp_path / "t.safetensors"), run={"log_every": 2, "evaluate_every": 0})
    run_in(tmp_path / "straight", config)
    written, write, update = [], CsvLog.write, Distiller.update
    monkeypatch.setattr(Fetched, "ready", False)
    monkeypatch.setattr(CsvLog, "write", lambda self, row: (written.append(row["update"]), write(self, row)))
    late = {}

    def watched(self):
        update(self)
        late[self.step] = list(written)

    monkeypatch.setattr(Distiller, "update", watched)
    run_in(tmp_path / "behind", config)
    assert (late[5], late[6], late[9], late[12]) == ([2], [2, 4], [2, 4, 6], [2, 4, 6, 8, 10])
    assert results(tmp_path / "straight")[2] == results(tmp_path / "behind")[2]


def test_a_run_says_once_when_a_precision_is_too_coarse(tmp_path, capsys):
    """A fake model that starts as the teacher is nearer to it than bfloat16 can tell."""
    teacher = save_teacher(tmp_path / "teacher.safetensors", LABELLED, {"name": "digits"})
    config = settings(teacher, data={"name": "digits"}, distill={"generator_precision": "bf16"}, run={"log_every": 1})
    run_in(tmp_path / "run", config)
    said = capsys.readouterr().err
    assert said.count("update 1: distill.generator_precision bf16 is too coarse") == 1
    assert said.count("too coarse") == 1


def test_phases_time_on_request_only():
    silent, timed = Phases(), Phases(timings=True)
    for phases in (silent, timed):
        with phases("work"):
            time.sleep(0.01)
    assert silent.seconds == {}
    assert timed.seconds["work"] > 0.009


def test_phases_need_no_nvtx(monkeypatch):
    monkeypatch.setattr("realuid_fast.phases.nvtx", None)
    phases = Phases(timings=True)
    with phases("work"):
        pass
    assert phases.seconds["work"] >= 0


def test_csv_is_cut_back(tmp_path):
    log = CsvLog(tmp_path / "log.csv", ["a", "b"])
    log.write({"a": 1})
    position = log.position
    log.write({"a": 2, "b": 3})
    log.cut(position)
    rows = read_csv(log.file)
    assert len(rows) == 1
    assert rows[0]["a"] == 1.0
    assert math.isnan(rows[0]["b"])
    assert CsvLog(log.file, ["a", "b"]).position == position


def test_pictures(tmp_path):
    sheet = grid(torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8), columns=3)
    assert sheet.shape == (2 * 33 + 1, 3 * 33 + 1, 3)
    assert sheet[1, 1].tolist() == [0, 0, 0]
    assert sheet[65, 98].tolist() == [255, 255, 255]
    assert picture(torch.randn(50, 2)).shape == (400, 400, 3)
    curves = {"student": [(0, 10.0), (1, math.inf), (2, 5.0)]}
    convergence_plot(curves, {"floor": 1.0}, "distance", tmp_path / "p.png", {"student": [(9, 11), (9, 11), (4, 6)]})
    assert (tmp_path / "p.png").stat().st_size > 1000
    Events(None).scalars({"a": 1.0}, 0)
