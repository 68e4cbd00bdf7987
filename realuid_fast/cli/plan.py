"""Predicts what a run takes without running it: networks, memory by purpose, operations by turn, measured hours.

Parameters, activations and operations are counted, on this machine's CPU or on tensors without memory. Hours are given
only if updates of this very configuration could be timed on its device. Neither the data nor the teacher need to exist:
the plan names what is missing, and images and networks of the configured shape stand in for it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import choices, data, networks, teachers
from ..data import Dataset, folders
from ..errors import UserError
from ..jobs import trainers
from ..jobs.networks import network_for
from ..jobs.train import usable_device
from ..models.calls import needs_endpoint
from ..models.files import SHIPPED, Description, Model
from ..models.solvers import evaluations
from ..models.teacher_step import TeacherStep
from ..precision import Precision
from ..settings import REGRESSION, Config
from ..train import distributed
from ..train.trainer import Trainer
from . import counts, timing

STEPS = choices.PLAN_STEPS
CPU = counts.CPU


@dataclass(frozen=True)
class Plan:
    """``parameters`` by network; ``memory`` in bytes by purpose; ``operations`` of an update by turn, two for each
    multiply-add; ``missing`` in sentences. If ``measured`` and ``hours`` are None, ``unmeasured`` says why.

    Memory is that of one rank's device; batch and operations are those of all ``ranks`` together. A discriminator's
    head counts with its parameters alone. A state that ``run.shard`` spreads counts with one rank's share, and a
    teacher in host memory does not count. Both add twice the largest block of a network: a block is gathered on the
    device while it is used, and the next one is fetched meanwhile.
    """

    job: str
    parameters: dict[str, int]
    memory: dict[str, int]
    batch: int
    updates: int
    images_per_update: int
    operations: dict[str, int]
    missing: list[str] = field(default_factory=list)
    measured: timing.Measured | None = None
    unmeasured: str = ""
    hours: float | None = None
    device: str = "cpu"
    ranks: int = 1

    def as_dict(self) -> dict[str, Any]:
        """All fields and their totals, in types that JSON can hold."""
        totals = {
            "memory_total": sum(self.memory.values()),
            "operations_total": sum(self.operations.values()),
            "images": self.images_per_update * self.updates,
        }
        return asdict(self) | totals


def make(job: str, config: Config, steps: int = STEPS, bound: float = timing.BOUND, ranks: int = 1) -> Plan:
    """The plan of ``"train-teacher"`` or ``"distill"`` on ``ranks``. On one rank ``steps`` updates are timed.

    If that many updates do not fit into the free memory or into ``bound`` seconds, the batch is halved until they do,
    down to one sample, and then fewer updates are timed. Hours are computed as if time grew in proportion to the batch.

    Raises:
        UserError: a run would refuse the settings too, or they do not say the samples' shape.
    """
    if steps < 0:
        raise UserError(f"--measure must not be negative, got {steps}")
    if ranks < 1:
        raise UserError(f"--ranks must be at least 1, got {ranks}")
    batch = config.distill.batch if job == "distill" else config.teacher.batch
    if ranks > 1 and batch % (ranks * config.run.accumulate):
        raise UserError(f"batch {batch} does not divide by {ranks} ranks times run.accumulate {config.run.accumulate}")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    missing: list[str] = []
    dataset = _dataset(config, missing)
    if job == "distill":
        model, config = _teacher(config, dataset, missing), _from_the_teacher(config, missing)
        if needs_endpoint(model.net, config.path.build(model.description).path) and dataset.train_endpoints is None:
            dataset = replace(dataset, train_endpoints=dataset.pixels(), heldout_endpoints=dataset.pixels())
        made = _moments if config.distill.states == "data" else _distillation
        made = _regression if config.distill.objective.name == REGRESSION else made
        plan = made(config, dataset, model, ranks)
    else:
        if (file := config.teacher.guided or config.teacher.halved) and not Path(file).exists():
            missing.append(f"the teacher's own {file} is not there: the plan leaves its two passes out")
            config = replace(config, teacher=replace(config.teacher, guided="", halved=""))
        if _endpoints_needed(config, dataset):
            dataset = replace(dataset, train_endpoints=dataset.pixels(), heldout_endpoints=dataset.pixels())
        model, plan = None, _teaching(config, dataset, ranks)
    plan = replace(plan, missing=missing, ranks=ranks)
    if not steps or ranks > 1:
        return replace(plan, unmeasured="updates are timed on one rank alone" if steps else "not asked for")
    return _with_hours(plan, config, dataset, model, steps, bound)


def markdown(plan: Plan) -> str:
    """The plan as tables."""
    names = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in plan.parameters.items())
    lines = [f"{plan.job}: {names} parameters"]
    lines += [f"missing: {sentence}" for sentence in plan.missing]
    lines += ["", f"| memory{f' of each of {plan.ranks} ranks' if plan.ranks > 1 else ''} | MB |", "|---|---:|"]
    lines += [f"| {name} | {size / 1e6:,.1f} |" for name, size in plan.memory.items()]
    lines += [f"| **all** | {sum(plan.memory.values()) / 1e6:,.1f} |"]
    lines += ["", "| an update | operations, G |", "|---|---:|"]
    lines += [f"| {name} | {count / 1e9:,.3g} |" for name, count in plan.operations.items()]
    lines += [f"| **all** | {sum(plan.operations.values()) / 1e9:,.3g} |", ""]
    total = plan.images_per_update * plan.updates
    lines.append(
        f"{plan.updates:,} updates of batch {plan.batch:,}: {plan.images_per_update:,} images each, {total:,} in all"
    )
    if plan.measured is None:
        lines.append(f"no hours: {plan.unmeasured}")
    else:
        found = plan.measured
        speed = sum(plan.operations.values()) * found.batch / plan.batch / found.seconds / 1e9
        lines.append(
            f"measured on {plan.device}: {found.updates} updates of batch {found.batch}, {found.seconds:.3g} s each "
            f"(median), {speed:,.3g} G operations a second" + (f"; {found.remark}" if found.remark else "")
        )
        lines.append(f"predicted: {plan.hours:,.3g} hours")
    return "\n".join(lines)


def _dataset(config: Config, missing: list[str]) -> Dataset:
    """Stand-in images of the configured shape. The data themselves are loaded only if nothing else says the shape."""
    network, source = config.network, config.data
    shape = network.get("dim", network.get("shape"))
    if shape is None and source.get("name") == "folder":
        shape = (source.get("channels", 3), *[source.get("size", 32)] * 2)
    if shape is None and source.get("name") == "cifar10":
        shape = (3, 32, 32)
    if shape is None and source.get("name") == "idx":
        shape = (source.get("channels", 1), *[source.get("size") or 28] * 2)
    if (path := source.get("path")) is not None and not Path(path).exists():
        missing.append(f"data.path {path} is not there")
    if shape is None:
        return data.load(source)
    classes = int(network.get("num_classes", 10 if source.get("name") in ("cifar10", "idx") else 0))
    if network.get("class_cond") and not classes:
        if path is not None and Path(path).is_dir() and source.get("labels", True):
            classes = len(folders.layout(folders.images_in(Path(path))).classes)
        else:
            missing.append("the number of classes is not known without the data: 10 are assumed")
            classes = 10
    batch = max(config.teacher.batch, config.distill.batch)
    draws = torch.Generator().manual_seed(0)
    if len(shape) == 3:
        samples = torch.randint(256, (batch, *shape), dtype=torch.uint8, generator=draws)
    else:
        samples = torch.randn(batch, *shape, generator=draws)
    # The last row has the last class, whatever the batch, because the number of classes follows from the largest label.
    labels = classes - 1 - torch.arange(batch).flip(0) % classes if classes else None
    return Dataset(str(source.get("name")), samples, samples, labels, labels, config=dict(source))


def _teacher(config: Config, dataset: Dataset, missing: list[str]) -> Model:
    """The teacher, or an untrained network in its place if its file does not exist."""
    settings, network = config.distill, config.teachers_network()
    if settings.teacher in SHIPPED or Path(settings.teacher).exists():
        return teachers.load_teacher(settings.teacher, network, settings.teacher_decay, dataset.config)
    if not network:
        raise UserError(f"the teacher {settings.teacher!r} is not there, and no section network says what it is")
    missing.append(f"distill.teacher {settings.teacher} is not there")
    network = network_for(replace(config, network=network), dataset)
    path = config.path
    described = Description(
        network, path=path.name or "linear", path_settings=path.settings, predict=path.predict or "velocity"
    )
    return Model(networks.build(network).eval(), described)


def _from_the_teacher(config: Config, missing: list[str]) -> Config:
    """The configuration without a ``distill.start`` that does not exist: starting from the teacher costs as much."""
    if not config.distill.start or Path(config.distill.start).exists():
        return config
    missing.append(f"distill.start {config.distill.start} is not there")
    return replace(config, distill=replace(config.distill, start=""))


def _endpoints_needed(config: Config, dataset: Dataset) -> bool:
    network = network_for(config, dataset)
    with torch.device("meta"):
        net = networks.build(network)
    return dataset.train_endpoints is None and needs_endpoint(net, config.teachers_path().build().path)


def _teaching(config: Config, dataset: Dataset, ranks: int) -> Plan:
    settings = config.teacher
    counted = trainers.teacher_trainer(_to_count(config, settings.batch), dataset)
    pixels, batch, net = 4 * math.prod(dataset.shape), settings.batch, counted.net
    rows = batch // (ranks * config.run.accumulate)
    size = counts.count(net)
    share = ranks if config.run.shard else 1
    operations = counts.operations(counted.description.network, config.run.checkpoint_activations)
    return Plan(
        job="train-teacher",
        parameters={"network": size},
        memory={
            **counts.shared(
                {"parameters": 4 * size, **counts.kept([(size, settings.optimiser.betas[0], settings.ema)])}, share
            ),
            **counts.together([net] if share > 1 else []),
            "activations of the backward pass": counts.activations(net, dataset.shape, rows, config.run.device),
            "batch buffers": 2 * rows * pixels,
        },
        batch=batch,
        updates=settings.updates,
        images_per_update=batch,
        operations={"forward and backward": batch * operations.training},
    )


def _distillation(config: Config, dataset: Dataset, model: Model, ranks: int) -> Plan:
    settings = config.distill
    counted = trainers.distiller(_to_count(config, settings.batch), dataset, model)
    objective, turns = counted.objective, counted.turns
    steps = 1 if counted.generator.noised else counted.generator.steps
    size = counts.count(model.net)
    parameters = {"teacher": size, "generator": counts.count(counted.generator.net)}
    trained = [(parameters["generator"], settings.generator.betas[0], settings.ema)]
    fakes = objective.needs_fake
    heads = {"fake model": counted.judged} if fakes else {}
    for name, net in (heads | ({} if counted.critic is None else {"discriminator": counted.critic})).items():
        parameters[name] = counts.count(net)
        trained.append((parameters[name], settings.fake.betas[0], ()))

    batch, asked = settings.batch, settings.target_steps * (1 if settings.guidance == 1.0 else 2)
    a_pass = batch // (ranks * config.run.accumulate)
    rows, twice = 1 + counted.takes_real, bool(settings.regression.pairs)
    backward = objective.flows == "all"
    judged = counted.gan is not None and counted.critic is None and counted.gan.weight_generator > 0
    fake_kept, shape, device = 0, dataset.shape, config.run.device
    with Precision(settings.fake_precision, CPU).networks():
        if fakes:
            fake_kept = counts.activations(counted.judged, shape, rows * a_pass, device)
    with Precision(settings.generator_precision, CPU).networks():
        generator_kept = counts.activations(counted.generator.net, shape, a_pass, device)
        if fakes and (backward or judged):
            generator_kept += counts.activations(counted.frozen_fake, shape, a_pass, device, to_input=True)
        if backward:
            rounded = settings.teacher_precision != "float32"
            own = Precision(settings.teacher_precision, CPU).networks() if rounded else contextlib.nullcontext()
            with own:
                generator_kept += counts.activations(counted.teacher, shape, asked * a_pass, device, to_input=True)
    turn = "fake" if fake_kept > generator_kept else "generator"
    made = turns * batch
    share = ranks if config.run.shard else 1
    state = {"parameters": 4 * sum(count for count, *_ in trained), **counts.kept(trained)}
    if not config.run.offload_teacher:
        state["teacher"] = counts.weights(counted.teacher)
    gathered = [counted.generator.net] if share > 1 else [counted.teacher] if config.run.offload_teacher else []
    # Rows of one fake turn; noise and samples of all fake turns; noise, samples and interpolants of the generator turn.
    buffers = rows * a_pass + 2 * made // ranks + (3 + 3 * twice) * a_pass

    one = counts.operations(model.description.network, config.run.checkpoint_activations)
    frozen = asked * (one.input if backward else one.forward)
    frozen += fakes * (one.input if backward or judged else one.forward)
    operations = {"samples for the fake turns": made * steps * one.forward} if turns else {}
    if fakes:
        each = one.training + (asked * one.forward if objective.needs_teacher else 0)
        operations[f"fake turns ({settings.fake_turns})"] = made * rows * each
    operations["generator turn"] = batch * ((1 + twice) * one.training + (steps - 1) * one.forward + frozen)
    return Plan(
        job="distill",
        parameters=parameters,
        memory={
            **counts.shared(state, share),
            **counts.together(gathered),
            f"activations of the {turn} turn, the largest": max(fake_kept, generator_kept),
            "batch buffers": 4 * math.prod(shape) * buffers,
        },
        batch=batch,
        updates=settings.updates,
        images_per_update=batch * (turns * rows + 1),
        operations=operations,
    )


def _moments(config: Config, dataset: Dataset, model: Model, ranks: int) -> Plan:
    """Moment matching in several steps, or in parameter space, whose first update's preparation is left out."""
    settings = config.distill
    counted = trainers.moments(_to_count(config, settings.batch), dataset, model)
    net, shape, device = counted.generator.net, dataset.shape, config.run.device
    batch, a_pass = settings.batch, settings.batch // (ranks * config.run.accumulate)
    instant = isinstance(counted.fake, TeacherStep)
    parameters = {"teacher": counts.count(model.net), "generator": counts.count(net)}
    size = parameters["the teacher's step" if instant else "fake model"] = counts.count(counted.fake)
    # A step of the teacher keeps second moments alone, and its direction beside them.
    fakes = (size, 0.0 if instant else settings.fake.betas[0], ())
    trained = [(parameters["generator"], settings.generator.betas[0], settings.ema), fakes]
    with Precision(settings.generator_precision, CPU).networks():
        fake_kept = counts.activations(counted.fake, shape, a_pass, device)
        generator_kept = counts.activations(net, shape, a_pass, device)
        if instant:
            generator_kept += counts.activations(counts.Moved(copy.deepcopy(model.net)), shape, a_pass, device)
    turn = "fake" if fake_kept > generator_kept else "generator"
    one = counts.operations(model.description.network, config.run.checkpoint_activations)
    asked = batch * one.forward * (1 if settings.guidance == 1.0 else 2)
    further = counts.moved(model.description.network) if instant else one.forward
    return Plan(
        job="distill",
        parameters=parameters,
        memory={
            "parameters": 4 * sum(count for count, *_ in trained),
            **counts.kept(trained),
            **({"direction of the teacher's step": 4 * size} if instant else {}),
            "teacher": 0 if config.run.offload_teacher else counts.weights(counted.teacher),
            **counts.together([counted.teacher] if config.run.offload_teacher else []),
            f"activations of the {turn} turn, the largest": max(fake_kept, generator_kept),
            # Real samples, noised ones, the generator's, those of the posterior, and two predictions.
            "batch buffers": 6 * a_pass * 4 * math.prod(shape),
        },
        batch=batch,
        updates=settings.updates,
        images_per_update=batch * (settings.fake_turns + 1),
        operations={
            f"fake turns ({settings.fake_turns})": settings.fake_turns * (batch * (one.forward + one.training) + asked),
            "generator turn": batch * (one.training + further) + asked,
        },
    )


def _regression(config: Config, dataset: Dataset, model: Model, ranks: int) -> Plan:
    settings = config.distill
    counted = trainers.regression(_to_count(config, settings.batch), dataset, model)
    batch, a_pass, net = settings.batch, settings.batch // (ranks * config.run.accumulate), counted.generator.net
    size = counts.count(net)
    with Precision(settings.generator_precision, CPU).networks():
        activations = counts.activations(net, dataset.shape, a_pass, config.run.device)
    one = counts.operations(model.description.network, config.run.checkpoint_activations)
    flow, how = config.path.build(model.description), settings.regression
    made = batch * sum(counted.numbers) // len(counted.numbers)
    asked = evaluations(how.steps, how.solver, flow.path, flow.predict) * (1 if settings.guidance == 1.0 else 2)
    asked += bool(how.previous)
    return Plan(
        job="distill",
        parameters={"teacher": counts.count(model.net), "generator": size},
        memory={
            "parameters": 4 * size,
            **({"earlier student": 4 * size} if how.previous else {}),
            **counts.kept([(size, settings.generator.betas[0], settings.ema)]),
            "teacher": 4 * counts.count(model.net),
            "activations of the backward pass": activations,
            # Noise, samples and the teacher's samples.
            "batch buffers": 3 * a_pass * 4 * math.prod(dataset.shape),
        },
        batch=batch,
        updates=settings.updates,
        images_per_update=made,
        operations={"the teacher's samples": made * asked * one.forward, "generator turn": made * one.training},
    )


def _to_count(config: Config, batch: int) -> Config:
    """A configuration for a trainer whose networks are only counted: eager, in float32, on the CPU, one row a pass.

    A batch that does not divide by ``run.accumulate`` is left as it is, so that the trainer refuses it.
    """
    run = replace(config.run, device="cpu", mode="eager", timings=False, shard=False, offload_teacher=False)
    if batch % run.accumulate:
        return replace(config, run=run)
    plain: dict[str, Any] = {"fake_precision": "float32", "generator_precision": "float32"}
    plain["regression"] = replace(config.distill.regression, pairs="", previous="", first_stage="")
    return _with_batch(replace(config, run=run, distill=replace(config.distill, **plain)), run.accumulate)


def _with_batch(config: Config, batch: int) -> Config:
    return replace(config, teacher=replace(config.teacher, batch=batch), distill=replace(config.distill, batch=batch))


def _with_hours(plan: Plan, config: Config, dataset: Dataset, model: Model | None, steps: int, bound: float) -> Plan:
    """The plan with the measured hours, or with the reason why nothing was measured."""
    device = config.run.device
    try:
        usable_device("run.device", device)
    except UserError:
        return replace(
            plan,
            unmeasured=f"run.device {device} does not exist on this machine; --set run.device=cpu run.mode=eager "
            "measures the CPU",
        )

    def trainer(batch: int) -> Trainer:
        sized = _with_batch(config, batch)
        if model is None:
            return trainers.teacher_trainer(sized, dataset)
        # A trainer moves and changes the network that it is given, so each one gets its own.
        net = networks.build(model.description.network)
        net.load_state_dict(model.net.state_dict())
        return trainers.trainer("distill", sized, dataset, Model(net.eval(), model.description))

    try:
        with distributed.joined(device, alone=config.run.offload_teacher):
            measured = timing.measure(plan, trainer, config, steps, bound)
    except UserError as error:
        return replace(plan, unmeasured=str(error))
    hours = measured.seconds * plan.batch / measured.batch * plan.updates / 3600
    return replace(plan, measured=measured, unmeasured="", hours=hours, device=timing.name(torch.device(device)))
