"""Writes the networks of the study that the package ships: ``python -m bench.study.mnist.asset OUT RUN``.

OUT is the folder of a study with a teacher, a classifier and the run RUN, such as ``uid-seed0``, whose student is
shipped. The descriptions keep what makes samples, and name no folder of the machine that trained the networks.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from realuid_fast import choices, teachers

from .arms import Place

COMMAND = "make study DATA=data/mnist"


def main(out: str, run: str) -> int:
    """Write teacher, classifier and the student of a run into the package."""
    place = Place(Path(), Path(out))
    student = place.out / "runs" / run / "student.safetensors"
    networks = {
        "teacher": (place.teacher(), choices.TEACHERS["mnist-teacher"]),
        "student": (student, choices.STUDENTS["mnist"]),
    }
    for role, (file, asset) in networks.items():
        made = teachers.load(file, role=role)
        own = made.description
        described = replace(own, data={**own.data, "path": "data/mnist"}, teacher="", command=COMMAND)
        teachers.save(asset, made.net.state_dict(), described)
    shutil.copyfile(place.classifier, choices.CLASSIFIERS["mnist"])
    print(f"written to {choices.ASSETS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
