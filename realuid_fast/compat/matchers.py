"""Paths of torchcfm's matchers and of flow_matching's affine paths, as paths of this package; neither is imported."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from ..paths import ICFM, VP, FlowMatching, Linear, Path, Trigonometric, custom

_CLIP = 1e-4


def from_torchcfm(matcher: Any) -> Path:
    """The path of a torchcfm matcher; data are its ``x1``.

    With ``sigma = 0`` its ``x0`` is our ``noise``; with ``sigma > 0`` (and always for the Schrödinger bridge) it is
    our ``endpoint`` and the noise is drawn beside it. For ``TargetConditionalFlowMatcher`` it is the noise. Matchers
    that pair samples by optimal transport pair them before.

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
        times = (_CLIP, 1 - _CLIP)
        return custom(
            lambda t: t, lambda t: sigma * torch.sqrt(t * (1 - t)), lambda t: 1 - t, t_range=times,
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

    Schedulers without a path here keep their own functions, on times clipped by 1e-4 at both ends.

    Raises:
        UserError: a path without a scheduler.
    """
    scheduler = getattr(path, "scheduler", None)
    if not callable(scheduler):
        raise UserError(f"path must be an affine path of flow_matching with a scheduler, not {type(path).__name__}")
    name = type(scheduler).__name__
    if name == "CondOTScheduler":
        return Linear()
    if name == "CosineScheduler":
        return Trigonometric()
    if name == "VPScheduler":
        vp = VP(beta_min=float(scheduler.beta_min), beta_max=float(scheduler.beta_max))
        return custom(
            lambda t: vp.scales(1 - t)[0], lambda t: vp.scales(1 - t)[1],
            da=lambda t: -vp.rates(1 - t)[0], dc=lambda t: -vp.rates(1 - t)[1], t_range=(0.0, 1 - _CLIP),
        )  # fmt: skip
    return custom(
        lambda t: scheduler(t).alpha_t, lambda t: scheduler(t).sigma_t,
        da=lambda t: scheduler(t).d_alpha_t, dc=lambda t: scheduler(t).d_sigma_t, t_range=(_CLIP, 1 - _CLIP),
    )  # fmt: skip
