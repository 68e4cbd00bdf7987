"""The commands about finished networks: convert, sample and evaluate."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import convert as conversion
from .. import data
from ..errors import UserError
from ..noise import NoiseStream, normal
from ..pictures import picture, save_png
from ..sampling import needs_endpoint
from ..teachers import SHIPPED, Model
from ..train import config as configs
from ..train import evaluate as evaluation
from ..train import fidelity
from ..train.inception import HOW_TO_GET, Inception
from ..train.measure import Measure, class_by_class, generate
from . import common

# What ``evaluate`` takes where it is not told, plainly and with ``--published``: src/eval.py and train_distil.py of the
# RealUID code measure 50,000 samples of labels in turn, three times, and a teacher over 100 times, which are 99 steps.
PLAIN = {"metric": "features", "labels": "empirical", "repeats": 1, "steps": list(evaluation.STEPS)}
PUBLISHED = {"metric": "inception", "labels": "balanced", "repeats": 3, "steps": [99]}


def convert(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.overwrite:
        raise UserError(f"--out {arguments.out} exists: give --overwrite or another name")
    given = configs.nested(arguments.set)
    config = configs.load(arguments.config, arguments.set) if arguments.config else configs.from_mapping(given)
    made = conversion.convert(
        arguments.source,
        arguments.out,
        network=config.network,
        path=config.path.name,
        path_settings=config.path.settings,
        predict=config.path.predict,
        decay=arguments.decay,
        data=config.data if arguments.config or "data" in given else {},
        preprocessing=arguments.preprocessing,
        command=common.command_line(arguments),
        student=arguments.student,
        t_start=arguments.t_start,
        allow_missing=arguments.allow_missing,
        allow_unexpected=arguments.allow_unexpected,
    )
    described = made.description
    size, shape = sum(p.numel() for p in made.net.parameters()), common.shape(made)
    print(
        f"{described.role} on the path {described.path}, predicts {described.predict}: "
        f"network {described.network['kind']} of {size:,} parameters, samples {shape}"
    )
    print(f"written to {arguments.out}")


def sample(arguments: argparse.Namespace) -> None:
    for file in arguments.out:
        if file.suffix not in (".png", ".npy", ".safetensors"):
            raise UserError(f"--out {file} must end in .png, .npy or .safetensors")
        if file.exists() and not arguments.overwrite:
            raise UserError(f"--out {file} exists: give --overwrite or another name")
        if not file.parent.is_dir():
            raise UserError(f"--out {file}: there is no folder {file.parent}")
    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, got {arguments.count}")
    common.use_threads(arguments.threads)
    model = common.model(arguments.model)
    student = model.description.role == "student"
    if student and (arguments.steps or arguments.solver):
        raise UserError("--steps and --solver are a teacher's: a student makes its samples in one step")
    usual = 18 if arguments.solver == "edm" else 100
    steps = usual if arguments.steps is None else arguments.steps
    draw = evaluation.sampler(model, steps, arguments.solver or "euler", arguments.guidance)
    like = torch.empty(arguments.count, *common.shape(model))
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


def evaluate(arguments: argparse.Namespace) -> None:
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
    common.use_threads(arguments.threads)
    student = None if arguments.student is None else common.model(arguments.student)
    name = arguments.teacher
    if student is not None:
        if student.description.role != "student":
            raise UserError(f"--student {arguments.student} holds a teacher: give it as --teacher")
        name = name or student.description.teacher
    teacher = None
    if arguments.teacher or name in SHIPPED or Path(name or "").suffix == ".safetensors":
        teacher = common.model(name)
    elif name:
        print(f"the teacher {name} is left out: give it as a .safetensors file with --teacher", file=sys.stderr)
    described = student or teacher
    assert described is not None
    source = configs.merge({"data": described.description.data}, configs.nested(arguments.set))
    if set(source) != {"data"} or not source["data"]:
        raise UserError("--set takes data.KEY=VALUE here, and the data's name where the file does not have it")
    dataset = data.load(source["data"])
    for model in (student, teacher):
        if model is not None and common.shape(model) != dataset.shape:
            role = model.description.role
            raise UserError(f"the {role} makes samples of shape {common.shape(model)}, the data have {dataset.shape}")
    if inception:
        _inception_table(arguments, dataset, teacher, student, count)
    else:
        measure = Measure(dataset)
        table, metric = common.show_table(measure, dataset, teacher, student, count, arguments.steps)
        if folder is not None:
            evaluation.write(folder, table, metric, samples=count, **common.context())
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
        fidelity.write(arguments.out, table, protocol, **common.context())


def _open_results(folder: Path, overwrite: bool) -> None:
    if (folder / "evaluation.json").exists() and not overwrite:
        raise UserError(f"{folder} holds an evaluation already: give --overwrite or another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror or error}") from None
