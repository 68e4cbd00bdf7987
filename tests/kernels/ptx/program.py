"""The text of one PTX kernel as instructions, basic blocks and parameters."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass


class Unsupported(Exception):
    """The text has something that this interpreter does not know: a fault of the interpreter, not of the kernel."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: the predicate register that decides which threads take part, or None; ``negated`` turns it round.
        parts: the operation's name, split at its dots.
        operands: as they are written, registers in braces and addresses in brackets kept together.
        text: the line itself, for messages.
    """

    guard: str | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def ends_block(self) -> bool:
        return self.parts[0] in ("bra", "ret", "exit", "bar")


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel.

    Attributes:
        params: type and name of each parameter.
        threads: a program's (CTA's) threads; ``shared``: its bytes of shared memory.
        blocks: instructions between two places where threads may part or meet.
        labels: the block that each label begins.
    """

    name: str
    params: tuple[tuple[str, str], ...]
    threads: int
    shared: int
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]


@functools.cache
def register_bytes(name: str) -> int:
    """Bytes of a register by its prefix; a predicate counts as one."""
    for prefix, size in (("%rs", 2), ("%rd", 8), ("%p", 1), ("%r", 4)):
        if name.startswith(prefix):
            return size
    raise Unsupported(name)


def listed(text: str) -> tuple[str, ...]:
    """Items between commas, where braces and brackets hold their commas together."""
    return tuple(item.strip() for item in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if item.strip())


def parse(text: str, shared: int) -> Program:
    """Read the one kernel in ``text``, which uses ``shared`` bytes of shared memory."""
    lines = [line.split("//")[0].strip() for line in text.splitlines()]
    text = "\n".join(line for line in lines if not line.startswith((".loc", ".file")))
    head = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)
    if head is None or threads is None:
        raise Unsupported("no kernel with a number of threads")
    params = re.findall(r"\.param\s+\.(\w+)(?:\s+\.ptr\s+\.global\s+\.align\s+\d+)?\s+(\w+)", head[2])
    begin = text.index("{", head.end())
    instructions, labels = _body(text[begin + 1 : text.index("\n}", begin)])
    starts = {0, *labels.values()} | {i + 1 for i, each in enumerate(instructions) if each.ends_block}
    cuts = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    blocks = tuple(tuple(instructions[a:b]) for a, b in itertools.pairwise(cuts))
    return Program(
        head[1], tuple(params), int(threads[1]), shared, blocks, {name: cuts.index(at) for name, at in labels.items()}
    )


def _body(text: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in re.split(r"[;\n]", text):
        line = raw.strip()
        while label := re.match(r"(\$L[\w$]+):\s*", line):
            labels[label[1]] = len(instructions)
            line = line[label.end() :]
        if not line or line.startswith("."):
            continue
        guard = re.match(r"@(!?)(%p\d+)\s+", line)
        name, _, operands = line[guard.end() if guard else 0 :].partition(" ")
        instructions.append(
            Instruction(
                guard[2] if guard else None,
                bool(guard and guard[1]),
                tuple(name.split(".")),
                listed(operands),
                " ".join(line.split()),
            )
        )
    return instructions, labels
