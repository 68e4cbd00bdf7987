"""Writes the pages that come from the source: ``settings.md``, ``commands.md`` and ``api.md``; ``conf.py`` calls it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

API = {
    "Losses of a drawn batch": "realuid_fast.losses",
    "The drawn batch": "realuid_fast.interpolant",
    "The fused calls on tensors": "realuid_fast.functional",
    "Gradients that descend an f-divergence": "realuid_fast.descent",
    "Objectives": "realuid_fast.objectives",
    "Paths": "realuid_fast.paths",
    "Laws of times": "realuid_fast.paths.samplers",
    "Noise": "realuid_fast.noise",
    "Couplings": "realuid_fast.couplings",
    "Optimiser": "realuid_fast.optim",
    "Data": "realuid_fast.data",
    "Networks": "realuid_fast.networks",
    "Trainers of a student": "realuid_fast.train.distill",
    "Teachers and students": "realuid_fast.teachers",
    "Finished networks": "realuid_fast.models.loaded",
    "Frozen views": "realuid_fast.models.frozen",
    "Pictures": "realuid_fast.models.pictures",
    "Sampling": "realuid_fast.sampling",
    "The Hugging Face hub": "realuid_fast.models.hub",
    "Tripwires": "realuid_fast.tripwires",
    "Distances": "realuid_fast.metrics",
    "Backends": "realuid_fast.backends",
    "Published losses under their own signatures": "realuid_fast.compat",
    "FastGen's losses": "realuid_fast.compat.fastgen",
    "Model Optimizer's losses": "realuid_fast.compat.modelopt",
    "SiD's losses": "realuid_fast.compat.sid",
    "DMD2's losses": "realuid_fast.compat.dmd2",
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
    """A table for every section of the configuration, from the dataclasses and functions that it goes to."""
    from realuid_fast.cli import listing

    text = (
        "# Settings\n\nA run's configuration is a YAML file of these sections; `--set section.key=value` replaces one "
        "value. `realuid-fast config NAME` prints a configuration with all of this as comments, and `--config` takes "
        "what it prints. The resolved configuration is saved as `config.yaml` in the run's folder.\n"
    )
    for section in listing.sections():
        kind = f", {listing.NAMED[section.name][0]} `{section.of}`" if section.of else ""
        text += f"\n## {section.name or 'sections'}{kind}\n\n```{{eval-rst}}\n{section.text}\n```\n"
        if section.rows:
            text += "\n| key | type and bounds | default | meaning |\n|---|---|---|---|\n"
        for row in section.rows:
            default = row.default_in_words() if row.needed else f"`{listing.plain(row.default)}`"
            cells = (f"`{row.key}`", row.kind(), default, row.meaning)
            # Two stars would make the text between them bold.
            text += f"| {' | '.join(cells)} |\n".replace("*", "\\*")
    return text


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
