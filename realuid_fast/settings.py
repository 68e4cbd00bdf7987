"""The settings of a run: each field of these dataclasses says its meaning, its bounds and its choices."""

from __future__ import annotations

import inspect
import math
import re
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from . import parity, paths
from .bounds import ABOVE_ZERO, BELOW_ONE, BETWEEN, FINITE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, THREADS, WHOLE, Range
from .choices import MODES, PRECISIONS
from .errors import UserError
from .matching import Matching
from .objectives import DIVERGENCES, PRESETS, Objective
from .optim import DECAYS
from .sampling import SOLVERS
from .teachers import Description

REGRESSION = "regression"  # the objective of realuid_fast.train.regression, which is none of the presets
# Views, so that a sampler or a preset that somebody adds can be named too.
_SAMPLERS: Mapping[str, Any] = ChainMap({"beta": None, "discrete": None}, paths.samplers.SAMPLERS)
_OBJECTIVES: Mapping[str, Any] = ChainMap({REGRESSION: None}, PRESETS)
_PUBLISHED = {"alpha": 0.92, "beta": 0.94, "gamma": 0.92}


def setting(default: Any, meaning: str, bounds: Range | None = None, choices: Collection[str] | None = None) -> Any:
    """A dataclass' field: its default or the function that makes it, its meaning, and what its values are held to.

    ``bounds`` are of every number of a list. ``choices`` may grow later, as :data:`realuid_fast.paths.PATHS` does.
    """
    metadata = {"meaning": meaning, "bounds": bounds, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class LawConfig:
    """A law of times and a time weight in ``distill`` where they differ from those of ``path``."""

    sampler: str | None = setting(None, "as path.sampler, which holds if this is null", choices=_SAMPLERS)
    sampler_settings: dict[str, Any] = setting(dict, "the numbers of this sampler")
    weight: str | None = setting(None, "as path.weight, which holds if this is null", choices=paths.WEIGHTS)


@dataclass(frozen=True)
class PathConfig:
    """The interpolant, what networks predict on it, and the law of times and the distance that they are trained with.

    ``distill`` takes from its teacher the path, its settings and the prediction where they are not given.
    ``train-teacher`` then trains a velocity on the linear path.
    """

    name: str | None = setting(None, "the path from noise to data", choices=paths.PATHS)
    settings: dict[str, Any] = setting(dict, "the path's own numbers, which docs/mathematics.md lists")
    predict: str | None = setting(None, "what the network's output is", choices=paths.PREDICTIONS)
    sampler: str = setting("stratified", "the law of the times", choices=_SAMPLERS)
    sampler_settings: dict[str, Any] = setting(dict, "the sampler's own numbers")
    match: str = setting("velocity", "the space in which distances are taken", choices=paths.MATCH_SPACES)
    weight: str = setting("one", "the weight of a time in the loss", choices=paths.WEIGHTS)
    fake: LawConfig = setting(LawConfig, "the times of the fake model's turn and their weight")
    generator: LawConfig = setting(LawConfig, "the times of the generator's turn and their weight")
    guidance: LawConfig = setting(
        LawConfig, "the times and the weight of what distill.guidance adds to a gradient in the samples alone"
    )

    def turns(self, teacher: Description | None = None) -> dict[str, Matching]:
        """:meth:`build` for each turn, or the guidance, that has a law of times or a weight of its own.

        Raises:
            UserError: as :meth:`build`, with the turn's key, or numbers of a sampler that the turn does not name.
        """
        found = {}
        for turn in ("fake", "generator", "guidance"):
            law: LawConfig = getattr(self, turn)
            if law == LawConfig():
                continue
            given: dict[str, Any] = {} if law.weight is None else {"weight": law.weight}
            if law.sampler is not None:
                given |= {"sampler": law.sampler, "sampler_settings": law.sampler_settings}
            elif law.sampler_settings:
                raise UserError(f"path.{turn}.sampler_settings is given, but path.{turn}.sampler is null")
            try:
                found[turn] = replace(self, **given).build(teacher)
            except UserError as error:
                raise UserError(re.sub(r"^path\.(sampler|weight)", rf"path.{turn}.\1", str(error))) from None
        return found

    def build(self, teacher: Description | None = None) -> Matching:
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
            weight = paths.weight(self.weight, path)
        except UserError as error:
            raise UserError(f"path.weight: {error}") from None
        try:
            return Matching(path, predict, self.match, weight)
        except UserError as error:
            raise UserError(f"path.match and path.predict: {error}") from None


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam with a schedule of its learning rate, :class:`realuid_fast.optim.Optimiser`."""

    lr: float = setting(1e-3, "the learning rate after its warm-up", ABOVE_ZERO)
    betas: tuple[float, float] = setting((0.0, 0.999), "the decays of Adam's first and second moments", BELOW_ONE)
    clip: float = setting(1.0, "the largest norm of a gradient, 0 for any", Range(0.0, math.inf))
    warmup: int = setting(0, "steps over which the learning rate rises", WHOLE)
    warmup_from_zero: bool = setting(False, "whether the first step has the learning rate 0")
    decay: str = setting("constant", "how the learning rate falls over the run", choices=DECAYS)
    floor: float = setting(0.0, "the share of the learning rate that is left at the run's end", SHARE)


@dataclass(frozen=True)
class TeacherConfig:
    """The command ``train-teacher``, which takes one batch an update."""

    sampler: str | None = setting(None, "as path.sampler, which holds if this is null", choices=_SAMPLERS)
    sampler_settings: dict[str, Any] = setting(dict, "the numbers of teacher.sampler")
    match: str | None = setting(None, "as path.match, which holds if this is null", choices=paths.MATCH_SPACES)
    weight: str | None = setting(None, "as path.weight, which holds if this is null", choices=paths.WEIGHTS)
    batch: int = setting(64, "samples of an update, over all ranks", POSITIVE)
    updates: int = setting(10_000, "updates of the whole run", POSITIVE)
    optimiser: OptimiserConfig = setting(lambda: OptimiserConfig(betas=(0.9, 0.999)), "the teacher's optimiser")
    label_dropout: float = setting(
        0.0,
        "the share of labels replaced by 'no label', for classifier-free guidance (Ho and Salimans, 2207.12598); the "
        "network then has such a label",
        BELOW_ONE,
    )
    reduction: str = setting(
        "sum",
        "what the loss does over a sample's elements; Adam does not see the factor between them, the clip does",
        choices=("sum", "mean"),
    )
    guided: str = setting(
        "",
        "the file of a teacher with a null label, whose guided prediction takes the place of the data's targets; the "
        "network takes the scale (guided distillation)",
    )
    scales: tuple[float, float] = setting((1.0, 4.0), "the scales of a guided network, drawn uniformly", FINITE)
    halved: str = setting(
        "",
        "the file of a teacher whose DDIM steps, two by two, take the place of the data's targets; the network starts "
        "at its weights (progressive halving)",
    )
    steps: int = setting(8, "the steps of the network that learns from teacher.halved, half of that one's", POSITIVE)
    coupling: bool = setting(
        False,
        "whether optimal transport pairs each batch with its noise, or with its endpoints where those are not the "
        "samples' own; inside classes where the network sees them (realuid_fast.couplings)",
    )
    ema: tuple[float, ...] = setting((0.999,), "decays of the weights' averages", BETWEEN)
    ema_warmup: bool = setting(True, "whether the averages' decay rises from a small one")
    export: float = setting(0.999, "the decay of the average that is saved, 0 for the last weights", BELOW_ONE)
    evaluate_every: int | None = setting(
        None,
        "as run.evaluate_every, which holds if this is null; a teacher's samples take many evaluations of its network",
        WHOLE,
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """A preset by name and its parameters, :data:`realuid_fast.objectives.PRESETS`; null ones take their default.

    The name ``regression`` is the baseline of :mod:`realuid_fast.train.regression`, which has no parameter.
    A parameter that the preset does not have is refused.
    """

    name: str = setting("realuid", "the preset", choices=_OBJECTIVES)
    alpha: float | None = setting(None, "the weight of generated rows; 0.92 if null where a preset needs it")
    beta: float | None = setting(None, "the weight of generated targets; 0.94 if null where a preset needs it")
    gamma: float | None = setting(None, "the quadratic weight of 'general'; 0.92 if null")
    kappa: float | None = setting(None, "the parameterisation of 'general', 1 or beta")
    teacher_target: bool | None = setting(
        None, "whether 'general' takes the teacher's prediction in place of a real row's sampled target"
    )
    l1: float | None = setting(None, "the weight of the first term of 'fgm'")
    l2: float | None = setting(None, "the weight of the second term of 'fgm'")
    alpha_sid: float | None = setting(None, "the weight of the quadratic term of 'sid' and 'realsid'")
    c: float | None = setting(None, "the smoothing of the distance of 'sim', in units of the match space")
    p: float | None = setting(None, "the power of the distance of 'sim', 1 for pseudo-Huber")
    scaled: bool | None = setting(None, "whether 'sid' and 'realsid' divide by each sample's distance to the teacher")

    @property
    def title(self) -> str:
        """The objective's name in tables."""
        return self.name if self.name == REGRESSION else self.build().name

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The preset's own parameters."""
        return {} if self.name == REGRESSION else dict(inspect.signature(PRESETS[self.name]).parameters)

    def of(self, name: str) -> ObjectiveConfig:
        """The objective of another name starts afresh; of the same name it is this one."""
        return self if name == self.name else ObjectiveConfig(name)

    def foreign(self) -> list[str]:
        """Those that are given and that the preset does not have."""
        return [
            f.name for f in fields(self)[1:] if getattr(self, f.name) is not None and f.name not in self.parameters()
        ]

    def build(self) -> Objective:
        """The objective; raises :class:`UserError` for ``regression``, and numbers that the preset refuses."""
        if self.name not in PRESETS:
            raise UserError(f"distill.objective.name must be one of {', '.join(PRESETS)}; got {self.name!r}")
        settings = {}
        for name, parameter in self.parameters().items():
            value = getattr(self, name, None)
            if value is None and parameter.default is parameter.empty:
                value = _PUBLISHED[name]
            if value is not None:
                settings[name] = value
        try:
            return PRESETS[self.name](**settings)
        except UserError as error:
            raise UserError(f"distill.objective: {error}") from None


@dataclass(frozen=True)
class GanConfig:
    """A discriminator, none while both weights are 0: a head on the fake model, or heads on frozen features."""

    weight_fake: float = setting(0.0, "the weight of the head's loss in the fake turn", NOT_NEGATIVE)
    weight_generator: float = setting(
        0.0, "the weight of the generator's term, 0 for a head that distill.divergence alone reads", NOT_NEGATIVE
    )
    least_share: float = setting(
        0.0, "the least share of data in an interpolant that is judged, on the linear path its time", SHARE
    )
    loss: str = setting("softplus", "the loss of both turns", choices=("softplus", "hinge"))
    features: str = setting(
        "",
        "the frozen network that judges clean samples in place of the fake model: 'digits', the shipped classifier, or "
        "a file of realuid-fast train-classifier; heads on its layers train in the fake turns, by distill.fake",
    )
    r1: float = setting(0.0, "the weight of the gradient penalty on real samples, with features alone", NOT_NEGATIVE)


@dataclass(frozen=True)
class RegressionConfig:
    """The teacher's trajectories: of the baseline ``objective: {name: regression}``, or stored, beside an objective."""

    steps: int = setting(20, "steps of the baseline's solver", POSITIVE)
    solver: str = setting("euler", "the baseline's solver", choices=SOLVERS)
    pairs: str = setting(
        "",
        "a file of realuid-fast sample --pairs, to whose samples the student of another objective is fitted too (DMD)",
    )
    weight: float = setting(0.25, "the weight of distill.regression.pairs, DMD's if not given", ABOVE_ZERO)


@dataclass(frozen=True)
class DistillConfig:
    """The command ``distill``. An update is ``fake_turns`` steps of the fake model and one of the generator.

    On a GPU bf16 serves the fake turn, and fp16, whose seed gradient is scaled, or tf32 the generator's; bf16 is too
    coarse there once the fake model is near the teacher, which the run then says (:mod:`realuid_fast.precision`).
    """

    teacher: str = setting("digits", "a shipped teacher's name or a file")
    teacher_network: dict[str, Any] = setting(
        dict, "the network of a published checkpoint, the section network if empty"
    )
    teacher_decay: float | None = setting(
        None, "the average of a published checkpoint, 0 for its last weights, the largest if null", BELOW_ONE
    )
    start: str = setting(
        "",
        "a student's file, its run's folder or a published checkpoint that the generator goes on from (the published "
        "second stage); the teacher's weights if empty",
    )
    start_decay: float | None = setting(None, "the average of distill.start, the exported one if null", BELOW_ONE)
    guidance: float = setting(
        1.0, "the scale of the teacher's classifier-free guidance, which the student learns; 1 for none", FINITE
    )
    objective: ObjectiveConfig = setting(ObjectiveConfig, "the loss of both turns")
    gan: GanConfig = setting(GanConfig, "a discriminator beside the objective")
    divergence: str = setting(
        "reverse-kl",
        "the f-divergence that an objective descends whose gradient flows through the samples alone, or sid for "
        "forward-kl and jeffreys; others than reverse-kl take their ratio from the discriminator",
        choices=DIVERGENCES,
    )
    regression: RegressionConfig = setting(RegressionConfig, "the baseline's trajectories")
    batch: int = setting(64, "samples of a turn, over all ranks", POSITIVE)
    updates: int = setting(1000, "updates of the whole run", POSITIVE)
    fake_turns: int = setting(5, "the fake model's steps in an update", POSITIVE)
    fake_precision: str = setting("float32", "the networks' precision in the fake turn", choices=PRECISIONS)
    generator_precision: str = setting("float32", "the networks' precision in the generator's turn", choices=PRECISIONS)
    teacher_precision: str = setting(
        "float32",
        "bf16 stores the teacher's weights in half the memory and computes its outputs in bf16 in both turns",
        choices=("float32", "bf16"),
    )
    t_start: float | None = setting(None, "the time that the generator starts from, the path's own if null", FINITE)
    shared_draws: bool = setting(
        True,
        "whether a real sample of the fake turn has the time and the noise of a generated one, as published",
    )
    fake_start: str = setting(
        "teacher",
        "the fake model's first weights: the teacher's or an untrained network's",
        choices=("teacher", "fresh"),
    )
    dropout: float | None = setting(
        None, "dropout in the generator and the fake model, the teacher's own if null", BELOW_ONE
    )
    labels: str = setting(
        "drawn",
        "the labels of generated samples: drawn from the training set, or those of the real batch in the same row; the "
        "generator's turn then reads a batch too",
        choices=("drawn", "batch"),
    )
    times: tuple[float, ...] = setting((), "times of the generator's further steps, none for one step", FINITE)
    states: str = setting(
        "own", "what the generator's steps start from: its own states, or noised real data's", choices=("own", "data")
    )
    generator: OptimiserConfig = setting(OptimiserConfig, "the generator's optimiser")
    fake: OptimiserConfig = setting(OptimiserConfig, "the fake model's optimiser")
    ema: tuple[float, ...] = setting((0.99,), "decays of the generator's averages", BETWEEN)
    ema_warmup: bool | None = setting(
        None, "whether the averages' decay rises from a small one; if null, it does without a distill.start"
    )
    export: float = setting(
        0.99, "the decay of the average that is evaluated and saved, 0 for the last weights", BELOW_ONE
    )


@dataclass(frozen=True)
class RunConfig:
    """All that a run does besides training: seeds, device, threads, logs, checkpoints. Intervals count updates."""

    seed: int = setting(0, "the seed of everything that is drawn", SEED)
    device: str = setting("cpu", "torch's name of a device, such as cuda")
    mode: str = setting(
        "eager",
        "how the turns of distill run: compiled takes the networks through torch.compile, graphs makes of each turn a "
        "CUDA graph on top of that, graphs-eager a CUDA graph with nothing to compile; teachers train eagerly",
        choices=MODES,
    )
    threads: int = setting(1, "torch's CPU threads, 0 to leave their number as it is", THREADS)
    channels_last: bool = setting(True, "whether image networks have their channels last in memory")
    cudnn_benchmark: bool = setting(
        False, "whether cuDNN chooses each convolution's algorithm by timing them all in its first call, on CUDA"
    )
    log_every: int = setting(10, "updates between two rows of log.csv", POSITIVE)
    sample_every: int = setting(0, "updates between two pictures of samples, 0 for none", WHOLE)
    evaluate_every: int = setting(0, "updates between two evaluations, 0 for none", WHOLE)
    evaluate_samples: int = setting(2000, "samples of an evaluation", Range(2))
    evaluate_precision: str = setting(
        "float32", "the networks' precision where an evaluation makes its samples", choices=PRECISIONS
    )
    inception: str = setting("", "a file of Inception weights, in whose features images are evaluated")
    classifier: str = setting(
        "",
        "a file of realuid-fast train-classifier, in whose features images are evaluated where run.inception is empty",
    )
    inception_only: bool = setting(
        False, "whether no other features will do: without run.inception the run is not evaluated, and says so"
    )
    real_split: str = setting(
        "heldout", "the images that Inception features are compared with", choices=("heldout", "train")
    )
    teacher_steps: int = setting(0, "the teacher's Euler steps for its line in the plot, 0 for no line", WHOLE)
    checkpoint_every: int = setting(1000, "updates between two checkpoints, 0 for one at the end", WHOLE)
    keep: int = setting(2, "checkpoints that stay on disk", POSITIVE)
    accumulate: int = setting(1, "parts in which a batch goes through the networks, to save memory", POSITIVE)
    shard: bool = setting(
        False, "whether networks, optimisers and averages are spread over the ranks (realuid_fast.train.sharding)"
    )
    offload_teacher: bool = setting(
        False, "whether the teacher stays in host memory and is brought to the GPU a layer at a time"
    )
    checkpoint_activations: bool = setting(
        False,
        "whether this package's U-Nets keep the inputs of their blocks alone and run the blocks again in the backward "
        "pass: the same gradients with less memory, for one more forward pass (realuid_fast.networks.recompute)",
    )
    stop_after_skips: int = setting(
        100, "updates in a row without a finite gradient after which the run stops, 0 for never", WHOLE
    )
    tensorboard: bool = setting(True, "whether TensorBoard's files are written, if it is installed")
    progress: bool = setting(True, "whether a bar is shown")
    timings: bool = setting(False, "whether the time of every phase of an update is logged")
    parity: bool = setting(
        False, "whether the run follows the published procedure step for step: docs/parity.md lists what that sets"
    )


PARITY, PARITY_OBJECTIVES = parity.PARITY, parity.PARITY_OBJECTIVES


@dataclass(frozen=True)
class Config:
    """A whole run.

    ``data`` goes to :func:`realuid_fast.data.load`, ``network`` to :func:`realuid_fast.networks.build`.
    """

    data: dict[str, Any] = setting(lambda: {"name": "digits"}, "the data set by its name, with its own settings")
    network: dict[str, Any] = setting(dict, "the network by its kind, with its own settings")
    path: PathConfig = setting(PathConfig, "the path from noise to data")
    teacher: TeacherConfig = setting(TeacherConfig, "the command train-teacher")
    distill: DistillConfig = setting(DistillConfig, "the command distill")
    run: RunConfig = setting(RunConfig, "all besides training")

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
