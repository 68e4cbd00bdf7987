"""Trajectory regression, the baseline without a fake model: the student learns the teacher's samples in a few steps.

Student and teacher start from the same noise ``z``. The targets are the teacher's samples ``x(z)``, ``steps`` steps of
its flow::

    l = D d(G(z), x(z))        d = mean over elements of (G - x)^2 or |G - x|, or any distance; mean over the batch

A student of several steps learns each from the state that the one before has made, towards the teacher's state at its
end (:mod:`realuid_fast.models.few_steps`). Source: Luhman and Luhman, Knowledge Distillation in Iterative Generative
Models (2101.02388), section 3; of several steps Zhou et al., Simple and Fast Distillation (2409.19681).
"""

from __future__ import annotations

from torch import nn

from ..data import Dataset
from ..errors import UserError
from ..matching import Matching
from ..models.calls import follows_flow
from ..models.conditions import endpoints_to_draw, labels_to_draw
from ..models.few_steps import FewSteps, Flow, Pursuit, check_first_stage, described, pursuit
from ..models.files import Description
from ..models.generator import Generator
from ..models.pairs import Distance, mean_square, plain_rows, pull
from ..models.solvers import check_solver
from ..noise import normal
from ..optim import Optimiser
from ..precision import Precision
from .trainer import Setup, Trainer


class RegressionTrainer(Trainer):
    """Trains a generator on its teacher's samples; no real data, no fake model, a turn an update for each step.

    Args:
        teacher: the frozen teacher, called as ``teacher(t, x, labels)``, or a student of several steps.
        generator: the generator, trained in place. Of several numbers of steps each update takes the next in turn.
        matching: the path and the networks' prediction.
        dataset: gives the samples' shape, labels and endpoints.
        optimiser: the optimiser of ``generator.net``.
        setup: batch, updates, seed and mode.
        steps, solver: the teacher's in each step of the generator, as of :func:`realuid_fast.sampling.integrate`.
        distance: ``d(samples, targets)`` ``(B,)``, differentiable in the first, such as LPIPS; or a ``Contrast``.
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
        generator: Generator | FewSteps,
        matching: Matching,
        dataset: Dataset,
        optimiser: Optimiser,
        setup: Setup,
        *,
        steps: int = 20,
        solver: str = "euler",
        distance: Distance = mean_square,
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
        check_first_stage(teacher, generator, steps)
        description = description or described(generator.net, matching, dataset, export, generator)
        watched, optimisers = ("regression loss", "generator gradient"), {"generator": optimiser}
        super().__init__(generator.net, matching, dataset, setup, optimisers, watched, export, optimiser, description)
        self.teacher, self.generator, self.optimiser = teacher, generator, optimiser
        self.student, self.numbers = generator.on(self._exported), generator.numbers or (1,)
        self._teacher = Flow(teacher, steps, solver, guidance, getattr(distance, "previous", None))
        self._distance, self._precision = distance, Precision(precision, self.device)
        self.labels = labels_to_draw(generator.net, dataset, self.device)
        self.endpoints = endpoints_to_draw(generator.net, path, dataset, self.device)
        self._plain = plain_rows(self.batch, self.device)
        (self._run_generator,) = self._compiled(generator)
        self.kept = {"generator": generator.net, "generator_optimiser": optimiser}

    @property
    def images_per_update(self) -> int:
        return self.parts * self.batch * sum(self.numbers) // len(self.numbers)

    def update(self) -> None:
        """A step of the optimiser for each of the generator's, on one batch of noise."""
        number = self.numbers[self.step % len(self.numbers)]
        parts = [self._begin(number) for _ in range(self.parts)]
        for place in range(number):
            for part in parts:
                with self._precision.turn():
                    self._backward(part, place)
            self.meters.add("generator gradient", self._optimise("generator", "generator optimiser"))
        self.step += 1

    def _begin(self, number: int) -> Pursuit:
        """A part of a batch at its noise, and the teacher's states that it is to reach in ``number`` steps."""
        labels, ends = self._conditions(self.batch)
        z = normal(self.noise.next_key(), self._like)
        with self._precision.turn(), self.phases("teacher forward"), self._precision.networks():
            return pursuit(self.generator, self._teacher, z, number, labels, ends)

    def _backward(self, part: Pursuit, place: int) -> None:
        """Take a step with one part of a batch, and add its gradients."""
        with self.phases("generator forward"), self._precision.networks():
            x = part.step(self._run_generator, place)
        x, target = self._float(x), self._float(part.targets[place])
        part.x = x.detach()
        with self.phases("loss"):
            loss, seed = pull(self._distance, part.x, target, self._plain, self.noise.state)
        with self.phases("generator backward"):
            x.backward(seed)
        self.meters.add("regression loss", loss)
