"""The algorithm as published, in plain PyTorch, against which a training step is timed.

The linear path, velocities and RealUID, one turn after another: every turn reads a batch, whose labels the generated
samples get too; every fake turn makes its samples with the generator's graph, which is never used and lives until the
turn ends; the fake model runs once on generated and once on real samples; losses are the two squared distances of the
paper under autograd; Adam runs as a loop over parameters after ``clip_grad_norm_``, with rates that rise from zero;
each average walks over the state dict, with one decay throughout; memory layouts are torch's defaults. The published
loop's garbage collections are left out. The times, noise and batch of a turn are arguments, so that an update can be
compared with the trainer's (:mod:`bench.parity`). docs/parity.md says where each of these facts is from.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from realuid_fast.backends import backend
from realuid_fast.data import Dataset
from realuid_fast.models.conditions import labels_to_draw
from realuid_fast.sampling import LINEAR, default_start, one_step
from realuid_fast.settings import Config, OptimiserConfig
from realuid_fast.teachers import Model
from realuid_fast.train.batches import Batches

from .timing import Stopwatch


class Published:
    """Teacher, fake model and generator of one run, with :meth:`update` as :class:`~realuid_fast.train.Distiller` has.

    Of the configuration's learning rates the peak and the length of the warm-up count.
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
        if settings.dropout is not None:
            for module in self.fake.modules():
                if isinstance(module, nn.Dropout):
                    module.p = settings.dropout
        self.generator = copy.deepcopy(self.fake)
        self.fake_adam = _adam(self.fake, settings.fake)
        self.generator_adam = _adam(self.generator, settings.generator)
        self.fake_rate = _warm_up(self.fake_adam, settings.fake.warmup)
        self.generator_rate = _warm_up(self.generator_adam, settings.generator.warmup)
        self.fake_clip, self.generator_clip = settings.fake.clip, settings.generator.clip
        self.averages = {decay: copy.deepcopy(self.generator.state_dict()) for decay in settings.ema}
        self.batches = Batches(dataset, self.batch, 2 * config.run.seed, self.device)
        self.labelled = labels_to_draw(self.generator, dataset, self.device) is not None
        self.phases = Stopwatch()

    def update(self) -> None:
        """All fake turns, then the generator's, with fresh draws; the networks' layers are torch's own."""
        with backend("torch"):
            for _ in range(self.turns):
                self.fake_turn(*self._draws())
            z, y, t, n, _ = self._draws()
            self.generator_turn(z, y, t, n)

    def fake_turn(self, z: Tensor, y: Tensor | None, t: Tensor, n: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the fake model; its loss and gradient norm, each ``()``.

        Args:
            z: the generator's noise ``(B, ...)``.
            y, t, n: labels ``(B,)``, times ``(B,)`` and noise ``(B, ...)``, shared by generated and real samples.
            real: real samples ``(B, ...)``.
        """
        with self.phases("generate"):
            generated = one_step(self.generator, z, self.t_start, y)
        alpha, beta = self.alpha, self.beta
        with self.phases("fake forward"):
            on_generated = self.fake(t, _interpolant(generated.detach(), t, n), y)
            on_real = self.fake(t, _interpolant(real, t, n), y)
        with self.phases("fake loss"):
            loss = alpha * _distance(on_generated, beta / alpha * (generated.detach() - n))
            loss = loss + (1 - alpha) * _distance(on_real, (1 - beta) / (1 - alpha) * (real - n))
        with self.phases("fake backward"):
            self.fake_adam.zero_grad()
            loss.backward()
        with self.phases("fake optimiser"):
            norm = nn.utils.clip_grad_norm_(self.fake.parameters(), self.fake_clip)
            self.fake_adam.step()
            self.fake_rate.step()
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
            self.generator_rate.step()
            self._average()
        self.fake.requires_grad_(True)
        return loss.detach(), norm

    def _average(self) -> None:
        with torch.no_grad():
            for decay, average in self.averages.items():
                for name, value in self.generator.state_dict().items():
                    average[name].copy_(decay * average[name] + (1 - decay) * value)

    def _draws(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Generator noise, labels, times, the interpolants' noise, and real samples."""
        with self.phases("data"):
            real, y = self.batches.next()
        z, n = torch.randn(2, self.batch, *self.shape, device=self.device)
        return z, y if self.labelled else None, torch.rand(self.batch, device=self.device), n, real


def _adam(net: nn.Module, settings: OptimiserConfig) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=settings.lr, betas=settings.betas, foreach=False, fused=False)


def _warm_up(adam: torch.optim.Adam, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Step ``n`` has the rate ``lr min(n, W) / W``, the first one none at all."""
    steps = max(steps, 1)
    return torch.optim.lr_scheduler.LambdaLR(adam, lambda n: min(n, steps) / steps)


def _interpolant(x: Tensor, t: Tensor, n: Tensor) -> Tensor:
    t = t.view(-1, *[1] * (x.dim() - 1))
    return t * x + (1 - t) * n


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance, summed over a sample and averaged over the batch."""
    return ((prediction - target) ** 2).flatten(1).sum(1).mean()
