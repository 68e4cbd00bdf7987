"""Writes the README's tables from the committed results: ``python -m bench.readme`` (``--check`` only compares)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def rendered(text: str) -> str:
    """The README with every table replaced by ``bench/results/<name>.md``."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        file = RESULTS / f"{name}.md"
        if not file.is_file():
            raise SystemExit(f"README.md asks for the table '{name}', and there is no bench/results/{name}.md")
        body = file.read_text().strip()
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(argv: list[str]) -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = rendered(old)
    if "--check" in argv:
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
