"""Predicts what a run takes without running it: networks, memory by purpose, operations by turn, measured hours.

Parameters, activations and operations are counted, on this machine's CPU or on tensors without memory. Hours are given
only if updates of this very configuration could be timed on its device. Neither the data nor the teacher need to exist:
the plan names what is missing, and images and networks of the configured shape stand in for it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import backends, choices, data, networks, teachers
from ..data import Dataset, folders
from ..errors import UserError
from ..jobs import trainers
from ..jobs.train import usable_device
from ..jobs.trainers import network_for
from ..models.calls import arguments, needs_endpoint, takes_endpoint
from ..models.files import SHIPPED, Description, Model
from ..models.solvers import evaluations
from ..networks import memory
from ..networks.recompute import recompute
from ..precision import Precision
from ..settings import REGRESSION, Config, OptimiserConfig
from ..train import distributed, sharding
from ..train.trainer import Trainer
from . import timing

STEPS = choices.PLAN_STEPS
CPU = torch.device("cpu")


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
        plan = (_distillation, _regression)[config.distill.objective.name == REGRESSION](config, dataset, model, ranks)
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
    size = _count(net)
    share = ranks if config.run.shard else 1
    operations = _operations(counted.description.network, config.run.checkpoint_activations)
    return Plan(
        job="train-teacher",
        parameters={"network": size},
        memory={
            **_shared({"parameters": 4 * size, **_kept(size, settings.optimiser, settings.ema)}, share),
            **_together([net] if share > 1 else []),
            "activations of the backward pass": _activations(net, dataset.shape, rows, config.run.device),
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
    size = _count(model.net)
    parameters = {"teacher": size, "generator": _count(counted.generator.net)}
    trained = {"generator": (parameters["generator"], settings.generator, settings.ema)}
    fakes = objective.needs_fake
    heads = {"fake model": counted.judged} if fakes else {}
    for name, net in (heads | ({} if counted.critic is None else {"discriminator": counted.critic})).items():
        parameters[name] = _count(net)
        trained[name] = (parameters[name], settings.fake, ())
    kept: dict[str, int] = {}
    for of_one in (_kept(*each) for each in trained.values()):
        kept = {name: kept.get(name, 0) + value for name, value in of_one.items()}

    batch, asked = settings.batch, settings.target_steps * (1 if settings.guidance == 1.0 else 2)
    a_pass = batch // (ranks * config.run.accumulate)
    rows, twice = 1 + counted.takes_real, bool(settings.regression.pairs)
    backward = objective.flows == "all"
    judged = counted.gan is not None and counted.critic is None and counted.gan.weight_generator > 0
    fake_kept, shape, device = 0, dataset.shape, config.run.device
    with Precision(settings.fake_precision, CPU).networks():
        if fakes:
            fake_kept = _activations(counted.judged, shape, rows * a_pass, device)
    with Precision(settings.generator_precision, CPU).networks():
        generator_kept = _activations(counted.generator.net, shape, a_pass, device)
        if fakes and (backward or judged):
            generator_kept += _activations(counted.frozen_fake, shape, a_pass, device, to_input=True)
        if backward:
            rounded = settings.teacher_precision != "float32"
            own = Precision(settings.teacher_precision, CPU).networks() if rounded else contextlib.nullcontext()
            with own:
                generator_kept += _activations(counted.teacher, shape, asked * a_pass, device, to_input=True)
    turn = "fake" if fake_kept > generator_kept else "generator"
    made = turns * batch
    share = ranks if config.run.shard else 1
    state = {"parameters": 4 * sum(count for count, *_ in trained.values()), **kept}
    if not config.run.offload_teacher:
        state["teacher"] = _bytes(counted.teacher)
    gathered = [counted.generator.net] if share > 1 else [counted.teacher] if config.run.offload_teacher else []
    # Rows of one fake turn; noise and samples of all fake turns; noise, samples and interpolants of the generator turn.
    buffers = rows * a_pass + 2 * made // ranks + (3 + 3 * twice) * a_pass

    one = _operations(model.description.network, config.run.checkpoint_activations)
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
            **_shared(state, share),
            **_together(gathered),
            f"activations of the {turn} turn, the largest": max(fake_kept, generator_kept),
            "batch buffers": 4 * math.prod(shape) * buffers,
        },
        batch=batch,
        updates=settings.updates,
        images_per_update=batch * (turns * rows + 1),
        operations=operations,
    )


def _regression(config: Config, dataset: Dataset, model: Model, ranks: int) -> Plan:
    settings = config.distill
    counted = trainers.regression(_to_count(config, settings.batch), dataset, model)
    batch, a_pass, net = settings.batch, settings.batch // (ranks * config.run.accumulate), counted.generator.net
    size = _count(net)
    with Precision(settings.generator_precision, CPU).networks():
        activations = _activations(net, dataset.shape, a_pass, config.run.device)
    one = _operations(model.description.network, config.run.checkpoint_activations)
    flow, how = config.path.build(model.description), settings.regression
    made = batch * sum(counted.numbers) // len(counted.numbers)
    asked = evaluations(how.steps, how.solver, flow.path, flow.predict) * (1 if settings.guidance == 1.0 else 2)
    return Plan(
        job="distill",
        parameters={"teacher": _count(model.net), "generator": size},
        memory={
            "parameters": 4 * size,
            **_kept(size, settings.generator, settings.ema),
            "teacher": 4 * _count(model.net),
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
    plain["regression"] = replace(config.distill.regression, pairs="")
    return _with_batch(replace(config, run=run, distill=replace(config.distill, **plain)), run.accumulate)


def _with_batch(config: Config, batch: int) -> Config:
    return replace(config, teacher=replace(config.teacher, batch=batch), distill=replace(config.distill, batch=batch))


def _activations(net: nn.Module, shape: tuple[int, ...], rows: int, device: str, to_input: bool = False) -> int:
    """Bytes that ``rows`` samples keep for a backward pass, counted on tensors without memory.

    The package's own layers keep less than torch's, but they run on the CPU alone. For a GPU torch's are counted.
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        net = copy.deepcopy(net)
    plain = contextlib.nullcontext() if torch.device(device).type == "cpu" else backends.backend("torch")
    with mode, plain:
        return memory.kept_bytes(net, shape, CPU, rows, to_input)


def _count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _bytes(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def _shared(state: dict[str, int], ranks: int) -> dict[str, int]:
    """One rank's share, in bytes, of a state that is spread over ``ranks``."""
    return {name: -(-size // ranks) for name, size in state.items()}


def _together(nets: Sequence[nn.Module]) -> dict[str, int]:
    """Bytes of two blocks of networks that are gathered block by block: the one in use and the one fetched ahead."""
    sizes = [_bytes(block) for net in nets for block in sharding.blocks(net)]
    return {"blocks of networks, brought together": 2 * max(sizes)} if sizes else {}


def _kept(parameters: int, step: OptimiserConfig, averages: Sequence[float]) -> dict[str, int]:
    """Bytes beside the parameters: gradients, Adam's moments (no first one if ``beta1`` is 0) and averages."""
    return {
        "gradients": 4 * parameters,
        "moments": 4 * parameters * (1 + (step.betas[0] > 0)),
        "averages": 4 * parameters * len(averages),
    }


@dataclass(frozen=True)
class Operations:
    """Operations of one sample: a forward pass alone, with a backward pass to the parameters, with one to the input."""

    forward: int
    training: int
    input: int


def _operations(network: dict[str, Any], again: bool = False) -> Operations:
    """Operations by torch's counter on tensors without memory; ``again``: blocks run again in the backward pass."""
    # The counter does not know torch's fused attention for CPUs, nor the package's own layers. So attention runs as
    # plain products here, and torch's layers take the place of the package's.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), backends.backend("torch"):
        net = networks.build(network).requires_grad_(True)
        if again:
            # In evaluation mode: in training a block that runs again reads dropout's random state, which needs memory.
            recompute(net.eval())
        shape = tuple(network.get("dim", network.get("shape", ())))
        x = torch.zeros(1, *shape, requires_grad=True)
        labels = torch.zeros(1, dtype=torch.int64) if getattr(net, "num_classes", 0) else None
        end = torch.zeros(1, *shape) if takes_endpoint(net) else None

        with FlopCounterMode(display=False) as counter:
            out = net(*arguments(net, torch.zeros(1), x, labels, end)).sum()
        counts = [forward := int(counter.get_total_flops())]
        # One graph serves both backward passes: autograd computes the gradients that are asked for and no others.
        for wanted in ([*net.parameters()], [x]):
            with FlopCounterMode(display=False) as counter:
                out.backward(retain_graph=True, inputs=wanted)
            counts.append(forward + int(counter.get_total_flops()))
        return Operations(*counts)


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
