"""Writes the shipped student ``rf.load("mnist")``: ``python -m bench.study.mnist.asset RUN``.

RUN is a finished run's folder. The description keeps what makes samples, and names no folder of the machine that
trained the student.
"""

import sys
from dataclasses import replace
from pathlib import Path

from realuid_fast import choices, teachers

COMMAND = "make study DATA=data/mnist"


def main(run: str) -> int:
    """Write the student of ``run`` into the package."""
    made = teachers.load(Path(run) / "student.safetensors", role="student")
    own = made.description
    described = replace(own, data={**own.data, "path": "data/mnist"}, teacher="", command=COMMAND)
    teachers.save(choices.STUDENTS["mnist"], made.net.state_dict(), described)
    print(f"written to {choices.STUDENTS['mnist']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
