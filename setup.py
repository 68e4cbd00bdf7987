"""Builds the compiled libraries: the operators with plain functions beside them, and the autograd nodes.

The operators' library is on LibTorch's stable ABI and serves every torch from the oldest supported one on. That ABI has
no autograd, so the nodes are a library of their own, bound to the torch that it is compiled against: its file is named
after that torch's version. With any other torch the nodes in Python serve, which costs time in each call and nothing
else. So a build goes on where the nodes do not compile, and says so.

Metadata lives in pyproject.toml. A build without torch, without a C++ compiler, or with a compiler that fails, stops
with a sentence. ``REALUID_FAST_PURE_PYTHON=1`` asks for the package without the library.

``REALUID_FAST_SANITIZE=address,undefined`` builds the whole package with GCC's or Clang's sanitizers into
``build/sanitize``, away from every other build; ``make sanitize`` runs the operators' tests on it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("REALUID_FAST_SANITIZE", "")
TORCH = "2.11"  # the oldest that the package supports; pyproject.toml names it too
ABI3 = {"py_limited_api": "cp311"}
# The commands of setuptools that need the library. dist_info is the first of them that pip calls, before it downloads
# what the package requires. Source archives and a version's query need neither torch nor a compiler.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
NODES = "csrc/autograd/nodes.cpp"
# The kernels, each compiled once for every instruction set, and the folder of csrc that each lies in.
KERNELS = {"fused": "cpu", "noise": "cpu", "optimiser": "cpu", "conv": "layers", "norm": "layers"}
# A level's guard: processors other than x86-64 compile the baseline alone.
LEVELS = {"avx512": "REALUID_X86", "avx2": "REALUID_X86", "baseline": "1"}
UNITS = Path("build/csrc")  # where the sources that compile a kernel for a level are written
UNIT = """// {kernel}_impl.h, compiled for {level}; setup.py writes this file. Shared headers come before the target's.
#include "cpu/arch.h"
#include "{folder}/{kernel}.h"

#if {guard}
#include "cpu/target_{level}.h"
#include "{folder}/{kernel}_impl.h"
#include "cpu/target_end.h"
#endif
"""


def stop(reason: str, remedy: str) -> NoReturn:
    """End the build with one sentence, which pip and uv show with their own error."""
    sys.exit(f"realuid-fast: {reason}: {remedy}. REALUID_FAST_PURE_PYTHON=1 installs the slower pure Python package.")


def invoker() -> tuple[list[str], dict[str, str], str]:
    """Command line, environment and working directory of the program that runs this build, where the system tells."""
    folder = Path("/proc") / str(os.getppid())
    try:
        words = (folder / "cmdline").read_text().split("\0")[:-1]
        pairs = (line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
        return words, dict(pairs), os.readlink(folder / "cwd")
    except (OSError, UnicodeError):
        # uv puts the environment it builds in into VIRTUAL_ENV, in the place of the one that it installs into.
        return [], {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}, os.getcwd()


def interpreters() -> Iterator[str]:
    """Those that the package may be built for, the likeliest first; an isolated build itself runs in another one."""
    words, environment, folder = invoker()
    uv = os.environ.get("UV")
    if uv is not None and os.path.basename("".join(words[:1])) in ("", "uv", "uvx"):
        options = {"--python": "", "-p": "", "--directory": "", "--project": ""}
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name in options:
                options[name] = value if equals else "".join(words[i + 1 : i + 2])
        folder = os.path.join(folder, options["--directory"], options["--project"])
        if "pip" not in words:
            # `uv sync`, `run` and `add` install into the project's environment, whichever is active.
            environment.pop("VIRTUAL_ENV", None)
            yield os.path.join(folder, environment.get("UV_PROJECT_ENVIRONMENT", ".venv"), "bin", "python")
        request = [options["--python"] or options["-p"]] if options["--python"] or options["-p"] else []
        system = ["--system"] if "--system" in words else []
        find = [uv, "python", "find", "--no-python-downloads", *system, *request]
        found = subprocess.run(find, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        yield found.stdout.strip()
    yield sys.executable  # pip isolates by paths alone
    if words and "python" in os.path.basename(words[0]):
        yield (
            shutil.which(os.path.join(folder, words[0]) if os.sep in words[0] else words[0]) or ""
        )  # of `python -m build`


def search_path(python: str) -> list[str]:
    """The folders in which ``python`` finds packages, whatever variables say.

    The list is empty where ``python`` is another version than this build runs on.
    """
    code = "import json, sys; print(json.dumps([sys.version_info[:2], [p for p in sys.path if p]]))"
    try:
        done = subprocess.run([python, "-E", "-c", code], capture_output=True, text=True, check=True, cwd="/")
        version, path = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return []
    return path if version == list(sys.version_info[:2]) else []


def find_torch() -> Any:
    """Torch's extension builder, from here or from the environment that the package is built for."""
    before = list(sys.path)
    for path in ([], *map(search_path, filter(None, interpreters()))):
        # Appended, not prepended: setuptools and ninja of the isolated environment stay in front.
        sys.path[:] = before + [place for place in path if place not in before]
        try:
            from torch.utils import cpp_extension
        except ImportError:
            continue
        return cpp_extension
    return None


def compiler() -> str | None:
    """The C++ compiler that would run, or None where there is none."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    name = command.split()[0]
    return next((found for found in map(shutil.which, (name, "g++", "clang++", "c++")) if found), None)


def units() -> dict[Path, str]:
    """The sources that compile each kernel for each instruction set: every file's text by its path from here."""
    return {
        UNITS / f"{kernel}_{level}.cpp": UNIT.format(kernel=kernel, folder=folder, level=level, guard=guard)
        for kernel, folder in KERNELS.items()
        for level, guard in LEVELS.items()
    }


def write_units() -> None:
    """Write :func:`units`; a file that is as it should be keeps its time, so that nothing is compiled again for it."""
    (ROOT / UNITS).mkdir(parents=True, exist_ok=True)
    for path, text in units().items():
        if not (ROOT / path).is_file() or (ROOT / path).read_text() != text:
            (ROOT / path).write_text(text)


def configure() -> dict[str, Any]:
    """Arguments of setup() that depend on what this machine has."""
    if os.environ.get("REALUID_FAST_PURE_PYTHON") == "1" or not BUILDS & set(sys.argv):
        return {}
    if sys.platform == "win32":
        stop("the C++ extension needs GCC or Clang and Linux or macOS", "use Windows' subsystem for Linux")
    found = compiler()
    if found is None:
        stop("there is no C++ compiler", "install one (on Debian: apt-get install g++), then install again")
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        # Neither CXX nor the customary name runs here, but another compiler does.
        os.environ["CXX"] = found
    cpp_extension = find_torch()
    install = f"run pip install 'torch>={TORCH}' in the same environment, then install again"
    if cpp_extension is None:
        stop("torch, which the extension is compiled against, is not installed where this package goes", install)
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, TORCH.split("."))):
        stop(f"torch {torch.__version__} is older than {TORCH}", install)

    flags = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-g0"]
    links: list[str] = []
    if SANITIZE:
        # The first finding ends the process. -fwrapv, with which Python itself is built, would hide overflows. vptr
        # looks up the types of torch's own objects, whose type information stays inside torch's libraries; the kernels
        # have no virtual functions, so nothing of theirs goes unchecked.
        sanitizers = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", *sanitizers]
        links += sanitizers
    depends = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
    library = cpp_extension.CppExtension(
        "realuid_fast._C",
        [*(source for source in sources if source != NODES), *map(str, units())],
        include_dirs=[str(ROOT / "csrc")],  # ninja compiles in another folder
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-std=c++17", *flags],
        extra_link_args=links,
        depends=depends,
        py_limited_api=True,
    )
    # torch chooses the language version of its own headers. Without Python's API this library too serves every Python.
    nodes = cpp_extension.CppExtension(
        "realuid_fast._nodes",
        [NODES],
        extra_compile_args=flags,
        extra_link_args=links,
        depends=depends,
        py_limited_api=True,
    )
    command: Any = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)

    class BuildLibrary(command):
        """Builds without Python's headers: the library uses none, and their place differs between environments."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.include_dirs: list[str] = []

        def run(self) -> None:
            write_units()
            super().run()

        def get_ext_filename(self, fullname: str) -> str:
            name = str(super().get_ext_filename(fullname))
            return name if not fullname.endswith("_nodes") else name.partition(".")[0] + f".{torch.__version__}.so"

        def build_extension(self, ext: Any) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                if ext is not nodes:
                    raise
                print(f"realuid-fast: the autograd nodes in C++ do not compile, those in Python serve: {error}")
                self.extensions.remove(nodes)

    # The libraries call nothing of Python, so one wheel serves every version from the package's oldest on.
    return {"ext_modules": [library, nodes], "cmdclass": {"build_ext": BuildLibrary}, "options": {"bdist_wheel": ABI3}}


def separate() -> dict[str, Any]:
    """Where a sanitized build goes: never over a package that someone runs."""
    if not SANITIZE:
        return {}
    if sys.argv[1:] not in (["build"], ["--quiet", "build"]):
        sys.exit(
            "realuid-fast: REALUID_FAST_SANITIZE goes with 'setup.py build' alone, which builds into build/sanitize."
        )
    return {"build": {"build_base": "build/sanitize", "build_lib": "build/sanitize/lib"}}


# realuid_fast/kernels is a link to the folder at the top. With it the packages lie as they are imported,
# and an editable install is a plain path, which mypy and editors follow; a hook on imports would hide the package from
# them. Zip archives of the repository unpack without the link.
PACKAGES = {*find_packages(include=["realuid_fast", "realuid_fast.*"]), "realuid_fast.kernels"}
PLACES = {"": "."} if (ROOT / "realuid_fast" / "kernels").is_dir() else {"": ".", "realuid_fast.kernels": "kernels"}
built = configure()
options = {**built.pop("options", {}), **separate()}
setup(packages=sorted(PACKAGES), package_dir=PLACES, options=options, **built)
