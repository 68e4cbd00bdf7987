"""The losses of a drawn batch: :mod:`realuid_fast.functional` on an :class:`~realuid_fast.interpolant.Interpolant`.

Symbols are those of :mod:`realuid_fast.functional`: ``f`` is the fake model's and ``f*`` the teacher's prediction in
the match space, ``F`` a network's raw output. Every loss is float32 (float64 for float64 samples), ``()`` or, with
``reduction="none"``, ``(R,)``; sums run over the non-batch dimensions, the mean over the generated rows.
``*_grads`` return loss and gradients without autograd.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from . import functional
from .contracts import type_name
from .errors import UserError
from .functional import FakeGrads, GeneratorGrads, MatchingGrads, Reduction
from .interpolant import Interpolant
from .objectives import Objective
from .tensors import check_match, check_objective


def matching_loss(draw: Interpolant, out: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """The universal matching loss that trains teachers, ``w ||f - tgt||^2``.

    Args:
        draw: the batch, from :meth:`Path.draw`. Real rows count as any others: the mean is over all rows.
        out: the network's raw output ``F`` at ``draw.x_t``, ``(R, ...)``.

    Returns:
        The loss, differentiable in ``out``.

    Raises:
        UserError: tensors that do not agree, or a gradient wanted in the drawn samples.

    Source: Lipman et al., Flow Matching (2210.02747), equation 9, for the velocity space.
    """
    return functional.matching_loss(out=out, **_tensors(draw), noise_rows=draw.noise_rows, reduction=reduction)


def matching_grads(draw: Interpolant, out: Tensor) -> MatchingGrads:
    """:func:`matching_loss` with its gradient, without autograd."""
    return functional.matching_grads(out=out, **_tensors(draw), noise_rows=draw.noise_rows)


def fake_loss(
    objective: Objective,
    draw: Interpolant,
    fake_out: Tensor,
    *,
    teacher_out: Tensor | None = None,
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The fake model's loss, ``w (A ||f||^2 - 2 <f, B tgt + D f*> + C ||tgt||^2)``, minimised.

    Args:
        objective: gives ``A, B, D, C`` for generated and for real rows.
        draw: the batch, from ``path.draw(x, key, real=real)``; ``x`` must not require a gradient.
        fake_out: the fake model's raw output at ``draw.x_t``, ``(R, ...)``.
        teacher_out: the teacher's raw output there; needed only if ``objective.needs_teacher``.
        teacher_uncond, guidance: as for :func:`generator_loss`.

    Returns:
        The loss, differentiable in ``fake_out``; the mean is the sum over all rows by the number of generated rows.

    Raises:
        UserError: tensors that do not agree, real rows without an objective that has them or the reverse, a missing
            ``teacher_out``, or a gradient wanted in anything but ``fake_out``.

    Source: RealUID (2509.22459), the general real-data loss, as a loss in ``f``.
    """
    return functional.fake_loss(
        objective, fake_out=fake_out, **_tensors(draw), n_real=draw.n_real, noise_rows=draw.noise_rows,
        teacher_out=teacher_out, teacher_uncond=teacher_uncond, guidance=guidance, reduction=reduction,
    )  # fmt: skip


def fake_grads(
    objective: Objective,
    draw: Interpolant,
    fake_out: Tensor,
    *,
    teacher_out: Tensor | None = None,
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> FakeGrads:
    """:func:`fake_loss` with its gradient, without autograd."""
    return functional.fake_grads(
        objective, fake_out=fake_out, **_tensors(draw), n_real=draw.n_real, noise_rows=draw.noise_rows,
        teacher_out=teacher_out, teacher_uncond=teacher_uncond, guidance=guidance,
    )  # fmt: skip


def generator_loss(
    objective: Objective,
    draw: Interpolant,
    teacher_out: Tensor,
    fake_out: Tensor | None = None,
    *,
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The generator's loss, minimised: ``w (-Q kappa^2 ||delta||^2 + 2 kappa <delta, alpha f* - beta tgt>)``.

    ``delta`` is ``f* - f``.

    Args:
        objective: gives ``alpha, beta, Q, kappa``.
        draw: the batch, from ``path.draw(x, key)``, where ``x`` carries the generator's graph.
        teacher_out, fake_out: raw outputs of the frozen teacher and fake model at ``draw.x_t``, ``(R, ...)``;
            ``fake_out`` is left out for an objective without a fake model.
        teacher_uncond: the teacher's raw output without its condition; ``teacher_uncond + guidance (teacher_out -
            teacher_uncond)`` then takes the place of ``teacher_out``.
        guidance: the scale, a number or ``(R,)`` of ``draw.coef``'s dtype.

    Returns:
        The loss, differentiable in the outputs and in ``draw.x`` and ``draw.x_t``: ``loss.backward()`` reaches the
        generator through all of them.

    Raises:
        UserError: real rows in ``draw``, a match space other than x0 for an objective that is defined there alone
            (``SDS``, ``DMD``, ``SiD``), one whose target has no ``x`` for an objective whose gradient flows through it
            alone, tensors that do not agree, a ``fake_out`` without a fake model or the reverse, or a gradient wanted
            in the endpoint.

    Source: RealUID (2509.22459), the general real-data loss, as a loss in the generator.
    """
    _check_generator(objective, draw)
    return functional.generator_loss(
        objective, teacher_out=teacher_out, fake_out=fake_out, **_tensors(draw), teacher_uncond=teacher_uncond,
        guidance=guidance, reduction=reduction,
    )  # fmt: skip


def generator_grads(
    objective: Objective,
    draw: Interpolant,
    teacher_out: Tensor,
    fake_out: Tensor | None = None,
    *,
    teacher_uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> GeneratorGrads:
    """:func:`generator_loss` with its gradients, without autograd."""
    _check_generator(objective, draw)
    return functional.generator_grads(
        objective, teacher_out=teacher_out, fake_out=fake_out, **_tensors(draw), teacher_uncond=teacher_uncond,
        guidance=guidance,
    )  # fmt: skip


class _Tensors(TypedDict):
    x: Tensor
    x_t: Tensor | None
    coef: Tensor
    noise: Tensor
    endpoint: Tensor | None


def _tensors(draw: Interpolant) -> _Tensors:
    """The drawn tensors under the names that the tensor forms give them; ``x_t`` where the losses read it."""
    if not isinstance(draw, Interpolant):
        raise UserError(f"draw must be an Interpolant from path.draw(...), not {type_name(draw)}")
    return {"x": draw.x, "x_t": draw.read_x_t, "coef": draw.coef, "noise": draw.noise, "endpoint": draw.endpoint}


def _check_generator(objective: Objective, draw: Interpolant) -> None:
    """Refuse a draw that the generator's loss of the objective has no meaning for."""
    check_objective(objective)
    if isinstance(draw, Interpolant):
        if draw.n_real:
            raise UserError("draw must hold no real rows: real data acts through the fake model's loss alone")
        check_match(objective, draw.path, draw.match)
