"""The documents: their code runs, in order and in one namespace, and does what the text around it says."""

import re
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
