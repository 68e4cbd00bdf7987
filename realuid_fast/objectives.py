"""Inverse-distillation objectives as a few scalars: which numbers the fused losses are called with.

With teacher prediction ``f*``, fake prediction ``f``, conditional target ``tgt`` and time weight ``w``, an objective's
``alpha, beta, gamma, Q, kappa`` enter two losses (sums over the non-batch dimensions, mean over the generated rows)::

    fake       l = w (A ||f||^2 - 2 <f, B tgt + D f*> + C ||tgt||^2)
    generator  l = w (-Q kappa^2 ||f* - f||^2 + 2 kappa <f* - f, alpha f* - beta tgt>)
               l = w <f* - f, alpha f* - beta tgt> / ||f* - f||                            where normalised
               l = w g(||f* - f||^2) (<f* - f, alpha f* - beta tgt> - Q/2 ||f* - f||^2)    with a distance's gain g

The fake model's generated rows use ``A = gamma kappa^2, B = kappa beta, D = kappa (gamma kappa - alpha),
C = beta^2 / alpha``; its real rows the same with ``1 - gamma, 1 - beta, 1 - alpha`` in place of ``gamma, beta, alpha``.
Where the teacher's prediction stands for a real row's target, its ``B, D, C`` become ``0, B + D, 0``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from .convex import Distance, SmoothPower, finite
from .divergences import DIVERGENCES, divergence_weight
from .errors import UserError
from .objective import FakeRow, Objective

__all__ = [
    "DIVERGENCES",
    "DMD",
    "FGM",
    "IBMD",
    "PRESETS",
    "SDS",
    "SIM",
    "UID",
    "DiffInstruct",
    "Distance",
    "FakeRow",
    "GeneralRealUID",
    "MomentMatching",
    "NormalisedRealUID",
    "Objective",
    "ParameterMoments",
    "RealBridge",
    "RealSiD",
    "RealUID",
    "SiD",
    "SmoothPower",
    "divergence_weight",
]


def UID() -> Objective:
    """Universal inverse distillation without data: ``alpha = beta = gamma = Q = kappa = 1``.

    The generator minimises ``max_f ||f* - tgt||^2 - ||f - tgt||^2``, which at the inner optimum is the expected squared
    distance between the teacher's and the generator's own field. Source: RealUID (2509.22459), the UID loss; for flow
    matching it is FGM (Huang et al., 2410.19310) with both weights 1, for diffusion SiD (Zhou et al., 2404.04057) at
    1/2.
    """
    return Objective("UID", alpha=1.0, beta=1.0, gamma=1.0, Q=1.0)


def RealUID(alpha: float, beta: float) -> Objective:
    """UID with real data: generated rows weigh ``alpha``, real rows ``1 - alpha``, targets ``beta`` and ``1 - beta``.

    ``gamma = Q = alpha, kappa = 1``; the losses are ``alpha ||f* - (beta/alpha) tgt||^2 - alpha ||f - (beta/alpha)
    tgt||^2`` on generated rows and the like with ``1 - alpha, 1 - beta`` on real rows of the fake turn. The teacher is
    not evaluated in the fake turn. Source: RealUID (2509.22459), the real-data loss. Its best choices are
    ``(0.92, 0.94)`` and ``(0.98, 0.96)`` on CIFAR-10 without and with classes, and ``(0.88, 0.90)`` on CelebA. A
    ``beta`` above 1 is outside the paper's range ``(0, 1]`` and gives a warning.

    Raises:
        UserError: ``alpha`` outside ``(0, 1]``, ``beta <= 0``, or ``alpha = 1`` with another ``beta``.
    """
    return Objective("RealUID", alpha=alpha, beta=beta, gamma=alpha, Q=alpha)


def GeneralRealUID(
    alpha: float, beta: float, gamma: float, kappa: float = 1.0, teacher_target: bool = False
) -> Objective:
    """RealUID with a quadratic weight ``gamma`` of its own, in the delta parameterisation ``kappa``.

    ``kappa`` is ``1`` or ``beta``; at the inner optimum ``f = f* - delta / kappa`` with ``delta = [(alpha p_g + (beta -
    alpha) p_d) f_d - beta p_g f_g] / (gamma p_g + (1 - gamma) p_d)``, where ``f_d, f_g`` and ``p_d, p_g`` are the
    data's and the generator's fields and densities at ``x_t``. The fake turn evaluates the teacher unless
    ``gamma kappa = alpha`` on both halves. Source: RealUID (2509.22459), the general real-data loss.

    With ``gamma < 1`` real rows have their quadratic term at ``alpha = 1`` too, with any ``beta``.

    With ``teacher_target`` the teacher's prediction takes the place of a real row's sampled target, which is the
    paper's other choice: ``2 <delta, (1 - alpha) f* - (1 - beta) f*>``. Real data then says where the loss is
    evaluated, at its ``x_t``, and nothing more: the optimum has ``f*`` in the place of ``f_d``, and real rows have less
    variance. With an exact teacher the optimum is the same; a teacher's errors are not corrected. The fake turn
    evaluates the teacher.

    Raises:
        UserError: ``alpha`` outside ``(0, 1]``, ``beta <= 0``, ``gamma`` outside ``(0, 1]``, ``gamma = 1`` with other
            ``alpha`` or ``beta``, a ``kappa`` that is neither ``1`` nor ``beta``, or a ``teacher_target`` without real
            rows.
    """
    if finite("kappa", kappa) not in (1, finite("beta", beta)):
        raise UserError(f"kappa must be 1 or beta = {beta:g}, got {kappa:g}")
    if finite("gamma", gamma) > 1:
        raise UserError(f"gamma must lie in (0, 1], got {gamma:g}: real data would have a loss unbounded below")
    return Objective(
        "General RealUID", alpha=alpha, beta=beta, gamma=gamma, Q=gamma, kappa=kappa, teacher_target=teacher_target
    )


def NormalisedRealUID(alpha: float, beta: float) -> Objective:
    """RealUID for the distance itself instead of its square: ``D / ||D||`` takes the place of ``D = f* - f``.

    With ``m(x_t) = (alpha p_g + (1 - alpha) p_d) f* - beta p_g f_g - (1 - beta) p_d f_d`` the inner maximum is ``max_D
    int w <D / ||D||, m> = int w ||m||`` over ``x_t`` and time. For ``alpha = beta = 1`` that is the mean of ``||f* -
    f_g||`` over generated ``x_t``, where UID's is the mean of its square. In samples it is ``w <D, alpha f* - beta
    tgt> / ||D||`` on generated rows and the like with ``1 - alpha, 1 - beta`` on real ones.

    The generator minimises its rows of it, and the norm is differentiated too: ``dl/dD = w / ||D|| (r - <D, r> /
    ||D||^2 D)`` with ``r = alpha f* - beta tgt``. That is the gradient of :func:`GeneralRealUID` with the weight ``w /
    (2 ||D||)`` and ``Q = <D, r> / ||D||^2``, both of each sample. A norm held fixed would give the derivative of the
    distance without real data only.

    The fake model is trained by RealUID's loss. The maximum only asks that ``D`` points along ``m``, and RealUID's
    optimum ``D = m / (alpha p_g + (1 - alpha) p_d)`` does. This choice also bounds the size of ``D``, which the maximum
    leaves free; it starts well at ``D = 0``; and it needs no teacher. Source: RealUID (2509.22459), the loss with
    ``D / ||D||``; the choice of the fake model's loss is ours.

    Raises:
        UserError: as :func:`RealUID`.
    """
    return Objective("normalised RealUID", alpha=alpha, beta=beta, gamma=alpha, Q=0.0, normalised=True)


def FGM(l1: float = 1.0, l2: float = 1.0) -> Objective:
    """Flow generator matching with the weights of its two terms: ``Q = 2 - l1 / l2``, the rest as :func:`UID`.

    The paper's ``l1 ||f* - f||^2 + 2 l2 <f* - f, f - tgt>`` divided by ``l2``, in velocity space. Equal weights, which
    the derivation gives, are UID; ``l1 = 0`` is :func:`SiD` at 1. Source: Huang et al., Flow Generator Matching
    (2410.19310), the two terms of its tractable loss.

    Raises:
        UserError: ``l2`` not positive, or either not a finite number.
    """
    if finite("l2", l2) <= 0:
        raise UserError(f"l2 must be positive, got {l2:g}: the loss is divided by it")
    return Objective("FGM", alpha=1.0, beta=1.0, gamma=1.0, Q=2 - finite("l1", l1) / l2)


def SiD(alpha_sid: float = 1.0, scaled: bool = True) -> Objective:
    """Score identity distillation: ``Q = 2 alpha_sid``, and a row's weight divided by ``2 mean |x - f*|``, held fixed.

    The paper's ``-alpha_sid ||f* - f||^2 + <f* - f, f* - x>``, in ``x0`` space on the path
    :class:`~realuid_fast.paths.VE`; the scale has a meaning there alone, so other spaces are refused with it. Without
    ``scaled`` the weight is ``w(t)`` alone and the loss twice that; then ``alpha_sid = 1/2`` is UID. Source: Zhou et
    al., Score identity Distillation (2404.04057), its fused loss; published choices are 1.0 and 1.2.

    Raises:
        UserError: ``alpha_sid`` not positive.
    """
    weight = _sid_weight(alpha_sid, beta=1.0)
    return Objective("SiD", alpha=1.0, beta=1.0, gamma=1.0, Q=weight, sample_scale=0.5 if scaled else 0.0)


def RealSiD(alpha: float, beta: float, alpha_sid: float = 1.0, scaled: bool = True) -> Objective:
    """:func:`SiD` with real data: the losses of :func:`RealUID` with ``Q = 2 alpha_sid alpha``, scaled as SiD's.

    Without ``scaled``, ``alpha_sid = 1/2`` is RealUID. Warns from ``alpha_sid = 1.2`` on when ``beta`` differs from 1:
    reported unstable. Source: RealUID (2509.22459), its extension of SiD; ``x0`` space.

    Raises:
        UserError: as :func:`RealUID`, or ``alpha_sid`` not positive.
    """
    weight = _sid_weight(alpha_sid, beta)
    scale = 0.5 if scaled else 0.0
    return Objective(
        "RealSiD", alpha=alpha, beta=beta, gamma=alpha, Q=weight * finite("alpha", alpha), sample_scale=scale
    )


def _sid_weight(alpha_sid: float, beta: float) -> float:
    if finite("alpha_sid", alpha_sid) <= 0:
        raise UserError(f"alpha_sid must be positive, got {alpha_sid:g}")
    if alpha_sid >= 1.2 and finite("beta", beta) != 1:
        warnings.warn(
            f"alpha_sid = {alpha_sid:g} with beta = {beta:g} is reported unstable: with real data stay below 1.2",
            UserWarning,
            stacklevel=3,
        )
    return 2 * alpha_sid


def SIM(c: float = 0.1, p: float = 1.0) -> Objective:
    """Score implicit matching: a convex distance ``d`` between the fields in the place of the square, pseudo-Huber.

    The paper's loss is ``-<d'(y), s - s(x_t | x)>`` with ``y = s - s*``, the fake model's score less the teacher's, and
    everything that depends on ``x_t`` is differentiated. With ``D = f* - f`` that is ``w <d'(D), f - tgt>``, here ``w
    gain(||D||^2) (<D, f* - tgt> - ||D||^2)``, so ``Q = 2``. Its gradient is that of ``w d(D)`` averaged over a law of
    ``x_t`` that is held fixed. ``d`` is :class:`SmoothPower`: pseudo-Huber, the paper's choice, for ``p = 1``. For ``p
    = 2`` and ``c = 0`` the loss is half of :func:`SiD` at 1 without its scale. ``dataclasses.replace(SIM(),
    distance=...)`` takes any other :class:`Distance`.

    ``c`` is in units of the match space. On the path :class:`~realuid_fast.paths.VE` the numbers ``c`` and ``w`` stand
    for the paper's ``c / sigma`` and ``w sigma`` in noise space, and for ``c / sigma^2`` and ``w sigma^2`` in ``x0``
    space. In velocity space this is implicit generator matching of flows (Shankar, On Distilling Generator Matching
    Models, 2025). Source: Luo et al., One-Step Diffusion Distillation through Score Implicit Matching (2410.16794), its
    loss and its pseudo-Huber instance. The default of ``c`` is ours.

    Raises:
        UserError: as :class:`SmoothPower`.
    """
    return Objective("SIM", alpha=1.0, beta=1.0, gamma=1.0, Q=2.0, distance=SmoothPower(c, p))


def IBMD() -> Objective:
    """Inverse bridge matching distillation: the numbers of :func:`UID`, on a bridge in ``x0`` space.

    The generator takes ``(y, z)`` and every call the pairs' ``endpoint``. Unconditional teachers and fake models see
    ``x_t``, conditional ones ``y`` too; the losses are the same. Source: Gushchin et al., Inverse Bridge Matching
    Distillation (2502.01362), section 3.
    """
    return Objective("IBMD", alpha=1.0, beta=1.0, gamma=1.0, Q=1.0)


def RealBridge(alpha: float, beta: float) -> Objective:
    """:func:`IBMD` with real pairs: the numbers of :func:`RealUID`, whose real rows are pairs ``(x, y)`` of the data.

    In ``x0`` or velocity space, which minimise different distances when ``alpha`` and ``beta`` differ. Source: RealUID
    paper, its bridge matching case.

    Raises:
        UserError: as :func:`RealUID`.
    """
    return Objective("Real bridge", alpha=alpha, beta=beta, gamma=alpha, Q=alpha)


def DiffInstruct() -> Objective:
    """Integral Kullback-Leibler divergence: the generator follows ``dl/dx = w (f - f*)``, and nothing else flows.

    The fake model is trained on generated samples alone, as in :func:`UID`. In ``x0`` space; the loss' value ``w <f -
    f*, x>`` says nothing by itself. In velocity space on a one-sided path the gradient has the same direction and
    another weight of a time. It is 0, and refused, where the target does not depend on ``x``: in noise space, and in
    velocity space on the path :class:`~realuid_fast.paths.VE`. No gradient passes through the networks, so the
    generator's turn needs no backward of either. Source: Luo et al., Diff-Instruct (2305.18455), its gradient formula
    in ``x0`` units.
    """
    return Objective("Diff-Instruct", alpha=1.0, beta=1.0, gamma=1.0, Q=1.0, flows="x")


def DMD(alpha: float = 1.0) -> Objective:
    """Distribution matching without its regression and adversarial terms: ``dl/dx = w alpha (f - f*) / mean |x - f*|``.

    As :func:`DiffInstruct` with the paper's weight for each sample, held fixed. With ``alpha < 1`` the fake model is
    trained on generated rows with weight ``alpha`` and on real rows with ``1 - alpha``, so it tracks their mixture. In
    ``x0`` space, others are refused; DMD2 takes five fake turns for each of the generator's. Source: Yin et al.,
    Distribution Matching Distillation (2311.18828), equations 7 and 8, and DMD2 (2405.14867), section 4.2; the mixture:
    RealUID (2509.22459).

    Raises:
        UserError: ``alpha`` outside ``(0, 1]``.
    """
    return Objective("DMD", alpha=alpha, beta=alpha, gamma=alpha, Q=alpha, flows="x", sample_scale=1.0)


def MomentMatching() -> Objective:
    """Moment matching, alternating: ``dl/dx = w (f - f*)`` with a fake model held half-way to the teacher.

    The fake model minimises ``||f - x||^2 + ||f - f*||^2``: ``A, B, D, C = 2, 1, 1, 1``, which ``gamma = 2`` gives, so
    its turn evaluates the teacher. In ``x0`` space; for others what :func:`DiffInstruct` says holds. Source: Salimans
    et al., Multistep Distillation of Diffusion Models via Moment Matching (2406.04103), its alternating algorithm.
    """
    return Objective("moment matching", alpha=1.0, beta=1.0, gamma=2.0, Q=2.0, flows="x")


def ParameterMoments() -> Objective:
    """Moment matching in parameter space: the numbers of :func:`MomentMatching`, without a fake model in training.

    The teacher after an infinitesimal step of its weights stands for the fake model
    (:mod:`realuid_fast.models.teacher_step`). At ``f = f*`` the fake turn's gradient is that of the teacher's own loss
    ``w ||f* - x||^2``. Source: Salimans et al., Multistep Distillation of Diffusion Models via Moment Matching
    (2406.04103), its form in parameter space.
    """
    return replace(MomentMatching(), name="parameter-space moment matching")


def SDS() -> Objective:
    """Score distillation sampling: the generator follows ``dl/dx = w (x - f*)``, without any fake model.

    :func:`DiffInstruct` with the sample itself for the fake model's prediction, which is exact for a generator that
    puts all its mass on one point: it seeks modes. In ``x0`` space (others are refused), where ``w(t) (x - f*)`` is the
    paper's ``w(t) (eps* - eps)`` in its own units. There is no fake turn, and no call takes a ``fake_out``. Source:
    Poole et al., DreamFusion (2209.14988), equation 3.
    """
    return Objective("SDS", alpha=1.0, beta=1.0, gamma=1.0, Q=1.0, flows="x", needs_fake=False)


# The presets a configuration can name.
PRESETS: dict[str, Callable[..., Objective]] = {
    "uid": UID,
    "realuid": RealUID,
    "general": GeneralRealUID,
    "normalised": NormalisedRealUID,
    "fgm": FGM,
    "sid": SiD,
    "realsid": RealSiD,
    "sim": SIM,
    "ibmd": IBMD,
    "real-bridge": RealBridge,
    "diff-instruct": DiffInstruct,
    "dmd": DMD,
    "moment-matching": MomentMatching,
    "parameter-moments": ParameterMoments,
    "sds": SDS,
}
