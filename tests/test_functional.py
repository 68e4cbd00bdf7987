"""The fused calls: gradients, agreement of the backends with float64, autograd's corners, torch.compile, bad input."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import realuid_fast as rf
from realuid_fast.errors import UserError
from realuid_fast.networks import UNet
from realuid_fast.paths import MATCH_SPACES

PATH = rf.paths.Linear()
UID, REAL = rf.objectives.UID(), rf.objectives.RealUID(0.92, 0.94)
GENERAL = rf.objectives.GeneralRealUID(0.9, 0.93, 0.85, kappa=0.93)
KEY = torch.tensor([2**35 + 17, 5])
BACKENDS = [row.name for row in rf.backends.report() if row.name in ("torch", "cpp") and row.why_not is None]
# Relative L2 error of a whole gradient: storage rounding 2^-24, 2^-8, 2^-11 half a unit, with room for a few roundings
# in the arithmetic and, for float32, the stream's 1e-6 against the float64 normals.
GRADIENT_BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LAYOUTS = {
    "contiguous": lambda v: v.contiguous(),
    "channels_last": lambda v: v.to(memory_format=torch.channels_last if v.dim() == 4 else torch.channels_last_3d),
}


@dataclasses.dataclass
class Batch:
    """Everything the four calls take, in one dtype and layout."""

    teacher: torch.Tensor
    fake: torch.Tensor
    x: torch.Tensor
    x_t: torch.Tensor
    endpoint: torch.Tensor
    noise: torch.Tensor
    uncond: torch.Tensor
    coef: torch.Tensor
    guidance: torch.Tensor

    def to(self, dtype):
        storage = {field.name: getattr(self, field.name).to(dtype) for field in dataclasses.fields(self)}
        wide = {
            name: getattr(self, name).to(torch.promote_types(dtype, torch.float32)) for name in ("coef", "guidance")
        }
        return Batch(**storage | wide)


def batch(shape, dtype=torch.float64, layout="contiguous", seed=0, two_sided=False):
    generator = torch.Generator().manual_seed(seed)
    tensors = [LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype)) for _ in range(7)]
    # Arbitrary coefficients: the calls know rows of nine numbers, not paths.
    coef = torch.randn(shape[0], 9, generator=generator)
    coef[:, 8] = coef[:, 8].abs() + 0.1
    coef[::3, 7] = 0  # rows that do not read x_t
    if not two_sided:
        coef[:, [1, 4]] = 0
    guidance = 1 + torch.rand(shape[0], generator=generator)
    return Batch(*tensors, *(t.to(torch.promote_types(dtype, torch.float32)) for t in (coef, guidance)))


def calls(b, noise, n_real, noise_rows):
    """Every call's outputs by name, through the explicit forms."""
    out = {"x_t": rf.interpolate(b.x, b.coef, noise, b.endpoint, noise_rows)}
    own = noise if not noise.is_floating_point() or len(noise) == len(b.x) else b.noise
    for name, value in (
        rf.functional.matching_grads(out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=own, endpoint=b.endpoint)
        ._asdict()
        .items()
    ):
        out[f"matching.{name}"] = value
    fake = rf.functional.fake_grads(
        GENERAL,
        fake_out=b.fake,
        x=b.x,
        x_t=b.x_t,
        coef=b.coef,
        noise=noise,
        n_real=n_real,
        teacher_out=b.teacher,
        endpoint=b.endpoint,
        noise_rows=noise_rows,
    )
    for name, value in fake._asdict().items():
        out[f"fake.{name}"] = value
    inputs = {"teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": own}
    inputs["endpoint"] = b.endpoint
    for name, value in rf.functional.generator_grads(GENERAL, **inputs)._asdict().items():
        out[f"generator.{name}"] = value
    guided = {"teacher_uncond": b.uncond, "guidance": b.guidance}
    fake = rf.functional.fake_grads(
        GENERAL, **inputs | {"noise": noise}, n_real=n_real, noise_rows=noise_rows, **guided
    )
    out |= {f"guided_fake.{name}": value for name, value in fake._asdict().items()}
    out |= {
        f"guided_generator.{k}": v
        for k, v in rf.functional.generator_grads(GENERAL, **inputs, **guided)._asdict().items()
    }
    # The weight of a sample in x0 space, through the same guidance.
    scaled = rf.functional.generator_grads(rf.objectives.DMD(), **inputs, **guided)
    out["scaled.x"] = scaled.x
    normalised = rf.objectives.NormalisedRealUID(0.92, 0.94)
    out |= {f"normalised.{k}": v for k, v in rf.functional.generator_grads(normalised, **inputs)._asdict().items()}
    return {name: value for name, value in out.items() if value is not None}


def condition(b):
    """How much a guided teacher's rounding grows in its difference to the fake model; a single teacher has none."""
    scale = b.guidance.double().view(-1, *[1] * (b.x.dim() - 1))
    u, pull = b.uncond.double(), scale * (b.teacher.double() - b.uncond.double())
    return max(1.0, float((u.abs() + pull.abs()).norm() / (u + pull - b.fake.double()).norm()))


def normalised_terms(b):
    """The size of what the normalised distance's gradients are made of, ``2 w k_out r / ||D||`` with ``r = f* - tgt``.

    All of it along ``D`` cancels, which for a single element is everything, however small ``D`` is beside ``r``.
    """
    b = b.to(torch.float64)
    p, q, s, k_out, k_x, w = (b.coef[:, i].view(-1, *[1] * (b.x.dim() - 1)) for i in (3, 4, 5, 6, 7, 8))
    d = k_out * (b.teacher - b.fake)
    r = 0.92 * (k_out * b.teacher + k_x * b.x_t) - 0.94 * (p * b.x + q * b.endpoint + s * b.noise)
    sizes = [t.reshape(len(t), -1).norm(dim=1) for t in (w * k_out * r, d)]
    return float((2 * sizes[0] / sizes[1]).norm()) / len(b.x)


def assert_agree(found, expected, dtype, condition, terms=0.0):
    for name, value in found.items():
        reference = expected[name]
        slack = condition if name.startswith("guided") else 1.0
        assert value.shape == reference.shape, name
        if name.endswith(("loss", "rows")):
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
            # A loss sums signed terms: its error is measured against the rows' scale, float32 rounding of each term
            # plus the normals' 1e-6.
            scale = expected[name.split(".")[0] + ".rows"].abs().max().clamp_min(1e-3)
            bound = 1e-11 if dtype == torch.float64 else 2e-5
            assert (value.double() - reference).abs().max() <= slack * bound * scale, name
        else:
            assert value.dtype == dtype, name
            # Gradients of one call are sums of the same terms, which in one of them may cancel.
            call = name.split(".")[0] + "."
            scale = (
                max(g.norm() for n, g in expected.items() if n.startswith(call) and not n.endswith(("loss", "rows")))
                if "." in name
                else reference.norm()
            )
            if name.startswith("normalised"):
                scale = scale.clamp_min(terms)
            error = (value.double() - reference).norm() / scale.clamp_min(1e-6)
            assert error <= slack * GRADIENT_BOUND[dtype], (name, float(error))


def reference_of(b, noise, n_real, noise_rows):
    with rf.backend("torch"):
        return calls(b.to(torch.float64), noise if noise.dtype == torch.int64 else noise.double(), n_real, noise_rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(GRADIENT_BOUND), ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 3, 8, 8), "contiguous"),
        ((6, 3, 8, 8), "channels_last"),
        ((5, 7), "contiguous"),
        ((4, 2, 3, 4, 5), "channels_last"),
        ((9, 1, 5, 3), "contiguous"),
        ((2, 10007), "contiguous"),
        ((3,), "contiguous"),
    ],
    ids=str,
)
@pytest.mark.parametrize("keyed", [True, False], ids=["key", "tensor"])
def test_backends_agree_with_float64(backend, dtype, shape, layout, keyed):
    b = batch(shape, dtype, layout, two_sided=True)
    n_real = shape[0] // 2
    noise_rows = shape[0] - n_real
    noise = KEY if keyed else b.noise[:noise_rows]
    expected = reference_of(b, noise, n_real, noise_rows)
    with rf.backend(backend):
        found = calls(b, noise, n_real, noise_rows)
    assert_agree(found, expected, dtype, condition(b))
    for name in ("x_t", "fake.fake_out", "generator.x"):
        assert found[name].stride() == b.x.stride(), name


@given(
    rows=st.integers(2, 9),
    sizes=st.lists(st.integers(1, 9), max_size=4),
    dtype=st.sampled_from(list(GRADIENT_BOUND)),
    seed=st.integers(0, 2**31),
    keyed=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(rows=3, sizes=[], dtype=torch.float32, seed=530, keyed=False)  # D of 2e-4 beside r of 2.4
def test_any_shape_agrees_with_float64(rows, sizes, dtype, seed, keyed):
    b = batch((rows, *sizes), dtype, seed=seed, two_sided=True)
    n_real = rows // 2
    noise = KEY if keyed else b.noise[: rows - n_real]
    expected = reference_of(b, noise, n_real, rows - n_real)
    assert_agree(calls(b, noise, n_real, rows - n_real), expected, dtype, condition(b), normalised_terms(b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("match", MATCH_SPACES)
@pytest.mark.parametrize("predict", ["velocity", "x0", "noise", "score"])
def test_gradcheck(backend, match, predict):
    generator = torch.Generator().manual_seed(4)
    tensors = torch.randn(5, 4, 3, 2, dtype=torch.float64, generator=generator)
    teacher, fake, x, x_t, uncond = (v.clone().requires_grad_() for v in tensors)
    scales = torch.tensor([0.0, 1.0, 1.5, 4.0], dtype=torch.float64)
    t = 0.2 + 0.6 * torch.rand(4, dtype=torch.float64, generator=generator)
    coef = PATH.coefficients(t, match, predict, weight=lambda t: 1 + t)
    held = {
        "x": x.detach(),
        "x_t": x_t.detach() if PATH.reads_x_t(match, predict) else None,
        "coef": coef,
        "noise": KEY,
    }
    names = ("teacher_out", "fake_out", "x", "x_t")

    def generator_loss(*leaves, **others):
        given = dict(zip(names, leaves, strict=True))
        return rf.functional.generator_loss(GENERAL, **given, coef=coef, noise=KEY, **others)

    with rf.backend(backend):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda f, r=reduction: rf.functional.matching_loss(out=f, **held, reduction=r), (fake,)
            )
            assert torch.autograd.gradcheck(
                lambda f, r=reduction: rf.functional.fake_loss(
                    GENERAL, fake_out=f, **held, n_real=2, teacher_out=teacher.detach(), noise_rows=2, reduction=r
                ),
                (fake,),
            )
            assert torch.autograd.gradcheck(
                lambda *v, r=reduction: generator_loss(*v, reduction=r), (teacher, fake, x, x_t)
            )
            assert torch.autograd.gradcheck(
                lambda u, *v, r=reduction: generator_loss(*v, reduction=r, teacher_uncond=u, guidance=scales),
                (uncond, teacher, fake, x, x_t),
            )
            assert torch.autograd.gradcheck(
                lambda f, r=reduction: rf.functional.fake_loss(
                    GENERAL,
                    fake_out=f,
                    **held,
                    n_real=2,
                    teacher_out=teacher.detach(),
                    noise_rows=2,
                    reduction=r,
                    teacher_uncond=uncond.detach(),
                    guidance=1.7,
                ),
                (fake,),
            )
        assert torch.autograd.gradcheck(lambda v, y: rf.interpolate(v, coef, KEY, y), (x, x_t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_generator_loss_keeps_its_value_where_fake_is_near_teacher(backend):
    """Through D = f* - f the loss keeps float32 accuracy; as a difference of squares it would lose a third."""
    generator = torch.Generator().manual_seed(2)
    b = batch((8, 3, 16, 16))
    coef = PATH.coefficients(torch.rand(8, dtype=torch.float64, generator=generator)).float()
    teacher = b.teacher.float()
    fake = teacher + 1e-3 * b.fake.float()
    x, noise = b.x.float(), b.noise.float()
    expected = rf.functional.generator_grads(
        UID,
        teacher_out=teacher.double(),
        fake_out=fake.double(),
        x=x.double(),
        x_t=None,
        coef=coef.double(),
        noise=noise.double(),
    )
    with rf.backend(backend):
        found = rf.functional.generator_grads(
            UID, teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=coef, noise=noise
        )
    # The loss is a signed sum of <D, r>: float32 products, measured against the sum of their sizes.
    scale = 2 * ((teacher - fake).abs() * (teacher - x + noise).abs()).double().sum() / 8
    assert abs(float(found.loss) - float(expected.loss)) < 2e-7 * scale
    assert (found.x.double() - expected.x).norm() < 2e-7 * expected.x.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("a", "b", "d", "c"),
    [(0.0066, 0.075, -0.096, -0.12), (1e-4, 1.5e-3, -1.6e-3, 1.0), (1e-3, 1.0, 1.0, 1.0), (1e-3, 0.1, 0.0, 10.0)],
)
def test_the_fake_loss_keeps_its_digits_where_a_is_small(backend, a, b, d, c):
    """Rows of ``w (A f^2 - 2 f (B tgt + D f*) + C tgt^2)`` against float64, measured by the sum of its terms' sizes."""
    x = batch((4, 3000), torch.float32)
    for of_fake, of_teacher in ((1.0, 1.0), (0.02, 50.0), (30.0, 0.1)):
        fake, teacher = x.fake * of_fake, x.teacher * of_teacher
        coef = zero_k_x(x.coef)
        halves = (4, 0, a, b, d, c, 0.0, 0.0, 0.0, 0.0, False, False)
        with rf.backend(backend):
            namespace = rf.ops.current(x.x.device)
            rows = namespace.fake(fake, x.x, None, coef, x.noise, teacher, None, *halves)[1]
        p, s, k_out, w = (coef.double()[:, [i]] for i in (3, 5, 6, 8))
        tgt, f, other = p * x.x.double() + s * x.noise.double(), k_out * fake.double(), k_out * teacher.double()
        terms = torch.stack([a * f * f, -2 * f * b * tgt, -2 * f * d * other, c * tgt * tgt]) * w
        error = (rows.double() - terms.sum((0, 2))).abs() / terms.abs().sum((0, 2))
        assert error.max() < 5e-7


def test_realuid_equals_the_two_squared_distances():
    b = batch((6, 5, 4))
    a, ratio = REAL.alpha, REAL.beta / REAL.alpha
    c = {name: v[:, None, None] for name, v in zip(rf.paths.COLUMNS, b.coef.unbind(1), strict=True)}
    tgt = c["p"] * b.x + c["s"] * b.noise
    teacher, fake = (c["k_out"] * f + c["k_x"] * b.x_t for f in (b.teacher, b.fake))
    rows = c["w"] * a * ((teacher - ratio * tgt) ** 2 - (fake - ratio * tgt) ** 2)
    loss = rf.functional.generator_loss(
        REAL, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=b.noise
    )
    torch.testing.assert_close(loss, rows.sum() / 6)

    real_ratio = (1 - REAL.beta) / (1 - a)
    weight = torch.tensor([a, a, a, 1 - a, 1 - a, 1 - a], dtype=torch.float64)[:, None, None]
    shift = torch.tensor([ratio] * 3 + [real_ratio] * 3, dtype=torch.float64)[:, None, None]
    rows = c["w"] * weight * (fake - shift * tgt) ** 2
    loss = rf.functional.fake_loss(REAL, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=b.noise, n_real=3)
    torch.testing.assert_close(loss, rows.sum() / 3)


def test_general_realuid_at_gamma_alpha_is_realuid():
    b = batch((4, 6))
    general = rf.objectives.GeneralRealUID(0.92, 0.94, 0.92)
    for call in (
        lambda o: rf.functional.generator_grads(
            o, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY
        ),
        lambda o: rf.functional.fake_grads(o, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY, n_real=2),
    ):
        for one, other in zip(call(general), call(REAL), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


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


def zero_k_x(coef):
    coef = coef.clone()
    coef[:, 7] = 0
    return coef


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
def test_zero_rows_and_zero_columns(backend):
    with rf.backend(backend):
        for shape in ((0, 3), (2, 0)):
            b = batch(shape, torch.float32)
            grads = rf.functional.generator_grads(
                UID, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY
            )
            assert grads.loss == 0
            assert grads.x.shape == shape
            assert rf.interpolate(b.x, b.coef, KEY).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_is_not_read_where_its_weight_is_zero(backend):
    b = batch((4, 6), torch.float32)
    poisoned = torch.full_like(b.teacher, float("nan"))
    with rf.backend(backend):
        found = rf.functional.fake_grads(
            REAL, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY, n_real=2, teacher_out=poisoned
        )
        expected = rf.functional.fake_grads(REAL, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY, n_real=2)
    assert torch.equal(found.fake_out, expected.fake_out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_from_run_to_run_and_for_every_thread_count(backend):
    b = batch((16, 3, 33, 31), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with rf.backend(backend):
                results.append(calls(b, KEY, 8, 8))
    finally:
        torch.set_num_threads(threads)
    for other in results[3:] if backend == "torch" else results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_opcheck(backend, layout):
    namespace = torch.ops.realuid_fast if backend == "cpp" else torch.ops.realuid_fast_reference
    b = batch((4, 3, 4, 2), torch.float32, layout)
    grad = [v.clone().requires_grad_() for v in (b.teacher, b.fake, b.x, b.x_t)]
    scalars = (GENERAL.alpha, GENERAL.beta, GENERAL.Q, GENERAL.kappa)
    halves = (*GENERAL.generated, *GENERAL.real)
    cases = [
        (namespace.normal_like, (KEY, b.x, 4)),
        (namespace.interpolate, (grad[2], b.coef, KEY, grad[3], 2)),
        (namespace.interpolate_grads, (b.x, b.coef, True, False)),
        (namespace.mean_abs_error, (b.teacher, b.x, b.x_t, b.coef, None, None)),
        (namespace.mean_abs_error, (b.teacher, b.x, b.x_t, b.coef, b.uncond, b.guidance)),
        (namespace.guided_fake, (b.fake, b.x, b.x_t, b.coef, KEY, b.teacher, None, b.uncond, b.guidance, 2, 2, *halves,
                                 True, True)),
        (namespace.guided_generator, (b.teacher, b.fake, b.x, b.x_t, b.coef, KEY, None, b.uncond, b.guidance, None,
                                      *scalars, False, True, False, True, False, True)),
        (namespace.guided_generator, (b.teacher, b.fake, b.x, b.x_t, b.coef, KEY, None, None, None, b.guidance,
                                      *scalars, True, True, True, True, True, False)),
        (namespace.guided_fake_loss, (grad[1], b.x, b.x_t, b.coef, KEY, b.teacher, None, b.uncond, b.guidance, 2, 2,
                                      *halves, True)),
        (namespace.guided_generator_loss, (*grad, b.coef, KEY, b.endpoint, b.uncond.clone().requires_grad_(),
                                           b.guidance, b.guidance.flip(0), *scalars, True)),
        (namespace.matching, (b.fake, b.x, b.x_t, b.coef, b.noise, None, 4, True, True)),
        (namespace.fake, (b.fake, b.x, b.x_t, b.coef, KEY, b.teacher, None, 2, 2, *halves, True, True)),
        (namespace.generator, (b.teacher, b.fake, b.x, None, zero_k_x(b.coef), KEY, None, *scalars, False, False,
                               False, True, False)),
        (namespace.matching_loss, (grad[1], b.x, b.x_t, b.coef, b.noise, None, 4, True)),
        (namespace.fake_loss, (grad[1], b.x, b.x_t, b.coef, KEY, b.teacher, None, 2, 2, *halves, True)),
        (namespace.generator_loss, (*grad, b.coef, KEY, b.endpoint, *scalars, True)),
        (namespace.generator_loss, (b.teacher, b.fake, grad[2], None, zero_k_x(b.coef), KEY, None, *scalars, False)),
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


SETTINGS = {
    "realuid": (0.92, 0.94),
    "general": (0.9, 0.93, 0.85, 0.93),
    "normalised": (0.92, 0.94),
    "realsid": (0.92, 0.94),
    "real-bridge": (0.92, 0.94),
}


@pytest.mark.parametrize("preset", rf.objectives.PRESETS)
def test_an_objective_compiles_at_its_first_use(preset):
    """The traced call is the first thing that anyone does with the objective: nothing was computed before."""
    b, objective = batch((4, 6), torch.float32), rf.objectives.PRESETS[preset](*SETTINGS.get(preset, ()))

    def turn(fake, teacher):
        loss = rf.functional.generator_loss(
            objective, teacher_out=teacher, fake_out=fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY
        )
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


def test_backend_override_is_checked_and_restored():
    with pytest.raises(rf.errors.UserError, match="backend must be one of torch, cpp, triton"), rf.backend("cuda"):
        pass
    why_not = {row.name: row.why_not for row in rf.backends.report()}
    if why_not["triton"] is not None:
        with pytest.raises(rf.errors.UserError, match="backend 'triton' cannot run here: "), rf.backend("triton"):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with rf.backend("torch"):
            rf.interpolate(torch.zeros(1, 2), torch.zeros(1, 9), KEY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_endpoint_cannot_be_left_out_where_the_path_has_one(backend):
    path = rf.paths.ICFM()
    b = batch((4, 6), torch.float32)
    coef = path.coefficients(path.sample_time(4))
    calls = [
        lambda: rf.interpolate(b.x, coef, KEY),
        lambda: rf.functional.matching_loss(out=b.fake, x=b.x, x_t=b.x_t, coef=coef, noise=KEY),
        lambda: rf.functional.fake_loss(UID, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=coef, noise=KEY),
        lambda: rf.functional.generator_loss(
            UID, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=coef, noise=KEY
        ),
    ]
    for call in calls:
        with rf.backend(backend), pytest.raises((ValueError, RuntimeError), match="endpoint is needed"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_t_cannot_be_left_out_where_the_prediction_reads_it(backend):
    b = batch((4, 6), torch.float32)
    with rf.backend(backend), pytest.raises((ValueError, RuntimeError), match="x_t is needed"):
        rf.functional.generator_loss(
            UID, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=None, coef=b.coef, noise=KEY
        )


def bad(**changes):
    b = batch((4, 3, 2, 2), torch.float32)
    for name, change in changes.items():
        setattr(b, name, change(getattr(b, name)))
    return b


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fake": lambda v: v[:3]}, r"fake_out must have shape \(4, 3, 2, 2\) to go with x, not \(3, 3, 2, 2\)"),
        ({"fake": lambda v: v.double()}, "fake_out must have x's dtype torch.float32, not torch.float64"),
        ({"teacher": lambda v: v.to("meta")}, "teacher_out must be on x's device cpu, not meta"),
        ({"x_t": lambda v: LAYOUTS["channels_last"](v)}, "x_t and x must share one memory layout"),
        ({"endpoint": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2)}, "endpoint must be contiguous or"),
        ({"coef": lambda v: v[:2]}, r"coef must have shape \(4, 9\)"),
        ({"coef": lambda v: v.double()}, "coef must be contiguous torch.float32"),
        ({"noise": lambda v: torch.zeros(3, dtype=torch.int64)}, "noise must be a key from"),
        ({"noise": lambda v: v[:2]}, r"noise must have shape \(4, 3, 2, 2\)"),
        ({"x": lambda v: v.int()}, "x must be float32, bfloat16, float16 or float64, not torch.int32"),
        (
            {"x": lambda v: v.transpose(2, 3)[:, :, :, ::2].repeat(1, 1, 1, 2).transpose(1, 2)},
            "x must be contiguous or",
        ),
        ({"x": lambda v: torch.tensor(1.0)}, "x must have a batch dimension"),
    ],
)
def test_mismatched_tensors_get_a_sentence(change, sentence):
    b = bad(**change)
    with pytest.raises(rf.errors.UserError, match=sentence):
        rf.functional.generator_loss(
            UID,
            teacher_out=b.teacher,
            fake_out=b.fake,
            x=b.x,
            x_t=b.x_t,
            coef=b.coef,
            noise=b.noise,
            endpoint=b.endpoint,
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"objective": UID, "n_real": 2}, "n_real must be 0 for UID"),
        ({"objective": REAL}, "n_real must not be 0 for RealUID"),
        ({"objective": REAL, "n_real": 4}, "n_real must leave at least one generated row: got 4 of 4"),
        ({"objective": REAL, "n_real": -1}, "n_real must leave at least one generated row"),
        ({"objective": GENERAL, "n_real": 2}, "teacher_out must be given for General RealUID"),
        ({"objective": UID, "noise_rows": 5}, "noise_rows must lie between 1 and the number of rows 4, got 5"),
        ({"objective": UID, "reduction": "sum"}, "reduction must be 'mean' or 'none', not 'sum'"),
    ],
)
def test_bad_fake_arguments_get_a_sentence(arguments, sentence):
    b = batch((4, 3), torch.float32)
    with pytest.raises(rf.errors.UserError, match=sentence):
        rf.functional.fake_loss(**arguments, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_is_the_guided_teacher_written_out(backend):
    """Values and gradients against calls with ``u + s (c - u)`` as the teacher, through autograd."""
    b = batch((6, 3, 4, 4))
    real = rf.objectives.GeneralRealUID(0.9, 0.95, 0.8)
    scales = b.guidance.view(-1, 1, 1, 1)
    leaves = [v.clone().requires_grad_() for v in (b.teacher, b.uncond, b.fake, b.x, b.x_t)]
    with rf.backend(backend):
        for objective in (real, rf.objectives.SiD(), rf.objectives.DMD()):
            values = []
            for fused in (True, False):
                teacher, uncond, *rest = leaves
                inputs = dict(zip(("fake_out", "x", "x_t"), rest, strict=True), coef=b.coef, noise=b.noise)
                if fused:
                    inputs |= {"teacher_out": teacher, "teacher_uncond": uncond, "guidance": b.guidance}
                else:
                    inputs["teacher_out"] = uncond + scales * (teacher - uncond)
                loss = rf.functional.generator_loss(objective, **inputs)
                values.append([loss, *torch.autograd.grad(loss, leaves, allow_unused=True)])
            for mine, plain in zip(*values, strict=True):
                assert (mine is None) == (plain is None)
                if plain is not None:
                    torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)
        teacher, uncond, fake, x, x_t = (leaf.detach() for leaf in leaves)
        rows = {"fake_out": fake, "x": x, "x_t": x_t, "coef": b.coef, "noise": b.noise, "n_real": 3}
        guided = rf.functional.fake_grads(real, **rows, teacher_out=teacher, teacher_uncond=uncond, guidance=b.guidance)
        plain = rf.functional.fake_grads(real, **rows, teacher_out=uncond + scales * (teacher - uncond))
        for mine, theirs in zip(guided, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def wrong_types():
    b = batch((4, 3), torch.float32)
    generator = {
        "teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY,
        "objective": REAL,
    }  # fmt: skip
    fake = {"fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY, "objective": REAL, "n_real": 2}
    matching = {"out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY}
    mixed = {"x": b.x, "coef": b.coef, "noise": KEY}
    numbers, f = b.x.numpy(), rf.functional
    return [
        *((rf.interpolate, mixed, name, wrong) for name in mixed for wrong in (0, numbers, b.x.tolist(), None)),
        (rf.interpolate, mixed, "noise", rf.NoiseStream(0)),
        (rf.interpolate, mixed, "endpoint", numbers),
        *((rf.interpolate, mixed, "noise_rows", wrong) for wrong in (2.0, "2", b.x, True)),
        *((call, matching, name, numbers) for call in (f.matching_loss, f.matching_grads) for name in matching),
        *((call, fake, name, [1.0]) for call in (f.fake_loss, f.fake_grads) for name in fake),
        *((call, generator, name, "x") for call in (f.generator_loss, f.generator_grads) for name in generator),
        *((f.generator_loss, generator, "objective", wrong) for wrong in (rf.objectives.RealUID, PATH, "uid", KEY)),
        *((rf.functional.fake_loss, fake, "n_real", wrong) for wrong in (2.0, "2", KEY, None, True)),
        (rf.functional.matching_grads, matching, "out", None),
        (rf.functional.fake_grads, fake, "fake_out", None),
        (rf.functional.generator_grads, generator, "teacher_out", None),
        *((rf.functional.generator_loss, generator, "guidance", wrong) for wrong in ("2", numbers, None)),
        (rf.functional.generator_loss, generator, "teacher_uncond", numbers),
        (rf.functional.generator_loss, generator | {"objective": rf.objectives.SDS(), "fake_out": None}, "x", numbers),
        (rf.functional.generator_loss, generator | {"objective": rf.objectives.SDS(), "fake_out": None}, "coef", KEY),
        *((rf.sample_output, {"x": b.x, "x_t": b.x_t, "coef": b.coef}, name, numbers) for name in ("x", "x_t", "coef")),
        *((rf.functional.matching_loss, matching, "reduction", wrong) for wrong in (None, 1, b.x, ["mean"])),
        (rf.noise.normal, {"key": KEY, "like": b.x}, "key", 3),
        (rf.noise.normal, {"key": KEY, "like": b.x}, "like", (4, 3)),
        *((rf.NoiseStream, {"seed": 0}, "device", wrong) for wrong in ("cud", 3.5, torch.float32)),
        (rf.NoiseStream(0).load_state_dict, {}, "state", {"seed": 1}),
        (rf.NoiseStream(0).load_state_dict, {}, "state", KEY),
        *((PATH.coefficients, {"t": b.coef[:, 0]}, "t", wrong) for wrong in (0.5, b.coef[:, 0].numpy(), [0.5], None)),
        *((PATH.coefficients, {"t": b.coef[:, 0].sigmoid()}, name, wrong) for name in ("match", "predict")
          for wrong in (None, numbers, ["x0"])),
        *((PATH.coefficients, {"t": b.coef[:, 0].sigmoid()}, "weight", wrong) for wrong in (2.0, lambda t: 1.0)),
        *((PATH.sample_time, {"n": 4}, "n", wrong) for wrong in (4.0, "4", b.x, -1)),
        (PATH.sample_time, {"n": 4}, "generator", "cpu"),
        (PATH.sample_time, {"n": 4}, "device", torch.Generator()),
        (PATH.network_time, {}, "t", 0.5),
        (PATH.network_input, {"t": b.coef[:, 0]}, "x_t", numbers),
        (PATH.reads_x_t, {}, "match", ["x0"]),
        (rf.paths.Linear, {}, "sampler", rf.paths.samplers.Uniform),
        (rf.paths.weight, {"name": "edm"}, "path", rf.paths.VE),
        (rf.paths.build, {}, "name", ["linear"]),
        (rf.paths.build, {"name": "linear"}, "settings", 3),
        (rf.paths.custom, {"a": torch.sin, "c": torch.cos}, "a", 1.0),
        (rf.paths.custom, {"a": torch.sin, "c": torch.cos}, "t_range", 1.0),
        (rf.couplings.couple, {"x": b.x, "y": b.x}, "y", numbers),
        (rf.objectives.divergence_weight, {"divergence": "jeffreys"}, "log_ratio", 0.5),
        (rf.objectives.divergence_weight, {"log_ratio": b.x}, "divergence", ["jeffreys"]),
        *((rf.objectives.RealUID, {"alpha": 0.9, "beta": 0.9}, name, wrong) for name in ("alpha", "beta")
          for wrong in ("0.9", None, b.x, [0.9])),
        (rf.objectives.RealSiD, {"alpha": 0.9, "beta": 0.8}, "alpha", "0.9"),
        (rf.objectives.RealSiD, {"alpha": 0.9, "alpha_sid": 1.2}, "beta", "0.9"),
        (rf.objectives.GeneralRealUID, {"alpha": 0.9, "beta": 0.8, "gamma": 0.9}, "kappa", "1"),
        (rf.objectives.GeneralRealUID, {"alpha": 0.9, "gamma": 0.9}, "beta", "1"),
    ]  # fmt: skip


@pytest.mark.parametrize(("call", "arguments", "name", "wrong"), wrong_types())
def test_a_wrong_type_gets_a_sentence_that_names_the_argument(call, arguments, name, wrong):
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        call(**arguments | {name: wrong})


def test_swapped_arguments_and_uncalled_presets_are_named():
    b = batch((4, 3), torch.float32)
    with pytest.raises(UserError, match=r"objective must be an Objective .*, not torch\.Tensor"):
        rf.functional.generator_loss(
            KEY, teacher_out=b.teacher, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=REAL
        )
    with pytest.raises(UserError, match=r"objective must be .*, not the function RealUID itself"):
        rf.functional.fake_loss(rf.objectives.RealUID, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY)
    with pytest.raises(UserError, match="fake_out must have shape"):
        rf.functional.fake_loss(UID, fake_out=b.fake, x=b.coef, x_t=b.x_t, coef=b.x, noise=KEY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_stream_on_a_device_that_is_not_there_is_a_sentence():
    with pytest.raises(UserError, match="device 'cuda' cannot be used"):
        rf.NoiseStream(0, device="cuda")
    with pytest.raises(UserError, match="device 'cuda' cannot be used"):
        PATH.sample_time(4, device="cuda")


def test_guidance_that_cannot_be_is_named():
    b = batch((4, 3))
    inputs = {"teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY}
    for wrong, sentence in (
        ({"guidance": 2.0}, "teacher_uncond must be given with a guidance of 2"),
        ({"guidance": b.guidance}, "teacher_uncond must be given with a guidance"),
        ({"teacher_uncond": b.uncond[:2], "guidance": 2.0}, "teacher_uncond must have shape"),
        ({"teacher_uncond": b.uncond, "guidance": float("nan")}, "guidance must be finite"),
        ({"teacher_uncond": b.uncond, "guidance": b.guidance[:3]}, "guidance must be a number or have shape"),
        ({"teacher_uncond": b.uncond, "guidance": b.guidance.float()}, "dtype torch.float64"),
        ({"teacher_uncond": b.uncond, "guidance": b.guidance.requires_grad_()}, "gradient in guidance"),
    ):
        with pytest.raises(UserError, match=sentence):
            rf.functional.generator_loss(UID, **inputs, **wrong)
