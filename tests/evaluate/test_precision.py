"""Samples of an evaluation in another precision: which arithmetic makes them, and that the number says so."""

import json

import pytest
import torch

from realuid_fast.cli import main
from realuid_fast.errors import UserError
from realuid_fast.evaluate.table import sampler
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.models.files import load
from realuid_fast.train.logging import read_csv

from .. import helpers


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_samples_differ_by_the_precisions_rounding(tmp_path, precision):
    model = load(helpers.save_teacher(tmp_path / "teacher.safetensors", helpers.UNET, {"name": "digits"}))
    z = torch.randn(8, 1, 8, 8)
    exact, rounded = sampler(model, 3)(z), sampler(model, 3, precision=precision)(z)
    error = float((rounded - exact).norm() / exact.norm())
    roundoff = {"bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
    assert rounded.dtype == torch.float32
    # Each of a few layers rounds its products; their errors add up to some roundoffs.
    assert roundoff / 100 < error < 10 * roundoff


def test_a_run_evaluates_in_its_own_precision_and_says_so(tmp_path):
    teacher = helpers.save_teacher(tmp_path / "teacher.safetensors", helpers.UNET, {"name": "digits"})
    found = {}
    for precision in ("float32", "bf16"):
        run = {"evaluate_every": 1, "evaluate_samples": 64, "evaluate_precision": precision}
        sections = {"data": {"name": "digits"}, "distill": {"updates": 1, "generator": {"warmup": 0}}, "run": run}
        config = configs.from_mapping(helpers.settings(teacher, **sections))
        _, measure = jobs.train("distill", config, tmp_path / precision, False, False, "realuid-fast distill")
        found[precision] = [float(row["distance"]) for row in read_csv(tmp_path / precision / "distances.csv")]
        assert measure.name.endswith(", samples made in bf16") == (precision == "bf16")
    assert found["bf16"] != found["float32"]
    assert found["bf16"] == pytest.approx(found["float32"], rel=0.02)


def test_the_command_says_what_made_the_samples(tmp_path, capsys):
    teacher = helpers.save_teacher(tmp_path / "teacher.safetensors", helpers.UNET, {"name": "digits"})
    command = ["evaluate", "--teacher", str(teacher), "--samples", "20", "--steps", "1"]
    main([*command, "--precision", "bf16", "--out", str(tmp_path / "out")])
    assert "(20 samples, samples made in bf16)" in capsys.readouterr().out
    assert "bf16" in json.loads((tmp_path / "out" / "evaluation.json").read_text())["metric"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in tf32")
def test_a_precision_that_the_device_lacks_is_refused_by_name(tmp_path, capsys):
    teacher = helpers.save_teacher(tmp_path / "teacher.safetensors", helpers.UNET, {"name": "digits"})
    with pytest.raises(UserError, match=r"run\.evaluate_precision tf32 does not run on cpu: it needs a CUDA device"):
        helpers.run_in(tmp_path / "run", helpers.settings(teacher, run={"evaluate_precision": "tf32"}))
    assert main(["sample", "--model", str(teacher), "--out", str(tmp_path / "a.png"), "--precision", "tf32"]) != 0
    assert "--precision tf32 does not run on cpu" in capsys.readouterr().err
