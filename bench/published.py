"""The algorithm as published, in plain PyTorch: what a training step is timed against.

The linear path, velocities and RealUID, one turn after another: every fake turn makes its samples with the generator's
graph, which is never used and lives until the turn ends; the fake model runs once on generated and once on real
samples; losses are the two squared distances of the paper under autograd; Adam runs as a loop over parameters after
``clip_grad_norm_``; each average walks over the state dict; memory layouts are torch's defaults. The published loop's
garbage collections are left out. The times, noise and labels of a turn are arguments, so that a test can compare an
update with the trainer's.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from realuid_fast.backends import backend
from realuid_fast.data import Dataset
from realuid_fast.sampling import LINEAR, default_start, one_step
from realuid_fast.teachers import Model
from realuid_fast.train.batches import Batches, labels_to_draw
from realuid_fast.train.config import Config, OptimiserConfig

from .timing import Stopwatch


class Published:
    """Teacher, fake model and generator of one run, with :meth:`update` as :class:`~realuid_fast.train.Distiller` has.

    Learning rates are constant, at the configuration's peak.
    """

    def __init__(self, config: Config, dataset: Dataset, teacher: Model) -> None:
        settings = config.distill
        objective = settings.objective.build()
        self.alpha, self.beta = objective.alpha, objective.beta
        self.batch, self.turns = settings.batch, settings.fake_turns
        self.t_start = default_start(LINEAR) if settings.t_start is None else settings.t_start
        self.shape = dataset.shape
        self.device = torch.device(config.run.device)
        self.teacher = teacher.net.to(self.device).eval().requires_grad_(False)
        self.fake = copy.deepcopy(teacher.net).train().requires_grad_(True)
        self.generator = copy.deepcopy(self.fake)
        self.fake_adam = _adam(self.fake, settings.fake)
        self.generator_adam = _adam(self.generator, settings.generator)
        self.fake_clip, self.generator_clip = settings.fake.clip, settings.generator.clip
        self.averages = {decay: copy.deepcopy(self.generator.state_dict()) for decay in settings.ema}
        self.batches = Batches(dataset, self.batch, 2 * config.run.seed, self.device)
        self.labels = labels_to_draw(self.generator, dataset, self.device)
        self.steps = 0
        self.phases = Stopwatch()

    def update(self) -> None:
        """All fake turns, then the generator's, with fresh draws; the networks' layers are torch's own."""
        with backend("torch"):
            for _ in range(self.turns):
                with self.phases("data"):
                    real, real_labels = self.batches.next()
                self.fake_turn(*self._draws(), real, real_labels)
            self.generator_turn(*self._draws())

    def fake_turn(
        self, z: Tensor, y: Tensor | None, t: Tensor, n: Tensor, real: Tensor, real_y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step of the fake model; its loss and gradient norm, each ``()``.

        Args:
            z, y: the generator's noise ``(B, ...)`` and labels.
            t, n: times ``(B,)`` and noise ``(B, ...)`` of the interpolants, shared by generated and real samples.
            real, real_y: real samples ``(B, ...)`` and their labels.
        """
        with self.phases("generate"):
            generated = one_step(self.generator, z, self.t_start, y)
        alpha, beta = self.alpha, self.beta
        real_y = None if y is None else real_y
        with self.phases("fake forward"):
            on_generated = self.fake(t, _interpolant(generated.detach(), t, n), y)
            on_real = self.fake(t, _interpolant(real, t, n), real_y)
        with self.phases("fake loss"):
            loss = alpha * _distance(on_generated, beta / alpha * (generated.detach() - n))
            loss = loss + (1 - alpha) * _distance(on_real, (1 - beta) / (1 - alpha) * (real - n))
        with self.phases("fake backward"):
            self.fake_adam.zero_grad()
            loss.backward()
        with self.phases("fake optimiser"):
            norm = nn.utils.clip_grad_norm_(self.fake.parameters(), self.fake_clip)
            self.fake_adam.step()
        return loss.detach(), norm

    def generator_turn(self, z: Tensor, y: Tensor | None, t: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the generator and its averages; its loss and gradient norm, each ``()``."""
        alpha, beta = self.alpha, self.beta
        self.fake.requires_grad_(False)
        with self.phases("generator forward"):
            x = one_step(self.generator, z, self.t_start, y)
        with self.phases("interpolate"):
            x_t = _interpolant(x, t, n)
        with self.phases("frozen forward"):
            from_teacher, from_fake = self.teacher(t, x_t, y), self.fake(t, x_t, y)
        with self.phases("generator loss"):
            target = beta / alpha * (x - n)
            loss = alpha * _distance(from_teacher, target) - alpha * _distance(from_fake, target)
        with self.phases("generator backward"):
            self.generator_adam.zero_grad()
            loss.backward()
        with self.phases("generator optimiser"):
            norm = nn.utils.clip_grad_norm_(self.generator.parameters(), self.generator_clip)
            self.generator_adam.step()
            self._average()
        self.fake.requires_grad_(True)
        return loss.detach(), norm

    def _average(self) -> None:
        with torch.no_grad():
            for decay, average in self.averages.items():
                keep = min(decay, (1 + self.steps) / (10 + self.steps))
                for name, value in self.generator.state_dict().items():
                    average[name].copy_(keep * average[name] + (1 - keep) * value)
        self.steps += 1

    def _draws(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Generator noise, labels, times, and the interpolants' noise."""
        y = None
        if self.labels is not None:
            y = self.labels[torch.randint(len(self.labels), (self.batch,), device=self.device)]
        z, n = torch.randn(2, self.batch, *self.shape, device=self.device)
        return z, y, torch.rand(self.batch, device=self.device), n


def _adam(net: nn.Module, settings: OptimiserConfig) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=settings.lr, betas=settings.betas, foreach=False, fused=False)


def _interpolant(x: Tensor, t: Tensor, n: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (x.dim() - 1))
    return t * x + (1 - t) * n


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance, summed over a sample and averaged over the batch."""
    return ((prediction - target) ** 2).flatten(1).sum(1).mean()
