"""The base of all trainers: their random numbers, meters, phases, parts of a batch, and the state that a run saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import functional as rf
from ..data import Dataset
from ..errors import UserError
from ..interpolant import Interpolant
from ..matching import Matching
from ..meters import Meters
from ..models.conditions import picked
from ..models.files import Description
from ..networks.calling import like
from ..networks.compiling import sharing
from ..noise import NoiseStream
from ..optim import Optimiser, is_sharded
from ..optim.mean import average
from ..paths import OneSidedPath
from ..phases import Phases
from ..precision import Precision
from . import distributed, modes, sharding


@dataclass(frozen=True)
class Setup:
    """The settings that all trainers have in common.

    Attributes:
        batch: samples of a turn, over all ranks.
        updates: updates of the whole training, over which learning rates fall.
        parts: forward passes that a rank's share of a batch is made of, to save memory.
        seed: the seed of everything that is drawn.
        mode: how turns run, one of :data:`realuid_fast.train.modes.MODES`.
        channels_last: whether images have their channels last in memory.
        timings: whether the phases of an update are timed, which makes the host wait for a GPU.
        shared_draws: whether a real row has the time and the noise of its generated row, as published.
    """

    batch: int = 64
    updates: int = 1000
    parts: int = 1
    seed: int = 0
    mode: str = "eager"
    channels_last: bool = True
    timings: bool = False
    shared_draws: bool = True

    def rows(self) -> int:
        """Rows of one forward pass on this rank; raises :class:`UserError` if the batch does not divide."""
        return distributed.share(self.batch, self.parts)

    def layout(self, shape: Sequence[int]) -> torch.memory_format:
        """The memory layout of samples of ``shape``."""
        return torch.channels_last if self.channels_last and len(shape) == 3 else torch.contiguous_format


class Stateful(Protocol):
    """A part of a trainer that saves and restores its own state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Randomness:
    """The owner of everything random in a training: the noise, the times and labels, and torch's own generators.

    Every rank has its own numbers, which follow from one seed. Torch's default generators serve dropout.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self.noise = NoiseStream(distributed.seed(seed), device)
        self.draws = torch.Generator(device).manual_seed(distributed.seed(2 * seed + 1))

    def begin(self) -> None:
        """Seed torch's default generators for a training that begins."""
        torch.manual_seed(distributed.seed(self._seed))

    def common(self) -> dict[str, Tensor]:
        """The state of rank 0's noise, from which the noise of every rank follows."""
        return {"state": self._shifted(self.noise.state, -1)}

    def own(self) -> dict[str, Tensor]:
        """This rank's state, without the noise."""
        own = {"draws": self.draws.get_state(), "torch_rng": torch.get_rng_state()}
        if self._device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(self._device)
        return own

    def load(self, common: Mapping[str, Tensor], own: Mapping[str, Tensor] | None, step: int) -> None:
        """Continue from :meth:`common` and :meth:`own`; ``own`` is None if the saved run did not have this rank."""
        self.noise.load_state_dict({"state": self._shifted(common["state"], 1)})
        if own is None:
            # A new rank starts a stream that depends on the update, so that no restart draws the same numbers again.
            fresh = distributed.seed(2 * self._seed + 1 + (step << 32))
            self.draws.manual_seed(fresh)
            torch.manual_seed(fresh)
            return
        self.draws.set_state(own["draws"])
        torch.set_rng_state(own["torch_rng"])
        if self._device.type == "cuda" and "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"], self._device)

    @staticmethod
    def _shifted(state: Tensor, sign: int) -> Tensor:
        """A noise state of rank 0 as this rank's (1), or the reverse (-1); the host waits for nothing."""
        state = state.clone()
        state[0] = (state[0] + sign * distributed.seed(0)) & (2**63 - 1)
        return state


class Trainer(ABC):
    """Trains a network update by update; a subclass says what an update is.

    Nothing in an update reads a tensor on the host: losses stay on the device until :attr:`meters` are read. The one
    exception is ``teacher.coupling``, whose assignment the host solves.

    Args:
        net: the network in training, on its device. It may be sharded.
        matching: the problem that it is trained on.
        dataset: the data, for the samples' shape.
        setup: batch, updates, seed and the like.
        optimisers: the optimisers by the name of what they train.
        watched: the names of the log's numbers.
        export: the decay of the average that is evaluated and saved, 0 for the last weights.
        optimiser: the optimiser that keeps this average.
        description: the description of the exported network.

    Attributes:
        step: updates so far.
        student: a one-step generator on the exported network, in trainers that have one.
        kept: the parts of the trainer that have a state, by their names in a checkpoint.
    """

    def __init__(
        self,
        net: nn.Module,
        matching: Matching,
        dataset: Dataset,
        setup: Setup,
        optimisers: Mapping[str, Optimiser],
        watched: Sequence[str],
        export: float,
        optimiser: Optimiser,
        description: Description,
    ) -> None:
        self.network, self.matching, self.path, self.description = net, matching, matching.path, description
        self.device = next(net.parameters()).device
        self.sharded = sharding.is_sharded_net(net)
        self.batch, self.parts, self.updates, self.mode = setup.rows(), setup.parts, setup.updates, setup.mode
        self.shared_draws = setup.shared_draws
        self.step = 0
        self.optimisers = dict(optimisers)
        for each in self.optimisers.values():
            # FSDP2 averages the gradients of a sharded network over the ranks during the backward pass.
            sharded = any(map(is_sharded, each.adam.param_groups[0]["params"]))
            average(each, 1 if sharded else distributed.size(), self.parts)
        kept = optimiser.ema.get(export)
        if export and kept is None:
            raise UserError(f"export must be 0 or a decay of the optimiser's averages, got {export:g}")
        self._exported, self._exporting = sharding.exported(net, kept, self.sharded)
        self.random = Randomness(setup.seed, self.device)
        self.noise, self.draws = self.random.noise, self.random.draws
        self.meters = Meters(watched, self.device)
        self.phases = Phases(setup.timings, self.device)
        self._layout = setup.layout(dataset.shape)
        self._like = self._laid_out(torch.empty(self.batch, *dataset.shape, device=self.device))
        # Answered once on the host, and kept: a turn that is captured cannot ask it.
        self.path.reads_x_t(matching.match, matching.predict)
        self._on_path = not isinstance(self.path, OneSidedPath)
        self.labels: Tensor | None = None
        self.endpoints: Tensor | None = None
        self.kept: dict[str, Stateful] = {}

    student: Callable[..., Tensor]

    @property
    @abstractmethod
    def images_per_update(self) -> int:
        """Training samples, generated or real, that one update's losses are evaluated on, on this rank."""

    @property
    def passes(self) -> int:
        """Most forward passes per sample of the batch whose activations one turn holds at once."""
        return 1

    @abstractmethod
    def update(self) -> None:
        """One update of every network."""

    def sample(
        self, z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None, precision: str = "float32"
    ) -> Tensor:
        """Samples of the network that would be exported now, from noise ``z`` and, if it takes them, endpoints."""
        with self._exporting(), Precision(precision, self.device).sampling():
            return self.student(z, labels, None if self.endpoints is None else endpoint)

    def concern(self, row: Mapping[str, float]) -> str | None:
        """A sentence about a setting that a row of the log shows to be wrong; None if it shows none."""
        return None

    def forget_graphs(self) -> None:
        """Drop captured graphs, if the trainer has any. A turn that is called afterwards is captured again."""
        return

    def exported(self) -> tuple[dict[str, Tensor], Description]:
        """The weights that are saved at the end, and their description."""
        with self._exporting():
            return sharding.whole(self._exported.state_dict()), self.description.checked()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, for any number of ranks; all ranks must call."""
        own = {**self.random.own(), "meters": self.meters.state_dict()}
        return {**self._common_state(), "noise": self.random.common(), "ranks": distributed.gathered(own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in place from the state that any number of ranks saved; frozen views stay on the same memory.

        Raises:
            UserError: the state is of other networks, other data or another kind of trainer.
        """
        try:
            ranks, rank = state["ranks"], distributed.rank()
            common = sharding.taken(self._common_state(), {key: state[key] for key in ("step", *self.kept)})
            self.step = int(common["step"])
            for name, each in self.kept.items():
                each.load_state_dict(common[name])
            self.random.load(state["noise"], ranks[rank] if rank < len(ranks) else None, self.step)
            if len(ranks) == distributed.size():
                self.meters.load_state_dict(ranks[rank]["meters"])
            else:
                sums = torch.stack([each["meters"]["sums"] for each in ranks]).mean(0)
                self.meters.load_state_dict({**ranks[0]["meters"], "sums": sums})
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit the run: {str(error) or type(error).__name__}") from None
        self.forget_graphs()

    def _common_state(self) -> dict[str, Any]:
        """The state that all ranks have in common."""
        return {"step": self.step, **{name: each.state_dict() for name, each in self.kept.items()}}

    def _compiled(self, *nets: Any) -> tuple[Callable[..., Any], ...]:
        """``nets`` as the mode calls them. Those that are alike share their compiled code."""
        return sharing(nets, modes.compiled) if modes.compiles(self.mode) else nets

    def _conditions(self, count: int, given: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Labels that are ``given``, or labels and endpoints of ``count`` random samples, in the data's proportions."""
        return (
            (given, None) if given is not None else picked(self.labels, self.endpoints, count, self.draws, self._layout)
        )

    def _times(self, matching: Matching | None = None, halves: int = 1) -> tuple[Tensor, Tensor]:
        """Path times ``(halves B,)`` and coefficient rows ``(halves B, 9)``; by :attr:`matching` if none is given."""
        matching = matching or self.matching
        draws = [matching.path.sample_time(self.batch, self.draws, self.device)]
        if halves == 1 or self.shared_draws:
            t, coef = draws[0], matching.coefficients(draws[0])
            return (t, coef) if halves == 1 else (t.repeat(halves), coef.repeat(halves, 1))
        draws += [matching.path.sample_time(self.batch, self.draws, self.device) for _ in range(halves - 1)]
        return torch.cat(draws), matching.coefficients(torch.cat(draws))

    def _interpolant(
        self, x: Tensor, noise: Tensor, t: Tensor, coef: Tensor, endpoint: Tensor | None, n_real: int = 0
    ) -> Interpolant:
        """The batch ``x`` at its times; where draws are shared, row ``i`` has the noise of row ``i mod B``."""
        y, rows = endpoint if self._on_path else None, self.batch if self.shared_draws else len(x)
        x_t = rf.interpolate(x, coef, noise, y, noise_rows=rows)
        match, predict = self.matching.match, self.matching.predict
        return Interpolant(self.path, match, predict, x, x_t, t, coef, noise, rows, y, n_real)

    def _optimise(self, name: str, phase: str) -> Tensor:
        """One step of an optimiser; the norm of its gradient."""
        with self.phases(phase):
            self.optimisers[name].step()
            self.optimisers[name].zero_grad()
        return self.optimisers[name].norm

    def _float(self, tensor: Tensor) -> Tensor:
        # Losses are computed in float32. Under autocast a network returns a shorter type.
        return self._laid_out(like(tensor, self._like).float())

    def _laid_out(self, tensor: Tensor) -> Tensor:
        # The fused calls want one layout; a tensor that has it already is passed on as it is.
        return tensor.contiguous(memory_format=self._layout)
