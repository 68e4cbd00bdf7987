"""The table that a student is judged by: real data, the teacher at several step counts, the student."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import choices
from ..errors import UserError
from ..files import replacing
from ..models.calls import needs_endpoint
from ..models.few_steps import FewSteps, generator_of
from ..models.files import Model
from ..models.solvers import evaluations, integrate
from ..precision import Precision
from ..progress import bar, counting
from .measure import MOST, WARMING, Distances, Measure, Sampler, evaluation_noise, generate

SMALL = 256  # values of a sample up to which evaluations are quick on a CPU: points, and digits of 8x8
STEPS = choices.TEACHER_STEPS


@dataclass(frozen=True)
class Row:
    """One line of the table; ``evaluations`` of the network a sample and ``samples_per_second`` are None for data."""

    name: str
    distances: Distances
    evaluations: int | None = None
    samples_per_second: float | None = None


def sampler(
    model: Model, steps: int | None = None, solver: str = "euler", guidance: float = 1.0, precision: str = "float32"
) -> Sampler:
    """A function that turns noise and labels into samples.

    A student takes its own steps, ``steps`` of them if it has several numbers of steps. A teacher takes ``steps`` steps
    of ``solver``, one if None, and a ``guidance`` above 1 pulls its samples further towards the labels. The network
    computes in ``precision``, one of :data:`~realuid_fast.precision.PRECISIONS`, on the noise's device.
    """
    if guidance != 1.0 and model.description.role == "student":
        raise UserError("guidance is for teachers only: a student has learnt the guidance that it was distilled with")
    net, described = model.net.requires_grad_(False), model.description
    path, predict = described.interpolant(), described.predict
    needed = needs_endpoint(net, path)
    student = generator_of(net, described) if described.role == "student" else None
    own = {"steps": steps} if isinstance(student, FewSteps) else {}

    def draw(z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None) -> Tensor:
        endpoint = endpoint if needed else None
        with Precision(precision, z.device).sampling():
            if student is not None:
                return student(z, labels, endpoint, **own)
            return integrate(
                net, z, steps or 1, solver, labels, path=path, predict=predict, endpoint=endpoint, guidance=guidance
            )

    return draw


def defaults(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The number of samples a row and a teacher's step counts that suit samples of ``shape``.

    Points and images like the digits get 5,408, four for each training digit, and all of :data:`STEPS`. The networks of
    larger images take hundreds of times as long, so they get as many samples as precision and recall use, and no row of
    100 steps.
    """
    return (5408, STEPS) if math.prod(shape) <= SMALL else (MOST, STEPS[:2])


def rows(
    measure: Measure,
    shape: tuple[int, ...],
    teacher: Model | None,
    student: Model | None,
    count: int,
    steps: Sequence[int] = STEPS,
    device: torch.device | str = "cpu",
    progress: bool = False,
    precision: str = "float32",
) -> Iterator[Row]:
    """The table's rows one by one, each from ``count`` samples made on the thread count that is set.

    Args:
        measure: the distances.
        shape: shape of one sample.
        teacher: sampled by Euler's method with each of ``steps``; None leaves its rows out.
        student: sampled in its own steps, a row for each number of them; None leaves its rows out.
        count: samples a row; the real data's row has as many as there are training samples.
        steps: step counts of the teacher.
        device: where the networks are, and their samples are made.
        progress: whether to show a bar of network evaluations over all rows.
        precision: what the networks compute in.
    """
    yield Row(f"real training data ({len(measure.train)})", measure.floor())
    noise = evaluation_noise(shape, count, device)
    wanted: list[tuple[str, Model, int, int]] = []
    if teacher is not None:
        for number in steps:
            name = f"teacher, {number} Euler step{'s' if number > 1 else ''}"
            wanted.append((name, teacher, number, evaluations(number)))
    if student is not None:
        for number in student.description.steps or (student.description.evaluations,):
            wanted.append((f"student, {'one step' if number == 1 else f'{number} steps'}", student, number, number))
    made = count + min(count, WARMING)
    with bar(sum(made * number for *_, number in wanted), "evaluation", progress, unit_scale=True) as shown:
        for name, model, number, evaluated in wanted:
            shown.set_description(name)
            with counting(model.net, shown):
                samples, speed = generate(
                    sampler(model, number, precision=precision), noise, *measure.conditions(model.net, count)
                )
            yield Row(name, measure(samples), evaluated, speed)


def markdown(table: Sequence[Row], metric: str) -> str:
    """The table as Markdown; ``metric`` names the main distance in the header."""
    paired = any(row.distances.pair_error is not None for row in table)
    lines = [
        f"| | {metric} | sliced Wasserstein | precision | recall |{' error a pair |' * paired} network evaluations "
        "| samples/s |",
        "|---|---:|---:|---:|---:|---:|---:|" + "---:|" * paired,
    ]
    for row in table:
        d = row.distances
        speed = "" if row.samples_per_second is None else f"{row.samples_per_second:,.0f}"
        count = "" if row.evaluations is None else f"{row.evaluations}"
        error = "" if d.pair_error is None else f"{d.pair_error:.4f}"
        lines.append(
            f"| {row.name} | {d.distance:.4g} | {d.sliced_wasserstein:.4f} | {d.precision:.3f} | {d.recall:.3f} "
            f"|{f' {error} |' * paired} {count} | {speed} |"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path, table: Sequence[Row], metric: str, **context: Any) -> None:
    """``evaluation.json`` and ``table.md`` in ``folder``; ``context`` (counts, threads, versions) joins the former."""
    content = {
        "metric": metric,
        **context,
        "rows": [
            {
                "name": row.name,
                **row.distances.as_dict(),
                "network_evaluations": row.evaluations,
                "samples_per_second": row.samples_per_second,
            }
            for row in table
        ],
    }
    written = {"evaluation.json": json.dumps(content, indent=1) + "\n", "table.md": markdown(table, metric)}
    for name, text in written.items():
        with replacing(folder / name) as stream:
            stream.write(text.encode())
