"""The commands and their options. This module imports no torch, so that the help comes at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .. import __version__, choices
from ..bounds import SEED, THREADS, Range

# Adds a command: its name, the module of this package and the function that run it, what it does.
Add = Callable[[str, str, str], argparse.ArgumentParser]
SHIPPED = ", ".join(choices.configs())
# Bounds of the options that are whole numbers, by name; a command may refuse more.
WHOLE = {
    **dict.fromkeys(("count", "steps", "limit", "repeats", "batch", "ranks", "epochs"), Range(1)),
    **dict.fromkeys(("samples", "heldout_every", "measure"), Range(0)),
    **dict.fromkeys(("size", "crop"), Range(1, 2**15)),
    **dict.fromkeys(("seed", "seeds"), SEED),
    **dict.fromkeys(("threads", "jobs"), Range(1, THREADS.most)),
}
BENCHMARKS = {
    "micro": "bench.micro",
    "optimiser": "bench.optimiser",
    "step": "bench.step",
    "growth": "bench.growth",
}
STUDIES = {"compare": "bench.compare_results", "study": "bench.study.mnist.__main__"}


def parser() -> argparse.ArgumentParser:
    """The parser of ``realuid-fast``; ``run`` of what it parses names the function that carries the command out."""
    top = argparse.ArgumentParser(
        prog="realuid-fast", description="One-step generators from multi-step teachers, with real data."
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    # The order of the help.
    for some in (_add_training, _add_convert, _add_sample, _add_pack, _add_evaluate, _add_classifier, _add_tools):
        some(add)
    return top


def _add_training(add: Add) -> None:
    for name, text in (
        ("train-teacher", "train a multi-step teacher by flow matching"),
        ("distill", "distil a teacher into a one-step student"),
    ):
        command = add(name, "training.train", text)
        source = command.add_mutually_exclusive_group()
        text = f"a YAML file or one of: {SHIPPED}, recipes/NAME (default: digits)"
        source.add_argument("--config", help=text)
        source.add_argument("--preset", metavar="NAME", help=f"one of: {', '.join(choices.presets())}")
        text = "follow the published procedure step for step, the same as --set run.parity=true"
        command.add_argument("--parity", action="store_true", help=text)
        add_settings(command)
        add_folder(command, needed=False)
        _add_plan(command)


def _add_classifier(add: Add) -> None:
    text = "train a small classifier of a data set, in whose features runs are evaluated: --set run.classifier=FILE"
    command = add("train-classifier", "models.train_classifier", text)
    command.add_argument("--config", default="digits", help=f"whose data: a YAML file or one of: {SHIPPED}")
    add_settings(command, "data.KEY=VALUE, over the configuration's data")
    command.add_argument("--out", type=place, required=True, help="the .safetensors file to write")
    command.add_argument("--epochs", type=int, default=30, help="passes over the training split (default: 30)")
    command.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    command.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def _add_convert(add: Add) -> None:
    command = add("convert", "models.convert", "write a network of others as a file of this package")
    command.add_argument("source", type=Path, help="a checkpoint, a pickled EDM network, or a diffusers folder")
    command.add_argument("--out", required=True, type=place, help="the .safetensors file to write")
    command.add_argument(
        "--config", help=f"whose network, path and data a checkpoint has: a YAML file or one of: {SHIPPED}"
    )
    add_settings(command, "network.KEY=VALUE, path.name=, path.settings=, path.predict=, data.KEY=VALUE")
    command.add_argument(
        "--decay", type=float, help="which average of a checkpoint, 0 for the last weights (default: the largest)"
    )
    command.add_argument("--preprocessing", default="", help="what the network's samples are, in words")
    command.add_argument("--student", action="store_true", help="the checkpoint is a one-step generator (ema_gens)")
    command.add_argument("--t-start", type=float, default=0.0, help="the time that generator starts from (default: 0)")
    for what in ("missing", "unexpected"):
        text = f"parameters that may be {what}: names or patterns such as 'head.*'"
        command.add_argument(f"--allow-{what}", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    command.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def _add_sample(add: Add) -> None:
    command = add("sample", "models.sample", "draw samples from a student or a teacher")
    command.add_argument(
        "--model",
        required=True,
        help=f"a file, a finished run's folder, or: {', '.join(choices.TEACHERS | choices.STUDENTS)}",
    )
    command.add_argument("--out", required=True, nargs="+", type=place, help="files to write: .png, .npy, .safetensors")
    command.add_argument("--count", type=int, default=64, help="number of samples (default: 64)")
    command.add_argument(
        "--steps", type=int, help="a teacher's steps (default: 100, of edm 18), or one of a student's numbers"
    )
    command.add_argument("--solver", choices=choices.SOLVERS, help="a teacher's solver (default: euler)")
    command.add_argument(
        "--guidance", type=float, default=1.0, help="a teacher's guidance by labels (default: 1, none)"
    )
    command.add_argument("--label", type=int, help="class of all samples (default: one after another)")
    command.add_argument(
        "--pairs", action="store_true", help="write a .safetensors with the noise too, for distill.regression.pairs"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    command.add_argument("--device", default="cpu", help="default: cpu")
    text = "what the networks compute in (default: float32)"
    command.add_argument("--precision", choices=choices.PRECISIONS, default="float32", help=text)
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _add_pack(add: Add) -> None:
    command = add(
        "pack", "tools.pack", "write images into arrays on disk that runs read row by row: --set data.name=packed"
    )
    text = "a folder or zip archive of images, such as CelebA's, or the folder of MNIST's or CIFAR-10's files"
    command.add_argument("source", nargs="?", type=Path, help=text)
    command.add_argument("--out", type=place, required=True, help="folder to write")
    command.add_argument("--kind", choices=choices.SOURCES, help="what the source is (default: by its names)")
    command.add_argument("--size", type=int, help="side of the images (default: 32, CelebA's 64, MNIST's as is)")
    command.add_argument("--channels", type=int, choices=(1, 3), help="channels of the images (default: 3, MNIST's 1)")
    command.add_argument(
        "--crop", type=int, help="central square to keep (default: the largest; of CelebA 140, some take 178)"
    )
    command.add_argument(
        "--filter", choices=choices.FILTERS, default="lanczos", help="filter of the scaling (default: lanczos)"
    )
    split = command.add_mutually_exclusive_group()
    text = "every so many-th image is held out (default: 10, or what the folders train and test say)"
    split.add_argument("--heldout-every", type=int, help=text)
    text = "lines NAME NUMBER, 0 to train on and 2 to hold out, as CelebA's; NAME may be a path inside SOURCE"
    split.add_argument("--partition", type=Path, help=text)
    command.add_argument("--no-labels", action="store_true", help="folders are not classes")
    command.add_argument("--skip-damaged", action="store_true", help="leave images out that cannot be read, and say so")
    command.add_argument("--limit", type=int, help="only the first so many images, of train and test if they are there")
    command.add_argument("--threads", type=int, default=1, help="threads that decode (default: 1)")
    command.add_argument("--overwrite", action="store_true", help="replace a packed set in --out")
    command.add_argument("--verify", action="store_true", help="without SOURCE: compare --out with its checksums")


def _add_evaluate(add: Add) -> None:
    command = add("evaluate", "models.evaluate", "compare real data, a teacher and a student by distance and speed")
    command.add_argument("--student", help="a student's file or its run's folder; default: only the teacher")
    command.add_argument("--teacher", help="a teacher's file or shipped name (default: the student's own)")
    text = "samples of each row (default: 5408 where a sample has at most 256 values, else 2000; of Inception 50000)"
    command.add_argument("--samples", type=int, help=text)
    steps = " ".join(map(str, choices.TEACHER_STEPS))
    text = f"the teacher's Euler steps (default: {steps}; above 256 values a sample the first two)"
    command.add_argument("--steps", type=int, nargs="+", help=text)
    command.add_argument("--device", default="cpu", help="default: cpu")
    text = "what the networks compute in (default: float32)"
    command.add_argument("--precision", choices=choices.PRECISIONS, default="float32", help=text)
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    command.add_argument("--out", type=place, help="folder for evaluation.json and table.md")
    command.add_argument("--overwrite", action="store_true", help="replace an evaluation in --out")
    command.add_argument(
        "--metric", choices=("features", "inception"),
        help="features: distances that suit the data, without further weights (default); inception: those of images in "
        "publications, from weights",
    )  # fmt: skip
    text = "RealUID's published protocol: --metric inception --labels balanced --repeats 3 --steps 99, where not given"
    command.add_argument("--published", action="store_true", help=text)
    apart = command.add_argument_group("--metric inception")
    apart.add_argument("--inception-weights", type=Path, metavar="FILE", help="weights on disk; nothing is downloaded")
    apart.add_argument(
        "--real-split",
        choices=("train", "heldout"),
        default="train",
        help="real images to compare with (default: train)",
    )
    text = "empirical: labels drawn as the data have them (default); balanced: one class after another"
    apart.add_argument("--labels", choices=choices.LABELS, help=text)
    apart.add_argument("--repeats", type=int, help="seeds, reported with their spread (default: 1)")
    apart.add_argument("--batch", type=int, default=100, help="images at a time (default: 100)")
    text = f"folder of the real images' statistics (default: {choices.CACHE_IN_WORDS})"
    apart.add_argument("--cache", type=Path, default=choices.CACHE, metavar="FOLDER", help=text)
    text = "features of a classifier of realuid-fast train-classifier (default: those that suit the data)"
    command.add_argument("--classifier", default="", metavar="FILE", help=text)
    add_settings(command, "data.KEY=VALUE, where the data lie elsewhere now")


def _add_tools(add: Add) -> None:
    text = "print every setting as YAML, each with its meaning, type, bounds and default; --config takes the file"
    command = add("config", "tools.config", text)
    names = f"a YAML file or one of: {SHIPPED}, presets/NAME, recipes/NAME (default: all settings)"
    command.add_argument("name", nargs="?", metavar="NAME", help=names)
    add_settings(command)

    add("info", "tools.info", "show versions, backends and why one cannot run, processor and threads")

    command = add(
        "demo", "training.demo", "distil the shipped digits teacher in a few minutes and show what came of it"
    )
    command.add_argument("--threads", type=int, help="CPU threads (default: 2 on a quiet machine, else 1)")
    add_settings(command)
    add_folder(command, Path("runs/demo"))

    command = add(
        "bench",
        "tools.bench",
        "time fused calls, whole updates and their growth, compare two results, or study real data on MNIST",
    )
    command.add_argument("which", nargs="?", default="all", choices=["all", *BENCHMARKS, *STUDIES], help="default: all")
    text = "its own options, see realuid-fast bench micro --help; results go to runs/bench where --out is not given"
    command.add_argument("options", nargs=argparse.REMAINDER, help=text)


def place(text: str) -> Path:
    """The path of a file or folder to write; an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it must not be empty")
    return Path(text)


def add_settings(command: argparse.ArgumentParser, text: str = "KEY.SUB=VALUE, over the configuration") -> None:
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)


def add_folder(command: argparse.ArgumentParser, default: Path | None = None, needed: bool = True) -> None:
    text = "folder to write" + (f" (default: {default})" if default else "")
    command.add_argument("--out", type=place, required=needed and default is None, default=default, help=text)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    how.add_argument("--overwrite", action="store_true", help="remove the run in the folder and start afresh")


def _add_plan(command: argparse.ArgumentParser) -> None:
    text = "only show what the run would take: memory by part, operations, hours; writes no folder, needs no data"
    command.add_argument("--dry-run", action="store_true", help=text)
    steps = choices.PLAN_STEPS
    text = f"updates to time for --dry-run, 0 for none (default: {steps}, of smaller batches if those are slow)"
    command.add_argument("--measure", type=int, metavar="N", help=text)
    command.add_argument("--ranks", type=int, metavar="N", help="processes to plan for with --dry-run (default: 1)")
    command.add_argument("--json", type=Path, metavar="FILE", help="file for what --dry-run shows")
