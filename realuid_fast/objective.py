"""An objective: the numbers that the fused losses are called with, those that follow from them, and which are refused.

:mod:`realuid_fast.objectives` has the losses' formulas and the objectives that have names.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .convex import Distance, finite
from .errors import UserError


class FakeRow(NamedTuple):
    """The fake loss' four scalars for one half of the batch."""

    A: float
    B: float
    D: float
    C: float


@dataclass(frozen=True)
class Objective:
    """One row of the preset table. Build it through a preset such as :func:`RealUID`, or by its own numbers.

    Raises:
        UserError: a number that is not finite, numbers that leave the fake model's loss unbounded below, or fields that
            do not go together.
    """

    name: str
    alpha: float
    beta: float
    gamma: float
    Q: float
    kappa: float = 1.0
    # The generator's gradient flows through everything that the loss depends on ("all"), or only through the samples
    # ``x`` inside ``tgt`` ("x").
    flows: Literal["all", "x"] = "all"
    # A row's weight is ``w sample_scale / mean |x - f*|``, held fixed, in x0 space; 0: ``w`` alone.
    sample_scale: float = 0.0
    # Whether the generator's loss has the unit vector along f* - f in the place of f* - f: a distance, not its square.
    normalised: bool = False
    # The convex function that takes the place of half the square of f* - f. Its gain weighs each sample, and is
    # differentiated too.
    distance: Distance | None = None
    # Whether real rows have the teacher's prediction in the place of their sampled target.
    teacher_target: bool = False
    # Whether there is a fake model. Without one the generator's own sample stands for the fake prediction, f := x.
    needs_fake: bool = True

    # The fields below follow from those above and are computed once, when the objective is made. So a call reads plain
    # attributes, which torch.compile can trace. It refuses functools.cached_property, which has a lock on Python 3.11.

    # ``alpha, beta, Q, kappa`` for the generator's kernel. If the gradient flows through ``x`` only, they are ``0,
    # beta / 2, 0, 1``, which leaves ``dl/dtgt = w beta (f - f*)``. For a normalised objective they leave
    # ``w <f* - f, alpha f* - beta tgt>``, and so they do with a distance.
    generator_scalars: tuple[float, float, float, float] = field(init=False, repr=False, compare=False)
    # Whether a generator call has a weight of its own for each sample (realuid_fast.sample_weights).
    weighs_samples: bool = field(init=False, repr=False, compare=False)
    # The fake loss' scalars for generated rows, and for real rows: all zero when real data plays no part.
    generated: FakeRow = field(init=False, repr=False, compare=False)
    real: FakeRow = field(init=False, repr=False, compare=False)
    # Whether the fake turn needs real rows, for the teacher's output on them or for their quadratic term.
    needs_real: bool = field(init=False, repr=False, compare=False)
    # Whether the fake turn needs the teacher's output (``D != 0`` for generated or for real rows).
    needs_teacher: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "Q", "kappa", "sample_scale"):
            # Kernels take doubles, and an int would not match the operator's schema.
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        object.__setattr__(self, "needs_real", self.alpha < 1 or self.gamma < 1)
        self._check()
        own = self.normalised or self.distance is not None
        object.__setattr__(self, "weighs_samples", own or self.sample_scale > 0)
        if own:
            scalars = self.alpha, self.beta, 0.0, 0.5
        elif self.flows == "x":
            scalars = 0.0, self.beta / 2, 0.0, 1.0
        else:
            scalars = self.alpha, self.beta, self.Q, self.kappa
        real = FakeRow(0.0, 0.0, 0.0, 0.0)
        try:
            generated = _fake_row(self.alpha, self.beta, self.gamma, self.kappa)
            if self.needs_real:
                real = _fake_row(1 - self.alpha, 1 - self.beta, 1 - self.gamma, self.kappa)
                if self.teacher_target:
                    real = FakeRow(real.A, 0.0, real.B + real.D, 0.0)
        except OverflowError:
            raise UserError(f"beta and kappa must have squares, got {self.beta:g} and {self.kappa:g}") from None
        object.__setattr__(self, "generator_scalars", scalars)
        object.__setattr__(self, "generated", generated)
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "needs_teacher", generated.D != 0 or real.D != 0)

    def _check(self) -> None:
        """Refuse numbers that leave the fake model's loss unbounded below, or that have no meaning."""
        if not 0 < self.alpha <= 1:
            raise UserError(
                f"alpha must lie in (0, 1], got {self.alpha:g}: generated data has weight alpha, real data 1 - alpha"
            )
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta:g}")
        if self.gamma <= 0 or (self.gamma > 1 and self.alpha < 1):
            raise UserError(
                f"gamma must lie in (0, 1], got {self.gamma:g}: outside it the fake model's loss is unbounded below"
            )
        if self.kappa == 0:
            raise UserError("kappa must not be 0: the fake model would have no influence")
        if self.alpha == 1 and self.beta != 1 and self.gamma >= 1:
            raise UserError(
                f"alpha = 1 requires beta = 1, got beta = {self.beta:g}: real data would have no quadratic term and "
                "the fake model's loss would be unbounded below"
            )
        if self.gamma == 1 and (self.alpha != 1 or self.beta != 1):
            raise UserError(
                f"gamma = 1 requires alpha = beta = 1, got alpha = {self.alpha:g}, beta = {self.beta:g}: real data "
                "would have no quadratic term and the fake model's loss would be unbounded below"
            )
        if self.flows not in ("all", "x"):
            raise UserError(f"flows must be 'all' or 'x', not {self.flows!r}")
        if not self.needs_fake and (self.flows != "x" or self.needs_real):
            raise UserError("without a fake model only x can flow, and real data has no part")
        if self.teacher_target and not self.needs_real:
            raise UserError("teacher_target must be false without real rows: alpha and gamma are 1")
        if self.normalised and (self.flows != "all" or self.sample_scale):
            raise UserError("a normalised objective has its own scale for each sample, and everything flows")
        if self.distance is not None and (self.normalised or self.sample_scale or self.flows != "all"):
            raise UserError("an objective with a distance has its own scale for each sample, and everything flows")
        if self.distance is not None and self.kappa != 1:
            raise UserError(f"kappa must be 1 with a distance, got {self.kappa:g}")
        if self.sample_scale < 0:
            raise UserError(f"sample_scale must not be negative, got {self.sample_scale:g}")
        if self.beta > 1:
            warnings.warn(
                f"beta = {self.beta:g} is outside (0, 1], the range of the RealUID paper (arXiv 2509.22459), which "
                "calls larger ranges highly unstable",
                UserWarning,
                stacklevel=5,
            )
        # With flows = "x" the fake model's field itself moves the generator, and real rows change that field.
        if self.flows == "all" and self.alpha < 1 and math.isclose(self.alpha, self.beta, rel_tol=1e-12):
            warnings.warn(
                f"beta / alpha = 1 with alpha = {self.alpha:g}: real data carries no signal to the generator, this is "
                "data-free UID at a higher cost",
                UserWarning,
                stacklevel=5,
            )


def _fake_row(alpha: float, beta: float, gamma: float, kappa: float) -> FakeRow:
    d = kappa * (gamma * kappa - alpha)
    # If it is zero in exact arithmetic, (1 - gamma) - (1 - alpha) may round to about 1e-17. The difference decides
    # whether the teacher is evaluated, so such a value is set to 0.
    d = 0.0 if abs(d) < 1e-12 else d
    # Without the teacher's share (alpha = 0) there is no square to complete, and C, constant for the fake model, is 0.
    return FakeRow(A=gamma * kappa**2, B=kappa * beta, D=d, C=beta**2 / alpha if alpha else 0.0)
