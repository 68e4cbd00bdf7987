"""Trainers built from objects in a program of one's own, without a configuration."""

import copy

import pytest
import torch

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs import trainers
from realuid_fast.matching import Matching
from realuid_fast.models.few_steps import FewSteps
from realuid_fast.models.generator import Generator
from realuid_fast.optim import Optimiser
from realuid_fast.train.distill import Distiller
from realuid_fast.train.loop import run
from realuid_fast.train.regression import RegressionTrainer
from realuid_fast.train.teacher import TeacherTrainer
from realuid_fast.train.trainer import Setup

SETUP = Setup(batch=8, updates=4, seed=3)
MATCHING = Matching(rf.paths.Linear(sampler=rf.paths.samplers.Uniform(stratified=True)))


def by_hand():
    model, digits = rf.teachers.load_teacher("digits"), rf.data.digits()
    fake = copy.deepcopy(model.net).train().requires_grad_(True)
    generator = Generator(copy.deepcopy(fake))
    return Distiller(
        rf.frozen_view(model.net), fake, generator, MATCHING, rf.objectives.RealUID(alpha=0.92, beta=0.94), digits,
        Optimiser(fake, 1e-3), Optimiser(generator.net, 1e-3, ema_decays=[0.9]), SETUP, fake_turns=2, export=0.9,
    )  # fmt: skip


def test_a_distiller_of_objects_is_that_of_a_configuration_to_the_bit():
    content = {
        "distill": {"batch": 8, "updates": 4, "fake_turns": 2, "ema": [0.9], "export": 0.9},
        "run": {"seed": 3, "channels_last": False},
    }
    content["distill"] |= {"objective": {"name": "realuid", "alpha": 0.92, "beta": 0.94}}
    config = configs.from_mapping(content)
    configured = trainers.distiller(config, rf.data.digits(), rf.teachers.load_teacher("digits"))
    own = by_hand()
    for trainer in (own, configured):
        for _ in range(2):
            trainer.update()
    assert own.meters.read() == pytest.approx(configured.meters.read(), rel=1e-3)
    for mine, theirs in zip(own.exported()[0].values(), configured.exported()[0].values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_the_state_of_one_trainer_continues_in_another():
    straight, before = by_hand(), by_hand()
    for _ in range(2):
        straight.update()
        before.update()
    torch.manual_seed(5)
    state, expected = copy.deepcopy(before.state_dict()), torch.randn(3)
    torch.manual_seed(99)  # another trainer is made elsewhere, with other random numbers
    after = by_hand()
    after.load_state_dict(state)
    assert torch.equal(torch.randn(3), expected)  # dropout draws from torch's own generator
    straight.update()
    after.update()
    assert after.step == 3
    for mine, theirs in zip(after.exported()[0].values(), straight.exported()[0].values(), strict=True):
        assert torch.equal(mine, theirs)
    assert after.meters.read() == straight.meters.read()
    with pytest.raises(UserError, match="the checkpoint does not fit the run"):
        after.load_state_dict({"step": 1, "ranks": [{}]})


def test_the_other_trainers_of_objects_train():
    points = rf.data.load("eight_gaussians")
    net = rf.networks.build({"kind": "mlp", "shape": [2], "width": 32, "depth": 2})
    teacher = TeacherTrainer(net, MATCHING, points, Optimiser(net, 1e-2), Setup(batch=64, updates=300))
    first = [teacher.update() or teacher.meters.read()["loss"] for _ in range(20)]
    for _ in range(200):
        teacher.update()
    teacher.meters.read()
    last = [teacher.update() or teacher.meters.read()["loss"] for _ in range(20)]
    assert sum(last) < 0.9 * sum(first)
    generator = Generator(copy.deepcopy(net))
    student = RegressionTrainer(
        rf.frozen_view(net), generator, MATCHING, points, Optimiser(generator.net, 1e-3), SETUP, steps=4
    )  # fmt: skip
    student.update()
    assert student.step == 1
    assert torch.isfinite(torch.tensor(student.meters.read()["regression loss"]))


def student_on(path, net, **given):
    generator = Generator(copy.deepcopy(net), t_start=0.9, path=path, predict="noise", times=(0.5,), **given)
    fake, objective = copy.deepcopy(net), rf.objectives.UID()
    return Distiller(
        rf.frozen_view(net), fake, generator, Matching(path, "noise", "x0"), objective, rf.data.moons(),
        Optimiser(fake, 1e-3), Optimiser(generator.net, 1e-3), Setup(batch=8), fake_turns=1,
    )  # fmt: skip


class Own(torch.nn.Sequential):
    def forward(self, t, x, y=None):
        return super().forward(x)


@pytest.mark.parametrize("ancestral", [False, True])
def test_the_file_of_a_student_without_a_description_says_how_to_sample(tmp_path, ancestral):
    net = rf.networks.build({"kind": "mlp", "shape": [2], "width": 8, "depth": 1})
    trainer = student_on(rf.paths.VP(beta_max=12.0), net, ancestral=ancestral)
    trainer.update()
    file, z = tmp_path / "student.safetensors", torch.randn(3, 2)
    rf.teachers.save(file, *trainer.exported())
    read = rf.load(file)
    assert torch.equal(read(z), trainer.generator(z))
    assert torch.equal(trainer.sample(z), trainer.generator(z))
    assert (read.description.data, read.description.decay) == (rf.data.moons().config, 0.0)


def test_the_file_of_every_trainer_names_its_path_and_its_network(tmp_path):
    path, file = rf.paths.VP(beta_max=12.0), tmp_path / "net.safetensors"
    own = Own(torch.nn.Linear(2, 2))
    rf.teachers.save(file, *student_on(path, own).exported())
    with pytest.raises(UserError, match=r"your own module: give the module to teachers\.load as 'net'"):
        rf.load(file)
    assert rf.teachers.load(file, net=copy.deepcopy(own)).description.interpolant() == path
    net, matching = rf.networks.build({"kind": "mlp", "shape": [2], "width": 8, "depth": 1}), Matching(path, "noise")
    teacher = TeacherTrainer(net, matching, rf.data.moons(), Optimiser(net, 1e-3), SETUP)
    rf.teachers.save(file, *teacher.exported())
    assert (rf.load(file).description.interpolant(), rf.load(file).description.predict) == (path, "noise")
    few = FewSteps(copy.deepcopy(net), (3,), None, path, "noise")
    student = RegressionTrainer(rf.frozen_view(net), few, matching, rf.data.moons(), Optimiser(few.net, 1e-3), SETUP)
    rf.teachers.save(file, *student.exported())
    z = torch.randn(3, 2)
    assert torch.equal(rf.load(file)(z), few(z))


def test_a_student_on_a_path_without_a_name_needs_a_description(tmp_path):
    net = rf.networks.build({"kind": "mlp", "shape": [2], "width": 8, "depth": 1})
    path = rf.paths.custom(lambda t: 1 - t, lambda t: t, t_range=(0.0, 0.95))
    trainer = student_on(path, net)
    trainer.update()
    for refused in (trainer.exported, lambda: run(trainer, tmp_path, None, (2,))):
        with pytest.raises(
            UserError, match=r"description must be given: the path is none of realuid_fast\.paths\.PATHS"
        ):
            refused()
    assert not list(tmp_path.iterdir())


class Pair(Own):
    def forward(self, t, x, y=None):
        return super().forward(t, x), "aux"


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Pair(torch.nn.Linear(2, 2)), r"must return a tensor of shape \(B, 2\), not a tuple"),
        (Own(torch.nn.Linear(2, 3)), r"must return a tensor of shape \(B, 2\), not shape \(8, 3\)"),
        (Own(torch.nn.Linear(2, 1)), r"must return a tensor of shape \(B, 2\), not shape \(8, 1\)"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "fake", "generator"])
def test_a_network_of_another_output_is_a_sentence(net, words, role):
    path, sound = rf.paths.Linear(), Own(torch.nn.Linear(2, 2))
    teacher, fake, made = (copy.deepcopy(net if role == each else sound) for each in ("teacher", "fake", "generator"))
    generator = Generator(made, t_start=0.3, path=path)
    trainer = Distiller(
        rf.frozen_view(teacher), fake, generator, Matching(path), rf.objectives.UID(), rf.data.moons(),
        Optimiser(fake, 1e-3), Optimiser(made, 1e-3), Setup(batch=8), fake_turns=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        trainer.update()


def test_arguments_that_do_not_fit_are_named():
    points = rf.data.load("eight_gaussians")
    net = rf.networks.build({"kind": "mlp", "shape": [2], "width": 8, "depth": 1})
    with pytest.raises(UserError, match=r"batch 7 does not divide by 1 rank times run\.accumulate 2"):
        TeacherTrainer(net, MATCHING, points, Optimiser(net, 1e-2), Setup(batch=7, parts=2))
    with pytest.raises(UserError, match="export must be 0 or a decay of the optimiser's averages"):
        TeacherTrainer(net, MATCHING, points, Optimiser(net, 1e-2), SETUP, export=0.5)
    with pytest.raises(UserError, match="label_dropout needs a class-conditional network"):
        TeacherTrainer(net, MATCHING, points, Optimiser(net, 1e-2), SETUP, label_dropout=0.5)
