"""Checks what `make dist` built: what the archives hold, and that an installation runs compiled code or stops.

    python .ci/dist.py build/dist

The source archive is unpacked and installed in every way, by pip and by uv, isolated and not, editable, without torch,
without a compiler and as pure Python, each in a fresh environment. The environments borrow the requirements of the one
that runs this; an isolated build fetches setuptools and ninja, of the same versions, from the index. The ways share the
objects of one compilation, and nothing else that an earlier one built.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

# In either archive; the wheel has the compiled library beside them and the source archive what it is built from.
PACKAGE = (
    "realuid_fast/py.typed",
    "realuid_fast/ops/registry.py",
    "realuid_fast/jobs/config.py",
    "realuid_fast/assets/digits_teacher.safetensors",
    "realuid_fast/assets/digits_classifier.safetensors",
    "realuid_fast/assets/mnist_student.safetensors",
    "realuid_fast/assets/README.md",
    "realuid_fast/configs/digits.yaml",
    "realuid_fast/kernels/generator.py",
    "realuid_fast/kernels/__init__.py",
)
SOURCES = (
    "setup.py",
    "csrc/ops.cpp",
    "csrc/autograd/nodes.cpp",
    "csrc/cpu/fused_impl.h",
    "csrc/layers/conv_impl.h",
    "examples/distill_digits.py",
)

RUNS = """
import sys, warnings, torch, realuid_fast as rf
from realuid_fast import teachers
from realuid_fast.ops import extension
from realuid_fast.jobs import config
import realuid_fast.kernels

assert rf.__file__.startswith(sys.argv[2]), rf.__file__
missing = extension.why_missing()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, key = torch.zeros(2, 3), rf.NoiseStream(1).next_key()
    x_t = rf.interpolate(x, rf.paths.Linear().coefficients(torch.tensor([0.25, 0.5])), key)
assert x_t.isfinite().all() and x_t.abs().sum() > 0
teachers.load_teacher("digits")
config.load("digits")
said = [str(w.message) for w in caught if "plain torch reference" in str(w.message)]
if sys.argv[1] == "compiled":
    assert missing is None and extension.native is not None and not said, missing
    assert rf.backends.report()[1].why_not is None
    assert extension.why_no_nodes() is None, extension.why_no_nodes()
    with rf.backend("cpp"):
        assert torch.equal(x_t, rf.interpolate(x, rf.paths.Linear().coefficients(torch.tensor([0.25, 0.5])), key))
else:
    assert "was not built" in missing and said, (missing, said)
    print(said[0].partition("run: ")[2])
"""
TOOLS = Path(sys.executable).parent
PIP, UV = [sys.executable, "-m", "pip", "--python"], [str(TOOLS / "uv")]
PLAIN = ["--no-build-isolation"]


def holds(names: list[str], wanted: tuple[str, ...], archive: Path) -> None:
    for start in wanted:
        if not any(name.startswith(start) for name in names):
            sys.exit(f"{archive.name} lacks {start}")
    if strays := [name for name in names if "__pycache__" in name or name.endswith(".o")]:
        sys.exit(f"{archive.name} holds {strays[0]}")


def fresh(folder: Path, torch: bool = True, pip: bool = False) -> Path:
    """A new environment's python; with ``torch`` it finds all packages of this one, but no editable install."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=pip)
    if torch:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def environment(python: Path, compiler: bool = True, **more: str) -> dict[str, str]:
    """Variables of somebody who has not activated anything; without ``compiler`` no program but the environment's."""
    names = ("PYTHONPATH", "VIRTUAL_ENV", "CXX", "CC", "UV_PROJECT_ENVIRONMENT", "REALUID_FAST_PURE_PYTHON")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    # Objects are compiled once only where every way has this environment's ninja, from its folder or by a constraint.
    path = f"{python.parent}{os.pathsep}{TOOLS}{os.pathsep}{os.environ['PATH']}" if compiler else str(python.parent)
    return {**kept, "PATH": path, **more}


def clean(tree: Path) -> None:
    """Leave the objects alone of what was built in ``tree``: a library from before must not pass for a new one."""
    for built in (*tree.glob("build/lib*"), *tree.glob("build/bdist*"), *tree.glob("*.egg-info")):
        shutil.rmtree(built)
    for library in tree.glob("realuid_fast/*.so"):
        library.unlink()


def install(way: str, what: Path, python: Path, options: list[str], variables: dict[str, str]) -> tuple[bool, str]:
    """Whether ``pip`` or ``uv`` in the words of ``way`` installed ``what``, and all that it said."""
    if what.is_dir():
        clean(what)
    if PLAIN[0] in options:
        variables = {name: value for name, value in variables.items() if name != "PIP_BUILD_CONSTRAINT"}
    if "activated" in way:
        variables = {**variables, "VIRTUAL_ENV": str(python.parent.parent)}
    target = [] if "activated" in way else ["--python", str(python)]
    program = [*UV, "pip", "install", *target] if way.startswith("uv") else [*PIP, str(python), "install"]
    command = [*program, "--no-deps", *options, str(what)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=python.parent)
    return done.returncode == 0, done.stdout + done.stderr


def runs(python: Path, kind: str, variables: dict[str, str], place: Path | None = None) -> str:
    """Run the installed package and return its output; end this check where it does not run."""
    command = [python, "-c", RUNS, kind, str(place or python.parent.parent)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=python.parent)
    if done.returncode:
        sys.exit(f"the {kind} package does not run:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def typed(python: Path, room: Path) -> None:
    """Check the README's example as strictly as mypy can, with the package where ``python`` finds it."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    script = room / "example.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)))
    # torch does not annotate Tensor.backward.
    options = ["--strict", "--untyped-calls-exclude=torch", f"--cache-dir={room / 'mypy'}"]
    command = [sys.executable, "-m", "mypy", *options, f"--python-executable={python}", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=room)
    if done.returncode:
        sys.exit(f"mypy does not see the types of the package:\n{done.stdout}{done.stderr}")


def ways(tree: Path, wheel: Path, room: Path) -> None:
    """Install in every way, each held to what it promises."""
    pins = room / "build.txt"
    pins.write_text("".join(f"{name}=={version(name)}\n" for name in ("setuptools", "ninja")))
    common = {"UV_CACHE_DIR": str(room / "uv"), "UV_BUILD_CONSTRAINT": str(pins), "PIP_BUILD_CONSTRAINT": str(pins)}
    for way, what, options in (
        ("pip, the wheel", wheel, ["--no-index"]),
        ("pip", tree, []),
        ("pip without isolation", tree, PLAIN),
        ("uv", tree, []),
        ("uv, activated", tree, []),
        ("uv without isolation", tree, PLAIN),
    ):
        python = fresh(room / "environment")
        variables = environment(python, **common)
        done, said = install(way, what, python, options, variables)
        if not done:
            sys.exit(f"{way} does not install:\n{said}")
        runs(python, "compiled", variables)
        if what is wheel:
            typed(python, room)
        print(f"{way}: cpp runs", flush=True)

    for way, torch, compiler, sentence in (
        ("pip without torch", False, True, "torch, which the extension is compiled against, is not installed"),
        ("uv without torch", False, True, "torch, which the extension is compiled against, is not installed"),
        ("pip without a compiler", True, False, "there is no C++ compiler"),
        ("uv without a compiler", True, False, "there is no C++ compiler"),
    ):
        python = fresh(room / "environment", torch)
        variables = environment(python, compiler, **common)
        done, said = install(way, tree, python, [] if compiler else PLAIN, variables)
        if done or sentence not in said or "REALUID_FAST_PURE_PYTHON=1" not in said:
            sys.exit(f"{way} {'installs' if done else 'does not say why not'}:\n{said}")
        print(f"{way}: stopped", flush=True)

    # An editable build shares no objects: the extension's is the one that `make` installs.
    python = fresh(room / "environment")
    pure = {"REALUID_FAST_PURE_PYTHON": "1"}
    variables = environment(python, compiler=False, **pure)
    done, said = install("pip", tree, python, [*PLAIN, "--editable"], variables)
    if not done:
        sys.exit(f"the pure package does not install editable:\n{said}")
    runs(python, "pure", variables, tree)
    typed(python, room)
    print("pip, editable: pure Python runs", flush=True)

    python = fresh(room / "environment", pip=True)
    variables = environment(python, compiler=False, **common, **pure)
    done, said = install("pip", tree, python, [], variables)
    if not done:
        sys.exit(f"the pure package does not install:\n{said}")
    repair = runs(python, "pure", variables)
    clean(tree)
    variables = environment(python, PIP_CONSTRAINT=str(pins))
    # The package prints the command for a user to paste into a shell, so a shell has to take it as it stands.
    mended = subprocess.run(repair, shell=True, env=variables, capture_output=True, text=True, check=False, cwd=room)
    if mended.returncode:
        sys.exit(f"{repair} fails:\n{mended.stdout}{mended.stderr}")
    runs(python, "compiled", variables)
    subprocess.run([python.parent / "realuid-fast", "info"], env=variables, check=True, cwd=python.parent)
    print(f"pure Python runs, and is repaired by: {repair}")


def main(folder: Path) -> None:
    (source,) = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as place, tarfile.open(source) as archive:
        room = Path(place).resolve()
        names = [name.partition("/")[2] for name in archive.getnames()]
        holds(names, (*PACKAGE, *SOURCES), source)
        archive.extractall(room, filter="data")
        (tree,) = (entry for entry in room.iterdir() if (entry / "setup.py").is_file())
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder.resolve(), tree]
        variables = environment(Path(sys.executable))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
        (wheel,) = folder.resolve().glob("*.whl")
        holds(
            zipfile.ZipFile(wheel).namelist(),
            (*PACKAGE, "realuid_fast/_C.abi3.so", f"realuid_fast/_nodes.{version('torch')}.so"),
            wheel,
        )
        if strays := [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("examples/")]:
            sys.exit(f"{wheel.name} holds {strays[0]}, which is for the source archive alone")
        if "-cp311-abi3-" not in wheel.name:
            sys.exit(f"{wheel.name} is for one version of Python")
        ways(tree, wheel, room)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
