"""Facts of a path: known while a program is traced, on first use too, and never another path's."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import realuid_fast as rf
from realuid_fast.paths import VE, VP, BrownianBridge, DiscreteVP, Linear, custom

OBJECTIVES = rf.objectives
X, REAL, OUT, OUT2 = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.3, 0.5, 0.8])
KEY = rf.NoiseStream(0).next_key()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, t, x, y=None):
        return torch.tanh(self.linear(x)) + t[:, None]


NET = Net()


def check(function, *calls, **options):
    """Every call compiled in one graph against the same call in eager mode, which comes after it."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True, **options)
    found = [compiled(*call) for call in calls]
    for call, got in zip(calls, found, strict=True):
        torch.testing.assert_close(got, function(*call))


# Every test gives its paths a sigma_data of their own, so that no earlier test has asked for their facts.
CALLS = {
    "generator_loss": lambda x: rf.generator_loss(
        OBJECTIVES.UID(), Linear(sigma_data=0.11).draw(x, KEY, t=T), OUT, OUT2
    ),
    "reads x_t": lambda x: rf.generator_loss(
        OBJECTIVES.SIM(), Linear(data_at=0, sigma_data=0.12).draw(x, KEY, t=T, match="x0"), OUT, OUT2
    ),
    "normalised": lambda x: rf.generator_loss(
        OBJECTIVES.NormalisedRealUID(0.9, 0.8),
        VP(sigma_data=0.13).draw(x, KEY, t=T, match="x0", predict="noise"),
        OUT,
        OUT2,
    ),
    "fake_loss": lambda x: rf.fake_loss(
        OBJECTIVES.RealUID(0.9, 0.8),
        Linear(sigma_data=0.14).draw(x, KEY, real=REAL, t=T, match="x0"),
        torch.cat((OUT, OUT2)),
        teacher_out=torch.cat((OUT2, OUT)),
    ),
    "generator_grads": lambda x: tuple(
        rf.generator_grads(OBJECTIVES.SiD(), VP(sigma_data=0.15).draw(x, KEY, t=T, match="x0", predict="v"), OUT, OUT2)[
            :6
        ]
    ),
    "fake_grads": lambda x: tuple(rf.fake_grads(OBJECTIVES.UID(), Linear(sigma_data=0.16).draw(x, KEY, t=T), OUT)),
    "two-sided": lambda x: rf.generator_loss(
        OBJECTIVES.UID(), BrownianBridge(sigma_data=0.17).draw(x, KEY, t=T, endpoint=REAL), OUT, OUT2
    ),
    "table": lambda x: rf.matching_loss(DISCRETE.draw(x, KEY, t=T, predict="noise"), OUT),
    "custom": lambda x: rf.matching_loss(CUSTOM.draw(x, KEY, t=T, match="x0"), OUT),
    "one_step": lambda x: rf.sampling.one_step(NET, x, 0.3, path=Linear(sigma_data=0.18)),
    "default_start": lambda x: rf.sampling.one_step(
        NET, x, rf.sampling.default_start(Linear(sigma_data=0.19)), path=Linear(sigma_data=0.19)
    ),
    "integrate": lambda x: rf.sampling.integrate(NET, x, 2, path=VP(sigma_data=0.2)),
}
DISCRETE = DiscreteVP(sigma_data=0.21)
CUSTOM = custom(a=lambda t: t**2, c=lambda t: 1 - t, sigma_data=0.22)


@pytest.mark.parametrize("name", CALLS)
def test_a_path_is_compiled_at_its_first_use(name):
    check(CALLS[name], (X,))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_tells_paths_apart_by_their_attributes(dynamic):
    check(
        lambda x, path, t: rf.sampling.one_step(NET, x, t, path=path, predict="edm"),
        *((X, VE(sigma_max=high, sigma_data=0.23), high / 2) for high in (80.0, 70.0, 60.0)),
        dynamic=dynamic,
    )
    check(
        lambda x, path: rf.matching_loss(path.draw(x, KEY, t=T, match="x0"), OUT),
        *((X, Linear(data_at=end, sigma_data=0.24)) for end in (0, 1)),
        dynamic=dynamic,
    )


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_is_exported_at_its_paths_first_use(strict):
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.path = NET, Linear(sigma_data=0.25 + strict)

        def forward(self, x):
            made = rf.sampling.one_step(self.net, x, 0.3, path=self.path)
            draw = self.path.draw(made, KEY, t=T, match="x0")
            return made, rf.matching_loss(draw, OUT)

    with torch.no_grad():
        found = torch.export.export(Program(), (X,), strict=strict).module()(X)
        torch.testing.assert_close(found, Program()(X))


class Power(rf.paths.OneSidedPath):
    """No dataclass: equality and hash, which it inherits, see no ``power``."""

    def __init__(self, power, **others):
        super().__init__()
        for name, value in {"power": power, **others}.items():
            object.__setattr__(self, name, value)

    def scales(self, t):
        return t**self.power, 1 - t

    def rates(self, t):
        return self.power * t ** (self.power - 1), -torch.ones_like(t)


@dataclass(frozen=True, slots=True)
class Slots(rf.paths.OneSidedPath):
    power: float = field(default=1.0)

    scales, rates = Power.scales, Power.rates


PATHS = {
    "no dataclass": Power,
    "a list": lambda power: Power(power, table=[1.0, 2.0]),
    "slots": lambda power: Slots(power=power),
}


@pytest.mark.parametrize("make", PATHS.values(), ids=PATHS)
def test_a_path_has_its_own_numbers(make):
    for power in (1.0, 3.0):
        start = rf.sampling.starting(make(power), predict="x0", t_start=0.5)
        expected = rf.sampling.starting(custom(a=lambda t, p=power: t**p, c=lambda t: 1 - t), "velocity", 0.5)
        found = rf.sampling.starting(make(power), "velocity", 0.5)
        assert found == pytest.approx(expected)
        assert start.k_out == 1
    check(lambda x, path: rf.sampling.one_step(NET, x, 0.5, path=path), (X, make(1.0)), (X, make(3.0)))


def test_facts_are_computed_once_for_equal_paths(monkeypatch):
    first = Linear(sigma_data=0.26).reads_x_t("x0", "velocity")
    monkeypatch.setattr(Linear, "coefficients", None)
    assert Linear(sigma_data=0.26).reads_x_t("x0", "velocity") is first is True


def test_a_fact_is_computed_outside_of_a_callers_transforms():
    path = Linear(sigma_data=0.27)
    with torch.inference_mode(), torch.device("meta"):
        assert path.reads_x_t("x0", "velocity")
    found = torch.func.vmap(lambda x: rf.sampling.one_step(NET, x, 0.31, path=path))(X[None])
    torch.testing.assert_close(found[0], rf.sampling.one_step(NET, X, 0.31, path=path))
