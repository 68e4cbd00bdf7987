"""Loads the compiled libraries, if they were built; builds nothing itself."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import json
import shlex
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import torch

_loaded = False
_reason: str | None = "the C++ extension has not been loaded"
_no_nodes: str | None = "they have not been loaded"

native: ModuleType | None = None
"""The library's plain functions, :mod:`realuid_fast.ops.native`, or None where it was not built or does not load."""


def _library() -> Path | None:
    folder = Path(__file__).parent.parent
    suffixes = [suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES if "abi3" in suffix]
    candidates = [folder / f"_C{suffix}" for suffix in suffixes + importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.exists()), None)


def load() -> bool:
    """Register the compiled operators for CPU tensors; their schemas must be defined by then.

    Returns:
        Whether the operators are there. Never raises: :func:`why_missing` has the reason.
    """
    global _loaded, _reason, native
    if _loaded:
        return True
    path = _library()
    if path is None:
        _reason = f"the C++ extension was not built; with a C++ compiler in place, run: {repair()}"
        return False
    try:
        torch.ops.load_library(str(path))
        found = importlib.import_module(".native", __package__)
        found.bind(str(path))
    except (OSError, RuntimeError, AttributeError) as error:
        _reason = f"the C++ extension does not load ({str(error).splitlines()[0]}); run: {repair()}"
        return False
    native = found
    try:
        # A wrong REALUID_FAST_CPU_ISA shows here rather than in the middle of a run.
        found.isa()
    except RuntimeError as error:
        _reason = f"the C++ extension does not run: {error}"
        return False
    _loaded, _reason = True, None
    return True


def load_nodes() -> bool:
    """Register the autograd nodes in C++, if they were compiled against this very torch.

    They use torch's own headers, whose types differ from version to version, so their file is named after its torch.

    Returns:
        Whether the nodes are there. Never raises: :func:`why_no_nodes` has the reason.
    """
    global _no_nodes
    files = Path(__file__).parent.parent.glob("_nodes.*.so")
    built = {file.name.removeprefix("_nodes.").removesuffix(".so"): file for file in files}
    if not built:
        _no_nodes = "they were not built"
    elif torch.__version__ not in built:
        _no_nodes = f"they were built with torch {', '.join(sorted(built))}, this is {torch.__version__}"
    else:
        try:
            torch.ops.load_library(str(built[torch.__version__]))
            _no_nodes = None
        except (OSError, RuntimeError) as error:
            _no_nodes = f"they do not load ({str(error).splitlines()[0]})"
    return _no_nodes is None


def why_no_nodes() -> str | None:
    """Why the autograd nodes in Python serve, as part of a sentence, or None where those in C++ do."""
    return _no_nodes


def repair() -> str:
    """The command that builds the package again with its extension, from where it was installed from."""
    source, editable = "realuid-fast", ""
    try:
        text = importlib.metadata.distribution("realuid-fast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if text is not None:
        origin = json.loads(text)
        source, vcs = origin["url"], origin.get("vcs_info")
        if vcs is not None:
            source = f"{vcs['vcs']}+{source}@{vcs['commit_id']}"
        elif source.startswith("file:"):
            source = unquote(urlsplit(source).path)
        editable = "--editable " if origin.get("dir_info", {}).get("editable") else ""
    # No cache: pip keeps the wheels that it builds, the pure one too. No isolation: the build sees the installed torch.
    options = "--force-reinstall --no-deps --no-cache-dir --no-build-isolation"
    return f"pip install 'setuptools>=77' ninja && pip install {options} {editable}{shlex.quote(source)}"


def why_missing() -> str | None:
    """Why the compiled operators are not there, in one sentence, or None where they are."""
    return _reason


def isa() -> str | None:
    """The instruction set the operators run on (``avx512``, ``avx2``, ``baseline``), or None without the library.

    Raises:
        RuntimeError: ``REALUID_FAST_CPU_ISA`` asks for one that this processor lacks.
    """
    return None if native is None else str(native.isa())


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation, for the rest of the process.

    For programs that allocate the same large tensors every step: glibc gives buffers above some megabytes back to the
    system and pays for fresh pages each time, which at 25 MB a tensor takes several times longer than the kernels. The
    process keeps its peak size.

    Returns:
        Whether anything was done: False without the library or on another C library.
    """
    return native is not None and bool(native.keep_freed_memory())
