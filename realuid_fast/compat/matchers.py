"""Paths of torchcfm's matchers and of flow_matching's affine paths, as paths of this package; neither is imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..paths import ICFM, VP, FlowMatching, Linear, Path, Trigonometric, custom

_CLIP = 1e-4


def from_torchcfm(matcher: Any) -> Path:
    """The path of a torchcfm matcher; data are its ``x1``.

    With ``sigma = 0`` its ``x0`` is our ``noise``; with ``sigma > 0`` (and always for the Schrödinger bridge) it is
    our ``endpoint`` and the noise is drawn beside it. For ``TargetConditionalFlowMatcher`` it is the noise. Matchers
    that pair samples by optimal transport pair them before. The noise of the Schrödinger bridge changes infinitely fast
    at both ends of time, so the row of a time within 1e-4 of one is the row of the clipped time, on every device.

    Raises:
        UserError: a matcher of no known class.
    """
    names = [kind.__name__ for kind in type(matcher).__mro__]
    if "ConditionalFlowMatcher" not in names:
        raise UserError(f"matcher must be one of torchcfm's conditional flow matchers, not {type(matcher).__name__}")
    sigma = float(matcher.sigma)
    if "TargetConditionalFlowMatcher" in names:
        return FlowMatching(sigma=sigma)
    if "SchrodingerBridgeConditionalFlowMatcher" in names:

        def clipped(t: Tensor) -> Tensor:
            return t.clamp(_CLIP, 1 - _CLIP)

        def spread(t: Tensor) -> Tensor:
            return torch.sqrt(clipped(t) * (1 - clipped(t)))

        return custom(
            clipped, lambda t: sigma * spread(t), lambda t: 1 - clipped(t), da=torch.ones_like,
            dc=lambda t: sigma * (1 - 2 * clipped(t)) / (2 * spread(t)), db=lambda t: -torch.ones_like(t),
        )  # fmt: skip
    if "VariancePreservingConditionalFlowMatcher" in names:
        path = Trigonometric()
        if sigma == 0:
            return path
        return custom(
            lambda t: path.scales(t)[0], lambda t: torch.full_like(t, sigma), lambda t: path.scales(t)[1],
            dc=torch.zeros_like,
        )  # fmt: skip
    return Linear() if sigma == 0 else ICFM(sigma=sigma)


def from_flow_matching(path: Any) -> Path:
    """The path of flow_matching's ``AffineProbPath``: ``x_t = alpha_t x_1 + sigma_t x_0``, ``x_0`` our noise.

    Schedulers without a path here keep their own functions. Some of those diverge at an end of time, so the row of a
    time within 1e-4 of 0 or 1 (``VPScheduler``: of 1) is the row of the clipped time, on every device.

    Raises:
        UserError: a path that is not affine: a geodesic on a manifold, a discrete mixture, or a subclass with a
            ``sample`` of its own.
    """
    kind = type(path)
    affine = next((base for base in kind.__mro__ if base.__name__ == "AffineProbPath"), None)
    if affine is None or getattr(kind, "sample", None) is not getattr(affine, "sample", None):
        raise UserError(
            f"path must be an AffineProbPath of flow_matching, alpha_t x_1 + sigma_t x_0, not {kind.__name__}: no "
            "other path of it (geodesics on manifolds, discrete mixtures, samples of a subclass) is affine"
        )
    scheduler = path.scheduler
    # Classes of the same names that a user wrote may have other functions.
    name = type(scheduler).__name__ if type(scheduler).__module__.startswith("flow_matching.") else ""
    if name == "CondOTScheduler":
        return Linear()
    if name == "CosineScheduler":
        return Trigonometric()
    if name == "VPScheduler":
        vp = VP(beta_min=float(scheduler.beta_min), beta_max=float(scheduler.beta_max))

        def left(t: Tensor) -> Tensor:
            return 1 - t.clamp(max=1 - _CLIP)

        return custom(
            lambda t: vp.scales(left(t))[0], lambda t: vp.scales(left(t))[1],
            da=lambda t: -vp.rates(left(t))[0], dc=lambda t: -vp.rates(left(t))[1],
        )  # fmt: skip

    def at(t: Tensor) -> Any:
        return scheduler(t.clamp(_CLIP, 1 - _CLIP))

    return custom(
        lambda t: at(t).alpha_t, lambda t: at(t).sigma_t, da=lambda t: at(t).d_alpha_t, dc=lambda t: at(t).d_sigma_t
    )
