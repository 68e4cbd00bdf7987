"""Distillation: turns of the fake model and of the one-step generator, their backward passes seeded explicitly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as rf
from ..data import Dataset
from ..errors import UserError
from ..noise import NoiseStream, normal
from ..optim import Optimiser
from ..teachers import Description, Model
from .batches import Batches, labels_to_draw
from .config import Config
from .generator import Generator, frozen_view
from .meters import Meters
from .phases import Phases


class Distiller:
    """Holds the teacher, the fake model and the generator, and makes one update of both students after another.

    An update is ``fake_turns`` steps of the fake model and one of the generator. The generator does not change before
    its own step, so its samples for all fake turns come from one forward without gradient. Nothing here reads a tensor
    on the host: losses stay on the device until :attr:`meters` are read.
    """

    def __init__(self, config: Config, dataset: Dataset, teacher: Model, command: str = "") -> None:
        settings, seed = config.distill, config.run.seed
        described = teacher.description
        if described.predict != "velocity":
            raise UserError(f"the teacher predicts {described.predict}, the one-step generator needs a velocity")
        if described.path != config.path.name:
            raise UserError(f"the teacher was trained on the path '{described.path}', not on '{config.path.name}'")
        sample = described.network.get("dim", described.network.get("shape"))
        if sample is not None and tuple(sample) != dataset.shape:
            raise UserError(
                f"the teacher makes samples of shape {tuple(sample)}, data set '{dataset.name}' has {dataset.shape}"
            )
        self.objective = settings.objective.build()
        self.path = config.path.build()
        self.device = torch.device(config.run.device)
        self.batch, self.turns, self.updates = settings.batch, settings.fake_turns, settings.updates
        self.step = 0
        self._match, self._predict = config.path.match, described.predict
        self._reads_x_t = self.path.reads_x_t(self._match, self._predict)
        images = len(dataset.shape) == 3
        self._layout = torch.channels_last if images and config.run.channels_last else torch.contiguous_format

        net = teacher.net.to(self.device)
        if images:
            net = net.to(memory_format=self._layout)  # type: ignore[call-overload]
        self.teacher = frozen_view(net).eval()
        self.fake = copy.deepcopy(net).train().requires_grad_(True)
        self.generator = Generator(copy.deepcopy(net).train().requires_grad_(True), settings.t_start)
        generator, fake = settings.generator, settings.fake
        self.generator_optimiser = Optimiser(
            self.generator.net, **vars(generator), ema_decays=settings.ema, total=self.updates
        )
        self.fake_optimiser = Optimiser(self.fake, **vars(fake), total=self.updates * self.turns)
        # Views come after the optimisers, which may move the parameters into one buffer.
        self.frozen_fake = frozen_view(self.fake)
        average = self.generator_optimiser.ema.get(settings.export)
        self.student = Generator(frozen_view(self.generator.net, average).eval(), settings.t_start)

        self.batches = Batches(dataset, self.batch, 2 * seed, self.device) if self.objective.needs_real else None
        self.labels = labels_to_draw(net, dataset, self.device)
        self.draws = torch.Generator(self.device).manual_seed(2 * seed + 1)
        self.noise = NoiseStream(seed, self.device)
        self._like = self._laid_out(torch.empty(self.batch, *dataset.shape, device=self.device))
        self._like_cycle = self._laid_out(torch.empty(self.turns * self.batch, *dataset.shape, device=self.device))
        self.meters = Meters(("fake loss", "generator loss", "fake gradient", "generator gradient"), self.device)
        self.phases = Phases(config.run.timings, self.device)
        self.description = Description(
            network=described.network,
            role="student",
            path=described.path,
            data=dataset.config,
            preprocessing=dataset.preprocessing,
            command=command,
            t_start=settings.t_start,
            teacher=settings.teacher,
        )

    @property
    def network(self) -> nn.Module:
        """The network in training, for its shape and classes."""
        return self.generator.net

    @property
    def images_per_update(self) -> int:
        """Training samples, generated or real, that one update's losses are evaluated on."""
        rows = 2 if self.objective.needs_real else 1
        return self.batch * (self.turns * rows + 1)

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        return {"fake": self.fake_optimiser, "generator": self.generator_optimiser}

    def update(self) -> None:
        """One update: all fake turns, then the generator's."""
        with self.phases("generate"), torch.no_grad():
            y = self._draw_labels(self.turns * self.batch)
            made = self.generator(normal(self.noise.next_key(), self._like_cycle), y)
        labels = [None] * self.turns if y is None else y.split(self.batch)
        for rows, row_labels in zip(made.split(self.batch), labels, strict=True):
            self.fake_turn(rows, row_labels)
        self.generator_turn()
        self.step += 1

    def fake_turn(self, generated: Tensor, labels: Tensor | None = None) -> None:
        """One step of the fake model on generated rows ``(B, ...)`` and, where they matter, as many real ones."""
        n_real, y = 0, labels
        with self.phases("data"):
            x = self._laid_out(generated)
            if self.batches is not None:
                real, real_labels = self.batches.next()
                x, n_real = self._laid_out(torch.cat((generated, real))), self.batch
                if labels is not None and real_labels is not None:
                    y = torch.cat((labels, real_labels))
            time, coef = self._draw_times()
            if n_real:
                time, coef = time.repeat(2), coef.repeat(2, 1)
            key = self.noise.next_key()
            x_t = rf.interpolate(x, coef, key, noise_rows=self.batch)
        with self.phases("fake forward"):
            out = self._laid_out(self.fake(time, x_t, y))
        teacher_out = None
        if self.objective.needs_teacher:
            with self.phases("teacher forward"), torch.no_grad():
                teacher_out = self._laid_out(self.teacher(time, x_t, y))
        with self.phases("fake loss"):
            at = x_t if self._reads_x_t else None
            grads = rf.fake_grads(
                out.detach(), x, at, coef, key, self.objective, n_real, teacher_out, noise_rows=self.batch
            )
        with self.phases("fake backward"):
            out.backward(grads.fake_out)
        with self.phases("fake optimiser"):
            self.fake_optimiser.step()
            self.fake_optimiser.zero_grad()
        self.meters.add("fake loss", grads.loss)
        self.meters.add("fake gradient", self.fake_optimiser.norm)

    def generator_turn(self) -> None:
        """One step of the generator; teacher and fake model are frozen."""
        loss = self.generator_backward()
        with self.phases("generator optimiser"):
            self.generator_optimiser.step()
            self.generator_optimiser.zero_grad()
        self.meters.add("generator loss", loss)
        self.meters.add("generator gradient", self.generator_optimiser.norm)

    def generator_backward(self) -> Tensor:
        """Add the generator loss' gradient to the generator's parameters; the loss ``()``.

        With ``g = dl/dx_t`` through both networks and ``x_t = a x + c n``, the generator's backward starts from
        ``dl/dx = a g + (dl/dx through the target)``.
        """
        with self.phases("generator forward"):
            y = self._draw_labels(self.batch)
            x = self._laid_out(self.generator(normal(self.noise.next_key(), self._like), y))
        with self.phases("interpolate"):
            time, coef = self._draw_times()
            key = self.noise.next_key()
            x_t = rf.interpolate(x.detach(), coef, key).requires_grad_()
        with self.phases("frozen forward"):
            teacher_out = self._laid_out(self.teacher(time, x_t, y))
            fake_out = self._laid_out(self.frozen_fake(time, x_t, y))
        with self.phases("generator loss"):
            at = x_t.detach() if self._reads_x_t else None
            grads = rf.generator_grads(
                teacher_out.detach(), fake_out.detach(), x.detach(), at, coef, key, self.objective
            )
        with self.phases("frozen backward"):
            seeds = (grads.teacher_out, grads.fake_out)
            (g_x_t,) = torch.autograd.grad((teacher_out, fake_out), x_t, seeds)
            if grads.x_t is not None:
                g_x_t = g_x_t + grads.x_t
        with self.phases("generator backward"):
            a = coef[:, 0].view(-1, *[1] * (x.dim() - 1))
            x.backward(torch.addcmul(grads.x, a, g_x_t))
        return grads.loss

    def sample(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The exported student's samples for noise ``z``."""
        with torch.no_grad():
            return self.student(z, labels)

    def exported(self) -> tuple[dict[str, Tensor], Description]:
        """What the run saves at its end: the student's weights and their description."""
        return self.student.net.state_dict(), self.description

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "step": self.step,
            "generator": self.generator.net.state_dict(),
            "fake": self.fake.state_dict(),
            "generator_optimiser": self.generator_optimiser.state_dict(),
            "fake_optimiser": self.fake_optimiser.state_dict(),
            "noise": self.noise.state_dict(),
            "draws": self.draws.get_state(),
            "batches": None if self.batches is None else self.batches.state_dict(),
            "meters": self.meters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, in place: the frozen views stay on the same memory."""
        self.step = int(state["step"])
        self.generator.net.load_state_dict(state["generator"])
        self.fake.load_state_dict(state["fake"])
        self.generator_optimiser.load_state_dict(state["generator_optimiser"])
        self.fake_optimiser.load_state_dict(state["fake_optimiser"])
        self.noise.load_state_dict(state["noise"])
        self.draws.set_state(state["draws"])
        if self.batches is not None:
            self.batches.load_state_dict(state["batches"])
        self.meters.load_state_dict(state["meters"])

    def _draw_labels(self, count: int) -> Tensor | None:
        """Labels of ``count`` training samples picked at random, so that classes keep the data's proportions."""
        if self.labels is None:
            return None
        return self.labels[torch.randint(len(self.labels), (count,), generator=self.draws, device=self.device)]

    def _draw_times(self) -> tuple[Tensor, Tensor]:
        """Network times ``(B,)`` and coefficient rows ``(B, 9)``."""
        t = self.path.sample_time(self.batch, self.draws, self.device)
        return self.path.network_time(t), self.path.coefficients(t, self._match, self._predict)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        # The fused calls want one layout; a tensor that has it already is passed on as it is.
        return tensor.contiguous(memory_format=self._layout)
