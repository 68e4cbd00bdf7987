"""The commands that train: train-teacher, distill and demo."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from .. import data, teachers
from ..errors import UserError
from ..evaluate import table as evaluation
from ..evaluate.measure import WARMING, evaluation_noise, generate
from ..files import replacing
from ..jobs import config as configs
from ..jobs import train as jobs
from ..jobs.train import free_cores, resolve
from ..models.files import Model
from ..models.pictures import picture, save_png
from ..progress import bar, counting
from ..train import distributed
from ..train.logging import plot_distances, read_csv
from ..train.teacher import SAMPLING_STEPS
from . import common, plan


def train(arguments: argparse.Namespace) -> None:
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
    config = resolve(source, arguments.set, folder, resume, arguments.command)
    with distributed.joined(config.run.device, alone=config.run.offload_teacher):
        file, measure = jobs.train(
            arguments.command, config, folder, resume, arguments.overwrite, common.command_line(arguments)
        )
        if distributed.rank():
            return
    # Said before the teacher's samples for the plot, which may take minutes.
    print(f"written to {file}", flush=True)
    lines = {measure.floor_name: measure.floor().distance}
    if arguments.command == "distill" and config.run.teacher_steps and config.run.evaluate_every:
        model, device = _model_teacher(config), distributed.device(config.run.device)
        model.net.to(device)
        noise = evaluation_noise(data.load(config.data).shape, config.run.evaluate_samples, device)
        conditions = measure.conditions(model.net, len(noise), device)
        name, steps = f"teacher, {config.run.teacher_steps} Euler steps", config.run.teacher_steps
        made = steps * (len(noise) + min(len(noise), WARMING))
        # The bar comes after two seconds, as in the command sample.
        with (
            bar(made, "evaluation", config.run.progress, unit_scale=True, delay=2, desc="the plot's teacher") as shown,
            counting(model.net, shown),
        ):
            samples, _ = generate(evaluation.sampler(model, steps), noise, *conditions)
        lines[name] = measure(samples).distance
    name = "student" if arguments.command == "distill" else f"teacher, {SAMPLING_STEPS} Euler steps"
    if plot_distances(folder, lines, measure.name, name) is not None:
        last = read_csv(folder / "distances.csv")[-1]["distance"]
        print(f"{measure.name}: {last:.4g}; " + "; ".join(f"{name} {value:.4g}" for name, value in lines.items()))


def _plan(arguments: argparse.Namespace, source: str | None) -> None:
    if arguments.resume:
        raise UserError("--dry-run plans a run from its beginning: leave --resume out")
    file: Path | None = arguments.json
    if file is not None and file.exists() and not arguments.overwrite:
        raise UserError(f"--json {file} exists: give --overwrite or another name")
    if file is not None and not file.parent.is_dir():
        raise UserError(f"--json {file}: there is no folder {file.parent}")
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


def _model_teacher(config: configs.Config) -> Model:
    settings = config.distill
    return teachers.load_teacher(settings.teacher, config.teachers_network(), settings.teacher_decay)


def demo(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.out
    quiet = free_cores() > 1 and os.getloadavg()[0] < 0.3
    threads = arguments.threads if arguments.threads is not None else 2 if quiet else 1
    common.use_threads(threads)
    config = resolve(None if arguments.resume else "demo", arguments.set, folder, arguments.resume, "distill")
    config = replace(config, run=replace(config.run, threads=threads))
    settings = config.distill
    objective = settings.objective.build()
    print(
        f"Distilling the teacher '{settings.teacher}' into one step with {objective.name} "
        f"(alpha {objective.alpha:g}, beta {objective.beta:g}): {settings.updates} updates of batch "
        f"{settings.batch} on {threads} thread{'s' if threads > 1 else ''}.",
        flush=True,
    )
    file, measure = jobs.train(
        "distill", config, folder, arguments.resume, arguments.overwrite, common.command_line(arguments)
    )
    student, teacher, dataset = teachers.load(file), _model_teacher(config), data.load(config.data)
    count = config.run.evaluate_samples
    table, metric = common.show_table(measure, dataset, teacher, student, count)
    evaluation.write(folder, table, metric, samples=count, updates=settings.updates, **common.context())
    lines = {row.name: row.distances.distance for row in table if row.evaluations in (None, max(evaluation.STEPS))}
    plot_distances(folder, lines, measure.name)
    noise = evaluation_noise(dataset.shape, 100 if len(dataset.shape) == 3 else count)
    samples = evaluation.sampler(student)(noise, *measure.shown(student.net, len(noise)))
    with replacing(folder / "samples.png") as stream:
        save_png(picture(samples), stream)
    print(f"written to {folder}: samples.png, convergence.png, table.md, evaluation.json, {file.name}")
