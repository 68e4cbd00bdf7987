"""Students of a few DDIM steps on the probability flow, and the points of the teacher's trajectory that they learn.

A student's step leads from its own state at ``t_i`` to its next time, with ``x0`` the data that the network predicts::

    x_s = (a_s - c_s/c a) x0 + c_s/c x_t        a, c at t_i, a_s, c_s at t_(i+1), the last of which is the data's end

The teacher makes several steps of any solver from each of these times to the next, on a trajectory of its own from the
same noise. In a second stage the teacher is a student of more such steps. Source: Zhou et al., Simple and Fast
Distillation (2409.19681): SFD with one number of steps, and SFD-v, a network that takes the number as a condition.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..errors import UserError
from ..matching import Matching
from ..networks.calling import takes_guidance
from ..paths import OneSidedPath, Path, name_and_settings
from .calls import check_start, ends, scales
from .files import Description
from .generator import Generator
from .solvers import data_at, ddim, first_time, grid, integrate, states


class FewSteps(nn.Module):
    """``G(z)`` in a few DDIM steps from noise to data.

    With several numbers of ``steps`` the network takes the number of steps where a guided one takes its scale.

    Args:
        net: a network, called as the path says for its prediction.
        steps: the numbers of steps that it is trained for, on the times of a solver of as many steps.
        t_start: the first time, the path's own start in noise when None.
        path, predict: the path and the prediction that the network was trained on.
        times: the further times of a student of one number of steps, in place of the solver's.

    Raises:
        UserError: a two-sided path, numbers or times that are not in order, or several numbers for a network without
            a condition.
    """

    ancestral = False

    def __init__(
        self,
        net: nn.Module,
        steps: Sequence[int],
        t_start: float | None,
        path: Path,
        predict: str,
        times: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if not isinstance(path, OneSidedPath):
            raise UserError(f"several steps on a flow need a path from noise alone to data, not {type(path).__name__}")
        self.numbers = tuple(map(int, steps)) or (1 + len(times),)
        if min(self.numbers) < 1 or list(self.numbers) != sorted(set(self.numbers)):
            raise UserError(f"steps must be numbers of at least 1 in ascending order, got {list(steps)}")
        if times and self.numbers != (1 + len(times),):
            raise UserError(
                f"steps must be left out beside times: {len(times)} further times make {1 + len(times)} steps"
            )
        if len(self.numbers) > 1 and not takes_guidance(net):
            raise UserError("steps of several numbers need a network that takes their number (guided: true)")
        self.net, self.path, self.predict = net, path, predict
        self.t_start, self.times = first_time(path, predict) if t_start is None else float(t_start), tuple(times)
        check_start(path, self.t_start)
        data = ends(path).data
        left = [abs(data - t) for t in (self.t_start, *self.times, data)]
        if any(after >= before for before, after in itertools.pairwise(left)):
            raise UserError(f"times must come nearer to the data after t_start = {self.t_start:g}, got {self.times}")
        self.grids = {number: grid(path, self.t_start, data, number) for number in self.numbers}
        if times:
            own = itertools.pairwise((self.t_start, *self.times, data))
            self.grids = {self.numbers[0]: tuple((now, then - now) for now, then in own)}

    def on(self, net: nn.Module) -> FewSteps:
        """The same steps of another network of its kind."""
        return FewSteps(net, self.numbers, self.t_start, self.path, self.predict, self.times)

    def start(self, z: Tensor) -> Tensor:
        """The first state, of noise ``z`` alone."""
        return z * scales(self.path, self.t_start)[2]

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        endpoint: Tensor | None = None,
        steps: int | None = None,
        place: int | None = None,
    ) -> Tensor:
        """Samples like ``z``, standard normal ``(B, ...)``, in ``steps`` steps, by default the most it learned.

        With a ``place`` in ``[0, steps)`` it is that step alone, from the state ``z`` before it. Differentiable.

        Raises:
            UserError: a number of steps that it is not trained for.
        """
        steps = self.numbers[-1] if steps is None else steps
        if steps not in self.grids:
            known = " or ".join(map(str, self.numbers))
            raise UserError(f"steps must be {known}, the numbers that the student was trained for; got {steps}")
        condition = float(steps) if len(self.numbers) > 1 else 1.0
        x = self.start(z) if place is None else z
        for time, h in self.grids[steps] if place is None else self.grids[steps][place : place + 1]:
            x0 = data_at(self.net, x, time, labels, self.path, self.predict, endpoint, condition)
            x = ddim(self.path, x, x0, time, h)
        return x


class Flow(NamedTuple):
    """A frozen teacher with the number of steps of its ``solver``, in each step of the student, and its guidance.

    A teacher that is itself a student of several steps makes its own DDIM steps, ``steps`` in each of the student's.
    With a ``previous`` generator of one step, the samples that it makes of the same noise follow the teacher's.
    """

    net: nn.Module
    steps: int
    solver: str = "euler"
    guidance: float = 1.0
    previous: nn.Module | None = None


def check_first_stage(teacher: nn.Module, generator: Generator | FewSteps, each: int) -> None:
    """Refuse a student of several steps as the teacher of one that does not stop at its times.

    Args:
        teacher: a first stage; any other teacher passes.
        generator: the student that is trained.
        each: the first stage's steps in each of the generator's.
    """
    if not isinstance(teacher, FewSteps):
        return
    wanted = generator.grids if isinstance(generator, FewSteps) else {1: ()}
    for number, theirs in wanted.items():
        ours = teacher.grids.get(each * number, ())[::each]
        met = [math.isclose(at, time, rel_tol=1e-9) for (at, _), (time, _) in zip(ours, theirs, strict=False)]
        if not theirs or len(ours) != len(theirs) or not all(met):
            raise UserError(
                f"regression.steps {each} in each step of the student must make a number of steps of the first stage "
                f"({', '.join(map(str, teacher.numbers))}), on the same times; a student of one step takes steps [1]"
            )


@dataclass
class Pursuit:
    """A batch on its way through a generator's steps: its state, its conditions and the teacher's states ahead.

    Attributes:
        x: the state before the next step.
        labels, endpoint: the conditions, None where there are none.
        targets: the teacher's state after each of the steps.
        steps: the number of steps, which :class:`FewSteps` is called with; None for a generator of one step.
    """

    x: Tensor
    labels: Tensor | None
    endpoint: Tensor | None
    targets: list[Tensor]
    steps: int | None = None

    def step(self, run: Callable[..., Tensor], place: int) -> Tensor:
        """The state after the step ``place`` of the generator ``run``."""
        at = () if self.steps is None else (self.steps, place)
        return run(self.x, self.labels, self.endpoint, *at)


@torch.no_grad()
def pursuit(
    generator: Generator | FewSteps,
    teacher: Flow,
    z: Tensor,
    steps: int = 1,
    labels: Tensor | None = None,
    endpoint: Tensor | None = None,
) -> Pursuit:
    """A batch at its first state, and the teacher's states after each of ``steps`` steps, on a trajectory from ``z``.

    The teacher makes ``teacher.steps`` steps within each of the generator's, the first of which it begins at the path's
    own start in noise.
    """
    path, predict = generator.path, generator.predict
    if isinstance(generator, Generator):
        how = teacher.steps, teacher.solver, labels, None, path, predict, endpoint
        made = [integrate(teacher.net, z, *how, guidance=teacher.guidance)]
        if teacher.previous is not None:
            made.append(teacher.previous(z, labels, endpoint))
        return Pursuit(z, labels, endpoint, [torch.cat(made)])
    if isinstance(first := teacher.net, FewSteps):
        x, passed = first.start(z), []
        for place in range(steps * teacher.steps):
            x = first(x, labels, endpoint, steps * teacher.steps, place)
            passed.append(x)
        return Pursuit(generator.start(z), labels, endpoint, passed[teacher.steps - 1 :: teacher.steps], steps)
    begin = first_time(path, predict)
    between = itertools.pairwise((begin, *(time for time, _ in generator.grids[steps][1:]), ends(path).data))
    times = [row for now, then in between for row in grid(path, now, then, teacher.steps)]
    seen = states(
        teacher.net, z * scales(path, begin)[2], times, teacher.solver, labels, path, predict, endpoint,
        guidance=teacher.guidance,
    )  # fmt: skip
    targets = list(itertools.islice(seen, teacher.steps - 1, None, teacher.steps))
    return Pursuit(generator.start(z), labels, endpoint, targets, steps)


def generator_of(net: nn.Module, told: Description) -> Generator | FewSteps:
    """The generator of a student's network by the description in its file."""
    path, predict = told.interpolant(), told.predict
    if told.steps:
        return FewSteps(net, told.steps, told.t_start, path, predict, told.times)
    return Generator(net, told.t_start, path, predict, told.times, told.ancestral)


def described(
    net: nn.Module, matching: Matching, dataset: Dataset, decay: float, generator: Generator | FewSteps | None = None
) -> Description:
    """The description of the network that a trainer exports, where its user gives none: the inverse of
    :func:`generator_of` for a student's ``generator``. For a path of no name it is one that files refuse.
    """
    like = matching if generator is None else generator
    path, settings = name_and_settings(like.path)
    network = getattr(net, "built_from", {"kind": "yours", "dim": list(dataset.shape)})
    told = Description(
        network, path=path, path_settings=settings, predict=like.predict, data=dataset.config,
        preprocessing=dataset.preprocessing, decay=decay,
    )  # fmt: skip
    if generator is None:
        return told
    return replace(
        told, role="student", t_start=generator.t_start, times=generator.times, steps=generator.numbers,
        ancestral=generator.ancestral,
    )  # fmt: skip
