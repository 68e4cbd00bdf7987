"""Distillation: turns of the fake model and of the one-step generator, their backward passes seeded explicitly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import descent, functional, losses, precision, tripwires
from ..agreement import check
from ..coefficients import Coefficients
from ..data import Dataset
from ..errors import UserError
from ..interpolant import Interpolant
from ..matching import Matching
from ..models.conditions import endpoints_to_draw, give, labels_to_draw
from ..models.few_steps import described
from ..models.files import Description
from ..models.frozen import frozen_view
from ..models.generator import Generator
from ..models.pairs import Pairs
from ..networks.calling import arguments, outputs
from ..networks.critic import Critic
from ..networks.discriminator import Gan, Judged, adversarial_term
from ..noise import normal
from ..objectives import Objective
from ..optim import Optimiser
from ..precision import Precision
from ..tripwires import MOST, Tripwires
from . import modes, sharding
from .batches import Batches
from .flows import through_networks
from .modes import Captured, CudaRecorder, Recorder, Turn
from .pairs import PairTerm
from .trainer import Setup, Stateful, Trainer

TURNS = ("fake", "generator", "teacher")  # where networks may compute in a precision of their own


class Distiller(Trainer):
    """Trains the fake model and the generator against a frozen teacher, update by update.

    An update is ``fake_turns`` steps of the fake model and one of the generator. The generator does not change before
    its own step, so its samples for all fake turns come from one forward without gradient.

    An update is three turns in the sense of :mod:`.modes`: making samples, one fake turn ``fake_turns`` times, and the
    generator's. Every turn reads and writes tensors at fixed addresses, so that it can be replayed as a graph. The mode
    changes no number beyond rounding, except that torch.compile draws dropout masks its own way. Real samples are
    copied to the device between turns.

    Args:
        teacher: the frozen teacher, called as ``teacher(t, x, labels)`` as the path and its prediction say.
        fake: the fake model, or a :class:`~realuid_fast.networks.discriminator.Judged` one; trained in place.
        generator: the generator, trained in place.
        matching: the path, the networks' prediction, the match space and the weight.
        objective: the loss of both turns, one of :data:`realuid_fast.objectives.PRESETS`.
        dataset: the real samples, their labels and endpoints.
        fake_optimiser, generator_optimiser: the optimisers of ``fake`` and of ``generator.net``.
        setup: batch, updates, seed and mode.
        fake_turns: steps of the fake model in an update.
        guidance: the scale of the teacher's classifier-free guidance; 1 for none.
        labels: ``"drawn"`` from the training set, or those of the real ``"batch"`` in the same row.
        gan: the weights of a discriminator's terms, for a judged fake model or a critic.
        critic, critic_optimiser: a discriminator that stands alone, trained in the fake turns, and its optimiser.
        pairs: stored pairs, whose regression is added to the generator's loss (DMD).
        turn_matching: ``matching`` with another sampler or another weight, for the turns ``"fake"`` and
            ``"generator"`` and for what ``"guidance"`` adds to the generator's gradient (decoupled DMD).
        divergence: the f-divergence that is descended, one of :data:`realuid_fast.objectives.DIVERGENCES`.
        precisions: the networks' arithmetic in the turns ``"fake"`` and ``"generator"``, one of
            :data:`realuid_fast.precision.PRECISIONS`, float32 by default; ``"teacher"``: ``"bf16"`` for a teacher whose
            weights are stored so.
        export: the decay of the generator's average that is sampled and saved, 0 for the last weights.
        description: the description of the exported student.

    Raises:
        UserError: arguments that do not go together.
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
        fake_turns: int = 5,
        guidance: float = 1.0,
        labels: str = "drawn",
        gan: Gan | None = None,
        critic: Critic | None = None,
        critic_optimiser: Optimiser | None = None,
        pairs: Pairs | None = None,
        turn_matching: Mapping[str, Matching] = MappingProxyType({}),
        divergence: str = "reverse-kl",
        precisions: Mapping[str, str] = MappingProxyType({}),
        export: float = 0.0,
        description: Description | None = None,
    ) -> None:
        self.turns = fake_turns * (objective.needs_fake or critic is not None)
        names = ["generator loss", "generator gradient", *tripwires.names(heldout=True)]
        if objective.needs_fake:
            names = ["fake loss", names[0], "fake gradient", *names[1:]]
        if gan is not None:
            names += ["discriminator loss", "adversarial loss"]
        names += ["regression loss"] * (pairs is not None)
        description = description or described(generator.net, matching, dataset, export, generator)
        optimisers = {"fake": fake_optimiser, "generator": generator_optimiser}
        if critic is not None and critic_optimiser is not None:
            optimisers["critic"], names = critic_optimiser, [*names, "critic gradient"]
        super().__init__(
            generator.net, matching, dataset, setup, optimisers, names, export, generator_optimiser, description
        )  # fmt: skip
        self.teacher, self.generator, self.objective = teacher, generator, objective
        self._descended = objective if objective.needs_fake else replace(objective, needs_fake=True)
        # The fake model with the discriminator's head, where there is one.
        self.judged, self.fake = fake, fake.net if isinstance(fake, Judged) else fake
        self.generator_optimiser, self.fake_optimiser = generator_optimiser, fake_optimiser
        self.guidance, self.gan, self.critic = guidance, gan, critic
        check(objective, fake, gan, critic, pairs, generator, divergence, guidance, matching, turn_matching)
        self.pairs = None if pairs is None else PairTerm(pairs, self._like, generator.net, 2 * setup.seed + 1)
        self._turn_matching = dict(turn_matching)
        self._divergence = None if divergence == "reverse-kl" else divergence
        self.precisions = {turn: Precision(precisions.get(turn, "float32"), self.device) for turn in TURNS}
        fp16 = self.precisions["generator"].name == "fp16"
        self._seed_scale = precision.seed_scale(self.batch) if fp16 else 1.0
        # Views come after the optimisers, which may move the parameters into one buffer.
        self.frozen_fake: Any = sharding.frozen(fake) if self.sharded else frozen_view(self.judged)
        self.student = generator.on(self._exported)
        self.takes_real = objective.needs_real or gan is not None
        self._labels_of_batch = labels == "batch" or generator.noised
        self.batches: Batches | None = None
        if self.takes_real or self._labels_of_batch:
            self.batches = Batches(dataset, self.batch, 2 * setup.seed, self.device, self.draws)
        self._ahead: deque[tuple[Tensor, Tensor | None, Tensor | None]] = deque()
        self.labels = labels_to_draw(self.fake, dataset, self.device)
        self.endpoints = endpoints_to_draw(self.fake, self.path, dataset, self.device)
        if self._labels_of_batch and self.labels is not None and self.endpoints is not None:
            raise UserError("labels batch is for generators without an endpoint, which goes with the label")
        self.tripwires = Tripwires(self.device, heldout=dataset.pixels("heldout", MOST), batch=self.batch)
        owners: dict[str, Stateful | None] = {"generator": generator.net, "fake": self.fake, "batches": self.batches}
        owners |= {"generator_optimiser": generator_optimiser, "fake_optimiser": fake_optimiser}
        owners["head"] = fake.head if isinstance(fake, Judged) else None
        owners |= {"critic": critic, "critic_optimiser": critic_optimiser}
        owners["pairs"] = None if self.pairs is None else self.pairs.batches
        self.kept = {name: owner for name, owner in owners.items() if owner is not None}
        self._make_buffers(dataset.shape)
        self._run_generator, self._run_fake = self._compiled(generator, self.judged)
        self._run_teacher, self._run_frozen_fake = self._compiled(teacher, self.frozen_fake)
        self._whole = True
        self._generate: Turn = self._generate_rows
        self._fake_step: Turn = self._fake_step_plain
        self._generator_step: Turn = self._generator_step_plain
        if modes.captures(self.mode):
            self.capture()

    def _make_buffers(self, shape: tuple[int, ...]) -> None:
        """Tensors at fixed addresses, through which the turns are given their samples and labels."""
        self._rows_made = self.turns * self.parts * self.batch
        self._like_cycle = self._laid_out(torch.empty(self._rows_made, *shape, device=self.device))
        # The input of a fake turn: generated rows and, below them, real ones, with their labels and endpoints.
        self._n_real = self.batch if self.takes_real else 0
        rows = self.batch + self._n_real
        self._rows = self._laid_out(torch.empty(rows, *shape, device=self.device))
        self._row_labels = None if self.labels is None else self.labels.new_zeros(rows)
        self._row_ends = None if self.endpoints is None else torch.empty_like(self._rows)
        self._signs = torch.ones(rows, device=self.device)
        self._signs[self.batch :] = -1
        # Labels and images from the batches read ahead, for the samples of all fake turns and of the generator turn.
        given = self.labels if self._labels_of_batch else None
        self._given_cycle = None if given is None else given.new_zeros(self._rows_made)
        self._given_turn = None if given is None else given.new_zeros(self.batch)
        self._data_cycle = torch.empty_like(self._like_cycle) if self.generator.noised else None
        self._data_turn = torch.empty_like(self._like) if self.generator.noised else None

    @property
    def images_per_update(self) -> int:
        return self.parts * self.batch * (self.turns * (1 + self.takes_real) + 1)

    @property
    def passes(self) -> int:
        return max(1 + self.takes_real, 3 if self.objective.flows == "all" else 1)

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
                give([self._ahead.popleft()], self._data_turn, self._given_turn)
            if self.pairs is not None:
                with self.phases("data"):
                    self.pairs.read()
            self.generator_turn()
        self.step += 1

    def _read_ahead(self) -> None:
        """Read a batch for every turn of an update. Samples take labels from it, and states that are noised images."""
        assert self.batches is not None
        with self.phases("data"):
            for _ in range((self.turns + 1) * self.parts):
                self._ahead.append((*self.batches.next(), self.batches.endpoints()))
            give(self._ahead, self._data_cycle, self._given_cycle)

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
        with self.phases("generate"), torch.no_grad(), self.precisions["fake"].turn():
            y, ends = self._conditions(self._rows_made, self._given_cycle)
            z = normal(self.noise.next_key(), self._like_cycle)
            with self.precisions["fake"].networks():
                step = self.generator.draw_steps(len(z), self.draws)
                x = self._run_generator(z, y, ends, step, self._data_cycle)
            made = {"x": self._float(x), "labels": y, "endpoint": ends}
            return {name: rows for name, rows in made.items() if rows is not None}

    def _fake_step_plain(self) -> dict[str, Tensor]:
        """The turn of the fake model and of a critic on :attr:`_rows`."""
        watched = self._fake_turn_plain() if self.objective.needs_fake else {}
        if self.critic is not None and self.gan is not None:
            with self.precisions["fake"].turn(), self.phases("critic"), self.precisions["fake"].networks():
                generated, real = self._rows.chunk(2)
                loss = self.critic.backward(generated, real, self.gan.weight_fake)
            watched |= {"discriminator loss": loss, **self._advance("critic")}
        return watched

    def _fake_turn_plain(self) -> dict[str, Tensor]:
        # Real rows pass the fake model for its own loss or for a head on it, and not for a critic.
        n_real = self._n_real if self.objective.needs_real or isinstance(self.judged, Judged) else 0
        given, networks = (self._rows, self._row_labels, self._row_ends), self.precisions["fake"].networks
        x, y, ends = (None if rows is None else rows[: self.batch + n_real] for rows in given)
        assert x is not None
        with self.precisions["fake"].turn():
            with self.phases("interpolate"):
                t, coef = self._times(self._turn_matching.get("fake"), 2 if n_real else 1)
                draw = self._interpolant(x, self.noise.next_key(), t, coef, ends, n_real)
                seen = self._seen(draw, y, ends)
            with self.phases("fake forward"), networks():
                out, logits = self._ask_fake(self._run_fake, seen)
            # Real rows that serve the discriminator alone do not enter the fake model's own loss.
            rows = slice(None) if self.objective.needs_real else slice(self.batch)
            # A slice of all rows would cost its backward pass a copy.
            own, own_out = (draw, out) if self.objective.needs_real else (draw.generated(), out[rows])
            teacher_out = uncond = None
            if self.objective.needs_teacher:
                asked = tuple(None if tensor is None else tensor[rows] for tensor in seen)
                with self.phases("teacher forward"), torch.no_grad(), networks():
                    teacher_out, uncond = self._ask_teacher(asked)
            with self.phases("fake loss"):
                grads = losses.fake_grads(
                    self.objective, own, own_out.detach(), teacher_out=teacher_out, teacher_uncond=uncond,
                    guidance=self.guidance if uncond is not None else 1.0,
                )  # fmt: skip
                watched, outs, seeds = {"fake loss": grads.loss}, [own_out], [grads.fake_out]
                if (gan := self.gan) is not None and logits is not None:
                    loss, seed = adversarial_term(logits, self._signs, coef, gan.least_share, self.batch, gan.loss)
                    watched["discriminator loss"] = loss
                    outs, seeds = [*outs, logits], [*seeds, gan.weight_fake * seed]
            with self.phases("fake backward"):
                torch.autograd.backward(outs, seeds)
        return {**watched, **self._advance("fake")}

    def _generator_step_plain(self) -> dict[str, Tensor]:
        loss, watched = self.generator_backward()
        return {"generator loss": loss, **watched, **self._advance("generator")}

    def _advance(self, name: str) -> dict[str, Tensor]:
        """Step the optimiser once the last part of a batch has added its gradients; the gradient's norm then."""
        return {f"{name} gradient": self._optimise(name, f"{name} optimiser")} if self._whole else {}

    def generator_backward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the generator loss' gradient to the generator's parameters; the loss ``()`` and the tripwires.

        With ``g = dl/dx_t`` through both networks and ``x_t = a x + c n``, the generator's backward starts from
        ``dl/dx = a g + (dl/dx through the target)``. In fp16 every gradient up to the parameters' carries a power of
        two, which enters as the loss' weight and is divided out in float32.
        """
        with self.precisions["generator"].turn():
            with self.phases("generator forward"):
                y, ends = self._conditions(self.batch, self._given_turn)
                z = normal(self.noise.next_key(), self._like)
                with self.precisions["generator"].networks():
                    step = self.generator.draw_steps(len(z), self.draws)
                    x = self._run_generator(z, y, ends, step, self._data_turn)
                x = self._float(x)
            with self.phases("interpolate"):
                t, coef = self._times(self._turn_matching.get("generator"))
                if self._seed_scale != 1.0:
                    Coefficients(coef).w.mul_(self._seed_scale)
                draw = self._interpolant(x.detach(), self.noise.next_key(), t, coef, ends)
                x_t = draw.x_t.requires_grad_()
            fake_out, logits, teacher_out, uncond = self._ask_frozen(draw, x, y, ends)
            with self.phases("generator loss"), torch.no_grad():
                draw = replace(draw, x_t=x_t.detach())
                # Always with a fake prediction: without a fake model it is the sample's, or the unguided one.
                grads = descent.generator_grads(
                    self._descended, draw, teacher_out.detach(), fake_out.detach(), self._divergence, logits,
                    teacher_uncond=uncond, guidance=1.0 if uncond is None else self.guidance,
                )  # fmt: skip
                asked = teacher_out if uncond is None else torch.lerp(uncond, teacher_out, self.guidance)
                watched = {self.tripwires.names[0]: self.tripwires.sums(draw, asked.detach(), fake_out.detach())}
            judged = None
            if (gan := self.gan) is not None and logits is not None:
                # The signs of real rows: the generator wants its rows to be judged real.
                signs = self._signs[-self.batch :]
                loss, seed = adversarial_term(logits, signs, coef, gan.least_share, self.batch, gan.loss, True)
                watched["adversarial loss"] = loss
                if gan.weight_generator > 0:
                    judged = gan.weight_generator * self._seed_scale * seed
            with self.phases("frozen backward"):
                g_x = through_networks(grads, draw, x_t, (teacher_out, fake_out, uncond, logits), judged)
            if gan is not None and self.critic is not None:
                with self.phases("critic"), self.precisions["generator"].networks():
                    watched["adversarial loss"], pull = self.critic.pull(x)
                g_x = g_x + gan.weight_generator * self._seed_scale * pull
            if "guidance" in self._turn_matching:
                g_x = g_x + self._guidance_term(x.detach(), y, ends)
            with self.phases("generator backward"):
                outs, seeds = [x], [g_x]
                if self.pairs is not None:
                    networks = self.precisions["generator"].networks
                    loss, *more = self.pairs.grads(self._run_generator, networks, self._seed_scale)
                    watched["regression loss"], outs, seeds = loss, [x, more[0]], [g_x, more[1]]
                torch.autograd.backward(outs, seeds)
                if self._whole and self._seed_scale != 1.0:
                    self.generator_optimiser.scale_grads(1 / self._seed_scale)
            return grads.loss if self._seed_scale == 1.0 else grads.loss / self._seed_scale, watched

    def _guidance_term(self, x: Tensor, labels: Tensor | None, endpoint: Tensor | None) -> Tensor:
        """The part ``(s - 1) w (u - c)`` of the gradient in ``x``, for the scale ``s``, at times and noise of its own.

        ``c`` and ``u`` are the teacher's predictions with and without the labels.
        """
        with self.phases("interpolate"):
            t, coef = self._times(self._turn_matching["guidance"])
            Coefficients(coef).w.mul_((self.guidance - 1) * self._seed_scale)
            draw = self._interpolant(x, self.noise.next_key(), t, coef, endpoint)
        with self.phases("frozen forward"), torch.no_grad(), self.precisions["generator"].networks():
            conditional, uncond = self._ask_teacher(self._seen(draw, labels, endpoint))
        with self.phases("generator loss"), torch.no_grad():
            return losses.generator_grads(self._descended, draw, conditional, uncond).x

    def _ask_frozen(
        self, draw: Interpolant, x: Tensor, labels: Tensor | None, endpoint: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The frozen networks at ``x_t``: the fake model's output and logits, the teacher's output and unguided one."""
        # If the gradient flows through x alone, neither teacher nor fake model needs a backward pass.
        backward = self.objective.flows == "all"
        adversarial = self.critic is None and self.gan is not None and self.gan.weight_generator > 0
        with self.phases("frozen forward"), self.precisions["generator"].networks():
            logits = None
            with torch.set_grad_enabled(backward or adversarial):
                seen = self._seen(draw, labels, endpoint)
                if self.objective.needs_fake:
                    fake_out, logits = self._ask_fake(self._run_frozen_fake, seen)
                else:
                    fake_out = functional.sample_output(x, replace(draw, x_t=draw.x_t.detach()).read_x_t, draw.coef)
            with torch.set_grad_enabled(backward):
                teacher_out, uncond = self._ask_teacher(seen, guided="guidance" not in self._turn_matching)
            if backward and not teacher_out.requires_grad:
                raise UserError(
                    f"the teacher gives no gradient in x_t, which {self.objective.name} needs: use an objective "
                    "that flows through the samples alone, such as dmd, or a teacher that autograd goes through"
                )
        return fake_out, logits, teacher_out, uncond

    def concern(self, row: Mapping[str, float]) -> str | None:
        coarsest = max(("generator", "teacher"), key=lambda turn: self.precisions[turn].gradient_error(row["gap"]))
        concern = self.precisions[coarsest].concern(row["gap"])
        return None if concern is None else f"distill.{coarsest}_precision {concern}"

    def capture(self, recorder: Recorder | None = None) -> None:
        """Run the turns as CUDA graphs from now on, whatever the mode was; ``recorder`` replaces CUDA's."""
        recorder = recorder or CudaRecorder(self.device, [self.draws])
        self._generate = Captured(self._generate_rows, recorder)
        # The warm-up of fake turns counts updates too: all turns are captured in the same update, in their order.
        self._fake_step = Captured(self._fake_step_plain, recorder, modes.WARM_UP * max(self.turns, 1))
        self._generator_step = Captured(self._generator_step_plain, recorder)

    def forget_graphs(self) -> None:
        for turn in (self._generate, self._fake_step, self._generator_step):
            if isinstance(turn, Captured):
                turn.reset()

    def _seen(self, draw: Interpolant, labels: Tensor | None, endpoint: Tensor | None) -> tuple[Tensor | None, ...]:
        """The arguments that teacher and fake model are called with at ``x_t``."""
        return arguments(self.fake, draw.network_time, draw.network_input, labels, endpoint)

    def _ask_fake(self, run: Callable[..., Any], seen: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """The fake model's output, and the logits ``(R, n)`` of its discriminator's head; None without a head."""
        if not isinstance(self.judged, Judged):
            return self._float(run(*seen)), None
        out, logits = run(*seen)
        return self._float(out), logits.float()

    def _ask_teacher(self, seen: tuple[Tensor | None, ...], guided: bool = True) -> tuple[Tensor, Tensor | None]:
        """The teacher's output and, if it is ``guided`` with a scale, the one without labels, from one forward."""
        # A teacher stored in float32 computes in the precision of the turn.
        with self.precisions["teacher"].networks():
            out, uncond = outputs(self._run_teacher, self.teacher, seen, self.guidance if guided else 1.0)
        return self._float(out), None if uncond is None else self._float(uncond)

    def _run(self, name: str, turn: Turn) -> dict[str, Tensor]:
        if isinstance(turn, Captured) and turn.captured:
            # A replay enters none of the phases inside the turn, so the whole turn is one phase.
            with self.phases(name):
                return turn()
        return turn()

    def _add(self, results: Mapping[str, Tensor]) -> None:
        for name, value in results.items():
            self.meters.add(name, value)
