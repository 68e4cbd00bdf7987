"""The README: its example runs, and its tables are those of the committed results."""

import re
from pathlib import Path

import torch

from bench import readme

TEXT = (Path(readme.ROOT) / "README.md").read_text()


def test_example_trains():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    before = names["teacher"].state_dict()
    for trained in ("fake", "student"):
        state = names[trained].state_dict()
        assert all(torch.isfinite(value).all() for value in state.values())
        assert any(not torch.equal(value, before[name]) for name, value in state.items())


def test_the_method_is_cited_and_a_beta_outside_its_range_is_said():
    title = "Universal Inverse Distillation for Matching Models with Real-Data Supervision (No GANs)"
    for text in (TEXT, (Path(readme.ROOT) / "docs" / "parity.md").read_text()):
        assert f"[{title}](https://arxiv.org/abs/2509.22459)" in text
        assert "arXiv 2509.22459, ICLR 2026" in text
    rows = re.findall(r"^\| .*beta = ([\d.]+)(.*)$", TEXT, flags=re.MULTILINE)
    assert rows
    for beta, rest in rows:
        assert (float(beta) > 1) == rest.startswith(", outside the paper's (0, 1])")


def test_tables_come_from_committed_results():
    assert readme.rendered(TEXT) == TEXT
