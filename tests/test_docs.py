"""The documents: their code runs, in order and in one namespace, and does what the text around it says."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import realuid_fast as rf

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run(page):
    """The names that a page's code blocks leave behind."""
    torch.manual_seed(0)
    names: dict = {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def adding_a_path():
    return run("adding_a_path.md")


def test_the_worked_path_is_a_path(adding_a_path):
    path = adding_a_path["SubVP"]()
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    scales, rates = torch.func.jvp(path.scales, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.rates(t), rates)
    torch.testing.assert_close(path.scales(t), scales)
    a, c = path.scales(t)
    torch.testing.assert_close(c, 1 - a**2)
    torch.testing.assert_close(path.time_at_sigma(c / a), t)
    assert torch.isfinite(path.coefficients(t, "velocity", "x0")).all()
    assert all(p.grad is not None for p in adding_a_path["net"].parameters())


def test_the_worked_objective_is_realuid_at_equal_weights(adding_a_path):
    built, expected = adding_a_path["RealFGM"](0.92, 0.94), rf.objectives.RealUID(0.92, 0.94)
    assert (built.generated, built.real, built.Q) == (expected.generated, expected.real, expected.Q)
    with pytest.raises(rf.errors.UserError, match="alpha = 1 requires beta = 1"):
        adding_a_path["RealFGM"](1.0, 0.9)


class LightningModule(torch.nn.Module):
    """What the page's module asks of Lightning's."""

    device = torch.device("cpu")

    def optimizers(self):
        return self._optimisers

    def manual_backward(self, loss):
        loss.backward()

    def log(self, name, value):
        pass


class Trainer:
    def __init__(self, max_steps, **_):
        self._steps = max_steps

    def fit(self, module, loader):
        module._optimisers = module.configure_optimizers()
        module.on_fit_start()
        for index, batch in zip(range(self._steps), loader):  # noqa: B905
            module.training_step(batch, index)


class Accelerator:
    """What the page's loop asks of accelerate's."""

    device = torch.device("cpu")

    def __init__(self, cpu):
        assert cpu

    def prepare(self, *things):
        return things

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, norm):
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def unwrap_model(self, net):
        return net


STAND_INS = {
    "lightning": {"LightningModule": LightningModule, "Trainer": Trainer},
    "accelerate": {"Accelerator": Accelerator},
}


@pytest.mark.parametrize("real", [False, True], ids=["stand-ins", "installed"])
@pytest.mark.filterwarnings("ignore")
def test_the_framework_examples_train(monkeypatch, real):
    """With stand-ins for both frameworks; then with those that are installed."""
    there = {name for name in STAND_INS if importlib.util.find_spec(name) is not None} if real else set()
    if real and not there:
        pytest.skip("neither lightning nor accelerate is installed")
    for name in STAND_INS.keys() - there:
        module = types.ModuleType(name)
        vars(module).update(STAND_INS[name])
        monkeypatch.setitem(sys.modules, name, module)
    names = run("in_your_trainer.md")
    assert len(names["history"]) == 6
    assert all(torch.isfinite(loss) for loss in names["history"])
    before = names["networks"]()[0].state_dict()
    module = names["module"]
    for state in (names["state"], names["fake"].state_dict(), module.student.state_dict(), module.fake.state_dict()):
        assert all(torch.isfinite(value).all() for value in state.values())
        assert any(not torch.equal(value, before[name.removeprefix("module.")]) for name, value in state.items())
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())


def test_pages_name_what_is_there():
    """Files, tables and attributes that a page points to exist under that name."""
    root = DOCS.parent
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        for file in re.findall(r"`((?:realuid_fast|tests|docs|bench)/[\w/]+\.\w+)`", text):
            assert (root / file).is_file(), (page.name, file)
        for dotted in re.findall(r"\brf((?:\.\w+)+)", text):
            value = rf
            for name in dotted[1:].split("."):
                value = getattr(value, name)
