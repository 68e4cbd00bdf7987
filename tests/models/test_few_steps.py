"""Students of a few steps on the flow: SFD's solver, loss and loop by its code, a trainer's update, the commands."""

import copy
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast import cli, data, paths, sampling, teachers
from realuid_fast.errors import UserError
from realuid_fast.models.few_steps import FewSteps, Flow, pursuit
from realuid_fast.models.loaded import Loaded
from realuid_fast.models.pairs import DISTANCES, pull
from realuid_fast.models.solvers import grid, states
from realuid_fast.noise import normal

from ..helpers import LABELLED, MLP, POINTS, random_network, save_teacher, trainer_of

VE = paths.VE()
SETTINGS = {"teacher": "x", "batch": 8, "updates": 4, "ema": [0.9], "export": 0.9}
SFD = {**SETTINGS, "objective": {"name": "regression"}, "regression": {"steps": 2, "solver": "dpmpp", "distance": "l1"}}


class Denoiser(torch.nn.Module):
    """A network in float64 that predicts the data; with several numbers of steps their number is its condition."""

    def __init__(self, seed, guided=False):
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64, generator=draws))
        self.guided = guided

    def forward(self, t, x, y=None, guidance=1.0):
        level = t.double()[:, None]
        return torch.tanh(x / (1 + level**2).sqrt() @ self.weight + level.log() / 9) * (1 + guidance / 5)


def schedule(steps):
    """zju-pi/diff-sampler at 68d5ce4, sfd-main/solver_utils.py: the levels of the schedule ``polynomial``, rho = 7."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return [(high + i / steps * (low - high)) ** 7 for i in range(steps + 1)]


def denoised(net, x, level, **more):
    return net(torch.full((len(x),), level, dtype=torch.float32), x, **more)


def published_dpmpp(net, x, levels):
    """The states of sfd-main/solvers.py's ``dpm_pp_sampler`` of order 3 at most, without its thresholding."""
    states, known = [x], []
    for i, (now, then) in enumerate(itertools.pairwise(levels)):
        known = [*known, (-math.log(now), denoised(net, x, now))][-3:]
        order = min(3, i + 1, len(levels) - 1 - i)
        m, at, ahead = [value for _, value in known], [place for place, _ in known], -math.log(then)
        h = ahead - at[-1]
        phi_1 = math.expm1(-h)
        x = then / now * x - phi_1 * m[-1]
        if order > 1:
            r0 = (at[-1] - at[-2]) / h
            d1_0 = (m[-1] - m[-2]) / r0
        if order == 2:
            x = x - 0.5 * phi_1 * d1_0
        if order == 3:
            r1 = (at[-2] - at[-3]) / h
            d1_1 = (m[-2] - m[-3]) / r1
            d1, d2 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1), (d1_0 - d1_1) / (r0 + r1)
            phi_2 = phi_1 / h + 1
            x = x + phi_2 * d1 - (phi_2 / h - 0.5) * d2
        states.append(x)
    return states


def published_euler(net, x, levels):
    states = [x]
    for now, then in itertools.pairwise(levels):
        states.append(states[-1] + (then - now) * (states[-1] - denoised(net, states[-1], now)) / now)
    return states


@pytest.mark.parametrize(("solver", "published"), [("dpmpp", published_dpmpp), ("ddim", published_euler)])
@pytest.mark.parametrize("numbers", [(3,), (2, 3)], ids=["SFD", "SFD-v"])
def test_an_update_is_the_published_one(solver, published, numbers):
    """sfd-main/training: ``get_teacher_traj`` of M = 1 and 3, then ``loss`` and its gradient a step, in float64."""
    teacher = Denoiser(0)
    student = FewSteps(Denoiser(1, guided=len(numbers) > 1), numbers, None, VE, "x0")
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for number, each in itertools.product(numbers, (2, 4)):
        # Their loop: num_steps - 1 steps of the student, and M = each - 1 levels between two of its levels.
        levels, more = schedule(number), {"guidance": float(number)} if len(numbers) > 1 else {}
        trajectory = published(teacher, 80 * z, schedule(number * each))[each::each]
        part = pursuit(student, Flow(teacher, each, solver), z, number)
        check_steps(student, part, z, levels, trajectory, more)


def check_steps(student, part, z, levels, trajectory, more):
    """A batch's losses and gradients, and the student's samples, against sfd-main's in each step."""
    net, latents = student.net, 80 * z
    assert len(part.targets) == len(levels) - 1 == len(trajectory)
    for place, (now, then) in enumerate(itertools.pairwise(levels)):
        theirs = latents + (then - now) * (latents - denoised(net, latents, now, **more)) / now
        loss = (theirs - trajectory[place]).abs().sum() / len(z)
        (expected,) = torch.autograd.grad(loss, [net.weight])
        made = part.step(student, place)
        value, seed = pull(DISTANCES["l1"], made, part.targets[place])
        torch.testing.assert_close(value, loss.detach(), rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad(made, [net.weight], seed)[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
        latents, part.x = theirs.detach(), made.detach()
    torch.testing.assert_close(student(z, steps=len(levels) - 1), latents, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("numbers", [(4,), (2, 4)], ids=["SFD", "SFD-v"])
def test_a_second_stage_is_the_published_one(numbers, steps):
    """sfd-main/training with ``is_second_stage``: the first stage's own Euler steps, told their number, in float64."""
    first = FewSteps(Denoiser(0, guided=len(numbers) > 1), numbers, None, VE, "x0")
    student = FewSteps(Denoiser(1), (steps,), None, VE, "x0")
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    told = {"guidance": 4.0} if len(numbers) > 1 else {}
    each = 4 // steps
    trajectory = published_euler(lambda *seen: first.net(*seen, **told), 80 * z, schedule(4))[each::each]
    check_steps(student, pursuit(student, Flow(first, each), z, steps), z, schedule(steps), trajectory, {})


def test_a_students_heun_targets_are_the_methods_states():
    """Two trapezoid steps in each of a student's two, on the linear path; the student's first time is later."""
    net = random_network(MLP).double()
    student = FewSteps(net, (), 0.25, paths.Linear(), "velocity", (0.5,))
    assert (student.numbers, student.t_start) == ((2,), 0.25)
    z = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    part = pursuit(student, Flow(net, 2, "heun"), z, 2)
    torch.testing.assert_close(part.x, 0.75 * z)
    x, expected = z, []
    with torch.no_grad():
        for t in (0.0, 0.25, 0.5, 0.75):
            slope = net(torch.full((4,), t), x)
            x = x + 0.125 * (slope + net(torch.full((4,), t + 0.25), x + 0.25 * slope))
            expected.append(x)
    torch.testing.assert_close(part.targets, expected[1::2], rtol=1e-10, atol=1e-10)
    step = 0.75 * z + 0.25 * net(torch.full((4,), 0.25), 0.75 * z)
    torch.testing.assert_close(part.step(student, 0), step, rtol=1e-10, atol=1e-10)


class Gaussian(torch.nn.Module):
    """The exact prediction of the data from N(0.7, 0.36), in float64."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, time, x, y=None):
        t = time.double() if self.path.network_time(torch.tensor([0.5]), "x0") == 0.5 else time.double() / 1000
        a, c = (scale[:, None] for scale in self.path.scales(t))
        return 0.7 + a * 0.36 / (a**2 * 0.36 + c**2) * (x - a * 0.7)


@pytest.mark.parametrize(
    "path", [paths.Linear(), paths.Trigonometric(), paths.VP()], ids=lambda path: type(path).__name__
)
def test_dpmpp_follows_the_gaussians_flow(path):
    """From the law of ``x_t`` the flow leads to ``mean + deviation z``; 20 steps leave an eighth of 10 steps' error."""
    z, start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 0.8 if isinstance(path, paths.VP) else 0.2
    a, c = path.scales(torch.tensor(start, dtype=torch.float64))
    x = 0.7 * a + (0.36 * a**2 + c**2).sqrt() * z

    def error(solver, steps):
        made = sampling.integrate(Gaussian(path), x, steps, solver, path=path, predict="x0", t_start=start)
        return float((made - (0.7 + 0.6 * z)).abs().max())

    assert error("dpmpp", 20) < error("ddim", 20) / 8
    assert error("dpmpp", 20) < error("dpmpp", 10) / 8
    assert sampling.evaluations(20, "dpmpp") == 20


def test_dpmpp_is_of_second_order():
    """Twice as many steps, equal in ``log(a / c)`` and away from the data's end, leave a quarter of the error."""
    path, z = paths.Trigonometric(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def error(steps):
        # Two steps more than are looked at: the last steps of all are of lower order.
        ratios = [-1.5 + 3.5 * i / steps for i in range(steps + 3)]
        times = [2 / math.pi * math.atan(math.exp(ratio)) for ratio in ratios]
        law = [path.scales(torch.tensor(times[i], dtype=torch.float64)) for i in (0, steps)]
        start, end = (0.7 * a + (0.36 * a**2 + c**2).sqrt() * z for a, c in law)
        rows = [(now, then - now) for now, then in itertools.pairwise(times)]
        made = list(states(Gaussian(path), start, rows, "dpmpp", path=path, predict="x0"))[steps - 1]
        return float((made - end).abs().max())

    assert 3.5 < error(80) / error(160) < 4.7


@pytest.mark.parametrize("steps", [[2], [1, 3]], ids=["SFD", "SFD-v"])
def test_an_update_of_the_trainer_steps_the_optimiser_once_a_step(steps):
    """Digits with labels: each step starts where the student's old weights led, and only the last one has a graph."""
    trainer = trainer_of(LABELLED, {"name": "digits"}, distill={**SFD, "steps": steps})
    assert trainer.description.steps == tuple(steps)
    for number in (steps[0], steps[-1]):
        noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
        nets, seen = [copy.deepcopy(trainer.generator.net)], []
        step = type(trainer.optimiser).step

        def stepped(nets=nets, seen=seen, step=step):
            seen.append([p.grad.clone() for p in trainer.generator.net.parameters()])
            step(trainer.optimiser)
            nets.append(copy.deepcopy(trainer.generator.net))

        trainer.optimiser.step = stepped
        trainer.update()
        del trainer.optimiser.step
        trainer.noise.load_state_dict(noise)
        after, _ = trainer.draws.get_state(), trainer.draws.set_state(draws)
        labels = trainer.labels[torch.randint(len(trainer.labels), (8,), generator=trainer.draws)]
        z = normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8))
        trainer.draws.set_state(after)
        more = {"guidance": float(number)} if len(steps) > 1 else {}
        x, total = z, 0.0
        assert len(seen) == number
        times = [i / number for i in range(number)] + [1.0]
        fine = tuple(itertools.chain.from_iterable(
            grid(paths.Linear(), now, then, 2) for now, then in itertools.pairwise(times)
        ))  # fmt: skip
        made = [*states(trainer.teacher, z, fine, "dpmpp", labels)][1::2]
        for place, (now, then) in enumerate(itertools.pairwise(times)):
            out = nets[place](torch.full((8,), now), x, labels, **more)
            loss = (x + (then - now) * out - made[place]).abs().sum() / 8
            expected = torch.autograd.grad(loss, [*nets[place].parameters()])
            for mine, p in zip(seen[place], expected, strict=True):
                torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-4 * float(p.abs().max()) + 1e-7)
            x, total = (x + (then - now) * out).detach(), total + float(loss.detach())
        assert trainer.meters.read()["regression loss"] == pytest.approx(total / number, rel=1e-4)


GUIDED = {**LABELLED, "guided": True}


def first_stage(folder, network=GUIDED, seed=5, **told):
    """The file of a first stage's student, of 2 and 4 steps."""
    described = teachers.Description(network, "student", **{"steps": (2, 4), "t_start": 0.0, **told})
    teachers.save(folder / "first.safetensors", random_network(network, seed=seed).state_dict(), described)
    return str(folder / "first.safetensors")


def test_a_second_stage_starts_from_the_first_and_learns_its_samples(tmp_path):
    """Digits with labels, one step: the trainer's gradients equal autograd's of the formula."""
    stage = {"steps": 4, "distance": "l1", "first_stage": first_stage(tmp_path)}
    trainer = trainer_of(LABELLED, {"name": "digits"}, distill={**SFD, "steps": [1], "regression": stage})
    first = random_network(GUIDED, seed=5)
    assert trainer.description.network == GUIDED
    assert trainer.description.steps == (1,)
    for name, value in trainer.generator.net.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    noise, draws = copy.deepcopy(trainer.noise.state_dict()), trainer.draws.get_state()
    seen = []
    trainer.optimiser.step = lambda: seen.extend(p.grad.clone() for p in trainer.generator.net.parameters())
    trainer.update()
    trainer.noise.load_state_dict(noise)
    trainer.draws.set_state(draws)
    labels = trainer.labels[torch.randint(len(trainer.labels), (8,), generator=trainer.draws)]
    z = normal(trainer.noise.next_key(), torch.empty(8, 1, 8, 8))
    x = z
    with torch.no_grad():
        for i in range(4):
            x = x + first(torch.full((8,), i / 4), x, labels, guidance=4.0) / 4
    loss = (z + first(torch.zeros(8), z, labels) - x).abs().sum() / 8
    assert trainer.meters.read()["regression loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for mine, p in zip(seen, torch.autograd.grad(loss, [*first.parameters()]), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-4 * float(p.abs().max()) + 1e-7)


def test_what_does_not_go_with_a_first_stage_is_named(tmp_path):
    file = first_stage(tmp_path)
    (tmp_path / "other").mkdir()
    other = first_stage(tmp_path / "other", path="trigonometric")
    (tmp_path / "one").mkdir()
    one = first_stage(tmp_path / "one", LABELLED, steps=())
    many = "must make a number of steps of the first stage (2, 4), on the same times"
    for stage, more, sentence in (
        (
            {},
            {"objective": {"name": "uid"}},
            "distill.regression.first_stage is for distill.objective regression alone",
        ),
        ({"solver": "heun"}, {}, "distill.regression.solver is not for a run with distill.regression.first_stage"),
        ({}, {"guidance": 2.0}, "distill.guidance is not for a run with distill.regression.first_stage"),
        ({"steps": 3}, {}, f"distill.regression.steps 3 in each step of the student {many}"),
        ({}, {"steps": []}, f"distill.regression.steps 4 in each step of the student {many}"),
        ({}, {"t_start": 0.2}, f"distill.regression.steps 4 in each step of the student {many}"),
        (
            {"first_stage": other},
            {},
            f"distill.regression.first_stage {other} has path trigonometric, the teacher has ",
        ),
        ({"first_stage": one}, {}, f"distill.regression.first_stage {one} is a student of one step; it must be"),
        ({"first_stage": "gone.safetensors"}, {}, "distill.regression.first_stage: "),
    ):
        asked = {**SFD, "steps": [1], **more}
        asked["regression"] = {"steps": 4, "distance": "l1", "first_stage": file, **stage}
        with pytest.raises(UserError, match=re.escape(sentence)):
            trainer_of(LABELLED, {"name": "digits"}, distill=asked)


def test_an_sfd_student_trains_by_the_command_and_samples_in_each_of_its_numbers_of_steps(tmp_path, capsys):
    teacher, out = save_teacher(tmp_path / "teacher.safetensors", MLP, POINTS), tmp_path / "run"
    few = [f"distill.teacher={teacher}", *(f"data.{key}={value}" for key, value in POINTS.items())]
    few += ["distill.updates=4", "distill.batch=8"]
    few += ["run.evaluate_samples=20", "run.teacher_steps=0", "run.tensorboard=false", "run.progress=false"]
    words = ["distill", "--preset", "sfd", "--out", str(out)]
    assert cli.main([*words, *(word for setting in few for word in ("--set", setting))]) == 0
    model = rf.load(out)
    assert (model.description.steps, model.description.format) == ((2, 3, 4, 5), 5)
    z = torch.randn(6, 2)
    for steps in (2, 3, 4, 5):
        by_hand = z
        for i in range(steps):
            by_hand = by_hand + model.net(torch.full((6,), i / steps), by_hand, guidance=float(steps)) / steps
        torch.testing.assert_close(model(z, steps=steps), by_hand, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(z), model(z, steps=5))
    with pytest.raises(
        UserError, match="steps must be 2 or 3 or 4 or 5, the numbers that the student was trained for; got 6"
    ):
        model(z, steps=6)
    file = str(out / "student.safetensors")
    made = tmp_path / "samples.npy"
    assert cli.main(["sample", "--model", file, "--count", "5", "--steps", "3", "--out", str(made)]) == 0
    torch.testing.assert_close(torch.from_numpy(np.load(made)), rf.sample(out, 5, steps=3))
    assert cli.main(["sample", "--model", file, "--steps", "7", "--out", str(tmp_path / "x.npy")]) == 2
    assert "--steps must be one of the student's numbers of steps, 2, 3, 4, 5" in capsys.readouterr().err
    judged = ["evaluate", "--student", file, "--samples", "20", "--steps", "1", "--out", str(tmp_path / "table")]
    assert cli.main(judged) == 0
    rows = json.loads((tmp_path / "table" / "evaluation.json").read_text())["rows"]
    assert [row["network_evaluations"] for row in rows if row["name"].startswith("student")] == [2, 3, 4, 5]
    # Its second stage, from the run's folder, makes the samples in one step.
    second = [*few, f"distill.regression.first_stage={out}"]
    words = ["distill", "--preset", "sfd-second", "--out", str(tmp_path / "second")]
    assert cli.main([*words, *(word for setting in second for word in ("--set", setting))]) == 0
    last = rf.load(tmp_path / "second")
    assert (last.description.steps, last.description.network["guided"]) == ((1,), True)
    torch.testing.assert_close(last(z), z + last.net(torch.zeros(6), z), rtol=1e-5, atol=1e-6)


def test_what_takes_no_several_steps_is_named():
    few = {**SFD, "regression": {"steps": 2}}
    for settings, sentence in (
        ({**few, "steps": [3, 2]}, r"distill.steps must be numbers of at least 1 in ascending order, got \[3, 2\]"),
        (
            {**few, "steps": [3], "times": [0.5]},
            "distill.steps must be left out beside times: 1 further times make 2 steps",
        ),
        ({**few, "times": [0.5, 0.4]}, "distill.times must come nearer to the data after t_start = 0"),
        (
            {**few, "steps": [2], "regression": {"solver": "edm"}},
            "distill.regression.solver edm with several steps is not for",
        ),
        ({**SETTINGS, "steps": [2]}, "distill.steps is for the objective regression"),
    ):
        with pytest.raises(UserError, match=sentence):
            trainer_of(MLP, POINTS, distill=settings)
    with pytest.raises(UserError, match=r"run\.mode compiled is not for distill.objective regression"):
        trainer_of(MLP, POINTS, distill={**few, "steps": [2]}, run={"mode": "compiled"})
    with pytest.raises(UserError, match="several steps on a flow need a path from noise alone to data"):
        FewSteps(torch.nn.Identity(), (2,), None, paths.BrownianBridge(), "velocity")
    with pytest.raises(UserError, match=r"need a network that takes their number \(guided: true\)"):
        FewSteps(torch.nn.Identity(), (2, 3), None, paths.Linear(), "velocity")
    told = teachers.Description(MLP, "student", data=data.load(POINTS).config)
    of_one_step = Loaded(teachers.Model(random_network(MLP), told))
    with pytest.raises(UserError, match="steps, solver and guidance are for teachers"):
        of_one_step(torch.randn(2, 2), steps=3)
