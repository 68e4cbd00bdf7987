"""The public API, name by name with its signature, is the committed one in ``tests/public_api.txt``.

A name that goes, or a signature that changes, breaks somebody's code, so such a change is made on purpose: this command
writes the file anew, and the difference goes into the commit and into CHANGELOG.md::

    python tests/test_public_api.py
"""

import ast
import difflib
import importlib
import inspect
import re
from pathlib import Path

FILE = Path(__file__).parent / "public_api.txt"
# The modules that documents and examples import from. Other modules are the package's own and may change at any time.
MODULES = [
    "realuid_fast",
    *(
        f"realuid_fast.{name}"
        for name in (
            "backends",
            "compat",
            "compat.dmd2",
            "compat.fastgen",
            "compat.modelopt",
            "compat.sid",
            "couplings",
            "data",
            "data.packing",
            "errors",
            "functional",
            "interpolant",
            "losses",
            "metrics",
            "models",
            "models.convert",
            "models.generator",
            "models.hub",
            "models.pictures",
            "networks",
            "noise",
            "objectives",
            "optim",
            "paths",
            "paths.samplers",
            "sampling",
            "teachers",
            "tripwires",
            "jobs.config",
            "jobs.trainers",
            "matching",
            "settings",
            "train.distill",
            "train.trainer",
        )
    ),
]


def signature(thing):
    """Its parameters and result as the source writes them, without addresses of objects that are defaults."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return "(...)"
    text = re.sub(r"ForwardRef\('([^']*)'\)", r"'\1'", text)
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    return re.sub(r"<(?:function|class|built-in function|built-in method) '?([\w.<>]+)'?[^>]*>", r"\1", text)


def members(cls):
    """Lines for the methods and properties that a class adds to its public bases; its constructor shows its fields."""
    found = {}
    for base in reversed(cls.__mro__):
        if base is cls or (base.__name__.startswith("_") and base.__module__.startswith("realuid_fast")):
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
            found |= {name: None for name in vars(base).get("__annotations__", {}) if not name.startswith("_")}
    for name, value in sorted(found.items()):
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if inspect.isfunction(value):
            yield f"{name}{signature(value)}"
        elif name not in inspect.signature(cls).parameters:
            yield name


def names(module):
    """The public names of a module: its ``__all__``, or what its source defines without underscore."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    found = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return sorted(name for name in found if not name.startswith("_"))


def lines():
    for path in MODULES:
        module = importlib.import_module(path)
        yield f"[{path}]"
        for name in names(module):
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                yield f"module {name}"
            elif inspect.isclass(thing):
                bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
                built = "" if issubclass(thing, BaseException) else signature(thing)
                yield f"class {name}{f'[{bases}]' if bases else ''}{built}"
                yield from (f"    {line}" for line in members(thing))
            elif inspect.isfunction(thing):
                yield f"{name}{signature(thing)}"
            else:
                yield name


def test_the_public_api_is_the_committed_one():
    changes = "\n".join(
        difflib.unified_diff(FILE.read_text().splitlines(), [*lines()], "committed", "now", lineterm="")
    )
    assert not changes, f"the public API changed; if on purpose, run: python tests/test_public_api.py\n{changes}"


def test_every_documented_import_is_of_a_public_module():
    """Code blocks of the documents import from :data:`MODULES` alone, and name what is there."""
    root = FILE.parent.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    found = re.findall(r"^\s*from (realuid_fast[\w.]*) import ([\w, ]+)", "\n".join(blocks), re.MULTILINE)
    assert found
    for path, imported in found:
        for name in imported.split(", "):
            assert path in MODULES, path
            assert name in names(importlib.import_module(path)) or f"{path}.{name}" in MODULES, f"{path}.{name}"


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
