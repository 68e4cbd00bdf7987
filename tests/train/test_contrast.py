"""Contrastive energy distillation: its loss by the formula in float64, and through the trainer on a real network."""

import copy

import pytest
import torch

from realuid_fast import teachers
from realuid_fast.errors import UserError
from realuid_fast.models.pairs import Contrast, pseudo_huber, pull
from realuid_fast.noise import normal

from ..helpers import MLP, POINTS, UNET, random_network, trainer_of

BASE = {"teacher": "x", "batch": 8, "updates": 4, "ema": [0.9], "export": 0.9, "t_start": 0.28}
BASE |= {"objective": {"name": "regression"}}


def literal(x, ours, others):
    """``log(1 + e^E(x, t)) + log(1 + e^-E(x, t'))``, ``E`` pseudo-Huber."""
    c = 0.00054 * 8

    def energy(target):
        return torch.sqrt(((x - target) ** 2).sum((1, 2, 3)) + c**2) - c

    return (torch.log1p(torch.exp(energy(ours))) + torch.log1p(torch.exp(-energy(others)))).mean()


@pytest.fixture
def student(tmp_path):
    file = tmp_path / "student.safetensors"
    described = teachers.Description(UNET, "student", t_start=0.28)
    teachers.save(file, random_network(UNET, seed=5).state_dict(), described)
    return file


def test_the_loss_is_the_formula():
    x, ours, others = torch.randn(3, 5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, slope = pull(Contrast(torch.nn.Identity()), x, torch.cat((ours, others)))
    expected = 64 * literal(x.requires_grad_(), ours, others)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, x)[0], rtol=1e-10, atol=1e-10)
    # At the earlier generator itself the second term has no gradient, and it is finite.
    (slope,) = torch.autograd.grad(pseudo_huber(x, x.detach()).sum(), x)
    assert not slope.any()


def test_a_turn_equals_plain_autograd(student):
    regression = {"steps": 2, "distance": "huber", "previous": str(student)}
    trainer = trainer_of(UNET, "digits", distill={**BASE, "regression": regression})
    previous = random_network(UNET, seed=5)
    for name, value in trainer.generator.net.state_dict().items():
        assert torch.equal(value, previous.state_dict()[name])
    trainer.update()
    trainer.meters.read()
    noise = copy.deepcopy(trainer.noise.state_dict())
    seen = {}
    trainer.optimiser.step = lambda: seen.update({n: p.grad.clone() for n, p in trainer.generator.named_parameters()})
    trainer.update()

    trainer.noise.load_state_dict(noise)
    z = normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8))
    start = torch.full((8,), 0.28)
    with torch.no_grad():
        others = 0.72 * z + 0.72 * previous(start, 0.72 * z)
        ours = z
        for i in range(2):
            ours = ours + trainer.teacher(torch.full((8,), i / 2), ours) / 2
    made = 0.72 * z + 0.72 * trainer.generator.net(start, 0.72 * z)
    loss = 64 * literal(made, ours, others)
    loss.backward()
    assert trainer.meters.read()["regression loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, p in trainer.generator.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"objective": {"name": "uid"}}, "distill.regression.previous is for distill.objective regression alone"),
        ({"steps": [2]}, "distill.regression.previous with several steps is not for distill.objective regression"),
        ({}, "distill.regression.previous .* has another network than the teacher"),
    ],
)
def test_what_does_not_go_with_an_earlier_student_is_named(student, more, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer_of(MLP, POINTS, distill={**BASE, "regression": {"previous": str(student)}, **more})
