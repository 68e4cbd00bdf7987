"""The command line: ``realuid-fast train-teacher | distill | pack | convert | sample | evaluate | info | ...``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__, backends, data, extension, teachers
from . import pack as packing
from .convert import convert
from .errors import UserError
from .noise import NoiseStream, normal
from .packed import verify
from .sampling import SOLVERS, needs_endpoint
from .teachers import SHIPPED, Model
from .train import config as configs
from .train import distributed, fidelity, modes, plan, precision
from .train import evaluate as evaluation
from .train.compare import compare
from .train.inception import HOW_TO_GET, Inception
from .train.jobs import free_cores, resolve, train
from .train.logging import picture, read_csv, save_png
from .train.loop import Interrupted, plot_distances
from .train.measure import Measure, class_by_class, evaluation_noise, generate
from .train.teacher import SAMPLING_STEPS

CHECKOUT = Path(__file__).resolve().parent.parent
BENCHMARKS = {
    "micro": "bench.micro",
    "optimiser": "bench.optimiser",
    "step": "bench.step",
    "growth": "bench.growth",
}

# What ``evaluate`` takes where it is not told, plainly and with ``--published``: src/eval.py and train_distil.py of the
# RealUID code measure 50,000 samples of labels in turn, three times, and a teacher over 100 times, which are 99 steps.
PLAIN = {"metric": "features", "labels": "empirical", "repeats": 1, "steps": list(evaluation.STEPS)}
PUBLISHED = {"metric": "inception", "labels": "balanced", "repeats": 3, "steps": [99]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for input that cannot be used, 130 or 143 after SIGINT or SIGTERM."""
    try:
        code = _answered(argv)
    except Exception:
        # Nothing but a process group that cannot be ended keeps this from whoever called.
        if not distributed.unended():
            raise
        traceback.print_exc()
        code = 1
    distributed.leave(code)
    return code


def _answered(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    warnings.showwarning = _warn
    # Every update allocates the same tensors; without this the C library has their pages zeroed anew each time.
    extension.keep_freed_memory()
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"{stop}; go on with the same command and --resume", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # A full disk, a folder taken away: what the commands cannot see coming.
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realuid-fast", description="One-step generators from multi-step teachers, with real data."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    shipped = ", ".join(sorted(f.stem for f in configs.CONFIGS.glob("*.yaml")))
    for name, text in (
        ("train-teacher", "train a multi-step teacher by flow matching"),
        ("distill", "distil a teacher into a one-step student"),
    ):
        command = add(name, _train, text)
        source = command.add_mutually_exclusive_group()
        text = f"a YAML file or one of: {shipped}, recipes/NAME (default: digits)"
        source.add_argument("--config", help=text)
        source.add_argument("--preset", metavar="NAME", help=f"one of: {', '.join(configs.presets())}")
        text = "follow the published procedure step for step, the same as --set run.parity=true"
        command.add_argument("--parity", action="store_true", help=text)
        _add_settings(command)
        _add_folder(command, needed=False)
        _add_plan(command)

    command = add("convert", _convert, "write a network of others as a file of this package")
    command.add_argument("source", type=Path, help="a checkpoint, a pickled EDM network, or a diffusers folder")
    command.add_argument("--out", required=True, type=Path, help="the .safetensors file to write")
    command.add_argument(
        "--config", help=f"whose network, path and data a checkpoint has: a YAML file or one of: {shipped}"
    )
    _add_settings(command, "network.KEY=VALUE, path.name=, path.settings=, path.predict=, data.KEY=VALUE")
    command.add_argument("--decay", type=float, help="which average of a checkpoint (default: the largest)")
    command.add_argument("--preprocessing", default="", help="what the network's samples are, in words")
    command.add_argument("--student", action="store_true", help="the checkpoint is a one-step generator (ema_gens)")
    command.add_argument("--t-start", type=float, default=0.0, help="the time that generator starts from (default: 0)")
    for what in ("missing", "unexpected"):
        text = f"parameters that may be {what}: names or patterns such as 'head.*'"
        command.add_argument(f"--allow-{what}", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    command.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    command = add("sample", _sample, "draw samples from a student or a teacher")
    command.add_argument("--model", required=True, help=f"a file, a finished run's folder, or: {', '.join(SHIPPED)}")
    command.add_argument("--out", required=True, nargs="+", type=Path, help="files to write: .png, .npy, .safetensors")
    command.add_argument("--count", type=int, default=64, help="number of samples (default: 64)")
    command.add_argument("--steps", type=int, help="a teacher's steps (default: 100)")
    command.add_argument("--solver", choices=SOLVERS, help="a teacher's solver (default: euler)")
    command.add_argument(
        "--guidance", type=float, default=1.0, help="a teacher's guidance by labels (default: 1, none)"
    )
    command.add_argument("--label", type=int, help="class of all samples (default: one after another)")
    command.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")

    command = add("pack", _pack, "write images into arrays on disk that runs read row by row: --set data.name=packed")
    text = "a folder or zip archive of images, such as CelebA's, or CIFAR-10's binary files"
    command.add_argument("source", nargs="?", type=Path, help=text)
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--kind", choices=packing.KINDS, help="what the source is (default: by its names)")
    command.add_argument("--size", type=int, help="side of the stored images (default: 32, CelebA's 64)")
    command.add_argument("--channels", type=int, default=3, choices=(1, 3), help="default: 3")
    command.add_argument(
        "--crop", type=int, help="central square to keep (default: the largest; of CelebA 140, some take 178)"
    )
    command.add_argument("--filter", choices=data.FILTERS, default="lanczos", help="of the scaling (default: lanczos)")
    split = command.add_mutually_exclusive_group()
    split.add_argument("--heldout-every", type=int, default=10, help="every so many-th image is held out (default: 10)")
    split.add_argument("--partition", type=Path, help="lines NAME NUMBER, 0 to train on and 2 to hold out, as CelebA's")
    command.add_argument("--no-labels", action="store_true", help="folders are not classes")
    command.add_argument("--limit", type=int, help="only the first so many images")
    command.add_argument("--threads", type=int, default=1, help="threads that decode (default: 1)")
    command.add_argument("--overwrite", action="store_true", help="replace a packed set in --out")
    command.add_argument("--verify", action="store_true", help="without SOURCE: compare --out with its checksums")

    command = add("evaluate", _evaluate, "compare real data, a teacher and a student by distance and speed")
    command.add_argument("--student", help="a student's file or its run's folder; default: only the teacher")
    command.add_argument("--teacher", help="a teacher's file or shipped name (default: the student's own)")
    command.add_argument(
        "--samples", type=int, help="samples of each row (default: 5408, 4 a training digit; of Inception 50000)"
    )
    steps = evaluation.STEPS
    text = f"the teacher's Euler steps (default: {' '.join(map(str, steps))})"
    command.add_argument("--steps", type=int, nargs="+", help=text)
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    command.add_argument("--out", type=Path, help="folder for evaluation.json and table.md")
    command.add_argument("--overwrite", action="store_true", help="replace an evaluation in --out")
    command.add_argument(
        "--metric", choices=("features", "inception"),
        help="features: distances that suit the data, at once (default); inception: those of images in publications, "
        "from weights",
    )  # fmt: skip
    text = "RealUID's published protocol: --metric inception --labels balanced --repeats 3 --steps 99, where not given"
    command.add_argument("--published", action="store_true", help=text)
    apart = command.add_argument_group("--metric inception")
    apart.add_argument("--inception-weights", type=Path, metavar="FILE", help="nothing is downloaded")
    apart.add_argument("--real-split", choices=("train", "heldout"), default="train", help="default: train")
    apart.add_argument("--labels", choices=fidelity.LABELS, help="default: empirical")
    apart.add_argument("--repeats", type=int, help="seeds, reported with their spread (default: 1)")
    apart.add_argument("--batch", type=int, default=100, help="images at a time (default: 100)")
    apart.add_argument("--device", default="cpu", help="default: cpu")
    text = f"folder of the real images' statistics (default: {fidelity.CACHE})"
    apart.add_argument("--cache", type=Path, default=fidelity.CACHE, metavar="FOLDER", help=text)
    _add_settings(command, "data.KEY=VALUE, where the data lie elsewhere now")

    add("info", _info, "show versions, backends and why one cannot run, processor and threads")

    command = add("demo", _demo, "distil the shipped digits teacher in a few minutes and show what came of it")
    command.add_argument("--threads", type=int, help="CPU threads (default: 2 on a quiet machine, else 1)")
    _add_settings(command)
    _add_folder(command, Path("runs/demo"))

    command = add("compare", _compare, "train UID and RealUID at equal updates over several seeds")
    command.add_argument("--config", help=f"a YAML file or one of: {shipped} (default: digits)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    command.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: free cores; 1 on a GPU)")
    command.add_argument("--then", metavar="CONFIG", help="a second stage from every student, e.g. digits_tune")
    text = "the second stage of both methods from UID's student, so that a seed's pair differs in that stage alone"
    command.add_argument("--common", action="store_true", help=text)
    command.add_argument(
        "--samples", type=int, default=0, help="samples of the table's distances (default: the curve's)"
    )
    _add_settings(command)
    _add_folder(command)

    command = add("bench", _bench, "time fused calls, whole updates and their growth, or compare two results")
    command.add_argument(
        "which", nargs="?", default="all", choices=["all", *BENCHMARKS, "compare"], help="default: all"
    )
    text = "its own options, see realuid-fast bench micro --help; results go to runs/bench where --out is not given"
    command.add_argument("options", nargs=argparse.REMAINDER, help=text)
    return parser


def _add_settings(command: argparse.ArgumentParser, text: str = "KEY.SUB=VALUE, over the configuration") -> None:
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)


def _add_folder(command: argparse.ArgumentParser, default: Path | None = None, needed: bool = True) -> None:
    text = "folder to write" + (f" (default: {default})" if default else "")
    command.add_argument("--out", type=Path, required=needed and default is None, default=default, help=text)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    how.add_argument("--overwrite", action="store_true", help="remove the run in the folder and start afresh")


def _add_plan(command: argparse.ArgumentParser) -> None:
    text = "only show what the run would take: memory by part, operations, hours; writes no folder, needs no data"
    command.add_argument("--dry-run", action="store_true", help=text)
    text = f"updates to time for --dry-run, 0 for none (default: {plan.STEPS}, of smaller batches if those are slow)"
    command.add_argument("--measure", type=int, metavar="N", help=text)
    command.add_argument("--ranks", type=int, metavar="N", help="processes to plan for with --dry-run (default: 1)")
    command.add_argument("--json", type=Path, metavar="FILE", help="file for what --dry-run shows")


def _command_line(arguments: argparse.Namespace) -> str:
    """The command that reproduces a run: its words without the folder and what concerns it."""
    words = ["realuid-fast", arguments.command]
    if getattr(arguments, "source", None):
        words += [str(arguments.source)]
    if getattr(arguments, "config", None):
        words += ["--config", arguments.config]
    if getattr(arguments, "preset", None):
        words += ["--preset", arguments.preset]
    if arguments.set:
        words += ["--set", *arguments.set]
    return shlex.join(words)


def _plan(arguments: argparse.Namespace, source: str | None) -> None:
    if arguments.resume:
        raise UserError("--dry-run plans a run from its beginning: leave --resume out")
    file: Path | None = arguments.json
    if file is not None and file.exists() and not arguments.overwrite:
        raise UserError(f"--json {file} exists: give --overwrite or another name")
    config = configs.load(source or "digits", arguments.set)
    steps = plan.STEPS if arguments.measure is None else arguments.measure
    made = plan.make(arguments.command, config, steps, ranks=1 if arguments.ranks is None else arguments.ranks)
    print(plan.markdown(made))
    if file is None:
        return
    try:
        file.write_text(json.dumps(made.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror or error}") from None


def _train(arguments: argparse.Namespace) -> None:
    source = arguments.config if arguments.preset is None else configs.preset(arguments.preset)
    if arguments.parity:
        arguments.set.append("run.parity=true")
    if arguments.dry_run:
        _plan(arguments, source)
        return
    for name in ("json", "measure", "ranks"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} goes with --dry-run")
    if arguments.out is None:
        raise UserError("--out must be given: the folder to write")
    folder: Path = arguments.out
    resume = arguments.resume or distributed.restarted(folder)
    config = resolve(source, arguments.set, folder, resume)
    with distributed.joined(config.run.device, alone=config.run.offload_teacher):
        file, measure = train(arguments.command, config, folder, resume, arguments.overwrite, _command_line(arguments))
        if distributed.rank():
            return
    lines = {measure.floor_name: measure.floor().distance}
    if arguments.command == "distill" and config.run.teacher_steps and config.run.evaluate_every:
        model, device = _model_teacher(config), distributed.device(config.run.device)
        model.net.to(device)
        noise = evaluation_noise(data.load(config.data).shape, config.run.evaluate_samples, device)
        conditions = measure.conditions(model.net, len(noise), device)
        samples, _ = generate(evaluation.sampler(model, config.run.teacher_steps), noise, *conditions)
        lines[f"teacher, {config.run.teacher_steps} Euler steps"] = measure(samples).distance
    name = "student" if arguments.command == "distill" else f"teacher, {SAMPLING_STEPS} Euler steps"
    if plot_distances(folder, lines, measure.name, name) is not None:
        last = read_csv(folder / "distances.csv")[-1]["distance"]
        print(f"{measure.name}: {last:.4g}; " + "; ".join(f"{name} {value:.4g}" for name, value in lines.items()))
    print(f"written to {file}")


def _model_teacher(config: configs.Config) -> Model:
    settings = config.distill
    return teachers.load_teacher(settings.teacher, config.teachers_network(), settings.teacher_decay)


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.overwrite:
        raise UserError(f"--out {arguments.out} exists: give --overwrite or another name")
    given = configs.nested(arguments.set)
    config = configs.load(arguments.config, arguments.set) if arguments.config else configs.from_mapping(given)
    model = convert(
        arguments.source,
        arguments.out,
        network=config.network,
        path=config.path.name,
        path_settings=config.path.settings,
        predict=config.path.predict,
        decay=arguments.decay,
        data=config.data if arguments.config or "data" in given else {},
        preprocessing=arguments.preprocessing,
        command=_command_line(arguments),
        student=arguments.student,
        t_start=arguments.t_start,
        allow_missing=arguments.allow_missing,
        allow_unexpected=arguments.allow_unexpected,
    )
    described = model.description
    size, shape = sum(p.numel() for p in model.net.parameters()), _shape(model)
    print(
        f"{described.role} on the path {described.path}, predicts {described.predict}: "
        f"network {described.network['kind']} of {size:,} parameters, samples {shape}"
    )
    print(f"written to {arguments.out}")


def _sample(arguments: argparse.Namespace) -> None:
    for file in arguments.out:
        if file.suffix not in (".png", ".npy", ".safetensors"):
            raise UserError(f"--out {file} must end in .png, .npy or .safetensors")
        if file.exists() and not arguments.overwrite:
            raise UserError(f"--out {file} exists: give --overwrite or another name")
        if not file.parent.is_dir():
            raise UserError(f"--out {file}: there is no folder {file.parent}")
    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, got {arguments.count}")
    _use_threads(arguments.threads)
    model = _model(arguments.model)
    student = model.description.role == "student"
    if student and (arguments.steps or arguments.solver):
        raise UserError("--steps and --solver are a teacher's: a student makes its samples in one step")
    steps = 100 if arguments.steps is None else arguments.steps
    draw = evaluation.sampler(model, steps, arguments.solver or "euler", arguments.guidance)
    like = torch.empty(arguments.count, *_shape(model))
    labels, endpoint = class_by_class(model.net, arguments.count), None
    if needs_endpoint(model.net, model.description.interpolant()):
        labels, endpoint = Measure(data.load(model.description.data)).shown(model.net, arguments.count)
    if arguments.label is not None:
        classes = int(getattr(model.net, "num_classes", 0) or 0)
        if not 0 <= arguments.label < classes:
            raise UserError(f"--label {arguments.label} is none of the model's {classes} classes")
        labels = torch.full((arguments.count,), arguments.label)
    samples, speed = generate(draw, normal(NoiseStream(arguments.seed).next_key(), like), labels, endpoint)
    for file in arguments.out:
        _write_samples(samples, file)
    print(f"{arguments.count} samples, {speed:,.0f} a second, written to {', '.join(map(str, arguments.out))}")


def _write_samples(samples: Tensor, file: Path) -> None:
    try:
        if file.suffix == ".png":
            save_png(picture(samples), file)
        elif file.suffix == ".npy":
            np.save(file, samples.numpy())
        else:
            from safetensors.torch import save_file

            save_file({"samples": samples.contiguous()}, str(file))
    except OSError as error:
        raise UserError(f"--out {file} cannot be written: {error.strerror or error}") from None


def _pack(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if arguments.verify == (arguments.source is not None):
        raise UserError("give either a source to pack or --verify")
    if arguments.verify:
        manifest = verify(out)
    else:
        names = ("kind", "size", "channels", "crop", "filter", "heldout_every", "partition", "limit", "threads")
        settings = {name: getattr(arguments, name) for name in (*names, "overwrite")}
        manifest = packing.pack(arguments.source, out, labels=not arguments.no_labels, progress=True, **settings)
    what = "every checksum is right" if arguments.verify else "use it with --set data.name=packed data.path=" + str(out)
    sizes = "x".join(map(str, manifest.shape))
    classes = f" in {len(manifest.classes)} classes" if manifest.classes else ""
    print(f"{out}: {manifest.train.count:,} images {sizes}{classes} and {manifest.heldout.count:,} held out; {what}")


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.student is None and arguments.teacher is None:
        raise UserError("give --student, --teacher or both")
    for name, value in (PUBLISHED if arguments.published else PLAIN).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    inception = arguments.metric == "inception"
    count = arguments.samples if arguments.samples is not None else 50_000 if inception else 5408
    if count < 2 or min(arguments.steps) < 1:
        raise UserError("--samples must be at least 2 and --steps at least 1")
    if inception != (arguments.inception_weights is not None):
        raise UserError(f"--metric inception and --inception-weights FILE go together: {HOW_TO_GET}")
    folder: Path | None = arguments.out
    if folder is not None:
        _open_results(folder, arguments.overwrite)
    _use_threads(arguments.threads)
    student = None if arguments.student is None else _model(arguments.student)
    name = arguments.teacher
    if student is not None:
        if student.description.role != "student":
            raise UserError(f"--student {arguments.student} holds a teacher: give it as --teacher")
        name = name or student.description.teacher
    teacher = None
    if arguments.teacher or name in SHIPPED or Path(name or "").suffix == ".safetensors":
        teacher = _model(name)
    elif name:
        print(f"the teacher {name} is left out: give it as a .safetensors file with --teacher", file=sys.stderr)
    described = student or teacher
    assert described is not None
    source = configs.merge({"data": described.description.data}, configs.nested(arguments.set))
    if set(source) != {"data"} or not source["data"]:
        raise UserError("--set takes data.KEY=VALUE here, and the data's name where the file does not have it")
    dataset = data.load(source["data"])
    for model in (student, teacher):
        if model is not None and _shape(model) != dataset.shape:
            role = model.description.role
            raise UserError(f"the {role} makes samples of shape {_shape(model)}, the data have {dataset.shape}")
    if inception:
        _inception_table(arguments, dataset, teacher, student, count)
    else:
        measure = Measure(dataset)
        table, metric = _show_table(measure, dataset, teacher, student, count, arguments.steps)
        if folder is not None:
            evaluation.write(folder, table, metric, samples=count, **_context())
    if folder is not None:
        print(f"written to {folder}")


def _inception_table(
    arguments: argparse.Namespace, dataset: data.Dataset, teacher: Model | None, student: Model | None, count: int
) -> None:
    if arguments.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {arguments.repeats}")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {arguments.device!r} is not a device that torch can use here") from None
    features = Inception(arguments.inception_weights, arguments.device)
    settings = {"split": arguments.real_split, "labels": arguments.labels, "batch": arguments.batch}
    judge = fidelity.Fidelity(dataset, features, cache=arguments.cache, progress=True, **settings)
    for model in (teacher, student):
        if model is not None:
            model.net.to(arguments.device)
    table = list(fidelity.rows(judge, teacher, student, count, arguments.steps, arguments.repeats))
    protocol = judge.protocol(count, arguments.repeats)
    print("\n" + fidelity.markdown(table, protocol))
    if arguments.out is not None:
        fidelity.write(arguments.out, table, protocol, **_context())


def _open_results(folder: Path, overwrite: bool) -> None:
    if (folder / "evaluation.json").exists() and not overwrite:
        raise UserError(f"{folder} holds an evaluation already: give --overwrite or another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None


def _show_table(
    measure: Measure,
    dataset: data.Dataset,
    teacher: Model | None,
    student: Model | None,
    count: int,
    steps: Sequence[int] = evaluation.STEPS,
) -> tuple[list[evaluation.Row], str]:
    """Measure and print the table; its rows and what its distance is."""
    table = []
    for row in evaluation.rows(measure, dataset.shape, teacher, student, count, steps):
        # Said as it comes: a teacher's hundred steps take a while.
        print(f"measured: {row.name}", file=sys.stderr, flush=True)
        table.append(row)
    metric = f"{measure.name}, to held-out data ({count:,} samples)"
    print("\n" + evaluation.markdown(table, metric))
    return table, metric


def _context() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "torch": torch.__version__,
        "realuid_fast": __version__,
    }


def _model(source: str) -> Model:
    """A student or teacher: a file, a finished run's folder, or a shipped name."""
    if source in SHIPPED:
        return teachers.load_teacher(source)
    place = Path(source)
    if not place.is_dir():
        return teachers.load(place)
    for role in teachers.ROLES[::-1]:
        if (place / f"{role}.safetensors").is_file():
            return teachers.load(place / f"{role}.safetensors")
    raise UserError(f"the folder {place} holds no student.safetensors or teacher.safetensors: is its run finished?")


def _shape(model: Model) -> tuple[int, ...]:
    network = model.description.network
    return tuple(network.get("dim", network.get("shape", (2,))))


def _use_threads(threads: int) -> None:
    if threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _state(why_not: str | None, runs: str) -> str:
    return runs if why_not is None else f"cannot run: {why_not}"


def _info(arguments: argparse.Namespace) -> None:
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
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        print(f"\nrun.mode and distill.*_precision with run.device {device}")
        for choices, why_not in ((modes.MODES, modes.why_not), (precision.PRECISIONS, precision.why_not)):
            for name in choices:
                print(f"{name:17} {_state(why_not(name, device), 'runs')}")
    print(f"\nprocessor     {_processor()}")
    try:
        print(f"vector code   {extension.isa() or 'unknown: the native module was not built'}")
    except RuntimeError as error:
        print(f"vector code   {error}")
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    print(f"threads       torch {threads}, cores {os.cpu_count()}, free {free_cores()} (load {load:.1f})")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    print(f"GPU           {gpu}")
    print("\npreset            of train-teacher and distill")
    for name, line in configs.presets().items():
        print(f"{name:17} {line}")
    print("\nrecipe, with --config")
    for name, line in configs.recipes().items():
        print(f"{f'recipes/{name}':30} {line}")


def _demo(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.out
    quiet = free_cores() > 1 and os.getloadavg()[0] < 0.3
    threads = arguments.threads if arguments.threads is not None else 2 if quiet else 1
    _use_threads(threads)
    config = resolve("demo", arguments.set, folder, arguments.resume)
    config = replace(config, run=replace(config.run, threads=threads))
    settings = config.distill
    objective = settings.objective.build()
    print(
        f"Distilling the teacher '{settings.teacher}' into one step with {objective.name} "
        f"(alpha {objective.alpha:g}, beta {objective.beta:g}): {settings.updates} updates of batch "
        f"{settings.batch} on {threads} thread{'s' if threads > 1 else ''}.",
        flush=True,
    )
    file, measure = train("distill", config, folder, arguments.resume, arguments.overwrite, _command_line(arguments))
    student, teacher, dataset = teachers.load(file), _model_teacher(config), data.load(config.data)
    count = config.run.evaluate_samples
    table, metric = _show_table(measure, dataset, teacher, student, count)
    evaluation.write(folder, table, metric, samples=count, updates=settings.updates, **_context())
    lines = {row.name: row.distances.distance for row in table if row.evaluations in (None, max(evaluation.STEPS))}
    plot_distances(folder, lines, measure.name)
    noise = evaluation_noise(dataset.shape, 100 if len(dataset.shape) == 3 else count)
    samples = evaluation.sampler(student)(noise, *measure.shown(student.net, len(noise)))
    save_png(picture(samples), folder / "samples.png")
    print(f"written to {folder}: samples.png, convergence.png, table.md, evaluation.json, {file.name}")


def _compare(arguments: argparse.Namespace) -> None:
    config = configs.load(arguments.config or "digits", arguments.set)
    # Runs on one GPU share its memory: how many fit, only whoever asks for them knows.
    alone = config.run.device.startswith("cuda")
    jobs = (1 if alone else free_cores()) if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if arguments.samples < 0:
        raise UserError(f"--samples must not be negative, got {arguments.samples}")
    second = configs.load(arguments.then, arguments.set) if arguments.then else None
    text = compare(
        config, arguments.out, arguments.seeds, jobs, arguments.overwrite, arguments.resume, second, arguments.samples,
        arguments.common,
    )  # fmt: skip
    print("\n" + text)
    print(f"written to {arguments.out}: compare.json, compare.md, compare.png")


def _bench(arguments: argparse.Namespace) -> None:
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
    if arguments.which == "compare":
        raise SystemExit(importlib.import_module("bench.compare_results").main(options))
    if "--out" not in options:
        options += ["--out", "runs/bench"]
    for name in BENCHMARKS if arguments.which == "all" else [arguments.which]:
        importlib.import_module(BENCHMARKS[name]).main(options)


if __name__ == "__main__":
    sys.exit(main())
