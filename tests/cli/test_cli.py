"""The command line: every command once from beginning to end, and a sentence for every bad input."""

import gzip
import json
import os
import re
import shlex
import signal
import struct
import warnings

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from realuid_fast import choices, cli, paths, sampling, teachers
from realuid_fast.evaluate import table as evaluation
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import train as jobs
from realuid_fast.networks import build
from realuid_fast.noise import NoiseStream, normal
from realuid_fast.train.distill import Distiller
from realuid_fast.train.logging import read_csv

from .conftest import NETWORK

DISTILL = ["distill", "--config", "tiny.yaml", "--out", "run", "--set", "distill.teacher=teacher.safetensors"]


def run(*words):
    """The exit code of a command."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def refused(capsys, *words):
    """The sentence that a command refuses its input with."""
    assert run(*words) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    lines = [line for line in said.err.strip().splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_of_every_command(capsys):
    for command in ("train-teacher", "distill", "convert", "sample", "evaluate", "info", "demo"):
        assert run(command, "--help") == 0
        assert command in capsys.readouterr().out
    assert run("--version") == 0
    assert run("dance") == 2


def test_teacher_then_student_then_samples_then_table(place, capsys):
    assert run("train-teacher", "--config", "tiny.yaml", "--out", "t") == 0
    assert "written to t/teacher.safetensors" in capsys.readouterr().out
    command = teachers.load("t/teacher.safetensors").description.command
    assert command == "realuid-fast train-teacher --config tiny.yaml"

    words = [
        "distill",
        "--config",
        "tiny.yaml",
        "--set",
        "distill.teacher=t/teacher.safetensors",
        "run.seed=1",
        "--out",
        "s",
    ]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "digit classifier features" in said
    assert "teacher, 2 Euler steps" in said
    saved = yaml.safe_load((place / "s/config.yaml").read_text())
    assert saved["distill"]["updates"] == 4
    assert saved["run"]["seed"] == 1
    assert [row["update"] for row in read_csv(place / "s/distances.csv")] == [0, 2, 4]
    assert (place / "s/convergence.png").exists()

    files = ["a.png", "a.npy", "a.safetensors"]
    assert run("sample", "--model", "s", "--count", 5, "--seed", 3, "--out", *files) == 0
    drawn = np.load("a.npy")
    assert drawn.shape == (5, 1, 8, 8)
    assert np.array_equal(load_file("a.safetensors")["samples"].numpy(), drawn)
    with Image.open("a.png") as picture:
        assert picture.size == (3 * 33 + 1, 2 * 33 + 1)
    solver = ["--steps", 3, "--solver", "heun", "--label", 4]
    assert run("sample", "--model", "t/teacher.safetensors", "--count", 5, *solver, "--out", "b.npy") == 0
    assert np.load("b.npy").shape == (5, 1, 8, 8)

    capsys.readouterr()
    assert run("evaluate", "--student", "s", "--samples", 50, "--steps", 1, 3, "--out", "e") == 0
    said = capsys.readouterr().out
    result = json.loads((place / "e/evaluation.json").read_text())
    assert [row["network_evaluations"] for row in result["rows"]] == [None, 1, 3, 1]
    assert [row["name"] for row in result["rows"]][1:] == [
        "teacher, 1 Euler step",
        "teacher, 3 Euler steps",
        "student, one step",
    ]
    assert result["rows"][0]["distance"] == pytest.approx(3.079, abs=0.01)
    assert all(row["samples_per_second"] > 0 for row in result["rows"][1:])
    assert (place / "e/table.md").read_text() in said
    assert "to held-out data" in said


def test_a_folder_of_images_from_beginning_to_end(place, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 12, 10, 3), dtype=np.uint8)
    (place / "images" / "more").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(place / "images" / ("more" if i % 2 else "") / f"{i}.png")
    shared = [
        "--config",
        "folder",
        "--set",
        "data.path=images",
        "data.size=8",
        "data.heldout_every=4",
        "network.kind=mlp",
        "network.width=8",
    ]
    small = ["evaluate_every=2", "evaluate_samples=20", "tensorboard=false", "progress=false"]
    shared += [f"run.{word}" for word in small] + [
        "teacher.updates=2",
        "teacher.batch=4",
        "distill.updates=2",
        "distill.batch=4",
    ]
    assert run("train-teacher", *shared, "--out", "t") == 0
    assert run("distill", *shared, "distill.teacher=t/teacher.safetensors", "--out", "s") == 0
    assert "principal components of the pixels" in capsys.readouterr().out
    assert run("evaluate", "--student", "s", "--samples", 20, "--steps", 2) == 0
    assert "principal components of the pixels" in capsys.readouterr().out
    os.rename("images", "moved")
    assert "there is no folder images" in refused(capsys, "evaluate", "--student", "s")
    assert run("evaluate", "--student", "s", "--samples", 20, "--steps", 2, "--set", "data.path=moved") == 0


def write_classes(root, *folders, count=12):
    generator = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 255, (9, 8, 3), dtype=np.uint8)).save(root / folder / f"{i}.png")


UNET = ["data.size=8", "network.num_channels=8", "network.norm_groups=4", "network.channel_mult=[1,2]"]
UNET += ["teacher.updates=2", "teacher.batch=4", "teacher.optimiser.warmup=0", "run.evaluate_every=2"]
UNET += ["run.evaluate_samples=20", "run.tensorboard=false", "run.progress=false", "run.teacher_steps=1"]


def test_labels_come_from_folders(place, capsys):
    """With the U-Net that ``--config folder`` has: as many classes as there are folders, from teacher to samples."""
    write_classes(place / "images", "train/cats", "train/dogs", "train/owls", "test/cats", "test/dogs")
    shared = ["--config", "folder", "--set", "data.path=images", *UNET, "network.class_cond=true"]
    assert run("train-teacher", *shared, "--out", "t") == 0
    assert teachers.load("t/teacher.safetensors").description.network["num_classes"] == 3
    small = ["distill.updates=2", "distill.batch=4", "distill.generator.warmup=0", "distill.fake.warmup=0"]
    assert run("distill", *shared, *small, "distill.teacher=t/teacher.safetensors", "--out", "s") == 0
    assert run("sample", "--model", "s", "--label", 2, "--count", 3, "--out", "a.npy") == 0
    assert "warning" not in capsys.readouterr().err
    # Without classes in the network nothing but the labels' presence is new.
    words = ["network.class_cond=false", "run.evaluate_every=0"]
    assert run("train-teacher", *shared, *words, "--out", "unconditional") == 0
    assert "num_classes" not in teachers.load("unconditional/teacher.safetensors").description.network


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["network.class_cond=true", "data.labels=false"], "network.class_cond is true, but data set 'folder' has no"),
        (["network.class_cond=true", "network.num_classes=1"], "knows 1 classes, data set 'folder' has 2"),
        (["network.num_classes=2"], "network.num_classes is given without network.class_cond"),
        (["network.dim=[3,16,16]"], "network.dim is [3, 16, 16], the data have samples of shape [3, 8, 8]"),
        (["run.evaluate_samples=1"], "run.evaluate_samples must be at least 2, got 1"),
        (["data.limit=0"], "limit must be at least 1"),
        (["teacher.batch=1000"], "batch 1000 is larger than data set 'folder'"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_folder(place, capsys, words, sentence):
    """So that the corrected command has a free place."""
    write_classes(place / "images", "cats", "dogs")
    assert sentence in refused(
        capsys, "train-teacher", "--config", "folder", "--out", "t", "--set", "data.path=images", *UNET, *words
    )
    assert not (place / "t").exists()


def test_mnists_files_from_a_plan_to_samples(place, capsys):
    generator = np.random.default_rng(0)
    (place / "MNIST" / "raw").mkdir(parents=True)
    for split, count in (("train", 30), ("t10k", 20)):
        images = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28) + generator.bytes(count * 784)
        (place / "MNIST" / "raw" / f"{split}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(i % 10 for i in range(count))
        (place / "MNIST" / "raw" / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    shared = ["--config", "folder", "--set", "data.name=idx", "data.path=.", *UNET[1:], "network.class_cond=true"]
    shared += ["run.evaluate_every=0"]
    assert run("train-teacher", *shared, "data.path=elsewhere", "--dry-run", "--measure", 0) == 0
    assert run("train-teacher", *shared, "--out", "t") == 0
    assert teachers.load("t/teacher.safetensors").description.network["dim"] == [1, 28, 28]
    assert run("sample", "--model", "t", "--label", 9, "--steps", 2, "--count", 2, "--out", "a.npy") == 0
    assert np.load("a.npy").shape == (2, 1, 28, 28)
    assert run("pack", ".", "--out", "packed") == 0
    assert "30 images 1x28x28 in 10 classes and 20 held out" in capsys.readouterr().out


def test_evaluation_shows_a_bar_and_suits_the_data(place, capsys):
    assert run("evaluate", "--teacher", "teacher.safetensors", "--samples", 50, "--steps", 3, "--device", "cpu") == 0
    said = capsys.readouterr().err
    # Evaluations of the network: 50 samples and 16 before the clock starts, in three steps.
    assert "198/198" in said
    assert "measured: teacher, 3 Euler steps" in said
    # 5,408 samples of the digits as ever; larger images, whose networks are slow, get fewer and no row of 100 steps.
    assert evaluation.defaults((1, 8, 8)) == (5408, (1, 20, 100))
    assert evaluation.defaults((2,)) == (5408, (1, 20, 100))
    assert evaluation.defaults((3, 32, 32)) == (2000, (1, 20))


def test_a_short_run_says_that_its_warmup_is_long(place, capsys):
    words = ["train-teacher", "--config", "tiny.yaml", "--set", "teacher.updates=200", "teacher.optimiser.warmup=500"]
    words += ["run.evaluate_every=0"]
    assert run(*words, "--out", "t") == 0
    said = capsys.readouterr().err
    assert "teacher.optimiser.warmup 500 is long for a run of 200 steps" in said
    assert "rises for 100% of the run, to 40% of teacher.optimiser.lr" in said
    assert "set teacher.optimiser.warmup=10" in said
    assert run(*words, "teacher.optimiser.warmup=40", "--out", "u") == 0
    assert "warmup" not in capsys.readouterr().err


def test_no_shipped_configuration_has_a_long_warmup():
    names = [*choices.configs(), *(f"presets/{name}" for name in choices.presets())]
    for name in [*names, *(f"recipes/{name}" for name in choices.recipes())]:
        for job in ("train-teacher", "distill"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                jobs.warn_of_warmup(job, configs.load(name))


def test_interruption_says_how_to_go_on(place, capsys, monkeypatch):
    update = Distiller.update

    def stopping(self):
        update(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Distiller, "update", stopping)
    assert run(*DISTILL) == 130
    said = capsys.readouterr().err
    assert "stopped by SIGINT, saved in run" in said
    assert "--resume" in said
    assert run("sample", "--model", "run", "--out", "a.npy") == 2
    monkeypatch.setattr(Distiller, "update", update)
    assert run(*DISTILL, "--resume") == 0
    assert read_csv(place / "run/distances.csv")[-1]["update"] == 4


def test_bad_input_to_training(place, capsys):
    assert "there is no teacher 'gone.safetensors'" in refused(
        capsys, *DISTILL[:-1], "distill.teacher=gone.safetensors"
    )
    (place / "text.safetensors").write_text("hello")
    assert "text.safetensors is no safetensors file" in refused(
        capsys, *DISTILL[:-1], "distill.teacher=text.safetensors"
    )
    assert "a teacher is wanted" in refused(capsys, *DISTILL[:-1], "distill.teacher=student.safetensors")
    sentence = refused(capsys, *DISTILL, "distill.objective.alpha=1.0", "distill.objective.beta=0.9")
    assert "alpha = 1 requires beta = 1" in sentence
    assert "batch 2000 is larger than data set 'digits', which has 1352" in refused(
        capsys, *DISTILL, "distill.batch=2000"
    )
    assert "'distill.bath'" in refused(capsys, *DISTILL, "distill.bath=2")
    assert "no configuration 'none.yaml'" in refused(capsys, "distill", "--config", "none.yaml", "--out", "run")
    assert "run.device 'moon'" in refused(capsys, *DISTILL, "run.device=moon")
    assert "data.name must be one of" in refused(capsys, *DISTILL, "data.name=cats")
    assert "no run to resume" in refused(capsys, *DISTILL, "--resume")
    assert not (place / "run").exists()
    (place / "full").mkdir()
    (place / "full/mine.txt").write_text("precious")
    full = [word if word != "run" else "full" for word in DISTILL]
    assert "full is not empty" in refused(capsys, *full)
    assert "--overwrite leaves it alone" in refused(capsys, *full, "--overwrite")
    assert (place / "full/mine.txt").read_text() == "precious"
    under = [word if word != "run" else "tiny.yaml/run" for word in DISTILL]
    assert "tiny.yaml/run cannot be written: tiny.yaml is a file and no folder" in refused(capsys, *under)


def test_a_weight_without_signal_is_a_warning(place, capsys):
    assert run(*DISTILL, "distill.objective.alpha=0.9", "distill.objective.beta=0.9") == 0
    assert "warning: beta / alpha = 1" in capsys.readouterr().err


def test_bad_input_to_sampling(place, capsys):
    model = ["sample", "--model", "student.safetensors", "--out"]
    assert "must end in .png, .npy or .safetensors" in refused(capsys, *model, "a.gif")
    assert "there is no folder gone" in refused(capsys, *model, "gone/a.png")
    assert "--count must be at least 1" in refused(capsys, *model, "a.png", "--count", 0)
    assert "--steps must be at least 1" in refused(capsys, *model, "a.png", "--steps", 0)
    assert "--guidance must be finite" in refused(capsys, *model, "a.png", "--guidance", "nan")
    for device in ("meta", "gpu", "cuda:99"):
        said = refused(capsys, *model, "a.png", "--device", device)
        assert f"--device '{device}' is not a device that torch can use here" in said
        said = refused(capsys, "evaluate", "--student", "student.safetensors", "--device", device)
        assert f"--device '{device}' is not a device that torch can use here" in said
    assert "in one step" in refused(capsys, *model, "a.png", "--steps", 3)
    assert "none of the model's 10 classes" in refused(capsys, *model, "a.png", "--label", 10)
    assert "--threads must be at least 1" in refused(capsys, *model, "a.png", "--threads", 0)
    assert "--seed must not be negative" in refused(capsys, *model, "a.png", "--seed", -1)
    teacher = ["sample", "--model", "teacher.safetensors", "--out", "a.png"]
    assert "steps must be at least 1" in refused(capsys, *teacher, "--steps", 0)
    assert "no file gone.safetensors" in refused(capsys, "sample", "--model", "gone.safetensors", "--out", "a.png")
    (place / "empty").mkdir()
    assert "is its run finished?" in refused(capsys, "sample", "--model", "empty", "--out", "a.png")
    (place / "a.png").write_text("mine")
    assert "--out a.png exists" in refused(capsys, *model, "a.png")
    assert (place / "a.png").read_text() == "mine"


def test_bad_input_to_evaluation(place, capsys):
    assert "give --student, --teacher or both" in refused(capsys, "evaluate")
    assert "give it as --teacher" in refused(capsys, "evaluate", "--student", "teacher.safetensors")
    assert "--samples must be at least 2" in refused(
        capsys, "evaluate", "--student", "student.safetensors", "--samples", 1
    )
    for option in (["--labels", "balanced"], ["--repeats", 2]):
        said = refused(capsys, "evaluate", "--student", "student.safetensors", *option)
        assert f"{option[0]} goes with --metric inception" in said
    words = ["evaluate", "--student", "student.safetensors", "--out", "e"]
    (place / "e").mkdir()
    (place / "e/evaluation.json").write_text("{}")
    assert "holds an evaluation already" in refused(capsys, *words)
    assert "cannot be written" in refused(capsys, *words[:-1], "tiny.yaml/e")
    assert "--set takes data.KEY=VALUE" in refused(capsys, *words[:-2], "--set", "run.seed=1")
    assert "the data have (2,)" in refused(capsys, *words[:-2], "--set", "data.name=moons")
    (place / "teacher.safetensors").unlink()
    assert "there is no file teacher.safetensors" in refused(capsys, *words[:-2])


def test_a_published_teacher_is_left_out_of_the_table(place, capsys):
    model = teachers.load("student.safetensors")
    described = teachers.Description(NETWORK, role="student", data={"name": "digits"}, teacher="published.pt")
    teachers.save("student.safetensors", model.net.state_dict(), described)
    assert run("evaluate", "--student", "student.safetensors", "--samples", 20) == 0
    said = capsys.readouterr()
    assert "published.pt is left out" in said.err
    assert "Euler" not in said.out


def test_a_full_disk_is_a_sentence(place, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "run/log.csv")

    monkeypatch.setattr("realuid_fast.train.logging.CsvLog.write", full)
    said = refused(capsys, *DISTILL)
    assert said.startswith("error: stopped after update 0: run/log.csv: No space left on device")


def test_presets_by_name(tmp_path, capsys):
    words = ["--set", "distill.updates=1", "distill.batch=4", "run.evaluate_every=0", "run.progress=false"]
    assert run("distill", "--preset", "sid", "--out", tmp_path / "sid", *words, "run.tensorboard=false") == 0
    described = teachers.load(tmp_path / "sid" / "student.safetensors").description
    assert described.command.startswith("realuid-fast distill --preset sid --set distill.updates=1")
    capsys.readouterr()
    assert run("distill", "--preset", "none", "--out", tmp_path / "none") == 2
    assert "there is no preset 'none': the presets are add, ced, diff-instruct, dmd" in capsys.readouterr().err
    assert run("distill", "--preset", "vp", "--out", tmp_path / "vp", "--set", f"distill.teacher={tmp_path}/t") == 2
    assert "there is no teacher" in capsys.readouterr().err


def test_pairs_on_the_command_line(tmp_path, capsys):
    small = ["network.num_channels=4", "network.norm_groups=2", "run.evaluate_samples=20", "run.progress=false"]
    small += ["run.tensorboard=false", "teacher.updates=2", "distill.updates=2", "run.evaluate_every=2"]
    teacher = tmp_path / "teacher"
    small.append(f"distill.teacher={teacher}/teacher.safetensors")
    assert run("train-teacher", "--preset", "ibmd", "--out", teacher, "--set", *small) == 0
    assert run("distill", "--preset", "ibmd", "--out", tmp_path / "student", "--set", *small) == 0
    assert "pair_error" in (tmp_path / "student" / "distances.csv").read_text().splitlines()[0]
    assert run("sample", "--model", tmp_path / "student", "--count", 3, "--out", tmp_path / "s.npy") == 0
    assert run("sample", "--model", teacher, "--count", 3, "--steps", 2, "--out", tmp_path / "t.npy") == 0
    words = ["--samples", 20, "--steps", 2, "--out", tmp_path / "table"]
    assert run("evaluate", "--student", tmp_path / "student", *words) == 0
    table = (tmp_path / "table" / "table.md").read_text()
    assert "error a pair" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_info(capsys):
    assert run("info") == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "cannot run: " in said
    for word in ("torch", "cpp", "triton", "processor", "vector code", "threads"):
        assert word in said
    for line in (
        r"eager +runs",
        r"graphs +cannot run: it needs a CUDA device",
        r"bf16 +runs",
        r"tf32 +cannot run: it needs a CUDA device",
    ):
        assert re.search(line, said), line


def test_demo_leaves_what_the_readme_promises(place, capsys):
    words = [
        "distill.teacher=teacher.safetensors",
        "distill.updates=3",
        "distill.batch=8",
        "distill.ema=[0.9]",
        "distill.export=0.9",
    ]
    words += ["run.evaluate_every=1", "run.evaluate_samples=40", "run.tensorboard=false", "run.progress=false"]
    assert run("demo", "--out", "d", "--threads", 1, "--set", *words) == 0
    said = capsys.readouterr().out
    assert "on 1 thread" in said
    assert "teacher, 100 Euler steps" in said
    assert "student, one step" in said
    for name in ("samples.png", "convergence.png", "table.md", "evaluation.json", "student.safetensors"):
        assert (place / "d" / name).stat().st_size > 0
    assert json.loads((place / "d/evaluation.json").read_text())["updates"] == 3
    assert "is not empty" in refused(capsys, "demo", "--out", "d", "--threads", 1, "--set", *words)


def test_convert_from_a_checkpoint_to_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = {"kind": "mlp", "shape": [2], "width": 8, "depth": 1}
    torch.save({"ema_models": {0.9: build(network).state_dict()}}, "net.pt")
    asked = ["network.kind=mlp", "network.shape=[2]", "network.width=8", "network.depth=1"]
    path = ["path.name=vp", "path.predict=noise"]
    assert run("convert", "net.pt", "--out", "t.safetensors", "--set", *asked, *path) == 0
    said = capsys.readouterr().out
    assert "teacher on the path vp, predicts noise: network mlp of" in said
    assert "samples (2,)" in said
    described = teachers.load_teacher("t.safetensors").description
    assert described.command == shlex.join(["realuid-fast", "convert", "net.pt", "--set", *asked, *path])
    assert described.data == {}
    assert run("sample", "--model", "t.safetensors", "--out", "s.npy", "--count", "3", "--steps", "2") == 0
    assert np.isfinite(np.load("s.npy")).all()
    assert "give --overwrite" in refused(capsys, "convert", "net.pt", "--out", "t.safetensors", "--set", *asked)
    assert "does not say which network" in refused(capsys, "convert", "net.pt", "--out", "o.safetensors")
    wrong = refused(capsys, "convert", "net.pt", "--out", "o.safetensors", "--set", *asked, "network.depth=2")
    assert "missing grow.1.bias" in wrong
    allowed = ["--allow-missing", "grow.1.*", "shrink.1.*"]
    words = ["convert", "net.pt", "--out", "o.safetensors", "--set", *asked, "network.depth=2", *allowed]
    assert "of another shape modulation.bias" in refused(capsys, *words)
    config = [
        "--config",
        "mixture",
        "--set",
        "network.kind=mlp",
        "network.shape=[2]",
        "network.width=8",
        "network.depth=1",
    ]
    assert run("convert", "net.pt", "--out", "o.safetensors", "--student", "--t-start", "0.3", *config) == 0
    assert teachers.load("o.safetensors", role="student").description.t_start == 0.3


def test_sample_takes_every_solver_of_a_teacher(tmp_path, capsys):
    """On an EDM teacher; its own sampler takes 18 steps where none are given."""
    network = {"kind": "song-unet", "dim": [1, 8, 8], "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    net = build(network).eval()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    teachers.save(tmp_path / "t.safetensors", net.state_dict(), teachers.Description(network, path="ve", predict="edm"))
    words = ["sample", "--model", str(tmp_path / "t.safetensors"), "--count", "2", "--seed", "3", "--overwrite"]
    noise = normal(NoiseStream(3).next_key(), torch.empty(2, 1, 8, 8))
    for solver, steps in (("edm", []), ("ddim", ["--steps", "3"]), ("midpoint", ["--steps", "3"])):
        out = tmp_path / "x.npy"
        assert cli.main([*words, "--out", str(out), "--solver", solver, *steps]) == 0
        expected = sampling.integrate(net, noise, 3 if steps else 18, solver, path=paths.VE(), predict="edm")
        np.testing.assert_allclose(np.load(out), expected.numpy(), rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert cli.main(["sample", "--model", "digits", "--solver", "edm", "--out", str(tmp_path / "d.npy")]) == 2
    assert "solver must not be edm on Linear: it needs the path ve" in capsys.readouterr().err
