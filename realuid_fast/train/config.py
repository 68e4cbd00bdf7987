"""Configuration: dataclasses, filled from YAML files and ``key.sub=value`` overrides, with the faulty key named."""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union

from torch import Tensor

from .. import choices, paths
from ..bounds import SEED, THREADS, Positive, Range, Whole, shown
from ..errors import UserError
from ..extras import extra
from ..files import read_regular
from ..objectives import DIVERGENCES, PRESETS, Objective
from ..sampling import SOLVERS
from ..teachers import Description
from .modes import MODES, captures
from .precision import PRECISIONS

with extra():
    import yaml

CONFIGS = choices.CONFIGS
presets, recipes = choices.presets, choices.recipes
T = TypeVar("T")
# ValueError: dates and numbers that only look right, bytes that are no text. RecursionError: thousands of brackets.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
# What a configuration may have: a noise schedule of 4,000 numbers takes 4,000 nodes and 100 KB of them.
_MOST_BYTES, _MOST_NODES, _MOST_DEPTH, _MOST_BASES = 2**20, 20_000, 32, 64
_MOST_TEXT = 10_000  # characters of one value


@dataclass(frozen=True)
class PathConfig:
    """The interpolant, what networks predict on it, and the law of times and the distance that they are trained with.

    ``name`` is one of :data:`realuid_fast.paths.PATHS` and ``settings`` its own; ``predict`` one of
    :data:`realuid_fast.paths.PREDICTIONS`. ``distill`` takes from its teacher which of these are not given;
    ``train-teacher`` then trains a velocity on the linear path. ``sampler`` is one of
    :data:`realuid_fast.paths.samplers.SAMPLERS`, ``beta`` or ``discrete``, with ``sampler_settings``; ``match`` the
    match space of the distance and ``weight`` one of :data:`realuid_fast.paths.WEIGHTS`.
    """

    name: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    predict: str | None = None
    sampler: str = "stratified"
    sampler_settings: dict[str, Any] = field(default_factory=dict)
    match: str = "velocity"
    weight: str = "one"

    def build(self, teacher: Description | None = None) -> Interpolant:
        """The path with its sampler, prediction and weight; ``teacher`` fills in what is not given.

        Raises:
            UserError: an unknown name, settings or numbers that the path or the sampler refuses, a pair of match space
                and prediction without a conversion, or a path or prediction other than the teacher's.
        """
        try:
            sampler = paths.samplers.build(self.sampler, self.sampler_settings)
        except UserError as error:
            raise UserError(f"path.sampler: {error}") from None
        name, settings, predict = self.name or "linear", self.settings, self.predict or "velocity"
        if teacher is not None:
            name, predict = self.name or teacher.path, self.predict or teacher.predict
            settings = self.settings or (teacher.path_settings if name == teacher.path else {})
        path = paths.build(name, settings, sampler)
        if teacher is not None:
            if name != teacher.path:
                raise UserError(f"the teacher was trained on the path '{teacher.path}', not on path.name '{name}'")
            if paths.build(name, settings) != teacher.interpolant():
                raise UserError(
                    f"the teacher was trained on the path '{name}' with the settings {teacher.path_settings}, not with "
                    f"path.settings {settings}"
                )
            if predict != teacher.predict:
                raise UserError(f"the teacher predicts {teacher.predict}, not path.predict {predict}")
        try:
            path.time_range(self.match, predict)
        except UserError as error:
            raise UserError(f"path.match and path.predict: {error}") from None
        try:
            weight = paths.weight(self.weight, path)
        except UserError as error:
            raise UserError(f"path.weight: {error}") from None
        return Interpolant(path, name, dict(settings), predict, self.match, weight)


class Interpolant(NamedTuple):
    """A path as :class:`PathConfig` resolves it."""

    path: paths.Path
    name: str
    settings: dict[str, Any]
    predict: str
    match: str
    weight: paths.Weight | None

    def coefficients(self, t: Tensor) -> Tensor:
        """Rows ``(R, 9)`` of the losses."""
        return self.path.coefficients(t, self.match, self.predict, self.weight)


@dataclass(frozen=True)
class OptimiserConfig:
    """Settings of :class:`realuid_fast.optim.Optimiser`; ``total`` is the run's number of steps."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.999)
    clip: float = 1.0
    warmup: Whole = 0
    warmup_from_zero: bool = False
    decay: str = "constant"
    floor: float = 0.0


@dataclass(frozen=True)
class TeacherConfig:
    """What ``train-teacher`` does, one batch an update; ``export`` is the average saved, 0 for the last weights.

    ``label_dropout`` is the share of labels replaced by "none", for classifier-free guidance of the teacher (Ho and
    Salimans, 2207.12598): the network then gets a null label.

    ``reduction`` is what the loss does over a sample's elements, ``sum`` or ``mean``: Adam does not see the factor
    between them, the clip of the gradient's norm does. ``ema_warmup`` is :class:`realuid_fast.optim.Optimiser`'s.

    ``coupling`` pairs each batch with its noise, or with endpoints that are not its own, by optimal transport, inside
    classes where the network sees them (:func:`realuid_fast.couplings.couple`, solved on the host).

    ``sampler``, ``sampler_settings``, ``match`` and ``weight`` are those of the section ``path`` where not given, and
    ``evaluate_every`` is that of the section ``run``: a teacher's samples cost many evaluations of its network.
    """

    sampler: str | None = None
    sampler_settings: dict[str, Any] = field(default_factory=dict)
    match: str | None = None
    weight: str | None = None
    batch: Positive = 64
    updates: Positive = 10_000
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(betas=(0.9, 0.999)))
    label_dropout: float = 0.0
    reduction: str = "sum"
    coupling: bool = False
    ema: tuple[float, ...] = (0.999,)
    ema_warmup: bool = True
    export: float = 0.999
    evaluate_every: Whole | None = None


@dataclass(frozen=True)
class ObjectiveConfig:
    """A preset of :data:`realuid_fast.objectives.PRESETS` by name, and those of its settings that are not its default.

    Or ``regression``, the baseline of :mod:`realuid_fast.train.regression`, which is none of them.
    ``alpha``, ``beta`` and ``gamma`` are 0.92, 0.94 and 0.92 where a preset needs them and none are given; what a
    preset does not have is not looked at.
    """

    name: str = "realuid"
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    kappa: float | None = None
    l1: float | None = None
    l2: float | None = None
    alpha_sid: float | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name if self.name == REGRESSION else self.build().name

    def build(self) -> Objective:
        if self.name not in PRESETS:
            raise UserError(f"distill.objective.name must be one of {', '.join(PRESETS)}; got {self.name!r}")
        settings = {}
        for name, parameter in inspect.signature(PRESETS[self.name]).parameters.items():
            value = getattr(self, name, None)
            if value is None and parameter.default is parameter.empty:
                value = _PUBLISHED[name]
            if value is not None:
                settings[name] = value
        return PRESETS[self.name](**settings)


REGRESSION = "regression"
_PUBLISHED = {"alpha": 0.92, "beta": 0.94, "gamma": 0.92}


@dataclass(frozen=True)
class GanConfig:
    """A discriminator's head on the fake model (:mod:`realuid_fast.train.discriminator`), none while weights are 0.

    ``weight_fake`` is the weight of its loss in the fake turn, ``weight_generator`` that of the generator's term, 0 for
    a head that only ``distill.divergence`` reads. ``least_share`` is the share of data that an interpolant must hold to
    be judged; on the linear path that is its time.
    """

    weight_fake: float = 0.0
    weight_generator: float = 0.0
    least_share: float = 0.0


@dataclass(frozen=True)
class RegressionConfig:
    """The teacher's trajectories for ``objective: {name: regression}``: ``steps`` of a solver of ``SOLVERS``."""

    steps: Positive = 20
    solver: str = "euler"


@dataclass(frozen=True)
class DistillConfig:
    """What ``distill`` does. One update is ``fake_turns`` steps of the fake model and one of the generator.

    ``teacher`` is a shipped name or a file; ``teacher_network``, by default the section ``network``, and
    ``teacher_decay``, by default the largest, say which network and which of its averages a published checkpoint has.
    ``start`` is a student's file, its run's folder or a published checkpoint that the generator goes on from, the
    published second stage: its averages then remember that start; empty for the teacher's weights. ``start_decay`` is
    the average of it to take (:func:`realuid_fast.train.start.student_of`). The fake model starts at the ``teacher``
    then too, or with ``fake_start`` ``fresh`` as an untrained network. ``dropout`` replaces the teacher's own in both.
    ``labels`` of generated samples are ``drawn`` from the training set, or those of the real ``batch`` in the same row;
    then the generator's turn reads a batch too. ``ema_warmup`` is :class:`realuid_fast.optim.Optimiser`'s, by default
    on unless there is a ``start``.
    ``guidance`` is the scale of the teacher's classifier-free guidance, which the student learns; 1 for none.
    ``gan`` is a discriminator beside the objective; ``divergence`` the f-divergence that an objective whose gradient
    flows through the samples alone descends, by its logits (:func:`realuid_fast.objectives.divergence_weight`).
    ``regression`` is for the baseline of that name, which has neither fake model nor discriminator.
    ``t_start`` is the generator's start time, by default :func:`realuid_fast.sampling.default_start`; ``times`` are
    those of further steps (:class:`.generator.Generator`), none for a one-step generator; ``export`` is the average
    that is evaluated and saved, 0 for the last weights. The precisions are the networks' in either turn:
    ``float32``, ``tf32`` (CUDA only), ``bf16`` or ``fp16``.
    On a GPU bf16 serves the fake turn, and fp16, whose seed gradient is scaled, or tf32 the generator's; bf16 is too
    coarse there once the fake model is near the teacher, which the run then says (:mod:`realuid_fast.train.precision`).
    ``teacher_precision`` is ``float32``, or ``bf16`` to store the teacher's weights in half the memory and compute its
    outputs in bf16 in both turns, with the same caution.
    """

    teacher: str = "digits"
    teacher_network: dict[str, Any] = field(default_factory=dict)
    teacher_decay: float | None = None
    start: str = ""
    start_decay: float | None = None
    guidance: float = 1.0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    divergence: str = "reverse-kl"
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    batch: Positive = 64
    updates: Positive = 1000
    fake_turns: Positive = 5
    fake_precision: str = "float32"
    generator_precision: str = "float32"
    teacher_precision: str = "float32"
    t_start: float | None = None
    fake_start: str = "teacher"
    dropout: float | None = None
    labels: str = "drawn"
    times: tuple[float, ...] = ()
    generator: OptimiserConfig = field(default_factory=OptimiserConfig)
    fake: OptimiserConfig = field(default_factory=OptimiserConfig)
    ema: tuple[float, ...] = (0.99,)
    ema_warmup: bool | None = None
    export: float = 0.99


@dataclass(frozen=True)
class RunConfig:
    """What a run does besides training: seeds, device, threads, logs, checkpoints. Intervals are updates, 0 for never.

    ``parity`` follows the published procedure step for step: it sets :data:`PARITY` over whatever is configured.
    ``mode`` is how the turns of ``distill`` run: ``eager``, ``compiled`` (networks through torch.compile), ``graphs``
    (on top of that each turn one CUDA graph) or ``graphs-eager`` (each turn one CUDA graph of the networks as they are,
    with nothing to compile), teachers train eagerly; ``threads`` is torch's CPU thread count, 0 to
    leave it; ``inception`` is a file of Inception weights, in whose features images are then evaluated, against the
    ``real_split`` ``heldout`` or ``train``; ``inception_only`` says that no other features will do, so that a run
    without that file is not evaluated, and says so at its start;
    ``channels_last`` is the image networks' memory layout; ``teacher_steps`` is the teacher's number of Euler
    steps for the line in the convergence plot, 0 for no line; ``keep`` is how many checkpoints stay on disk;
    ``accumulate`` is in how many parts a batch goes through the networks, one after another, to save memory;
    ``stop_after_skips`` is how many updates in a row may have a gradient that is not finite before the run stops;
    ``shard`` spreads networks, optimisers and averages over all ranks (:mod:`realuid_fast.train.sharding`), where one
    GPU does not hold them; with one rank it does nothing. ``offload_teacher`` keeps the teacher in host memory, from
    where it is brought to the GPU part by part. ``checkpoint_activations`` has the U-Nets of this package keep their
    blocks' inputs alone and run the blocks again in the backward pass (:mod:`realuid_fast.networks.recompute`): the
    same gradients with less memory, for one more forward pass. ``timings`` logs the time of every phase of an update.
    """

    seed: Annotated[int, SEED] = 0
    device: str = "cpu"
    mode: str = "eager"
    threads: Annotated[int, THREADS] = 1
    channels_last: bool = True
    log_every: Positive = 10
    sample_every: Whole = 0
    evaluate_every: Whole = 0
    evaluate_samples: Annotated[int, Range(2)] = 2000
    inception: str = ""
    inception_only: bool = False
    real_split: str = "heldout"
    teacher_steps: Whole = 0
    checkpoint_every: Whole = 1000
    keep: Positive = 2
    accumulate: Positive = 1
    shard: bool = False
    offload_teacher: bool = False
    checkpoint_activations: bool = False
    stop_after_skips: Whole = 100
    tensorboard: bool = True
    progress: bool = True
    timings: bool = False
    parity: bool = False


_PARITY_STEP = {"warmup_from_zero": True, "decay": "constant"}
# What ``run.parity`` sets: docs/parity.md says where each of them comes from.
PARITY: dict[str, dict[str, Any]] = {
    "path": {
        "name": "linear",
        "settings": {},
        "predict": "velocity",
        "sampler": "uniform",
        "sampler_settings": {},
        "match": "velocity",
        "weight": "one",
    },
    "teacher": {
        "sampler": None,
        "sampler_settings": {},
        "match": None,
        "weight": None,
        "optimiser": _PARITY_STEP,
        "label_dropout": 0.0,
        "reduction": "mean",
        "ema_warmup": False,
    },
    "distill": {
        "t_start": 0.0,
        "fake_start": "fresh",
        "dropout": 0.0,
        "labels": "batch",
        "times": (),
        "guidance": 1.0,
        "generator": _PARITY_STEP,
        "fake": _PARITY_STEP,
        "ema_warmup": False,
    },
}
PARITY_OBJECTIVES = ("uid", "realuid", "general")


@dataclass(frozen=True)
class Config:
    """A whole run.

    ``data`` goes to :func:`realuid_fast.data.load`, ``network`` to :func:`realuid_fast.networks.build`.
    """

    data: dict[str, Any] = field(default_factory=lambda: {"name": "digits"})
    network: dict[str, Any] = field(default_factory=dict)
    path: PathConfig = field(default_factory=PathConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def teachers_network(self) -> dict[str, Any]:
        """The network of a published checkpoint: ``distill.teacher_network``, or else the section ``network``."""
        return self.distill.teacher_network or self.network

    def teachers_path(self) -> PathConfig:
        """The section ``path`` with what ``teacher`` sets apart."""
        own = self.teacher
        apart: dict[str, Any] = {k: v for k in ("match", "weight") if (v := getattr(own, k)) is not None}
        if own.sampler is not None:
            apart |= {"sampler": own.sampler, "sampler_settings": own.sampler_settings}
        return replace(self.path, **apart)


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Configuration of a shipped name (``"digits"``) or a YAML file, with ``key.sub=value`` overrides on top.

    A file may name another one to start from, ``base: digits``, or several, the later over the earlier.

    Raises:
        UserError: no such file, an unknown key, or a value of the wrong type, each with the key's full name.
    """
    return from_mapping(merge(_read(source), nested(overrides)))


def preset(name: str) -> str:
    """What :func:`load` takes for a preset's name; raises :class:`UserError` for an unknown one."""
    if name not in presets():
        raise UserError(f"there is no preset {name!r}: the presets are {', '.join(presets())}")
    return f"presets/{name}"


def from_mapping(content: Mapping[str, Any]) -> Config:
    """:class:`Config` of nested plain values, checked."""
    config = _fill(Config, content, "")
    if config.run.parity:
        config = _in_parity(config, content)
    _check(config)
    return config


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, as YAML can hold them."""
    return _plain(asdict(config))


def save(config: Config, file: Path) -> None:
    """Write the resolved configuration, every key, as YAML."""
    file.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``; ``data`` or ``network`` with another name or kind starts afresh, mixing nothing."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            afresh = key in ("data", "network") and any(k in value and value[k] != old.get(k) for k in ("name", "kind"))
            merged[key] = dict(value) if afresh else merge(old, value)
        else:
            merged[key] = value
    return merged


class _Loader(yaml.SafeLoader):
    """A reader of plain values that stops at what no configuration has, before it builds anything.

    Aliases count as what they stand for: nine aliases of nine aliases, ten times over, are a kilobyte of text and
    billions of values.
    """

    left, most = _MOST_NODES, f"has more than the {_MOST_NODES:,} values that are read, aliases written out"

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.left -= 1
        if self.left < 0:
            raise UserError(self.most)
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        root, left = super().get_single_node(), _MOST_NODES
        waiting = [] if root is None else [(root, 1)]
        while waiting:
            node, depth = waiting.pop()
            left -= 1
            if depth > _MOST_DEPTH:
                raise UserError(f"has more than {_MOST_DEPTH} levels inside one another, or an alias inside itself")
            if left < 0:
                raise UserError(self.most)
            if isinstance(node, yaml.ScalarNode):
                if len(node.value) > _MOST_TEXT:
                    raise UserError(f"has a value of more than {_MOST_TEXT:,} characters")
                continue
            for each in node.value:
                waiting += [(part, depth + 1) for part in (each if isinstance(each, tuple) else (each,))]
        return root


def _plain_yaml(text: str) -> Any:
    """YAML as plain values.

    Raises:
        UserError: it is longer, deeper or larger than configurations are.
        yaml.YAMLError, ValueError, RecursionError: it is no YAML.
    """
    if len(text) > _MOST_BYTES:
        raise UserError(f"has more than the {_MOST_BYTES:,} characters that are read")
    return yaml.load(text, _Loader)


def _read(source: str | Path, above: tuple[Path, ...] = (), bases: list[Path] | None = None) -> dict[str, Any]:
    """The configuration with its bases below; ``bases`` counts the files that have been read for all of it."""
    bases = [] if bases is None else bases
    file = CONFIGS / f"{source}.yaml" if (CONFIGS / f"{source}.yaml").is_file() else Path(source)
    if not file.exists():
        names = [*sorted(f.stem for f in CONFIGS.glob("*.yaml")), *(f"recipes/{name}" for name in recipes())]
        shipped = ", ".join(names)
        raise UserError(f"there is no configuration {str(source)!r}: neither a file nor one of the shipped ({shipped})")
    try:
        content = _plain_yaml(read_regular(file, _MOST_BYTES).decode())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{file} {error}") from None
    except _NOT_YAML as error:
        raise UserError(f"{file} is not valid YAML: {str(error).splitlines()[0]}") from None
    if file.resolve() in above:
        raise UserError(f"base: {file} starts from itself")
    bases.append(file)
    if len(bases) > _MOST_BASES:
        raise UserError(f"base: {bases[0]} starts from more than {_MOST_BASES} configurations in all")
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a mapping of sections")
    base = content.pop("base", None)
    if base is None:
        return content
    names = base if isinstance(base, list) else [base]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"base must be the name of a configuration, or several in a list, got {shown(base)}")
    below: dict[str, Any] = {}
    for name in names:
        below = merge(below, _read(name, (*above, file.resolve()), bases))
    return merge(below, content)


def nested(overrides: Iterable[str]) -> dict[str, Any]:
    """``key.sub=value`` words as nested sections, values read as YAML; raises :class:`UserError` for other words."""
    sections: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise UserError(f"an override must read key.sub=value, got {override!r}")
        try:
            value = _plain_yaml(text)
        except UserError as error:
            raise UserError(f"the value of {key} {error}") from None
        except _NOT_YAML:
            raise UserError(f"the value of {key} is not valid YAML: {shown(text)}") from None
        section = sections
        for part in parts[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"{key} cannot be set: {part} was given a value of its own")
        section[parts[-1]] = value
    return sections


def _fill(cls: type[T], content: Any, prefix: str) -> T:
    """The dataclass ``cls`` from a mapping; defaults where a key is missing."""
    where = prefix or "the configuration"
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must be a section with keys, got {shown(content)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f", did you mean {near[0]}" if near else f"; it takes {', '.join(hints)}"
            raise UserError(f"there is no key '{_join(prefix, key):.80}' in the configuration{hint}")
    return cls(**{key: _value(hints[key], value, _join(prefix, key), cls, key) for key, value in content.items()})


def _value(hint: Any, value: Any, name: str, owner: Any, key: str) -> Any:
    if is_dataclass(hint):
        # Missing keys fall back to the owner's default for the section, which may differ from the section's own.
        factory = next(f.default_factory for f in fields(owner) if f.name == key)
        defaults = asdict(factory()) if factory is not MISSING else {}
        return _fill(typing.cast(type, hint), merge(defaults, value) if isinstance(value, Mapping) else value, name)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = _value(inner[0], value, name, owner, key)
        inner[1].check(name, number)
        return number
    if origin in (Union, types.UnionType):
        return None if value is None else _value(inner[0], value, name, owner, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{name} must be a section with keys, got {shown(value)}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} must be a list of numbers, got {shown(value)}")
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise UserError(f"{name} must be a list of {len(inner)} numbers, got {shown(value)}")
        return tuple(_value(inner[0], v, name, owner, key) for v in value)
    return _scalar(hint, value, name)


def _scalar(kind: type, value: Any, name: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML reads 1e-3 without a point as text.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{name} is larger than any number this can hold") from None
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"{name} must be {words[kind]}, got {shown(value)}")


def _in_parity(config: Config, content: Mapping[str, Any]) -> Config:
    """The configuration with :data:`PARITY` in it; a warning names what ``content`` had given otherwise."""
    name = config.distill.objective.name
    if name not in PARITY_OBJECTIVES:
        raise UserError(
            f"run.parity follows the published procedure, whose objectives are {', '.join(PARITY_OBJECTIVES)}; "
            f"distill.objective.name is {name!r}"
        )
    changed: list[str] = []

    def put(section: Any, values: Mapping[str, Any], given: Any, prefix: str) -> Any:
        given, new = given if isinstance(given, Mapping) else {}, {}
        for key, value in values.items():
            old, full = getattr(section, key), _join(prefix, key)
            if is_dataclass(old):
                value = put(old, value, given.get(key), full)
            elif key in given and old != value:
                changed.append(f"{full} {old} -> {value}")
            new[key] = value
        return replace(section, **new)

    values = dict(PARITY)
    if config.distill.start:
        # The published second stage has its fake model from the teacher.
        values["distill"] = {**PARITY["distill"], "fake_start": "teacher"}
    config = put(config, values, content, "")
    if changed:
        warnings.warn(f"run.parity sets {', '.join(changed)}", stacklevel=3)
    return config


def _check(config: Config) -> None:
    run, teacher, distill = config.run, config.teacher, config.distill
    one_of = {
        "run.mode": (run.mode, MODES),
        "run.real_split": (run.real_split, ("heldout", "train")),
        "distill.fake_precision": (distill.fake_precision, PRECISIONS),
        "distill.generator_precision": (distill.generator_precision, PRECISIONS),
        "distill.teacher_precision": (distill.teacher_precision, ("float32", "bf16")),
        "distill.fake_start": (distill.fake_start, ("teacher", "fresh")),
        "distill.labels": (distill.labels, ("drawn", "batch")),
        "teacher.reduction": (teacher.reduction, ("sum", "mean")),
    }
    for name, (word, words) in one_of.items():
        if word not in words:
            raise UserError(f"{name} must be one of {', '.join(words)}; got {word!r}")
    if run.accumulate > 1 and captures(run.mode):
        raise UserError(f"run.accumulate must be 1 with run.mode {run.mode}: a graph holds one whole turn")
    for name in ("shard", "offload_teacher"):
        if getattr(run, name) and run.mode != "eager":
            raise UserError(f"run.{name} must be false with run.mode {run.mode}: only eager turns bring parts together")
    if run.checkpoint_activations and captures(run.mode):
        raise UserError(
            f"run.checkpoint_activations must be false with run.mode {run.mode}: a block that runs again takes its "
            "random state from the host, which a graph does not see"
        )
    if run.checkpoint_activations and run.shard:
        raise UserError(
            "run.checkpoint_activations must be false with run.shard: a sharded fake model is frozen in its forward "
            "pass alone"
        )
    if run.shard and distill.gan.weight_fake:
        raise UserError("run.shard must be false with distill.gan, whose head reads inside of the fake model")
    whole = not (run.shard or run.offload_teacher or distill.teacher_precision == "bf16")
    if distill.objective.name == REGRESSION and not whole:
        raise UserError(
            f"distill.objective.name {REGRESSION} holds its networks whole and in float32: run.shard and "
            "run.offload_teacher must be false, distill.teacher_precision float32"
        )
    if run.offload_teacher and run.device == "cpu":
        raise UserError("run.offload_teacher must be false with run.device cpu: the teacher is in host memory there")
    if distill.dropout is not None and not 0 <= distill.dropout < 1:
        raise UserError(f"distill.dropout must lie in [0, 1), got {distill.dropout:g}")
    if not 0 <= teacher.label_dropout < 1:
        raise UserError(f"teacher.label_dropout must lie in [0, 1), got {teacher.label_dropout:g}")
    gan = distill.gan
    for name, weight in (("weight_fake", gan.weight_fake), ("weight_generator", gan.weight_generator)):
        if not 0 <= weight < math.inf:
            raise UserError(f"distill.gan.{name} must be finite and not negative, got {weight:g}")
    if not 0 <= gan.least_share <= 1:
        raise UserError(f"distill.gan.least_share must lie in [0, 1], got {gan.least_share:g}")
    if gan.weight_generator and not gan.weight_fake:
        raise UserError("distill.gan.weight_generator needs a weight_fake: nothing else trains the discriminator")
    if distill.divergence not in DIVERGENCES:
        raise UserError(f"distill.divergence must be one of {', '.join(DIVERGENCES)}; got {distill.divergence!r}")
    if distill.divergence != "reverse-kl" and not gan.weight_fake:
        raise UserError(f"distill.divergence {distill.divergence} needs a discriminator: set distill.gan.weight_fake")
    if distill.regression.solver not in SOLVERS:
        solver = distill.regression.solver
        raise UserError(f"distill.regression.solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if not math.isfinite(distill.guidance):
        raise UserError(f"distill.guidance must be finite, got {distill.guidance}")
    for section, part in (("teacher", teacher), ("distill", distill)):
        if part.export and part.export not in part.ema:
            raise UserError(f"{section}.export must be 0 or one of {section}.ema {list(part.ema)}, got {part.export:g}")


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
