"""Launches, bytes and memory of the CIFAR-10 recipe's networks: ``make nullgpu-networks`` writes network_counts.json.

The recipe is ``recipes/cifar10_fast``: a U-Net of 36 million parameters, batch 256, bf16 fake turns, fp16 generator's
turns. Each of its turns runs once, settled, in these ways: networks as written; the same through torch.compile; on
torch's own layers; in float32, which is ``recipes/cifar10``; and by the published loop, which is float32 too and makes
a fake turn's samples inside the turn (``bench/published.py``).

**Bytes** are those moved outside convolutions, products and attention. An operator that launches nothing, such as a
view, moves none. Any other moves each of its tensors once: its arguments are read, its results written, and an argument
that it changes is read and written, unless the operator only overwrites it. Of an expanded tensor the elements that
exist count. Where an operator makes a copy of an argument by a kernel of its own, the copy's read and write count too.
A convolution moves nothing but the tensors of its bias: the addition of it, and the sum that is its gradient. For a
kernel that torch.compile writes the number is inductor's own estimate. So a kernel that reads a tensor twice is counted
as if the second reading came from the cache, and the numbers are a lower bound.

**Copies between layouts** are launches that read images in one of the layouts NCHW and NHWC and write the other.

**Memory** is what torch's allocator hands out at most during the turn. cuDNN's workspaces are not in it.
"""

import json
import re
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import published, readme
from realuid_fast import backends

from . import device, turns
from .alone import alone
from .budget import ordered, revision

FILE = readme.RESULTS / "network_counts.json"
TURNS = {
    "generate": "_generate_rows",
    "fake turn": "_fake_step_plain",
    "generator's turn": "_generator_step_plain",
}
CLASSES = {
    "convolutions and products": "cudnn|cublas|gemm|flash|fmha",
    "normalisation": "norm_silu|_add_images|inductor (norm|add)$|GroupNorm|Moments|FusedParams|GammaBeta|InternalGrad",
    "the package's other kernels": "triton ",
    "copies and casts": "[Cc]opy|memset",
    "reductions": "reduce_kernel|reduction",
    "elementwise": "",
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "_cudnn_convolution"}
COPIES = {"copy_", "_foreach_copy_", "clone", "contiguous", "_to_copy"}
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "_foreach_copy_"}


def kind(name):
    """The class of a launch, by the kernel's name."""
    return next(each for each, pattern in CLASSES.items() if re.search(pattern, name))


def size(tensor):
    """The bytes of a tensor's elements that exist."""
    shape = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(shape).numel() * tensor.element_size() if tensor.numel() else 0


def layouts(tensors):
    """The layouts of the images among some tensors; a tensor that has both is of neither."""
    found = set()
    for tensor in tensors:
        if tensor.dim() == 4 and min(tensor.shape[1:]) > 1:
            last = tensor.is_contiguous(memory_format=torch.channels_last)
            if last != tensor.is_contiguous():
                found.add("NHWC" if last else "NCHW")
    return found


class Counted(TorchDispatchMode):
    """Counts what runs inside it.

    Attributes:
        launches: times by a kernel's name.
        moved: bytes by the operator's name.
        operations: of convolutions, products and attention, by torch's formulas.
        between: copies between layouts.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.moved, self.between, self.operations = Counter(), Counter(), 0, 0
        device.reset()

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def drain(self):
        """The launches since the last call."""
        found = device.counts().done
        device.reset()
        self.launches += found
        return found

    def __exit__(self, *arguments):
        self.drain()
        return super().__exit__(*arguments)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.drain()
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        if name in ("convolution", "convolution_backward"):
            with self:
                result = getattr(device.cudnn, name)(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        launched = self.drain()
        if launched and name not in PRODUCTS and not name.startswith("convolution") and "attention" not in name:
            self._moves(func, name, args, kwargs, result, launched)
        return result

    def _moves(self, func, name, args, kwargs, result, launched):
        reads, writes = [], [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        known = {id(each) for each in writes}
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            tensors = [each for each in tree_leaves(given.get(argument.name)) if isinstance(each, torch.Tensor)]
            changed = argument.alias_info is not None and argument.alias_info.is_write
            writes += [each for each in tensors if changed and id(each) not in known]
            if not changed or (name not in OVERWRITES and not argument.is_out):
                reads += tensors
        self.moved[name] += sum(map(size, reads)) + sum(map(size, writes))
        hidden = 0 if name in COPIES else sum(times for kernel, times in launched.items() if "copy_kernel" in kernel)
        if hidden:
            self.moved[f"copies inside {name}"] += 2 * hidden * max(map(size, reads))
        mixed = len(layouts(reads) | layouts(writes)) == 2
        if mixed or (hidden and layouts(reads) == {"NHWC"}):
            self.between += max(hidden, 1)


class Kernel(device.inductor.Kernel):
    """In place of a kernel that inductor wrote, with the bytes that inductor says it moves."""

    counted = None

    def __init__(self, name, source):
        super().__init__(name, source)
        self.name, found = name, re.search(r"'kernel_num_gb': ([\d.e-]+)", source)
        self.bytes = None if found is None else 1e9 * float(found[1])

    def run(self, *arguments, stream=None, **options):
        if self.counted is not None:
            tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
            kind = self.name.split("_")[1]
            self.counted.moved[f"inductor {kind}"] += self.bytes or sum(map(size, tensors))
            # inductor lays images out as tensors [B, H, W, C] too, so only tensors of one shape tell.
            shapes = {each.shape for each in tensors}
            self.counted.between += any(len(layouts(t for t in tensors if t.shape == s)) == 2 for s in shapes)
        super().run(*arguments, stream=stream, **options)


def counted(call):
    """Launches, bytes, copies and memory of a call, which has run before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Counted() as found:
        Kernel.counted = found
        call()
    Kernel.counted = None
    classes = Counter()
    for name, times in found.launches.items():
        classes[kind(name)] += times
    return {
        "launches": found.launches.total(),
        "by class": {name: classes[name] for name in CLASSES},
        "copies between layouts": found.between,
        "teraflop": round(found.operations / 1e12, 2),
        "gigabytes moved": round(sum(found.moved.values()) / 1e9, 2),
        "by operator": {name: round(moved / 1e9, 2) for name, moved in found.moved.most_common() if moved > 5e6},
        "held before, gigabytes": round(before / 1e9, 2),
        "peak, gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "by kernel": ordered(found.launches),
    }


def made(mode="eager", base="recipes/cifar10_fast"):
    """A trainer of the recipe after two updates, in which everything has been compiled and allocated."""
    torch.manual_seed(0)
    trainer = turns.trainer({"base": base, "run": {"mode": mode}}, cifar=True)
    for _ in range(2):
        trainer.update()
    return trainer


def eager():
    trainer = made()
    return {turn: counted(getattr(trainer, name)) for turn, name in TURNS.items()}


def torch_layers():
    with backends.backend("torch"):
        return eager()


def float32():
    trainer = made(base="recipes/cifar10")
    return {turn: counted(getattr(trainer, name)) for turn, name in TURNS.items()}


def published_loop():
    torch.manual_seed(0)
    config, *rest = turns.ingredients({"base": "recipes/cifar10"}, cifar=True)
    loop = published.Published(config, *rest)
    loop.update()
    z, y, t, n, real = loop._draws()
    with backends.backend("torch"):
        return {
            "fake turn": counted(lambda: loop.fake_turn(z, y, t, n, real)),
            "generator's turn": counted(lambda: loop.generator_turn(z, y, t, n)),
        }


def compiled():
    torch._inductor.config.benchmark_kernel = True  # inductor then says what a kernel moves
    device.inductor.Kernel = Kernel
    device.inductor.install()
    trainer = made("compiled")
    return {turn: counted(getattr(trainer, name)) for turn, name in TURNS.items()}


WAYS = {
    "eager": eager,
    "compiled": compiled,
    "eager, torch's own layers": torch_layers,
    "eager, float32": float32,
    "published loop": published_loop,
}


def tables(found):
    """The counts for the documents."""
    shown = ("normalisation", "copies and casts")
    head = ("turn", "launches", *shown, "others", "copies between layouts", "GB moved", "peak GB")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for way, rows in found["ways"].items():
        for turn, row in rows.items():
            cells = [row["launches"], *(row["by class"][each] for each in shown)]
            cells += [row["launches"] - sum(cells[1:]), row["copies between layouts"]]
            numbers = [f"{cell:,}" for cell in cells]
            numbers += [f"{row['gigabytes moved']:.1f}", f"{row['peak, gigabytes']:.1f}"]
            lines.append(f"| {way}: {turn} | {' | '.join(numbers)} |")
    return "\n".join([*lines, "", f"`{found['command']}` at revision {found['revision']}, torch {found['torch']}."])


def main(ways):
    """Count the ways named, by default all; others keep the committed numbers."""
    found = json.loads(FILE.read_text())["ways"] if FILE.exists() else {}
    found |= {way: alone(WAYS[way]) for way in WAYS if not ways or way in ways}
    described = {"command": "make nullgpu-networks", "revision": revision(), "torch": torch.__version__}
    whole = {**described, "ways": {way: found[way] for way in WAYS if way in found}}
    FILE.write_text(json.dumps(whole, indent=1) + "\n")
    (readme.RESULTS / "network_counts.md").write_text(tables(whole) + "\n")
    print(tables(whole))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
