"""The files around the code: licence, citation, the contributors' page, the workflows, and the places they name."""

import ast
import graphlib
import hashlib
import re
import tomllib
from pathlib import Path

import yaml

import realuid_fast as rf

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".py", ".h", ".cpp"}
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


def modules():
    """The package's Python files, without the kernels, by their path below the package."""
    package = ROOT / "realuid_fast"
    found = {file.relative_to(package): ast.parse(file.read_text()) for file in package.rglob("*.py")}
    return {path: tree for path, tree in found.items() if path.parts[0] != "kernels"}


def test_imports_go_one_way():
    """A folder or a module of the package imports at its head nothing that imports it in turn."""
    needs = {}
    for path, tree in modules().items():
        own = path.parts[0].removesuffix(".py")
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                above = list(path.parts[: len(path.parts) - node.level])
                there = above + (node.module.split(".") if node.module else [])
                names = [there[0]] if there else [alias.name for alias in node.names]
                needs.setdefault(own, set()).update(name for name in names if name != own)
    list(graphlib.TopologicalSorter(needs).static_order())  # raises where there is a circle
    # A trainer takes objects: only the run around it has settings.
    train = {path.name: ast.unparse(tree) for path, tree in modules().items() if path.parts[0] == "train"}
    assert [name for name, text in train.items() if "settings import" in text] == ["loop.py"]
    assert not {"jobs", "cli"} & needs["train"]


def test_modules_and_functions_are_of_a_size_to_be_read():
    lines = {path: len((ROOT / "realuid_fast" / path).read_text().splitlines()) for path in modules()}
    assert {path: count for path, count in lines.items() if count > 450} == {}
    assert sum(count for path, count in lines.items() if path.parts[0] == "train") <= 3300
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                said = (ast.get_docstring(node, clean=False) or "").count("\n") + 1
                assert node.end_lineno - node.lineno + 1 - said <= 80, (path, node.name)


def test_a_kernel_argument_and_a_layer_are_known_to_few_files():
    """Whoever adds one touches as many files: the youngest argument of a kernel, and a layer of the CPU networks."""
    files = [f for folder in ("realuid_fast", "csrc") for f in (ROOT / folder).rglob("*") if f.suffix in SOURCES]
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files if "build" not in file.parts}
    for name, most in (("q_rows", 7), ("norm_silu", 7), ("conv3x3", 5)):
        naming = sorted(file for file, text in texts.items() if re.search(rf"\b{name}\b", text))
        assert 0 < len(naming) <= most, (name, naming)
