"""Times one optimiser step against torch's own pieces on CPU: ``python -m bench.optimiser``; ``--quick`` a small one.

The parameters are those of the CIFAR-10 U-Net of the published flow-matching recipe, 36 million in 304 tensors; a step
clips to a global norm, runs Adam with ``beta1 = 0`` and moves the moving averages. Writes optimiser.json and
optimiser.md. All ways run in turn in one process (:mod:`bench.timing`).

Bytes are what a step has to move: the norm reads the gradients, the update reads parameters, gradients, second moments
and averages and writes all but the gradients. The limit beside it is the speed of copying as many bytes in the same
rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from realuid_fast.networks.unet import UNet
from realuid_fast.optim import FusedAdam

from . import micro, report, timing
from .report import OURS
from .timing import Case, Way

LR, BETAS, CLIP, DECAYS = 2e-4, (0.0, 0.999), 1.0, (0.999, 0.9999, 0.9996)
AVERAGES = (3, 0)  # of a generator's step, and of a fake model's
PUBLISHED, FUSED = "as published", "Adam(fused=True), foreach clip, foreach averages"
WIDTH, QUICK_WIDTH = 128, 32


def network(width: int) -> nn.Module:
    """The CIFAR-10 U-Net with ``width`` channels on its first level; 128 is the published one."""
    torch.manual_seed(0)
    net = UNet((3, 32, 32), width, 2, (1, 2, 2, 2), "16", num_head_channels=width // 2)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Ours:
    """``FusedAdam`` on separate tensors."""

    def __init__(self, net: nn.Module, averages: int) -> None:
        self.optimiser = FusedAdam(net.parameters(), LR, BETAS, clip=CLIP, ema_decays=DECAYS[:averages])

    def step(self) -> None:
        self.optimiser.step()

    def averages(self) -> list[Tensor]:
        return [a for d in self.optimiser.ema_decays for a in self.optimiser.averages(d).values()]


class Published:
    """The eager way of the published training code: a clip, Adam as it comes, every average tensor by tensor."""

    def __init__(self, net: nn.Module, averages: int) -> None:
        self.net = net
        self.params = list(net.parameters())
        self.optimiser = torch.optim.Adam(self.params, LR, BETAS)
        state = net.state_dict()
        self.states = [{name: t.clone() for name, t in state.items()} for _ in DECAYS[:averages]]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimiser.step()
        source = self.net.state_dict()
        for d, average in zip(DECAYS, self.states, strict=False):
            for name, tensor in average.items():
                tensor.copy_(tensor * d + source[name] * (1 - d))

    def averages(self) -> list[Tensor]:
        return [t for state in self.states for t in state.values()]


class Fused:
    """The fastest pieces torch has: ``Adam(fused=True)``, the foreach clip, a foreach lerp for every average."""

    def __init__(self, net: nn.Module, averages: int) -> None:
        self.params = list(net.parameters())
        self.optimiser = torch.optim.Adam(self.params, LR, BETAS, fused=True)
        self.values = [p.detach() for p in self.params]
        self.states = [[p.clone() for p in self.values] for _ in DECAYS[:averages]]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.params, CLIP, foreach=True)
        self.optimiser.step()
        for d, average in zip(DECAYS, self.states, strict=False):
            torch._foreach_lerp_(average, self.values, 1 - d)

    def averages(self) -> list[Tensor]:
        return [t for state in self.states for t in state]


WAYS: dict[str, Callable[[nn.Module, int], Ours | Published | Fused]] = {OURS: Ours, PUBLISHED: Published, FUSED: Fused}


def name(averages: int) -> str:
    return f"optimiser step, clip and {averages} averages"


def bytes_moved(numel: int, averages: int) -> int:
    """The bytes that a step with ``beta1 = 0`` must read and write, in float32."""
    return 4 * numel * (1 + (3 + averages) + (2 + averages))


def case(width: int, averages: int) -> Case:
    """The step of every way, each on a network of its own.

    Raises:
        AssertionError: two ways do not compute the same thing.
    """
    nets = [network(width) for _ in WAYS]
    made = [make(net, averages) for make, net in zip(WAYS.values(), nets, strict=True)]
    for n in range(3):
        for net, way in zip(nets, made, strict=True):
            generator = torch.Generator().manual_seed(n)
            for p in net.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            way.step()
    for net, way in zip(nets[1:], made[1:], strict=True):
        # Steps are of the size of lr; clip_grad_norm_ adds 1e-6 to the norm.
        torch.testing.assert_close(list(net.parameters()), list(nets[0].parameters()), rtol=1e-5, atol=1e-3 * LR)
        torch.testing.assert_close(way.averages(), made[0].averages(), rtol=1e-5, atol=1e-3 * LR)
    numel = sum(p.numel() for p in nets[0].parameters())
    moved = bytes_moved(numel, averages)
    ways = [Way(label, way.step, ours=label == OURS) for label, way in zip(WAYS, made, strict=True)]
    return Case(name(averages), (numel,), ways + micro.copies(moved), layout="channels_last", bytes=moved)


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser("bench.optimiser", __doc__, "time of a case (default 30, quick 2)")
    parser.add_argument("--threads", type=report.threads, default=1, help="torch threads (default 1)")
    args = parser.parse_args(argv)

    chosen = [averages for averages in AVERAGES if args.only in name(averages)]
    if not chosen:
        parser.error(f"no case has {args.only!r} in its name")
    described = report.start("bench.optimiser", argv, args.threads)
    rows: list[report.Row] = []
    for averages in chosen:
        timed = case(QUICK_WIDTH if args.quick else WIDTH, averages)
        rows += timing.measure(timed, calls=1, seconds=report.seconds(args, 30.0, quick=2.0))
    label = report.named("optimiser", args.threads)
    text = micro.table(rows, described)
    report.write(report.Results(label, described, rows), args.out, {label: text})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
