"""The two training jobs from a configuration to a saved network, and the choice of threads."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import data, teachers
from ..errors import UserError
from ..evaluate import fidelity
from ..evaluate.inception import HOW_TO_GET, Inception
from ..evaluate.measure import Measure
from ..lock import held
from ..precision import Precision, in_words, why_not
from ..settings import REGRESSION, Config
from ..train import distributed
from ..train.checkpoint import files as checkpoints_in
from ..train.folder import open_folder, require_run, role_of
from ..train.loop import run
from . import config as configs
from . import trainers
from .alike import check_alike
from .start import dataset_of, named

# A warm-up longer than a run divided by this number was more likely meant for a longer run.
WARMUP_SHARE = 5
ROLES = {"train-teacher": "teacher", "distill": "student"}  # of what each job trains


def resolve(source: str | None, overrides: list[str], folder: Path, resume: bool, job: str | None = None) -> Config:
    """The configuration of a run, new or resumed.

    A resumed run keeps its own configuration. One that is given again must agree with it, except for the section
    ``run``, whose settings may change, and for ``teacher.updates`` and ``distill.updates``, which may be any number
    from the newest checkpoint's on: the run then ends earlier, or goes on beyond its end. From there on a decay of the
    learning rate is that of a run of this length. So only with a constant rate does the run become the one that as many
    updates from the beginning give.

    Raises:
        UserError: the configuration is bad, or differs from the run's, with the first key that differs; or the folder
            holds a run of another ``job``.
    """
    if not resume:
        return configs.load(source or "digits", overrides)
    kept = folder / "config.yaml"
    require_run(folder)
    if job is not None and role_of(folder) not in (None, ROLES[job]):
        other = next(name for name in ROLES if name != job)
        raise UserError(f"{folder} is a run of {other}, not of {job}")
    before = configs.load_kept(kept)
    asked = configs.load(source, overrides) if source else configs.load_kept(kept, overrides)
    for section in ("teacher", "distill"):
        before = _of_length(before, asked, section, folder)
    was, wanted = configs.to_mapping(before), configs.to_mapping(asked)
    if job == "distill" and not _describes_no_network(before):
        # The run has its teacher's network, see _written.
        del was["network"], wanted["network"]
    if (key := _difference(was, wanted)) is not None:
        raise UserError(f"{key} differs from the run in {folder}: a resumed run keeps all its settings but run.*")
    return asked


def _of_length(before: Config, asked: Config, section: str, folder: Path) -> Config:
    """The run's own configuration, with the number of updates asked for, which its checkpoints may not be beyond."""
    own, wanted = getattr(before, section), getattr(asked, section).updates
    made = max((int(file.stem.removeprefix("update-")) for file in checkpoints_in(folder / "checkpoints")), default=0)
    if wanted < own.updates and (not made or wanted < made):
        till = f", or ended from its checkpoint's update {made} on" if made else ""
        raise UserError(
            f"{section}.updates {wanted} differs from the run's {own.updates}: a run can only be extended{till}"
        )
    # A run that ends where it is makes no update more.
    if wanted not in (own.updates, made):
        steps = [own.optimiser] if section == "teacher" else [own.generator, own.fake]
        if any(step.decay != "constant" for step in steps):
            moves = "goes up again" if wanted > own.updates else "goes down"
            warnings.warn(
                f"{section}.updates goes from {own.updates} to {wanted}: the learning rate now falls over {wanted} "
                f"updates, and so {moves} where the run goes on",
                stacklevel=3,
            )
    return replace(before, **{section: replace(own, updates=wanted)})


def usable_device(argument: str, name: str) -> torch.device:
    """The device ``name``. ``argument`` is the setting or option that it came from, for the error.

    Raises:
        UserError: torch cannot use the device here, or the device computes nothing (``meta``).
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        device = None
    if device is None or device.type == "meta":
        raise UserError(f"{argument} {name!r} is not a device that torch can use here")
    return device


def usable_precision(argument: str, name: str, device: torch.device) -> Precision:
    """The precision ``name`` on a device. ``argument`` is the setting or option that it came from, for the error.

    Raises:
        UserError: the device does not compute in it.
    """
    if (reason := why_not(name, device)) is not None:
        raise UserError(f"{argument} {name} does not run on {device}: {reason}")
    return Precision(name, device)


def warn_of_warmup(job: str, config: Config) -> None:
    """Warn if the learning rate still rises during more than a fifth of a run's steps."""
    if job == "train-teacher":
        optimisers = [("teacher.optimiser", config.teacher.optimiser, config.teacher.updates)]
    else:
        updates, turns = config.distill.updates, config.distill.fake_turns
        optimisers = [("distill.generator", config.distill.generator, updates)]
        # Neither trajectory regression nor moment matching in parameter space trains a fake model. Without one this
        # optimiser trains the discriminator that stands alone.
        objective = config.distill.objective
        with warnings.catch_warnings(action="ignore"):  # the trainer has given the objective's own warnings
            trains = objective.name != REGRESSION and (config.distill.gan.features or objective.build().needs_fake)
        if trains and objective.name != "parameter-moments":
            optimisers += [("distill.fake", config.distill.fake, updates * turns)]
    for name, optimiser, steps in optimisers:
        if optimiser.warmup * WARMUP_SHARE > steps:
            warnings.warn(
                f"{name}.warmup {optimiser.warmup} is long for a run of {steps} steps: the learning rate rises for "
                f"{min(1.0, optimiser.warmup / steps):.0%} of the run, to {min(1.0, steps / optimiser.warmup):.0%} of "
                f"{name}.lr. For a short trial set {name}.warmup={steps // 20}",
                stacklevel=3,
            )


def _difference(before: object, asked: object, name: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(asked, dict):
        keys = [key for key in {**before, **asked} if name or key != "run"]
        found = (_difference(before.get(key), asked.get(key), f"{name}.{key}" if name else str(key)) for key in keys)
        return next((key for key in found if key is not None), None)
    return None if before == asked else name


def train(job: str, config: Config, folder: Path, resume: bool, overwrite: bool, command: str) -> tuple[Path, Measure]:
    """Run ``"train-teacher"`` or ``"distill"`` in ``folder``; the saved network's file and the run's measure.

    In a process group (:mod:`.distributed`) all ranks call this. Rank 0 alone writes, to a folder that all can read.

    Settings, data and teacher are checked before the folder is touched.

    Raises:
        UserError: settings, data, teacher or folder cannot be used, or the ranks' settings differ.
        realuid_fast.train.hooks.Interrupted: after SIGINT, SIGTERM or SIGHUP, with everything saved.
    """
    asked = evaluated(job, config)
    # The first thing that ranks wait for. With different settings they would later wait for different things.
    check_alike({"command": job, "--resume": resume, **configs.to_mapping(asked)})
    config = replace(asked, run=replace(asked.run, device=distributed.device(asked.run.device)))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if config.run.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    device = usable_device("run.device", config.run.device)
    if device.type == "cuda" and device.index is not None:
        # Make it the default for events, streams and generators that are created without a device.
        torch.cuda.set_device(device)
    usable_precision("run.evaluate_precision", config.run.evaluate_precision, device)
    dataset = dataset_of(config.data)
    # No local name keeps the teacher alive: the trainer may have its own copy (offloaded or in bf16), and two would
    # not fit.
    trainer = trainers.trainer(job, config, dataset, _teacher(config, dataset) if job == "distill" else None, command)
    measure = _measure(config, dataset)
    measure.name += in_words(config.run.evaluate_precision)
    if distributed.rank() == 0:
        warn_of_warmup(job, config)
    with contextlib.ExitStack() as stack:
        lock = None
        if distributed.rank() == 0:
            lock = stack.enter_context(held(folder))
            open_folder(folder, resume, overwrite)
        distributed.wait()
        try:
            content = _written(job, asked, trainer.description.network)
            return run(trainer, folder, measure, dataset.shape, asked.run, content, resume, lock), measure
        finally:
            # NCCL cannot be shut down while a CUDA graph holds one of its reductions.
            trainer.forget_graphs()


def _describes_no_network(config: Config) -> bool:
    """Whether the teacher is a published checkpoint, which is read by the configured network."""
    return Path(config.distill.teacher).suffix in teachers.CHECKPOINTS


def _written(job: str, config: Config, network: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.yaml``: the configuration, in ``distill`` with the network that the teacher describes.

    If the configuration says otherwise, a warning names what is not taken.
    """
    content = configs.to_mapping(config)
    if job != "distill" or _describes_no_network(config) or not network:
        return content
    own, given = configs.as_plain(network), content["network"]
    alike = given.get("kind", own.get("kind")) == own.get("kind")
    keys = [key for key in given if key in own] if alike else ["kind"]
    other = [f"network.{key} is {own[key]}, not {given[key]}" for key in keys if given[key] != own[key]]
    if other and distributed.rank() == 0:
        warnings.warn(f"the student has the network of its teacher: {'; '.join(other)}", stacklevel=3)
    return content | {"network": own}


def _teacher(config: Config, dataset: data.Dataset) -> teachers.Model:
    settings = config.distill
    with named("distill.teacher", settings.teacher):
        return teachers.load_teacher(
            settings.teacher, config.teachers_network(), settings.teacher_decay, dataset.config
        )


def evaluated(job: str, config: Config) -> Config:
    """The configuration with ``run.evaluate_every`` set to how often ``job`` evaluates.

    With ``run.inception_only`` and no Inception weights a run cannot be evaluated. Then the number is 0, with a
    warning.
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
    """The distances of the run's samples. Rank 0 alone needs the Inception network."""
    if not config.run.inception or distributed.rank():
        return Measure(dataset, classifier=config.run.classifier)
    features = Inception(config.run.inception, config.run.device)
    if config.run.real_split == "heldout":
        return Measure(dataset, features)
    real = fidelity.Fidelity(dataset, features, cache=fidelity.CACHE, progress=config.run.progress).real
    return Measure(dataset, features, real)


def free_cores() -> int:
    """Cores that this process may use and that are idle by the load average of the last minute; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - round(os.getloadavg()[0]))
