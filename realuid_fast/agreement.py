"""Refusals of a distiller's arguments that do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from .errors import UserError
from .matching import Matching
from .models.calls import needs_endpoint
from .models.generator import Generator
from .models.pairs import Pairs
from .networks.critic import Critic
from .networks.discriminator import Gan, Judged
from .objectives import Objective, SiD
from .paths import OneSidedPath
from .tensors import check_match

LAWS = ("fake", "generator", "guidance")  # what may have a law of times and a weight of its own


def check(
    objective: Objective,
    fake: nn.Module,
    gan: Gan | None,
    critic: Critic | None,
    pairs: Pairs | None,
    generator: Generator,
    divergence: str,
    guidance: float,
    matching: Matching,
    turn_matching: Mapping[str, Matching],
) -> None:
    """Raise :class:`UserError` for the first pair of a ``Distiller``'s arguments that do not go together."""
    if [isinstance(fake, Judged), critic is not None].count(True) != (gan is not None):
        raise UserError("gan must be given for a fake model with a discriminator's head or for a critic, and no other")
    if isinstance(fake, Judged) and not objective.needs_fake:
        raise UserError(f"gan judges by the fake model, and {objective.name} has none: give gan.features")
    if gan is not None and critic is not None and (gan.least_share or divergence != "reverse-kl"):
        raise UserError("gan.features see clean samples; gan.least_share and divergence need a head on the fake model")
    # The density ratio is exp(logit) at softplus's optimum; hinge's optimum is a sign, and an untrained logit is noise.
    if gan is not None and divergence != "reverse-kl" and (gan.loss != "softplus" or gan.least_share):
        raise UserError(
            f"divergence {divergence} takes its density ratio from the discriminator at every noise level: "
            "distill.gan.loss must be softplus and distill.gan.least_share 0"
        )
    if pairs is not None and (generator.steps > 1 or needs_endpoint(generator.net, generator.path)):
        raise UserError("regression.pairs are for a student of one step that starts from noise alone")
    expanded = objective == SiD(1.0, scaled=objective.sample_scale > 0) and isinstance(matching.path, OneSidedPath)
    if divergence != "reverse-kl" and objective.flows != "x" and not expanded:
        raise UserError(
            f"divergence {divergence} needs an objective whose gradient flows through the samples alone, such as dmd, "
            f"or sid at alpha_sid 1 on a one-sided path; not {objective.name} on {type(matching.path).__name__}"
        )
    for law, own in turn_matching.items():
        path = replace(own.path, sampler=matching.path.sampler)
        if law not in LAWS or replace(own, path=path, weight=matching.weight) != matching:
            raise UserError(f"turn_matching must give {', '.join(LAWS)} a matching of another sampler or weight only")
    if "guidance" in turn_matching and (guidance == 1.0 or objective.flows != "x"):
        raise UserError(
            "guidance has times of its own only where it is not 1, and with an objective whose gradient flows through "
            f"the samples alone, such as dmd; it is {guidance:g}, with {objective.name}"
        )
    check_match(objective, matching.path, matching.match)
    # The expansion of a divergence has x0 space's gradient of log r, with or without SiD's scale.
    if divergence != "reverse-kl" and expanded and matching.match != "x0":
        raise UserError(f"divergence {divergence} with sid needs path.match=x0, not {matching.match}")
