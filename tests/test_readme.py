"""The README and the pages: the README's loop runs, tables and line links are those of the committed files."""

import re

import pytest
import torch

from bench import readme

TEXT = (readme.ROOT / "README.md").read_text()


def test_the_readmes_loop_trains_and_saves_a_picture(monkeypatch, tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    before = names["teacher"].state_dict()
    for trained in ("fake", "student"):
        state = names[trained].state_dict()
        assert all(torch.isfinite(value).all() for value in state.values())
        assert any(not torch.equal(value, before[name]) for name, value in state.items())
    assert "update 9: fake loss" in capsys.readouterr().out
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_is_a_short_one():
    assert len(TEXT) <= 10_000


def test_the_method_is_cited_and_a_beta_outside_its_range_is_said():
    title = "Universal Inverse Distillation for Matching Models with Real-Data Supervision (No GANs)"
    for text in (TEXT, (readme.ROOT / "docs" / "parity.md").read_text()):
        assert f"[{title}](https://arxiv.org/abs/2509.22459)" in text
        assert "arXiv 2509.22459, ICLR 2026" in text
    study = (readme.ROOT / "docs" / "real_data.md").read_text()
    rows = re.findall(r"^\| .*beta = ([\d.]+)(.*)$", study, flags=re.MULTILINE)
    assert rows
    for beta, rest in rows:
        assert (float(beta) > 1) == rest.startswith(", outside the paper's (0, 1])")
    assert "and so outside the paper's (0, 1]" in " ".join(study.split())
    # The README names pairs of the paper's domain alone.
    section = TEXT.partition("## Does real data help?")[2].partition("\n## ")[0]
    pairs = re.findall(r"\(([\d.]+), ([\d.]+)\)", section)
    assert len(pairs) == 3
    assert all(0 < float(number) <= 1 for pair in pairs for number in pair)


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_tables_and_line_links_are_those_of_the_committed_files(page):
    text = page.read_text()
    assert readme.relinked(readme.rendered(text)) == text


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    generated = {"settings.md", "commands.md", "api.md"}
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target = link.partition("#")[0]
        if target and "://" not in target and target not in generated:
            assert (page.parent / target).exists(), link
