"""The fused calls: interpolant sampling and the three losses, each one pass over its tensors.

Rows are samples. ``coef`` holds a row of nine coefficients a sample (see :mod:`realuid_fast.paths`), ``noise`` is a key
of a :class:`~realuid_fast.NoiseStream` or a tensor like ``x``. With sums over the non-batch dimensions::

    x_t = a x + b y + c n        tgt = p x + q y + s n        f = k_out F + k_x x_t

where ``F`` is a network's raw output. All tensors of one call have one shape, dtype (float32, bfloat16, float16, or
float64), device and memory layout (contiguous or channels_last); arithmetic is in float32 (float64 for float64).

A teacher with classifier-free guidance has two outputs, with its condition and without, and a scale: ``F* = u + s (c -
u)`` (Ho and Salimans, 2207.12598, equation 6 with ``s = 1 + w``), taken inside the pass.

The losses differentiate with respect to what their docstrings name, and refuse an input that requires a gradient they
do not give. Gradients are computed in the forward pass; there is no second derivative, and forward-mode derivatives
(``torch.func.jvp``, ``forward_ad``) are refused. ``*_grads`` return the gradients as they are.

These calls know coefficients and no match space. Objectives that are defined in x0 space alone (``SDS``, ``DMD``,
``SiD``) need rows of ``path.coefficients(t, "x0")``; the losses of a draw refuse other spaces, these calls cannot.

A call first goes to C++ (``ops.plain``), which looks whether the tensors fit. On a few samples the checks in Python
take as long as the kernel. They follow where C++ has no result.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import ops
from .coefficients import Coefficients
from .contracts import check_tensor
from .errors import UserError
from .objectives import Objective
from .sample_weights import mean_of, weighed
from .tensors import Guidance, check, check_objective, fake_arguments, guidance_inputs, refuse_gradients, refuse_mixed

Reduction = Literal["mean", "none"]


class MatchingGrads(NamedTuple):
    """Loss ``()``, rows' losses ``(R,)`` and the gradient of the mean loss in the network's output."""

    loss: Tensor
    rows: Tensor
    out: Tensor


class FakeGrads(NamedTuple):
    """Loss ``()``, rows' losses ``(R,)`` and the gradient of the mean loss in the fake model's output."""

    loss: Tensor
    rows: Tensor
    fake_out: Tensor


class GeneratorGrads(NamedTuple):
    """Loss ``()``, rows' losses ``(R,)`` and the gradients of the mean loss.

    The gradients in ``x`` and ``x_t`` are the direct ones only (through ``tgt`` and through ``k_x``), not those through
    the networks. ``x_t`` is None if the call had no ``x_t``, ``teacher_uncond`` if it had no guidance.
    If an objective's gradient flows through ``x`` alone, the others are None, and no network needs a backward pass.
    """

    loss: Tensor
    rows: Tensor
    teacher_out: Tensor | None
    fake_out: Tensor | None
    x: Tensor
    x_t: Tensor | None
    teacher_uncond: Tensor | None = None


def interpolate(
    x: Tensor, coef: Tensor, noise: Tensor, endpoint: Tensor | None = None, noise_rows: int | None = None
) -> Tensor:
    """``x_t = a x + b y + c n``.

    Args:
        x: data samples ``x``, ``(R, ...)``.
        coef: ``(R, 9)`` from ``path.coefficients(t)``.
        noise: a key, or ``n`` like ``x``.
        endpoint: the other data endpoint ``y`` like ``x``, where the path has one.
        noise_rows: with ``N``, row ``i`` uses the noise of row ``i mod N`` (a tensor ``noise`` then has ``N`` rows);
            ``R`` when not given.

    Returns:
        ``x_t`` like ``x``. Differentiable in ``x`` and ``endpoint``.

    Raises:
        UserError: shapes, dtypes, devices or layouts that do not agree, or a gradient wanted in ``coef`` or ``noise``.
    """
    x_t = None if type(noise_rows) is bool else ops.plain("interpolate", x, coef, noise, endpoint, noise_rows)
    if x_t is not None:
        return x_t
    noise_rows = check(x, coef, noise, noise_rows, endpoint=endpoint)
    refuse_mixed("interpolate", x, noise=noise, endpoint=endpoint)
    return ops.run("interpolate", x.device, x, coef, noise, endpoint, noise_rows)


def matching_loss(
    *,
    out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None = None,
    noise_rows: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The universal matching loss that trains teachers, ``w ||f - tgt||^2``.

    Args:
        out: the network's raw output ``F`` at ``x_t``, ``(R, ...)``.
        x, coef, noise, endpoint, noise_rows: as given to :func:`interpolate`.
        x_t: the interpolant; may be None where ``k_x = 0`` (``path.reads_x_t(match, predict)`` is False).
        reduction: ``"mean"`` over rows, or ``"none"`` for the ``(R,)`` losses.

    Returns:
        float32 (float64 for float64), shape ``()`` or ``(R,)``. Differentiable in ``out``.

    Raises:
        UserError: tensors that do not agree, or a gradient wanted in anything but ``out``.

    Source: Lipman et al., Flow Matching (2210.02747), equation 9, for the velocity space.
    """
    mean = _is_mean(reduction)
    inputs = (out, x, x_t, coef, noise, endpoint, noise_rows, mean)
    if type(noise_rows) is not bool and (loss := ops.plain("matching_loss", *inputs)) is not None:
        return loss
    check_tensor("out", out)
    noise_rows = check(x, coef, noise, noise_rows, out=out, x_t=x_t, endpoint=endpoint)
    refuse_gradients("matching_loss", x=x, x_t=x_t, endpoint=endpoint)
    return ops.run("matching_loss", x.device, out, x, x_t, coef, noise, endpoint, noise_rows, mean)


def matching_grads(
    *,
    out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None = None,
    noise_rows: int | None = None,
) -> MatchingGrads:
    """:func:`matching_loss` with its gradient, without autograd."""
    inputs = (out, x, x_t, coef, noise, endpoint, noise_rows, True, True)
    if type(noise_rows) is not bool and (found := ops.plain("matching", *inputs)) is not None:
        return MatchingGrads(*found)
    check_tensor("out", out)
    noise_rows = check(x, coef, noise, noise_rows, out=out, x_t=x_t, endpoint=endpoint)
    refuse_mixed("matching_grads", x, out=out, x_t=x_t, noise=noise, endpoint=endpoint)
    op = ops.current(x.device).matching.default
    return MatchingGrads(*op(out, x, x_t, coef, noise, endpoint, noise_rows, True, True))


def fake_loss(
    objective: Objective,
    *,
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    n_real: int = 0,
    teacher_out: Tensor | None = None,
    endpoint: Tensor | None = None,
    noise_rows: int | None = None,
    reduction: Reduction = "mean",
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> Tensor:
    """The fake model's loss, ``w (A ||f||^2 - 2 <f, B tgt + D f*> + C ||tgt||^2)``, minimised.

    Args:
        fake_out: the fake model's raw output at ``x_t``, ``(R, ...)``.
        x: generated samples and, as the last ``n_real`` rows, real ones.
        x_t: the interpolant, from :func:`interpolate`. It may be None where ``k_x = 0``.
        coef, noise, endpoint, noise_rows: as for :func:`interpolate`; ``noise_rows=B`` shares the noise of ``B``
            generated rows with ``B`` real ones.
        objective: gives ``A, B, D, C`` of either half.
        teacher_out: the teacher's raw output at ``x_t``; needed only if ``objective.needs_teacher``.
        reduction: ``"mean"`` is the sum over all rows by the number of generated rows; ``"none"`` the ``(R,)`` losses.
        teacher_uncond, guidance: as for :func:`generator_loss`; without effect if the teacher is not needed.

    Returns:
        float32 (float64 for float64), shape ``()`` or ``(R,)``. Differentiable in ``fake_out``.

    Raises:
        UserError: tensors that do not agree, real rows without an objective that has them or the reverse, a missing
            ``teacher_out``, or a gradient wanted in anything but ``fake_out``.

    Source: RealUID (2509.22459), the general real-data loss, as a loss in ``f``.
    """
    mean = _is_mean(reduction)
    if _plain_fake(objective, n_real, teacher_out, noise_rows, teacher_uncond, guidance):
        rest = (endpoint, None, None, noise_rows, n_real, *objective.generated, *objective.real, mean)
        if (loss := ops.plain("fake_loss", fake_out, x, x_t, coef, noise, teacher_out, *rest)) is not None:
            return loss
    arguments = fake_arguments(
        fake_out, x, x_t, coef, noise, objective, n_real, teacher_out, endpoint, noise_rows, teacher_uncond, guidance
    )
    others = {"x": x, "x_t": x_t, "endpoint": endpoint, "teacher_out": teacher_out, "teacher_uncond": teacher_uncond}
    refuse_gradients("fake_loss", **others)
    return ops.run("fake_loss", x.device, *arguments, mean)


def fake_grads(
    objective: Objective,
    *,
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    n_real: int = 0,
    teacher_out: Tensor | None = None,
    endpoint: Tensor | None = None,
    noise_rows: int | None = None,
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> FakeGrads:
    """:func:`fake_loss` with its gradient, without autograd."""
    if _plain_fake(objective, n_real, teacher_out, noise_rows, teacher_uncond, guidance):
        rest = (endpoint, None, None, noise_rows, n_real, *objective.generated, *objective.real, True, True)
        if (found := ops.plain("fake", fake_out, x, x_t, coef, noise, teacher_out, *rest)) is not None:
            return FakeGrads(*found)
    arguments = fake_arguments(
        fake_out, x, x_t, coef, noise, objective, n_real, teacher_out, endpoint, noise_rows, teacher_uncond, guidance
    )
    others = {"noise": noise, "teacher_out": teacher_out, "endpoint": endpoint, "teacher_uncond": teacher_uncond}
    refuse_mixed("fake_grads", x, fake_out=fake_out, x_t=x_t, **others)
    return FakeGrads(*ops.current(x.device).fake.default(*arguments, True, True))


def generator_loss(
    objective: Objective,
    *,
    teacher_out: Tensor,
    fake_out: Tensor | None,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None = None,
    reduction: Reduction = "mean",
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> Tensor:
    """The generator's loss, minimised: ``w (-Q kappa^2 ||delta||^2 + 2 kappa <delta, alpha f* - beta tgt>)``.

    ``delta`` is ``f* - f``. For a normalised objective the loss is ``w <delta, alpha f* - beta tgt> / ||delta||``, with
    a distance of gain ``g`` it is ``w g(||delta||^2) (<delta, alpha f* - beta tgt> - Q/2 ||delta||^2)``. Either takes
    two more passes over the tensors that it reads.

    Args:
        teacher_out, fake_out: raw outputs of the frozen teacher and fake model at ``x_t``, ``(R, ...)``. ``fake_out``
            is None for an objective without a fake model (:func:`~realuid_fast.objectives.SDS`): :func:`sample_output`
            takes its place.
        x: generated samples ``G(z)``.
        x_t: the interpolant, from :func:`interpolate`. It may be None where ``k_x = 0``.
        coef, noise, endpoint: as for :func:`interpolate`.
        objective: gives ``alpha, beta, Q, kappa``.
        reduction: ``"mean"`` over rows, or ``"none"`` for the ``(R,)`` losses.
        teacher_uncond: the teacher's raw output without its condition; the guided ``teacher_uncond + guidance
            (teacher_out - teacher_uncond)`` then takes the place of ``teacher_out``.
        guidance: the scale, a number or ``(R,)`` of ``coef``'s dtype; 1 is the conditional teacher.

    Returns:
        float32 (float64 for float64), shape ``()`` or ``(R,)``. Differentiable in ``teacher_out``, ``teacher_uncond``,
        ``fake_out``, ``x`` and ``x_t``: let ``x_t = interpolate(x, ...)`` and the networks be part of the graph, with
        frozen parameters, and ``loss.backward()`` reaches the generator through all of them. Objectives whose gradient
        flows through ``x`` alone (:func:`~realuid_fast.objectives.DMD`) hold the others fixed.

    Raises:
        UserError: tensors that do not agree, or a gradient wanted in ``endpoint``, ``coef`` or ``noise``.

    Source: RealUID (2509.22459), the general real-data loss, as a loss in the generator.
    """
    mean = _is_mean(reduction)
    if _plain_generator(objective, teacher_uncond, guidance):
        rest = (endpoint, None, None, None, *objective.generator_scalars, mean)
        if (loss := ops.plain("generator_loss", teacher_out, fake_out, x, x_t, coef, noise, *rest)) is not None:
            return loss
    fake_out, guided = _generator_arguments(
        teacher_out, fake_out, x, x_t, coef, noise, objective, endpoint, teacher_uncond, guidance
    )
    refuse_gradients("generator_loss", endpoint=endpoint)
    coef, extra, own_rows = weighed(objective, teacher_out, fake_out, x, x_t, coef, noise, endpoint, guided)
    if objective.flows == "x":
        teacher_out, fake_out, x_t = teacher_out.detach(), fake_out.detach(), None if x_t is None else x_t.detach()
        extra = tuple(None if tensor is None else tensor.detach() for tensor in extra)
    inputs = (teacher_out, fake_out, x, x_t, coef, noise, endpoint, *extra, *objective.generator_scalars, mean)
    loss = ops.run("generator_loss", x.device, *inputs)
    if own_rows is None:
        return loss
    # The kernel's gradients are those of the objective's loss; its value is not. Replace the value only.
    return loss + ((mean_of(own_rows) if mean else own_rows) - loss).detach()


def generator_grads(
    objective: Objective,
    *,
    teacher_out: Tensor,
    fake_out: Tensor | None,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    endpoint: Tensor | None = None,
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> GeneratorGrads:
    """:func:`generator_loss` with its gradients, without autograd."""
    if _plain_generator(objective, teacher_uncond, guidance):
        want = (True, True, True, True, x_t is not None, False)
        rest = (endpoint, None, None, None, *objective.generator_scalars, *want)
        if (found := ops.plain("generator", teacher_out, fake_out, x, x_t, coef, noise, *rest)) is not None:
            loss, rows, g_teacher, g_fake, g_x, g_x_t, _ = found
            return GeneratorGrads(loss, rows, g_teacher, g_fake, g_x, None if x_t is None else g_x_t)
    fake_out, guided = _generator_arguments(
        teacher_out, fake_out, x, x_t, coef, noise, objective, endpoint, teacher_uncond, guidance
    )
    others = {"noise": noise, "x_t": x_t, "endpoint": endpoint, "teacher_uncond": teacher_uncond}
    refuse_mixed("generator_grads", x, teacher_out=teacher_out, fake_out=fake_out, **others)
    coef, extra, own_rows = weighed(objective, teacher_out, fake_out, x, x_t, coef, noise, endpoint, guided)
    networks = objective.flows == "all"
    want_x_t, want_uncond = networks and x_t is not None, networks and teacher_uncond is not None
    inputs = (teacher_out, fake_out, x, x_t, coef, noise, endpoint, *extra, *objective.generator_scalars)
    op = ops.current(x.device).generator.default
    found = op(*inputs, True, networks, networks, True, want_x_t, want_uncond)
    loss, rows, g_teacher, g_fake, g_x, g_x_t, g_uncond = found
    if own_rows is not None:
        loss, rows = mean_of(own_rows), own_rows
    if not networks:
        return GeneratorGrads(loss, rows, None, None, g_x, None)
    g_x_t, g_uncond = g_x_t if want_x_t else None, g_uncond if want_uncond else None
    return GeneratorGrads(loss, rows, g_teacher, g_fake, g_x, g_x_t, g_uncond)


def sample_output(x: Tensor, x_t: Tensor | None, coef: Tensor) -> Tensor:
    """The raw output ``(x - k_x x_t) / k_out`` whose prediction is the sample itself, without gradient; x0 space.

    Args:
        x: generated samples ``(R, ...)``.
        x_t: the interpolant, where ``k_x`` is not 0 in every row.
        coef: ``(R, 9)`` of the x0 space.

    Raises:
        UserError: tensors do not agree, or an argument is not a tensor.
    """
    check_tensor("x", x)
    check_tensor("coef", coef)
    if x_t is not None:
        check_tensor("x_t", x_t)
    if coef.dim() != 2 or coef.shape[1] != 9:
        raise UserError(f"coef must have shape (R, 9), one row a sample of x, not {tuple(coef.shape)}")
    key = coef.new_zeros(2, dtype=torch.int64)
    check(x, coef.detach(), key, None, x_t=x_t)
    given, rows = Coefficients(coef), torch.zeros_like(coef)
    Coefficients(rows).a.copy_(1 / given.k_out)
    Coefficients(rows).b.copy_(-given.k_x / given.k_out)
    with torch.no_grad():
        # The fused call's a x + b y, with x_t in the place of y.
        return interpolate(x.detach(), rows, key, None if x_t is None else x_t.detach())


def _generator_arguments(
    teacher_out: Tensor,
    fake_out: Tensor | None,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    objective: Objective,
    endpoint: Tensor | None,
    teacher_uncond: Tensor | None,
    guidance: float | Tensor,
) -> tuple[Tensor, Guidance]:
    """The fake model's output, and unconditional output and scale of a guided teacher, after all checks."""
    check_objective(objective)
    check_tensor("teacher_out", teacher_out)
    if fake_out is None:
        if objective.needs_fake:
            raise UserError(f"fake_out must be given for {objective.name}: it has a fake model")
        fake_out = sample_output(x, x_t, coef)
    elif not objective.needs_fake:
        raise UserError(f"fake_out must not be given for {objective.name}: it has no fake model")
    check(
        x,
        coef,
        noise,
        None,
        endpoint=endpoint,
        teacher_out=teacher_out,
        fake_out=fake_out,
        x_t=x_t,
        teacher_uncond=teacher_uncond,
    )
    return fake_out, guidance_inputs(teacher_uncond, guidance, coef)


def _plain_fake(
    objective: Objective,
    n_real: int,
    teacher_out: Tensor | None,
    noise_rows: int | None,
    teacher_uncond: Tensor | None,
    guidance: float | Tensor,
) -> bool:
    """Whether C++ may look at a call of the fake model's loss: what it does not see is as the objective needs it."""
    return (
        isinstance(objective, Objective)
        and type(n_real) is int
        and objective.needs_fake
        and (n_real > 0) == objective.needs_real
        and (teacher_out is not None) == objective.needs_teacher
        and type(noise_rows) is not bool
        and _unguided(teacher_uncond, guidance)
    )


def _plain_generator(objective: Objective, teacher_uncond: Tensor | None, guidance: float | Tensor) -> bool:
    """Whether C++ may look at a call of the generator's loss."""
    return (
        isinstance(objective, Objective)
        and objective.flows == "all"
        and not objective.weighs_samples
        and _unguided(teacher_uncond, guidance)
    )


def _unguided(teacher_uncond: Tensor | None, guidance: float | Tensor) -> bool:
    return teacher_uncond is None and type(guidance) is float and guidance == 1.0


def _is_mean(reduction: str) -> bool:
    if reduction not in ("mean", "none"):
        raise UserError(f"reduction must be 'mean' or 'none', not {reduction!r}")
    return reduction == "mean"
