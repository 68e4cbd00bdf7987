"""A drawn batch: its losses are those of the tensor calls, to the bit, and what does not fit is refused by name."""

import contextlib

import pytest
import torch

import realuid_fast as rf
from realuid_fast import functional, losses
from realuid_fast.errors import UserError

B, SHAPE = 6, (3, 4, 4)
REALUID, UID = rf.objectives.RealUID(0.92, 0.94), rf.objectives.UID()


@pytest.fixture
def key():
    return rf.NoiseStream(3).next_key()


def samples(rows=B, dtype=torch.float32):
    return torch.randn(rows, *SHAPE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("predict", ["velocity", "x0"])
def test_fake_turn_is_that_of_the_tensor_calls(key, dtype, predict):
    path, x, real = rf.paths.Linear(), samples(dtype=dtype), samples(dtype=dtype)
    draw = path.draw(x, key, real=real, predict=predict)
    assert draw.n_real == B
    assert torch.equal(draw.t[:B], draw.t[B:])
    coef = path.coefficients(draw.t, "velocity", predict)
    both = torch.cat([x, real])
    x_t = rf.interpolate(both, coef, key, noise_rows=B)
    assert torch.equal(draw.x_t, x_t)
    out = torch.randn_like(both).requires_grad_()
    read = x_t if predict == "x0" else None
    expected = functional.fake_grads(
        REALUID, fake_out=out.detach(), x=both, x_t=read, coef=coef, noise=key, n_real=B, noise_rows=B
    )
    loss = losses.fake_loss(REALUID, draw, out)
    loss.backward()
    found = losses.fake_grads(REALUID, draw, out.detach())
    assert torch.equal(loss, expected.loss)
    assert torch.equal(out.grad, expected.fake_out)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("predict", ["velocity", "x0"])
def test_generator_turn_reaches_the_generator(key, predict):
    """The gradient of the drawn loss through x and x_t is that of the tensor calls."""
    path, teacher, fake = rf.paths.Linear(), torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)
    found, expected = (samples().requires_grad_() for _ in range(2))
    expected.data.copy_(found.data)
    t = path.sample_time(B)
    draw = path.draw(found, key, t=t, predict=predict)
    losses.generator_loss(REALUID, draw, teacher(draw.x_t), fake(draw.x_t)).backward()
    coef = path.coefficients(t, "velocity", predict)
    x_t = rf.interpolate(expected, coef, key)
    read = x_t if predict == "x0" else None
    inputs = {"x": expected, "x_t": read, "coef": coef, "noise": key}
    functional.generator_loss(REALUID, teacher_out=teacher(x_t), fake_out=fake(x_t), **inputs).backward()
    assert torch.equal(found.grad, expected.grad)


def test_guidance_and_rows_are_passed_on(key):
    draw = rf.paths.Linear().draw(samples(), key)
    conditional, unconditional, fake = samples(), samples(), samples()
    guided = torch.lerp(unconditional, conditional, 2.0)
    found = losses.generator_loss(
        UID, draw, conditional, fake, teacher_uncond=unconditional, guidance=2.0, reduction="none"
    )
    expected = losses.generator_grads(UID, draw, guided, fake).rows
    # float32 sums of 48 products of order one
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_two_sided_path_takes_an_endpoint_for_either_half(key):
    path, ends, real_ends = rf.paths.BrownianBridge(), samples(), samples()
    draw = path.draw(samples(), key, real=samples(), endpoint=ends, real_endpoint=real_ends)
    assert torch.equal(draw.endpoint, torch.cat([ends, real_ends]))
    losses.fake_loss(rf.objectives.RealBridge(0.92, 0.94), draw, samples(2 * B))


def test_halves_apart_draw_their_own_times_and_noise(key):
    draw = rf.paths.Linear().draw(samples(), key, real=samples(), shared=False)
    assert draw.noise_rows == 2 * B
    assert not torch.equal(draw.t[:B], draw.t[B:])


@pytest.mark.parametrize("given", ["key", "noise"])
def test_the_generated_rows_of_halves_apart_keep_their_noise(key, given):
    path, x, out = rf.paths.Linear(), samples(), samples(2 * B)
    noise = key if given == "key" else samples(2 * B)
    draw = path.draw(x, noise, real=samples(), shared=False)
    rows = losses.matching_loss(draw, out, reduction="none")
    assert torch.equal(losses.matching_loss(draw.generated(), out[:B], reduction="none"), rows[:B])
    losses.generator_loss(UID, draw.generated(), out[:B], samples())


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 4, 4)])
def test_real_rows_take_the_layout_of_the_generated_ones(key, layout, sizes):
    last = torch.channels_last if len(sizes) == 2 else torch.channels_last_3d
    formats = [last, torch.contiguous_format] if layout == "channels_last" else [torch.contiguous_format, last]
    x, real = (torch.randn(B, 3, *sizes).contiguous(memory_format=each) for each in formats)
    draw = rf.paths.Linear().draw(x, key, real=real)
    assert draw.x.is_contiguous(memory_format=formats[0])
    assert torch.equal(draw.x, torch.cat((x, real)))
    losses.fake_loss(REALUID, draw, torch.randn_like(draw.x_t))


@pytest.mark.parametrize(("dtype", "of_t"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float64)])
def test_times_of_another_type_are_converted(key, dtype, of_t):
    x, t = samples(dtype=dtype), torch.linspace(0, 1, B, dtype=of_t)
    draw = rf.paths.Linear().draw(x, key, t=t)
    assert torch.equal(draw.x_t, rf.paths.Linear().draw(x, key, t=t.float()).x_t)


OF_X0 = [rf.objectives.SDS(), rf.objectives.DMD(), rf.objectives.SiD(), rf.objectives.RealSiD(0.9, 0.95)]


@pytest.mark.parametrize("objective", OF_X0, ids=lambda each: each.name)
@pytest.mark.parametrize("match", ["velocity", "noise"])
def test_an_objective_of_x0_space_refuses_another(key, objective, match):
    path, outs = rf.paths.Linear(), [samples() for _ in range(1 + objective.needs_fake)]
    for call in (losses.generator_loss, losses.generator_grads):
        with pytest.raises(UserError, match=f'match must be x0 for {objective.name}, not {match}.* match="x0"'):
            call(objective, path.draw(samples(), key, match=match), *outs)
        call(objective, path.draw(samples(), key, match="x0"), *outs)


@pytest.mark.parametrize(
    ("path", "match", "predict"), [(rf.paths.Linear(), "noise", "noise"), (rf.paths.VE(), "velocity", "edm")]
)
def test_a_gradient_through_the_target_alone_needs_a_target_with_the_sample(key, path, match, predict):
    """There the gradient of Diff-Instruct and of moment matching would be 0; elsewhere it has x0's direction."""
    for objective in (rf.objectives.DiffInstruct(), rf.objectives.MomentMatching()):
        with pytest.raises(UserError, match=rf"match must not be {match} for .* on the path {type(path).__name__}"):
            losses.generator_loss(
                objective, path.draw(samples(), key, match=match, predict=predict), samples(), samples()
            )
        draws = (rf.paths.Linear().draw(samples(), key, match=each) for each in ("velocity", "x0"))
        outs = samples(), samples()
        one, other = (losses.generator_grads(objective, draw, *outs).x.flatten(1) for draw in draws)
        torch.testing.assert_close(torch.cosine_similarity(one, other), torch.ones(B))


def test_a_teacher_is_trained_on_a_draw(key):
    draw, out = rf.paths.Linear().draw(samples(), key), samples().requires_grad_()
    loss = losses.matching_loss(draw, out)
    loss.backward()
    grads = losses.matching_grads(draw, out.detach())
    assert torch.equal(loss, grads.loss)
    assert torch.equal(out.grad, grads.out)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("predict", ["velocity", "x0"])
def test_the_matching_loss_of_real_rows_has_the_noise_that_they_were_drawn_with(key, predict, backend):
    """The transcription has one noise for generated row ``i`` and real row ``i``, as :meth:`Path.draw` says."""
    path, x, real = rf.paths.Linear(), samples(dtype=torch.float64), samples(dtype=torch.float64)
    with rf.backend(backend) if backend else contextlib.nullcontext():
        draw = path.draw(x, key, real=real, predict=predict, t=torch.linspace(0.1, 0.9, B, dtype=torch.float64))
        out = torch.randn_like(draw.x).requires_grad_()
        t, n, both = draw.t.view(-1, 1, 1, 1), rf.noise.normal(key, x).repeat(2, 1, 1, 1), torch.cat((x, real))
        velocity = out if predict == "velocity" else (out - draw.x_t) / (1 - t)
        expected = (velocity - (both - n)).square().sum((1, 2, 3))
        expected.mean().backward()
        loss = losses.matching_loss(draw, out)
        grads = losses.matching_grads(draw, out.detach())
        rows = losses.matching_loss(draw, out.detach(), reduction="none")
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-10, atol=0)
    for found in (rows, grads.rows):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=0)
    (mine,) = torch.autograd.grad(loss, out)
    for found in (mine, grads.out):
        torch.testing.assert_close(found, out.grad, rtol=1e-10, atol=1e-12)


def test_a_preconditioned_network_is_called_as_its_path_says(key):
    path = rf.paths.VE()
    draw = path.draw(samples(), key, match="x0", predict="edm")
    assert torch.equal(draw.network_time, path.network_time(draw.t, "edm"))
    assert torch.equal(draw.network_input, path.network_input(draw.x_t, draw.t, "edm"))
    assert draw.read_x_t is draw.x_t


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"real": samples(3)}, "real must have x's shape"),
        ({"real": samples(dtype=torch.float64)}, "real must have x's shape and dtype"),
        ({"endpoint": samples()}, "endpoint must not be given for the path Linear"),
        ({"t": torch.rand(2)}, r"t must be a tensor of shape \(6,\)"),
        ({"t": 0.5}, r"t must be a tensor of shape \(6,\)"),
        ({"noise": samples(2)}, "noise must be a key or have 6 rows"),
        ({"noise": 0}, "noise must be a key from NoiseStream.next_key.. or a tensor of noise like x, not int"),
        ({"noise": None}, "noise must be a key from NoiseStream.next_key.. or a tensor of noise like x, not NoneType"),
        ({"real": samples().to("meta")}, "real must be on x's device cpu, not meta"),
        ({"t": torch.rand(B, requires_grad=True)}, r"path\.draw gives no gradient in t: pass t\.detach\(\)"),
        ({"weight": lambda t: t * torch.ones((), requires_grad=True)}, "weight and the path's functions must return"),
        ({"x": [1.0]}, "x must be a torch.Tensor"),
        ({"match": "speed"}, "match"),
    ],
)
def test_what_does_not_fit_is_named(key, wrong, sentence):
    given = {"x": samples(), "noise": key} | wrong
    with pytest.raises(UserError, match=sentence):
        rf.paths.Linear().draw(given.pop("x"), given.pop("noise"), **given)


def test_a_bridge_without_its_endpoint_is_named(key):
    with pytest.raises(UserError, match="endpoint must be given for the path BrownianBridge"):
        rf.paths.BrownianBridge().draw(samples(), key)


def test_losses_refuse_what_is_no_draw_of_their_turn(key):
    path, out = rf.paths.Linear(), samples()
    with pytest.raises(UserError, match="draw must be an Interpolant"):
        losses.matching_loss(out, out)
    with pytest.raises(UserError, match="draw must hold no real rows"):
        losses.generator_loss(REALUID, path.draw(samples(), key, real=samples()), samples(2 * B), samples(2 * B))
    with pytest.raises(UserError, match="fake_out must not be given for SDS: it has no fake model"):
        losses.generator_loss(rf.objectives.SDS(), path.draw(samples(), key, match="x0"), out, out)
    with pytest.raises(UserError, match="gives no gradient in x"):
        losses.fake_loss(UID, path.draw(samples().requires_grad_(), key), out)
