"""Teacher training: the universal matching loss on batches of data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import functional, losses
from ..coefficients import Coefficients
from ..couplings import couple
from ..data import Dataset
from ..errors import UserError
from ..functional import MatchingGrads
from ..interpolant import Interpolant
from ..matching import Matching
from ..models.calls import call, follows_flow
from ..models.conditions import endpoints_to_draw, labels_to_draw
from ..models.few_steps import described
from ..models.files import Description
from ..models.halving import Halving
from ..models.solvers import integrate
from ..networks.calling import takes_guidance
from ..noise import normal
from ..optim import Optimiser
from ..precision import Precision
from .batches import Batches
from .trainer import Setup, Trainer

SAMPLING_STEPS = 20  # Euler steps of the samples and distances a run shows while it trains


class TeacherTrainer(Trainer):
    """Trains a network on the path's conditional target, ``w ||f - tgt||^2``; one batch an update.

    Args:
        net: the network, trained in place.
        matching: the path, the network's prediction, the match space and the weight.
        dataset: the samples, their labels and endpoints.
        optimiser: the optimiser of ``net``.
        setup: batch, updates and seed.
        label_dropout: the share of labels that are replaced by the network's null label.
        reduction: ``"sum"`` over a sample's elements, or their ``"mean"``.
        coupling: whether optimal transport pairs each batch with its noise or its endpoints
            (:mod:`realuid_fast.couplings`).
        source: a frozen teacher with a null label. Its guided prediction ``f* = u + s (c - u)`` takes the place of the
            data's target, ``w ||f - f*||^2``, and each row has an ``s`` of its own, uniform in ``scales``, which the
            network takes. Source: Meng et al., On Distillation of Guided Diffusion Models (2210.03142), section 3.1.
        scales: the least and the largest scale.
        halving: times and targets of a network of half as many steps, in the place of the data's.
        export: the decay of the average that is sampled and saved, 0 for the last weights.
        description: the description of the exported network.

    Raises:
        UserError: no samples can be drawn from the network's prediction on this path, or arguments that do not go
            together.
    """

    def __init__(
        self,
        net: nn.Module,
        matching: Matching,
        dataset: Dataset,
        optimiser: Optimiser,
        setup: Setup,
        *,
        label_dropout: float = 0.0,
        reduction: str = "sum",
        coupling: bool = False,
        source: nn.Module | None = None,
        scales: tuple[float, float] = (1.0, 4.0),
        halving: Halving | None = None,
        export: float = 0.0,
        description: Description | None = None,
    ) -> None:
        description = description or described(net, matching, dataset, export)
        watched, optimisers = ("loss", "gradient"), {"network": optimiser}
        super().__init__(
            net.train(), matching, dataset, setup, optimisers, watched, export, optimiser, description
        )  # fmt: skip
        self.net, self.averaged, self.optimiser = net, self._exported, optimiser
        follows_flow(self.path, matching.predict)
        if label_dropout and getattr(net, "null_label", None) is None:
            raise UserError("label_dropout needs a class-conditional network with null_label: true")
        if source is not None and (getattr(source, "null_label", None) is None or not takes_guidance(net)):
            raise UserError("guided needs a class-conditional teacher with a null label, and a network of its kind")
        if source is not None and (label_dropout or scales[0] >= scales[1]):
            raise UserError("guided needs label_dropout 0 and scales of which the first is less than the second")
        if halving is not None and (source is not None or label_dropout or coupling):
            raise UserError("halved goes with neither guided nor label_dropout nor coupling")
        self._source, self._scales, self._halving = source, scales, halving
        self._label_dropout, self._precision = label_dropout, Precision("float32", self.device)
        self._scale = 1 / math.prod(dataset.shape) if reduction == "mean" else 1.0
        self.labels = labels_to_draw(net, dataset, self.device)
        # Called to refuse data without endpoints. The endpoints themselves come with each batch.
        self._endpoint = endpoints_to_draw(net, self.path, dataset, torch.device("cpu")) is not None
        self._coupled = coupling
        if coupling and dataset.paired:
            raise UserError(f"coupling pairs what is drawn apart, data set '{dataset.name}' is one of pairs")
        if coupling and self._endpoint and not self._on_path:
            raise UserError("coupling pairs a path's endpoints, this path has none for the network to see")
        self.batches = Batches(dataset, self.batch, 2 * setup.seed, self.device, self.draws)
        self.kept = {"network": net, "optimiser": optimiser, "batches": self.batches}

    @property
    def images_per_update(self) -> int:
        return self.parts * self.batch

    def update(self) -> None:
        """One step on one batch."""
        with self._precision.turn():
            for _ in range(self.parts):
                self._backward()
        self.meters.add("gradient", self._optimise("network", "optimiser"))
        self.step += 1

    def _backward(self) -> None:
        """Add the gradients of one part of a batch."""
        with self.phases("data"):
            x, labels = self.batches.next()
            x, ends = self._laid_out(x), self.batches.endpoints() if self._endpoint else None
            ends = None if ends is None else self._laid_out(ends)
            t, coef = self._times() if self._halving is None else self._halving.times(self.matching, len(x), self.draws)
            if self._scale != 1.0:
                Coefficients(coef).w.mul_(self._scale)
            noise = self.noise.next_key()
            if self._coupled:
                classes = None if self.labels is None else labels
                if ends is None:
                    noise = self._coupled_with(x, normal(noise, x), classes)
                else:
                    ends = self._coupled_with(x, ends, classes)
            draw = self._interpolant(x, noise, t, coef, ends)
        with self.phases("forward"):
            y, scale = self._dropped(labels), None
            if self._source is not None or (self._halving is not None and takes_guidance(self.net)):
                low, high = self._scales
                scale = low + (high - low) * torch.rand(len(x), generator=self.draws, device=self.device)
            given = 1.0 if scale is None else scale
            out = self._laid_out(call(self.net, t, draw.x_t, y, self.path, self.matching.predict, ends, given))
        with self.phases("loss"):
            found = out.detach()
            if self._source is None and self._halving is None:
                grads = losses.matching_grads(draw, found)
            else:
                grads = self._taught(draw, found, y, ends, given)
        with self.phases("backward"):
            out.backward(grads.out)
        self.meters.add("loss", grads.loss)

    def _taught(
        self, draw: Interpolant, out: Tensor, labels: Tensor | None, endpoint: Tensor | None, scale: float | Tensor
    ) -> MatchingGrads:
        """``w ||f - f*||^2``, which is ``w k_out^2 ||F - F*||^2`` in raw outputs."""
        with torch.no_grad():
            if self._halving is not None:
                target = self._halving.target(draw.t, draw.x_t, labels, scale)
            else:
                assert self._source is not None
                target = call(self._source, draw.t, draw.x_t, labels, self.path, self.matching.predict, endpoint, scale)
        given, coef = Coefficients(draw.coef), torch.zeros_like(draw.coef)
        rows = Coefficients(coef)
        # With these three set and all others 0 the matching loss has f = F and tgt = x.
        rows.p.fill_(1.0)
        rows.k_out.fill_(1.0)
        rows.w.copy_(given.w * given.k_out**2)
        return functional.matching_grads(out=out, x=self._laid_out(target), x_t=None, coef=coef, noise=draw.noise)

    def _coupled_with(self, x: Tensor, other: Tensor, classes: Tensor | None) -> Tensor:
        """Noise or endpoints ``other``, reordered so that row i is coupled with row i of ``x``.

        The assignment is solved on the host, so this is the one place of an update that waits for the device.
        """
        return self._laid_out(other[couple(x, other, classes)])

    def _dropped(self, labels: Tensor | None) -> Tensor | None:
        """The labels of a batch, some of them replaced by the null label."""
        if self.labels is None or labels is None or not self._label_dropout:
            return None if self.labels is None else labels
        gone = torch.rand(len(labels), generator=self.draws, device=self.device) < self._label_dropout
        return torch.where(gone, torch.full_like(labels, self.net.null_label), labels)  # type: ignore[arg-type]

    def sample(
        self, z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None, precision: str = "float32"
    ) -> Tensor:
        """Samples of the exported network, for noise ``z`` and the endpoints if it has them; a halved one's by DDIM."""
        how = (SAMPLING_STEPS, "euler") if self._halving is None else (self._halving.steps, "ddim")
        endpoint = endpoint if self._endpoint else None
        with self._exporting(), Precision(precision, self.device).sampling():
            return integrate(self.averaged, z, *how, labels, None, self.path, self.matching.predict, endpoint)
