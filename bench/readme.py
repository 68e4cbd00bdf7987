"""Writes the documents' tables from the committed results, and the lines that their links to the source point at.

``python -m bench.readme``; with ``--check`` it only compares.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# Cases of the README's table of speed, and the ways beside ours; the shape is that of CIFAR-10's batch of 256.
SHAPE = [256, 3, 32, 32]
CALLS = {
    "generator loss, 3 gradients, noise drawn": "generator loss, 3 gradients, noise drawn",
    "generator loss, 3 gradients, noise given": "generator loss, 3 gradients, noise given",
    "fake loss, gradient, half the rows real, noise drawn": "fake loss, 1 gradient, noise drawn",
    "matching loss, gradient, noise drawn": "matching loss, 1 gradient, noise drawn",
    "interpolate, noise drawn": "interpolate, noise drawn",
}
WAYS = (
    "realuid_fast, autograd",
    "eager, as published",
    "torch.compile, as published",
    "torch.compile, gradients by hand",
)


def pages() -> list[Path]:
    """The documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """A document with every table replaced by ``bench/results/<name>.md``, ``speed`` by :func:`speed`."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        file = RESULTS / f"{name}.md"
        if name == "scaling":
            return match.group(0)  # bench.scaling writes this one into its page itself
        if name != "speed" and not file.is_file():
            raise SystemExit(f"a document asks for the table '{name}', and there is no bench/results/{name}.md")
        body = speed() if name == "speed" else file.read_text().strip()
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w/]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def relinked(text: str) -> str:
    """A document of ``docs/`` whose links ``[`name`](../file#Ln)`` point at the line that defines ``name``."""

    def link(match: re.Match[str]) -> str:
        name, file = match.group(1), match.group(2)
        defines = re.compile(rf"(def |class |// --- |^    ){re.escape(name.rpartition('.')[2])}\b")
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if defines.search(line):
                return f"[`{name}`](../{file}#L{number})"
        raise SystemExit(f"a document links to {name}, which {file} does not define")

    return re.sub(r"\[`([\w.]+)`\]\(\.\./([\w./]+)#L\d+\)", link, text)


def speed() -> str:
    """The README's table of speed, from ``micro.json``: our explicit call in ms, other ways' times by its own."""
    results = json.loads((RESULTS / "micro.json").read_text())
    found = {
        (row["case"], row["way"]): row
        for row in results["rows"]
        if row["shape"] == SHAPE and row["dtype"] == "float32" and row["layout"] == "contiguous"
    }
    head = ("256x3x32x32, float32", "explicit, ms", "differentiable", "eager", "torch.compile", "compiled by hand")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for case, title in CALLS.items():
        rows = [found.get((case, way)) for way in WAYS]
        cells = [f"{found[case, 'realuid_fast']['median_ms']:.3g}", *(f"{r['ratio']:.1f}x" if r else "" for r in rows)]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    machine = results["machine"]
    note = f"`{machine['command']}` at revision {machine['revision']} on {machine['processor']}, {machine['isa']}, "
    return "\n".join([*lines, "", note + f"{machine['threads']} thread, torch {machine['torch']}."])


def main(argv: list[str]) -> int:
    changed = False
    for page in pages():
        old = page.read_text()
        new = relinked(rendered(old))
        changed |= old != new
        if old != new and "--check" not in argv:
            page.write_text(new)
    return int(changed and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
