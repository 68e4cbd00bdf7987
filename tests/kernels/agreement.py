"""Cases in which the Triton kernels must agree with the float64 formulas, and the checks that run them.

Two scripts run them, each in a process of its own: ``interpreted.py`` in Triton's interpreter and ``executed.py`` from
the PTX that Triton emits. Every case prints one line of JSON: its name, the worst error and the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import torch

from realuid_fast import ops
from realuid_fast.kernels import tiles
from realuid_fast.objectives import Objective
from realuid_fast.ops import reference, triton_backend
from realuid_fast.optim import FusedAdam

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Relative L2 error against float64 on the same rounded inputs. float32: roundings of 6e-8 and the interpreter's own
# transcendental functions. float16 adds half a unit in the last place, bfloat16 a whole one: the interpreter cuts
# bfloat16 off where a GPU rounds.
TOLERANCE = {F32: 2e-5, BF16: 2**-7 + 2e-5, F16: 2**-11 + 2e-5}

SHORT = (5, 3, 4, 5)  # D = 60: masks, 4-element groups
SHAPES = {
    "short": (SHORT, torch.contiguous_format),
    "images_8x8": ((3, 3, 8, 8), torch.channels_last),
    "odd_short": ((11, 7), torch.contiguous_format),
    "scalars": ((9, 1), torch.contiguous_format),
    "power_of_two": ((35, 64), torch.contiguous_format),
    "one_row_even": ((2, 3, 16, 32), torch.channels_last),
    "overlapping_tail": ((2, 1300), torch.contiguous_format),
    "odd_row": ((3, 1023), torch.contiguous_format),  # tiles of noise with none, one and two elements of their own
    "video": ((2, 4, 5, 6, 7), torch.channels_last_3d),
}

KEY = torch.tensor([0x0123_4567_89AB_CDEF, (3 << 32) + 41])


# Elements that every tensor of a case begins after an aligned address: a view into a larger tensor has some.
offset = 0


def memory_like(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> torch.Tensor:
    dense = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    if not offset:
        return dense
    room = torch.zeros(dense.numel() + offset, dtype=dtype)
    return room[offset:].as_strided(dense.shape, dense.stride()).copy_(dense)


class Case:
    """Inputs of one call; ``double()`` has the same values in float64, with the noise drawn by the definition."""

    def __init__(self, shape_name: str, dtype: torch.dtype, keyed: bool, shared: bool, endpoint: bool, x_t: bool):
        shape, layout = SHAPES[shape_name]
        rows = shape[0]
        # Two halves share by a subtraction, more parts by a division.
        parts = (2 if dtype == F32 else 3) if shared else 1
        self.noise_rows = -(-rows // parts)
        self.x, self.out, self.other, self.uncond = (memory_like(shape, layout, dtype) for _ in range(4))
        self.guidance = 1 + torch.rand(rows)
        self.q_rows = torch.randn(rows)
        self.endpoint = memory_like(shape, layout, dtype) if endpoint else None
        self.x_t = memory_like(shape, layout, dtype) if x_t else None
        self.coef = torch.randn(rows, 9)
        if self.endpoint is None:
            self.coef[:, [1, 4]] = 0
        if self.x_t is None:
            self.coef[:, 7] = 0
        else:
            # Not read where k_x = 0: poison must not come through.
            self.coef[0, 7] = 0
            self.x_t[0] = float("nan")
        if keyed:
            self.noise = KEY
        else:
            self.noise = memory_like((self.noise_rows, *shape[1:]), layout, dtype)

    def double(self) -> Case:
        twin = object.__new__(Case)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = value.double()
            setattr(twin, name, value)
        return twin


@contextmanager
def poisoned():
    """Tensors allocated inside start as NaN, so that an element which no kernel writes is seen."""
    before = {name: getattr(torch, name) for name in ("empty_like", "empty")}

    def nan(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fresh(*arguments: object, **options: object) -> torch.Tensor:
            made = allocate(*arguments, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fresh

    try:
        for name, allocate in before.items():
            setattr(torch, name, nan(allocate))
        yield
    finally:
        for name, allocate in before.items():
            setattr(torch, name, allocate)


# The context of every call of an operator; executed.py puts its own here.
surroundings: Callable[[], AbstractContextManager[None]] = poisoned


def run(op: str, *arguments: object) -> tuple[torch.Tensor, ...]:
    with surroundings():
        results = triton_backend.launcher(op)(*arguments)
    return results if isinstance(results, tuple) else (results,)


def compare(name: str, dtype: torch.dtype, got: tuple[torch.Tensor, ...], want: object) -> None:
    wanted = want if isinstance(want, tuple) else (want,)
    assert len(got) == len(wanted), name
    worst = 0.0
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine.shape, mine.stride()) == (theirs.shape, theirs.stride()), name
        if mine.numel():
            # Rows' losses have either sign: their mean is as exact as they are, however small it comes out.
            scale = wanted[1].abs().mean() if theirs.dim() == 0 and len(wanted) > 1 else theirs.norm()
            gap = (mine.double() - theirs).norm() / scale.clamp_min(1e-12)
            worst = max(worst, float(gap)) if gap == gap else float("inf")
    print(json.dumps({"case": name, "error": worst, "tolerance": TOLERANCE[dtype]}), flush=True)


SCALARS = Objective("any", alpha=0.92, beta=0.94, gamma=0.92, Q=0.8, kappa=1.1).generator_scalars


def check_generator(case: Case, name: str, dtype: torch.dtype, wants: tuple[bool, ...], mean: bool) -> None:
    def arguments(c: Case) -> tuple[object, ...]:
        return c.out, c.other, c.x, c.x_t, c.coef, c.noise, c.endpoint, *SCALARS, mean, *wants

    if case.noise.is_floating_point() and case.noise.shape[0] != case.x.shape[0]:
        return

    def alone(c: Case) -> tuple[object, ...]:
        return *arguments(c)[:7], None, None, None, *arguments(c)[7:], False

    def guided(c: Case) -> tuple[object, ...]:
        first, scalars = arguments(c)[:7], arguments(c)[7:]
        # The second output's gradient is wanted where x's is.
        return *first, c.uncond, c.guidance, None, *scalars, wants[2]

    def by_row(c: Case) -> tuple[object, ...]:
        first, scalars = arguments(c)[:7], arguments(c)[7:]
        # A Q of each row's own, with guidance where x's gradient is wanted and without it elsewhere.
        guidance = (c.uncond, c.guidance) if wants[2] else (None, None)
        return *first, *guidance, c.q_rows, *scalars, wants[0] and wants[2]

    for kind, inputs in (("generator", alone), ("guided_generator", guided), ("q_rows_generator", by_row)):
        got, want = run("generator", *inputs(case)), reference.generator(*inputs(case.double()))
        compare(name.replace("generator", kind), dtype, got, want)


def check_fake(case: Case, name: str, dtype: torch.dtype, teacher: bool, want: bool, mean: bool) -> None:
    n_real = case.x.shape[0] // 3
    other = case.other.clone() if teacher else None
    if other is not None and n_real:
        # D = 0 for real rows: the teacher is not read there.
        other[-n_real:] = float("nan")

    def arguments(c: Case, other: torch.Tensor | None) -> tuple[object, ...]:
        halves = (0.9, 1.0, -0.3 if teacher else 0.0, 1.2, 0.1, 0.2, 0.0, 0.4)
        inputs = (c.out, c.x, c.x_t, c.coef, c.noise, other, c.endpoint, None, None)
        return *inputs, c.noise_rows, n_real, *halves, mean, want

    double = None if other is None else other.double()
    compare(name, dtype, run("fake", *arguments(case, other)), reference.fake(*arguments(case.double(), double)))
    if other is None:
        return

    def guided(c: Case, other: torch.Tensor) -> tuple[object, ...]:
        everything = arguments(c, other)
        uncond = c.uncond.clone()
        if n_real:
            uncond[-n_real:] = float("nan")
        return *everything[:7], uncond, c.guidance, *everything[9:]

    got, want_ = run("fake", *guided(case, other)), reference.fake(*guided(case.double(), double))
    compare(name.replace("fake", "guided_fake"), dtype, got, want_)


def check_matching(case: Case, name: str, dtype: torch.dtype, want: bool, mean: bool) -> None:
    def arguments(c: Case) -> tuple[object, ...]:
        return c.out, c.x, c.x_t, c.coef, c.noise, c.endpoint, c.noise_rows, mean, want

    compare(name, dtype, run("matching", *arguments(case)), reference.matching(*arguments(case.double())))


def check_error(case: Case, name: str, dtype: torch.dtype) -> None:
    def arguments(c: Case) -> tuple[object, ...]:
        return c.out, c.x, c.x_t, c.coef, None, None

    def guided(c: Case) -> tuple[object, ...]:
        return c.out, c.x, c.x_t, c.coef, c.uncond, c.guidance

    for kind, inputs in (("", arguments), ("guided_", guided)):
        got, want = run("mean_abs_error", *inputs(case)), reference.mean_abs_error(*inputs(case.double()))
        compare(f"{kind}{name}", dtype, got, want)


def check_interpolate(case: Case, name: str, dtype: torch.dtype) -> None:
    def arguments(c: Case) -> tuple[object, ...]:
        return c.x, c.coef, c.noise, c.endpoint, c.noise_rows

    compare(name, dtype, run("interpolate", *arguments(case)), reference.interpolate(*arguments(case.double())))
    double = case.double()
    for want_x, want_y in ((True, True), (True, False), (False, True)):
        got = run("interpolate_grads", case.x, case.coef, want_x, want_y)
        want = reference.interpolate_grads(double.x, double.coef, want_x, want_y)
        compare(f"{name}/grads_{want_x:d}{want_y:d}", dtype, got, want)


def check_scale(shape_name: str, dtype: torch.dtype) -> None:
    shape, layout = SHAPES[shape_name]
    per_row = torch.randn(shape[0])
    per_row[0] = 1.0
    for scale in (torch.tensor(0.37), torch.tensor(0.37, dtype=torch.float64), torch.tensor(1.0), per_row):
        grads = [memory_like(shape, layout, dtype) for _ in range(5)]
        want = [grad.double() for grad in grads]
        reference.scale_grads_(want, scale.double())
        untouched = [grad.clone() for grad in grads]
        run("scale_grads_", [*grads, grads[0].new_empty(0)], scale)
        name = f"scale/{shape_name}/{dtype}/{scale.numel()}x{scale.flatten()[0]:g}"
        compare(name, dtype, tuple(grads), tuple(want))
        if scale.numel() == 1 and scale == 1:
            assert all(torch.equal(a, b) for a, b in zip(grads, untouched, strict=True)), name


def check_empty() -> None:
    coef = torch.randn(3, 9)
    for shape, rows in (((0, 4), 0), ((3, 0), 3)):
        x = torch.zeros(shape)
        loss, losses, grad = run("matching", x, x, None, coef[:rows], KEY, None, rows, True, True)
        assert loss == 0
        assert losses.tolist() == [0.0] * rows
        assert grad.shape == shape
        assert run("interpolate", x, coef[:rows], KEY, None, rows)[0].shape == shape


def check_normals() -> None:
    """Elementwise, as the noise contract has it: 1e-4 absolute; and what is drawn twice is the same bits."""
    for shape_name, (shape, layout) in SHAPES.items():
        like = memory_like(shape, layout, F32)
        for noise_rows in sorted({shape[0], (shape[0] + 1) // 2, (shape[0] + 2) // 3}):
            (got,) = run("normal_like", KEY, like, noise_rows)
            worst = float((got.double() - reference.normal_like(KEY, like.double(), noise_rows)).abs().max())
            name = f"normals/{shape_name}/{noise_rows}"
            print(json.dumps({"case": name, "error": worst, "tolerance": 1e-4}), flush=True)
            assert torch.equal(got, run("normal_like", KEY, like, noise_rows)[0]), name


def check_second_grid_axis() -> None:
    """Rows beyond the grid's second axis go on along the third; here with an axis of two rows."""
    before, tiles.GRID_ROWS = tiles.GRID_ROWS, 2
    try:
        case = Case("odd_row", F32, True, shared=True, endpoint=False, x_t=True)
        check_matching(case, "second_grid_axis/matching", F32, True, True)
        many = torch.randn(5, 600)
        scaled = many.clone()
        run("scale_grads_", [scaled], torch.arange(5.0))
        compare("second_grid_axis/scale", F32, (scaled,), many.double() * torch.arange(5.0)[:, None])
    finally:
        tiles.GRID_ROWS = before


def check_key_with_gaps() -> None:
    """A key's two numbers may lie apart, as columns of a stack of keys do."""
    apart = torch.stack([KEY, KEY + 7], 1)[:, 0]
    assert apart.stride() == (2,)
    like = torch.randn(3, 8)
    want = reference.normal_like(KEY, like.double(), 3)
    compare("normals/key_with_gaps", F32, run("normal_like", apart, like, 3), want)


def check_gradient_of_an_absent_state() -> None:
    """The gradient in x_t of a loss that does not read x_t is zero, and written."""
    case = Case("odd_row", F32, True, shared=False, endpoint=False, x_t=False)
    check_generator(case, "generator/absent_state", F32, (True, True, True, True), True)


def adam_arguments(tensors: dict[str, object], norm: torch.Tensor, settings: tuple[object, ...]) -> tuple[object, ...]:
    lists = (tensors[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas"))
    return *lists, norm, *(tensors[name] for name in ("step", "lr", "counts", "decays")), *settings


def check_optimiser(sizes: tuple[int, ...], emas: int, beta1: float, maximize: bool, warmup: bool, clip: float) -> None:
    """Three steps, the second with a gradient that is not finite, on the kernels and in float64."""
    tensors: dict[str, object] = {
        "params": [torch.randn(n) for n in sizes],
        "exp_avgs": [torch.zeros(n) for n in sizes] if beta1 else [],
        "exp_avg_sqs": [torch.zeros(n) for n in sizes],
        # Rows as the optimiser lays them: each from a multiple of 64 elements on.
        "emas": [torch.randn(emas, -(-n // 64) * 64)[:, :n] for n in sizes] if emas else [],
        "step": torch.tensor(0.0),
        "lr": torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64),
        "counts": torch.zeros(2, dtype=torch.int64),
        "decays": torch.tensor([0.9, 0.9999, 0.5][:emas], dtype=torch.float64),
    }

    def double(value: object) -> object:
        if isinstance(value, list):
            return [double(v) for v in value]
        if not value.is_floating_point():
            return value.clone()
        return torch.empty_strided(value.shape, value.stride(), dtype=torch.float64).copy_(value)

    twin = {name: double(value) for name, value in tensors.items()}
    settings = clip, beta1, 0.999, 1e-8, 0.01, maximize, warmup
    state = ("params", "exp_avgs", "exp_avg_sqs", "emas")
    name = f"{'x'.join(map(str, sizes))}/{emas}/{beta1:g}/{maximize:d}{warmup:d}/{clip:g}"
    for update in range(3):
        grads = [torch.randn(n) for n in sizes]
        if update == 1:
            grads[-1][-1] = (float("nan"), float("inf"))[emas % 2]
        before = [t.clone() for key in state for t in tensors[key]]
        for mine, op in ((tensors, triton_backend.launcher), (twin, lambda op: getattr(reference, op))):
            mine["grads"] = grads if mine is tensors else double(grads)
            norm = op("begin_step_")(mine["grads"], [mine["step"]], mine["counts"])
            mine["norm"] = norm
            op("adam_")(*adam_arguments(mine, norm, settings))
        after = [t for key in state for t in tensors[key]]
        if update == 1:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
        else:
            compare(f"begin_step_/{name}/{update}", F32, (tensors["norm"],), twin["norm"])
    assert torch.equal(tensors["counts"], torch.tensor([3, 1])), name
    assert torch.equal(tensors["counts"], twin["counts"]), name
    assert tensors["step"] == 2, name
    for key in state:
        compare(f"adam_/{name}/{key}", F32, tuple(tensors[key]), tuple(twin[key]))


def check_optimiser_corrections() -> None:
    """The bias corrections late in a run and for extreme decays, where ``1 - beta^step`` cancels or is 1."""
    for taken, beta1, beta2 in ((1.0, 0.5, 0.999999), (399.0, 0.999, 0.9), (1e6, 0.9, 0.999), (7.0, 0.0, 0.0)):
        p, g, v = torch.zeros(5), torch.randn(5), torch.rand(5)
        tensors = {"params": [p], "grads": [g], "exp_avgs": [torch.randn(5)], "exp_avg_sqs": [v], "emas": []}
        shared = {"step": torch.tensor(taken), "lr": torch.tensor([0.1]), "counts": torch.tensor([1, 0])}
        shared["decays"] = torch.zeros(0, dtype=torch.float64)
        twin = {name: [t.double() for t in value] for name, value in tensors.items()}
        settings = 0.0, beta1, beta2, 1e-8, 0.0, False, False
        norm = torch.linalg.vector_norm(g)
        triton_backend.launcher("adam_")(*adam_arguments({**tensors, **shared}, norm, settings))
        reference.adam_(*adam_arguments({**twin, **shared}, norm, settings))
        compare(f"adam_/corrections/{taken:g}", F32, (p,), (twin["params"][0],))


def check_optimiser_of_many() -> None:
    """More tensors than are launched one by one go to the foreach functions; further counters are counted too."""
    grads = [torch.randn(3) for _ in range(6)]
    steps, counts = [torch.tensor(0.0), torch.tensor(4.0)], torch.zeros(2, dtype=torch.int64)
    for some in (grads, grads[:2]):
        norm = triton_backend.launcher("begin_step_")(some, steps, counts)
        compare(f"begin_step_/{len(some)} tensors", F32, (norm,), torch.cat(some).double().norm())
    assert [float(step) for step in steps] == [2.0, 6.0]
    assert counts.tolist() == [2, 0]


def check_optimiser_class() -> None:
    """Flat storage end to end: what a GPU runs, beside the same optimiser on separate tensors in float64."""
    kernels = SimpleNamespace(**{op: triton_backend.launcher(op) for op in ("begin_step_", "adam_")})
    select, results = ops.current, []
    for dtype, namespace in ((F32, kernels), (torch.float64, torch.ops.realuid_fast_reference)):
        generator = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (5, 130, 1)]
        rates = torch.tensor([0.1, 0.05, 0.2], dtype=torch.float64)
        settings = {"weight_decay": 0.1, "clip": 5.0, "ema_decays": (0.9, 0.5), "ema_warmup": True}
        optimiser = FusedAdam(params, rates, (0.5, 0.9), flat=dtype == F32, **settings)
        ops.current = lambda device, namespace=namespace: namespace
        try:
            for _ in range(4):
                for p in params:
                    p.grad = torch.randn(len(p), generator=generator).to(dtype)
                optimiser.step()
        finally:
            ops.current = select
        averages = [t for d in (0.9, 0.5) for t in optimiser.averages(d).values()]
        results.append((*(p.detach() for p in params), *averages))
    compare("adam_/flat storage", F32, *results)


def check_shapes(shape_names: list[str]) -> None:
    """Every shape and layout with changing switches."""
    for i, shape_name in enumerate(shape_names):
        for dtype in (F32, BF16):
            keyed = (i + (dtype == F32)) % 2 == 0
            case = Case(shape_name, dtype, keyed, shared=i % 3 == 0, endpoint=i % 2 == 0, x_t=i % 4 < 2)
            tag = f"{shape_name}/{dtype}/{'key' if keyed else 'tensor'}"
            check_interpolate(case, f"interpolate/{tag}", dtype)
            check_error(case, f"mean_abs_error/{tag}", dtype)
            check_matching(case, f"matching/{tag}", dtype, True, True)
            check_fake(case, f"fake/{tag}", dtype, i % 2 == 0, True, True)
            alone = Case(shape_name, dtype, keyed, shared=False, endpoint=i % 2 == 1, x_t=i % 4 < 2)
            check_generator(alone, f"generator/{tag}", dtype, (True, True, True, alone.x_t is not None), True)
        check_scale(shape_name, F32)
    check_scale("short", F16)


def check_optimisers() -> None:
    check_optimiser_class()
    check_optimiser_of_many()
    check_optimiser_corrections()
    check_optimiser((6400,), 3, 0.0, False, True, 1.0)
    check_optimiser((35000,), 1, 0.9, True, False, 0.0)
    check_optimiser((1, 4099, 0, 17), 2, 0.9, False, True, 1e3)
    check_optimiser((64,), 0, 0.0, True, False, 1e-3)


def check_switches(every: int = 1) -> None:
    """Every switch and dtype on one small shape; ``every`` leaves out all settings but every so many."""
    for bits in range(0, 32, every):
        teacher, fake, x, x_t, mean = (bool(bits >> b & 1) for b in range(5))
        dtype = (F32, BF16, F16)[bits % 3]
        case = Case("short", dtype, keyed=bits % 4 < 2, shared=False, endpoint=bits % 5 < 2, x_t=x_t or bits % 2 == 0)
        check_generator(case, f"generator/switches_{bits:05b}", dtype, (teacher, fake, x, x_t), mean)
        shared = Case("short", dtype, keyed=bits % 4 < 2, shared=teacher, endpoint=fake, x_t=x)
        check_fake(shared, f"fake/switches_{bits:05b}", dtype, x_t, mean, bits % 3 == 0)
        check_matching(shared, f"matching/switches_{bits:05b}", dtype, mean, x_t)


# Images, groups: whole groups in a program; a width that is no power of two; pixels in parts; one group of all; a group
# that is wider than a program's usual columns.
NORMS = {
    "even": ((3, 16, 8, 8), 4),
    "odd": ((2, 24, 3, 7), 4),
    "one_group": ((2, 5, 4, 3), 1),
    "wide_group": ((1, 160, 2, 3), 1),
    "one_pixel": ((3, 8, 1, 1), 2),
    "parts": ((1, 12, 40, 33), 2),
}


def check_norm(name: str, dtype: torch.dtype, with_shift: bool) -> None:
    shape, groups = NORMS[name]
    x, grad = (memory_like(shape, torch.channels_last, dtype) for _ in range(2))
    # A mean that is large beside the deviation: sums of squares alone would lose it.
    x += 20
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    shift = torch.randn(shape[:2]) if with_shift else None
    forward = (x, shift, weight, bias)
    exact = tuple(None if each is None else each.double() for each in forward)
    got, want = run("norm_silu", *forward, groups, 1e-5), reference.norm_silu(*exact, groups, 1e-5)
    tag = f"{name}/{dtype}/{'shift' if with_shift else 'plain'}"
    # A mean of 20 is rounded by 2^-24 of itself, in units of the deviation, 1: 20 times a number's own rounding.
    compare(f"norm_silu/{tag}", dtype, got, want)
    got, want = (
        run("norm_silu_grads", grad, *forward, got[1]),
        reference.norm_silu_grads(grad.double(), *exact, want[1]),
    )
    compare(f"norm_silu_grads/{tag}", dtype, got, want)
    if with_shift:
        return
    got, want = (
        run("group_norm", x, *forward[2:], groups, 1e-5),
        reference.group_norm(exact[0], *exact[2:], groups, 1e-5),
    )
    compare(f"group_norm/{tag}", dtype, got, want)
    got, want = (
        run("group_norm_grads", grad, x, weight, got[1]),
        reference.group_norm_grads(grad.double(), exact[0], exact[2], want[1]),
    )
    compare(f"group_norm_grads/{tag}", dtype, got, want)


def check_norms(names: list[str]) -> None:
    for i, name in enumerate(names):
        for j, dtype in enumerate((F32, BF16, F16)):
            check_norm(name, dtype, (i + j) % 2 == 0)
    x, weight = torch.zeros(0, 4, 2, 2).contiguous(memory_format=torch.channels_last), torch.ones(4)
    y, statistics = run("norm_silu", x, None, weight, weight, 2, 1e-5)
    assert (y.shape, statistics.shape) == (x.shape, (0, 2, 2))
    assert run("norm_silu_grads", x, x, None, weight, weight, statistics)[2].tolist() == [0.0] * 4
    assert run("group_norm_grads", x, x, weight, statistics)[1].tolist() == [0.0] * 4


def check_all() -> None:
    check_normals()
    check_empty()
    check_second_grid_axis()
    check_key_with_gaps()
    check_gradient_of_an_absent_state()
    check_shapes(list(SHAPES))
    check_optimisers()
    check_switches()
    check_norms(list(NORMS))
