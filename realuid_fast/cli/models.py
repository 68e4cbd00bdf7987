"""The commands about finished networks: convert, sample and evaluate."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..errors import UserError
from ..evaluate import classifier as classifiers
from ..evaluate import fidelity
from ..evaluate import table as evaluation
from ..evaluate.inception import HOW_TO_GET, Inception
from ..evaluate.measure import WARMING, Measure, class_by_class, generate
from ..files import replacing
from ..jobs import config as configs
from ..jobs.start import dataset_of
from ..jobs.train import usable_device, usable_precision
from ..models import convert as conversion
from ..models import pairs
from ..models.calls import needs_endpoint
from ..models.files import SHIPPED, Model
from ..models.pictures import picture, save_png
from ..models.solvers import evaluations
from ..noise import NoiseStream, normal
from ..progress import bar, counting
from . import common

# Defaults of ``evaluate``, plainly and with ``--published``: src/eval.py and train_distil.py of the
# RealUID code measure 50,000 samples of labels in turn, three times, and a teacher over 100 times, which are 99 steps.
PLAIN = {"metric": "features", "labels": "empirical", "repeats": 1}
PUBLISHED = {"metric": "inception", "labels": "balanced", "repeats": 3, "steps": [99]}


def convert(arguments: argparse.Namespace) -> None:
    common.check_out(arguments.out, arguments.overwrite)
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


@common.as_typed(guidance="--guidance", solver="--solver")
def sample(arguments: argparse.Namespace) -> None:
    for file in arguments.out:
        if file.suffix not in (".png", ".npy", ".safetensors"):
            raise UserError(f"--out {file} must end in .png, .npy or .safetensors")
        if arguments.pairs and file.suffix != ".safetensors":
            raise UserError(f"--out {file} must end in .safetensors with --pairs")
        common.check_out(file, arguments.overwrite)
    for name, value in (("count", arguments.count), ("steps", arguments.steps)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if not math.isfinite(arguments.guidance):
        raise UserError(f"--guidance must be finite, got {arguments.guidance}")
    device = usable_device("--device", arguments.device)
    usable_precision("--precision", arguments.precision, device)
    common.use_threads(arguments.threads)
    model = common.model(arguments.model)
    student = model.description.role == "student"
    own = model.description.steps if student else ()
    if own and arguments.solver is not None:
        raise UserError("--solver is a teacher's: the student makes DDIM steps")
    if student and not own and not (arguments.steps is None and arguments.solver is None):
        many = model.description.evaluations
        in_steps = "one step" if many == 1 else f"{many} steps"
        raise UserError(f"--steps and --solver are a teacher's: the student makes its samples in {in_steps}")
    if own and arguments.steps not in (None, *own):
        raise UserError(f"--steps must be one of the student's numbers of steps, {', '.join(map(str, own))}")
    usual = own[-1] if own else 18 if arguments.solver == "edm" else 100
    steps = usual if arguments.steps is None else arguments.steps
    path, predict = model.description.interpolant(), model.description.predict
    draw = evaluation.sampler(model, steps, arguments.solver or "euler", arguments.guidance, arguments.precision)
    model.net.to(device)
    like = torch.empty(arguments.count, *common.shape(model), device=device)
    labels, endpoint = class_by_class(model.net, arguments.count), None
    if needs_endpoint(model.net, path):
        if arguments.pairs:
            raise UserError("--pairs is for models that start from noise alone")
        labels, endpoint = Measure(data.load(model.description.data)).shown(model.net, arguments.count)
    if arguments.label is not None:
        classes = int(getattr(model.net, "num_classes", 0) or 0)
        if not 0 <= arguments.label < classes:
            raise UserError(f"--label {arguments.label} is none of the model's {classes} classes")
        labels = torch.full((arguments.count,), arguments.label)
    noise = normal(NoiseStream(arguments.seed, device).next_key(), like)
    made = arguments.count + min(arguments.count, WARMING)
    solver = arguments.solver or "euler"
    number = evaluations(steps, solver, path, predict)
    if student and not own:
        number = model.description.evaluations
    number *= 1 if arguments.guidance == 1 else 2
    # A command that ends within two seconds needs no bar.
    with bar(made * number, "evaluation", unit_scale=True, delay=2) as shown, counting(model.net, shown):
        samples, speed = generate(draw, noise, labels, endpoint)
    for file in arguments.out:
        with common.writing(file):
            if arguments.pairs:
                pairs.write(file, noise, samples, labels, f"{arguments.model}, {number} evaluations by {solver}")
            else:
                _write_samples(samples, file)
    print(f"{arguments.count} samples, {speed:,.0f} a second, written to {', '.join(map(str, arguments.out))}")


def _write_samples(samples: Tensor, file: Path) -> None:
    made = io.BytesIO()
    if file.suffix == ".png":
        save_png(picture(samples), made)
    elif file.suffix == ".npy":
        np.save(made, samples.numpy())
    else:
        from safetensors.torch import save

        made.write(save({"samples": samples.contiguous()}))
    # Not written by these libraries themselves: some of their errors do not say that the disk is full.
    with replacing(file) as stream:
        stream.write(made.getbuffer())


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.student is None and arguments.teacher is None:
        raise UserError("give --student, --teacher or both")
    for name in ("labels", "repeats"):
        if getattr(arguments, name) is not None and arguments.metric != "inception" and not arguments.published:
            raise UserError(f"--{name} goes with --metric inception")
    for name, value in (PUBLISHED if arguments.published else PLAIN).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    inception = arguments.metric == "inception"
    if (arguments.samples or 2) < 2 or min(arguments.steps or [1]) < 1 or arguments.samples == 0:
        raise UserError("--samples must be at least 2 and --steps at least 1")
    if inception and arguments.classifier:
        raise UserError("--classifier goes with --metric features")
    if inception != (arguments.inception_weights is not None):
        raise UserError(f"--metric inception and --inception-weights FILE go together: {HOW_TO_GET}")
    folder: Path | None = arguments.out
    if folder is not None:
        _open_results(folder, arguments.overwrite)
    device = usable_device("--device", arguments.device)
    usable_precision("--precision", arguments.precision, device)
    common.use_threads(arguments.threads)
    student = None if arguments.student is None else common.model(arguments.student)
    name = arguments.teacher
    if student is not None:
        if student.description.role != "student":
            raise UserError(f"--student {arguments.student} holds a teacher: give it as --teacher")
        name = name or student.description.teacher
    teacher = None
    if arguments.teacher or name in SHIPPED or (name and (Path(name).suffix == ".safetensors" or Path(name).is_dir())):
        if not arguments.teacher and name not in SHIPPED and not Path(name).exists():
            raise UserError(
                f"there is no file {name}, the student's teacher as seen from where it was distilled: give --teacher"
            )
        teacher = common.model(name)
        if teacher.description.role != "teacher":
            raise UserError(f"--teacher {name} holds a student: give it as --student")
    elif name:
        print(f"the teacher {name} is left out: give it as a .safetensors file with --teacher", file=sys.stderr)
    described = student or teacher
    assert described is not None
    source = configs.merge({"data": described.description.data}, configs.nested(arguments.set))
    if set(source) != {"data"} or not source["data"]:
        raise UserError("--set takes data.KEY=VALUE here, and the data's name where the file does not have it")
    dataset = dataset_of(source["data"])
    for model in (student, teacher):
        if model is None:
            continue
        if common.shape(model) != dataset.shape:
            role = model.description.role
            raise UserError(f"the {role} makes samples of shape {common.shape(model)}, the data have {dataset.shape}")
        model.net.to(device)
    count, steps = (50_000, evaluation.STEPS) if inception else evaluation.defaults(dataset.shape)
    count, arguments.steps = arguments.samples or count, arguments.steps or list(steps)
    if inception:
        _inception_table(arguments, dataset, teacher, student, count)
    else:
        measure = Measure(dataset, classifier=arguments.classifier)
        of = dataset, teacher, student, count, arguments.steps
        table, metric = common.show_table(measure, *of, device, arguments.precision)
        if folder is not None:
            with common.writing(folder):
                evaluation.write(folder, table, metric, samples=count, **common.context())
    if folder is not None:
        print(f"written to {folder}")


def train_classifier(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    common.check_out(out, arguments.overwrite)
    common.use_threads(arguments.threads)
    dataset = data.load(configs.load(arguments.config, arguments.set).data)
    net, accuracy = classifiers.train_classifier(arguments.epochs, seed=arguments.seed, dataset=dataset)
    with common.writing(out):
        classifiers.write(out, net, dataset, accuracy)
    floor = Measure(dataset, classifier=str(out)).floor().distance
    print(f"held-out accuracy {accuracy:.4f}, training images at distance {floor:.4f}, written to {out}")


def _inception_table(
    arguments: argparse.Namespace,
    dataset: data.Dataset,
    teacher: Model | None,
    student: Model | None,
    count: int,
) -> None:
    if arguments.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {arguments.repeats}")
    features = Inception(arguments.inception_weights, arguments.device)
    settings = {"split": arguments.real_split, "labels": arguments.labels, "batch": arguments.batch}
    judge = fidelity.Fidelity(dataset, features, cache=arguments.cache, progress=True, **settings)
    how = arguments.repeats, arguments.precision
    table = list(fidelity.rows(judge, teacher, student, count, arguments.steps, *how))
    protocol = judge.protocol(count, *how)
    print("\n" + fidelity.markdown(table, protocol))
    if arguments.out is not None:
        with common.writing(arguments.out):
            fidelity.write(arguments.out, table, protocol, **common.context())


def _open_results(folder: Path, overwrite: bool) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give the name of a folder")
    if (folder / "evaluation.json").exists() and not overwrite:
        raise UserError(f"{folder} holds an evaluation already: give --overwrite or another folder")
    with common.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
