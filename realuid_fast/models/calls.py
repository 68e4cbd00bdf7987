"""A network on a path: the ends of the path, and the output as velocity or data, with guidance too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..coefficients import Coefficients
from ..errors import UserError
from ..networks.calling import arguments, both, null_labels, takes_endpoint, takes_guidance
from ..paths import Linear, OneSidedPath, Path
from ..paths.facts import fact

LINEAR = Linear()


class Ends(NamedTuple):
    """The end of ``path.t_range`` where samples start, in noise or at the endpoint, and the end where they are data."""

    start: float
    data: float


@fact
def ends(path: Path) -> Ends:
    """:func:`ends`: the data's end of time is the one where ``x_t`` holds less of noise and endpoint."""
    low, high = path.t_range
    (_, b_low, c_low), (_, b_high, c_high) = scales(path, low), scales(path, high)
    return Ends(high, low) if b_low**2 + c_low**2 < b_high**2 + c_high**2 else Ends(low, high)


def needs_endpoint(net: nn.Module, path: Path) -> bool:
    """Whether samples need an endpoint, for the path or for the network."""
    return takes_endpoint(net) or not isinstance(path, OneSidedPath)


def call(
    net: nn.Module,
    t: Tensor,
    x_t: Tensor,
    labels: Tensor | None = None,
    path: Path = LINEAR,
    predict: str = "velocity",
    endpoint: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> Tensor:
    """``F``: a network's raw output at ``x_t`` and path time ``t``. The path says how it is called for ``predict``.

    With a ``guidance`` other than 1 it is ``u + guidance (c - u)``, where ``c`` and ``u`` are the outputs with and
    without the labels, from one forward pass of twice as many rows. A network that takes the scale is given it, a
    number or ``(B,)``, and evaluated once.
    """
    time, x = path.network_time(t, predict), path.network_input(x_t, t, predict)
    seen = arguments(net, time, x, labels, endpoint)
    if takes_guidance(net):
        return net(*seen, guidance=guidance)
    if not isinstance(guidance, Tensor) and guidance == 1.0:
        return net(*seen)
    null_labels(net, labels)
    conditional, unconditional = net(*both(net, seen)).chunk(2)
    scale = guidance.view(-1, *[1] * (x_t.dim() - 1)) if isinstance(guidance, Tensor) else guidance
    return torch.lerp(unconditional, conditional, scale)


def follows_flow(path: Path, predict: str) -> bool:
    """Whether the prediction gives a velocity, so that samples follow the probability flow; else it gives the data.

    Raises:
        UserError: without the endpoint the prediction gives neither velocity nor data.
    """
    for match in ("velocity", "x0"):
        try:
            path.time_range(match, predict)
        except UserError as error:
            if match == "x0":
                raise UserError(f"{predict} gives neither velocity nor data: {error}") from None
        else:
            return match == "velocity"
    raise AssertionError


@fact
def scales(path: Path, t: float) -> tuple[float, float, float]:
    row = Coefficients(path.coefficients(torch.tensor([t], dtype=torch.float64), "x0", "x0")[0])
    return row.a.item(), row.b.item(), row.c.item()


def converted(path: Path, match: str, predict: str, t: Tensor, out: Tensor, x_t: Tensor) -> Tensor:
    """The network's output in the match space: ``k_out F + k_x x_t``."""
    coef = Coefficients(path.coefficients(t, match, predict).to(x_t.dtype), x_t)
    return torch.addcmul(coef.k_out * out, coef.k_x, x_t)


def check_path(path: object) -> None:
    """Refuse a path's name in the place of a path."""
    if not isinstance(path, Path):
        raise UserError(f"path must be a path such as paths.Linear(), not {path!r:.60}")


def check_start(path: Path, t_start: float) -> None:
    low, high = path.t_range
    data = ends(path).data
    if not low <= t_start <= high or t_start == data:
        kept, left = ("(", "]") if data == low else ("[", ")")
        raise UserError(f"t_start must lie in {kept}{low:g}, {high:g}{left}, got {t_start}")


def check_endpoint(net: nn.Module, path: Path, endpoint: Tensor | None) -> None:
    if (endpoint is not None) == needs_endpoint(net, path):
        return
    name = type(path).__name__
    if endpoint is not None:
        raise UserError(f"endpoint must not be given on {name}: neither the path nor the network has one")
    why = "the network takes it" if takes_endpoint(net) else "samples start there"
    raise UserError(f"endpoint must be given on {name}: {why}")
