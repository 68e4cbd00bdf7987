"""The one-step generator: the data prediction of a network from noise, and the time that it starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..coefficients import Coefficients
from ..errors import UserError
from ..networks.calling import like
from ..paths import OneSidedPath, Path
from ..paths.facts import fact
from .calls import LINEAR, arguments, check_endpoint, check_path, check_start, ends, follows_flow, scales

START_SIGMA = 2.5  # noise level that a generator starts from: Zhou et al., SiD (2404.04057)
START_SHARE = 0.1  # of the range that a generator on a noisy two-sided path starts away from the endpoint


class Start(NamedTuple):
    """Numbers of the one-step generator: ``x = noise z + endpoint y`` and ``G = k_out net(t, c_in x) + k_x x``."""

    t: float
    c_in: float
    noise: float
    endpoint: float
    k_out: float
    k_x: float


def one_step(
    net: nn.Module,
    z: Tensor,
    t_start: float = 0.0,
    labels: Tensor | None = None,
    path: Path = LINEAR,
    predict: str = "velocity",
    endpoint: Tensor | None = None,
) -> Tensor:
    """The generator ``G(z)``: the path's data prediction at ``t0 = t_start`` from noise alone, one evaluation.

    On a one-sided path ``G(z) = k_out F + k_x x`` with ``x = c(t0) z`` and the coefficients of the x0 space: on the
    linear path ``x + (1 - t0) net(t0, x)`` with ``x = (1 - t0) z``, an Euler step from ``t0`` to 1. On a two-sided path
    ``G(y, z)``, where the endpoint stands in for the data, ``x = (a(t0) + b(t0)) y + c(t0) z``; a network that predicts
    a velocity makes an Euler step from there to the data. Differentiable.

    Args:
        net: called as the path says, see :func:`call`.
        z: standard normal noise ``(B, ...)``.
        t_start: ``t0``, inside the path's range and not at the data's end; see :func:`default_start`.
        labels: ``(B,)`` int64 for class-conditional networks.
        path, predict: the path and the prediction that the network was trained on.
        endpoint: ``y`` like ``z``, on a two-sided path.

    Raises:
        UserError: ``t_start`` is out of range, an endpoint is missing or not wanted, or the prediction gives neither a
            velocity nor the data.
    """
    check_path(path)
    return step_from(starting(path, predict, float(t_start)), net, z, labels, path, endpoint)


def step_from(
    start: Start, net: nn.Module, z: Tensor, labels: Tensor | None, path: Path, endpoint: Tensor | None
) -> Tensor:
    """:func:`one_step` with the numbers that :func:`starting` computes."""
    check_endpoint(net, path, endpoint)
    return step_at(start, net, state_from(start, z, endpoint), labels, endpoint)


def state_from(start: Start, z: Tensor, endpoint: Tensor | None) -> Tensor:
    """The state of a generator's first evaluation, made of noise and of the endpoint, which stands in for the data."""
    x = z if start.noise == 1 else z * start.noise
    if endpoint is not None and start.endpoint:
        x = torch.add(x, endpoint, alpha=start.endpoint)
    return x


def step_at(start: Start, net: nn.Module, x: Tensor, labels: Tensor | None, endpoint: Tensor | None) -> Tensor:
    """The generator's data prediction from a state ``x`` at the time of ``start``."""
    t = x.new_full((x.shape[0],), start.t, dtype=torch.float32)
    out = like(net(*arguments(net, t, x if start.c_in == 1 else x * start.c_in, labels, endpoint)), x)
    return torch.add(x if start.k_x == 1 else x * start.k_x, out, alpha=start.k_out)


@fact
def starting(path: Path, predict: str, t_start: float) -> Start:
    """The numbers of :func:`one_step`; raises its errors."""
    check_start(path, t_start)
    a, b, c = scales(path, t_start)
    t = torch.tensor([t_start], dtype=torch.float64)
    euler = not isinstance(path, OneSidedPath) and follows_flow(path, predict)
    row = Coefficients(path.coefficients(t, "velocity" if euler else "x0", predict)[0])
    k_out, k_x = row.k_out.item(), row.k_x.item()
    if euler:
        h = ends(path).data - t_start
        k_out, k_x = h * k_out, 1 + h * k_x
    time, scale = path.network_time(t, predict), path.network_input(torch.ones_like(t), t, predict)
    stand_in = 0.0 if isinstance(path, OneSidedPath) else a + b
    return Start(float(time), float(scale), c, stand_in, k_out, k_x)


def default_start(path: Path) -> float:
    """The time that a generator starts from by default.

    Started in pure noise a network predicts the data's mean whatever ``z``. At a noise level ``c / a`` of 2.5, the
    choice of SiD (Zhou et al., 2404.04057), a teacher already gives a blurred, varied sample. On the linear path that
    is ``t0 = 0.29``. A path without a noise level, and a two-sided path whose noise vanishes at the endpoint, starts a
    tenth of its range away from the endpoint. A two-sided path without noise, or with noise at the endpoint, starts at
    the endpoint.
    """
    start, data = ends(path)
    low, high = path.t_range
    if isinstance(path, OneSidedPath):
        try:
            time = float(path.time_at_sigma(torch.tensor(START_SIGMA, dtype=torch.float64)))
            if low < time < high:
                return time
        except UserError:
            pass
    elif not (path.steep[low != start] or scales(path, (low + high) / 2)[2] > scales(path, start)[2]):
        return start
    return start + START_SHARE * (data - start)
