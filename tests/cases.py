"""The table of cases for "a backend agrees with float64", and its one checker.

A case is an operator with its switches, on a shape, layout and dtype, with drawn or given noise. What it must give is
evaluated in float64 by the formulas, which are written out here once more in plain torch.
"""

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from .ops.philox64 import OFFSET, SEED, stream64

# Relative L2 error of a whole tensor against float64 on the same (already rounded) inputs. float32: a few
# roundings of 6e-8, in sums of random signs up to a hundred times that. bfloat16 and float16 add one rounding of
# the output, which is at most half the distance between neighbours: 2^-8 and 2^-11 of the value.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8 + 2e-5, torch.float16: 2**-11 + 2e-5, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)
# Contiguous, channels_last, 5-D, D not a multiple of 4 or of any vector, several blocks in a row, rows shorter
# than a vector.
SHAPES = [
    ((5, 3, 7, 5), torch.contiguous_format),
    ((4, 3, 16, 16), torch.channels_last),
    ((2, 3, 4, 5, 6), torch.channels_last_3d),
    ((3, 9001), torch.contiguous_format),
    ((67, 2), torch.contiguous_format),
    ((6, 1), torch.contiguous_format),
    ((1, 33), torch.contiguous_format),
]


def in_memory_order(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like, dtype=torch.float64)
    torch.as_strided(out, (out.numel(),), (1,)).copy_(flat)
    return out


def poison(*like: torch.Tensor) -> None:
    """Leave NaN in the memory that the next allocations of these sizes get."""
    for tensor in like:
        junk = [torch.full_like(tensor, float("nan")) for _ in range(6)]
        del junk


class Case:
    """One random call: inputs as given to the operator, and in float64 for the formulas."""

    def __init__(self, shape, layout, dtype, keyed, extra, noise_rows=None, seed=0):
        g = torch.Generator().manual_seed(seed)

        def draw(size=shape):
            t = torch.randn(size, generator=g).to(dtype)
            return t if layout is torch.contiguous_format else t.to(memory_format=layout)

        self.rows, self.noise_rows = shape[0], noise_rows or max(shape[0], 1)
        self.teacher, self.fake, self.x = draw(), draw(), draw()
        self.x_t = draw() if extra else None
        self.y = draw() if extra else None
        real = torch.float64 if dtype is torch.float64 else torch.float32
        self.coef = torch.randn((shape[0], 9), generator=g).to(real)
        if not extra:
            self.coef[:, [1, 4, 7]] = 0
        self.noise = draw((self.noise_rows, *shape[1:])) if shape[0] else draw()
        n = self.noise.double()
        if keyed:
            self.noise = torch.tensor([SEED, OFFSET])
            n = in_memory_order(stream64(n.numel()), n)
        self.n64 = n[torch.arange(self.rows) % self.noise_rows] if self.rows else n
        poison(self.x)

    def c64(self, i):
        return self.coef[:, i].double().reshape(-1, *[1] * (self.x.dim() - 1))

    def target(self):
        y = 0 if self.y is None else self.c64(4) * self.y.double()
        return self.c64(3) * self.x.double() + y + self.c64(5) * self.n64

    def native(self, out):
        shift = 0 if self.x_t is None else self.c64(7) * self.x_t.double()
        return self.c64(6) * out.double() + shift


def check(got, wanted, dtype, like=None):
    if like is not None:
        assert got.dtype == like.dtype
        assert got.shape == like.shape
        assert got.stride() == like.stride()
    got, wanted = got.double(), wanted.double()
    assert torch.isfinite(got).all()
    error = (got - wanted).norm() / wanted.norm().clamp_min(1e-300)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def row_sum(t):
    return t.flatten(1).sum(1)


class Call(NamedTuple):
    """An operator's arguments, and what it must give: the rows' losses with their mean, and gradients or tensors.

    A gradient that was not wanted is None here, and empty in the operator's result.
    """

    op: str
    arguments: tuple[Any, ...]
    tensors: list[torch.Tensor | None]
    rows: torch.Tensor | None = None
    generated: int = 0
    atol: float = 0.0


def interpolate(shape, layout, dtype, keyed, extra):
    case = Case(shape, layout, dtype, keyed, extra)
    wanted = case.c64(0) * case.x.double() + case.c64(2) * case.n64
    if extra:
        wanted = wanted + case.c64(1) * case.y.double()
    return case, Call("interpolate", (case.x, case.coef, case.noise, case.y, case.noise_rows), [wanted])


def interpolate_grads(shape, layout, dtype, keyed, extra):
    case = Case(shape, layout, dtype, keyed, extra)
    wanted = [case.c64(0) * case.fake.double(), case.c64(1) * case.fake.double() if extra else None]
    return case, Call("interpolate_grads", (case.fake, case.coef, True, extra), wanted)


def mean_abs_error(shape, layout, dtype, keyed, extra):
    case = Case(shape, layout, dtype, keyed, extra)
    wanted = row_sum((case.x.double() - case.native(case.teacher)).abs()) / (case.x.numel() / case.rows)
    return case, Call("mean_abs_error", (case.teacher, case.x, case.x_t, case.coef, None, None), [], wanted)


def matching(shape, layout, dtype, keyed, extra, mean):
    case = Case(shape, layout, dtype, keyed, extra)
    arguments = (case.fake, case.x, case.x_t, case.coef, case.noise, case.y, case.noise_rows, mean, True)
    e = case.native(case.fake) - case.target()
    scale = 1 / case.rows if mean else 1.0
    wanted = [scale * 2 * case.c64(8) * case.c64(6) * e]
    return case, Call("matching", arguments, wanted, case.coef[:, 8].double() * row_sum(e * e), case.rows, 1e-6)


# a b d c of the generated and of the real rows: the square completed, with a teacher, and with a = 0.
HALVES = [
    ((0.92, 0.94, 0.0, 0.94**2 / 0.92), (0.08, 0.06, 0.0, 0.06**2 / 0.08)),
    ((0.9, 0.94, 0.1, 1.0), (0.1, 0.06, -0.2, 0.3)),
    ((0.9, 0.94, 0.1, 1.0), (0.0, 0.06, 0.3, 0.3)),
]


def fake(shape, layout, dtype, keyed, extra, halves):
    n_real = shape[0] // 2
    generated = shape[0] - n_real
    # The shared draw: the real half uses the generated half's noise.
    case = Case(shape, layout, dtype, keyed, extra, noise_rows=generated)
    (a, b, d, c), real = halves
    teacher = case.teacher if d or real[2] else None
    arguments = (case.fake, case.x, case.x_t, case.coef, case.noise, teacher, case.y, None, None)
    arguments += (generated, n_real, a, b, d, c, *real, True, True)

    def per_row(i):
        column = torch.tensor([halves[0][i]] * generated + [real[i]] * n_real, dtype=torch.float64)
        return column.reshape(-1, *[1] * (case.x.dim() - 1))

    a, b, d, c = (per_row(i) for i in range(4))
    f, tgt = case.native(case.fake), case.target()
    star = case.native(case.teacher) if teacher is not None else torch.zeros_like(f)
    element = a * f * f - 2 * f * (b * tgt + d * star) + c * tgt * tgt
    wanted = [2 / generated * case.c64(8) * case.c64(6) * (a * f - b * tgt - d * star)]
    return case, Call("fake", arguments, wanted, case.coef[:, 8].double() * row_sum(element), generated, 1e-5)


def generator(shape, layout, dtype, keyed, extra, mean):
    case = Case(shape, layout, dtype, keyed, extra)
    alpha, beta, q, kappa = 0.92, 0.94, 0.9, 1.1
    arguments = (case.teacher, case.fake, case.x, case.x_t, case.coef, case.noise, case.y, None, None, None)
    arguments += (alpha, beta, q, kappa, mean, True, True, True, extra, False)
    star, f, tgt = case.native(case.teacher), case.native(case.fake), case.target()
    w, big_d, r = case.c64(8), star - f, alpha * star - beta * tgt
    rows = row_sum(w * (-q * kappa**2 * big_d**2 + 2 * kappa * big_d * r))
    scale = w / case.rows if mean else w
    g_star = scale * (-2 * q * kappa**2 * big_d + 2 * kappa * r + 2 * alpha * kappa * big_d)
    g_f = scale * (2 * q * kappa**2 * big_d - 2 * kappa * r)
    wanted = [
        case.c64(6) * g_star,
        case.c64(6) * g_f,
        case.c64(3) * scale * (-2 * beta * kappa * big_d),
        case.c64(7) * (g_star + g_f) if extra else None,
        None,
    ]
    return case, Call("generator", arguments, wanted, rows, case.rows, 1e-5)


# Every operator with its switches.
CALLS = {
    "interpolate": (interpolate,),
    "interpolate_grads": (interpolate_grads,),
    "mean_abs_error": (mean_abs_error,),
    "matching-mean": (matching, True),
    "matching-sums": (matching, False),
    "fake-squared": (fake, HALVES[0]),
    "fake-teacher": (fake, HALVES[1]),
    "fake-no-square": (fake, HALVES[2]),
    "generator-mean": (generator, True),
    "generator-sums": (generator, False),
}
CASES = pytest.mark.parametrize(
    ("shape", "layout", "keyed", "extra"),
    [(shape, layout, *switches) for shape, layout in SHAPES for switches in itertools.product((True, False), repeat=2)],
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_CALL = pytest.mark.parametrize("call", CALLS)


def assert_agrees(namespace, call, shape, layout, keyed, extra, dtype):
    """The operator of a case in ``namespace`` gives what the formulas give in float64, of the type that it promises."""
    made, *switches = CALLS[call]
    case, call = made(shape, layout, dtype, keyed, extra, *switches)
    found = getattr(namespace, call.op)(*call.arguments)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    if call.rows is not None:
        loss, rows = (found.pop(0) if call.generated else None), found.pop(0)
        assert rows.dtype == case.coef.dtype
        check(rows, call.rows, torch.float64 if dtype is torch.float64 else torch.float32)
        if call.generated:
            assert loss.dtype == case.coef.dtype
            expected = (rows.double().sum() / call.generated).to(loss.dtype)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=call.atol)
    assert len(found) == len(call.tensors)
    for got, wanted in zip(found, call.tensors, strict=True):
        if wanted is None:
            assert got.shape == (0,)
        else:
            check(got, wanted, dtype, case.x)
