"""Compiles kernel launches for a GPU that is not there and reads the emitted code.

A launch is planned on meta tensors and specialised by Triton's own binder, so what is compiled is what a GPU would run:
with the divisibility by 16 that Triton finds in its arguments and, on AMD, the 32-bit offsets into tensors of less than
2 GiB. NVIDIA code is disassembled by the tools that ship inside the triton package; AMD code is
read from the compiler's own assembly.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Options in which NVIDIA's targets differ, and what a kernel's text has where Triton's front end reads them.
OF_TARGET = ("arch", "supported_fp8_dtypes", "deprecated_fp8_dot_operand_dtypes", "max_num_imprecise_acc_default")
READS_TARGET = re.compile(r"tt\.dot|f8E|fp8|tensordesc")
# Files of what the front end made, by source and options.
_front_ends: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Code:
    """The code of one kernel on one target, in numbers.

    Attributes:
        instructions: of the whole program, up to its last exit, padding not counted.
        registers: a thread's vector registers.
        local: instructions that touch local (scratch) memory, plus bytes of stack.
        loads: widths in bits of the global loads of tensors, one an instruction; stores: likewise.
        special: instructions for the special-function unit; multiplies: of 32-bit integers.
        assembly: the text itself.
    """

    instructions: int
    registers: int
    local: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    special: int
    multiplies: int
    assembly: str


def compile_calls(calls: Iterable[Any], target: str) -> list[Code]:
    """Compile each ``kernels.tiles.Call`` for ``target``, one of :data:`TARGETS`."""
    compiled = []
    for call in calls:
        source, options, _ = specialise(call, target)
        compiled.append(_compiled(source, options, target))
    if target.startswith("gfx"):
        return [_amd(each.asm["amdgcn"]) for each in compiled]
    cubins = [each.asm["cubin"] for each in compiled]
    return [_nvidia(_resources(cubin), text) for cubin, text in zip(cubins, _disassembled(cubins, target), strict=True)]


def _compiled(source: ASTSource, options: dict[str, Any], target: str) -> Any:
    """``source`` by ``triton.compile``. NVIDIA's targets share the work of Triton's front end, which runs once.

    On every further target the compiler begins at the front end's text. The front end reads a target's own options for
    products of matrices, floats of 8 bits and tensor descriptors alone: a kernel with any of these is compiled whole.
    """
    if target.startswith("gfx"):
        return triton.compile(source, target=TARGETS[target], options=options)
    key = source.hash(), repr({name: value for name, value in options.items() if name not in OF_TARGET})
    compiled = triton.compile(_front_ends.get(key, source), target=TARGETS[target], options=options)
    text = compiled.asm["ttir"]
    if key not in _front_ends and not READS_TARGET.search(f"{source.signature} {text}"):
        file = Path(_folder().name, f"{len(_front_ends)}.ttir")
        file.write_text(text)
        _front_ends[key] = str(file)
    return compiled


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def specialise(call: Any, target: str) -> tuple[ASTSource, dict[str, Any], str]:
    """The source that a real launch compiles, by Triton's own binder, and the key under which it keeps the result.

    The binder and the rest of a launch's first half are Triton's private functions: they are the only definition of
    what a launch specialises on.
    """
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(call.kernel.signature, call.kernel.params, backend)
    given = {**call.arguments, **call.constants, "num_warps": call.warps, "debug": False, "instrumentation_mode": ""}
    bound, specialization, others = bind(**given)
    options, signature, constants, attributes = call.kernel._pack_args(backend, given, bound, specialization, others)
    source = ASTSource(call.kernel, signature, constants, attributes)
    return source, options.__dict__, compute_cache_key({}, specialization, others)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return usage.stdout + usage.stderr


def _disassembled(cubins: list[bytes], target: str) -> list[str]:
    """The instructions of each kernel. All kernels go through one process: its start takes longer than its work."""
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        # Triton asks for an architecture's own features, which the letter stands for, from sm_90 on.
        binary = target.replace("sm_", "SM") + ("a" if int(target[3:]) >= 90 else "")
        command = [_tool("nvdisasm"), "--no-dataflow", "--binary", binary, file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    texts: list[list[str]] = [[] for _ in codes]
    ends = list(itertools.accumulate(len(code) for code in codes))
    for line in listed:
        if address := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
            texts[bisect.bisect_right(ends, int(address[1], 16))].append(line)
    return ["\n".join(lines) for lines in texts]


def _code(cubin: bytes) -> bytes:
    """The machine code of the one kernel in an ELF file of 64 bits: its section ``.text.NAME``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, naming = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text", sections[naming][4] + name)
    )
    return code


def _nvidia(resources: str, assembly: str) -> Code:
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+ )?[A-Z][\w.]*[^;]*);", assembly)
    # A jump to itself and the padding behind it close every program.
    names = [re.sub(r"^@!?U?P\w+ ", "", line).split()[0] for line in lines]
    end = max(i for i, name in enumerate(names) if name.startswith("EXIT")) + 1
    names = [name for name in names[:end] if name != "NOP"]
    return Code(
        instructions=len(names),
        registers=int(_find(r"REG:(\d+)", resources)),
        local=sum(name.startswith(("LDL", "STL")) for name in names) + int(_find(r"STACK:(\d+)", resources)),
        loads=tuple(_width(name) for name in names if name.startswith("LDG")),
        stores=tuple(_width(name) for name in names if name.startswith("STG")),
        special=sum(name.startswith("MUFU") for name in names),
        multiplies=sum(name == "IMAD" or name.startswith(("IMAD.WIDE", "IMAD.HI")) for name in names),
        assembly=assembly,
    )


def _width(name: str) -> int:
    parts = name.split(".")
    for part, bits in (("256", 256), ("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8)):
        if part in parts:
            return bits
    return 32


def _amd(text: str) -> Code:
    code = text[: text.rindex("s_endpgm")]
    names = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", code, re.MULTILINE)
    names = [name for name in names if name not in ("s_nop", "s_waitcnt", "s_endpgm", "s_code_end")]
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
    memory = [name for name in names if name.startswith(("global_", "buffer_", "flat_"))]

    def width(name: str) -> int:
        return next((bits for part, bits in widths.items() if part in name.split("_")), 16)

    return Code(
        instructions=len(names),
        registers=int(_find(r"\.vgpr_count:\s+(\d+)", text)),
        local=sum(name.startswith("scratch_") for name in names)
        + int(_find(r"\.private_segment_fixed_size:\s+(\d+)", text)),
        loads=tuple(width(name) for name in memory if "_load" in name),
        stores=tuple(width(name) for name in memory if "_store" in name),
        special=sum(
            name.startswith(("v_sin", "v_cos", "v_log", "v_exp", "v_sqrt", "v_rcp", "v_rsq")) for name in names
        ),
        multiplies=sum(name.startswith(("v_mul_lo_u32", "v_mul_hi_u32", "v_mad_u64_u32")) for name in names),
        assembly=text,
    )


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern}")
    return found.group(1)
