"""Configuration: YAML files and ``key.sub=value`` overrides become :mod:`.settings`, with the faulty key named."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union

from .. import choices, data, networks
from ..bounds import Range, shown
from ..errors import UserError
from ..extras import extra
from ..files import read_regular
from ..settings import PARITY, PARITY_OBJECTIVES, REGRESSION, Config, DistillConfig, RegressionConfig
from ..train.modes import captures

with extra():
    import yaml

CONFIGS = choices.CONFIGS
presets, recipes = choices.presets, choices.recipes
T = TypeVar("T")
# ValueError: dates and numbers that only look right, bytes that are no text. RecursionError: thousands of brackets.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
# Limits of a configuration: a noise schedule of 4,000 numbers takes 4,000 nodes and 100 KB of them.
_MOST_BYTES, _MOST_NODES, _MOST_DEPTH, _MOST_BASES = 2**20, 20_000, 32, 64
_MOST_TEXT = 10_000  # characters of one value
# Settings that every data set takes beside its own: type, default, meaning.
EVERY_DATA_SET: dict[str, tuple[Any, Any, str]] = {
    "flip": (bool, False, "whether a run mirrors half of its images at random"),
    "balance": (bool, False, "whether a run draws all classes alike often"),
    "classes": (Sequence[int] | None, None, "the labels whose samples are kept, training and held-out, all if null"),
}


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Configuration of a shipped name (``"digits"``) or a YAML file, with ``key.sub=value`` overrides on top.

    A file may name another one to start from, ``base: digits``, or several, the later over the earlier.

    Raises:
        UserError: no such file, an unknown key, or a value of the wrong type, each with the key's full name.
    """
    return from_mapping(merge(_read(source), nested(overrides)))


def load_kept(file: Path, overrides: Iterable[str] = ()) -> Config:
    """:func:`load` of the ``config.yaml`` of a run.

    Earlier versions wrote settings of the objective there that its preset does not have and that nothing read: they
    are left out.
    """
    content = _read(file)
    distill = _filled(content).distill
    for key in distill.objective.foreign():
        del content["distill"]["objective"][key]
    for key in _of_baseline(distill):
        del content["distill"]["regression"][key]
    return from_mapping(merge(content, nested(overrides)))


def preset(name: str) -> str:
    """The name that :func:`load` takes for a preset; raises :class:`UserError` for an unknown preset."""
    if name not in presets():
        raise UserError(f"there is no preset {name!r}: the presets are {', '.join(presets())}")
    return f"presets/{name}"


def from_mapping(content: Mapping[str, Any]) -> Config:
    """:class:`.settings.Config` of nested plain values, checked."""
    config = _filled(content)
    if config.run.parity:
        config = _in_parity(config, content)
    _check(config)
    return config


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, as YAML can hold them."""
    return as_plain(asdict(config))


def save(config: Config, file: Path) -> None:
    """Write the resolved configuration, every key, as YAML."""
    file.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``; data, network or objective of another name or kind start afresh, mixing nothing."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            afresh = key in ("data", "network", "objective") and any(
                k in value and value[k] != old.get(k) for k in ("name", "kind")
            )
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
                waiting += [(further, depth + 1) for further in (each if isinstance(each, tuple) else (each,))]
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
        names = [*choices.configs(), *(f"recipes/{name}" for name in recipes())]
        every = {name.rpartition("/")[2]: name for name in [*(f"presets/{name}" for name in presets()), *names]}
        near = difflib.get_close_matches(str(source), every, n=1)
        shipped = f"{', '.join(names)}; or presets/NAME){f'. Did you mean {every[near[0]]}?' if near else ''}"
        raise UserError(f"there is no configuration {str(source)!r}: neither a file nor one of the shipped ({shipped}")
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
        names = key.split(".")
        if not equals or not all(names):
            raise UserError(f"an override must read key.sub=value, got {override!r}")
        try:
            value = _plain_yaml(text)
        except UserError as error:
            raise UserError(f"the value of {key} {error}") from None
        except _NOT_YAML:
            raise UserError(f"the value of {key} is not valid YAML: {shown(text)}") from None
        section = sections
        for name in names[:-1]:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"{key} cannot be set: {name} is a value there, not a section")
        section[names[-1]] = value
    return sections


def _filled(content: Mapping[str, Any]) -> Config:
    """The configuration with every value of its type and inside its bounds, and no key that nothing reads."""
    config = _fill(Config, content, "")
    return replace(
        config,
        data=_named(config.data, "data", "name", data.LOADERS, {key: row[0] for key, row in EVERY_DATA_SET.items()}),
        network=_named(config.network, "network", "kind", networks.KINDS, {}),
        distill=replace(
            config.distill,
            teacher_network=_named(
                config.distill.teacher_network, "distill.teacher_network", "kind", networks.KINDS, {}
            ),
        ),
    )


def settings_of(made: Callable[..., Any]) -> dict[str, Any]:
    """The types of the settings that a data set's loader or a network's constructor takes, from its signature."""
    hints = typing.get_type_hints(made.__init__ if isinstance(made, type) else made)  # type: ignore[misc]
    return {name: hints.get(name, Any) for name in inspect.signature(made).parameters}


def _named(
    section: dict[str, Any], where: str, chooser: str, kinds: Mapping[str, Callable[..., Any]], more: Mapping[str, Any]
) -> dict[str, Any]:
    """``section`` with its values held to what the function takes that ``section[chooser]`` names.

    Missing settings are left to that function: the shape of a network's samples comes from the data.
    """
    name = section.get(chooser)
    if name is None or (chooser == "kind" and name == "yours"):
        return section
    if not isinstance(name, str) or name not in kinds:
        raise UserError(f"{where}.{chooser} must be one of {', '.join(kinds)}; got {shown(name)}")
    hints = {chooser: str, **settings_of(kinds[name]), **more}
    filled = {}
    for key, value in section.items():
        _check_key(key, hints, where, f"of {where}.{chooser} {name}")
        made = _value(hints[key], value, f"{where}.{key}")
        # YAML reads 1e-3 without a point as text, and 1.0e+3 as no whole number. All other values go on as written.
        filled[key] = made if isinstance(value, (str, float)) else value
    return filled


def _check_key(key: object, known: Collection[str], prefix: str, of: str = "in the configuration") -> None:
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f", did you mean {_join(prefix, near[0])}" if near else f"; it takes {', '.join(known)}"
        raise UserError(f"there is no key '{_join(prefix, key):.80}' {of}{hint}")


def _fill(cls: type[T], content: Any, prefix: str) -> T:
    """The dataclass ``cls`` from a mapping; defaults where a key is missing."""
    if not isinstance(content, Mapping):
        raise UserError(f"{prefix or 'the configuration'} must be a section with keys, got {shown(content)}")
    hints, known = typing.get_type_hints(cls), {f.name: f for f in fields(typing.cast(Any, cls))}
    filled: dict[str, Any] = {}
    for key, value in content.items():
        _check_key(key, known, prefix)
        name, hint, field = _join(prefix, key), hints[key], known[key]
        if is_dataclass(hint):
            # Missing keys fall back to the owner's default for the section, which may differ from the section's own.
            defaults = asdict(field.default_factory()) if field.default_factory is not MISSING else {}
            below = merge(defaults, value) if isinstance(value, Mapping) else value
            filled[key] = _fill(typing.cast(type, hint), below, name)
            continue
        made = filled[key] = _value(hint, value, name)
        _check_value(made, name, field.metadata["bounds"], field.metadata["choices"])
    return cls(**filled)


def _check_value(value: Any, name: str, bounds: Range | None, words: Collection[str] | None) -> None:
    if value is None:
        return
    if words is not None and value not in words:
        raise UserError(f"{name} must be one of {', '.join(words)}; got {shown(value)}")
    for number in value if isinstance(value, tuple) else (value,):
        if bounds is not None:
            bounds.check(name, number)


def _value(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the type ``hint``; raises :class:`UserError` with ``name`` where it is of another."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        for each in (kinds := [kind for kind in inner if kind is not types.NoneType]):
            try:
                return _value(each, value, name)
            except UserError:
                if len(kinds) == 1:
                    raise
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif origin in (tuple, Sequence):
        many = origin is tuple and inner[-1] is not Ellipsis
        if isinstance(value, (list, tuple)) and (not many or len(value) == len(inner)):
            return tuple(_value(inner[0], each, name) for each in value)
    elif hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    elif hint in (float, int):
        number = value if isinstance(value, float) else _number(value, name)
        if number is not None and (hint is float or number.is_integer()):
            return hint(number)
    raise UserError(f"{name} must be {in_words(hint)}, got {shown(value)}")


def _number(value: Any, name: str) -> float | None:
    """A number of a whole one or of text, None where it is neither: YAML reads 1e-3 without a point as text."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        raise UserError(f"{name} is too large: no floating-point number holds it") from None


def in_words(hint: Any) -> str:
    """A setting's type in words: ``"a whole number"``, ``"text or a list of numbers"``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(kind) for kind in inner if kind is not types.NoneType))
    if origin in (tuple, Sequence):
        many = f"{len(inner)} " if origin is tuple and inner[-1] is not Ellipsis else ""
        return f"a list of {many}{'whole ' if inner[0] is int else ''}numbers"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text"}
    return words.get(hint, "a section with keys")


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
    """Refuse settings that do not go together, which no field can say by itself."""
    run, teacher, distill = config.run, config.teacher, config.distill
    if foreign := distill.objective.foreign():
        name, own = distill.objective.name, distill.objective.parameters()
        takes = f"takes {', '.join(own)}" if own else "has no parameters"
        raise UserError(f"distill.objective.{foreign[0]} is given, but the preset {name} {takes}")
    if run.accumulate > 1 and captures(run.mode):
        raise UserError(f"run.accumulate must be 1 with run.mode {run.mode}: a graph holds one whole turn")
    for name in ("shard", "offload_teacher"):
        if getattr(run, name) and run.mode != "eager":
            raise UserError(
                f"run.{name} must be false with run.mode {run.mode}: only eager turns bring blocks together"
            )
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
    for key in _of_baseline(distill):
        raise UserError(f"distill.regression.{key} is for distill.objective regression alone")
    if distill.steps and distill.objective.name != REGRESSION:
        raise UserError(f"distill.steps is for the objective {REGRESSION}; other students take distill.times")
    whole = not (run.shard or run.offload_teacher or distill.teacher_precision == "bf16")
    if distill.objective.name == REGRESSION and not whole:
        raise UserError(
            f"distill.objective.name {REGRESSION} holds its networks whole and in float32: run.shard and "
            "run.offload_teacher must be false, distill.teacher_precision float32"
        )
    if run.offload_teacher and run.device == "cpu":
        raise UserError("run.offload_teacher must be false with run.device cpu: the teacher is in host memory there")
    gan = distill.gan
    if gan.r1 and not gan.features:
        raise UserError("distill.gan.r1 is a penalty of heads on frozen features: set distill.gan.features")
    if gan.weight_generator and not gan.weight_fake:
        raise UserError("distill.gan.weight_generator needs a weight_fake: nothing else trains the discriminator")
    if distill.divergence != "reverse-kl" and not gan.weight_fake:
        raise UserError(f"distill.divergence {distill.divergence} needs a discriminator: set distill.gan.weight_fake")
    for section, job in (("teacher", teacher), ("distill", distill)):
        if job.export and job.export not in job.ema:
            raise UserError(f"{section}.export must be 0 or one of {section}.ema {list(job.ema)}, got {job.export:g}")


def _of_baseline(distill: DistillConfig) -> list[str]:
    """Settings of the baseline's trajectories that are given to another objective, which does not read them."""
    own, usual = distill.regression, RegressionConfig()
    keys = () if distill.objective.name == REGRESSION else ("first_stage", "previous", "steps", "solver")
    return [key for key in keys if getattr(own, key) != getattr(usual, key)]


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def as_plain(value: Any) -> Any:
    """``value`` with lists for its tuples, as YAML holds them."""
    if isinstance(value, Mapping):
        return {key: as_plain(v) for key, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
