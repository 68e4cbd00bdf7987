"""A discriminator on the fake model: a small head on its features, and adversarial terms in both turns.

The head reads features that the fake model computes anyway, so the turns make no further pass. With its logits ``h``::

    fake turn        + weight_fake      (mean m softplus(h(generated)) + mean m softplus(-h(real)))
    generator turn   + weight_generator  mean m softplus(-h(generated))

over interpolants ``x_t``, or hinge in place of softplus; ``m`` is 1 for an ``x_t`` that holds at least ``least_share``
of data, else 0. Source: the published RealUID code's comparison with a GAN, after DMD2 (Yin et al., 2405.14867, section
4.3). That code draws separate ``x_t`` for the discriminator, at times in [0.8, 1], with weights of 15 and 5. Here the
discriminator judges the ``x_t`` of the turn itself.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..coefficients import Coefficients
from ..errors import UserError
from .calling import takes_endpoint
from .unet import GroupNorm

GROUP = 8  # channels normalised together, as 256 in 32 groups


@dataclass(frozen=True)
class Gan:
    """The weights of a discriminator's terms.

    Attributes:
        weight_fake: the weight of the head's loss in the fake turn.
        weight_generator: the weight of the generator's term, 0 for a head that a divergence alone reads.
        least_share: the least share of data in an interpolant that is judged.
        loss: ``"softplus"``, or ``"hinge"``: ``max(0, 1 + u)`` in the fake turn and ``u`` in the generator's.
    """

    weight_fake: float = 1.0
    weight_generator: float = 0.0
    least_share: float = 0.0
    loss: str = "softplus"


class Head(nn.Module):
    """Logits of features ``(B, C, H, W)`` or ``(B, C)``: real above 0, generated below.

    For images it has at most two stages, each of a convolution that halves both sides, normalisation and SiLU. A stage
    is left out if a side is below 2. One logit follows for every pixel that is left. For vectors the head has one
    hidden layer and one logit.
    """

    def __init__(self, shape: tuple[int, ...], norm: type[nn.Module] = GroupNorm) -> None:
        super().__init__()
        channels, *sides = shape
        layers: list[nn.Module] = []
        if sides:
            for _ in range(2):
                if min(sides) < 2:
                    break
                groups = channels // GROUP if channels % GROUP == 0 else 1
                layers += [nn.Conv2d(channels, channels, 2, stride=2), norm(groups, channels), nn.SiLU()]
                sides = [side // 2 for side in sides]
            layers.append(nn.Conv2d(channels, 1, 1))
        else:
            layers += [nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(B, n)``."""
        return self.layers(features).flatten(1)


class Judged(nn.Module):
    """``net`` with a :class:`Head` on its features: called as ``net`` it returns output and logits ``(B, n)``.

    The head's weights follow from ``seed``.

    Raises:
        UserError: the network's ``forward`` has no argument ``with_features``.
    """

    def __init__(self, net: nn.Module, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        if "with_features" not in inspect.signature(net.forward).parameters:
            raise UserError(
                f"distill.gan needs a network whose forward can return its features, which {type(net).__name__} cannot"
            )
        self.net = net
        # Callers read these two attributes to learn the arguments that the network takes.
        self.num_classes, self.endpoint = getattr(net, "num_classes", None), takes_endpoint(net)
        parameter = next(net.parameters())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            x = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
            labels = x.new_zeros(1, dtype=torch.int64) if getattr(net, "num_classes", 0) else None
            ends = (x,) if self.endpoint else ()
            _, features = net(x.new_zeros(1, dtype=torch.float32), x, labels, *ends, with_features=True)
            self.head = Head(tuple(features.shape[1:])).to(parameter.device)

    def forward(self, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        out, features = self.net(*arguments, with_features=True)
        return out, self.head(features)


def psi(u: Tensor, loss: str, generator: bool = False) -> tuple[Tensor, Tensor]:
    """``softplus(u)`` or, for hinge, ``max(0, 1 + u)`` and, of the ``generator``, ``u``; and the derivative."""
    if loss == "softplus":
        return F.softplus(u), torch.sigmoid(u)
    return (u, torch.ones_like(u)) if generator else (F.relu(1 + u), (u > -1).to(u))


def adversarial_term(
    logits: Tensor,
    signs: Tensor,
    coef: Tensor,
    least_share: float,
    count: int,
    loss: str = "softplus",
    generator: bool = False,
) -> tuple[Tensor, Tensor]:
    """``sum_i m_i mean psi(signs_i logits_i) / count`` ``()`` and its gradient in ``logits`` ``(R, n)``.

    Args:
        logits: the head's output.
        signs: ``(R,)``, 1 for rows that are to be called generated, -1 for real.
        coef: the rows' coefficients ``(R, 9)``, which give each row's share of data.
        least_share: the share of data from which on ``m`` is 1.
        count: rows of one half, generated or real.
        loss, generator: the arguments of :func:`psi`.
    """
    logits = logits.detach()
    row = Coefficients(coef)
    judged = (row.a.abs() >= least_share * row.scales.abs().sum(1)).to(logits) / (count * logits.shape[1])
    value, slope = psi(signs[:, None] * logits, loss, generator)
    return (judged[:, None] * value).sum(), (judged * signs)[:, None] * slope
