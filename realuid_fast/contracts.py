"""When a check may read tensor values on the host."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def contracts_on() -> bool:
    """Whether ``REALUID_FAST_CONTRACTS=1`` asks for checks that stall the device."""
    return os.environ.get("REALUID_FAST_CONTRACTS", "0") == "1"


def host_checks_allowed(tensor: Tensor) -> bool:
    """True where reading ``tensor`` costs no synchronisation (CPU, eager) or contracts are on."""
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.device.type == "cpu" or contracts_on()
