"""Counts of a plan: bytes and operations of networks, on tensors without memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import backends, networks
from ..models.calls import arguments, takes_endpoint
from ..models.teacher_step import TeacherStep
from ..networks import memory
from ..networks.recompute import recompute
from ..train import sharding

CPU = torch.device("cpu")


def activations(net: nn.Module, shape: tuple[int, ...], rows: int, device: str, to_input: bool = False) -> int:
    """Bytes that ``rows`` samples keep for a backward pass, counted on tensors without memory.

    The package's own layers keep less than torch's, but they run on the CPU alone. For a GPU torch's are counted.
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        net = copy.deepcopy(net)
    plain = contextlib.nullcontext() if torch.device(device).type == "cpu" else backends.backend("torch")
    with mode, plain:
        return memory.kept_bytes(net, shape, CPU, rows, to_input)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def weights(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def shared(state: dict[str, int], ranks: int) -> dict[str, int]:
    """One rank's share, in bytes, of a state that is spread over ``ranks``."""
    return {name: -(-size // ranks) for name, size in state.items()}


def together(nets: Sequence[nn.Module]) -> dict[str, int]:
    """Bytes of two blocks of networks that are gathered block by block: the one in use and the one fetched ahead."""
    sizes = [weights(block) for net in nets for block in sharding.blocks(net)]
    return {"blocks of networks, brought together": 2 * max(sizes)} if sizes else {}


def kept(trained: Sequence[tuple[int, float, Sequence[float]]]) -> dict[str, int]:
    """Bytes beside the parameters of networks that train: gradients, Adam's moments and averages.

    Args:
        trained: of each network its parameters, its optimiser's ``beta1``, which has no first moment if it is 0, and
            its averages.
    """
    return {
        "gradients": 4 * sum(parameters for parameters, *_ in trained),
        "moments": 4 * sum(parameters * (1 + (beta1 > 0)) for parameters, beta1, _ in trained),
        "averages": 4 * sum(parameters * len(averages) for parameters, _, averages in trained),
    }


@dataclass(frozen=True)
class Operations:
    """Operations of one sample: a forward pass alone, with a backward pass to the parameters, with one to the input."""

    forward: int
    training: int
    input: int


def operations(network: dict[str, Any], again: bool = False) -> Operations:
    """Operations by torch's counter on tensors without memory; ``again``: blocks run again in the backward pass."""
    # The counter does not know torch's fused attention for CPUs, nor the package's own layers. So attention runs as
    # plain products here, and torch's layers take the place of the package's.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), backends.backend("torch"):
        net = networks.build(network).requires_grad_(True)
        if again:
            # In evaluation mode: in training a block that runs again reads dropout's random state, which needs memory.
            recompute(net.eval())
        shape = tuple(network.get("dim", network.get("shape", ())))
        x = torch.zeros(1, *shape, requires_grad=True)
        labels = torch.zeros(1, dtype=torch.int64) if getattr(net, "num_classes", 0) else None
        end = torch.zeros(1, *shape) if takes_endpoint(net) else None

        with FlopCounterMode(display=False) as counter:
            out = net(*arguments(net, torch.zeros(1), x, labels, end)).sum()
        counts = [forward := int(counter.get_total_flops())]
        # One graph serves both backward passes: autograd computes the gradients that are asked for and no others.
        for wanted in ([*net.parameters()], [x]):
            with FlopCounterMode(display=False) as counter:
                out.backward(retain_graph=True, inputs=wanted)
            counts.append(forward + int(counter.get_total_flops()))
        return Operations(*counts)


class Moved(nn.Module):
    """A teacher after a step of its weights, called without gradients, as the generator's turn calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.step = TeacherStep(net)
        self.step.direction = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        self.num_classes = self.step.num_classes

    def forward(self, *seen: Tensor | None) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.step(*seen)
            return out


def moved(network: dict[str, Any]) -> int:
    """Operations of one sample of a teacher after a step of its weights (:class:`TeacherStep`)."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        net = Moved(networks.build(network).requires_grad_(True))
        shape = tuple(network.get("dim", network.get("shape", ())))
        labels = torch.zeros(1, dtype=torch.int64) if net.num_classes else None
        net(*arguments(net.step.net, torch.zeros(1), torch.zeros(1, *shape), labels, None))
    return int(counter.get_total_flops())
