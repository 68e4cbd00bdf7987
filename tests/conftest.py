"""Fixtures that several test files share."""

import importlib
import importlib.util
import sys
import types

import pytest


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
