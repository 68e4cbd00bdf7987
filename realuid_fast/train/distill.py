"""Distillation: turns of the fake model and of the one-step generator, their backward passes seeded explicitly."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as rf
from .. import precision
from ..data import Dataset
from ..errors import UserError
from ..generator import Generator, frozen_view
from ..networks import build
from ..networks.recompute import recompute
from ..noise import NoiseStream, normal
from ..objectives import divergence_weight
from ..optim import Optimiser
from ..paths import COLUMNS, OneSidedPath
from ..precision import Precision
from ..sampling import arguments, both, null_labels
from ..teachers import Description, Model
from . import distributed, modes, sharding
from .batches import Batches, endpoints_to_draw, labels_to_draw, picked
from .discriminator import Judged, softplus_term
from .meters import Meters
from .modes import Captured, CudaRecorder, Recorder, Turn
from .phases import Phases
from .settings import Config
from .start import student_of
from .tripwires import Tripwires

WEIGHT = COLUMNS.index("w")


class Distiller:
    """Trains the fake model and the generator against a frozen teacher, update by update.

    An update is ``fake_turns`` steps of the fake model and one of the generator. The generator does not change before
    its own step, so its samples for all fake turns come from one forward without gradient. Nothing here reads a tensor
    on the host: losses stay on the device until :attr:`meters` are read.

    An update is three turns in the sense of :mod:`.modes`: making samples, one fake turn ``fake_turns`` times, and the
    generator's. Every turn reads and writes tensors at fixed addresses, so ``run.mode`` can run it call by call or
    replay it as a graph. The mode changes no number beyond rounding, with one exception: torch.compile draws dropout
    masks its own way. Real samples come from the host and are copied to the device between turns.

    Raises:
        UserError: the teacher does not fit the path or the data, or the device lacks the mode or a precision.
    """

    def __init__(self, config: Config, dataset: Dataset, teacher: Model, command: str = "") -> None:
        settings, seed = config.distill, config.run.seed
        described = teacher.description
        self.interpolant = config.path.build(described)
        self.path, self._predict = self.interpolant.path, self.interpolant.predict
        sample = described.network.get("dim", described.network.get("shape"))
        if sample is not None and tuple(sample) != dataset.shape:
            raise UserError(
                f"the teacher makes samples of shape {tuple(sample)}, data set '{dataset.name}' has {dataset.shape}"
            )
        self.objective = settings.objective.build()
        self.device = torch.device(config.run.device)
        self.mode = config.run.mode
        self._fake_precision = Precision(settings.fake_precision, self.device)
        self._generator_precision = Precision(settings.generator_precision, self.device)
        self._teacher_precision = Precision(settings.teacher_precision, self.device)
        self._precisions = {
            "fake": self._fake_precision,
            "generator": self._generator_precision,
            "teacher": self._teacher_precision,
        }
        self._check_device()
        # Rows in one forward pass. An update of a network uses `parts` such passes on each rank.
        self.parts = config.run.accumulate
        self.batch = distributed.share(settings.batch, self.parts, "distill.batch")
        self.turns, self.updates = settings.fake_turns * self.objective.needs_fake, settings.updates
        self.step, self._whole = 0, True
        self._reads_x_t = self.path.reads_x_t(self.interpolant.match, self._predict)
        images = len(dataset.shape) == 3
        self._layout = torch.channels_last if images and config.run.channels_last else torch.contiguous_format

        net = teacher.net
        self.sharded = config.run.shard and distributed.size() > 1
        if not self.sharded:
            net = net.to(self.device)
            if images:
                net = net.to(memory_format=self._layout)  # type: ignore[call-overload]
        self.guidance = settings.guidance
        if self.guidance != 1.0:
            null_labels(net, torch.zeros(0, dtype=torch.int64))
        if config.run.checkpoint_activations:
            recompute(net)
        trained = copy.deepcopy(net).train().requires_grad_(True)
        if settings.dropout is not None:
            for module in trained.modules():
                if isinstance(module, nn.Dropout):
                    module.p = settings.dropout
        self.fake = copy.deepcopy(trained)
        if settings.fake_start == "fresh":
            self.fake.load_state_dict(_untrained(described, seed))
        self.gan = settings.gan if settings.gan.weight_fake else None
        if self.gan is not None and not self.objective.needs_fake:
            raise UserError(f"distill.gan judges by the fake model, and {self.objective.name} has none")
        self._divergence = None if settings.divergence == "reverse-kl" else settings.divergence
        if self._divergence is not None and self.objective.flows != "x":
            raise UserError(
                f"distill.divergence {self._divergence} needs an objective whose gradient flows through the samples "
                f"alone, such as dmd, not {self.objective.name}"
            )
        # The fake model with the discriminator's head, where there is one.
        self.judged = self.fake if self.gan is None else Judged(self.fake, dataset.shape, seed)
        sampling = (settings.t_start, self.path, self._predict, settings.times)
        self.generator = Generator(trained, *sampling)
        if settings.start:
            student = student_of(settings.start, settings.start_decay, described, self.generator.t_start)
            self.generator.net.load_state_dict(student.state_dict())
        if self.sharded:
            sharding.shard(self.fake, self.device)
            # A generator keeps its own tables on the device that its network was on when the generator was built.
            self.generator = Generator(sharding.shard(self.generator.net, self.device), *sampling)
        self.teacher = self._frozen_teacher(net, config) if teacher.function is None else teacher.function
        generator, fake = settings.generator, settings.fake
        self.generator_optimiser = Optimiser(
            self.generator.net,
            **vars(generator),
            ema_decays=settings.ema,
            total=self.updates,
            ema_warmup=not settings.start if settings.ema_warmup is None else settings.ema_warmup,
        )
        self.fake_optimiser = Optimiser(self.judged, **vars(fake), total=self.updates * max(self.turns, 1))
        for optimiser in self.optimisers.values():
            distributed.average(optimiser, self.parts, self.sharded)
        # Views come after the optimisers, which may move the parameters into one buffer.
        self.frozen_fake: Any = sharding.frozen(self.fake) if self.sharded else frozen_view(self.judged)
        average = self.generator_optimiser.ema.get(settings.export)
        exported, self._exporting = sharding.exported(self.generator.net, average, self.sharded)
        self.student = Generator(exported, *sampling)

        self.draws = torch.Generator(self.device).manual_seed(distributed.seed(2 * seed + 1))
        self.takes_real = self.objective.needs_real or self.gan is not None
        self._labels_of_batch = settings.labels == "batch"
        needs_batches = self.takes_real or self._labels_of_batch
        self.batches = Batches(dataset, self.batch, 2 * seed, self.device, self.draws) if needs_batches else None
        self._ahead: deque[tuple[Tensor, Tensor | None, Tensor | None]] = deque()
        self.labels = labels_to_draw(net, dataset, self.device)
        self.endpoints = endpoints_to_draw(net, self.path, dataset, self.device)
        if self._labels_of_batch and self.labels is not None and self.endpoints is not None:
            raise UserError("distill.labels batch is for generators without an endpoint, which goes with the label")
        self._on_path = not isinstance(self.path, OneSidedPath)
        self.noise = NoiseStream(distributed.seed(seed), self.device)
        self._like = self._laid_out(torch.empty(self.batch, *dataset.shape, device=self.device))
        self._rows_made = self.turns * self.parts * self.batch
        self._like_cycle = self._laid_out(torch.empty(self._rows_made, *dataset.shape, device=self.device))
        # The input of a fake turn: generated rows and, below them, real ones, with their labels and endpoints.
        self._n_real = self.batch if self.takes_real else 0
        rows = self.batch + self._n_real
        self._rows = self._laid_out(torch.empty(rows, *dataset.shape, device=self.device))
        self._row_labels = None if self.labels is None else self.labels.new_zeros(rows)
        self._row_ends = None if self.endpoints is None else torch.empty_like(self._rows)
        # Rows that enter the fake loss. Real rows that serve the discriminator alone do not.
        self._own_rows = rows if self.objective.needs_real else self.batch
        self._signs = torch.ones(rows, device=self.device)
        self._signs[self.batch :] = -1
        # Labels from the batches read ahead, for the samples of all fake turns and of the generator turn.
        given = self.labels if self._labels_of_batch else None
        self._given_cycle = None if given is None else given.new_zeros(self._rows_made)
        self._given_turn = None if given is None else given.new_zeros(self.batch)
        self._seed_scale = precision.seed_scale(self.batch) if settings.generator_precision == "fp16" else 1.0
        self.tripwires = Tripwires(dataset, self.batch, self.device)
        names = ["generator loss", "generator gradient", "gap", *Tripwires.names]
        if self.turns:
            names = ["fake loss", names[0], "fake gradient", *names[1:]]
        if self.gan is not None:
            names += ["discriminator loss", "adversarial loss"]
        self.meters = Meters(names, self.device)
        self.phases = Phases(config.run.timings, self.device)
        compiled: Callable[[Any], Callable[..., Any]] = modes.compiled if modes.compiles(self.mode) else lambda net: net
        self._run_generator, self._run_fake = compiled(self.generator), compiled(self.judged)
        self._run_teacher, self._run_frozen_fake = compiled(self.teacher), compiled(self.frozen_fake)
        self._generate: Turn = self._generate_rows
        self._fake_step: Turn = self._fake_step_plain
        self._generator_step: Turn = self._generator_step_plain
        if modes.captures(self.mode):
            self.capture()
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
            times=self.generator.times,
            teacher=settings.teacher,
            decay=settings.export,
        )

    @property
    def network(self) -> nn.Module:
        """The network in training, for its shape and classes."""
        return self.generator.net

    @property
    def images_per_update(self) -> int:
        """Training samples, generated or real, that one update's losses are evaluated on."""
        rows = 2 if self.takes_real else 1
        return self.parts * self.batch * (self.turns * rows + 1)

    @property
    def rows(self) -> int:
        """Most forward passes per sample of the batch whose activations one turn holds at once."""
        return max(2 if self.takes_real else 1, 3 if self.objective.flows == "all" else 1)

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        return {"fake": self.fake_optimiser, "generator": self.generator_optimiser}

    def update(self) -> None:
        """One update: all fake turns, then the generator's."""
        if self._labels_of_batch:
            self._read_ahead()
        made = self._run("generate", self._generate) if self.turns else {}
        for i in range(self.turns * self.parts):
            rows = slice(i * self.batch, (i + 1) * self.batch)
            turn = {name: values[rows] for name, values in made.items()}
            self._whole = (i + 1) % self.parts == 0
            self.fake_turn(turn["x"], turn.get("labels"), turn.get("endpoint"))
        for i in range(self.parts):
            self._whole = i + 1 == self.parts
            if self._labels_of_batch:
                _, labels, _ = self._ahead.popleft()
                if self._given_turn is not None and labels is not None:
                    self._given_turn.copy_(labels)
            self.generator_turn()
        self.step += 1

    def _read_ahead(self) -> None:
        """Read a batch for every turn of an update. The generator turn uses its batch's labels, not its images."""
        assert self.batches is not None
        with self.phases("data"):
            for _ in range((self.turns + 1) * self.parts):
                self._ahead.append((*self.batches.next(), self.batches.endpoints()))
            labels = [labels for _, labels, _ in self._ahead if labels is not None]
            if self._given_cycle is not None:
                self._given_cycle.copy_(torch.cat(labels)[: self._rows_made])

    def fake_turn(self, generated: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None) -> None:
        """One step of the fake model on generated rows ``(B, ...)`` and, if the loss needs them, as many real ones.

        ``endpoint`` holds the generated rows' endpoints, on a two-sided path or for networks that take them.
        """
        with self.phases("data"):
            halves: list[tuple[Tensor | None, ...]] = [(generated, labels, endpoint)]
            if self.batches is not None:
                real = self._ahead.popleft() if self._ahead else (*self.batches.next(), self.batches.endpoints())
                if self._n_real:
                    halves.append(real)
            for i, half in enumerate(halves):
                place = slice(i * self.batch, (i + 1) * self.batch)
                for rows, values in zip((self._rows, self._row_labels, self._row_ends), half, strict=True):
                    if rows is not None and values is not None:
                        rows[place].copy_(values)
        self._add(self._run("fake turn", self._fake_step))

    def generator_turn(self) -> None:
        """One step of the generator; teacher and fake model are frozen."""
        self._add(self._run("generator turn", self._generator_step))

    def _generate_rows(self) -> dict[str, Tensor]:
        """Samples, and their labels, for all fake turns of an update."""
        with self.phases("generate"), torch.no_grad(), self._fake_precision.turn():
            y, ends = self._draw_conditions(self._rows_made, self._given_cycle)
            z = normal(self.noise.next_key(), self._like_cycle)
            with self._fake_precision.networks():
                x = self._run_generator(z, y, ends, self._draw_steps(len(z)))
            made = {"x": self._float(x), "labels": y, "endpoint": ends}
            return {name: rows for name, rows in made.items() if rows is not None}

    def _fake_step_plain(self) -> dict[str, Tensor]:
        """The fake turn on :attr:`_rows`."""
        x, y, ends = self._rows, self._row_labels, self._row_ends
        on_path = ends if self._on_path else None
        with self._fake_precision.turn():
            with self.phases("interpolate"):
                t, coef = self._draw_times()
                if self._n_real:
                    t, coef = t.repeat(2), coef.repeat(2, 1)
                key = self.noise.next_key()
                x_t = rf.interpolate(x, coef, key, on_path, noise_rows=self.batch)
                seen = self._seen(t, x_t, y, ends)
            with self.phases("fake forward"), self._fake_precision.networks():
                out, logits = self._ask_fake(self._run_fake, seen)
            own = slice(self._own_rows)
            teacher_out = uncond = None
            if self.objective.needs_teacher:
                with self.phases("teacher forward"), torch.no_grad(), self._fake_precision.networks():
                    teacher_out, uncond = self._ask_teacher(_rows_of(own, *seen))
            with self.phases("fake loss"):
                at = x_t if self._reads_x_t else None
                out_own, x, at, coef_own, on_path = _rows_of(own, out.detach(), x, at, coef, on_path)
                n_real = self._own_rows - self.batch
                grads = rf.fake_grads(
                    self.objective, fake_out=out_own, x=x, x_t=at, coef=coef_own, noise=key, n_real=n_real,
                    teacher_out=teacher_out, endpoint=on_path, noise_rows=self.batch, teacher_uncond=uncond,
                    guidance=self.guidance if uncond is not None else 1.0,
                )  # fmt: skip
                watched, seeds = {"fake loss": grads.loss}, [grads.fake_out]
                outs = [out if self._own_rows == len(out) else out[own]]
                if self.gan is not None and logits is not None:
                    loss, seed = softplus_term(logits, self._signs, coef, self.gan.least_share, self.batch)
                    watched["discriminator loss"] = loss
                    outs, seeds = [*outs, logits], [*seeds, self.gan.weight_fake * seed]
            with self.phases("fake backward"):
                torch.autograd.backward(outs, seeds)
        return {**watched, **self._advance("fake")}

    def _generator_step_plain(self) -> dict[str, Tensor]:
        loss, watched = self.generator_backward()
        return {"generator loss": loss, **watched, **self._advance("generator")}

    def _advance(self, name: str) -> dict[str, Tensor]:
        """Step the optimiser once the last part of a batch has added its gradients; the gradient's norm then."""
        if not self._whole:
            return {}
        with self.phases(f"{name} optimiser"):
            self.optimisers[name].step()
            self.optimisers[name].zero_grad()
        return {f"{name} gradient": self.optimisers[name].norm}

    def generator_backward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the generator loss' gradient to the generator's parameters; the loss ``()``, the gap and the tripwires.

        With ``g = dl/dx_t`` through both networks and ``x_t = a x + c n``, the generator's backward starts from
        ``dl/dx = a g + (dl/dx through the target)``. In fp16 every gradient up to the parameters' carries a power of
        two, which enters as the loss' weight and is divided out in float32. The gap is ``||F - F*|| / ||F*||`` of the
        networks' outputs over the batch; one over the gap is the factor by which their rounding is amplified.
        """
        with self._generator_precision.turn():
            with self.phases("generator forward"):
                y, ends = self._draw_conditions(self.batch, self._given_turn)
                on_path = ends if self._on_path else None
                z = normal(self.noise.next_key(), self._like)
                with self._generator_precision.networks():
                    x = self._run_generator(z, y, ends, self._draw_steps(len(z)))
                x = self._float(x)
            with self.phases("interpolate"):
                t, coef = self._draw_times()
                if self._seed_scale != 1.0:
                    coef[:, WEIGHT] *= self._seed_scale
                key = self.noise.next_key()
                x_t = rf.interpolate(x.detach(), coef, key, on_path).requires_grad_()
            # If the gradient flows through x alone, neither teacher nor fake model needs a backward pass.
            backward = self.objective.flows == "all"
            adversarial = self.gan is not None and self.gan.weight_generator > 0
            with self.phases("frozen forward"), self._generator_precision.networks():
                logits = None
                with torch.set_grad_enabled(backward or adversarial):
                    seen = self._seen(t, x_t, y, ends)
                    at = x_t.detach() if self._reads_x_t else None
                    if self.turns:
                        fake_out, logits = self._ask_fake(self._run_frozen_fake, seen)
                    else:
                        fake_out = rf.sample_output(x, at, coef)
                with torch.set_grad_enabled(backward):
                    teacher_out, uncond = self._ask_teacher(seen)
                if backward and not teacher_out.requires_grad:
                    raise UserError(
                        f"the teacher gives no gradient in x_t, which {self.objective.name} needs: use an objective "
                        "that flows through the samples alone, such as dmd, or a teacher that autograd goes through"
                    )
            with self.phases("generator loss"), torch.no_grad():
                weighed = coef
                if self._divergence is not None and logits is not None:
                    weighed = coef.clone()
                    weighed[:, WEIGHT] *= divergence_weight(self._divergence, logits.mean(1))
                grads = rf.generator_grads(
                    self.objective, teacher_out=teacher_out.detach(), fake_out=fake_out.detach(), x=x.detach(), x_t=at,
                    coef=weighed, noise=key, endpoint=on_path, guidance=self.guidance,
                    teacher_uncond=None if uncond is None else uncond.detach(),
                )  # fmt: skip
                asked = teacher_out if uncond is None else torch.lerp(uncond, teacher_out, self.guidance)
                gap = torch.linalg.vector_norm(fake_out - asked) / torch.linalg.vector_norm(asked)
                wires = self.tripwires(asked.detach(), fake_out.detach(), x.detach(), at, coef, key, on_path)
                watched = {"gap": gap, Tripwires.names[0]: wires}
            g_x, outs, seeds = grads.x, [], []
            if grads.teacher_out is not None:
                outs, seeds = [teacher_out, fake_out], [grads.teacher_out, grads.fake_out]
                if uncond is not None:
                    outs, seeds = [*outs, uncond], [*seeds, grads.teacher_uncond]
            if self.gan is not None and logits is not None:
                # The signs of real rows: the generator wants its rows to be judged real.
                loss, seed = softplus_term(logits, self._signs[-self.batch :], coef, self.gan.least_share, self.batch)
                watched["adversarial loss"] = loss
                if adversarial:
                    outs, seeds = [*outs, logits], [*seeds, self.gan.weight_generator * self._seed_scale * seed]
            if outs:
                with self.phases("frozen backward"):
                    (g_x_t,) = torch.autograd.grad(outs, x_t, seeds)
                    if grads.x_t is not None:
                        g_x_t = g_x_t + grads.x_t
                    g_x = torch.addcmul(g_x, coef[:, 0].view(-1, *[1] * (x.dim() - 1)), g_x_t)
            with self.phases("generator backward"):
                x.backward(g_x)
                if self._seed_scale == 1.0:
                    return grads.loss, watched
                if self._whole:
                    self.generator_optimiser.scale_grads(1 / self._seed_scale)
                return grads.loss / self._seed_scale, watched

    def concern(self, row: Mapping[str, float]) -> str | None:
        """A sentence about a setting that a row of the log shows to be wrong; None if it shows none."""
        coarsest = max(("generator", "teacher"), key=lambda turn: self._precisions[turn].gradient_error(row["gap"]))
        error = self._precisions[coarsest].gradient_error(row["gap"])
        if not error > precision.TOO_COARSE:
            return None
        return (
            f"distill.{coarsest}_precision {self._precisions[coarsest].name} is too coarse: fake model and teacher "
            f"differ by {row['gap']:.2%}, so that rounding puts the generator's gradient about {min(error, 1.0):.0%} "
            "off; use a finer one"
        )

    def capture(self, recorder: Recorder | None = None) -> None:
        """Run the turns as CUDA graphs from now on, whatever the mode was; ``recorder`` replaces CUDA's."""
        recorder = recorder or CudaRecorder(self.device, [self.draws])
        self._generate = Captured(self._generate_rows, recorder)
        # Fake turns run several times an update. Count their warm-up in updates too, so that all three turns are
        # captured in the same update, in the order in which they run.
        self._fake_step = Captured(self._fake_step_plain, recorder, modes.WARM_UP * max(self.turns, 1))
        self._generator_step = Captured(self._generator_step_plain, recorder)

    def forget_graphs(self) -> None:
        """Drop the captured graphs. A turn that is called afterwards warms up and is captured again."""
        for turn in (self._generate, self._fake_step, self._generator_step):
            if isinstance(turn, Captured):
                turn.reset()

    def sample(self, z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None) -> Tensor:
        """Samples of the student that would be exported now, from noise ``z`` and, if it takes them, endpoints."""
        with torch.no_grad(), self._exporting(), Precision("float32", self.device).turn():
            return self.student(z, labels, None if self.endpoints is None else endpoint)

    def exported(self) -> tuple[dict[str, Tensor], Description]:
        """The student's weights, which the run saves at its end, and their description."""
        with self._exporting():
            return sharding.whole(self.student.net.state_dict()), self.description

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
            "head": self.judged.head.state_dict() if isinstance(self.judged, Judged) else None,
            "meters": self.meters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, in place: the frozen views stay on the same memory."""
        self.step = int(state["step"])
        self.generator.net.load_state_dict(state["generator"])
        self.fake.load_state_dict(state["fake"])
        if isinstance(self.judged, Judged):
            self.judged.head.load_state_dict(state["head"])
        self.generator_optimiser.load_state_dict(state["generator_optimiser"])
        self.fake_optimiser.load_state_dict(state["fake_optimiser"])
        self.noise.load_state_dict(state["noise"])
        self.draws.set_state(state["draws"])
        if self.batches is not None:
            self.batches.load_state_dict(state["batches"])
        self.forget_graphs()
        self.meters.load_state_dict(state["meters"])

    def _draw_conditions(self, count: int, given: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Labels and endpoints of ``count`` training samples picked at random, in the data's proportions.

        Labels that are ``given`` are taken as they are.
        """
        if given is not None:
            return given, None
        return picked(self.labels, self.endpoints, count, self.draws, self._layout)

    def _draw_steps(self, count: int) -> Tensor | None:
        """The step of the generator that each of ``count`` rows comes from; None for a one-step generator."""
        if self.generator.steps == 1:
            return None
        return torch.randint(self.generator.steps, (count,), generator=self.draws, device=self.device)

    def _draw_times(self) -> tuple[Tensor, Tensor]:
        """Path times ``(B,)`` and coefficient rows ``(B, 9)``."""
        t = self.path.sample_time(self.batch, self.draws, self.device)
        return t, self.interpolant.coefficients(t)

    def _seen(
        self, t: Tensor, x_t: Tensor, labels: Tensor | None, endpoint: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The arguments that teacher and fake model are called with at ``x_t``."""
        time, x = self.path.network_time(t, self._predict), self.path.network_input(x_t, t, self._predict)
        return arguments(self.fake, time, x, labels, endpoint)

    def _ask_fake(self, run: Callable[..., Any], seen: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """The fake model's output, and the logits ``(R, n)`` of its discriminator's head; None without a head."""
        if self.gan is None:
            return self._float(run(*seen)), None
        out, logits = run(*seen)
        return self._float(out), logits.float()

    def _ask_teacher(self, seen: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """The teacher's output and, with guidance, the one without labels, from one forward."""
        guided = self.guidance != 1.0
        # A teacher stored in float32 computes in the precision of the turn.
        rounded = self._teacher_precision.name != "float32"
        with self._teacher_precision.networks() if rounded else contextlib.nullcontext():
            out = self._float(self._run_teacher(*(both(self.teacher, seen) if guided else seen)))
        if not guided:
            return out, None
        conditional, unconditional = out.chunk(2)
        return conditional, unconditional

    def _frozen_teacher(self, net: nn.Module, config: Config) -> nn.Module:
        """The frozen teacher. It shares the memory of ``net``, unless it is rounded, sharded or offloaded."""
        offload = config.run.offload_teacher
        if self._teacher_precision.name == "float32" and not (self.sharded or offload):
            return frozen_view(net).eval()
        net = copy.deepcopy(net).requires_grad_(False).eval()
        if self._teacher_precision.name == "bf16":
            precision.round_weights(net)
        return sharding.shard(net, self.device, offload) if self.sharded or offload else net

    def _check_device(self) -> None:
        """Refuse a mode or a precision that does not run on the device."""
        asked = (
            ("run.mode", self.mode, modes.why_not(self.mode, self.device)),
            *(
                (f"distill.{turn}_precision", chosen.name, precision.why_not(chosen.name, self.device))
                for turn, chosen in self._precisions.items()
            ),
        )
        for key, value, reason in asked:
            if reason is not None:
                raise UserError(f"{key} {value} does not run on {self.device}: {reason}")

    def _run(self, name: str, turn: Turn) -> dict[str, Tensor]:
        if isinstance(turn, Captured) and turn.captured:
            # A replay enters none of the phases inside the turn, so the whole turn is one phase.
            with self.phases(name):
                return turn()
        return turn()

    def _add(self, results: Mapping[str, Tensor]) -> None:
        for name, value in results.items():
            self.meters.add(name, value)

    def _float(self, tensor: Tensor) -> Tensor:
        # Losses are computed in float32. Under autocast a network returns a shorter type.
        return self._laid_out(tensor.float())

    def _laid_out(self, tensor: Tensor) -> Tensor:
        # The fused calls want one layout; a tensor that has it already is passed on as it is.
        return tensor.contiguous(memory_format=self._layout)


def _rows_of(own: slice, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The rows ``own`` of each tensor; None stays None."""
    return tuple(None if tensor is None else tensor[own] for tensor in tensors)


def _untrained(described: Description, seed: int) -> dict[str, Tensor]:
    """The parameters of a network like the teacher's before training."""
    if not described.network:
        raise UserError("distill.fake_start fresh needs a teacher that says which network it is")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(described.network).state_dict()
