"""DMD's regression on stored pairs beside its gradient: the file, the term and a turn by the paper's formula."""

import copy

import pytest
import torch

from realuid_fast import cli, data, teachers
from realuid_fast.data import Dataset
from realuid_fast.errors import UserError
from realuid_fast.models import pairs
from realuid_fast.noise import normal
from realuid_fast.sampling import integrate
from realuid_fast.train.pairs import PairTerm

from ..helpers import LABELLED, MLP, POINTS, random_network, save_teacher, trainer_of

SETTINGS = {"teacher": "x", "batch": 8, "updates": 4, "fake_turns": 1, "ema": [0.9], "export": 0.9}
DMD = {**SETTINGS, "objective": {"name": "dmd"}}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """40 pairs of a labelled teacher of digits, written by the command."""
    folder = tmp_path_factory.mktemp("pairs")
    teacher = save_teacher(folder / "teacher.safetensors", LABELLED, {"name": "digits"})
    words = ["sample", "--model", str(teacher), "--count", "40", "--steps", "3", "--solver", "heun", "--pairs"]
    assert cli.main([*words, "--out", str(folder / "pairs.safetensors")]) == 0
    return folder / "pairs.safetensors"


def test_the_command_writes_noise_and_the_sample_that_follows_from_it(file, capsys):
    made, net = pairs.read(file), teachers.load(file.parent / "teacher.safetensors").net
    assert (made.shape, made.classes, len(made), made.paired) == ((1, 8, 8), 10, 40, True)
    again = integrate(net, made.train_endpoints, 3, "heun", made.train_labels)
    torch.testing.assert_close(made.train, again, rtol=1e-4, atol=1e-4)
    assert 0.8 < float(made.train_endpoints.std()) < 1.2
    assert cli.main(["sample", "--model", "digits", "--pairs", "--out", str(file.parent / "pairs.npy")]) == 2
    assert "pairs.npy must end in .safetensors with --pairs" in capsys.readouterr().err


def test_the_term_is_the_papers():
    """Yin et al. (2311.18828), section 3.2: ``lambda E d(G(z), x(z))``, its means over elements times their number."""
    z, x = torch.randn(2, 6, 3, 4, dtype=torch.float64).float()
    weights = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    like, net = torch.zeros(6, 3, 4, dtype=torch.float64), torch.nn.Linear(1, 1)

    def lpips(made, target):
        """A distance with weights of its own, of features that are not linear in the sample."""
        return (torch.sin(made) - torch.sin(target)).abs().sum((1, 2)) / 7

    for distance, literal in ((pairs.mean_square, lambda x, y: ((x - y) ** 2).mean((1, 2))), (lpips, lpips)):
        held = pairs.Pairs(Dataset("pairs", x, x[:1], train_endpoints=z), 0.25, distance)
        term = PairTerm(held, like, net, seed=0)
        term.read()
        loss, made, seed = term.grads(lambda z, y: z.to(like) @ weights, contextless)
        order = term.batches.state_dict()["order"]
        plain = 0.25 * 12 * literal(z[order].double() @ weights, x[order].double()).mean()
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-10, atol=1e-10)
        (gradient,) = torch.autograd.grad(plain, weights)
        torch.testing.assert_close(torch.autograd.grad(made, weights, seed)[0], gradient, rtol=1e-10, atol=1e-10)
    for wrong, sentence in ((torch.zeros(6, 2), "are samples of"), (like, "have 0 classes, the network has 3")):
        net.num_classes = 3
        with pytest.raises(UserError, match=sentence):
            PairTerm(held, wrong, net, seed=0)


class contextless:
    """A precision that changes nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_dmds_turn_with_pairs_equals_plain_autograd(file):
    """``<x, (f - f*) / mean |x - f*|>`` and ``0.25 D mean_square`` in one gradient, on digits with labels."""
    held = {"name": "digits"}
    settings = {**DMD, "regression": {"pairs": str(file)}, "t_start": 0.28}
    trainer = trainer_of(LABELLED, held, path={"match": "x0"}, distill=settings)
    trainer.update()
    state = copy.deepcopy(trainer.state_dict())
    trainer.pairs.read()
    loss, watched = trainer.generator_backward()
    explicit = [p.grad.clone() for p in trainer.generator.net.parameters()]
    trainer.load_state_dict(state)
    trainer.generator_optimiser.zero_grad()

    def generated(z, labels):
        return 0.72 * z + 0.72 * trainer.generator.net(torch.full((8,), 0.28), 0.72 * z, labels)

    labels = trainer.labels[torch.randint(len(trainer.labels), (8,), generator=trainer.draws)]
    x = generated(normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8)), labels)
    t = trainer.path.sample_time(8, trainer.draws)
    at = t.view(-1, 1, 1, 1)
    x_t = (at * x + (1 - at) * normal(trainer.noise.next_key(), x)).detach()
    teacher, fake = (x_t + (1 - at) * net(t, x_t, labels) for net in (trainer.teacher, trainer.fake))
    scale = (x - teacher).abs().mean((1, 2, 3), keepdim=True)
    matching = (x * ((fake - teacher) / scale).detach()).sum() / 8
    target, labels = trainer.pairs.batches.next()
    regression = 0.25 * (generated(trainer.pairs.batches.endpoints(), labels) - target).square().sum() / 8
    assert float(watched["regression loss"]) == pytest.approx(float(regression.detach()), rel=1e-5)
    assert float(loss) == pytest.approx(float(matching.detach()), rel=1e-3)
    for mine, p in zip(explicit, trainer.generator.net.parameters(), strict=True):
        (plain,) = torch.autograd.grad(matching + regression, p, retain_graph=True)
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()) + 1e-7)


def test_pairs_go_on_where_a_run_was_stopped(file):
    settings = {**DMD, "regression": {"pairs": str(file), "weight": 2.0}}
    straight, after = (trainer_of(LABELLED, "digits", path={"match": "x0"}, distill=settings) for _ in range(2))
    straight.update()
    after.load_state_dict(copy.deepcopy(straight.state_dict()))
    for trainer in (straight, after):
        trainer.meters.read()
        trainer.update()
    assert straight.meters.read() == after.meters.read()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"times": [0.5], "t_start": 0.1}, "distill.regression.pairs are for a student of one step"),
        ({"objective": {"name": "regression"}}, "distill.regression.pairs is not for distill.objective regression"),
        ({"regression": {"pairs": "none.safetensors"}}, "there is no file none.safetensors"),
        ({"regression": {"pairs": "{teacher}"}}, "holds no pairs of noise and samples: realuid-fast sample --pairs"),
        ({"regression": {"pairs": "{pairs}", "weight": 0.0}}, "distill.regression.weight must be"),
    ],
)
def test_pairs_that_cannot_be_are_named(file, settings, sentence):
    given = {"regression": {"pairs": "{pairs}"}, **settings}
    for key, value in given["regression"].items():
        if isinstance(value, str):
            places = {"teacher": file.parent / "teacher.safetensors", "pairs": file}
            given["regression"] = {**given["regression"], key: value.format(**places)}
    with pytest.raises(UserError, match=sentence):
        trainer_of(LABELLED, "digits", path={"match": "x0"}, distill={**DMD, **given})
    held = data.load(POINTS)
    model = teachers.Model(random_network(MLP), teachers.Description(MLP, data=held.config))
    with pytest.raises(UserError, match=r"regression\.pairs are samples of"):
        trainer_of(None, POINTS, model, path={"match": "x0"}, distill={**DMD, "regression": {"pairs": str(file)}})
