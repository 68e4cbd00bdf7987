"""Fixtures that several test files share."""

import importlib
import importlib.util
import signal
import sys
import types

import pytest


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
