"""Random calls of the fused operators and functions: each gives what float64 gives, or refuses by name."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import realuid_fast as rf
from realuid_fast.errors import UserError

from .random_calls import (
    FUSED,
    Batch,
    assert_agrees,
    check_list_op,
    check_operator,
    check_spoiled,
    fused_arguments,
    fuzzed,
    needs_extension,
    outputs,
    reference,
    silence,
    spoil,
    widened_all,
)


@needs_extension
@pytest.mark.parametrize("op", FUSED)
@fuzzed
@given(st.data())
def test_fused_operator(op, data):
    arguments = fused_arguments(op, Batch(data.draw, public=False))
    check_operator(op, arguments, data.draw, functools.partial(fake_terms, op))


def fake_terms(op, arguments):
    """What a fake loss is made of where its square is completed, ``e^2 / A - (B tgt + D f*)^2 / A + C tgt^2``.

    The first two cancel where ``f`` is small. No objective has a ``C`` that is small beside them.
    """
    if "n_real" not in arguments:
        return None
    wide = widened_all(arguments)
    teacher = wide["fake_out"] * 0 if wide["teacher_out"] is None else wide["teacher_out"]
    if wide["guidance"] is not None:
        guidance = wide["guidance"].view(-1, *[1] * (teacher.dim() - 1))
        teacher = wide["teacher_uncond"] + guidance * (teacher - wide["teacher_uncond"])
    for half in ("gen", "real"):
        a, b, d = (wide[f"{name}_{half}"] for name in "abd")
        by_a = 2 / abs(a) if a and max(abs(b), abs(d)) <= 16 * abs(a) else 0.0
        wide |= {f"a_{half}": by_a * d**2, f"b_{half}": 0.0, f"d_{half}": 0.0, f"c_{half}": by_a * b**2}
    wide |= dict.fromkeys(("teacher_out", "teacher_uncond", "guidance"))
    wide |= {"fake_out": teacher, "mean": True, "want_fake": False}
    rows = reference.fake(**wide)[1].nan_to_num(0.0, 0.0, 0.0).abs().sum().item()
    # The mean's own factor is at most 1.
    return {0: rows} if op.endswith("loss") else {0: rows, 1: rows}


@needs_extension
@fuzzed
@given(st.data())
def test_scale_grads(data):
    batches = [Batch(data.draw, public=False) for _ in range(data.draw(st.integers(1, 3)))]
    scale = torch.randn((), generator=batches[0].generator)
    grads = [batch.tensor() for batch in batches]
    if len(batches) == 1 and data.draw(st.booleans()):
        scale = torch.randn(batches[0].rows, generator=batches[0].generator)
        if data.draw(st.booleans()):
            grads *= 2  # the same tensor twice is scaled twice
    if any(grad.dtype == torch.float64 for grad in grads):
        scale = scale.double()
    arguments = {"grads": grads, "scale": scale}
    check_list_op("scale_grads_", ("grads",), arguments, data.draw)


OBJECTIVES = (
    rf.objectives.UID(),
    rf.objectives.RealUID(0.92, 0.94),
    rf.objectives.GeneralRealUID(0.92, 0.94, 0.9),
    rf.objectives.SiD(),
    rf.objectives.DMD(),
)
CALLS = (
    "interpolate",
    "matching_loss",
    "matching_grads",
    "fake_loss",
    "fake_grads",
    "generator_loss",
    "generator_grads",
)
# What each loss is differentiable in.
INPUTS = {
    "interpolate": ("x", "endpoint"),
    "matching_loss": ("out",),
    "fake_loss": ("fake_out",),
    "generator_loss": ("teacher_out", "fake_out", "x", "x_t", "teacher_uncond"),
}


def public_arguments(call, batch):
    objective = batch.pick.choice(OBJECTIVES)
    arguments = {"x": batch.tensor(), "x_t": batch.tensor() if batch.chance(2) else None}
    rows = batch.rows
    if batch.chance(2):
        arguments["endpoint"] = batch.tensor()
    if call == "interpolate":
        del arguments["x_t"]
    noise_rows = rows
    if call.startswith(("fake", "interpolate")) and rows and batch.chance(2):
        arguments["noise_rows"] = noise_rows = batch.pick.randint(1, rows)
    if call.startswith("matching"):
        arguments["out"] = batch.tensor()
    if call.startswith(("fake", "generator")):
        arguments["fake_out"], arguments["objective"] = batch.tensor(), objective
        if call.startswith("generator") or objective.needs_teacher or batch.chance(2):
            arguments["teacher_out"] = batch.tensor()
    of_teacher = call.startswith("generator") or (call.startswith("fake") and objective.needs_teacher)
    if of_teacher and batch.chance(2):
        arguments["teacher_uncond"] = batch.tensor()
        of_rows = 1 + torch.rand(rows, generator=batch.generator).to(batch.real)
        arguments["guidance"] = of_rows if batch.chance(2) else 1 + batch.pick.random()
    if call.startswith("fake"):
        arguments["n_real"] = batch.pick.randint(1, rows - 1) if objective.needs_real and rows > 1 else 0
    if call.endswith("loss"):
        arguments["reduction"] = batch.pick.choice(("mean", "none"))
    zero = [*([] if arguments.get("x_t") is not None else [7]), *([] if "endpoint" in arguments else [1, 4])]
    arguments["coef"], arguments["noise"] = batch.coef(zero), batch.noise(noise_rows)
    return arguments


def gradients(call, arguments, wanted):
    """The call's results and the gradients of their sum in the arguments ``wanted``, zeros where there are none."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    results = [t for t in outputs(getattr(rf.functional, call)(**{**arguments, **leaves})) if t is not None]
    if not wanted or not results[0].requires_grad:
        return results
    grads = torch.autograd.grad(results[0].sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [results[0].detach(), *grads]


def evaluate_public(call, wanted):
    def evaluate(wide):
        with rf.backend("torch"):
            return gradients(call, wide, wanted)

    return evaluate


OF_TEACHER = ("teacher_out", "teacher_uncond", "guidance")


@pytest.mark.parametrize("call", CALLS)
@fuzzed
@given(st.data())
def test_public_call(call, data):
    draw, batch = data.draw, Batch(data.draw, public=True)
    arguments = public_arguments(call, batch)
    objective = arguments.get("objective")
    if call.startswith("fake") and objective.needs_real and batch.rows == 1:
        return
    wanted = [n for n in INPUTS.get(call, ()) if arguments.get(n) is not None and batch.chance(2)]
    flat = {name: value for name, value in arguments.items() if value is not None or name == "x_t"}
    assert_agrees(gradients(call, arguments, wanted), evaluate_public(call, wanted), flat)
    with silence():
        spoilt = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        spoilt |= {name: arguments[name] for name in ("noise_rows", "n_real") if name in arguments}
        if call.startswith("fake") and not objective.needs_teacher:
            # Not looked at then.
            spoilt = {name: value for name, value in spoilt.items() if name not in OF_TEACHER}
        what = spoil(draw, spoilt, leave_out=("missing",))
        if what is None:
            return
        arguments |= spoilt

        def run():
            return [t for t in outputs(getattr(rf.functional, call)(**arguments)) if t is not None]

        check_spoiled(run, evaluate_public(call, []), arguments, what, [*arguments, "a fused call"])


@pytest.mark.parametrize("call", sorted(INPUTS))
@fuzzed
@given(st.data())
def test_public_call_refuses_gradients_it_does_not_give(call, data):
    batch = Batch(data.draw, public=True)
    arguments = public_arguments(call, batch)
    if arguments.get("n_real") == 0 and arguments["objective"].needs_real:
        return
    floats = [n for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for name in floats:
        if name in INPUTS[call] or (name == "teacher_out" and call == "fake_loss"):
            continue
        with pytest.raises(UserError, match=rf"no gradient in {name}"):
            getattr(rf.functional, call)(**{**arguments, name: arguments[name].detach().requires_grad_()})
