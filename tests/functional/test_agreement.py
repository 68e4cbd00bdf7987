"""The fused calls: their gradients, and agreement of the backends with float64 and with closed forms."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import realuid_fast as rf
from realuid_fast.paths import MATCH_SPACES

from .calls import BACKENDS, GENERAL, KEY, PATH, REAL, UID, batch, calls, zero_k_x

# Relative L2 error of a whole gradient: storage rounding 2^-24, 2^-8, 2^-11 half a unit, with room for a few roundings
# in the arithmetic and, for float32, the stream's 1e-6 against the float64 normals.
GRADIENT_BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


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


def weight_condition(b):
    """How much rounding grows in a sample's weight ``1 / mean|f* - tgt|``: what its terms are, beside what they make.

    The guided teacher and the target may cancel where a row is a single element.
    """
    b = b.to(torch.float64)
    scale, p, q, s, k_out, k_x = (
        v.view(-1, *[1] * (b.x.dim() - 1)) for v in (b.guidance, *(b.coef[:, i] for i in range(3, 8)))
    )
    terms = (k_out * b.uncond, k_out * scale * (b.teacher - b.uncond), k_x * b.x_t)
    terms += (-p * b.x, -q * b.endpoint, -s * b.noise)
    sizes, made = (v.reshape(len(v), -1).mean(1) for v in (sum(t.abs() for t in terms), sum(terms).abs()))
    return float((sizes / made).max())


def assert_agree(found, expected, dtype, condition, terms=0.0, weight=0.0):
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
            bound = slack * GRADIENT_BOUND[dtype]
            if name.startswith("scaled"):
                bound += weight * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            assert error <= bound, (name, float(error))


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
@example(rows=4, sizes=[], dtype=torch.float32, seed=94453, keyed=False)  # f* - tgt of 0.14 made of terms of 9.7
def test_any_shape_agrees_with_float64(rows, sizes, dtype, seed, keyed):
    b = batch((rows, *sizes), dtype, seed=seed, two_sided=True)
    n_real = rows // 2
    noise = KEY if keyed else b.noise[: rows - n_real]
    expected = reference_of(b, noise, n_real, rows - n_real)
    found = calls(b, noise, n_real, rows - n_real)
    assert_agree(found, expected, dtype, condition(b), normalised_terms(b), weight_condition(b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("match", MATCH_SPACES)
@pytest.mark.parametrize("predict", ["velocity", "x0", "noise", "score"])
def test_gradcheck(backend, match, predict):
    generator = torch.Generator().manual_seed(4)
    tensors = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)
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
            rows = namespace.fake(fake, x.x, None, coef, x.noise, teacher, None, None, None, *halves)[1]
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
