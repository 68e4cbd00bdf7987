"""The one door from a configuration to objects: networks, optimisers and the trainer that takes them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from .. import precision, teachers
from ..data import Dataset
from ..errors import UserError
from ..evaluate import classifier
from ..matching import Matching
from ..models import pairs
from ..models.few_steps import FewSteps, generator_of
from ..models.files import Description, Model
from ..models.frozen import frozen_view
from ..models.generator import Generator
from ..models.halving import Halving
from ..models.multi_step import MultiStep
from ..models.teacher_step import StepDirection, TeacherStep
from ..networks.calling import null_labels, takes_guidance
from ..networks.critic import Critic
from ..networks.discriminator import Gan, Judged
from ..networks.recompute import recompute
from ..objectives import Objective
from ..optim import Optimiser
from ..settings import REGRESSION, Config, OptimiserConfig, RegressionConfig
from ..train import distributed, modes, sharding
from ..train.distill import TURNS, Distiller
from ..train.moments import MomentTrainer
from ..train.regression import RegressionTrainer
from ..train.teacher import TeacherTrainer
from ..train.trainer import Setup, Trainer
from .networks import fresh, network_for
from .start import model_of_student, named, student_of

_MEASURED = 100  # batches of real data whose gradients give the preconditioner of parameter-moments


def trainer(job: str, config: Config, dataset: Dataset, teacher: Model | None = None, command: str = "") -> Trainer:
    """The trainer of ``"train-teacher"`` or, with a ``teacher``, of ``"distill"``.

    The teacher's network is moved to the device and otherwise left as it is, unless it is sharded.

    Raises:
        UserError: settings, data and teacher that do not go together; the error names the setting.
    """
    if job == "train-teacher" or teacher is None:
        return teacher_trainer(config, dataset, command)
    if config.distill.objective.name == "parameter-moments" and config.distill.states != "data":
        raise UserError("distill.states must be data for parameter-space moment matching, whose states are noised data")
    if config.distill.states == "data":
        return moments(config, dataset, teacher, command)
    made = regression if config.distill.objective.name == REGRESSION else distiller
    return made(config, dataset, teacher, command)


def teacher_trainer(config: Config, dataset: Dataset, command: str = "") -> TeacherTrainer:
    """The trainer of the section ``teacher``, with a fresh network."""
    settings, source = config.teacher, None
    if settings.guided and settings.halved:
        raise UserError("teacher.guided and teacher.halved are two stages: give one of them")
    if file := settings.guided or settings.halved:
        with named(f"teacher.{'guided' if settings.guided else 'halved'}", file):
            source = teachers.load_teacher(file, config.teachers_network(), None, dataset.config)
    described = None if source is None else source.description
    matching = config.teachers_path().build(described)
    network = network_for(config, dataset) if described is None else dict(described.network)
    network |= {"guided": True} if settings.guided else {}
    net = fresh(network, config.run.seed)
    if source is not None:
        # Layers of the scale are new, and start as if there were none.
        net.load_state_dict(source.net.state_dict(), strict=False)
    if config.run.checkpoint_activations:
        recompute(net)
    device = torch.device(config.run.device)
    net = sharding.shard(net, device) if _sharded(config) else _placed(net, config, dataset)
    optimiser = _optimiser(net.train(), settings.optimiser, settings.updates, settings.ema, settings.ema_warmup)
    frozen = None if source is None else _placed(source.net.requires_grad_(False), config, dataset)
    with _named("teacher", settings):
        halving = None
        if settings.halved and frozen is not None:
            halving = Halving(frozen, settings.steps, matching.path, matching.predict, device)
        return TeacherTrainer(
            net, matching, dataset, optimiser, _setup(config, settings.batch, settings.updates),
            label_dropout=settings.label_dropout, reduction=settings.reduction, coupling=settings.coupling,
            source=frozen if halving is None else None, scales=settings.scales, halving=halving, export=settings.export,
            description=Description(
                network=network,
                path=config.path.name or "linear" if described is None else described.path,
                path_settings=dict(config.path.settings if described is None else described.path_settings),
                predict=matching.predict,
                data=dataset.config,
                preprocessing=dataset.preprocessing,
                command=command,
                decay=settings.export,
            ),
        )  # fmt: skip


def distiller(config: Config, dataset: Dataset, teacher: Model, command: str = "") -> Distiller:
    """The trainer of the section ``distill``, with student and fake model from copies of the teacher's network."""
    settings, described, seed = config.distill, teacher.description, config.run.seed
    matching, objective = config.path.build(described), settings.objective.build()
    device, sharded = torch.device(config.run.device), _sharded(config)
    _check(config, dataset, described)
    net = _prepared(teacher.net, config, dataset)
    trained, fake = _copies(net, config, described)
    gan, critic = _gan(config, dataset)
    if gan is not None and critic is None:
        fake = Judged(fake, dataset.shape, seed)
    generator = _generator(trained, config, matching, settings.times)
    if settings.start:
        student = student_of(settings.start, settings.start_decay, described, generator.t_start)
        generator.net.load_state_dict(student.state_dict())
    if sharded:
        sharding.shard(fake, device)
        # A generator keeps its own tables on the device that its network was on when the generator was built.
        generator = _generator(sharding.shard(generator.net, device), config, matching, settings.times)
    teacher_net = _frozen(net, config) if teacher.function is None else teacher.function
    if settings.target_steps > 1:
        with _named("distill", settings):
            teacher_net = _further(teacher_net, config, matching, objective)
    warms_up = not settings.start if settings.ema_warmup is None else settings.ema_warmup
    turns = max(settings.fake_turns * (objective.needs_fake or critic is not None), 1)
    stored = settings.regression
    with _named("distill", settings):
        return Distiller(
            teacher_net, fake, generator, matching, objective, dataset,
            _optimiser(fake, settings.fake, settings.updates * turns),
            _optimiser(generator.net, settings.generator, settings.updates, settings.ema, warms_up),
            _setup(config, settings.batch, settings.updates),
            fake_turns=settings.fake_turns, guidance=settings.guidance, labels=settings.labels, gan=gan,
            critic=critic,
            critic_optimiser=None if critic is None else _optimiser(critic, settings.fake, settings.updates * turns),
            pairs=_pairs(stored),
            turn_matching=config.path.turns(described), divergence=settings.divergence,
            precisions={turn: getattr(settings, f"{turn}_precision") for turn in TURNS},
            export=settings.export, description=_of_student(config, dataset, described, generator, command),
        )  # fmt: skip


def _further(net: nn.Module, config: Config, matching: Matching, objective: Objective) -> MultiStep:
    """The teacher after several steps, for objectives that send no gradient through it."""
    refused = {
        f"distill.objective {objective.name}, which has a fake model": objective.needs_fake,
        f"run.mode {config.run.mode}": config.run.mode != "eager",
        "path.guidance": "guidance" in config.path.turns(),
    }
    for name, given in refused.items():
        if given:
            raise UserError(f"target_steps above 1 are not for {name}")
    return MultiStep(net, config.distill.target_steps, matching.path, matching.predict)


def _pairs(stored: RegressionConfig) -> pairs.Pairs | None:
    if not stored.pairs:
        return None
    with named("distill.regression.pairs", stored.pairs):
        return pairs.Pairs(pairs.read(stored.pairs), stored.weight, pairs.DISTANCES[stored.distance])


def _gan(config: Config, dataset: Dataset) -> tuple[Gan | None, Critic | None]:
    """The discriminator's weights, and its heads where it stands alone."""
    settings = config.distill.gan
    if not settings.weight_fake:
        return None, None
    gan = Gan(settings.weight_fake, settings.weight_generator, settings.least_share, settings.loss)
    if not settings.features:
        return gan, None
    net = classifier.digit_classifier() if settings.features == "digits" else classifier.read(settings.features)[0]
    if net.shape != dataset.shape:
        raise UserError(
            f"distill.gan.features {settings.features} are of images {net.shape}, the data have {dataset.shape}"
        )
    net, like = copy.deepcopy(net).to(config.run.device), torch.zeros(1, *dataset.shape, device=config.run.device)
    return gan, Critic(net.maps, like, config.run.seed, settings.loss, settings.r1)


def moments(config: Config, dataset: Dataset, teacher: Model, command: str = "") -> MomentTrainer:
    """The trainer of the section ``distill`` with ``states: data``."""
    settings, described = config.distill, teacher.description
    refused = {
        "distill.start": bool(settings.start),
        "distill.gan": bool(settings.gan.weight_fake),
        "distill.regression.pairs": bool(settings.regression.pairs),
        "distill.labels batch": settings.labels == "batch",
        "distill.generator_precision fp16": settings.generator_precision == "fp16",
        "distill.fake_precision": settings.fake_precision != settings.generator_precision,
        f"run.mode {config.run.mode}": config.run.mode != "eager",
        "run.shard": config.run.shard,
        "path.fake, path.generator and path.guidance": bool(config.path.turns(described)),
    }
    for name, given in refused.items():
        if given:
            raise UserError(f"{name} is not for distill.states data")
    if settings.objective.name == REGRESSION:
        raise UserError("distill.states data needs an objective such as moment-matching, not regression")
    _check(config, dataset, described)
    matching = config.path.build(described)
    net = _prepared(teacher.net, config, dataset)
    trained, fake = _copies(net, config, described)
    generator = _generator(trained, config, matching, settings.times)
    if instant := settings.objective.name == "parameter-moments":
        _check_instant(config, teacher)
        fake = TeacherStep(copy.deepcopy(net).eval().requires_grad_(True))
        fake_optimiser: Optimiser = StepDirection(fake)
    else:
        fake_optimiser = _optimiser(fake, settings.fake, settings.updates * settings.fake_turns)
    with _named("distill", settings):
        made = MomentTrainer(
            _frozen(net, config) if teacher.function is None else teacher.function, fake, generator, matching,
            settings.objective.build(), dataset, fake_optimiser,
            _optimiser(generator.net, settings.generator, settings.updates, settings.ema),
            _setup(config, settings.batch, settings.updates),
            fake_turns=settings.fake_turns, guidance=settings.guidance, precision=settings.generator_precision,
            export=settings.export, description=_of_student(config, dataset, described, generator, command),
        )  # fmt: skip
    if instant and isinstance(fake_optimiser, StepDirection):
        fake_optimiser.measure_first(lambda: made.turn_backward("real"), _MEASURED, made.parts)
    return made


def _check_instant(config: Config, teacher: Model) -> None:
    """Refuse what moment matching in parameter space has no meaning for."""
    settings = config.distill
    refused = {
        "distill.fake_turns, which must be 1,": settings.fake_turns != 1,
        "distill.guidance": settings.guidance != 1.0,
        "distill.fake_start fresh": settings.fake_start == "fresh",
        "distill.teacher_precision bf16": settings.teacher_precision == "bf16",
        "a teacher that is a function": teacher.function is not None,
    }
    for name, given in refused.items():
        if given:
            raise UserError(f"{name} is not for distill.objective parameter-moments")


def regression(config: Config, dataset: Dataset, teacher: Model, command: str = "") -> RegressionTrainer:
    """The trainer of the section ``distill`` for the objective ``regression``."""
    settings, described = config.distill, teacher.description
    several = bool(settings.times or settings.steps)
    refused = {
        "distill.states noised": settings.states == "noised",
        "distill.start": bool(settings.start),
        "distill.gan": bool(settings.gan.weight_fake),
        "distill.regression.pairs": bool(settings.regression.pairs),
        "distill.generator_precision fp16": settings.generator_precision == "fp16",
        f"run.mode {config.run.mode}": config.run.mode != "eager" if several else modes.captures(config.run.mode),
        "distill.regression.solver edm with several steps": several and settings.regression.solver == "edm",
        "distill.regression.previous with several steps": several and bool(settings.regression.previous),
    }
    for name, given in refused.items():
        if given:
            raise UserError(f"{name} is not for distill.objective regression")
    _check(config, dataset, described)
    matching = config.path.build(described)
    first = _first_stage(config, described)
    source = first or teacher
    net = _prepared(source.net, config, dataset)
    trained, network = copy.deepcopy(net), dict(source.description.network)
    if len(settings.steps) > 1 and not takes_guidance(net):
        # The layers of the number of steps are new, and start as if there were none.
        network["guided"] = True
        trained = _placed(fresh(network, config.run.seed), config, dataset)
        trained.load_state_dict(net.state_dict(), strict=False)
    trained = trained.train().requires_grad_(True)
    turns = sum(settings.steps) / len(settings.steps) if settings.steps else 1 + len(settings.times)
    with _named("distill", settings):
        generator: Generator | FewSteps = _generator(trained, config, matching)
        if several:
            of_path = settings.t_start, matching.path, matching.predict, settings.times
            generator = FewSteps(trained, settings.steps, *of_path)
        distance: pairs.Distance = pairs.DISTANCES[settings.regression.distance]
        if file := settings.regression.previous:
            before = student_of(file, None, described, generator.t_start, "distill.regression.previous")
            generator.net.load_state_dict(before.state_dict())
            before = _placed(before.eval().requires_grad_(False), config, dataset)
            distance = pairs.Contrast(generator.on(before), distance)
        frozen = frozen_view(net).eval() if source.function is None else source.function
        return RegressionTrainer(
            frozen if first is None else generator_of(frozen, first.description), generator, matching, dataset,
            _optimiser(generator.net, settings.generator, int(settings.updates * turns), settings.ema),
            _setup(config, settings.batch, settings.updates),
            steps=settings.regression.steps, solver=settings.regression.solver, guidance=settings.guidance,
            distance=distance, precision=settings.generator_precision,
            export=settings.export,
            description=_of_student(config, dataset, replace(described, network=network), generator, command),
        )  # fmt: skip


def _first_stage(config: Config, teacher: Description) -> Model | None:
    """The student of several steps that a second stage learns from; None without one."""
    settings, name = config.distill, "distill.regression.first_stage"
    if not (file := settings.regression.first_stage):
        return None
    refused = {
        "distill.regression.previous": bool(settings.regression.previous),
        "distill.guidance": settings.guidance != 1.0,
        "distill.regression.solver": settings.regression.solver != "euler",
    }
    for other, given in refused.items():
        if given:
            raise UserError(f"{other} is not for a run with {name}, which makes DDIM steps as they were trained")
    first = model_of_student(file, name)
    if not first.description.steps:
        raise UserError(f"{name} {file} is a student of one step; it must be one of several (distill.steps)")
    theirs, ours = (
        {key: getattr(each, key) for key in ("path", "path_settings", "predict")}
        | {key: each.network.get(key) for key in ("dim", "shape", "num_classes")}
        for each in (first.description, teacher)
    )
    for key, value in theirs.items():
        if value != ours[key]:
            raise UserError(f"{name} {file} has {key} {value}, the teacher has {ours[key]}")
    return first


def _copies(net: nn.Module, config: Config, described: Description) -> tuple[nn.Module, nn.Module]:
    """The networks that are trained: the generator's, a copy of the teacher's, and the fake model's."""
    settings = config.distill
    trained = copy.deepcopy(net).train().requires_grad_(True)
    if settings.dropout is not None:
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
    fake: nn.Module = copy.deepcopy(trained)
    if settings.fake_start == "fresh":
        if not described.network:
            raise UserError("distill.fake_start fresh needs a teacher that says which network it is")
        fake.load_state_dict(fresh(described.network, config.run.seed).state_dict())
    return trained, fake


@contextlib.contextmanager
def _named(section: str, settings: Any) -> Iterator[None]:
    """Put the section in front of an error that begins with one of its settings: trainers know no sections."""
    try:
        yield
    except UserError as error:
        first = str(error).partition(" ")[0].partition(".")[0]
        if first in {field.name for field in fields(settings)}:
            raise UserError(f"{section}.{error}") from None
        raise


def _setup(config: Config, batch: int, updates: int) -> Setup:
    run = config.run
    of_run = run.accumulate, run.seed, run.mode, run.channels_last, run.timings
    return Setup(batch, updates, *of_run, config.distill.shared_draws)


def _sharded(config: Config) -> bool:
    return config.run.shard and distributed.size() > 1


def _placed(net: nn.Module, config: Config, dataset: Dataset) -> nn.Module:
    """``net`` on the device, in the memory layout of images."""
    net = net.to(torch.device(config.run.device))
    layout = _setup(config, 1, 1).layout(dataset.shape)
    return net.to(memory_format=layout) if len(dataset.shape) == 3 else net  # type: ignore[call-overload]


def _prepared(net: nn.Module, config: Config, dataset: Dataset) -> nn.Module:
    """The teacher's network as student and fake model are copied from it."""
    if not _sharded(config):
        net = _placed(net, config, dataset)
    if config.distill.guidance != 1.0 and not takes_guidance(net):
        null_labels(net, torch.zeros(0, dtype=torch.int64))
    if config.run.checkpoint_activations:
        recompute(net)
    return net


def _frozen(net: nn.Module, config: Config) -> nn.Module:
    """The frozen teacher. It shares the memory of ``net``, unless it is rounded, sharded or offloaded."""
    rounded, offload, sharded = config.distill.teacher_precision == "bf16", config.run.offload_teacher, _sharded(config)
    if not (rounded or sharded or offload):
        return frozen_view(net).eval()
    net = copy.deepcopy(net).requires_grad_(False).eval()
    if rounded:
        precision.round_weights(net)
    return sharding.shard(net, torch.device(config.run.device), offload) if sharded or offload else net


def _generator(net: nn.Module, config: Config, matching: Matching, times: tuple[float, ...] = ()) -> Generator:
    states = config.distill.states
    given = net, config.distill.t_start, matching.path, matching.predict, times
    return Generator(*given, ancestral=states == "data", noised=states == "noised")


def _optimiser(
    net: nn.Module, settings: OptimiserConfig, total: int, ema: tuple[float, ...] = (), ema_warmup: bool = True
) -> Optimiser:
    return Optimiser(net, **vars(settings), ema_decays=ema, total=total, ema_warmup=ema_warmup)


def _of_student(
    config: Config, dataset: Dataset, teacher: Description, generator: Generator | FewSteps, command: str
) -> Description:
    return Description(
        network=teacher.network,
        role="student",
        path=teacher.path,
        path_settings=teacher.path_settings,
        predict=teacher.predict,
        data=dataset.config,
        preprocessing=dataset.preprocessing,
        command=command,
        t_start=generator.t_start,
        times=generator.times,
        steps=generator.numbers,
        ancestral=generator.ancestral,
        teacher=config.distill.teacher,
        decay=config.distill.export,
    )


def _check(config: Config, dataset: Dataset, teacher: Description) -> None:
    """Refuse a teacher of other samples than the data's, and a mode or a precision that does not run on the device."""
    sample = teacher.network.get("dim", teacher.network.get("shape"))
    if sample is not None and tuple(sample) != dataset.shape:
        raise UserError(
            f"the teacher makes samples of shape {tuple(sample)}, data set '{dataset.name}' has {dataset.shape}"
        )
    device, settings = torch.device(config.run.device), config.distill
    asked = [("run.mode", config.run.mode, modes.why_not(config.run.mode, device))]
    for turn in TURNS:
        name = getattr(settings, f"{turn}_precision")
        asked.append((f"distill.{turn}_precision", name, precision.why_not(name, device)))
    for key, value, reason in asked:
        if reason is not None:
            raise UserError(f"{key} {value} does not run on {device}: {reason}")
