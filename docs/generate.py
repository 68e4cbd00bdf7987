"""Writes the pages that come from the source: ``settings.md``, ``commands.md`` and ``api.md``; ``conf.py`` calls it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from pathlib import Path

API = {
    "Losses of a drawn batch": "realuid_fast.losses",
    "The drawn batch": "realuid_fast.interpolant",
    "The fused calls on tensors": "realuid_fast.functional",
    "Objectives": "realuid_fast.objectives",
    "Paths": "realuid_fast.paths",
    "Laws of times": "realuid_fast.paths.samplers",
    "Noise": "realuid_fast.noise",
    "Couplings": "realuid_fast.couplings",
    "Optimiser": "realuid_fast.optim",
    "Data": "realuid_fast.data",
    "Teachers and students": "realuid_fast.teachers",
    "Sampling": "realuid_fast.sampling",
    "Distances": "realuid_fast.metrics",
    "Backends": "realuid_fast.backends",
    "Published losses under their own signatures": "realuid_fast.compat",
    "Errors": "realuid_fast.errors",
}


def write(folder: Path) -> None:
    """Write the pages into ``folder``; a page that has not changed keeps its time, so that Sphinx skips it."""
    for name, text in {"api.md": _api(), "settings.md": _settings(), "commands.md": _commands()}.items():
        file = folder / name
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def _api() -> str:
    text = "# Public names\n\nEverything below is imported from the module that its heading names.\n"
    for title, module in API.items():
        text += f"\n## {title}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n"
    return text


def _settings() -> str:
    """A table for every section of the configuration, from the dataclasses that it is read into."""
    from realuid_fast.train import config as configs

    text = (
        "# Settings\n\nA run's configuration is a YAML file of these sections; `--set section.key=value` replaces one "
        "value. The resolved configuration is saved as `config.yaml` in the run's folder. The keys of `data` and "
        "`network` depend on their `name` and `kind`: {doc}`data` and {doc}`architecture` list them.\n"
    )
    return text + "".join(_section(name, hint) for name, hint in typing.get_type_hints(configs.Config).items())


def _section(name: str, kind: type) -> str:
    if not dataclasses.is_dataclass(kind):
        return ""
    hints = typing.get_type_hints(kind)
    text = f"\n## {name}\n\n```{{eval-rst}}\n{_plain(kind.__doc__)}\n```\n\n| key | type | default |\n|---|---|---|\n"
    inner = ""
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            text += f"| `{name}.{field.name}` | a section of its own, below | |\n"
            inner += _section(f"{name}.{field.name}", hint)
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        text += f"| `{name}.{field.name}` | {_type(hint)} | `{default!r}` |\n"
    return text + inner


def _type(hint: object) -> str:
    """A type in words; ``\\|`` keeps a table's cells apart."""
    return (hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)).replace("|", "\\|")


def _plain(text: str | None) -> str:
    lines = (text or "").splitlines()
    return "\n".join([lines[0], *(line.removeprefix("    ") for line in lines[1:])]) if lines else ""


def _commands() -> str:
    """The help of every command, as the command line prints it."""
    from realuid_fast.cli.parser import parser

    # argparse breaks lines by the terminal's width.
    os.environ["COLUMNS"] = "100"
    found = parser()
    subcommands = next(a for a in found._actions if isinstance(a, argparse._SubParsersAction))
    text = "# Commands\n\n`realuid-fast COMMAND --help` prints these pages.\n"
    for name, command in subcommands.choices.items():
        text += f"\n## {name}\n\n```text\n{command.format_help()}```\n"
    return text
