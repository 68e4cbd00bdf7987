"""The study on MNIST: ``python -m bench.study.mnist --data FOLDER``, or ``realuid-fast bench study --data FOLDER``.

``registered.md`` beside this file says what the study asks and what decides; ``registered_more.md`` says it of the
ablations and of the comparison with other systems, which ``--group`` names and which need the main comparison's runs.

It trains the classifier, the teacher and every student, each a process of one thread, measures them, and writes tables
and plots. What is finished stays: the same command goes on after an interruption, in the middle of a run too.

Every finished run leaves a record in the folder of the results. With ``--go-on`` a run that has a record is not made
again, so a study that was begun on one machine is finished on another. ``--repeat RUN`` makes a run again and compares
it with its record. Both begin from the package's own teacher and classifier, with which the records were made.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from realuid_fast import data, teachers
from realuid_fast.cli.parser import add_settings
from realuid_fast.cli.run import run as carry_out
from realuid_fast.errors import UserError
from realuid_fast.jobs import config as configs
from realuid_fast.jobs.train import free_cores
from realuid_fast.settings import Config
from realuid_fast.streams import guarded

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
    student_command,
    systems,
    teacher_command,
)
from .cost import costs
from .judge import SAMPLES, Judge
from .records import SHOWN, Records, pictures, settings, write_json

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
GROUPS = ("main", "ablations", "others", "family")


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
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: 0 1 2; 0 for the group family)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps (default: all)")
    text = "make no run again that --results has a record of"
    parser.add_argument("--go-on", action="store_true", help=text)
    text = "make these runs again, such as uid-seed0, and compare them with their records"
    parser.add_argument("--repeat", nargs="+", default=[], metavar="RUN", help=text)
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
    asked.seeds = list(SEEDS[: 1 if asked.group == "family" else None]) if asked.seeds is None else asked.seeds
    if asked.samples < 2 or not asked.seeds or min(asked.seeds) < 0 or len(set(asked.seeds)) < len(asked.seeds):
        raise UserError("--samples must be at least 2 and --seeds different numbers from 0 on")
    jobs = free_cores() if asked.jobs is None else asked.jobs
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    place = Place(asked.data.resolve(), asked.out.resolve(), shipped=asked.go_on or bool(asked.repeat))
    records = Records(asked.results / "records", place, asked.set, asked.samples)
    data.idx(place.data)  # refused at once where the files are missing
    (place.out / "runs").mkdir(parents=True, exist_ok=True)
    main = asked.group == "main"
    arms = _arms(asked)
    if not main:
        _require(records, _all(_used(arms), asked))
    if "classifier" in asked.only and not place.classifier.is_file():
        run_all({"classifier": classifier_command(place, _of_data(asked.set))}, 1, place.out)
    if "teacher" in asked.only:
        wanted = {place.teacher(arm.teacher): arm.teacher for arm in arms}
        waits = {file.parent.name: name for file, name in wanted.items() if not file.is_file()}
        run_all({folder: teacher_command(place, name, asked.set) for folder, name in waits.items()}, jobs, place.out)
    if "costs" in asked.only and not _costs_file(records, asked).is_file():
        write_json(_costs_file(records, asked), costs(place, arms if main else (MAIN[0], *arms), asked.set))
    if not {"students", "report"} & set(asked.only):
        return
    priced = json.loads(_costs_file(records, asked).read_text())
    if main:
        arms = (*MAIN, longer(_ratio(priced), asked.set))
    config = configs.load("mnist", [*place.common(), *asked.set])
    judge = Judge(place, config.data, asked.samples)
    if asked.repeat:
        _repeat(records, arms, asked, judge, jobs)
        return
    if "students" in asked.only:
        records.folder.mkdir(parents=True, exist_ok=True)
        write_json(records.folder / _costs_file(records, asked).name, priced)
        # Seed by seed: a study that is cut short has whole comparisons of fewer seeds.
        runs = [run for run in _all(arms, asked) if not (asked.go_on and records.find(*run))]
        _train(records, runs, asked, jobs, lambda run: records.write(*run, judge))
    if "report" in asked.only:
        (_report if main else _report_group)(records, arms, asked, command, config, judge, priced)


def _costs_file(records: Records, asked: argparse.Namespace) -> Path:
    """The file of the costs, on which the length of the longest runs depends: with --go-on the recorded one."""
    name = "costs.json" if asked.group == "main" else f"costs-{asked.group}.json"
    kept = records.folder / name
    return kept if records.place.shipped and kept.is_file() else records.place.out / name


def _train(
    records: Records,
    runs: Sequence[tuple[Arm, int]],
    asked: argparse.Namespace,
    jobs: int,
    done: Callable[[tuple[Arm, int]], None] = lambda run: None,
) -> None:
    """Train the students of runs that are not finished; ``done`` is called with each run that is."""
    place, waiting = records.place, dict[str, tuple[Arm, int]]()
    for arm, seed in runs:
        if finished(place.run(arm, seed), place.settings(arm, seed, asked.set)):
            done((arm, seed))
            continue
        if arm.start and not (place.start(arm, seed) / "student.safetensors").is_file():
            raise UserError(
                f"{arm.name} of seed {seed} goes on from a student that {place.out} does not hold: "
                f"--group main --repeat {place.start(arm, seed).name} makes it"
            )
        waiting[place.run(arm, seed).name] = arm, seed
    commands = {name: student_command(place, *run, asked.set) for name, run in waiting.items()}
    run_all(commands, jobs, place.out, lambda name: done(waiting[name]))


def _repeat(records: Records, arms: Sequence[Arm], asked: argparse.Namespace, judge: Judge, jobs: int) -> None:
    """Make runs again and print how they compare with their records."""
    known = {records.place.run(arm, seed).name: (arm, seed) for arm in arms for seed in asked.seeds}
    if unknown := [name for name in asked.repeat if name not in known]:
        raise UserError(f"--repeat {unknown[0]}: this group has no such run, it has {', '.join(known)}")
    runs = [known[name] for name in asked.repeat]
    _require(records, runs)
    _train(records, runs, asked, jobs)
    for run in runs:
        print(records.repeated(*run, judge))


def _arms(asked: argparse.Namespace) -> tuple[Arm, ...]:
    """The arms of a group, without the main comparison's longest."""
    if asked.group == "ablations":
        return ablations(_best(asked.results / "main.json"))
    return {"main": MAIN, "others": OTHERS}.get(asked.group) or systems()


def _best(file: Path) -> Arm:
    """The RealUID arm of the smallest mean final distance in the main comparison's results."""
    if not file.is_file():
        raise UserError(f"the ablations start from the main comparison's best arm: there are no results {file} yet")
    rows = json.loads(file.read_text())["comparison"]
    return min(MAIN[1:], key=lambda arm: sum(rows[arm.name]["final"]))


def _used(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms of the main comparison that a group's arms are compared with or go on from."""
    names = {name for arm in arms for name in (arm.against, arm.start)}
    return tuple(arm for arm in MAIN if arm.name in names)


def _require(records: Records, runs: Sequence[tuple[Arm, int]]) -> None:
    for arm, seed in runs:
        if records.find(arm, seed) is None:
            raise UserError(
                f"{records.folder} has no record of the run {arm.name}-seed{seed} with these settings and this "
                "teacher: it is not finished. Leave --only and --group away first"
            )


def _all(arms: Sequence[Arm], asked: argparse.Namespace) -> list[tuple[Arm, int]]:
    return [(arm, seed) for seed in asked.seeds for arm in arms]


def _of_data(changes: Sequence[str]) -> list[str]:
    return [change for change in changes if change.startswith("data.")]


def _ratio(priced: dict[str, Any]) -> float:
    """The cost of an update of RealUID in updates of UID: the mean over its arms, which take the same operations."""
    ratios = [ratio for name, ratio in priced["ratio"].items() if name != UID]
    return float(sum(ratios) / len(ratios))


def _report(
    records: Records, arms: Sequence[Arm], asked: argparse.Namespace, command: str, config: Config, judge: Judge,
    priced: dict[str, Any],
) -> None:  # fmt: skip
    """Tables, curves and samples of the main comparison."""
    _require(records, _all(arms, asked))
    place = records.place
    teacher = teachers.load_teacher(place.teacher())
    teacher_rows: list[dict[str, Any]] = []
    for steps, solver in TEACHER_STEPS:
        scores = _scores(place.out / f"teacher-{solver}-{steps}.json", judge, teacher, steps, solver)
        word = "step" if steps == 1 else "steps"
        teacher_rows.append({"title": f"teacher, {steps} {solver.title()} {word}", "scores": scores})
    found = {arm.name: [records.find(arm, seed) or {} for seed in asked.seeds] for arm in arms}
    results = _results(found, asked)
    shown = [judge.measure.heldout, judge.made_by(teacher, 100, count=SHOWN)]
    shown += [pictures(of_seeds[0], judge.dataset.shape) for of_seeds in found.values()]
    last = arms[-1].name
    content = {
        **_about(asked, command, judge),
        "updates": config.distill.updates,
        "longer": last,
        "arms": [{"name": arm.name, "title": arm.title, "changes": list(arm.changes)} for arm in arms],
        "costs": priced,
        "floor": judge.floor().as_dict(),
        "teacher": teacher_rows,
        "comparison": report.comparison(results, last),
        "results": results,
        "config": settings(config),
    }
    write_json(asked.results / "main.json", content)
    (asked.results / "main.md").write_text(report.markdown(content))
    held = float(next(row["scores"]["distance"] for row in teacher_rows if "100 Euler" in row["title"]))
    report.curves(results, arms, held, content["floor"]["distance"], asked.results / "main.png")
    report.samples(shown, asked.results / "samples.png")
    print(report.markdown(content) + f"\nwritten to {asked.results}")


def _results(found: dict[str, list[dict[str, Any]]], asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Curve and scores of every seed, by arm."""
    return {
        name: [
            {"seed": seed, "curve": record["curve"], "scores": record["scores"]}
            for seed, record in zip(asked.seeds, of_seeds, strict=True)
        ]
        for name, of_seeds in found.items()
    }


def _about(asked: argparse.Namespace, command: str, judge: Judge) -> dict[str, Any]:
    """The part of a results file that says how it was made."""
    return {
        "command": command,
        "machine": machine.describe(),
        "metric": judge.measure.name,
        "samples": asked.samples,
        "seeds": asked.seeds,
    }


def _report_group(
    records: Records, arms: Sequence[Arm], asked: argparse.Namespace, command: str, config: Config, judge: Judge,
    priced: dict[str, Any],
) -> None:  # fmt: skip
    """Tables and curves of the arms of a group, each beside the arm that it is compared with."""
    _require(records, _all(arms, asked))
    place, shown = records.place, (*_used(arms), *arms)
    results = _results({arm.name: [records.find(arm, seed) or {} for seed in asked.seeds] for arm in shown}, asked)
    updates = configs.load("mnist", [*asked.set, *arms[0].changes]).distill.updates
    rows = report.group(results, shown, priced["ratio"], updates)
    of_teachers = {}
    for name in dict.fromkeys(arm.teacher for arm in shown):
        file = place.teacher(name)
        of_teachers[name] = _scores(place.out / f"{name}-euler-100.json", judge, teachers.load_teacher(file), 100)
    content = {
        **_about(asked, command, judge),
        "updates": updates,
        "arms": [{"name": arm.name, "title": arm.title, "changes": list(arm.changes)} for arm in shown],
        "costs": priced,
        "teachers": of_teachers,
        "rows": rows,
        "results": results,
    }
    write_json(asked.results / f"{asked.group}.json", content)
    table = report.group_markdown(rows, updates)
    (asked.results / f"{asked.group}.md").write_text(table)
    floor = judge.floor().distance
    report.curves(results, shown, of_teachers["teacher"]["distance"], floor, asked.results / f"{asked.group}.png")
    print(table + f"\nwritten to {asked.results}")


def _scores(file: Path, judge: Judge, model: teachers.Model, steps: int = 1, solver: str = "euler") -> dict[str, Any]:
    """The scores in ``file``, measured now where there is no such file yet."""
    if not file.is_file():
        write_json(file, judge(judge.made_by(model, steps, solver)).as_dict())
    return dict(json.loads(file.read_text()))


if __name__ == "__main__":
    raise SystemExit(main())
