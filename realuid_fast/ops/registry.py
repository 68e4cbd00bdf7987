"""Defines the operators: schema, shapes and autograd once; backends register their implementations per device.

The library ``realuid_fast`` dispatches on the tensors' device and falls back on the plain torch reference. The library
``realuid_fast_reference`` has the same operators with the reference alone, which is what the backend override
``"torch"`` selects.

A differentiable operator has an autograd node in Python, which serves every kind of call. The library
``realuid_fast_node`` has the same operators with nodes in C++ (``csrc/autograd``), for plain calls in eager mode. They
are there if the package was compiled against the installed torch. Results are the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UserError
from . import adam, backends, extension, layers, losses
from .autograd import LossFunction, refuse_forward_mode, refuse_transforms
from .operator import Loss, Operator

KERNELS: tuple[Operator, ...] = (*losses.OPERATORS, *adam.OPERATORS)
LAYERS: tuple[Operator, ...] = layers.OPERATORS
LOSSES: tuple[Loss, ...] = losses.LOSSES
# The two libraries have names here, because torch.compile guards on every step from a module to what it calls.
_FUSED, _REFERENCE = torch.ops.realuid_fast, torch.ops.realuid_fast_reference
_DIFFERENTIABLE = ("interpolate", *(f"{loss.kernel}_loss" for loss in LOSSES))
_IN_CPP = (*_DIFFERENTIABLE, *(loss.kernel for loss in LOSSES))

# The function that runs a differentiable operator in eager mode, by library and operator.
_EAGER: dict[tuple[str, str], Callable[..., Any]] = {}
# The operators of the library of nodes in C++. They stand for those of the library ``realuid_fast``.
_NODES: dict[str, Callable[..., Any]] = {}


def current(device: torch.device) -> Any:
    """The operator namespace that the backend in force selects for tensors on ``device``."""
    return _REFERENCE if backends.select(device) == "torch" else _FUSED


def plain(op: str, *inputs: Any) -> Any:
    """A differentiable operator by its node in C++, or None for a call that has to take the way through Python.

    The same holds for the operators of explicit gradients, the losses' kernels.

    The inputs need no check: C++ looks whether they fit together, and the checks in Python name what does not.
    Where the operator has ``noise_rows``, None stands for as many as there are samples.
    """
    if (
        torch.compiler.is_compiling()
        or op not in _NODES
        or backends.chosen() is not None
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.overrides.has_torch_function(inputs)
    ):
        return None
    try:
        result = _NODES[op](*inputs)
    except RuntimeError:
        # The same call through Python ends in a sentence that says more than the dispatcher's.
        return None
    return None if type(result) is tuple and result[0] is None else result


def run(op: str, device: torch.device, *inputs: Any) -> Any:
    """Call a differentiable operator of the backend in force on inputs that were checked.

    The dispatcher is passed by if nothing needs it. It would reach the same function, but it converts every argument to
    C++ and back. On a few samples that takes as long as the kernel.
    """
    namespace = current(device)
    if (
        torch.compiler.is_compiling()
        or _autocast(device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.overrides.has_torch_function(inputs)
    ):
        return getattr(namespace, op)(*inputs)
    found = plain(op, *inputs)
    return _EAGER[namespace.name, op](*inputs) if found is None else found


def _autocast(device_type: str) -> bool:
    # torch raises for devices that have no autocast, such as meta.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _checked(library: str, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which refuses all but plain dense tensors of one device and records nothing for autograd.

    torch dispatches on the most specialised tensor among the arguments. So one meta or quantised tensor sends the whole
    call here, and its ordinary tensors would get a result that nobody computed.
    """

    def checked(*inputs: Any) -> Any:
        arguments = getattr(getattr(torch.ops, library), op).default._schema.arguments
        first = None
        # Not strict: the dispatcher leaves off trailing arguments that have their default value.
        for argument, value in zip(arguments, inputs, strict=False):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
                    raise UserError(
                        f"{argument.name} must be a plain dense tensor, neither sparse, quantised nor nested"
                    )
                first = first or (argument.name, tensor.device)
                if tensor.device != first[1]:
                    raise UserError(f"{argument.name} must be on {first[1]} like {first[0]}, not on {tensor.device}")
        with torch.no_grad():
            return function(*inputs)

    return checked


def _define_loss(library: torch.library.Library, name: str, loss: Loss) -> None:
    kernel_schema = next(operator.schema for operator in KERNELS if operator.name == loss.kernel)
    arguments = kernel_schema[kernel_schema.index("(") + 1 : kernel_schema.index(", bool want")]
    op = f"{loss.kernel}_loss"
    library.define(f"{op}({arguments}) -> Tensor")
    kernel = getattr(getattr(torch.ops, name), loss.kernel).default
    coef = [argument.split()[1] for argument in arguments.split(", ")].index("coef")

    def without_gradients(*inputs: Any) -> Tensor:
        mean, rows, *_ = kernel(*inputs, *(False for _ in loss.differentiable))
        return mean if inputs[-1] else rows

    def with_gradients(*inputs: Any) -> Tensor:
        refuse_forward_mode(op, inputs)
        if torch.is_grad_enabled():
            leaves = [inputs[i] for i in loss.differentiable]
            wants = [leaf is not None and leaf.requires_grad for leaf in leaves]
            if True in wants:
                refuse_transforms(op)
                return LossFunction.apply(kernel, wants, inputs, *itertools.compress(leaves, wants))
        return without_gradients(*inputs)

    def shapes(*inputs: Any) -> Tensor:
        rows = inputs[coef]
        return rows.new_empty(() if inputs[-1] else rows.shape[0])

    library.impl(op, without_gradients, "CompositeExplicitAutograd")
    library.impl(op, with_gradients, "Autograd")
    _EAGER[name, op] = with_gradients
    torch.library.register_fake(f"{name}::{op}", _checked(name, op, shapes), lib=library)
    # Losses run in float32 under autocast, as torch's own do.
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"{name}::{op}", device, torch.float32, lib=library)


def _differentiate(library: torch.library.Library, name: str, op: str, function: Any) -> None:
    """Register ``function`` as the operator's autograd; a call costs less than by torch.library's own way."""
    kernel = getattr(getattr(torch.ops, name), op).default

    def with_gradients(*inputs: Any) -> Any:
        refuse_forward_mode(op, inputs)
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            refuse_transforms(op)
            return function.apply(kernel, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*inputs)

    library.impl(op, with_gradients, "Autograd")
    _EAGER[name, op] = with_gradients


def _define(name: str) -> torch.library.Library:
    library = torch.library.Library(name, "DEF")
    for operator in (*KERNELS, *LAYERS):
        op = operator.name
        library.define(operator.schema)
        library.impl(op, _checked(name, op, operator.reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{name}::{op}", _checked(name, op, operator.shapes), lib=library)
        if operator.function is not None:
            _differentiate(library, name, op, operator.function)
        elif not op.endswith("_"):
            # Gradients are computed with these operators; no gradient flows through their own results.
            library.impl(op, torch.library.fallthrough_kernel, "Autograd")
    for loss in LOSSES:
        _define_loss(library, name, loss)
    return library


def _define_nodes() -> torch.library.Library:
    """The schemas that the nodes in C++ implement, sizes untraced. A call that is not plain has no result."""
    library = torch.library.Library("realuid_fast_node", "DEF")
    for op in _IN_CPP:
        schema = str(getattr(torch.ops.realuid_fast, op).default._schema).partition("::")[2]
        arguments, arrow, results = (
            schema.replace("SymInt n", "int n").replace("int noise_rows", "int? noise_rows").partition(" -> ")
        )
        library.define(arguments + arrow + results.replace("Tensor", "Tensor?"))
    return library


def load_nodes() -> None:
    """Let :func:`run` use the nodes in C++, where they load."""
    if extension.load_nodes():
        _NODES.update({op: getattr(torch.ops.realuid_fast_node, op).default for op in _IN_CPP})


# The libraries live as long as these names do.
_LIBRARIES = (_define("realuid_fast"), _define("realuid_fast_reference"), _define_nodes())
