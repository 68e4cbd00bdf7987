"""The two training jobs from a configuration to a saved network, and the choice of threads."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from .. import data, teachers
from ..errors import UserError
from . import config as configs
from . import distributed, fidelity
from .config import Config
from .distill import Distiller
from .inception import HOW_TO_GET, Inception
from .lock import held
from .loop import Trainer, open_folder, require_run, run
from .measure import Measure
from .regression import RegressionTrainer
from .teacher import TeacherTrainer


def resolve(source: str | None, overrides: list[str], folder: Path, resume: bool, default: str = "digits") -> Config:
    """The configuration of a run, new or resumed.

    A resumed run keeps its own: a configuration given again must agree with it outside the section ``run``, whose
    settings may change.

    Raises:
        UserError: a bad configuration, or one that differs from the run's, with the first key that does.
    """
    if not resume:
        return configs.load(source or default, overrides)
    kept = folder / "config.yaml"
    require_run(folder)
    before, asked = configs.load(kept), configs.load(source or kept, overrides)
    if (key := _difference(configs.to_mapping(before), configs.to_mapping(asked))) is not None:
        raise UserError(f"{key} differs from the run in {folder}: a resumed run keeps all its settings but run.*")
    return asked


def _difference(before: object, asked: object, name: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(asked, dict):
        keys = [key for key in {**before, **asked} if name or key != "run"]
        found = (_difference(before.get(key), asked.get(key), f"{name}.{key}" if name else str(key)) for key in keys)
        return next((key for key in found if key is not None), None)
    return None if before == asked else name


def train(job: str, config: Config, folder: Path, resume: bool, overwrite: bool, command: str) -> tuple[Path, Measure]:
    """Run ``"train-teacher"`` or ``"distill"`` in ``folder``; the saved network's file and the run's measure.

    In a process group (:mod:`.distributed`) all ranks call this; rank 0 alone writes, to a folder that all can read.

    Everything that can be refused is refused before the folder is touched.

    Raises:
        UserError: settings, data, teacher or folder that cannot be used, or settings that are not those of all ranks.
        realuid_fast.train.loop.Interrupted: after SIGINT, SIGTERM or SIGHUP, with everything saved.
    """
    asked = evaluated(job, config)
    # Before anything in which ranks wait for each other: those with other settings would wait for something else.
    distributed.check_alike({"command": job, "--resume": resume, **configs.to_mapping(asked)})
    config = replace(asked, run=replace(asked.run, device=distributed.device(asked.run.device)))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    try:
        torch.empty(0, device=config.run.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"run.device {config.run.device!r} is not a device that torch can use here") from None
    if (device := torch.device(config.run.device)).type == "cuda" and device.index is not None:
        # Events, streams and generators that nobody names a device for are this one's.
        torch.cuda.set_device(device)
    dataset = data.load(config.data)
    trainer: Trainer
    if job == "distill":
        settings = config.distill
        # Named nowhere: where the trainer keeps the teacher in another form, this one goes.
        trainer = distiller(config)(
            config,
            dataset,
            teachers.load_teacher(settings.teacher, config.teachers_network(), settings.teacher_decay, dataset.config),
            command,
        )
    else:
        trainer = TeacherTrainer(config, dataset, command)
    measure = _measure(config, dataset)
    with contextlib.ExitStack() as stack:
        lock = None
        if distributed.rank() == 0:
            lock = stack.enter_context(held(folder))
            open_folder(folder, resume, overwrite)
        distributed.wait()
        try:
            return run(asked, trainer, folder, measure, dataset.shape, resume, lock), measure
        finally:
            if isinstance(trainer, Distiller):
                # NCCL does not end while a graph holds one of its sums.
                trainer.forget_graphs()


def evaluated(job: str, config: Config) -> Config:
    """The configuration with how often ``job`` is evaluated settled in ``run.evaluate_every``.

    Where ``run.inception_only`` and no weights leave nothing to evaluate with, a warning says it.
    """
    run, own = config.run, config.teacher.evaluate_every
    if job == "train-teacher" and own is not None:
        run = replace(run, evaluate_every=own)
    if run.evaluate_every and run.inception_only and not run.inception:
        if distributed.rank() == 0:
            warnings.warn(
                "this run is not evaluated on its way and keeps no best.safetensors: run.inception is not given, and "
                f"run.inception_only allows no other features. Set run.inception=FILE: {HOW_TO_GET}",
                stacklevel=2,
            )
        run = replace(run, evaluate_every=0)
    return replace(config, run=run)


def _measure(config: Config, dataset: data.Dataset) -> Measure:
    """What the run's samples are measured by; rank 0 alone needs the Inception network."""
    if not config.run.inception or distributed.rank():
        return Measure(dataset)
    features = Inception(config.run.inception, config.run.device)
    if config.run.real_split == "heldout":
        return Measure(dataset, features)
    real = fidelity.Fidelity(dataset, features, cache=fidelity.CACHE, progress=config.run.progress).real
    return Measure(dataset, features, real)


def distiller(config: Config) -> type[Distiller] | type[RegressionTrainer]:
    """What trains the student that a configuration asks for."""
    return RegressionTrainer if config.distill.objective.name == configs.REGRESSION else Distiller


def free_cores() -> int:
    """Cores this process may use that nobody is busy on, by the load average of the last minute; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - round(os.getloadavg()[0]))


def with_threads(config: Config, threads: int) -> Config:
    """The configuration with another thread count."""
    return replace(config, run=replace(config.run, threads=threads))
