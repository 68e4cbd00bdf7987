"""Times one optimiser step against torch's own pieces on CPU: ``python -m bench.optimiser``.

The parameters are those of the CIFAR-10 U-Net of the published flow-matching recipe, 36 million in 304 tensors; a step
clips to a global norm, runs Adam with ``beta1 = 0`` and moves the moving averages. Prints a table and writes it with
the machine's description to bench/results/optimiser.md and optimiser.json.

All ways run in turn in one process, as ``bench.micro`` has it. The bytes of a step are what must pass through memory at
least: the norm reads the gradients, the update reads parameters, gradients, second moments and averages and writes all
but the gradients. The floor is the time in which as many bytes are copied, half read and half written: by torch in
every round, and at the speed of a copy with streaming stores before and after.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from realuid_fast import extension
from realuid_fast.networks.unet import UNet
from realuid_fast.optim import FusedAdam

from . import machine
from .micro import RESULTS, Case, Way, measure

LR, BETAS, CLIP, DECAYS = 2e-4, (0.0, 0.999), 1.0, (0.999, 0.9999, 0.9996)


def network(width: int) -> nn.Module:
    """The CIFAR-10 U-Net with ``width`` channels on its first level; 128 is the published one."""
    torch.manual_seed(0)
    net = UNet(
        (3, 32, 32), width, 2, channel_mult=(1, 2, 2, 2), num_head_channels=width // 2, attention_resolutions="16"
    )
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


WAYS: dict[str, Callable[[nn.Module, int], Ours | Published | Fused]] = {
    "realuid_fast": Ours,
    "eager as published: clip, Adam, averages over state_dict": Published,
    "Adam(fused=True), foreach clip, foreach averages": Fused,
}


def bytes_needed(numel: int, averages: int) -> int:
    """Of one step with ``beta1 = 0`` in float32."""
    return 4 * numel * (1 + (3 + averages) + (2 + averages))


def case(width: int, averages: int) -> tuple[Case, int]:
    """The step of every way on networks of their own with the same gradients, and how many parameters there are.

    Raises:
        AssertionError: two ways do not compute the same thing.
    """
    nets = [network(width) for _ in WAYS]
    ways = [make(net, averages) for make, net in zip(WAYS.values(), nets, strict=True)]
    for n in range(3):
        for net, way in zip(nets, ways, strict=True):
            generator = torch.Generator().manual_seed(n)
            for p in net.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            way.step()
    for net, way in zip(nets[1:], ways[1:], strict=True):
        # Adam with beta1 = 0 starts with steps of lr in the gradient's sign; clip_grad_norm_ adds 1e-6 to the norm.
        torch.testing.assert_close(list(net.parameters()), list(nets[0].parameters()), rtol=1e-5, atol=1e-3 * LR)
        torch.testing.assert_close(way.averages(), ways[0].averages(), rtol=1e-5, atol=1e-3 * LR)

    numel = sum(p.numel() for p in nets[0].parameters())
    source = torch.ones(bytes_needed(numel, averages) // 8)
    target = torch.zeros_like(source)
    timed = [Way(name, way.step, ours=name == "realuid_fast") for name, way in zip(WAYS, ways, strict=True)]
    timed.append(Way("torch copying as many bytes", lambda: target.copy_(source)))
    tensors = sum(1 for _ in nets[0].parameters())
    return Case(f"step with clip and {averages} averages, beta1 = 0", (tensors, numel), timed), numel


def table(rows: list[dict[str, Any]], described: dict[str, Any]) -> str:
    """The rows as Markdown, the machine below."""
    copies = " and ".join(f"{speed:.1f}" for speed in described["copies_GBps"])
    lines = [
        "| case | parameters | way | median, ms | minimum, ms | times realuid_fast | GB/s of the bytes needed |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['shape'][1]:,} | {row['way']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} "
            f"| {row['ratio']:.2f} | {row['GBps']:.1f} |"
        )
    lines += [
        "",
        f"`python -m bench.optimiser` on {described['processor']}, {described['threads']} thread(s) of "
        f"{described['cores']} cores, {described['isa']}, torch {described['torch']}, load average "
        f"{described['load_average']} at the start. {described['clock']}; all ways interleaved in one run. Copying "
        f"with streaming stores went at {copies} GB/s before and after.",
    ]
    return "\n".join(lines) + "\n"


def _copy_speed(threads: int) -> float:
    native = extension.native
    return float(native.bandwidth(megabytes=256, repeats=5, threads=threads)["copy"]) if native else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds over all ways (default 15)")
    parser.add_argument("--width", type=int, default=128, help="channels of the network's first level (default 128)")
    parser.add_argument("--averages", type=int, nargs="+", default=[3, 0], help="numbers of averages (default 3 0)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of optimiser.json and optimiser.md")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    described = machine.describe()
    copies = [_copy_speed(args.threads)]
    described["clock"] = "Processor time of the one thread" if args.threads == 1 else "Wall time"
    rows: list[dict[str, Any]] = []
    for averages in args.averages:
        timed, numel = case(args.width, averages)
        for row in measure(timed, args.rounds, calls=3, warmup=1):
            row["GBps"] = bytes_needed(numel, averages) / row["median_ms"] / 1e6
            rows.append(row)
    described["copies_GBps"] = [*copies, _copy_speed(args.threads)]
    text = table(rows, described)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "optimiser.json").write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    (args.out / "optimiser.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
