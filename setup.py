"""Builds the two extension modules: the operators on LibTorch's stable ABI and the torch-free pybind11 module.

Metadata lives in pyproject.toml. Without torch, or without a C++ compiler, the package is built as pure Python and
says so; a compiler that is there and fails stops the build.

``REALUID_FAST_SANITIZE=address,undefined`` builds the whole package with GCC's or Clang's sanitizers into
``build/sanitize``, away from every other build; ``make sanitize`` runs the operators' tests on it.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("REALUID_FAST_SANITIZE", "")
CPU_SOURCES = ["isa", "noise", "noise_avx512", "noise_avx2", "noise_baseline"]
LOSS_SOURCES = ["fused", "fused_avx512", "fused_avx2", "fused_baseline"]
LAYER_SOURCES = [f"{layer}{isa}" for layer in ("conv", "norm") for isa in ("", "_avx512", "_avx2", "_baseline")]
OPTIMISER_SOURCES = ["optimiser", "optimiser_avx512", "optimiser_avx2", "optimiser_baseline"]


def say(sentence: str) -> None:
    """Print to the real standard error, which pip shows with -v and after a failure."""
    print(f"realuid-fast: {sentence}", file=sys.stderr, flush=True)


def find_torch() -> Any:
    """Torch's extension builder, from here or from the environment that pip builds for (an isolated build hides it)."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        # Appended, not prepended: setuptools and ninja of the isolated environment stay in front.
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            from torch.utils import cpp_extension
        except ImportError:
            return None
    return cpp_extension


def compiler() -> str | None:
    """The C++ compiler that would run, or None where there is none."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    name = command.split()[0]
    return next((found for found in map(shutil.which, (name, "g++", "clang++", "c++")) if found), None)


def sources(names: list[str]) -> list[str]:
    return [f"csrc/cpu/{name}.cpp" for name in names]


def configure() -> dict[str, Any]:
    """Arguments of setup() that depend on what this machine has."""
    if os.environ.get("REALUID_FAST_PURE_PYTHON") == "1":
        say("REALUID_FAST_PURE_PYTHON=1, building without the C++ extension.")
        return {}
    if sys.platform == "win32":
        say("the C++ extension needs GCC or Clang; building without it on Windows.")
        return {}
    found = compiler()
    if found is None:
        say("no C++ compiler found; building without the C++ extension (the torch backend works, slower).")
        return {}
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        # Neither CXX nor the customary name runs here, but another compiler does.
        os.environ["CXX"] = found

    flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-g0"]
    links: list[str] = []
    if SANITIZE:
        # The first finding ends the process. -fwrapv, with which Python itself is built, would hide overflows. vptr
        # looks up the types of torch's own objects, whose type information stays inside torch's libraries; the kernels
        # have no virtual functions, so nothing of theirs goes unchecked.
        sanitizers = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", *sanitizers]
        links += sanitizers
    depends = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    modules: list[Extension] = []
    command: Any = build_ext

    try:
        import pybind11
    except ImportError:
        say("pybind11 is missing; building without the native helper module (pip install pybind11).")
    else:
        modules.append(
            Extension(
                "realuid_fast._native",
                ["csrc/native.cpp", "csrc/cpu/bandwidth.cpp", *sources(CPU_SOURCES)],
                include_dirs=["csrc", pybind11.get_include()],
                extra_compile_args=flags,
                extra_link_args=links,
                depends=depends,
                language="c++",
            )
        )

    cpp_extension = find_torch()
    if cpp_extension is None:
        say("torch is not installed; building without the fused operators. Install torch, then install again.")
    else:
        modules.append(
            cpp_extension.CppExtension(
                "realuid_fast._C",
                [
                    "csrc/ops.cpp",
                    "csrc/layers.cpp",
                    *sources(CPU_SOURCES + LOSS_SOURCES + OPTIMISER_SOURCES + LAYER_SOURCES),
                ],
                include_dirs=["csrc"],
                define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
                extra_compile_args=flags,
                extra_link_args=links,
                depends=depends,
                py_limited_api=True,
            )
        )
        command = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)
    return {"ext_modules": modules, "cmdclass": {"build_ext": command}}


def separate() -> dict[str, Any]:
    """Where a sanitized build goes: never over a package that someone runs."""
    if not SANITIZE:
        return {}
    if sys.argv[1:] not in (["build"], ["--quiet", "build"]):
        sys.exit(
            "realuid-fast: REALUID_FAST_SANITIZE goes with 'setup.py build' alone, which builds into build/sanitize."
        )
    return {"options": {"build": {"build_base": "build/sanitize", "build_lib": "build/sanitize/lib"}}}


PACKAGES = {*find_packages(include=["realuid_fast", "realuid_fast.*"]), "realuid_fast.kernels"}
setup(packages=sorted(PACKAGES), **separate(), **configure())
