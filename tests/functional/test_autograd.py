"""The fused calls in autograd and torch.compile: which gradients there are, and how they are handed on."""

import pytest
import torch

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.networks import UNet
from realuid_fast.settings import ObjectiveConfig

from .calls import BACKENDS, GENERAL, KEY, LAYOUTS, PATH, REAL, UID, batch, calls, zero_k_x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_twice_gives_the_right_gradients(backend, dtype):
    b = batch((3, 4, 5), dtype)
    inputs = [v.requires_grad_() for v in (b.teacher, b.fake, b.x)]
    with rf.backend(backend):
        teacher, fake, x = inputs
        loss = rf.functional.generator_loss(
            REAL, teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=zero_k_x(b.coef), noise=KEY
        )
        third = torch.autograd.grad(loss, inputs, torch.tensor(3.0), retain_graph=True)
        third = [g.clone() for g in third]
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs)
    for tripled, one, two in zip(third, once, again, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        torch.testing.assert_close(tripled, 3 * one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradient_scales_every_row(backend):
    b = batch((4, 5), torch.float32)
    fake = b.fake.clone().requires_grad_()
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5])
    with rf.backend(backend):
        rows = rf.functional.fake_loss(UID, fake_out=fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY, reduction="none")
        (found,) = torch.autograd.grad(rows, fake, weights)
        expected = (
            rf.functional.fake_grads(UID, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY).fake_out
            * 4
            * weights[:, None]
        )
    torch.testing.assert_close(found, expected)


def test_only_wanted_gradients_exist_and_others_are_refused():
    b = batch((4, 5), torch.float32)
    x = b.x.clone().requires_grad_()
    rf.functional.generator_loss(
        UID, teacher_out=b.teacher, fake_out=b.fake, x=x, x_t=b.x_t, coef=b.coef, noise=KEY
    ).backward()
    assert x.grad is not None
    with pytest.raises(rf.errors.UserError, match=r"fake_loss gives no gradient in x: pass x.detach\(\)"):
        rf.functional.fake_loss(UID, fake_out=b.fake, x=x, x_t=b.x_t, coef=b.coef, noise=KEY)
    with pytest.raises(rf.errors.UserError, match="no gradient in coef"):
        rf.interpolate(b.x, b.coef.clone().requires_grad_(), KEY)
    with pytest.raises(rf.errors.UserError, match="no gradient in noise"):
        rf.interpolate(b.x, b.coef, b.noise.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="generator_loss has no second derivative"):
        torch.autograd.grad(
            rf.functional.generator_loss(
                UID, teacher_out=b.teacher, fake_out=b.fake, x=x, x_t=b.x_t, coef=b.coef, noise=KEY
            ),
            x,
            create_graph=True,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_forms_record_nothing(backend, dtype):
    b = batch((4, 5), dtype)
    for tensor in (b.teacher, b.fake, b.x, b.x_t, b.endpoint, b.uncond):
        tensor.requires_grad_()
    with rf.backend(backend):
        found = calls(b, KEY, 2, 2)
    assert found.pop("x_t").requires_grad
    for name, value in found.items():
        assert not value.requires_grad, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_opcheck(backend, layout):
    namespace = torch.ops.realuid_fast if backend == "cpp" else torch.ops.realuid_fast_reference
    b = batch((4, 3, 4, 2), torch.float32, layout)
    grad = [v.clone().requires_grad_() for v in (b.teacher, b.fake, b.x, b.x_t)]
    scalars = GENERAL.generator_scalars
    halves = (*GENERAL.generated, *GENERAL.real)
    cases = [
        (namespace.normal_like, (KEY, b.x, 4)),
        (namespace.interpolate, (grad[2], b.coef, KEY, grad[3], 2)),
        (namespace.interpolate_grads, (b.x, b.coef, True, False)),
        (namespace.mean_abs_error, (b.teacher, b.x, b.x_t, b.coef, None, None)),
        (namespace.mean_abs_error, (b.teacher, b.x, b.x_t, b.coef, b.uncond, b.guidance)),
        (namespace.fake, (b.fake, b.x, b.x_t, b.coef, KEY, b.teacher, None, b.uncond, b.guidance, 2, 2, *halves,
                                 True, True)),
        (namespace.generator, (b.teacher, b.fake, b.x, b.x_t, b.coef, KEY, None, b.uncond, b.guidance, None,
                                      *scalars, False, True, False, True, False, True)),
        (namespace.generator, (b.teacher, b.fake, b.x, b.x_t, b.coef, KEY, None, None, None, b.guidance,
                                      *scalars, True, True, True, True, True, False)),
        (namespace.fake_loss, (grad[1], b.x, b.x_t, b.coef, KEY, b.teacher, None, b.uncond, b.guidance, 2, 2,
                                      *halves, True)),
        (namespace.generator_loss, (*grad, b.coef, KEY, b.endpoint, b.uncond.clone().requires_grad_(),
                                           b.guidance, b.guidance.flip(0), *scalars, True)),
        (namespace.matching, (b.fake, b.x, b.x_t, b.coef, b.noise, None, 4, True, True)),
        (namespace.fake, (b.fake, b.x, b.x_t, b.coef, KEY, b.teacher, None, None, None, 2, 2, *halves, True, True)),
        (namespace.generator, (b.teacher, b.fake, b.x, None, zero_k_x(b.coef), KEY, *[None] * 4, *scalars, False,
                               False, False, True, False, False)),
        (namespace.matching_loss, (grad[1], b.x, b.x_t, b.coef, b.noise, None, 4, True)),
        (namespace.fake_loss, (grad[1], b.x, b.x_t, b.coef, KEY, b.teacher, None, None, None, 2, 2, *halves, True)),
        (namespace.generator_loss, (*grad, b.coef, KEY, b.endpoint, None, None, None, *scalars, True)),
        (namespace.generator_loss, (b.teacher, b.fake, grad[2], None, zero_k_x(b.coef), KEY, *[None] * 4, *scalars,
                                    False)),
        (namespace.scale_grads_, ([b.x.clone(), b.x_t.clone()], torch.tensor(2.0))),
    ]  # fmt: skip
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments)


def test_compiles_without_graph_breaks():
    b = batch((4, 3, 5), torch.float32)
    leaves = [v.clone().requires_grad_() for v in (b.teacher, b.fake, b.x)]
    coef = PATH.coefficients(torch.linspace(0.1, 0.9, 4))

    def loss(teacher, fake, x):
        x_t = rf.interpolate(x, coef, KEY)
        return rf.functional.generator_loss(
            REAL, teacher_out=teacher * x_t, fake_out=fake + x_t, x=x, x_t=x_t, coef=coef, noise=KEY
        ) + rf.functional.matching_loss(out=fake * 2, x=x.detach(), x_t=None, coef=coef, noise=KEY)

    expected = loss(*leaves)
    found = torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(2 * found, leaves), torch.autograd.grad(2 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("preset", rf.objectives.PRESETS)
def test_an_objective_compiles_at_its_first_use(preset):
    """The traced call is the first thing that anyone does with the objective: nothing was computed before."""
    b, own = batch((4, 6), torch.float32), {"gamma": 0.85, "kappa": 0.94} if preset == "general" else {}
    objective = ObjectiveConfig(preset, **own).build()

    def turn(fake, teacher):
        loss = rf.functional.generator_loss(
            objective, teacher_out=teacher, fake_out=fake if objective.needs_fake else None, x=b.x, x_t=b.x_t,
            coef=b.coef, noise=KEY,
        )  # fmt: skip
        if objective.needs_fake:
            n_real = 2 if objective.needs_real else 0
            loss = loss + rf.functional.fake_loss(
                objective, fake_out=fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY, n_real=n_real, teacher_out=teacher
            )
        return loss

    torch._dynamo.reset()
    found = torch.compile(turn, fullgraph=True, backend="eager")(b.fake, b.teacher)
    torch.testing.assert_close(found, turn(b.fake, b.teacher))


def forward_mode_calls():
    b = batch((4, 6), torch.float32)
    images = torch.randn(8, 32, 8, 8).to(memory_format=torch.channels_last)
    net = UNet((3, 8, 8), 32)
    ops, weight, bias = torch.ops.realuid_fast, torch.randn(32, 32, 3, 3), torch.randn(32)
    found = {
        "interpolate": (b.x, lambda v: rf.interpolate(v, b.coef, KEY)),
        "interpolate of an endpoint": (b.x, lambda v: rf.interpolate(b.x, b.coef, KEY, v)),
        "matching_loss": (
            b.fake,
            lambda v: rf.functional.matching_loss(out=v, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY),
        ),
        "fake_loss": (
            b.fake,
            lambda v: rf.functional.fake_loss(UID, fake_out=v, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY),
        ),
        "generator_loss": (
            b.x,
            lambda v: rf.functional.generator_loss(
                UID, teacher_out=b.teacher, fake_out=b.fake, x=v, x_t=b.x_t, coef=b.coef, noise=KEY
            ),
        ),
        "guided_generator_loss": (
            b.uncond,
            lambda v: rf.functional.generator_loss(
                UID,
                teacher_out=b.teacher,
                fake_out=b.fake,
                x=b.x,
                x_t=b.x_t,
                coef=b.coef,
                noise=KEY,
                teacher_uncond=v,
                guidance=2.0,
            ),
        ),
        "conv3x3": (images, lambda v: ops.conv3x3(v, weight, bias)),
        "conv3x3 in its filters": (weight, lambda v: ops.conv3x3(images, v, bias)),
        "norm_silu": (images, lambda v: ops.norm_silu(v, None, bias, bias, 8, 1e-5)[0]),
    }
    if "cpp" in BACKENDS:
        # Without the extension its layers are torch's own, which have forward-mode derivatives.
        pictures, t = images[:, :3].contiguous(memory_format=torch.channels_last), torch.linspace(0, 1, 8)
        found["UNet"] = (pictures, lambda v: net(t, v))
    return found


@pytest.mark.parametrize("name", forward_mode_calls())
def test_forward_mode_is_refused_and_not_answered_with_zeros(name):
    leaf, call = forward_mode_calls()[name]
    tangent, one = torch.ones_like(leaf), torch.ones(())
    refused = pytest.raises(UserError, match="has no forward-mode derivative")
    for wants_gradient in (False, True):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaf.clone().requires_grad_(wants_gradient), tangent)
            with refused:
                call(dual)
    with refused:
        torch.func.jvp(call, (leaf,), (tangent,))
    with refused:
        torch.func.jacfwd(lambda scale: call(scale * leaf))(one)
    # The tangent belongs to the outer of two transforms.
    with refused:
        torch.func.jvp(lambda v: torch.func.jvp(lambda s: call(v).sum() * s, (one,), (one,))[0], (leaf,), (tangent,))
    # A tangent that does not reach the call is no reason to refuse it.
    _, found = torch.func.jvp(lambda s: call(leaf).sum() * 0 + 3 * s, (one,), (one,))
    assert found == 3


class Seen(torch.overrides.TorchFunctionMode):
    """The torch functions that a block calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_is_its_operator_with_and_without_the_dispatcher(backend):
    b = batch((5, 7), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (b.teacher, b.fake, b.x)]

    def whole():
        teacher, fake, x = leaves
        loss = rf.functional.generator_loss(
            REAL, teacher_out=teacher, fake_out=fake, x=x, x_t=b.x_t, coef=b.coef, noise=KEY
        )
        return loss, *torch.autograd.grad(3 * loss, leaves)

    with rf.backend(backend):
        expected = whole()
        # A mode asks to see every call, and has to see the operator.
        with Seen() as seen:
            found = whole()
    assert any(name.endswith(".generator_loss") for name in seen.names)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_runs_the_loss_in_float32():
    b = batch((4, 6), torch.float32)
    expected = rf.functional.generator_loss(
        REAL,
        teacher_out=b.teacher.bfloat16().float(),
        fake_out=b.fake.bfloat16().float(),
        x=b.x,
        x_t=b.x_t,
        coef=b.coef,
        noise=KEY,
    )
    with torch.autocast("cpu", torch.bfloat16):
        fake = b.fake.bfloat16().requires_grad_()
        found = rf.functional.generator_loss(
            REAL, teacher_out=b.teacher.bfloat16(), fake_out=fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY
        )
        found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert fake.grad.dtype == torch.bfloat16
