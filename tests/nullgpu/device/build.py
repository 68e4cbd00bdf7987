"""Builds the null GPU's two libraries and the package's autograd nodes: ``python build.py FOLDER``.

It runs in an environment with torch's CUDA build, and the nodes are for that torch.

The headers of CUDA come with Triton. Functions of cuBLAS and of the driver that torch's libraries ask for, and that no
source here defines, are written from the libraries' own lists: products are counted, all others do nothing.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RUNTIME = ["state.cpp", "device.cpp", "memory.cpp", "streams.cpp", "graphs.cpp", "kernels.cpp"]
HANDLE = "(Handle** handle) { *handle = new Handle; return 0; }"
ZERO = "(void*, int* mode) { *mode = 0; return 0; }"
# Functions of cuBLAS with an effect. A handle knows its stream, on which its products are counted.
CUBLAS = {
    "cublasCreate_v2": HANDLE,
    "cublasLtCreate": HANDLE,
    "cublasSetStream_v2": "(Handle* handle, void* stream) { handle->stream = stream; return 0; }",
    "cublasGetMathMode": ZERO,
    "cublasGetPointerMode_v2": ZERO,
    # One algorithm is found.
    "cublasLtMatmulAlgoGetHeuristic": f"({'void*, ' * 7}int, void*, int* found) {{ *found = 1; return 0; }}",
    "cublasLtMatmul": f"({'void*, ' * 14}size_t, void* stream) "
    '{ nullgpu_launch(stream, "cublasLtMatmul"); return 0; }',
}
PROLOGUE = """#include <cstddef>
extern "C" void nullgpu_launch(void* stream, const char* name);
struct Handle { void* stream = nullptr; };
extern "C" {
"""


def packages(name: str) -> Path:
    """The folder of an installed package."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"this Python has no {name}")
    return Path(found.origin).parent


def asked_for(prefix: str, *libraries: Path) -> list[str]:
    """The functions whose names begin so and that the libraries expect from elsewhere."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True)
    return sorted(set(re.findall(rf" U ({prefix}\w+)", listed.stdout)))


def product(name: str) -> str:
    """C++ of one function of cuBLAS."""
    if name in CUBLAS:
        return f"int {name}{CUBLAS[name]}"
    if "gemm" in name.lower():
        return f'int {name}(Handle* handle) {{ nullgpu_launch(handle->stream, "{name}"); return 0; }}'
    return f"int {name}() {{ return 0; }}"


def build(out: Path) -> None:
    libraries = sorted((packages("torch") / "lib").glob("libtorch_cuda*.so"))
    if not libraries:
        raise SystemExit("this torch is no CUDA build: it has no libtorch_cuda.so")
    out.mkdir(parents=True, exist_ok=True)
    (out / "cublas.cpp").write_text(PROLOGUE + "\n".join(map(product, asked_for("cublas", *libraries))) + "\n}\n")
    own = re.findall(r"^CUresult (cu\w+)\(", (HERE / "driver.cpp").read_text(), re.MULTILINE)
    asked = asked_for("cu[A-Z]", *sorted((packages("torch") / "lib").glob("*.so")))
    asked += re.findall(r"\b(cu[A-Z]\w+)\(", (packages("triton") / "backends" / "nvidia" / "driver.c").read_text())
    others = sorted(name for name in {*asked} - {*own} if not name.startswith("cuFile"))
    functions = "\n".join(f"int {name}() {{ return 0; }}" for name in others)
    (out / "others.cpp").write_text(f'extern "C" {{\n{functions}\n}}\n')
    compiler = ["g++", "-std=c++17", "-O2", "-g", "-Wall", "-fPIC", "-shared"]
    compiler += [f"-I{packages('triton') / 'backends' / 'nvidia' / 'include'}", f"-I{HERE}"]
    sources = [*(HERE / name for name in RUNTIME), out / "cublas.cpp"]
    subprocess.run([*compiler, "-o", out / "libnullgpu.so", *sources], check=True)
    sources = [HERE / "driver.cpp", out / "others.cpp"]
    subprocess.run([*compiler, "-Wl,-soname,libcuda.so.1", "-o", out / "libcuda.so.1", *sources], check=True)
    nodes(out)


def nodes(out: Path) -> None:
    """The package's autograd nodes for this torch. Those for other versions of torch stay beside them."""
    import torch
    from torch.utils import cpp_extension

    name, source = f"_nodes.{torch.__version__}.so", ROOT / "csrc" / "autograd" / "nodes.cpp"
    cpp_extension.load("_nodes", str(source), extra_cflags=["-O3"], build_directory=str(out), is_python_module=False)
    shutil.copy2(out / "_nodes.so", ROOT / "realuid_fast" / name)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
