"""Checks what `make dist` built: what the archives hold, and that they install and run, with a compiler and without.

    python .ci/dist.py build/dist

A fresh environment borrows the requirements of the one that runs this, which must not hold the package itself as files;
nothing is fetched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

# In either archive; the wheel has the compiled modules beside them and the source archive what they are built from.
PACKAGE = (
    "realuid_fast/py.typed",
    "realuid_fast/ops.py",
    "realuid_fast/train/config.py",
    "realuid_fast/assets/digits_teacher.safetensors",
    "realuid_fast/assets/digits_classifier.safetensors",
    "realuid_fast/configs/digits.yaml",
)
COMPILED = ("realuid_fast/_C.abi3.so", "realuid_fast/_native.", "realuid_fast/kernels/generator.py")
SOURCES = (
    "setup.py",
    "csrc/ops.cpp",
    "csrc/cpu/fused_impl.h",
    "kernels/generator.py",
    "kernels/__init__.py",
    "examples/distill_digits.py",
)

RUNS = """
import sys, warnings, torch, realuid_fast as rf
from realuid_fast import extension, teachers
from realuid_fast.train import config
import realuid_fast.kernels

assert rf.__file__.startswith(sys.prefix), rf.__file__
missing = extension.why_missing()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, key = torch.zeros(2, 3), rf.NoiseStream(1).next_key()
    x_t = rf.interpolate(x, rf.paths.Linear().coefficients(torch.tensor([0.25, 0.5])), key)
assert x_t.isfinite().all() and x_t.abs().sum() > 0
teachers.load_teacher("digits")
config.load("digits")
said = any("plain torch reference" in str(w.message) for w in caught)
if sys.argv[1] == "compiled":
    assert missing is None and extension.native is not None and not said, missing
else:
    assert "was not built" in missing and said, (missing, said)
    assert rf.backends.report()[0].why_not is None
"""


def holds(names: list[str], wanted: tuple[str, ...], archive: Path) -> None:
    for start in wanted:
        if not any(name.startswith(start) for name in names):
            sys.exit(f"{archive.name} lacks {start}")
    if strays := [name for name in names if "__pycache__" in name or name.endswith(".o")]:
        sys.exit(f"{archive.name} holds {strays[0]}")


def fresh(folder: Path) -> Path:
    """A new environment's python, which finds the requirements, but no editable install, where this one has them."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def installed(archive: Path, kind: str, folder: Path, path: str) -> str:
    """Installs ``archive`` and runs it with this ``PATH``; what pip said."""
    python, environment = fresh(folder), {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC")}
    environment["PATH"] = f"{python.parent}{os.pathsep}{path}" if path else str(python.parent)
    command = [python, "-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation", archive]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        sys.exit(f"{archive.name} does not install:\n{done.stdout}{done.stderr}")
    subprocess.run([python, "-c", RUNS, kind], env=environment, check=True, cwd=folder)
    subprocess.run([python.parent / "realuid-fast", "info"], env=environment, check=True, cwd=folder)
    return done.stdout + done.stderr


def main(folder: Path) -> None:
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    holds(zipfile.ZipFile(wheel).namelist(), (*PACKAGE, *COMPILED), wheel)
    with tarfile.open(source) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    holds(names, (*PACKAGE, *SOURCES), source)
    if strays := [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("examples/")]:
        sys.exit(f"{wheel.name} holds {strays[0]}, which is for the source archive alone")
    with tempfile.TemporaryDirectory() as room:
        installed(wheel.resolve(), "compiled", Path(room) / "wheel", os.environ["PATH"])
        said = installed(source.resolve(), "pure", Path(room) / "source", "")
    if "no C++ compiler found" not in said:
        sys.exit(f"installing {source.name} without a compiler does not say so:\n{said}")
    print(f"{wheel.name} and {source.name} install and run, the second without a compiler")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
