"""Calls under autocast, torch.func and another default dtype: torch's own modes around them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.models.generator import Generator

X, OUT, OUT2 = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.3, 0.5, 0.8])
KEY = rf.NoiseStream(0).next_key()
PATH, UID = rf.paths.Linear(), rf.objectives.UID()
DRAW = PATH.draw(X, KEY, t=T)

# The argument that is wrong, and the call with it in bfloat16.
MIXED = {
    "teacher_out": lambda: rf.generator_grads(UID, DRAW, OUT.bfloat16(), OUT2),
    "fake_out": lambda: rf.fake_grads(UID, DRAW, OUT.bfloat16()),
    "out": lambda: rf.matching_grads(DRAW, OUT.bfloat16()),
    "noise": lambda: rf.interpolate(X, DRAW.coef, X.bfloat16()),
    "endpoint": lambda: rf.paths.BrownianBridge().draw(X, KEY, endpoint=OUT.bfloat16(), t=T),
}


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("name", MIXED)
def test_a_call_that_autocast_does_not_cast_names_the_argument_of_another_dtype(name, backend, monkeypatch):
    monkeypatch.setattr(rf.ops.backends, "_chosen", backend)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=rf"^{name} must have x's dtype"):
        MIXED[name]()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_times_are_float32_whatever_the_default_dtype(dtype, monkeypatch):
    samplers = [*rf.paths.samplers.SAMPLERS, rf.paths.samplers.Discrete((0.1, 0.2)), rf.paths.samplers.Beta(2.0, 3.0)]
    for sampler in samplers:
        for path in (rf.paths.VP(sampler=sampler), rf.paths.DiscreteVP(sampler=sampler)):
            expected = path.sample_time(50, torch.Generator().manual_seed(1))
            torch.set_default_dtype(dtype)
            try:
                found = path.sample_time(50, torch.Generator().manual_seed(1))
                draw = path.draw(X, KEY)
            finally:
                torch.set_default_dtype(torch.float32)
            assert found.dtype == draw.coef.dtype == torch.float32
            assert torch.equal(found, expected)


def test_a_gradient_inside_torch_func_is_refused_in_a_sentence():
    def loss(out):
        return rf.generator_loss(UID, DRAW, out, OUT2)

    for transform in (torch.func.grad(loss), torch.func.jacrev(loss)):
        with pytest.raises(UserError, match=r"generator_loss cannot be differentiated inside torch\.func"):
            transform(OUT)
    with pytest.raises(UserError, match=r"interpolate cannot be differentiated inside torch\.func"):
        torch.func.grad(lambda x: PATH.draw(x, KEY, t=T).x_t.sum())(X)


def test_a_draw_works_inside_vmap():
    times = torch.stack((T, T.flip(0)))
    found = torch.func.vmap(lambda t: PATH.coefficients(t))(times)
    torch.testing.assert_close(found, torch.stack([PATH.coefficients(t) for t in times]))
    draws = torch.func.vmap(lambda x, t: PATH.draw(x, OUT, t=t).x_t)(torch.stack((X, OUT2)), times)
    for x, t, x_t in zip((X, OUT2), times, draws, strict=True):
        torch.testing.assert_close(x_t, PATH.draw(x, OUT, t=t).x_t)


class Turn(torch.nn.Module):
    """The interpolant, and the losses of generated and of real rows."""

    def forward(self, x, real, t, out):
        draw = PATH.draw(x, KEY, t=t, real=real)
        fake = rf.fake_loss(rf.objectives.RealUID(0.9, 0.8), draw, torch.cat((out, out)), teacher_out=draw.x)
        generated = draw.generated()
        return draw.x_t, fake, rf.matching_loss(generated, out), rf.generator_loss(UID, generated, out, x)


def arguments(rows):
    draws = torch.Generator().manual_seed(rows)
    x, real, out = torch.randn(3, rows, 6, generator=draws)
    return x, real, torch.linspace(0.1, 0.9, rows), out


def test_one_compiled_program_takes_any_number_of_rows():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(Turn(), backend=counter, fullgraph=True, dynamic=True)
    for rows in range(2, 8):
        torch.testing.assert_close(compiled(*arguments(rows)), Turn()(*arguments(rows)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_any_number_of_rows(strict):
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    exported = torch.export.export(Turn(), arguments(4), dynamic_shapes=(rows,) * 4, strict=strict).module()
    torch.testing.assert_close(exported(*arguments(7)), Turn()(*arguments(7)))


def test_an_exported_generator_takes_any_number_of_rows():
    made = Generator(rf.load("mnist").net, 0.3, times=(0.6,))
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    z = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(made, (z[:3],), dynamic_shapes=(rows,)).module()
        torch.testing.assert_close(exported(z), made(z))
