"""Fixtures that several test files share, the order of the files, and the line that each prints when it is done."""

import gc
import importlib
import importlib.util
import os
import signal
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

# The processor alone decides which code inductor makes for it. To ask the compiler too takes eight seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Inductor's pool of compilers imports torch in each, which takes longer than what two of them would save.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# The longest files are begun first: two processes share the files, and one begun last would run alone.
LONGEST = [
    "kernels/test_executed.py",
    "kernels/test_ahead_of_time.py",
    "train/ranks/test_runs.py",
    "networks/test_recompute.py",
    "train/test_modes.py",
    "cli/test_plan.py",
    "test_devices.py",
    "train/ranks/test_sharding.py",
    "golden/test_trajectories.py",
    "bench/test_study.py",
    "bench/test_gpu.py",
    "faults/test_kills.py",
    "test_closed_forms.py",
    "train/test_parity.py",
    "test_fuzz.py",
    "functional/test_agreement.py",
    "evaluate/test_fidelity.py",
    "cli/test_cli.py",
    "functional/test_autograd.py",
    "train/ranks/test_sharded_checkpoints.py",
    "kernels/test_interpreter.py",
    "train/test_baselines.py",
    "bench/test_mnist.py",
    "train/test_resume.py",
    "train/ranks/test_updates.py",
    "ops/test_layers.py",
    "train/test_turns.py",
    "ops/test_extension_build.py",
]


def pytest_addoption(parser):
    parser.addoption(
        "--by-file", action="store_true", help="print a line for every file that is done, in place of dots"
    )


@pytest.hookimpl(trylast=True)  # the reporter is there then
def pytest_configure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("--by-file") and reporter is not None:
        config.pluginmanager.register(ByFile(reporter))


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    rank = {here / name: i for i, name in enumerate(LONGEST)}
    if gone := [str(file) for file in rank if not file.exists()]:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py names {gone[0]}, which is not there")
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collectstart():
    """Imported modules stay: looking through them for garbage takes a quarter of the imports' time."""
    gc.disable()


def pytest_collection_finish():
    """The modules' objects stay to the end: plans collect garbage often, and need not look through them each time."""
    gc.collect()
    gc.freeze()
    gc.enable()
    # Torch and Triton make tens of thousands of objects at once and keep them: looking for garbage each 700 of them is
    # a fortieth of the tests' time.
    gc.set_threshold(20_000, 20, 50)


class ByFile:
    """Says which file is done, its tests and their seconds. Failures keep their letter and their report."""

    def __init__(self, reporter):
        self.reporter, self.left, self.seconds, self.results = reporter, Counter(), Counter(), {}

    def pytest_collection_finish(self, session):
        self.left = self.left or Counter(item.nodeid.partition("::")[0] for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.left = self.left or Counter(name.partition("::")[0] for name in ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        return (report.outcome, "", "") if report.outcome in ("passed", "skipped") and report.when == "call" else None

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.results.setdefault(file, Counter())[report.outcome] += 1
        if report.when != "teardown":
            return
        self.left[file] -= 1
        if not self.left[file]:
            results = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.results[file].items()))
            self.reporter.ensure_newline()
            self.reporter.write_line(f"{file}: {results}, {self.seconds[file]:.1f} s")


@pytest.fixture(scope="session", autouse=True)
def hang_up_is_heard():
    """Tests end runs by SIGHUP. A run under nohup rightly does not hear it, and tests may be started under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def peer():
    """torchcfm's U-Net, loaded without the optimal-transport package that its top level imports."""
    spec = importlib.util.find_spec("torchcfm")
    if spec is None:
        pytest.skip("torchcfm is not installed")
    before = {name: module for name, module in sys.modules.items() if name.startswith("torchcfm")}
    package = types.ModuleType("torchcfm")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torchcfm"] = package
    try:
        return importlib.import_module("torchcfm.models.unet.unet").UNetModelWrapper
    finally:
        for name in [name for name in sys.modules if name.startswith("torchcfm")]:
            del sys.modules[name]
        sys.modules.update(before)
