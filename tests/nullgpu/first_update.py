"""Processor time of the first compiled update of the CIFAR-10 recipe: ``make nullgpu-compile`` prints it.

It is that of torch.compile from an empty folder: tracing, what inductor decides, and writing its kernels, which are not
compiled here. A GPU's machine compiles them on top of that, on as many cores as it has, and keeps all of it on disk.
"""

import os
import tempfile

import torch
from torch._dynamo.utils import counters

from . import device, turns


def processor():
    """Seconds of processor time of this process and of those that it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main():
    device.inductor.install()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        trainer = turns.trainer({"base": "recipes/cifar10_fast", "run": {"mode": "compiled"}}, cifar=True)
        before = processor()
        trainer.update()
        spent = processor() - before
    print(f"{spent:.0f} s of processor time, {counters['stats']['unique_graphs']} graphs, torch {torch.__version__}")


if __name__ == "__main__":
    main()
