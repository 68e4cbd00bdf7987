"""The documents: their code runs, in order and in one namespace, and does what the text around it says."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import realuid_fast as rf
from realuid_fast.noise import normal

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


class Step:
    """An optimiser as manual optimisation sees it: a step of any of them is a step of the trainer."""

    def __init__(self, optimiser, trainer):
        self.optimizer, self._trainer = optimiser, trainer

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()
        self._trainer.global_step += 1


class LightningModule(torch.nn.Module):
    """What manual optimisation has of Lightning's module, and nothing else: ``torch.nn.Module`` refuses other names.

    ``self.trainer``, optimisers and the log are there while the trainer fits, and not before.
    """

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True
        self._trainer = None

    @property
    def trainer(self):
        if self._trainer is None:
            raise RuntimeError("the module is not attached to a trainer")
        return self._trainer

    def optimizers(self):
        steps = self.trainer.steps
        return steps if len(steps) > 1 else steps[0]

    def manual_backward(self, loss):
        if self.automatic_optimization:
            raise RuntimeError("manual_backward is for automatic_optimization = False")
        loss.backward()

    def log(self, name, value):
        if not isinstance(name, str) or torch.as_tensor(value).numel() != 1:
            raise ValueError(f"{name!r} must be a name, and {value} one number")
        self.trainer.callback_metrics[name] = torch.as_tensor(value, dtype=torch.float32)


class Trainer:
    def __init__(
        self, *, max_steps, accelerator, logger, enable_checkpointing, enable_progress_bar, enable_model_summary=True
    ):
        assert (accelerator, logger, enable_checkpointing) == ("cpu", False, False)
        self.max_steps, self.global_step, self.callback_metrics = max_steps, 0, {}

    def fit(self, module, loader):
        assert not module.automatic_optimization
        module._trainer = self
        self.steps = [Step(optimiser, self) for optimiser in module.configure_optimizers()]
        module.on_fit_start()
        while self.global_step < self.max_steps:
            for index, batch in enumerate(loader):
                result = module.training_step(batch, index)
                assert result is None or isinstance(result, torch.Tensor)
                if self.global_step == self.max_steps:
                    break


class Accelerator:
    """The part of accelerate's Accelerator that the page's loop uses."""

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


def page_with(monkeypatch, there):
    """The page's names, run with the frameworks that are ``there`` and with stand-ins for the others."""
    for name in STAND_INS.keys() - there:
        module = types.ModuleType(name)
        vars(module).update(STAND_INS[name])
        monkeypatch.setitem(sys.modules, name, module)
    return run("in_your_trainer.md")


@pytest.mark.parametrize("real", [False, True], ids=["stand-ins", "installed"])
@pytest.mark.filterwarnings("ignore")
def test_the_framework_examples_train(monkeypatch, real):
    """With stand-ins for both frameworks, then with those that are installed."""
    there = {name for name in STAND_INS if importlib.util.find_spec(name) is not None} if real else set()
    if real and not there:
        pytest.skip("neither lightning nor accelerate is installed")
    names = page_with(monkeypatch, there)
    assert len(names["history"]) == 6
    assert all(torch.isfinite(loss) for loss in names["history"])
    before = names["networks"]()[0].state_dict()
    module = names["module"]
    for state in (names["state"], names["fake"].state_dict(), module.student.state_dict(), module.fake.state_dict()):
        assert all(torch.isfinite(value).all() for value in state.values())
        assert any(not torch.equal(value, before[name.removeprefix("module.")]) for name, value in state.items())
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())


def plain_loop(names, seed, updates):
    """The turns of the page's Lightning module without it: networks, and every loss beside the published formula's."""
    teacher, fake, student = names["networks"]()
    optimisers = [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999)) for net in (fake, student)]
    stream, losses = rf.NoiseStream(seed=0), []
    torch.manual_seed(seed)
    for update, (real, y) in zip(range(updates), names["loader"], strict=False):
        key, state, last = stream.next_key(), torch.get_rng_state(), (update + 1) % 3 == 0
        if last:
            loss = names["generator_loss"](teacher, fake, student, y, key)
        else:
            loss = names["fake_loss"](fake, student, real, y, key)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        losses.append((float(loss), published_loss(names, (teacher, fake, student), real, y, key, last)))
        torch.set_rng_state(after)
        optimiser = optimisers[last]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (fake, student), losses


@torch.no_grad()
def published_loss(names, networks, real, y, key, generator_turn, alpha=0.92, beta=0.94):
    """``dist_loss`` of the published code, to minimise, as two sums of squares in float64."""
    teacher, fake, student = networks
    x = names["generate"](student, y)
    t, noise = names["path"].sample_time(len(y)), normal(key, x)
    t_wide = t.view(-1, 1, 1, 1)

    def square(net, x, scale):
        out = net(t, t_wide * x + (1 - t_wide) * noise, y).double()
        return (out - scale * (x - noise).double()).square().sum() / len(y)

    if generator_turn:
        return float(alpha * square(teacher, x, beta / alpha) - alpha * square(fake, x, beta / alpha))
    data_term = (1 - alpha) * square(fake, real, (1 - beta) / (1 - alpha))
    return float(alpha * square(fake, x, beta / alpha) + data_term)


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "installed"])
@pytest.mark.filterwarnings("ignore")
def test_lightning_makes_the_plain_loop(monkeypatch, real):
    """The same parameters to the bit, as many steps, and losses that are the published formula's."""
    if real and importlib.util.find_spec("lightning") is None:
        # The package does not need it. Where make has installed the peers, tests/test_supply.py sees that it is there.
        pytest.skip("lightning is not installed: the stand-in alone runs")
    names = page_with(monkeypatch, {"lightning"} if real else set())
    assert names["trainer"].global_step == 6
    module = names["Distillation"]()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = names["Trainer"](max_steps=7, accelerator="cpu", logger=False, **quiet)
    torch.manual_seed(3)
    trainer.fit(module, names["loader"])
    plain, losses = plain_loop(names, 3, 7)
    for ours, theirs in zip((module.fake, module.student), plain, strict=True):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert trainer.global_step == 7
    for index, (loss, published) in enumerate(losses):
        # A generator's loss is the difference of two sums as large as the fake model's.
        assert loss == pytest.approx(published, rel=1e-5, abs=1e-5 * losses[0][1] if index % 3 == 2 else 0)
    assert set(trainer.callback_metrics) == {"fake loss", "generator loss"}
    assert float(trainer.callback_metrics["fake loss"]) == pytest.approx(losses[6][0], rel=1e-6)
    assert float(trainer.callback_metrics["generator loss"]) == pytest.approx(losses[5][0], rel=1e-6)


def test_the_stand_in_refuses_what_lightning_does_not_have(monkeypatch):
    names = page_with(monkeypatch, set())
    module = names["Distillation"]()
    with pytest.raises(RuntimeError, match="not attached to a trainer"):
        module.optimizers()
    with pytest.raises(AttributeError):
        _ = module.optimisers
    with pytest.raises(TypeError):
        names["Trainer"](steps=6)
    module.automatic_optimization = True
    with pytest.raises(RuntimeError, match="automatic_optimization = False"):
        module.manual_backward(torch.zeros((), requires_grad=True))


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


def test_the_training_page_trains():
    names = run("training.md")
    assert set(names["reading"].values()) == set(names["wires"].names)
    before = names["teacher"].state_dict()
    for trained in ("fake", "student"):
        state = names[trained].state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in state.items())
