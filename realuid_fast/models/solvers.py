"""The solvers of a multi-step teacher, on any path, by an ordinary or a stochastic equation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import choices
from ..contracts import check_whole
from ..errors import UserError
from ..networks.calling import takes_endpoint
from ..noise import NoiseStream, normal
from ..paths import DDBMVE, VE, Linear, OneSidedPath, Path
from ..paths.facts import fact
from .calls import LINEAR, call, check_endpoint, check_path, check_start, converted, ends, follows_flow, scales

SOLVERS = choices.SOLVERS
RHO = 7.0  # exponent of the grid of noise levels: Karras et al. (2206.00364), equation 5


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

    Steps are equal in time, with three exceptions: on :class:`~realuid_fast.paths.VE` and
    :class:`~realuid_fast.paths.DDBMVE` they are those of Karras et al. (2206.00364), equation 5 with ``rho = 7``; on
    other paths they are quadratically shorter towards an end at which ``c'`` diverges; on a
    :class:`~realuid_fast.paths.Linear` with a ``shift`` they are those of the shift.

    DDIM keeps the predicted noise: ``x_s = a_s x0 + c_s n`` with ``x0`` and ``n`` predicted at ``x_t``, on one-sided
    paths. It is Euler's method in ``c / a``, and on the linear path the same as Euler. Source: Song et al.
    (2010.02502), equation 12 with ``sigma = 0``. DPM-Solver++ in its multistep form, ``dpmpp``, takes one evaluation a
    step as well: see :func:`states`. The solver ``edm`` is :func:`edm_sampler` with its own numbers.

    On a two-sided path a data prediction does not give the velocity, because the endpoint's share is unknown. The law
    of ``x_s`` between ``x0`` and ``x_t`` is known: ``x_s = A x0 + B x_t + C n`` with ``B = b_s / b_t, A = a_s - B a_t,
    C^2 = c_s^2 - B^2 c_t^2``. Every step draws fresh noise, and the last one returns the prediction itself. On a bridge
    this integrates the bridge's own stochastic equation exactly between steps. Source: Liu et al., I2SB (2302.05872),
    equation 4; Gushchin et al. (2502.01362), section 2. In steps in which ``c / b`` falls ``C^2`` would be negative:
    there ``B = c_s / c_t``, ``C = 0`` and ``x_s`` holds ``(b_s - B b_t) y`` too, for networks that take the endpoint.

    On bridges a data prediction needs fewer steps than a velocity given ``y``, which diverges at the endpoint. Euler's
    error by such a velocity is largest on :class:`~realuid_fast.paths.DDBMVE`, whose steps do not become shorter
    towards the endpoint.

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
            prediction gives neither a velocity nor the data, or not enough without the endpoint.
    """
    check_path(path)
    check_whole("steps", steps)
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    check_solver(solver, path, predict)
    check_endpoint(net, path, endpoint)
    if solver == "edm":
        if t_start is not None:
            raise UserError("t_start must not be given with the solver edm, which starts at its path's largest noise")
        return edm_sampler(net, noise, steps, labels, path, predict, endpoint, stream, guidance)
    if t_start is None:
        t_start = first_time(path, predict)
        _, b, c = scales(path, t_start)
        x = noise if c == 1 else noise * c
        x = x if endpoint is None or b == 0 else torch.add(x, endpoint, alpha=b)
    else:
        check_start(path, t_start)
        x = noise
    times = grid(path, t_start, ends(path).data, steps)
    *_, x = states(net, x, times, solver, labels, path, predict, endpoint, stream, guidance)
    return x


def states(
    net: nn.Module,
    x: Tensor,
    times: Sequence[tuple[float, float]],
    solver: str = "euler",
    labels: Tensor | None = None,
    path: Path = LINEAR,
    predict: str = "velocity",
    endpoint: Tensor | None = None,
    stream: NoiseStream | None = None,
    guidance: float = 1.0,
) -> Iterator[Tensor]:
    """The state after each of a solver's steps from the state ``x``: :func:`integrate` takes the last one.

    Args:
        times: the time of every step, and its signed length, as :func:`grid` gives them.
        solver: one of :data:`SOLVERS` but ``"edm"``. ``"dpmpp"`` is DPM-Solver++ of the last three
            predictions of the data, of fewer in the first and the last steps. With two of them it is algorithm 2 of Lu
            et al. (2211.01095), with three the code of SFD (zju-pi/diff-sampler at 68d5ce4, ``sfd-main/solvers.py``),
            as in diffusers. That code gives the second divided difference half of the factor that third order needs,
            so the order is two.
    """
    if solver == "dpmpp":
        return _multistep(net, x, times, labels, path, predict, endpoint, guidance)
    if solver == "ddim" or not follows_flow(path, predict):
        return _walk(net, x, times, labels, path, predict, endpoint, stream, guidance)
    return _flow(net, x, times, solver, labels, path, predict, endpoint, guidance)


def _flow(
    net: nn.Module,
    x: Tensor,
    times: Sequence[tuple[float, float]],
    solver: str,
    labels: Tensor | None,
    path: Path,
    predict: str,
    endpoint: Tensor | None,
    guidance: float,
) -> Iterator[Tensor]:
    """Euler's, Heun's and the midpoint method."""
    low, high = path.time_range("velocity", predict)
    convert = predict != "velocity"

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        t = t.clamp(low, high) if convert else t
        out = call(net, t, x, labels, path, predict, endpoint, guidance)
        return converted(path, "velocity", predict, t, out, x) if convert else out

    for i, (time, h) in enumerate(times):
        t = x.new_full((len(x),), time, dtype=torch.float32)
        slope = velocity(t, x)
        if solver == "euler" or (solver == "heun" and i == len(times) - 1 and not _trapezoid_to_data(path, predict)):
            x = torch.add(x, slope, alpha=h)
        elif solver == "midpoint":
            x = torch.add(x, velocity(t + h / 2, torch.add(x, slope, alpha=h / 2)), alpha=h)
        else:
            ahead = velocity(t + h, torch.add(x, slope, alpha=h))
            x = torch.add(x, slope + ahead, alpha=h / 2)
        yield x


def check_solver(solver: str, path: Path, predict: str) -> None:
    """Refuse a solver that :func:`integrate` does not have for this path and prediction."""
    name = type(path).__name__
    if solver not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if solver != "euler" and not follows_flow(path, predict):
        raise UserError(f"solver must be euler for {predict} on {name}: its steps are random")
    if solver in ("ddim", "dpmpp") and not isinstance(path, OneSidedPath):
        raise UserError(f"solver must not be {solver} on {name}: it needs a path from noise alone to data")
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
    check_endpoint(net, path, endpoint)
    stream = NoiseStream(0, noise.device) if stream is None else stream
    levels = _levels(path.sigma_max, path.sigma_min, max(steps - 1, 1), rho)[:steps]
    most = min(s_churn / steps, math.sqrt(2) - 1)
    raised = [level * (1 + most) if s_min <= level <= s_max else level for level in levels]
    # Levels that are raised may lie above the path's largest, to which its times would be clipped: widen the range.
    wide = replace(path, sigma_max=2 * path.sigma_max)

    def slope(x: Tensor, level: float) -> Tensor:
        t = x.new_full((len(x),), level)
        seen = t if noise.dtype == t.dtype else t.float()
        out = call(net, seen, x.to(noise.dtype), labels, wide, predict, endpoint, guidance)
        return (x - converted(wide, "x0", predict, t, out.to(x.dtype), x)) / level

    x = noise.double() * levels[0]
    for level, now, then in zip(levels, raised, [*levels[1:], 0.0], strict=True):
        if now > level:
            x = x + math.sqrt(now**2 - level**2) * s_noise * normal(stream.next_key(), x)
        first = slope(x, now)
        ahead = x + (then - now) * first
        x = ahead if then == 0 else x + (then - now) * (first + slope(ahead, then)) / 2
    return x.to(noise.dtype)


def _trapezoid_to_data(path: Path, predict: str) -> bool:
    """Whether the velocity at the data's end can be evaluated on an estimate of the state there."""
    return predict == "velocity" and not path.steep[ends(path).data == path.t_range[1]]


@fact
def grid(path: Path, start: float, data: float, steps: int) -> tuple[tuple[float, float], ...]:
    """The time of every one of :func:`integrate`'s ``steps`` steps, and its signed length."""
    if isinstance(path, (VE, DDBMVE)):
        times = _levels(start, data, steps, RHO)
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
        # A share of 0 may have been rounded below it.
        times = [start, *(start + u * (data - start) for u in shares[1:])]
    return tuple((now, then - now) for now, then in itertools.pairwise(times))


def _levels(first: float, last: float, steps: int, rho: float) -> list[float]:
    """The levels of noise before and after each of ``steps`` steps, equal in ``sigma^(1 / rho)``."""
    high, low = first ** (1 / rho), last ** (1 / rho)
    return [_between((high + i / steps * (low - high)) ** rho, first, last) for i in range(steps + 1)]


def _between(value: float, first: float, last: float) -> float:
    """``value`` clipped to the range between two numbers, which rounding may have put it outside of."""
    return min(max(value, min(first, last)), max(first, last))


def _inside(path: Path, t: float) -> float:
    """``t`` clipped to the path's range, which rounding may have put it outside of."""
    return _between(t, *path.t_range)


def first_time(path: Path, predict: str) -> float:
    """The time of pure noise that samples start from, inside the range of times that the prediction allows."""
    low, high = path.time_range("velocity" if follows_flow(path, predict) else "x0", predict)
    return min(max(ends(path).start, low), high)


def data_at(
    net: nn.Module,
    x: Tensor,
    time: float,
    labels: Tensor | None,
    path: Path,
    predict: str,
    endpoint: Tensor | None,
    guidance: float,
) -> Tensor:
    """The network's prediction of the data at the state ``x`` of path time ``time``."""
    low, high = path.time_range("x0", predict)
    t = x.new_full((len(x),), min(max(time, low), high), dtype=torch.float32)
    return converted(path, "x0", predict, t, call(net, t, x, labels, path, predict, endpoint, guidance), x)


def ddim(path: Path, x: Tensor, x0: Tensor, time: float, h: float) -> Tensor:
    """DDIM's step of length ``h``, with the noise that the prediction ``x0`` of the data leaves in ``x``."""
    (a, _, c), (a_s, _, c_s) = scales(path, time), scales(path, _inside(path, time + h))
    return (a_s - c_s / c * a) * x0 + c_s / c * x


def _walk(
    net: nn.Module,
    x: Tensor,
    times: Sequence[tuple[float, float]],
    labels: Tensor | None,
    path: Path,
    predict: str,
    endpoint: Tensor | None,
    stream: NoiseStream | None,
    guidance: float,
) -> Iterator[Tensor]:
    """Sample step by step by the law of ``x_s`` between ``x0`` and ``x_t``; on a one-sided path these are DDIM's steps.

    On a one-sided path the noise takes the endpoint's place in that law, ``B = c_s / c_t`` and ``C = 0``.
    """
    stream = NoiseStream(0, x.device) if stream is None else stream
    laws = [] if isinstance(path, OneSidedPath) else [_law(path, time, h) for time, h in times[:-1]]
    if any(of_y for _, _, of_y, _ in laws) and not takes_endpoint(net):
        raise UserError(
            f"net must take the endpoint (endpoint: true) for samples from {predict} on {type(path).__name__}, or "
            "predict the velocity: a step in which c / b falls needs the endpoint and a prediction that knows it"
        )
    for i, (time, h) in enumerate(times):
        x0 = data_at(net, x, time, labels, path, predict, endpoint, guidance)
        if isinstance(path, OneSidedPath):
            x = ddim(path, x, x0, time, h)
        elif i == len(times) - 1:
            x = x0
        else:
            of_x0, kept, of_y, spread = laws[i]
            fresh = normal(stream.next_key(), x)
            x = of_x0 * x0 + kept * x + spread * fresh
            if of_y and endpoint is not None:
                x = x + of_y * endpoint
        yield x


def _law(path: Path, time: float, h: float) -> tuple[float, float, float, float]:
    """``A, B, D, C`` of ``x_s = A x0 + B x_t + D y + C n``, a step towards the data on a two-sided path."""
    (a, b, c), (a_s, b_s, c_s) = scales(path, time), scales(path, _inside(path, time + h))
    kept, of_y = b_s / b, 0.0
    # By more than rounding, b_s / b of the noise in x_t is more than x_s has.
    if c_s < kept * c * (1 - 1e-9):
        kept = c_s / c
        of_y = b_s - kept * b
    return a_s - kept * a, kept, of_y, math.sqrt(max(c_s**2 - kept**2 * c**2, 0.0))


def _multistep(
    net: nn.Module,
    x: Tensor,
    times: Sequence[tuple[float, float]],
    labels: Tensor | None,
    path: Path,
    predict: str,
    endpoint: Tensor | None,
    guidance: float,
) -> Iterator[Tensor]:
    """DPM-Solver++: DDIM's step, corrected by divided differences of the predicted data in ``log(a / c)``."""
    known: list[tuple[float, Tensor]] = []
    for i, (time, h) in enumerate(times):
        x0 = data_at(net, x, time, labels, path, predict, endpoint, guidance)
        known = [*known[-2:], (_log_ratio(path, time), x0)]
        order = min(len(known), len(times) - i)
        x = ddim(path, x, x0, time, h)
        if order > 1:
            then = _inside(path, time + h)
            (now, _), (before, last) = known[-1], known[-2]
            step, share = _log_ratio(path, then) - now, -math.expm1(now - _log_ratio(path, then))
            scale, past = scales(path, then)[0], (now - before) / step
            first = (x0 - last) / past
            if order == 2:
                x = x + scale * share / 2 * first
            else:
                oldest, data = known[-3]
                older = (before - oldest) / step
                second = (first - (last - data) / older) / (past + older)
                linear = 1 - share / step
                x = x + scale * (linear * (first + past * second) - (linear / step - 0.5) * second)
        yield x


def _log_ratio(path: Path, time: float) -> float:
    """``log(a / c)``, half of the logarithm of the signal-to-noise ratio."""
    a, _, c = scales(path, time)
    return math.log(a / c) if a > 0 else -math.inf
