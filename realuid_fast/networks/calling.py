"""How a network is called: with which arguments, and with which labels where it has any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UserError


def takes_endpoint(net: nn.Module) -> bool:
    """Whether a network is called with the endpoint too, as ``net(t, x, labels, endpoint)``."""
    return bool(getattr(net, "endpoint", False))


def takes_guidance(net: nn.Module) -> bool:
    """Whether a network takes the scale of its guidance, as ``net(t, x, labels, guidance=scale)``: one evaluation."""
    return bool(getattr(net, "guided", False))


def arguments(
    net: nn.Module, t: Tensor, x: Tensor, labels: Tensor | None, endpoint: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The arguments to call ``net`` with: the endpoint is one of them only if the network takes it."""
    return (t, x, labels, endpoint) if takes_endpoint(net) else (t, x, labels)


def like(out: Tensor, x: Tensor) -> Tensor:
    """A network's output ``out``; raises :class:`UserError` unless it is a tensor with rows shaped like those of ``x``.

    It may have more rows than ``x``.
    """
    if not isinstance(out, Tensor) or out.shape[1:] != x.shape[1:]:
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        rows = ", ".join(map(str, ("B", *x.shape[1:])))
        raise UserError(f"a network must return a tensor of shape ({rows}), not {found}: see call of teachers.wrap")
    return out


def null_labels(net: nn.Module, labels: Tensor | None) -> Tensor:
    """Labels like ``labels`` that all mean "no label"; raises :class:`UserError` if the network has no such label."""
    null = getattr(net, "null_label", None)
    if null is None or labels is None:
        raise UserError("guidance needs a class-conditional network with a null label (teacher.label_dropout)")
    return torch.full_like(labels, null)


def outputs(
    run: Callable[..., Tensor], net: nn.Module, arguments: tuple[Tensor | None, ...], guidance: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The output of ``run``, which evaluates ``net``, and with guidance by labels also the one without them."""
    if takes_guidance(net):
        return run(*arguments, guidance=guidance), None
    if guidance == 1.0:
        return run(*arguments), None
    conditional, unconditional = run(*both(net, arguments)).chunk(2)
    return conditional, unconditional


def both(net: nn.Module, arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Arguments of twice as many rows: the first half with the labels, the second half with the null label."""
    t, x, labels, *rest = arguments
    doubled = [None if tensor is None else torch.cat([tensor, tensor]) for tensor in (t, x, *rest)]
    assert labels is not None
    return doubled[0], doubled[1], torch.cat([labels, null_labels(net, labels)]), *doubled[2:]
