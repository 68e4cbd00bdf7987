"""The files around the code: licence, citation, the contributors' page, the workflows, and the places they name."""

import hashlib
import re
import tomllib
from pathlib import Path

import yaml

import realuid_fast as rf

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_licence_is_apache_2_and_travels_with_the_package():
    text = " ".join((ROOT / "LICENSE").read_text().split())
    # The words of the licence as its foundation publishes them, whatever the white space.
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"
    )
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert PROJECT["authors"]
    assert PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2509.22459"


def test_the_citation_is_of_this_version_and_of_the_method():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == rf.__version__
    (paper,) = citation["references"]
    assert paper["title"].startswith("Universal Inverse Distillation for Matching Models")
    assert paper["identifiers"][0]["value"] == "arXiv:2509.22459"
    assert len(paper["authors"]) == 8


def test_the_contributors_page_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w./]+/[\w./]*|[\w]+\.(?:md|toml))`", text) + re.findall(r"\]\(([\w./]+)", text)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists() or (ROOT / name.removesuffix("/")).exists(), name
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", targets, re.MULTILINE), target


def test_workflows_run_what_a_contributor_runs():
    flows = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert {"run": ".ci/run"} in flows["test"]["jobs"]["test"]["steps"]
    # A wheel that lacks the extension fails its own test.
    (build,) = (step for step in flows["wheels"]["jobs"]["wheel"]["steps"] if "env" in step)
    assert "extension.why_missing()" in build["env"]["CIBW_TEST_COMMAND"]
    torch = re.search(r"torch==[\d.]+", build["env"]["CIBW_BEFORE_BUILD"])[0]
    assert torch in (ROOT / "Makefile").read_text()
    for flow in flows.values():
        assert flow["permissions"] == {"contents": "read"}
