"""Finished networks as objects, from the files that a run leaves."""

import pytest
import torch

import realuid_fast as rf
from realuid_fast import teachers
from realuid_fast.cli import main
from realuid_fast.errors import UserError
from realuid_fast.sampling import integrate, one_step


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a student of the shipped teacher, a real U-Net, as `distill` saves it."""
    folder = tmp_path_factory.mktemp("run") / "student"
    words = ["distill.updates=1", "distill.batch=4", "run.progress=false", "run.evaluate_every=0"]
    assert main(["distill", "--out", str(folder), "--set", *words]) == 0
    return folder / "student.safetensors"


def test_a_student_is_called_with_noise(student):
    model, z, labels = rf.load(student), torch.randn(5, 1, 8, 8), torch.arange(5)
    samples = model(z, labels)
    stored = teachers.load(student)
    expected = one_step(stored.net, z, stored.description.t_start, labels).detach()
    assert model.is_student
    assert torch.equal(samples, expected)
    assert not samples.requires_grad
    assert torch.equal(rf.load(student.parent)(z, labels), samples)


def test_a_teacher_takes_steps_of_a_solver():
    model, z, labels = rf.load("digits"), torch.randn(3, 1, 8, 8), torch.tensor([4, 0, 9])
    expected = integrate(model.net, z, 2, "heun", labels)
    assert torch.equal(model(z, labels, steps=2, solver="heun"), expected)


def test_samples_are_those_of_the_command(student, tmp_path):
    """`realuid-fast sample` and `rf.sample` make the same samples from one seed, in batches or at once."""
    file = tmp_path / "samples.npy"
    assert main(["sample", "--model", str(student), "--count", "7", "--seed", "3", "--out", str(file)]) == 0
    found = rf.sample(student, 7, seed=3)
    numpy = pytest.importorskip("numpy")
    assert torch.equal(found, torch.from_numpy(numpy.load(file)))
    # a convolution of another batch may sum in another order
    torch.testing.assert_close(rf.sample(rf.load(student), 7, seed=3, batch=3), found, rtol=1e-4, atol=1e-5)
    of_one_class = rf.sample(student, 7, seed=3, labels=2)
    assert torch.equal(of_one_class[2], found[2])
    rf.save_picture(found, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m(torch.randn(2, 3, 8, 8), torch.zeros(2).long()), r"z must have shape \(B, 1, 8, 8\)"),
        (lambda m: m(torch.randn(2, 1, 8, 8)), "labels must be given, one for each of the 2 samples: 0 to 9"),
        (lambda m: m(torch.randn(2, 1, 8, 8), torch.zeros(2).long(), steps=3), "steps, solver and guidance are"),
        (lambda m: m(torch.randn(2, 1, 8, 8), torch.tensor([3, 10])), "labels must name one of .* 10 classes, got 10"),
        (lambda m: rf.load("mnist")(torch.randn(1, 1, 16, 16), torch.tensor([3])), "labels must not be given"),
        (lambda m: rf.sample("mnist", 1, labels=3), "labels must not be given: the model is unconditional"),
        (lambda m: rf.sample(m, 0), "count must be a whole number of at least 1, got 0"),
        (lambda m: rf.sample(m, 2, batch=0), "batch must be a whole number of at least 1, got 0"),
        (lambda m: rf.sample(m, 2, labels=10), "labels must name one of the model's 10 classes"),
        (lambda m: rf.sample(m, 2, labels=torch.zeros(3).long()), r"labels must have shape \(2,\)"),
        (lambda m: rf.sample(m, 2, solver="rk4"), "solver must be one of"),
        (lambda m: rf.save_picture(torch.zeros(3), "x.png"), "samples must be images"),
        (lambda m: m(torch.randn(2, 1, 8, 8), torch.zeros(2)), r"labels must be int64, not torch\.float32"),
        (lambda m: m(torch.randn(2, 1, 8, 8), [0, 1]), r"labels must be a torch\.Tensor, not list"),
        (lambda m: m(torch.randn(2, 1, 8, 8).double(), torch.zeros(2).long()), r"z must be torch\.float32 like"),
        (lambda m: m(torch.randn(2, 1, 8, 8).half(), torch.zeros(2).long()), r"z must be torch\.float32 like"),
        (lambda m: rf.load(None), "source must be the name of a file"),
        (lambda m: one_step(m.net, torch.randn(2, 2), 0.3, path="linear"), "path must be a path such as"),
        (lambda m: integrate(m.net, torch.randn(2, 2), 2, path="linear"), "path must be a path such as"),
        (lambda m: integrate(m.net, torch.randn(2, 2), 2.5), "steps must be a whole number, not float"),
    ],
)
def test_what_does_not_fit_is_named(student, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(rf.load(student))


def test_a_folder_without_a_finished_network_is_named(tmp_path):
    with pytest.raises(UserError, match="is its run finished"):
        rf.load(tmp_path)
