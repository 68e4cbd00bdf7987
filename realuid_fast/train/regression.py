"""Trajectory regression, the baseline without a fake model: the student learns the teacher's samples in one step.

Student and teacher start from the same noise ``z``. The targets ``x(z)`` are the teacher's samples, ``steps`` steps of
its flow::

    l = ||G(z) - x(z)||^2        sum over a sample, mean over the batch

Source: Luhman and Luhman, Knowledge Distillation in Iterative Generative Models (2101.02388), section 3; the regression
that DMD adds (Yin et al., 2311.18828, section 3.2) has a perceptual distance in place of the square.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as rf
from .. import precision
from ..data import Dataset
from ..errors import UserError
from ..generator import Generator, frozen_view
from ..networks.recompute import recompute
from ..noise import NoiseStream, normal
from ..optim import Optimiser
from ..paths import COLUMNS
from ..precision import Precision
from ..sampling import check_solver, follows_flow, integrate, null_labels
from ..teachers import Description, Model
from . import distributed, modes
from .batches import endpoints_to_draw, labels_to_draw, picked
from .meters import Meters
from .phases import Phases
from .settings import Config


class RegressionTrainer:
    """Trains a one-step generator on its teacher's samples; no real data, no fake model, one turn an update.

    Raises:
        UserError: the teacher does not fit the path or the data, its samples do not follow from the noise alone, or a
            setting of the distillation has no meaning here.
    """

    sharded = False

    def __init__(self, config: Config, dataset: Dataset, teacher: Model, command: str = "") -> None:
        settings, seed = config.distill, config.run.seed
        described = teacher.description
        self.device = torch.device(config.run.device)
        self._check(config, dataset, described)
        interpolant = config.path.build(described)
        self.path, self._predict = interpolant.path, interpolant.predict
        if not follows_flow(self.path, self._predict):
            raise UserError(
                f"regression needs a teacher whose samples follow from the noise: from {self._predict} on "
                f"{type(self.path).__name__} they are random"
            )
        check_solver(settings.regression.solver, self.path, self._predict)
        self.parts = config.run.accumulate
        self.batch = distributed.share(settings.batch, self.parts, "distill.batch")
        self.updates, self.step = settings.updates, 0
        images = len(dataset.shape) == 3
        self._layout = torch.channels_last if images and config.run.channels_last else torch.contiguous_format
        self._precision = Precision(settings.generator_precision, self.device)
        self._steps, self._solver, self._guidance = *vars(settings.regression).values(), settings.guidance

        net = teacher.net.to(self.device)
        if images:
            net = net.to(memory_format=self._layout)  # type: ignore[call-overload]
        if self._guidance != 1.0:
            null_labels(net, torch.zeros(0, dtype=torch.int64))
        if config.run.checkpoint_activations:
            recompute(net)
        self.teacher = frozen_view(net).eval() if teacher.function is None else teacher.function
        sampling = (settings.t_start, self.path, self._predict)
        self.generator = Generator(copy.deepcopy(net).train().requires_grad_(True), *sampling)
        self.optimiser = Optimiser(
            self.generator.net, **vars(settings.generator), ema_decays=settings.ema, total=self.updates
        )
        distributed.average(self.optimiser, self.parts)
        average = self.optimiser.ema.get(settings.export)
        self.student = Generator(frozen_view(self.generator.net, average).eval(), *sampling)

        self.labels = labels_to_draw(net, dataset, self.device)
        self.endpoints = endpoints_to_draw(net, self.path, dataset, self.device)
        self.draws = torch.Generator(self.device).manual_seed(distributed.seed(2 * seed + 1))
        self.noise = NoiseStream(distributed.seed(seed), self.device)
        self._like = torch.empty(self.batch, *dataset.shape, device=self.device).contiguous(memory_format=self._layout)
        self._plain = torch.zeros(self.batch, len(COLUMNS), device=self.device)
        for name in ("p", "k_out", "w"):
            # With these three at 1 and the rest at 0 the matching loss has f = F and tgt = x.
            self._plain[:, COLUMNS.index(name)] = 1.0
        self.meters = Meters(("regression loss", "generator gradient"), self.device)
        self.phases = Phases(config.run.timings, self.device)
        compiled = modes.compiled if modes.compiles(config.run.mode) else lambda net: net
        self._run_generator = compiled(self.generator)
        self.description = Description(
            network=described.network,
            role="student",
            path=described.path,
            path_settings=described.path_settings,
            predict=described.predict,
            data=dataset.config,
            preprocessing=dataset.preprocessing,
            command=command,
            t_start=self.generator.t_start,
            teacher=settings.teacher,
            decay=settings.export,
        )

    def _check(self, config: Config, dataset: Dataset, teacher: Description) -> None:
        settings = config.distill
        refused = {
            "distill.times": bool(settings.times),
            "distill.start": bool(settings.start),
            "distill.gan": bool(settings.gan.weight_fake),
            "distill.generator_precision fp16": settings.generator_precision == "fp16",
            f"run.mode {config.run.mode}": modes.captures(config.run.mode),
        }
        for name, given in refused.items():
            if given:
                raise UserError(f"{name} is not for distill.objective regression")
        sample = teacher.network.get("dim", teacher.network.get("shape"))
        if sample is not None and tuple(sample) != dataset.shape:
            raise UserError(
                f"the teacher makes samples of shape {tuple(sample)}, data set '{dataset.name}' has {dataset.shape}"
            )
        reasons = {
            f"run.mode {config.run.mode}": modes.why_not(config.run.mode, self.device),
            f"distill.generator_precision {settings.generator_precision}": precision.why_not(
                settings.generator_precision, self.device
            ),
        }
        for name, reason in reasons.items():
            if reason is not None:
                raise UserError(f"{name} does not run on {self.device}: {reason}")

    @property
    def network(self) -> nn.Module:
        """The network in training, for its shape and classes."""
        return self.generator.net

    @property
    def images_per_update(self) -> int:
        return self.parts * self.batch

    @property
    def rows(self) -> int:
        return 1

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        return {"generator": self.optimiser}

    def update(self) -> None:
        """One step on one batch of noise."""
        for _ in range(self.parts):
            with self._precision.turn():
                self._backward()
        with self.phases("generator optimiser"):
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.meters.add("generator gradient", self.optimiser.norm)
        self.step += 1

    def _backward(self) -> None:
        """Add the gradients of one part of a batch."""
        labels, ends = picked(self.labels, self.endpoints, self.batch, self.draws, self._layout)
        z = normal(self.noise.next_key(), self._like)
        with self.phases("teacher forward"), self._precision.networks():
            target = integrate(
                self.teacher, z, self._steps, self._solver, labels, None, self.path, self._predict, ends,
                guidance=self._guidance,
            )  # fmt: skip
        with self.phases("generator forward"), self._precision.networks():
            x = self._run_generator(z, labels, ends)
        x, target = (t.float().contiguous(memory_format=self._layout) for t in (x, target))
        with self.phases("loss"):
            grads = rf.matching_grads(out=x.detach(), x=target, x_t=None, coef=self._plain, noise=self.noise.state)
        with self.phases("generator backward"):
            x.backward(grads.out)
        self.meters.add("regression loss", grads.loss)

    def concern(self, row: Mapping[str, float]) -> str | None:
        """None: no number of this trainer's log shows that a setting is wrong."""
        return None

    def sample(self, z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None) -> Tensor:
        """Samples of the student that would be exported now, from noise ``z`` and, if it takes them, endpoints."""
        with torch.no_grad(), Precision("float32", self.device).turn():
            return self.student(z, labels, None if self.endpoints is None else endpoint)

    def exported(self) -> tuple[dict[str, Tensor], Description]:
        """The student's weights, which the run saves at its end, and their description."""
        return self.student.net.state_dict(), self.description

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "step": self.step,
            "generator": self.generator.net.state_dict(),
            "generator_optimiser": self.optimiser.state_dict(),
            "noise": self.noise.state_dict(),
            "draws": self.draws.get_state(),
            "meters": self.meters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, in place: the frozen view stays on the same memory."""
        self.step = int(state["step"])
        self.generator.net.load_state_dict(state["generator"])
        self.optimiser.load_state_dict(state["generator_optimiser"])
        self.noise.load_state_dict(state["noise"])
        self.draws.set_state(state["draws"])
        self.meters.load_state_dict(state["meters"])
