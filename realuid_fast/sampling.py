"""Sampling: a multi-step teacher on any path, by an ordinary or a stochastic equation, and the one-step generator."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import choices
from .coefficients import Coefficients
from .errors import UserError
from .noise import NoiseStream, normal
from .paths import DDBMVE, VE, Linear, OneSidedPath, Path

SOLVERS = choices.SOLVERS
RHO = 7.0  # exponent of the grid of noise levels: Karras et al. (2206.00364), equation 5
START_SIGMA = 2.5  # noise level that a generator starts from: Zhou et al., SiD (2404.04057)
START_SHARE = 0.1  # of the range that a generator on a noisy two-sided path starts away from the endpoint
LINEAR = Linear()


class Ends(NamedTuple):
    """The end of ``path.t_range`` where samples start, in noise or at the endpoint, and the end where they are data."""

    start: float
    data: float


@functools.lru_cache(maxsize=256)
def ends(path: Path) -> Ends:
    """:func:`ends`: the data's end of time is the one where ``x_t`` holds less of noise and endpoint."""
    low, high = path.t_range
    (_, b_low, c_low), (_, b_high, c_high) = _scales(path, low), _scales(path, high)
    return Ends(high, low) if b_low**2 + c_low**2 < b_high**2 + c_high**2 else Ends(low, high)


class Start(NamedTuple):
    """Numbers of the one-step generator: ``x = noise z + endpoint y`` and ``G = k_out net(t, c_in x) + k_x x``."""

    t: float
    c_in: float
    noise: float
    endpoint: float
    k_out: float
    k_x: float


def takes_endpoint(net: nn.Module) -> bool:
    """Whether a network is called with the endpoint too, as ``net(t, x, labels, endpoint)``."""
    return bool(getattr(net, "endpoint", False))


def needs_endpoint(net: nn.Module, path: Path) -> bool:
    """Whether samples need an endpoint, for the path or for the network."""
    return takes_endpoint(net) or not isinstance(path, OneSidedPath)


def arguments(
    net: nn.Module, t: Tensor, x: Tensor, labels: Tensor | None, endpoint: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The arguments to call ``net`` with: the endpoint is one of them only if the network takes it."""
    return (t, x, labels, endpoint) if takes_endpoint(net) else (t, x, labels)


def null_labels(net: nn.Module, labels: Tensor | None) -> Tensor:
    """Labels like ``labels`` that all mean "no label"; raises :class:`UserError` if the network has no such label."""
    null = getattr(net, "null_label", None)
    if null is None or labels is None:
        raise UserError("guidance needs a class-conditional network with a null label (teacher.label_dropout)")
    return torch.full_like(labels, null)


def both(net: nn.Module, arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Arguments of twice as many rows: the first half with the labels, the second half with the null label."""
    t, x, labels, *rest = arguments
    doubled = [None if tensor is None else torch.cat([tensor, tensor]) for tensor in (t, x, *rest)]
    assert labels is not None
    return doubled[0], doubled[1], torch.cat([labels, null_labels(net, labels)]), *doubled[2:]


def call(
    net: nn.Module,
    t: Tensor,
    x_t: Tensor,
    labels: Tensor | None = None,
    path: Path = LINEAR,
    predict: str = "velocity",
    endpoint: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """``F``: a network's raw output at ``x_t`` and path time ``t``. The path says how it is called for ``predict``.

    With a ``guidance`` other than 1 it is ``u + guidance (c - u)``, where ``c`` and ``u`` are the outputs with and
    without the labels, from one forward pass of twice as many rows.
    """
    time, x = path.network_time(t, predict), path.network_input(x_t, t, predict)
    seen = arguments(net, time, x, labels, endpoint)
    if guidance == 1.0:
        return net(*seen)
    null_labels(net, labels)
    conditional, unconditional = net(*both(net, seen)).chunk(2)
    return torch.lerp(unconditional, conditional, guidance)


@torch.no_grad()
def integrate(
    net: nn.Module,
    noise: Tensor,
    steps: int,
    solver: str = "euler",
    labels: Tensor | None = None,
    t_start: float | None = None,
    path: Path = LINEAR,
    predict: str = "velocity",
    endpoint: Tensor | None = None,
    stream: NoiseStream | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Samples of a teacher on ``path`` in ``steps`` steps from noise, or from the endpoint, to data.

    On a one-sided path, and for a predicted velocity on any path, samples follow the probability flow ``dx/dt = v``,
    where ``v = k_out F + k_x x`` is the network's output converted into the velocity space. Euler takes one evaluation
    a step. Heun (trapezoid, second order) takes two; its last step takes one if the velocity would divide by noise or
    endpoint that vanish at the data's end. Midpoint (second order) takes two, the second half-way through the step, and
    none at the data's end.

    Steps are equal in time, with three exceptions: on :class:`~realuid_fast.paths.VE` they are those of Karras et al.
    (2206.00364), equation 5 with ``rho = 7``; towards an end at which ``c'`` diverges they are quadratically shorter;
    on a :class:`~realuid_fast.paths.Linear` with a ``shift`` they are those of the shift.

    DDIM keeps the predicted noise: ``x_s = a_s x0 + c_s n`` with ``x0`` and ``n`` predicted at ``x_t``, on one-sided
    paths. It is Euler's method in ``c / a``, and on the linear path the same as Euler. Source: Song et al.
    (2010.02502), equation 12 with ``sigma = 0``. The solver ``edm`` is :func:`edm_sampler` with its own numbers.

    On a two-sided path a data prediction does not give the velocity, because the endpoint's share is unknown. The law
    of ``x_s`` between ``x0`` and ``x_t`` is known: ``x_s = A x0 + B x_t + C n`` with ``B = b_s / b_t, A = a_s - B a_t,
    C^2 = c_s^2 - B^2 c_t^2``. Every step draws fresh noise, and the last one returns the prediction itself. On a bridge
    this integrates the bridge's own stochastic equation exactly between steps. Source: Liu et al., I2SB (2302.05872),
    equation 4; Gushchin et al. (2502.01362), section 2.

    Args:
        net: called as the path says, see :func:`call`; on the linear path as ``net(t, x, y)``, ``t`` ``(B,)``.
        noise: standard normal ``(B, ...)``; with ``t_start`` the state ``x_t`` there.
        steps: number of steps, at least 1.
        solver: one of :data:`SOLVERS`; from a two-sided path's data prediction only ``"euler"``.
        labels: ``(B,)`` int64 for class-conditional networks.
        t_start: time to start from; the path's own end when None.
        path, predict: the path and the prediction that the network was trained on.
        endpoint: ``y`` like ``noise``, on a two-sided path.
        stream: the source of fresh noise; a stream of seed 0 when None.
        guidance: scale of classifier-free guidance, 1 for none; doubles the rows of every evaluation.

    Returns:
        Samples like ``noise``.

    Raises:
        UserError: the solver is unknown, a number is out of range, an endpoint is missing or not wanted, or the
            prediction gives neither a velocity nor the data.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    check_solver(solver, path, predict)
    _check_endpoint(net, path, endpoint)
    if solver == "edm":
        if t_start is not None:
            raise UserError("t_start must not be given with the solver edm, which starts at its path's largest noise")
        return edm_sampler(net, noise, steps, labels, path, predict, endpoint, stream, guidance)
    ordinary = follows_flow(path, predict)
    start, data = ends(path)
    low, high = path.time_range("velocity" if ordinary else "x0", predict)
    if t_start is None:
        t_start = min(max(start, low), high)
        _, b, c = _scales(path, t_start)
        x = noise if c == 1 else noise * c
        x = x if endpoint is None or b == 0 else torch.add(x, endpoint, alpha=b)
    else:
        _check_start(path, t_start)
        x = noise
    times = _grid(path, t_start, data, steps)
    if not ordinary or solver == "ddim":
        return _walk(net, x, times, labels, path, predict, endpoint, stream, guidance)
    convert = predict != "velocity"

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        t = t.clamp(low, high) if convert else t
        out = call(net, t, x, labels, path, predict, endpoint, guidance)
        return _converted(path, "velocity", predict, t, out, x) if convert else out

    for i, (time, h) in enumerate(times):
        t = x.new_full((len(x),), time, dtype=torch.float32)
        slope = velocity(t, x)
        if solver == "euler" or (solver == "heun" and i == steps - 1 and not _trapezoid_to_data(path, predict)):
            x = torch.add(x, slope, alpha=h)
        elif solver == "midpoint":
            x = torch.add(x, velocity(t + h / 2, torch.add(x, slope, alpha=h / 2)), alpha=h)
        else:
            ahead = velocity(t + h, torch.add(x, slope, alpha=h))
            x = torch.add(x, slope + ahead, alpha=h / 2)
    return x


def check_solver(solver: str, path: Path, predict: str) -> None:
    """Refuse a solver that :func:`integrate` does not have for this path and prediction."""
    name = type(path).__name__
    if solver not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if solver != "euler" and not follows_flow(path, predict):
        raise UserError(f"solver must be euler for {predict} on {name}: its steps are random")
    if solver == "ddim" and not isinstance(path, OneSidedPath):
        raise UserError(f"solver must not be ddim on {name}: it needs a path from noise alone to data")
    if solver == "edm" and not isinstance(path, VE):
        raise UserError(f"solver must not be edm on {name}: it needs the path ve, whose times are levels of noise")


def evaluations(steps: int, solver: str = "euler", path: Path = LINEAR, predict: str = "velocity") -> int:
    """Network evaluations per sample of :func:`integrate`."""
    last = {"heun": not _trapezoid_to_data(path, predict), "midpoint": False, "edm": True}
    return 2 * steps - last[solver] if solver in last else steps


@torch.no_grad()
def edm_sampler(
    net: nn.Module,
    noise: Tensor,
    steps: int = 18,
    labels: Tensor | None = None,
    path: Path | None = None,
    predict: str = "edm",
    endpoint: Tensor | None = None,
    stream: NoiseStream | None = None,
    guidance: float = 1.0,
    *,
    rho: float = RHO,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Samples by the sampler of Karras et al. (2206.00364): algorithm 1, with ``s_churn`` algorithm 2.

    With the data prediction ``D(x; sigma)`` it is Heun's method for ``dx/dsigma = (x - D) / sigma`` on ``steps`` levels
    from ``sigma_max`` to ``sigma_min``, the path's, equal in ``sigma^(1 / rho)``, and an Euler step from the last level
    to 0: ``2 steps - 1`` evaluations. A step from a level ``sigma`` between ``s_min`` and ``s_max`` first raises it to
    ``(1 + g) sigma``, ``g = min(s_churn / steps, sqrt(2) - 1)``, by fresh noise of deviation ``s_noise``. The state is
    float64, as in the paper's code; the network sees it in the dtype of ``noise``.

    Args:
        net, noise, labels, predict, endpoint, stream, guidance: as for :func:`integrate`, ``noise`` standard normal.
        steps: number of steps, at least 1.
        path: a path :class:`~realuid_fast.paths.VE`, whose numbers give the range of levels; the paper's when None.
        rho, s_churn, s_min, s_max, s_noise: the paper's numbers.

    Returns:
        Samples like ``noise``.

    Raises:
        UserError: another path, or numbers out of range.
    """
    path = VE() if path is None else path
    check_solver("edm", path, predict)
    assert isinstance(path, VE)
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if not (rho > 0 and s_churn >= 0 and s_noise >= 0):
        raise UserError(
            f"rho must be positive, s_churn and s_noise not negative; got {rho:g}, {s_churn:g}, {s_noise:g}"
        )
    _check_endpoint(net, path, endpoint)
    stream = NoiseStream(0, noise.device) if stream is None else stream
    low, high = (level ** (1 / rho) for level in path.t_range)
    levels = [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]
    most = min(s_churn / steps, math.sqrt(2) - 1)
    raised = [level * (1 + most) if s_min <= level <= s_max else level for level in levels]
    # Levels that are raised may lie above the path's largest, to which its times would be clipped: widen the range.
    wide = replace(path, sigma_max=2 * path.sigma_max)

    def slope(x: Tensor, level: float) -> Tensor:
        t = x.new_full((len(x),), level)
        seen = t if noise.dtype == t.dtype else t.float()
        out = call(net, seen, x.to(noise.dtype), labels, wide, predict, endpoint, guidance)
        return (x - _converted(wide, "x0", predict, t, out.to(x.dtype), x)) / level

    x = noise.double() * levels[0]
    for level, now, then in zip(levels, raised, [*levels[1:], 0.0], strict=True):
        if now > level:
            x = x + math.sqrt(now**2 - level**2) * s_noise * normal(stream.next_key(), x)
        first = slope(x, now)
        ahead = x + (then - now) * first
        x = ahead if then == 0 else x + (then - now) * (first + slope(ahead, then)) / 2
    return x.to(noise.dtype)


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
    return step_from(starting(path, predict, float(t_start)), net, z, labels, path, endpoint)


def step_from(
    start: Start, net: nn.Module, z: Tensor, labels: Tensor | None, path: Path, endpoint: Tensor | None
) -> Tensor:
    """:func:`one_step` with the numbers that :func:`starting` computes."""
    _check_endpoint(net, path, endpoint)
    return step_at(start, net, state_from(start, z, endpoint), labels, endpoint)


def state_from(start: Start, z: Tensor, endpoint: Tensor | None) -> Tensor:
    """The state of a generator's first evaluation, made of noise and of the endpoint, which stands in for the data."""
    x = z if start.noise == 1 else z * start.noise
    if endpoint is not None and start.endpoint:
        x = torch.add(x, endpoint, alpha=start.endpoint)
    return x


def step_at(start: Start, net: nn.Module, x: Tensor, labels: Tensor | None, endpoint: Tensor | None) -> Tensor:
    """The generator's data prediction from a state ``x`` at the time of ``start``."""
    t = x.new_full((len(x),), start.t, dtype=torch.float32)
    out = net(*arguments(net, t, x if start.c_in == 1 else x * start.c_in, labels, endpoint))
    return torch.add(x if start.k_x == 1 else x * start.k_x, out, alpha=start.k_out)


@functools.lru_cache(maxsize=256)
def starting(path: Path, predict: str, t_start: float) -> Start:
    """The numbers of :func:`one_step`; raises its errors."""
    _check_start(path, t_start)
    a, b, c = _scales(path, t_start)
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
    elif not (path.steep[low != start] or _scales(path, (low + high) / 2)[2] > _scales(path, start)[2]):
        return start
    return start + START_SHARE * (data - start)


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


def _scales(path: Path, t: float) -> tuple[float, float, float]:
    row = Coefficients(path.coefficients(torch.tensor([t], dtype=torch.float64), "x0", "x0")[0])
    return row.a.item(), row.b.item(), row.c.item()


def _check_start(path: Path, t_start: float) -> None:
    low, high = path.t_range
    data = ends(path).data
    if not low <= t_start <= high or t_start == data:
        kept, left = ("(", "]") if data == low else ("[", ")")
        raise UserError(f"t_start must lie in {kept}{low:g}, {high:g}{left}, got {t_start}")


def _check_endpoint(net: nn.Module, path: Path, endpoint: Tensor | None) -> None:
    if (endpoint is not None) == needs_endpoint(net, path):
        return
    name = type(path).__name__
    if endpoint is not None:
        raise UserError(f"endpoint must not be given on {name}: neither the path nor the network has one")
    why = "the network takes it" if takes_endpoint(net) else "samples start there"
    raise UserError(f"endpoint must be given on {name}: {why}")


def _trapezoid_to_data(path: Path, predict: str) -> bool:
    """Whether the velocity at the data's end can be evaluated on an estimate of the state there."""
    return predict == "velocity" and not path.steep[ends(path).data == path.t_range[1]]


@functools.lru_cache(maxsize=256)
def _grid(path: Path, start: float, data: float, steps: int) -> tuple[tuple[float, float], ...]:
    """The time of every step, and its signed length."""
    if isinstance(path, (VE, DDBMVE)):
        high, low = start ** (1 / RHO), data ** (1 / RHO)
        times = [(high + i / steps * (low - high)) ** RHO for i in range(steps + 1)]
    else:
        upwards = data > start
        at_start, at_data = path.steep[not upwards], path.steep[upwards]
        shift = path.shift if isinstance(path, Linear) else 1.0
        if not (at_start or at_data) and shift == 1:
            h = (data - start) / steps
            return tuple((start + i * h, h) for i in range(steps))
        shares = [i / steps for i in range(steps + 1)]
        if shift != 1:
            shares = [1 - shift * (1 - u) / (1 + (shift - 1) * (1 - u)) for u in shares]
        elif at_start and at_data:
            shares = [(1 - math.cos(math.pi * u)) / 2 for u in shares]
        else:
            shares = [u**2 if at_start else 1 - (1 - u) ** 2 for u in shares]
        times = [start + u * (data - start) for u in shares]
    return tuple((now, then - now) for now, then in itertools.pairwise(times))


def _inside(path: Path, t: float) -> float:
    """``t`` clipped to the path's range, which rounding may have put it outside of."""
    low, high = path.t_range
    return min(max(t, low), high)


def _converted(path: Path, match: str, predict: str, t: Tensor, out: Tensor, x_t: Tensor) -> Tensor:
    """The network's output in the match space: ``k_out F + k_x x_t``."""
    coef = Coefficients(path.coefficients(t, match, predict).to(x_t.dtype), x_t)
    return torch.addcmul(coef.k_out * out, coef.k_x, x_t)


def _walk(
    net: nn.Module,
    x: Tensor,
    times: tuple[tuple[float, float], ...],
    labels: Tensor | None,
    path: Path,
    predict: str,
    endpoint: Tensor | None,
    stream: NoiseStream | None,
    guidance: float,
) -> Tensor:
    """Sample step by step by the law of ``x_s`` between ``x0`` and ``x_t``; on a one-sided path these are DDIM's steps.

    On a one-sided path the noise takes the endpoint's place in that law, ``B = c_s / c_t`` and ``C = 0``.
    """
    ddim = isinstance(path, OneSidedPath)
    stream = NoiseStream(0, x.device) if stream is None else stream
    low, high = path.time_range("x0", predict)
    for i, (time, h) in enumerate(times):
        t = x.new_full((len(x),), min(max(time, low), high), dtype=torch.float32)
        x0 = _converted(path, "x0", predict, t, call(net, t, x, labels, path, predict, endpoint, guidance), x)
        if i == len(times) - 1 and not ddim:
            return x0
        (a, b, c), (a_s, b_s, c_s) = _scales(path, time), _scales(path, _inside(path, time + h))
        if ddim:
            x = (a_s - c_s / c * a) * x0 + c_s / c * x
            continue
        kept = b_s / b
        spread = math.sqrt(max(c_s**2 - kept**2 * c**2, 0.0))
        fresh = normal(stream.next_key(), x)
        x = (a_s - kept * a) * x0 + kept * x + spread * fresh
    return x
