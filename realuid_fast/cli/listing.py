"""All settings with their types, defaults, bounds and meanings: for ``realuid-fast config`` and the documents."""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any

from .. import data, networks
from ..extras import extra
from ..jobs import config as configs
from ..settings import Config

with extra():
    import yaml

WIDTH = 116  # of a line of comment
HEAD = """Above each key is its meaning, and in brackets its type, its bounds and its default. A key behind #
without a blank is not given: remove the # to give it."""
# The sections whose keys depend on one of them, and the functions that take the others.
NAMED: dict[str, tuple[str, Mapping[str, Callable[..., Any]]]] = {
    "data": ("name", data.LOADERS),
    "network": ("kind", networks.KINDS),
}
FROM_DATA = ("network.dim", "network.shape")  # what trainers fill in where it is not given


@dataclass(frozen=True)
class Row:
    """A setting: ``"teacher.batch"``, its type in words, its default, what it is held to, and its meaning."""

    key: str
    type: str
    default: Any
    held_to: str
    meaning: str

    @property
    def needed(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    def default_in_words(self) -> str:
        """``"default 64"``, or where the value comes from instead."""
        if self.key in FROM_DATA:
            return "by default the data's"
        return "needed" if self.needed else f"default {plain(self.default)}"

    def kind(self) -> str:
        """The type with its bounds, or the choices."""
        one_of = self.held_to.startswith("one of")
        return self.held_to if one_of else ", ".join(filter(None, (self.type, self.held_to)))

    def comment(self) -> str:
        """The row without its key, in a sentence."""
        return f"{self.meaning} [{self.kind()}; {self.default_in_words()}]"


@dataclass(frozen=True)
class Section:
    """Settings under one name. ``of`` is the data set or the kind of network that they belong to, or empty."""

    name: str
    of: str
    text: str
    rows: list[Row]


def sections(cls: type = Config, name: str = "", default: Any = None, meaning: str = "") -> Iterator[Section]:
    """Every section of a configuration in its order, each followed by the sections inside it.

    ``meaning`` is what the field above says of this section; several sections may be of one class.
    """
    default, hints = default or cls(), typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    plain_ones = [key for key in known if not is_dataclass(hints[key])]
    rows = []
    for key in plain_ones:
        bounds, choices = known[key].metadata["bounds"], known[key].metadata["choices"]
        held_to = "" if bounds is None else re.sub(r"\b(be|lie) ", "", bounds.rule(), count=1)
        if choices is not None:
            held_to = f"one of {', '.join(choices)}" + (" or null" if NoneType in typing.get_args(hints[key]) else "")
        row = Row(_join(name, key), _words(hints[key]), getattr(default, key), held_to, known[key].metadata["meaning"])
        rows.append(row)
    said = f"{meaning[:1].upper()}{meaning[1:]}. " if meaning else ""
    yield Section(name, "", said + inspect.cleandoc(cls.__doc__ or ""), rows)
    for key, (_, kinds) in NAMED.items() if cls is Config else ():
        yield from (Section(key, kind, _first(made), _rows_of(key, made)) for kind, made in kinds.items())
        if key == "data":
            settings = configs.EVERY_DATA_SET.items()
            every = [Row(f"data.{key}", _words(kind), usual, "", text) for key, (kind, usual, text) in settings]
            yield Section(key, "", "Every data set takes", every)
    for key in known:
        if key not in plain_ones:
            said = known[key].metadata["meaning"]
            yield from sections(typing.cast(type, hints[key]), _join(name, key), getattr(default, key), said)


def _rows_of(section: str, made: Callable[..., Any]) -> list[Row]:
    """The settings of one data set or kind of network, from its signature and the ``Args`` of its docstring."""
    parameters, said = inspect.signature(made).parameters, _arguments(made)
    return [
        Row(f"{section}.{key}", _words(hint), parameters[key].default, "", said.get(key, ""))
        for key, hint in configs.settings_of(made).items()
    ]


def _arguments(made: Callable[..., Any]) -> dict[str, str]:
    """The text of each name in the ``Args`` of a docstring."""
    block = re.search(r"^Args:\n((?: .*\n|\n)*)", f"{inspect.getdoc(made)}\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w[\w, \n]*): ((?:.*\n)(?: {8}.*\n)*)", block[1] if block else "", re.MULTILINE)
    return {name: _bare(text) for names, text in entries for name in re.findall(r"\w+", names)}


def _first(made: Callable[..., Any]) -> str:
    """The first sentence of a docstring."""
    return _bare((inspect.getdoc(made) or "").partition("\n\n")[0])


def _bare(text: str) -> str:
    """A docstring's words without its marks."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split()))
    return text.replace("``", "").rstrip(".")


def as_yaml(config: Config, everything: bool = False) -> str:
    """A configuration with a comment on every key, which :func:`.config.load` reads back.

    Settings of ``data`` and ``network`` that are not given are comments, with ``everything`` also those of the other
    data sets and networks.
    """
    content = configs.to_mapping(config)
    lines = [*_comment(HEAD, "")]
    for section in sections():
        given: Any = content
        for key in filter(None, section.name.split(".")):
            given = given[key]
        indent = "  " * (1 + section.name.count("."))
        if section.name in NAMED:
            chooser, kinds = NAMED[section.name]
            if section.of == next(iter(kinds)):
                lines += ["", *_comment(f"{chooser} is one of {', '.join(kinds)}; it decides the other keys", "")]
                lines += [f"{section.name}:{'' if given else ' {}'}"]
                # Without a name that is known here its keys have no rows.
                shown = [chooser] if given.get(chooser) in kinds else list(given)
                lines += [f"  {key}: {plain(given[key])}" for key in shown]
            own = section.of in (given.get(chooser), "")
            if own or everything:
                lines += ["", *_comment(f"-- {section.of or 'all'}: {section.text}", indent)]
                lines += [line for row in section.rows for line in _lines(row, given if own else {}, indent, "#")]
        elif section.name:
            above = indent.removesuffix("  ")
            lines += ["", *_comment(section.text, above), f"{above}{section.name.rpartition('.')[2]}:"]
            lines += [line for row in section.rows for line in _lines(row, given, indent)]
    return "\n".join(lines) + "\n"


def _lines(row: Row, given: Mapping[str, Any], indent: str, mark: str = "") -> list[str]:
    """A row's comment and its key, which is behind ``mark`` with its default where it is not given."""
    key = row.key.rpartition(".")[2]
    if key in given:
        line = f"{indent}{key}: {plain(given[key])}"
    else:
        line = f"{indent}{mark}{key}:" + ("" if row.needed else f" {plain(row.default)}")
    return [*_comment(row.comment(), indent), line]


def _comment(text: str, indent: str) -> list[str]:
    head = f"{indent}# "
    return [
        line
        for paragraph in text.split("\n\n")
        for line in textwrap.wrap(
            _bare(paragraph),
            WIDTH,
            initial_indent=head,
            subsequent_indent=head,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def plain(value: Any) -> str:
    """A value as YAML writes it in one line."""
    text = yaml.safe_dump(configs.as_plain(value), default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def _words(hint: Any) -> str:
    return configs.in_words(hint) + (" or null" if NoneType in typing.get_args(hint) else "")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
