"""The package imports exactly the packages that it declares as its requirements."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from realuid_fast.extras import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "pyproject.toml"


def imported(module):
    """Top-level names that a file imports when it is imported itself, relative ones and type checking's aside."""
    for node in module.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def inside(module, kind):
    """Top-level names that statements of ``kind`` in a file, at any depth, import first."""
    for node in ast.walk(module):
        if isinstance(node, kind) and (kind is not ast.With or ast.unparse(node.items[0].context_expr) == "extra()"):
            yield from imported(node)


def names(requirements):
    return {requirement.split(">")[0].split("=")[0].strip().lower() for requirement in requirements}


def test_every_import_is_a_requirement():
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras, provides = project["optional-dependencies"], packages_distributions()
    files = [file for file in (ROOT / "realuid_fast").rglob("*.py") if "kernels" not in file.parts]
    assert len(files) > 50
    modules = [ast.parse(file.read_text()) for file in files]
    own = {*sys.stdlib_module_names, "realuid_fast", "__future__"}
    always = {name for module in modules for name in imported(module)} - own
    # triton is what the extra gpu brings: only the kernels' files and their backend import it, when asked for.
    assert always - {"triton"} == {"torch", "numpy"}
    assert names(project["dependencies"]) == {"torch", "numpy", "safetensors"}
    # tensorboard is what torch.utils.tensorboard needs.
    found = {name for module in modules for name in inside(module, ast.With)} - {"torch"} | {"tensorboard"}
    assert found == set(PACKAGES)
    for kind in (ast.FunctionDef, ast.If, ast.Try):
        assert not {name for module in modules for name in inside(module, kind)} & found
    for name in found:
        assert PACKAGES[name] in {each.lower() for each in provides.get(name, [PACKAGES[name]])}
    assert set(PACKAGES.values()) == names(extras["train"])


def oldest_torch(text):
    """Versions that ``text`` gives for the oldest torch, whether as a requirement or in a sentence."""
    pattern = (
        r"torch>=([\d.]+)|torch\s+([\d.]+)\s+or\s+newer|torch\s+([\d.]+)\s+with\s+triton\s+[\d.]+\s+is\s+the\s+oldest"
    )
    return {next(filter(None, found.groups())) for found in re.finditer(pattern, text)}


def test_documents_and_metadata_name_one_oldest_torch():
    (bound,) = oldest_torch(PROJECT.read_text())
    documents = {file: oldest_torch(file.read_text()) for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    assert documents[ROOT / "README.md"]
    assert documents[ROOT / "docs" / "install.md"]
    assert {version for found in documents.values() for version in found} == {bound}


def test_make_has_installed_the_peers():
    """Tests skip what compares with a package that is not there: in the environment that make makes, all are."""
    # An environment that somebody made by hand needs no peers; `make test` and .ci/run always run in make's.
    if not (Path(sys.prefix) / ".installed").is_file():
        pytest.skip("this environment is not make's, which alone promises the peers")
    lines = (ROOT / "requirements" / "peers.in").read_text().splitlines()
    peers = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {"torchcfm", "torch-fidelity", "lightning", "accelerate", "flow-matching"} <= set(peers)
    assert {name: version(name) for name in peers} == peers
