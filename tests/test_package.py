"""The package as a stranger meets it: names that load when they are used, and a help that does not wait for torch."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import realuid_fast as rf
from realuid_fast.cli.parser import parser
from realuid_fast.ops import extension

ROOT = Path(__file__).resolve().parent.parent


def fresh(code, *words):
    """The output of ``code`` in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands():
    (found,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def test_version_and_every_help_come_without_torch():
    code = """
import sys
from realuid_fast.cli import main
for words in [["--version"], ["--help"], *([name, "--help"] for name in sys.argv[1:])]:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, words
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    assert fresh(code, *commands()).splitlines()[-1] == "False False"


def test_the_package_runs_as_a_module():
    for module in ("realuid_fast", "realuid_fast.cli"):
        command = [sys.executable, "-m", module, "--version"]
        assert subprocess.check_output(command, text=True).strip() == rf.__version__


def test_every_command_has_its_function():
    for command in commands().values():
        module, name = command.get_default("run").split(".")
        assert callable(getattr(importlib.import_module(f"realuid_fast.cli.{module}"), name))


def test_names_load_when_they_are_used():
    code = """
import sys
import realuid_fast as rf
assert "torch" not in sys.modules
assert set(rf.__all__) <= set(dir(rf))
try:
    rf.nonsense
except AttributeError as error:
    assert "'realuid_fast' has no attribute 'nonsense'" in str(error)
assert "torch" not in sys.modules
rf.paths.Linear()
import torch
assert torch.ops.realuid_fast.interpolate and rf.ops.extension._loaded == (rf.ops.extension.why_missing() is None)
from realuid_fast import *
assert interpolate is rf.interpolate is rf.functional.interpolate and NoiseStream is rf.noise.NoiseStream
assert backend is rf.backends.backend and teachers is rf.teachers and data.digits
"""
    fresh(code)


def test_every_name_is_what_its_module_has():
    for name in rf.__all__:
        found = getattr(rf, name)
        assert getattr(found, "__module__", None) or found is importlib.import_module(f"realuid_fast.{name}")


def test_first_use_inside_a_compiled_function():
    code = """
import realuid_fast as rf
import torch
x, key = torch.ones(4, 3), torch.tensor([1, 2])
coef = torch.tensor([[0.5, 0.0, 0.5, 1.0, 0.0, -1.0, 1.0, 0.0, 1.0]]).repeat(4, 1)
mixed = torch.compile(lambda x, coef, key: rf.interpolate(x, coef, key), fullgraph=True, backend="aot_eager")
assert torch.equal(mixed(x, coef, key), rf.interpolate(x, coef, key))
"""
    fresh(code)


BLOCKED = """
import sys
from importlib.machinery import PathFinder
from realuid_fast.extras import PACKAGES

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        blocked = name.partition(".")[0] in {*PACKAGES, "nvtx", "triton"}
        return None if blocked else super().find_spec(name, *where)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch
import realuid_fast as rf
"""


def test_calls_need_torch_numpy_and_safetensors_alone_and_a_missing_extra_is_named():
    calls = """
path, objective, stream = rf.paths.Linear(), rf.objectives.RealUID(0.92, 0.94), rf.NoiseStream(0)
net = torch.nn.Linear(3, 3)
optimiser = rf.optim.FusedAdam(net.parameters(), lr=0.1, clip=1.0, ema_decays=(0.9,))
x = torch.randn(4, 3)
draw, mixed = path.draw(x, stream.next_key()), path.draw(x, stream.next_key(), real=x)
for loss in (
    rf.matching_loss(draw, net(draw.x_t)),
    rf.fake_loss(objective, mixed, net(mixed.x_t)),
    rf.generator_loss(objective, draw, draw.x_t, net(draw.x_t)),
):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
optimiser.load_state_dict(optimiser.state_dict())
# Its import takes longer than all else that a short command does.
assert "torch._dynamo" not in sys.modules
teacher = rf.teachers.load_teacher("digits").net
teacher(torch.rand(2), torch.randn(2, 1, 8, 8), torch.tensor([1, 2]))
# This one is installed and could be imported.
rf.models.hub, rf.load("digits")
assert not {*PACKAGES, "nvtx", "triton", "huggingface_hub"} & set(sys.modules)
"""
    extras = """
import runpy
from realuid_fast import cli, data, paths
from realuid_fast.errors import UserError

def sentence(call):
    try:
        call()
    except UserError as error:
        return str(error)

for call, package in (
    (data.digits, "scikit-learn"),
    (lambda: rf.couplings.couple(torch.randn(3, 2), torch.randn(3, 2)), "scipy"),
    (lambda: runpy.run_module("realuid_fast.jobs.config"), "pyyaml"),
    (lambda: runpy.run_module("realuid_fast.data.packing"), "tqdm"),
):
    assert sentence(call) == f"{package} is not installed: run pip install 'realuid-fast[train]'", sentence(call)
assert cli.main(["info"]) == 2
"""
    code = BLOCKED + calls + extras
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("is not installed: run pip install 'realuid-fast[train]'\n")


def test_a_build_that_lacks_something_stops_with_a_sentence(tmp_path):
    """``make dist`` installs in every way; here is what setup.py says."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "REALUID_FAST_PURE_PYTHON")}
    for lacks, sentence in (
        ({"PATH": str(tmp_path)}, "realuid-fast: there is no C++ compiler: install one"),
        ({"PYTHONPATH": str(tmp_path)}, "is not installed where this package goes: run pip install 'torch>="),
    ):
        command = [sys.executable, "setup.py", "--quiet", "dist_info", "--output-dir", str(tmp_path)]
        said = subprocess.run(
            command, cwd=ROOT, env={**environment, **lacks}, capture_output=True, text=True, check=False
        )
        assert said.returncode == 1
        assert sentence in said.stderr
        assert said.stderr.strip().endswith("REALUID_FAST_PURE_PYTHON=1 installs the slower pure Python package.")
        assert len(said.stderr.strip().splitlines()) == 1


def test_the_warning_names_the_command_that_repairs_the_installation(monkeypatch):
    monkeypatch.setattr(extension, "_loaded", False)
    monkeypatch.setattr(extension, "_reason", extension._reason)
    monkeypatch.setattr(extension, "_library", lambda: None)
    assert not extension.load()
    options = "--force-reinstall --no-deps --no-cache-dir --no-build-isolation"
    assert f"was not built; with a C++ compiler in place, run: {extension.repair()}" in extension.why_missing()
    assert f"pip install {options} " in extension.repair()
