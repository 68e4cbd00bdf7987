"""Teacher training: the universal matching loss on batches of data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as rf
from ..couplings import couple
from ..data import Dataset
from ..errors import UserError
from ..networks import build
from ..networks.recompute import recompute
from ..noise import NoiseStream, normal
from ..optim import Optimiser
from ..paths import COLUMNS, OneSidedPath
from ..precision import Precision
from ..sampling import call, follows_flow, integrate
from ..teachers import Description
from . import distributed, sharding
from .batches import Batches, endpoints_to_draw, labels_to_draw
from .meters import Meters
from .phases import Phases
from .settings import Config

WEIGHT = COLUMNS.index("w")
SAMPLING_STEPS = 20  # Euler steps of the samples and distances a run shows while it trains


class TeacherTrainer:
    """Trains a fresh network on the path's conditional target, ``w ||f - tgt||^2``; one batch an update.

    With ``reduction`` ``mean`` the loss is the mean over a sample's elements in place of the sum.

    Raises:
        UserError: no samples can be drawn from the network's prediction on this path, or the path cannot convert the
            prediction into the match space.
    """

    def __init__(self, config: Config, dataset: Dataset, command: str = "") -> None:
        settings, seed = config.teacher, config.run.seed
        self.interpolant = config.teachers_path().build()
        self.path, self._predict = self.interpolant.path, self.interpolant.predict
        follows_flow(self.path, self._predict)
        self._reads_x_t = self.path.reads_x_t(self.interpolant.match, self._predict)
        self.device = torch.device(config.run.device)
        self._precision = Precision("float32", self.device)
        self.parts = config.run.accumulate
        self.batch = distributed.share(settings.batch, self.parts, "teacher.batch")
        self.updates, self.step = settings.updates, 0
        images = len(dataset.shape) == 3
        self._layout = torch.channels_last if images and config.run.channels_last else torch.contiguous_format
        network = network_for(config, dataset)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            net = build(network)
        if config.run.checkpoint_activations:
            recompute(net)
        self.sharded = config.run.shard and distributed.size() > 1
        if self.sharded:
            sharding.shard(net, self.device)
        else:
            net = net.to(self.device)
            if images:
                net = net.to(memory_format=self._layout)  # type: ignore[call-overload]
        self.net = net.train()
        self._label_dropout = settings.label_dropout
        if settings.label_dropout and getattr(net, "null_label", None) is None:
            raise UserError("teacher.label_dropout needs a class-conditional network with null_label: true")
        self.optimiser = Optimiser(
            self.net,
            **vars(settings.optimiser),
            ema_decays=settings.ema,
            total=self.updates,
            ema_warmup=settings.ema_warmup,
        )
        self._scale = 1 / math.prod(dataset.shape) if settings.reduction == "mean" else 1.0
        distributed.average(self.optimiser, self.parts, self.sharded)
        self.averaged, self._exporting = sharding.exported(net, self.optimiser.ema.get(settings.export), self.sharded)
        self.labels = labels_to_draw(self.net, dataset, self.device)
        # Called to refuse data without endpoints. The endpoints themselves come with each batch.
        self._endpoint = endpoints_to_draw(self.net, self.path, dataset, torch.device("cpu")) is not None
        self._two_sided = not isinstance(self.path, OneSidedPath)
        self._coupled = settings.coupling
        if self._coupled and dataset.paired:
            raise UserError(f"teacher.coupling pairs what is drawn apart, data set '{dataset.name}' is one of pairs")
        if self._coupled and self._endpoint and not self._two_sided:
            raise UserError("teacher.coupling pairs a path's endpoints, this path has none for the network to see")
        self.draws = torch.Generator(self.device).manual_seed(distributed.seed(2 * seed + 1))
        self.batches = Batches(dataset, self.batch, 2 * seed, self.device, self.draws)
        self.noise = NoiseStream(distributed.seed(seed), self.device)
        self.meters = Meters(("loss", "gradient"), self.device)
        self.phases = Phases(config.run.timings, self.device)
        self.description = Description(
            network=network,
            path=self.interpolant.name,
            path_settings=self.interpolant.settings,
            predict=self._predict,
            data=dataset.config,
            preprocessing=dataset.preprocessing,
            command=command,
            decay=settings.export,
        )

    @property
    def network(self) -> nn.Module:
        """The network in training, for its shape and classes."""
        return self.net

    @property
    def images_per_update(self) -> int:
        return self.parts * self.batch

    @property
    def rows(self) -> int:
        return 1

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        return {"network": self.optimiser}

    def update(self) -> None:
        """One step on one batch."""
        with self._precision.turn():
            for _ in range(self.parts):
                self._backward()
        with self.phases("optimiser"):
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.meters.add("gradient", self.optimiser.norm)
        self.step += 1

    def _backward(self) -> None:
        """Add the gradients of one part of a batch."""
        with self.phases("data"):
            x, labels = self.batches.next()
            x = x.contiguous(memory_format=self._layout)
            ends = self.batches.endpoints() if self._endpoint else None
            ends = None if ends is None else ends.contiguous(memory_format=self._layout)
            on_path = ends if self._two_sided else None
            t = self.path.sample_time(self.batch, self.draws, self.device)
            coef = self.interpolant.coefficients(t)
            if self._scale != 1.0:
                coef[:, WEIGHT] *= self._scale
            noise = self.noise.next_key()
            if self._coupled:
                classes = None if self.labels is None else labels
                if on_path is None:
                    noise = self._coupled_with(x, normal(noise, x), classes)
                else:
                    on_path = ends = self._coupled_with(x, on_path, classes)
            x_t = rf.interpolate(x, coef, noise, on_path)
        with self.phases("forward"):
            y = self._dropped(labels)
            out = call(self.net, t, x_t, y, self.path, self._predict, ends).contiguous(memory_format=self._layout)
        with self.phases("loss"):
            grads = rf.matching_grads(
                out=out.detach(), x=x, x_t=x_t if self._reads_x_t else None, coef=coef, noise=noise, endpoint=on_path
            )
        with self.phases("backward"):
            out.backward(grads.out)
        self.meters.add("loss", grads.loss)

    def _coupled_with(self, x: Tensor, other: Tensor, classes: Tensor | None) -> Tensor:
        """Noise or endpoints ``other``, reordered so that row i is coupled with row i of ``x``.

        The assignment is solved on the host, so this is the one place of an update that waits for the device.
        """
        return other[couple(x, other, classes)].contiguous(memory_format=self._layout)

    def _dropped(self, labels: Tensor | None) -> Tensor | None:
        """The labels of a batch, some of them replaced by the null label."""
        if self.labels is None or labels is None or not self._label_dropout:
            return None if self.labels is None else labels
        gone = torch.rand(len(labels), generator=self.draws, device=self.device) < self._label_dropout
        return torch.where(gone, torch.full_like(labels, self.net.null_label), labels)  # type: ignore[arg-type]

    def concern(self, row: Mapping[str, float]) -> str | None:
        """None: no number of this trainer's log shows that a setting is wrong."""
        return None

    def sample(self, z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None) -> Tensor:
        """Samples of the exported network in Euler steps, for noise ``z`` and the endpoints if it has them."""
        endpoint = endpoint if self._endpoint else None
        with self._exporting(), self._precision.turn():
            return integrate(
                self.averaged, z, SAMPLING_STEPS, "euler", labels, None, self.path, self._predict, endpoint
            )

    def exported(self) -> tuple[dict[str, Tensor], Description]:
        """The weights that the run saves at its end, and their description."""
        with self._exporting():
            return sharding.whole(self.averaged.state_dict()), self.description

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "step": self.step,
            "network": self.net.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "noise": self.noise.state_dict(),
            "draws": self.draws.get_state(),
            "batches": self.batches.state_dict(),
            "meters": self.meters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step = int(state["step"])
        self.net.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.noise.load_state_dict(state["noise"])
        self.draws.set_state(state["draws"])
        self.batches.load_state_dict(state["batches"])
        self.meters.load_state_dict(state["meters"])


def network_for(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The configured network, with the samples' shape and classes filled in where they are not given.

    Raises:
        UserError: the network's shape is not the samples', it wants labels that the data do not have, or it is given a
            number of classes without ``class_cond``.
    """
    network = dict(config.network)
    network.setdefault("kind", "unet" if len(dataset.shape) == 3 else "mlp")
    key = "shape" if network["kind"] == "mlp" else "dim"
    network.setdefault(key, list(dataset.shape))
    # A shape that is not a list is refused by the network itself, in its own words.
    if isinstance(network[key], (list, tuple)) and tuple(network[key]) != dataset.shape:
        raise UserError(f"network.{key} is {list(network[key])}, the data have samples of shape {list(dataset.shape)}")
    if network.get("class_cond"):
        if not dataset.classes:
            hint = ": the images must all lie in folders of classes" if dataset.name == "folder" else ""
            raise UserError(f"network.class_cond is true, but data set '{dataset.name}' has no labels{hint}")
        network.setdefault("num_classes", dataset.classes)
    elif network["kind"] == "unet" and "num_classes" in network:
        raise UserError(
            "network.num_classes is given without network.class_cond, so the network would see no labels: set "
            "network.class_cond=true, where the number of classes follows from the data, or leave num_classes out"
        )
    if config.teacher.label_dropout:
        network.setdefault("null_label", True)
    return network
