"""Moment matching in several steps: students that start from noised real data and move on by the posterior.

A turn takes real samples ``x``, a time ``t`` and a time ``s`` nearer to the data, at most a step of the student away::

    z_t ~ q(z_t | x)        x~ = G(z_t, t)        z_s ~ q(z_s | z_t, x~)
    fake       w(s) (||f(z_s) - x~||^2 + ||f(z_s) - f*(z_s)||^2)
    generator  w(s) <x~, f(z_s) - f*(z_s)>, f and f* held fixed

The posterior is a sum ``a x~ + b z_t + c n``, so ``z_t`` is the endpoint of a fused call. Source: Salimans et al.,
Multistep Distillation of Diffusion Models via Moment Matching (2406.04103), its alternating algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional, losses
from ..coefficients import Coefficients
from ..data import Dataset
from ..errors import UserError
from ..interpolant import Interpolant
from ..matching import Matching
from ..models.calls import call, converted, ends
from ..models.conditions import labels_to_draw
from ..models.files import Description
from ..models.generator import Generator
from ..objectives import Objective
from ..optim import Optimiser
from ..paths import OneSidedPath
from ..precision import Precision
from .batches import Batches
from .trainer import Setup, Trainer


class MomentTrainer(Trainer):
    """Trains a generator of ``k`` steps and its fake model in turns; each turn reads a batch of real data.

    The arguments are those of :class:`~realuid_fast.train.distill.Distiller`; ``precision``, any but fp16, is that of
    all turns.

    Raises:
        UserError: a two-sided path, another match space than x0, a generator that is not ancestral, or an objective
            that is not of moment matching's kind: a gradient in the samples alone, no real rows, a teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        fake: nn.Module,
        generator: Generator,
        matching: Matching,
        objective: Objective,
        dataset: Dataset,
        fake_optimiser: Optimiser,
        generator_optimiser: Optimiser,
        setup: Setup,
        *,
        fake_turns: int = 1,
        guidance: float = 1.0,
        precision: str = "float32",
        export: float = 0.0,
        description: Description,
    ) -> None:
        path, predict = matching.path, matching.predict
        if matching.match != "x0" or not isinstance(path, OneSidedPath) or not generator.ancestral:
            raise UserError("states of data need a one-sided path, match x0 and an ancestral generator")
        if objective.flows != "x" or objective.needs_real or not objective.needs_teacher:
            raise UserError(f"states of data need the objective moment-matching, not {objective.name}")
        optimisers = {"fake": fake_optimiser, "generator": generator_optimiser}
        watched = [f"{name} {what}" for what in ("loss", "gradient") for name in optimisers]
        super().__init__(
            generator.net, matching, dataset, setup, optimisers, watched, export, generator_optimiser, description
        )  # fmt: skip
        self.teacher, self.fake, self.generator, self.objective = teacher, fake, generator, objective
        self.student = Generator(self._exported, generator.t_start, path, predict, generator.times, ancestral=True)
        self._turns, self._guidance = ["fake"] * fake_turns + ["generator"], guidance
        self._precision, self._posterior = Precision(precision, self.device), path.posterior
        self.batches = Batches(dataset, self.batch, 2 * setup.seed, self.device, self.draws)
        self.labels = labels_to_draw(fake, dataset, self.device)
        self.kept = {"generator": generator.net, "fake": fake, "batches": self.batches}
        self.kept |= {f"{name}_optimiser": optimiser for name, optimiser in optimisers.items()}

    @property
    def images_per_update(self) -> int:
        return self.parts * self.batch * len(self._turns)

    def update(self) -> None:
        """All fake turns, then the generator's, each on a batch of its own."""
        for turn in self._turns:
            for _ in range(self.parts):
                with self._precision.turn():
                    self.meters.add(f"{turn} loss", self.turn_backward(turn))
            self.meters.add(f"{turn} gradient", self._optimise(turn, f"{turn} optimiser"))
        self.step += 1

    def turn_backward(self, turn: str) -> Tensor:
        """Add the gradients of one part of a batch in the turn ``"fake"`` or ``"generator"``; the loss ``()``.

        In the turn ``"real"`` real samples stand for the generator's in the fake model's loss.
        """
        with self.phases("data"):
            real, labels = self.batches.next()
        with self.phases("generate"), torch.set_grad_enabled(turn == "generator"):
            t, s = self._steps()
            z_t = functional.interpolate(self._laid_out(real), self.matching.coefficients(t), self.noise.next_key())
            out = self._ask(self.generator.net, t, z_t, labels)
            made = converted(self.path, "x0", self.matching.predict, t, out, z_t)
            x = self._laid_out(real if turn == "real" else made)
        with self.phases("interpolate"):
            coef, key = self.matching.coefficients(s), self.noise.next_key()
            for name, value in zip("abc", self._posterior(s, t), strict=True):
                getattr(Coefficients(coef), name).copy_(value)
            z_s = functional.interpolate(x.detach(), coef, key, z_t)
            draw = Interpolant(self.path, "x0", self.matching.predict, x.detach(), z_s, s, coef, key, self.batch, z_t)
        with self.phases("fake forward"), torch.set_grad_enabled(turn != "generator"):
            fake_out = self._ask(self.fake, s, z_s, labels)
        with self.phases("teacher forward"), torch.no_grad():
            teacher_out = self._ask(self.teacher, s, z_s, labels, self._guidance)
        with self.phases(f"{turn} backward"):
            if turn != "generator":
                fake = losses.fake_grads(self.objective, draw, fake_out.detach(), teacher_out=teacher_out)
                fake_out.backward(fake.fake_out)
                return fake.loss
            grads = losses.generator_grads(self.objective, draw, teacher_out, fake_out)
            x.backward(grads.x)
            return grads.loss

    def _steps(self) -> tuple[Tensor, Tensor]:
        """``t, s``: ``s`` uniform from the data to ``t_start``, ``t`` up to a ``k``-th of that way nearer to noise."""
        u, step = torch.rand(2, self.batch, generator=self.draws, device=self.device)
        way = self.generator.t_start - (data := ends(self.path).data)
        return data + way * (u + step / self.generator.steps).clamp(max=1.0), data + way * u

    def _ask(self, net: nn.Module, t: Tensor, x_t: Tensor, labels: Tensor | None, guidance: float = 1.0) -> Tensor:
        labels = None if self.labels is None else labels
        with self._precision.networks():
            return self._float(call(net, t, x_t, labels, self.path, self.matching.predict, None, guidance))
