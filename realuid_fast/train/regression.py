"""Trajectory regression, the baseline without a fake model: the student learns the teacher's samples in one step.

Student and teacher start from the same noise ``z``. The targets ``x(z)`` are the teacher's samples, ``steps`` steps of
its flow::

    l = ||G(z) - x(z)||^2        sum over a sample, mean over the batch

Source: Luhman and Luhman, Knowledge Distillation in Iterative Generative Models (2101.02388), section 3; the regression
that DMD adds (Yin et al., 2311.18828, section 3.2) has a perceptual distance in place of the square.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import functional as rf
from ..data import Dataset
from ..errors import UserError
from ..matching import Matching
from ..models.calls import follows_flow
from ..models.conditions import endpoints_to_draw, labels_to_draw
from ..models.files import Description
from ..models.generator import Generator
from ..models.solvers import check_solver, integrate
from ..noise import normal
from ..optim import Optimiser
from ..paths import COLUMNS
from ..precision import Precision
from .trainer import Setup, Trainer


class RegressionTrainer(Trainer):
    """Trains a one-step generator on its teacher's samples; no real data, no fake model, one turn an update.

    Args:
        teacher: the frozen teacher, called as ``teacher(t, x, labels)``.
        generator: the generator, trained in place.
        matching: the path and the networks' prediction.
        dataset: gives the samples' shape, labels and endpoints.
        optimiser: the optimiser of ``generator.net``.
        setup: batch, updates, seed and mode.
        steps, solver: the teacher's trajectories, as :func:`realuid_fast.sampling.integrate` takes them.
        guidance: the scale of the teacher's classifier-free guidance; 1 for none.
        precision: the networks' arithmetic, one of :data:`realuid_fast.precision.PRECISIONS` but fp16.
        export: the decay of the generator's average that is sampled and saved, 0 for the last weights.
        description: the description of the exported student.

    Raises:
        UserError: the teacher's samples do not follow from the noise alone, or arguments that do not go together.
    """

    def __init__(
        self,
        teacher: nn.Module,
        generator: Generator,
        matching: Matching,
        dataset: Dataset,
        optimiser: Optimiser,
        setup: Setup,
        *,
        steps: int = 20,
        solver: str = "euler",
        guidance: float = 1.0,
        precision: str = "float32",
        export: float = 0.0,
        description: Description | None = None,
    ) -> None:
        path, predict = matching.path, matching.predict
        if not follows_flow(path, predict):
            raise UserError(
                f"regression needs a teacher whose samples follow from the noise: from {predict} on "
                f"{type(path).__name__} they are random"
            )
        check_solver(solver, path, predict)
        description = description or Description({}, role="student", predict=predict, t_start=generator.t_start)
        watched, optimisers = ("regression loss", "generator gradient"), {"generator": optimiser}
        super().__init__(
            generator.net, matching, dataset, setup, optimisers, watched, export, optimiser, description
        )  # fmt: skip
        self.teacher, self.generator, self.optimiser = teacher, generator, optimiser
        self.student = Generator(self._exported, generator.t_start, path, predict)
        self._steps, self._solver, self._guidance = steps, solver, guidance
        self._precision = Precision(precision, self.device)
        self.labels = labels_to_draw(generator.net, dataset, self.device)
        self.endpoints = endpoints_to_draw(generator.net, path, dataset, self.device)
        self._plain = torch.zeros(self.batch, len(COLUMNS), device=self.device)
        for name in ("p", "k_out", "w"):
            # With these three at 1 and the rest at 0 the matching loss has f = F and tgt = x.
            self._plain[:, COLUMNS.index(name)] = 1.0
        (self._run_generator,) = self._compiled(generator)
        self.kept = {"generator": generator.net, "generator_optimiser": optimiser}

    @property
    def images_per_update(self) -> int:
        return self.parts * self.batch

    def update(self) -> None:
        """One step on one batch of noise."""
        for _ in range(self.parts):
            with self._precision.turn():
                self._backward()
        self.meters.add("generator gradient", self._optimise("generator", "generator optimiser"))
        self.step += 1

    def _backward(self) -> None:
        """Add the gradients of one part of a batch."""
        labels, ends = self._conditions(self.batch)
        z = normal(self.noise.next_key(), self._like)
        with self.phases("teacher forward"), self._precision.networks():
            target = integrate(
                self.teacher, z, self._steps, self._solver, labels, None, self.path, self.matching.predict, ends,
                guidance=self._guidance,
            )  # fmt: skip
        with self.phases("generator forward"), self._precision.networks():
            x = self._run_generator(z, labels, ends)
        x, target = self._float(x), self._float(target)
        with self.phases("loss"):
            grads = rf.matching_grads(out=x.detach(), x=target, x_t=None, coef=self._plain, noise=self.noise.state)
        with self.phases("generator backward"):
            x.backward(grads.out)
        self.meters.add("regression loss", grads.loss)
