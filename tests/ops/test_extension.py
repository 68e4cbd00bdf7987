"""The compiled operators against a float64 evaluation of the formulas in ``tests/cases.py``, and their own corners."""

import pytest
import torch

import realuid_fast as rf
from realuid_fast.ops import extension

from ..cases import (
    CASES,
    DTYPES,
    EVERY_CALL,
    EVERY_DTYPE,
    HALVES,
    SHAPES,
    Case,
    assert_agrees,
    check,
    in_memory_order,
    row_sum,
)
from .philox64 import OFFSET, SEED, stream64

pytestmark = pytest.mark.skipif(extension.why_missing() is not None, reason=str(extension.why_missing()))
ops = torch.ops.realuid_fast
EMPTY = [(0, 4), (3, 0)]


@EVERY_DTYPE
@CASES
@EVERY_CALL
def test_operator_agrees(call, shape, layout, keyed, extra, dtype):
    assert_agrees(ops, call, shape, layout, keyed, extra, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_normals_agree(shape, layout, dtype):
    like = Case(shape, layout, dtype, True, False).x
    got = ops.normal_like(torch.tensor([SEED, OFFSET]), like, shape[0])
    assert got.dtype == dtype
    assert got.stride() == like.stride()
    wanted = in_memory_order(stream64(like.numel()), like)
    if dtype in (torch.float32, torch.float64):
        # 1e-6: the vectorised logarithm, sine and cosine; the contract between backends is 1e-4.
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-14)
    else:
        check(got, wanted, dtype)


@pytest.mark.parametrize("shape", EMPTY)
@EVERY_DTYPE
def test_empty_tensors(shape, dtype):
    case = Case(shape, torch.contiguous_format, dtype, True, False)
    n = case.noise_rows
    assert ops.interpolate(case.x, case.coef, case.noise, None, n).shape == shape
    assert ops.normal_like(case.noise, case.x, n).shape == shape
    assert ops.mean_abs_error(case.teacher, case.x, None, case.coef, None, None).tolist() == [0.0] * shape[0]
    results = [
        ops.matching(case.fake, case.x, None, case.coef, case.noise, None, n, True, True),
        ops.fake(
            case.fake, case.x, None, case.coef, case.noise, None, None, None, None, n, 0, *HALVES[0][0], *HALVES[0][1],
            True, True,
        ),
        ops.generator(
            case.teacher, case.fake, case.x, None, case.coef, case.noise, None, None, None, None,
            *rf.objectives.UID().generator_scalars, True, True, True, True, False, False,
        ),
    ]  # fmt: skip
    for loss, rows, *grads in results:
        assert loss.item() == 0
        assert rows.tolist() == [0.0] * shape[0]
        assert grads[0].shape == shape


def run_all(case, noise_rows):
    """Every output of every operator, as one list of tensors."""
    halves = (*HALVES[1][0], *HALVES[1][1])
    n_real = case.rows - noise_rows
    out = [ops.interpolate(case.x, case.coef, case.noise, case.y, noise_rows)]
    out += [ops.mean_abs_error(case.teacher, case.x, case.x_t, case.coef, None, None)]
    out += ops.matching(case.fake, case.x, case.x_t, case.coef, case.noise, case.y, noise_rows, True, True)
    out += ops.fake(
        case.fake, case.x, case.x_t, case.coef, case.noise, case.teacher, case.y, None, None, noise_rows, n_real,
        *halves,
        True, True,
    )  # fmt: skip
    if case.noise.dtype is torch.int64:
        out += ops.generator(
            case.teacher, case.fake, case.x, case.x_t, case.coef, case.noise, case.y, None, None, None,
            *rf.objectives.RealUID(0.9, 0.94).generator_scalars, True, True, True, True, case.x_t is not None, False,
        )  # fmt: skip
        out.append(ops.normal_like(case.noise, case.x, noise_rows))
    return out


@pytest.mark.parametrize("shape", [(44, 3001), (3, 70001), (30000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_thread_count(shape, dtype):
    case = Case(shape, torch.contiguous_format, dtype, True, True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run_all(case, shape[0] - shape[0] // 3))
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(two, again)


def test_large_outputs_past_the_caches():
    """Sizes at which outputs are streamed, with rows that start aligned and rows that do not."""
    for dim in (3072, 3073):
        case = Case((250, dim), torch.contiguous_format, torch.float32, True, False)
        x_t = ops.interpolate(case.x, case.coef, case.noise, None, 250)
        check(x_t, case.c64(0) * case.x.double() + case.c64(2) * case.n64, torch.float32)
        _, rows, g = ops.matching(case.fake, case.x, None, case.coef, case.noise, None, 250, False, True)
        e = case.native(case.fake) - case.target()
        check(rows, case.coef[:, 8].double() * row_sum(e * e), torch.float32)
        check(g, 2 * case.c64(8) * case.c64(6) * e, torch.float32)


def test_near_the_optimum_the_generator_loss_keeps_its_digits():
    """f = f* + 1e-3 noise: two sums of squares in float32 would lose a third of the value."""
    g = torch.Generator().manual_seed(5)
    teacher = torch.randn(8, 3072, generator=g)
    fake = teacher + 1e-3 * torch.randn(8, 3072, generator=g)
    x = torch.randn(8, 3072, generator=g)
    coef = rf.paths.Linear().coefficients(torch.rand(8, generator=g))
    key = torch.tensor([SEED, OFFSET])
    scalars = rf.objectives.RealUID(0.9, 0.94).generator_scalars
    rows = ops.generator(teacher, fake, x, None, coef, key, *[None] * 4, *scalars, True, *[False] * 5)[1]
    n = stream64(x.numel()).reshape(x.shape)
    c = coef.double()
    tgt = c[:, 3:4] * x.double() + c[:, 5:6] * n
    d = c[:, 6:7] * (teacher.double() - fake.double())
    r = 0.9 * c[:, 6:7] * teacher.double() - 0.94 * tgt
    wanted = row_sum(c[:, 8:9] * (-0.9 * d * d + 2 * d * r))
    torch.testing.assert_close(rows.double(), wanted, rtol=2e-5, atol=1e-6)


def test_no_noise_is_drawn_or_read_where_its_coefficient_is_zero():
    x = torch.randn(4, 10)
    coef = torch.zeros(4, 9)
    coef[:, [0, 3, 6, 8]] = 1
    noise = torch.full_like(x, float("nan"))
    assert torch.equal(ops.interpolate(x, coef, noise, None, 4), x)
    loss, _, g = ops.matching(x, x, None, coef, noise, None, 4, True, True)
    assert loss == 0
    assert torch.equal(g, torch.zeros_like(x))


def test_unread_inputs_may_hold_anything():
    """x_t of rows with k_x = 0, and the teacher of rows with d = 0, are not read."""
    case = Case((6, 50), torch.contiguous_format, torch.float32, True, True, noise_rows=3)
    case.coef[:3, 7] = 0
    case.x_t[:3] = float("nan")
    case.teacher[:3] = float("nan")
    halves = (0.9, 0.94, 0.0, 1.0, 0.1, 0.06, 0.3, 0.3)
    loss, rows, g = ops.fake(
        case.fake, case.x, case.x_t, case.coef, case.noise, case.teacher, case.y, None, None, 3, 3, *halves, True, True
    )
    assert loss.isfinite()
    assert rows.isfinite().all()
    assert g.isfinite().all()


@EVERY_DTYPE
@pytest.mark.parametrize("wide", [False, True])
def test_scale_grads(dtype, wide):
    factor = torch.float64 if wide else torch.float32
    a = torch.randn(5, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    b, empty = torch.randn(5, 7).to(dtype), torch.empty(0, dtype=dtype)
    for scale in (torch.tensor(0.37, dtype=factor), torch.randn(5, dtype=factor)):
        got_a, got_b = a.clone(), b.clone()
        ops.scale_grads_([got_a, empty, got_b], scale)
        check(got_a, a.double() * scale.double().reshape(-1, 1, 1, 1), dtype)
        check(got_b, b.double() * scale.double().reshape(-1, 1), dtype)


def test_scale_of_one_leaves_memory_alone():
    # A signalling NaN comes out of any multiplication quieted, so its bits tell.
    bits = torch.full((3, 50), 0x7FA00001, dtype=torch.int32)
    grad = bits.clone().view(torch.float32)
    ops.scale_grads_([grad], torch.ones(()))
    ops.scale_grads_([grad], torch.tensor([1.0, 1.0, 1.0]))
    assert torch.equal(grad.view(torch.int32), bits)
    ops.scale_grads_([grad], torch.tensor([1.0, 2.0, 1.0]))
    assert (grad.view(torch.int32) != bits).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_survives(dtype):
    """Loading and storing all 65,536 values, and rounding to nearest even on the way down, is what torch does."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, -1)
    coef = torch.zeros(1, 9)
    coef[0, 0] = 1
    key = torch.tensor([0, 0])
    same = ops.interpolate(every, coef, key, None, 1)
    assert torch.equal(torch.nan_to_num(same), torch.nan_to_num(every))
    assert torch.equal(same.isnan(), every.isnan())
    coef[0, 0] = 1.00321
    scaled = ops.interpolate(every, coef, key, None, 1)
    wanted = (every.float() * 1.00321).to(dtype)
    assert torch.equal(torch.nan_to_num(scaled), torch.nan_to_num(wanted))
    coef[0, 0] = 3.3e-5
    small = ops.interpolate(every, coef, key, None, 1)
    torch.testing.assert_close(small, (every.float() * 3.3e-5).to(dtype), rtol=0, atol=0, equal_nan=True)


# A piece is 4096 elements, a thread's share 32768: below, at, across and far beyond them, and no multiple of a vector.
SIZES = {"67": (67,), "9001": (9001,), "many": (1, 0, 4096, 33, 70001, 16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("beta1", "rows", "warmup"), [(0.0, 3, True), (0.9, 1, False), (0.9, 0, False)])
@pytest.mark.parametrize("sizes", list(SIZES))
def test_optimiser_step_agrees(sizes, beta1, rows, warmup, dtype):
    g = torch.Generator().manual_seed(0)

    def draw(*lead):
        return [torch.randn((*lead, n), generator=g).to(dtype) for n in SIZES[sizes]]

    params, grads, squares = draw(), draw(), [t.square() for t in draw()]
    moments, emas = draw() if beta1 else [], draw(rows) if rows else []
    step, counts, decays = torch.tensor(6.0), torch.tensor([4, 0]), torch.tensor([0.9, 0.1, 0.9999])[:rows].double()
    rates, clip, beta2, eps, decay = torch.tensor([0.1, 0.2]), 3.0, 0.999, 1e-4, 0.05

    norm = ops.begin_step_(grads, [step], counts)
    assert (step, *counts) == (7, 5, 0)
    wide = [t.double() for t in grads]
    length = torch.cat(wide).norm()
    torch.testing.assert_close(norm.double(), length, rtol=1e-6, atol=0)
    expected = []
    for i, (p, d, v) in enumerate(zip(params, wide, squares, strict=True)):
        d = -min(1.0, clip / float(length)) * d + decay * p.double()
        v = beta2 * v.double() + (1 - beta2) * d**2
        m = beta1 * moments[i].double() + (1 - beta1) * d if beta1 else d
        p = p.double() - rates[1].double() * m / (1 - beta1**7) / ((v / (1 - beta2**7)).sqrt() + eps)
        share = [min(float(q), 5 / 14) if warmup else float(q) for q in decays]
        average = [q * e.double() + (1 - q) * p for q, e in zip(share, emas[i], strict=True)] if rows else []
        expected.append((p, v, m, average))
    numbers = clip, beta1, beta2, eps, decay, True, warmup
    before = [t.clone() for t in grads]
    ops.adam_(params, grads, moments, squares, emas, norm, step, rates, counts, decays, *numbers)
    for i, (p, v, m, average) in enumerate(expected):
        check(params[i], p, dtype)
        check(squares[i], v, dtype)
        if beta1:
            check(moments[i], m, dtype)
        for mine, theirs in zip(emas[i] if rows else [], average, strict=True):
            check(mine, theirs, dtype)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
