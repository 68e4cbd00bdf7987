"""The commands beside training: pack, info and bench."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import platform
import sys
from pathlib import Path

import torch

from .. import __version__, backends, choices, precision
from ..data import packing
from ..data.stored import verify
from ..errors import UserError
from ..jobs import config as configs
from ..jobs.train import free_cores
from ..ops import extension
from ..train import modes
from . import common, listing
from .parser import BENCHMARKS, STUDIES

CHECKOUT = Path(__file__).resolve().parent.parent.parent


@common.as_typed(heldout_every="--heldout-every", partition="--partition", path="SOURCE")
def pack(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if arguments.verify == (arguments.source is not None):
        raise UserError("give either a source to pack or --verify")
    if arguments.verify:
        manifest = verify(out)
    else:
        names = ("kind", "size", "channels", "crop", "filter", "heldout_every", "partition", "limit", "threads")
        settings = {name: getattr(arguments, name) for name in (*names, "overwrite", "skip_damaged")}
        manifest = packing.pack(arguments.source, out, labels=not arguments.no_labels, progress=True, **settings)
    what = "every checksum is right" if arguments.verify else "use it with --set data.name=packed data.path=" + str(out)
    sizes = "x".join(map(str, manifest.shape))
    classes = f" in {len(manifest.classes)} classes" if manifest.classes else ""
    print(f"{out}: {manifest.train.count:,} images {sizes}{classes} and {manifest.heldout.count:,} held out; {what}")


def config(arguments: argparse.Namespace) -> None:
    chosen = configs.load(arguments.name, arguments.set) if arguments.name else None
    file = choices.CONFIGS / f"{arguments.name}.yaml"
    if arguments.name and file.is_file():
        # The lines above a shipped configuration: what it is, and the commands that make the files that it names.
        print(
            "".join(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines(keepends=True)))
        )
    print(listing.as_yaml(chosen or configs.from_mapping(configs.nested(arguments.set)), chosen is None), end="")


def info(arguments: argparse.Namespace) -> None:
    import importlib.metadata

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    print(f"realuid-fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(", ".join(f"{name} {version(name)}" for name in ("triton", "numpy", "safetensors", "scikit-learn")))
    print("\nbackend  devices  state")
    for row in backends.report():
        print(f"{row.name:8} {row.devices:8} {_state(row.why_not, f'runs {row.runs}')}")
    missing = extension.why_no_nodes()
    print(f"autograd nodes in {'C++' if missing is None else f'Python, slower for a few samples: {missing}'}")
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        print(f"\nrun.mode and distill.*_precision with run.device {device}")
        for names, why_not in ((modes.MODES, modes.why_not), (precision.PRECISIONS, precision.why_not)):
            for name in names:
                print(f"{name:17} {_state(why_not(name, device), 'runs')}")
    print(f"\nprocessor     {common.processor()}")
    try:
        print(f"vector code   {extension.isa() or 'unknown: the C++ extension was not built'}")
    except RuntimeError as error:
        print(f"vector code   {error}")
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    print(f"threads       torch {threads}, cores {os.cpu_count()}, free {free_cores()} (load {load:.1f})")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    print(f"GPU           {gpu}")
    print("\npreset            of train-teacher and distill")
    for name, line in choices.presets().items():
        print(f"{name:17} {line}")
    print("\nrecipe, with --config")
    for name, line in choices.recipes().items():
        print(f"{f'recipes/{name}':30} {line}")


def _state(why_not: str | None, runs: str) -> str:
    return runs if why_not is None else f"cannot run: {why_not}"


def bench(arguments: argparse.Namespace) -> None:
    """Run benchmarks from the source checkout that the package is installed from, in this process.

    They time the package and are no part of it: ``bench/`` lies beside it in the repository, and not in the wheel.
    """
    if not (CHECKOUT / "bench" / "micro.py").is_file():
        raise UserError(
            "the benchmarks are not installed with the package: clone its repository, run pip install -e . there, "
            "and use that environment"
        )
    sys.path.insert(0, str(CHECKOUT))
    options = list(arguments.options)
    if arguments.which in STUDIES:
        raise SystemExit(importlib.import_module(STUDIES[arguments.which]).main(options))
    if "--out" not in options:
        options += ["--out", "runs/bench"]
    for name in BENCHMARKS if arguments.which == "all" else [arguments.which]:
        importlib.import_module(BENCHMARKS[name]).main(options)
