"""The meaning of PTX instructions, on arrays that hold one number a thread.

``build`` turns an instruction into a step, a function of the machine and of the active lanes (None where all are).
Instructions that no kernel of this package uses are refused by name, never guessed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .program import Instruction, Program, Unsupported, register_bytes

if TYPE_CHECKING:
    from .machine import Array, Machine

np.seterr(all="ignore")
Step = Callable[["Machine", "Array | None"], None]
Source = Callable[["Machine"], "Array"]
Builder = Callable[[Instruction, Program], Step]

UNSIGNED = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES: dict[str, Any] = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for bits in (16, 32, 64)
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
} | {"pred": np.dtype(bool), "b8": np.dtype("u1"), "u8": np.dtype("u1")}
U16, U32, U64, F32, F64 = (TYPES[name] for name in ("u16", "u32", "u64", "f32", "f64"))

BUILDERS: dict[str, Builder] = {}


def builds(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def build(instruction: Instruction, program: Program) -> Step:
    if instruction.ends_block:
        return lambda machine, active: None
    try:
        return BUILDERS[instruction.parts[0]](instruction, program)
    except KeyError as error:
        raise Unsupported(f"{error} in: {instruction.text}") from error


def source(text: str, kind: Any, program: Program) -> Source:
    """The operand ``text`` read as ``kind``: a register (its low part where it is wider), a constant or an address."""
    kind = np.dtype(kind)
    if text.startswith("%"):
        return _register(text, kind)
    names = [name for _, name in program.params]
    if text in names or text == "global_smem":
        # A parameter's address is its number times 256; shared memory begins at 0.
        value = kind.type(256 * names.index(text) if text in names else 0)
    else:
        value = constant(text, kind)
    return lambda machine: value


@functools.cache
def _register(text: str, kind: Any) -> Source:
    if text in ("%tid.x", "%laneid", "%ntid.x") or text.startswith(("%ctaid", "%nctaid")):
        return lambda machine: machine.special[text].astype(kind)
    size = register_bytes(text)
    if size < kind.itemsize:
        raise Unsupported(f"{text} read as {kind}")
    if size > kind.itemsize:
        low = np.dtype(f"u{kind.itemsize}")
        return lambda machine: machine.read(text).astype(low).view(kind)
    if kind == UNSIGNED[size]:
        return lambda machine: machine.read(text)
    return lambda machine: machine.read(text).view(kind)


@functools.cache
def constant(text: str, kind: Any) -> Any:
    if text[:2].lower() in ("0f", "0d"):
        bits = np.uint32 if text[1].lower() == "f" else np.uint64
        return np.asarray(bits(int(text[2:], 16))).view(kind)[()]
    if kind.kind == "f" or not re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        raise Unsupported(f"constant {text} of {kind}")
    number = int(text.rstrip("U"), 0)
    if kind.kind == "b":
        return np.bool_(number != 0)
    return np.asarray(number % (1 << 8 * kind.itemsize), np.dtype(f"u{kind.itemsize}")).view(kind)[()]


def step_of(
    instruction: Instruction, program: Program, kinds: list[Any], function: Callable[..., Any], into: Any = None
) -> Step:
    """A step that writes ``function`` of the operands from the second on; its result is made ``into``."""
    sources = [source(text, kind, program) for text, kind in zip(instruction.operands[1:], kinds, strict=True)]
    target = instruction.operands[0]

    def step(machine: Machine, active: Array | None) -> None:
        found = np.asarray(function(*[each(machine) for each in sources]))
        machine.write(target, found if into is None else found.astype(into, copy=False), active)

    return step


# -- memory


@builds("ld", "st")
def access(ins: Instruction, program: Program) -> Step:
    load, space, kind = ins.parts[0] == "ld", ins.parts[1], TYPES[ins.parts[-1]]
    registers, place = ins.operands if load else ins.operands[::-1]
    found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", place)
    names = [name.strip() for name in registers.strip("{}").split(",")]
    if found is None or space not in ("global", "shared", "param"):
        raise Unsupported(ins.text)
    if space == "param":
        return _parameter(names[0], found[1], kind, program)
    raw, offset = np.dtype(f"u{kind.itemsize}"), int(found[2] or 0)
    address = source(found[1], U64 if space == "global" else U32, program)
    values = [] if load else [source(name, raw, program) for name in names]

    def step(machine: Machine, active: Array | None) -> None:
        where = address(machine).astype(np.uint64) + np.uint64(offset % 2**64)
        if space == "shared":
            where = where.astype(np.uint32).astype(np.uint64)
        given = [each(machine) for each in values] if values else len(names)
        for name, value in zip(names, machine.access(space, where, raw, given, active, ins.text), strict=load):
            if load:
                machine.write(name, value.astype(UNSIGNED[register_bytes(name)]), active)

    return step


def _parameter(target: str, text: str, kind: Any, program: Program) -> Step:
    wide = np.dtype(f"{kind.kind}{register_bytes(target)}")
    names = [name for _, name in program.params]
    address = source(text, U64, program)

    def step(machine: Machine, active: Array | None) -> None:
        values = []
        for given in machine.arguments:
            value = np.asarray(given)
            value = value.view(kind) if value.dtype.itemsize == kind.itemsize else np.zeros((), kind)
            values.append(value.astype(wide) if kind.kind in "iu" else value)
        which = np.broadcast_to(address(machine), machine.lanes) >> np.uint64(8)
        machine.events.add(bool((which >= len(names)).any()), "load outside the parameters", target)
        machine.write(target, np.array(values)[np.minimum(which, len(names) - 1).astype(np.int64)], active)

    return step


@builds("stmatrix", "ldmatrix")
def matrices(ins: Instruction, program: Program) -> Step:
    """One to four matrices of 8 x 8 halfwords: lane ``8 k + i`` has the address of row ``i`` of matrix ``k``.

    Lane ``t`` keeps the elements ``2 (t mod 4)`` and the next of row ``t // 4``, or of that column where transposed.
    """
    load = ins.parts[0] == "ldmatrix"
    if not {"sync", "aligned", "m8n8", "shared", "b16"} <= set(ins.parts):
        raise Unsupported(ins.text)
    registers, place = ins.operands if load else ins.operands[::-1]
    names = [name.strip() for name in registers.strip("{}").split(",")]
    found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]", place)
    if found is None:
        raise Unsupported(ins.text)
    address, offset = source(found[1], U32, program), np.uint64(int(found[2] or 0))
    values = [] if load else [source(name, U32, program) for name in names]
    lane, transposed = np.arange(32), "trans" in ins.parts
    row, column = lane // 4, 2 * (lane % 4)

    def step(machine: Machine, active: Array | None) -> None:
        machine.events.add(active is not None and partial(active), "matrix with inactive lanes", ins.text)
        giving = np.tile(lane < 8 * len(names), machine.lanes // 32) & (True if active is None else active)
        where = np.broadcast_to(address(machine), machine.lanes).astype(np.uint64) + offset
        if load:
            rows = np.stack(machine.access("shared", where, U16, 8, giving, ins.text), 1).reshape(-1, 32, 8)
            for k, name in enumerate(names):
                matrix = rows[:, 8 * k : 8 * k + 8].transpose(0, 2, 1) if transposed else rows[:, 8 * k : 8 * k + 8]
                low, high = (matrix[:, row, column + i].astype(U32).reshape(-1) for i in (0, 1))
                machine.write(name, low | high << np.uint32(16), active)
            return
        rows = np.zeros((machine.lanes // 32, 32, 8), U16)
        for k, value in enumerate(values):
            kept = np.broadcast_to(value(machine), machine.lanes).reshape(-1, 32)
            matrix = np.zeros((machine.lanes // 32, 8, 8), U16)
            matrix[:, row, column], matrix[:, row, column + 1] = kept.astype(U16), (kept >> np.uint32(16)).astype(U16)
            rows[:, 8 * k : 8 * k + 8] = matrix.transpose(0, 2, 1) if transposed else matrix
        columns = [np.ascontiguousarray(rows[:, :, i]).reshape(-1) for i in range(8)]
        machine.access("shared", where, U16, columns, giving, ins.text)

    return step


def partial(active: Array) -> bool:
    """Whether some warp has lanes that are active and lanes that are not."""
    warps = active.reshape(-1, 32)
    return bool((warps.any(1) != warps.all(1)).any())


# -- moving and choosing


@builds("mov")
def mov(ins: Instruction, program: Program) -> Step:
    target, text = ins.operands
    kind = TYPES[ins.parts[-1]]
    if not (target + text).count("{"):
        return step_of(ins, program, [kind], lambda value: value)
    half, bits = np.dtype(f"u{kind.itemsize // 2}"), 4 * kind.itemsize
    if target.startswith("{"):
        names, whole = [name.strip() for name in target.strip("{}").split(",")], source(text, kind, program)

        def part(machine: Machine, active: Array | None) -> None:
            for i, name in enumerate(names):
                if name != "_":
                    machine.write(name, (whole(machine) >> kind.type(bits * i)).astype(half), active)

        return part
    halves = [source(name.strip(), half, program) for name in text.strip("{}").split(",")]

    def join(machine: Machine, active: Array | None) -> None:
        low, high = (np.asarray(each(machine)).astype(kind) for each in halves)
        machine.write(target, low | high << kind.type(bits), active)

    return join


@builds("selp")
def selp(ins: Instruction, program: Program) -> Step:
    kind = TYPES[ins.parts[-1]]
    return step_of(ins, program, [kind, kind, bool], lambda a, b, c: np.where(c, a, b), kind)


@builds("setp")
def setp(ins: Instruction, program: Program) -> Step:
    name, kind = ins.parts[1], TYPES[ins.parts[-1]]
    plain = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "lo": np.less,
        "ls": np.less_equal,
        "hi": np.greater,
        "hs": np.greater_equal,
    }
    if kind.kind == "f" and name in ("nan", "num"):
        return step_of(ins, program, [kind, kind], lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan"))
    if kind.kind == "f" and name.endswith("u") and name[:-1] in plain:
        compare = plain[name[:-1]]
        return step_of(ins, program, [kind, kind], lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b))
    if kind.kind == "f" and name == "ne":
        return step_of(ins, program, [kind, kind], lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b))
    return step_of(ins, program, [kind, kind], plain[name])


@builds("shfl")
def shfl(ins: Instruction, program: Program) -> Step:
    target, text, lane, clamp, mask = ins.operands
    if (
        ins.parts[1] != "sync"
        or ins.parts[2] not in ("bfly", "idx")
        or clamp != "31"
        or mask not in ("-1", "0xffffffff")
    ):
        raise Unsupported(ins.text)
    value, which, across = source(text, U32, program), source(lane, U32, program), ins.parts[2] == "bfly"

    def step(machine: Machine, active: Array | None) -> None:
        machine.events.add(active is not None and partial(active), "shuffle with inactive lanes", ins.text)
        given, lanes = (np.broadcast_to(each(machine), machine.lanes).reshape(-1, 32) for each in (value, which))
        taken = lanes.astype(np.int64) & 31
        machine.write(
            target, np.take_along_axis(given, np.arange(32) ^ taken if across else taken, 1).reshape(-1), active
        )

    return step


# -- bits


@builds("and", "or", "xor", "not")
def logic(ins: Instruction, program: Program) -> Step:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[ins.parts[0]]
    return step_of(ins, program, [TYPES[ins.parts[-1]]] * (len(ins.operands) - 1), function)


@builds("shl", "shr")
def shift(ins: Instruction, program: Program) -> Step:
    kind = TYPES[ins.parts[-1]]
    bits, left = 8 * kind.itemsize, ins.parts[0] == "shl"

    def moved(value: Array, by: Array) -> Array:
        # A shift by all bits and more empties the register, or leaves its sign.
        most = np.minimum(by, np.uint32(bits - 1)).astype(kind)
        found = np.left_shift(value, most) if left else np.right_shift(value, most)
        return found if kind.kind == "i" and not left else np.where(by >= bits, kind.type(0), found)

    return step_of(ins, program, [kind, U32], moved, kind)


@builds("bfe")
def bfe(ins: Instruction, program: Program) -> Step:
    kind = TYPES[ins.parts[-1]]

    def extract(value: Array, position: Array, length: Array) -> Array:
        up = (np.uint32(32) - position - length).astype(kind)
        return np.right_shift(np.left_shift(value, up), (np.uint32(32) - length).astype(kind))

    return step_of(ins, program, [kind, U32, U32], extract, kind)


@builds("prmt")
def prmt(ins: Instruction, program: Program) -> Step:
    if len(ins.parts) != 2:
        raise Unsupported(ins.text)

    def permute(low: Array, high: Array, selector: Array) -> Array:
        both, found = low.astype(U64) | high.astype(U64) << np.uint64(32), np.uint32(0)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)).astype(U64) * np.uint64(8)) & np.uint64(255)).astype(U32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            found = found | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return found

    return step_of(ins, program, [U32] * 3, permute, U32)


@builds("lop3")
def lop3(ins: Instruction, program: Program) -> Step:
    def combine(a: Array, b: Array, c: Array, table: Any) -> Any:
        found = np.uint32(0)
        for i in range(8):
            if int(table) >> i & 1:
                found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return found

    return step_of(ins, program, [U32] * 4, combine, U32)
