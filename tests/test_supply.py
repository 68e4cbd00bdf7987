"""What the package says it needs is what it imports."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "pyproject.toml"


def imported(module):
    """Top-level names that a file imports when it is imported itself, relative ones and type checking's aside."""
    for node in module.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def names(requirements):
    return {requirement.split(">")[0].split("=")[0].strip().lower() for requirement in requirements}


def test_every_import_is_a_requirement():
    project = tomllib.loads(PROJECT.read_text())["project"]
    needed, provides = names(project["dependencies"]), packages_distributions()
    files = [file for file in (ROOT / "realuid_fast").rglob("*.py") if "kernels" not in file.parts]
    assert len(files) > 50
    found = {name for file in files for name in imported(ast.parse(file.read_text()))}
    third = found - set(sys.stdlib_module_names) - {"realuid_fast", "__future__"}
    assert {"torch", "numpy", "yaml"} <= third
    for name in third:
        # triton is what the extra gpu brings: only the kernels' files and their backend import it, when asked for.
        allowed = needed | (names(project["optional-dependencies"]["gpu"]) if name == "triton" else set())
        assert {each.lower() for each in provides.get(name, [name])} & allowed, f"{name} is imported and not required"


def test_make_has_installed_the_peers():
    """Tests skip what compares with a package that is not there: in the environment that make makes, all are."""
    # An environment that somebody made by hand needs no peers; `make test` and .ci/run always run in make's.
    if not (Path(sys.prefix) / ".installed").is_file():
        pytest.skip("this environment is not make's, which alone promises the peers")
    lines = (ROOT / "requirements" / "peers.in").read_text().splitlines()
    peers = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {"torchcfm", "torch-fidelity", "lightning", "accelerate", "flow-matching"} <= set(peers)
    assert {name: version(name) for name in peers} == peers
