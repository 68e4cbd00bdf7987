"""Checks of arguments' Python types in public calls, and the rule when a check may read tensor values on the host."""

from __future__ import annotations

import numbers
import os

import torch
from torch import Tensor

from .errors import UserError


def contracts_on() -> bool:
    """Whether ``REALUID_FAST_CONTRACTS=1`` asks for checks that stall the device."""
    return os.environ.get("REALUID_FAST_CONTRACTS", "0") == "1"


def host_checks_allowed(tensor: Tensor) -> bool:
    """Whether a check may read ``tensor``: reading needs no synchronisation (CPU, eager), or contracts are on."""
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    # Inside torch.func's transforms a tensor may stand for many.
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu" or contracts_on()


def type_name(value: object) -> str:
    """The type of a value in words, for an error: ``"numpy.ndarray"``, ``"the function RealUID itself"``."""
    if callable(value) and hasattr(value, "__name__"):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__} itself"
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def is_number(value: object, whole: bool = False) -> bool:
    """Whether a value is a real number, or a whole one: Python's and NumPy's count, truth values do not."""
    return isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)


def check_device(device: object) -> None:
    """Refuse a value that is neither a torch.device nor the name of one."""
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise UserError(f"device must be a torch.device or the name of one, not {device!r}") from None


def check_tensor(name: str, value: object) -> None:
    """Refuse a value that is not a tensor."""
    if not isinstance(value, Tensor):
        raise UserError(f"{name} must be a torch.Tensor, not {type_name(value)}")


def check_whole(name: str, value: object) -> None:
    """Refuse a value that is not a whole number. A size that is being traced counts as one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return
    if not is_number(value, whole=True):
        raise UserError(f"{name} must be a whole number, not {type_name(value)}")
