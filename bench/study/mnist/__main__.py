"""The study on MNIST: ``python -m bench.study.mnist --data FOLDER``, or ``realuid-fast bench study --data FOLDER``.

``registered.md`` beside this file says what the study asks and what decides; ``registered_more.md`` says it of the
ablations and of the comparison with other systems, which ``--group`` names and which need the main comparison's runs.

It trains the classifier, the teacher and every student, each a process of one thread, measures them, and writes tables
and plots. What is finished stays: the same command goes on after an interruption, in the middle of a run too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realuid_fast import data, teachers
from realuid_fast.cli.parser import add_settings
from realuid_fast.cli.run import run as carry_out
from realuid_fast.errors import UserError
from realuid_fast.files import replacing
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import free_cores
from realuid_fast.streams import guarded
from realuid_fast.train.logging import read_csv

from ... import machine
from ..compare import run_all
from . import report
from .arms import (
    MAIN,
    OTHERS,
    SEEDS,
    UID,
    Arm,
    Place,
    ablations,
    classifier_command,
    finished,
    longer,
    student_commands,
    teacher_command,
)
from .cost import costs
from .judge import SAMPLES, Judge

TEACHER_STEPS = (
    (1, "euler"),
    (5, "euler"),
    (20, "euler"),
    (100, "euler"),
    (1, "heun"),
    (5, "heun"),
    (20, "heun"),
    (100, "heun"),
)
STEPS = ("classifier", "teacher", "costs", "students", "report")
GROUPS = ("main", "ablations", "others")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit codes are those of ``realuid-fast``."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", "bench.study.mnist", *words])
    return guarded(lambda: carry_out(_parser().parse_args(words), lambda asked: run(asked, command)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study.mnist", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST's four files")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="what is made (default: runs/mnist)")
    text = "tables and plots (default: bench/results/mnist)"
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results" / "mnist", help=text)
    parser.add_argument("--group", choices=GROUPS, default="main", help="which comparison (default: main)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds (default: 0 1 2)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps (default: all)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of every distance (default: {SAMPLES})")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: the free cores)")
    add_settings(parser, "KEY.SUB=VALUE for every run, over the configuration: for a trial, not for the study")
    return parser


def run(asked: argparse.Namespace, command: str) -> None:
    """Make what is missing, step by step.

    Raises:
        UserError: data or numbers that cannot be used, a run that failed, or a report of unfinished runs.
        realuid_fast.train.hooks.Interrupted: after a signal, with everything saved.
    """
    if asked.samples < 2 or not asked.seeds or min(asked.seeds) < 0 or len(set(asked.seeds)) < len(asked.seeds):
        raise UserError("--samples must be at least 2 and --seeds different numbers from 0 on")
    jobs = free_cores() if asked.jobs is None else asked.jobs
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    place = Place(asked.data.resolve(), asked.out.resolve())
    data.idx(place.data)  # refused at once where the files are missing
    (place.out / "runs").mkdir(parents=True, exist_ok=True)
    main = asked.group == "main"
    arms = MAIN if main else OTHERS if asked.group == "others" else ablations(_best(asked.results / "main.json"))
    if not main:
        _require(place, _used(arms), asked)
    if "classifier" in asked.only and not place.classifier.is_file():
        run_all({"classifier": classifier_command(place, _of_data(asked.set))}, 1, place.out)
    if "teacher" in asked.only:
        wanted = {place.teacher(arm.teacher): arm.teacher for arm in arms}
        waits = {file.parent.name: name for file, name in wanted.items() if not file.is_file()}
        run_all({folder: teacher_command(place, name, asked.set) for folder, name in waits.items()}, jobs, place.out)
    priced = place.out / ("costs.json" if main else f"costs-{asked.group}.json")
    if "costs" in asked.only and not priced.is_file():
        _write(priced, costs(place, arms if main else (MAIN[0], *arms), asked.set))
    if not {"students", "report"} & set(asked.only):
        return
    if main:
        arms = (*MAIN, longer(_ratio(json.loads(priced.read_text())), asked.set))
    if "students" in asked.only:
        waiting = list(student_commands(place, arms, tuple(asked.seeds), asked.set))
        run_all({each.name: each.command for each in waiting}, jobs, place.out)
    if "report" in asked.only:
        asked.results.mkdir(parents=True, exist_ok=True)
        (_report if main else _report_group)(place, arms, asked, command)


def _best(file: Path) -> Arm:
    """The RealUID arm of the smallest mean final distance in the main comparison's results."""
    if not file.is_file():
        raise UserError(f"the ablations start from the main comparison's best arm: there are no results {file} yet")
    rows = json.loads(file.read_text())["comparison"]
    return min(MAIN[1:], key=lambda arm: sum(rows[arm.name]["final"]))


def _used(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms of the main comparison that a group's arms are compared with or go on from."""
    names = {UID, *(arm.against for arm in arms), *(arm.start for arm in arms)}
    return tuple(arm for arm in MAIN if arm.name in names)


def _require(place: Place, arms: tuple[Arm, ...], asked: argparse.Namespace) -> None:
    for arm in arms:
        for seed in asked.seeds:
            if not finished(place.run(arm, seed), place.settings(arm, seed, asked.set)):
                raise UserError(f"the run {place.run(arm, seed)} is not finished: leave --only and --group away first")


def _of_data(changes: Sequence[str]) -> list[str]:
    return [change for change in changes if change.startswith("data.")]


def _ratio(priced: dict[str, Any]) -> float:
    """The cost of an update of RealUID in updates of UID: the mean over its arms, which take the same operations."""
    ratios = [ratio for name, ratio in priced["ratio"].items() if name != UID]
    return float(sum(ratios) / len(ratios))


def _write(file: Path, content: Any) -> None:
    with replacing(file) as part:
        part.write((json.dumps(content, indent=1) + "\n").encode())


def _report(place: Place, arms: tuple[Arm, ...], asked: argparse.Namespace, command: str) -> None:
    _require(place, arms, asked)
    config = configs.load("mnist", [*place.common(), *asked.set])
    judge = Judge(place, config.data, asked.samples)
    teacher = teachers.load_teacher(place.teacher())
    teacher_rows: list[dict[str, Any]] = []
    for steps, solver in TEACHER_STEPS:
        scores = _scores(place.out / f"teacher-{solver}-{steps}.json", judge, teacher, steps, solver)
        word = "step" if steps == 1 else "steps"
        teacher_rows.append({"title": f"teacher, {steps} {solver.title()} {word}", "scores": scores})
    results = _results(place, arms, asked, judge)
    pictures = [judge.measure.heldout, judge.made_by(teacher, 100)]
    for arm in arms:
        first = teachers.load(place.run(arm, asked.seeds[0]) / "student.safetensors", role="student")
        pictures.append(judge.made_by(first))
    last = arms[-1].name
    content = {
        **_about(asked, command, judge),
        "updates": config.distill.updates,
        "longer": last,
        "arms": [{"name": arm.name, "title": arm.title, "changes": list(arm.changes)} for arm in arms],
        "costs": json.loads((place.out / "costs.json").read_text()),
        "floor": judge.floor().as_dict(),
        "teacher": teacher_rows,
        "comparison": report.comparison(results, last),
        "results": results,
        "config": configs.to_mapping(config),
    }
    _write(asked.results / "main.json", content)
    (asked.results / "main.md").write_text(report.markdown(content))
    held = float(next(row["scores"]["distance"] for row in teacher_rows if "100 Euler" in row["title"]))
    report.curves(results, arms, held, content["floor"]["distance"], asked.results / "main.png")
    report.samples(pictures, asked.results / "samples.png")
    print(report.markdown(content) + f"\nwritten to {asked.results}")


def _results(
    place: Place, arms: Sequence[Arm], asked: argparse.Namespace, judge: Judge
) -> dict[str, list[dict[str, Any]]]:
    """Curve and scores of every seed, by arm."""
    results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for arm in arms:
        for seed in asked.seeds:
            folder = place.run(arm, seed)
            student = teachers.load(folder / "student.safetensors", role="student")
            points = [(int(row["update"]), row["distance"]) for row in read_csv(folder / "distances.csv")]
            scores = _scores(folder / "scores.json", judge, student)
            results[arm.name].append({"seed": seed, "curve": points, "scores": scores})
    return results


def _about(asked: argparse.Namespace, command: str, judge: Judge) -> dict[str, Any]:
    """The part of a results file that says how it was made."""
    return {
        "command": command,
        "machine": machine.describe(),
        "metric": judge.measure.name,
        "samples": asked.samples,
        "seeds": asked.seeds,
    }


def _report_group(place: Place, arms: tuple[Arm, ...], asked: argparse.Namespace, command: str) -> None:
    """Tables and curves of the arms of a group, each beside the arm that it is compared with."""
    _require(place, arms, asked)
    config = configs.load("mnist", [*place.common(), *asked.set])
    judge = Judge(place, config.data, asked.samples)
    shown = (*_used(arms), *arms)
    results = _results(place, shown, asked, judge)
    priced = json.loads((place.out / f"costs-{asked.group}.json").read_text())
    rows = report.group(results, shown, priced["ratio"], config.distill.updates)
    of_teachers = {}
    for name in dict.fromkeys(arm.teacher for arm in shown):
        file = place.teacher(name)
        of_teachers[name] = _scores(file.parent / "scores.json", judge, teachers.load_teacher(file), 100)
    content = {
        **_about(asked, command, judge),
        "updates": config.distill.updates,
        "arms": [{"name": arm.name, "title": arm.title, "changes": list(arm.changes)} for arm in shown],
        "costs": priced,
        "teachers": of_teachers,
        "rows": rows,
        "results": results,
    }
    _write(asked.results / f"{asked.group}.json", content)
    table = report.group_markdown(rows, config.distill.updates)
    (asked.results / f"{asked.group}.md").write_text(table)
    floor = judge.floor().distance
    report.curves(results, shown, of_teachers["teacher"]["distance"], floor, asked.results / f"{asked.group}.png")
    print(table + f"\nwritten to {asked.results}")


def _scores(file: Path, judge: Judge, model: teachers.Model, steps: int = 1, solver: str = "euler") -> dict[str, Any]:
    """The scores in ``file``, measured now where there is no such file yet."""
    if not file.is_file():
        _write(file, judge(judge.made_by(model, steps, solver)).as_dict())
    return dict(json.loads(file.read_text()))


if __name__ == "__main__":
    raise SystemExit(main())
