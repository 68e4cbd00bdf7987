"""Random calls of every operator and every fused call: each gives what float64 gives, or refuses by name.

The arguments are drawn from the operators' schemas: shapes, layouts, offsets, types, aliases, extreme numbers, then one
argument may be replaced by something that does not belong there. ``REALUID_FAST_FUZZ=10000`` sets the number of
examples of each operator (``make fuzz``). Negative strides are not among them: torch has none, ``flip`` makes a copy.
"""

import contextlib
import functools
import math
import os
import random
import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import realuid_fast as rf
from realuid_fast import ops as operators
from realuid_fast.errors import UserError
from realuid_fast.ops import extension, philox

needs_extension = pytest.mark.skipif(extension.why_missing() is not None, reason=str(extension.why_missing()))
ops, reference = torch.ops.realuid_fast, torch.ops.realuid_fast_reference

EXAMPLES = int(os.environ.get("REALUID_FAST_FUZZ", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 100,
    database=None,
    print_blob=True,  # a failure of random calls can be run again from its output
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Below, at and beyond a vector, a group of noise, what is drawn in registers, a block and a thread's share.
LONG = (1, 2, 3, 4, 7, 16, 63, 255, 257, 300, 4095, 4097, 9001)
EXTREMES = (-(2**63), -1, 0, 2**31, 2**62, 2**63 - 1)
OPTIMISER = ("begin_step_", "adam_")
FUSED = [
    op
    for op in (
        *(operator.name for operator in operators.KERNELS),
        *(f"{x.kernel}_loss" for x in operators.LOSSES),
    )
    if op not in (*OPTIMISER, "scale_grads_")
]
LAYERS = [operator.name for operator in operators.LAYERS]
# Below, at and beyond a vector and a panel.
CHANNELS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 33)


def schema(op):
    return getattr(ops, op).default._schema.arguments


def outputs(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def widened(value):
    if isinstance(value, (list, tuple)):
        return [widened(v) for v in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value.clone() if isinstance(value, torch.Tensor) else value
    # Every argument its own memory, whatever it shared; the layout stays.
    return torch.empty_like(value, dtype=torch.float64).copy_(value.detach())


def shaken(value, eps, generator):
    if isinstance(value, (list, tuple)):
        return [shaken(v, eps, generator) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value + value * eps * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    if isinstance(value, float):
        return value * (1 + eps * torch.randn((), generator=generator).item())
    return value


def as_they_share(arguments, change=lambda memory: memory):
    """Copies of the tensors among named arguments that share memory with each other where those do.

    ``change`` is done to every piece of memory.
    """
    pieces = {}

    def copied(value):
        if isinstance(value, list):
            return [copied(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in pieces:
            pieces[storage._cdata] = change(torch.empty(0, dtype=value.dtype).set_(storage).clone())
        view = pieces[storage._cdata].as_strided(value.shape, value.stride(), value.storage_offset())
        return view.neg() if value.is_neg() else view

    return {name: copied(value) for name, value in arguments.items()}


def plain(value):
    """Whether a tensor is memory that is there and how it is laid out, and nothing else; whether all of a list are."""
    if isinstance(value, list):
        return all(map(plain, value))
    if not isinstance(value, torch.Tensor):
        return True
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return False
    last = value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return value.numel() == 0 or value.untyped_storage().nbytes() > last * value.element_size()


def assert_agrees(found, evaluate, arguments, terms=None, widen=None):
    """``found`` is ``evaluate(arguments in float64)`` but for rounding.

    The yardstick is what the result changes by when every input changes in its last place, 256 times that: random
    changes cancel by luck, and sums of thousands of elements round more than once. Results are then rounded once to
    their own type. ``terms`` tells of some results how large the terms are whose sum they are: they may cancel whatever
    the inputs.
    """
    widen = widen or widened_all
    expected = evaluate(widen(arguments))
    assert len(found) == len(expected)
    eps = 2**-52 if any(t.dtype == torch.float64 for t in found) else 2**-23
    generator = torch.Generator().manual_seed(0)
    doubt = [0.0] * len(found)
    # Normals of a key differ by up to 1e-6 from the exact ones in single precision, whatever their size.
    absolute = 1e-6 if eps > 1e-10 else 1e-14
    for _ in range(4):
        wide = widen(arguments)
        if widen is widened_all:
            near = {name: shaken(value, eps, generator) for name, value in wide.items()}
        else:
            near = as_they_share(wide, lambda memory: shaken(memory, eps, generator))
        if is_key(arguments.get("noise")):
            near["noise"] = wide["noise"] + absolute * torch.randn(
                wide["noise"].shape, generator=generator, dtype=torch.float64
            )
        for i, (a, b) in enumerate(zip(evaluate(near), expected, strict=True)):
            doubt[i] = math.hypot(doubt[i], norm(a - b))
    for i, size in (terms or {}).items():
        doubt[i] = math.hypot(doubt[i], eps * size / 16)
    if "key" in arguments:
        doubt = [absolute * math.sqrt(t.numel()) for t in found]
    for i, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        got = got.to_dense() if got.layout != torch.strided else got
        assert got.shape == wanted.shape
        assert torch.equal(got.isnan(), wanted.isnan()), f"result {i} is NaN elsewhere"
        kind = torch.finfo(got.dtype)
        # What is nearly too large for the type may be infinite, or not.
        small = wanted.nan_to_num(0.0, math.inf, -math.inf).abs() < kind.max / 2
        got, wanted = got[small], wanted[small]
        # Rounded to nearest, or to the grid below the normal numbers. Where the reference has no more places than the
        # result, both of them round, and their sums once on every level.
        places = 1.0
        if got.dtype == torch.float64:
            places += math.log2(
                max((v.numel() for v in arguments.values() if isinstance(v, torch.Tensor)), default=1) + 1
            )
        rounding = places * kind.eps * norm(wanted) + kind.eps * kind.smallest_normal * math.sqrt(
            max(wanted.numel(), 1)
        )
        error = norm(got.double() - wanted)
        assert error <= 256 * doubt[i] + rounding, f"result {i}: error {error:.2e}, rounding explains {doubt[i]:.2e}"
        if kind.bits == 16:
            # Rounded each by itself at the end: of many elements none may hide behind the others' size.
            beyond = (got.double() - wanted).abs() - kind.eps * wanted.abs() - kind.eps * kind.smallest_normal
            assert largest(beyond.clamp(min=0.0).nan_to_num(0.0)) <= 256 * doubt[i], f"result {i}: an element is off"


def is_key(noise):
    return isinstance(noise, torch.Tensor) and noise.dtype == torch.int64


def widened_all(arguments):
    wide = {name: widened(value) for name, value in arguments.items()}
    if is_key(wide.get("noise")):
        like = wide["grad"] if "grad" in wide else wide["x"]
        rows = min(arguments.get("noise_rows") or like.shape[0], like.shape[0])
        wide["noise"] = reference.normal_like(wide["noise"], like[:rows], max(rows, 1))
        if "noise_rows" in wide:
            wide["noise_rows"] = max(rows, 1)
    if "noise_rows" in wide and "x" in wide:
        wide["noise_rows"] = min(wide["noise_rows"] or wide["x"].shape[0], max(wide["x"].shape[0], 1))
    if "like" in wide:
        wide["noise_rows"] = min(wide["noise_rows"], max(wide["like"].shape[0], 1))
    return wide


def norm(tensor):
    return tensor.nan_to_num(0.0, 0.0, 0.0).norm().item() if tensor.numel() else 0.0


class Batch:
    """Tensors of one call: shape, layout and type alike, each with its own offset, perhaps in the same memory."""

    def __init__(self, draw, public):
        dims = draw(st.integers(1, 5))
        sizes = [draw(st.integers(0, 6)) for _ in range(dims)]
        if dims > 1 and draw(st.booleans()):
            sizes = [*sizes[:1], *(min(s, 2) for s in sizes[1:-1]), draw(st.sampled_from(LONG))]
        self.shape = tuple(sizes)
        inner = list(range(1, dims))
        if dims in (4, 5) and draw(st.booleans()):
            inner = [*inner[1:], 1]
        elif not public and draw(st.integers(0, 4)) == 0:
            inner = draw(st.permutations(inner))
        self.order = [0, *inner]
        self.dtype = draw(st.sampled_from(DTYPES))
        self.real = torch.float64 if self.dtype == torch.float64 else torch.float32
        # One drawn number decides everything that is no matter of shape: drawing each by itself would take longer than
        # the calls.
        seed = draw(st.integers(0, 2**32))
        self.generator, self.pick = torch.Generator().manual_seed(seed), random.Random(seed)
        self.shared = self.chance(4)
        self.scale = self.pick.choice((1.0, 1.0, 0.0, 1e-2, 30.0))
        self.pool = self.random(math.prod(self.shape) + 9)

    def chance(self, one_in):
        return self.pick.randrange(one_in) == 0

    @property
    def rows(self):
        return self.shape[0]

    def random(self, *shape, dtype=None):
        return (torch.randn(shape, generator=self.generator) * self.scale).to(dtype or self.dtype)

    def strides(self, shape):
        strides, step = [0] * len(shape), 1
        for d in reversed(self.order):
            strides[d] = step
            step *= max(shape[d], 1)
        return strides

    def tensor(self, rows=None):
        shape = (self.rows if rows is None else rows, *self.shape[1:])
        offset = self.pick.randrange(9)
        memory = self.pool if self.shared and math.prod(shape) + 9 <= len(self.pool) else None
        memory = self.random(math.prod(shape) + 9) if memory is None else memory
        return memory.as_strided(shape, self.strides(shape), offset)

    def coef(self, zero):
        coef = torch.randn((self.rows, 9), generator=self.generator).to(self.real)
        coef[:, [*zero, *(c for c in range(9) if self.chance(6))]] = 0
        if self.rows and self.chance(10):
            coef[self.pick.randrange(self.rows), self.pick.choice((0, 2, 3, 5, 6, 8))] = math.nan
        return coef

    def noise(self, rows):
        if self.chance(2):
            return torch.tensor([self.pick.randrange(-(2**63), 2**63) for _ in range(2)])
        return self.tensor(min(rows, self.rows))

    def number(self):
        """A scalar of an objective: small beside the others at times."""
        return self.pick.choice((0.0, 1.0, 0.92, 0.94, 1e-6, self.pick.randint(-2000, 2000) / 1000))


def fused_arguments(op, batch):
    """Arguments that ``op`` must compute with, by name."""
    wanted = schema(op)
    names = [argument.name for argument in wanted]
    present = {name for name in ("x_t", "endpoint", "teacher_out") if name in names and batch.chance(2)}
    if "guidance" in names and batch.chance(2):
        present |= {"teacher_uncond", "guidance"}
    if "q_rows" in names and batch.chance(2):
        present.add("q_rows")
    noise_rows = batch.pick.choice(
        (batch.pick.randint(1, max(batch.rows, 1)), max(batch.rows, 1), batch.rows + 3, 2**63 - 1)
    )
    arguments = {}
    for argument in wanted:
        name, kind = argument.name, str(argument.type)
        if name == "coef":
            zero = [
                c
                for n, columns in (("x_t", [7]), ("endpoint", [1, 4]))
                if n in names and n not in present
                for c in columns
            ]
            arguments[name] = batch.coef(zero)
        elif name == "guidance":
            if kind == "Tensor" or name in present:
                arguments[name] = 1 + torch.rand(batch.rows, generator=batch.generator).to(batch.real)
            else:
                arguments[name] = None
        elif name == "q_rows":
            of_rows = torch.randn(batch.rows, generator=batch.generator).to(batch.real)
            arguments[name] = of_rows if name in present else None
        elif name == "key":
            arguments[name] = torch.tensor([batch.pick.randrange(-(2**63), 2**63), batch.pick.randrange(2**40)])
        elif name == "noise":
            arguments[name] = batch.noise(noise_rows if "noise_rows" in names else batch.rows)
        elif kind == "Tensor" or (kind == "Optional[Tensor]" and name in present):
            arguments[name] = batch.tensor()
        elif name == "noise_rows":
            arguments[name] = noise_rows
        elif name == "n_real":
            arguments[name] = batch.pick.randint(0, batch.rows)
        elif kind == "float":
            arguments[name] = batch.number()
        elif kind == "bool":
            arguments[name] = batch.chance(2)
        elif not argument.has_default_value():
            arguments[name] = None
    if "x_t" in names and "x_t" not in present and "want_x_t" in names:
        arguments["want_x_t"] = False
    if "n_real" in names and arguments["teacher_out"] is None:
        arguments["d_gen"] = arguments["d_real"] = 0.0
    return arguments


def evaluate_with(op):
    return lambda wide: outputs(getattr(reference, op)(**wide))


def strided(tensor, factor=2):
    room = torch.zeros(
        max(1, sum((n - 1) * s * factor for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1)
    )
    view = room.to(tensor.dtype).as_strided(tensor.shape, [s * factor for s in tensor.stride()])
    return view.copy_(tensor) if tensor.numel() else view


def overlapping(tensor):
    """Every element in the memory of the next row's: strides that lead over the same place twice."""
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype).as_strided(tensor.shape, [1] * tensor.dim())


def freed(tensor):
    tensor = tensor.new_ones(tensor.shape or 1)
    if not tensor.numel():
        raise ValueError("there is nothing to free")
    tensor.untyped_storage().resize_(0)
    return tensor


def huge(tensor):
    return tensor.new_zeros(()).expand(2**40, *tensor.shape[1:])


STRIDED = {
    "another type": lambda t, pick: t.to(
        pick((*DTYPES, torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64))
    ),
    "a dimension more": lambda t, pick: t.unsqueeze(pick((0, -1))),
    "a dimension less": lambda t, pick: t.sum(pick(range(t.dim()))) if t.dim() else t.reshape(1),
    "a row more": lambda t, pick: torch.cat([t, t[:1]]) if t.dim() and t.shape[0] else t.unsqueeze(0),
    "a row less": lambda t, pick: t[1:] if t.dim() else t,
    "gaps": lambda t, pick: strided(t),
    "rows innermost": lambda t, pick: t.t().contiguous().t() if t.dim() == 2 else t.movedim(0, -1),
    "one element for all": lambda t, pick: t.new_zeros(()).expand(t.shape),
    "overlap": lambda t, pick: overlapping(t),
    "more rows than memory": lambda t, pick: huge(t) if t.dim() else t,
    "empty": lambda t, pick: t.new_empty(0),
    "many empty rows": lambda t, pick: t.new_empty(2**40, 0),
    "flipped": lambda t, pick: t.flip(list(range(t.dim()))),
    "negated lazily": lambda t, pick: torch._neg_view(t) if t.is_floating_point() else t,
    "a gradient": lambda t, pick: t.detach().requires_grad_() if t.is_floating_point() else t,
}
# Refused by torch itself where a kernel has no place for them, without our names.
ELSEWHERE = {
    "no memory": lambda t, pick: freed(t),
    "meta": lambda t, pick: t.to("meta"),
    "sparse": lambda t, pick: t.to_sparse(),
    "compressed": lambda t, pick: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "quantised": lambda t, pick: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "mkldnn": lambda t, pick: t.float().to_mkldnn(),
    "nested": lambda t, pick: torch.nested.nested_tensor([t, t]),
    "missing": lambda t, pick: None,
}
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)


def spoil(draw, arguments, leave_out=()):
    """One argument replaced; what by, or None where it could not be made."""
    name = draw(
        st.sampled_from(sorted(n for n, v in arguments.items() if not isinstance(v, (bool, float)) and v is not None))
    )
    value = arguments[name]
    if isinstance(value, int):
        arguments[name] = draw(st.sampled_from(EXTREMES))
        return name
    what = draw(st.sampled_from(sorted((STRIDED | ELSEWHERE).keys() - set(leave_out))))
    note(f"{name}: {what}")

    def pick(choices):
        return draw(st.sampled_from(list(choices)))

    def changed(tensor):
        return (STRIDED | ELSEWHERE)[what](tensor, pick)

    try:
        if isinstance(value, list):
            i = draw(st.integers(0, len(value) - 1))
            arguments[name] = [changed(t) if i == k else t for k, t in enumerate(value)]
        else:
            arguments[name] = changed(value)
    except REFUSALS:
        return None
    return what


def assert_named(error, what, names):
    # torch itself refuses to write into a list of lazily negated tensors.
    if what not in ELSEWHERE and "negation" not in str(error):
        assert any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names), f"{what}: {error}"


def check_spoiled(call, evaluate, arguments, what, names, terms=lambda arguments: None):
    """``call()`` refuses, naming an argument where the fault is ours to see, or computes what float64 does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call()
    except REFUSALS as error:
        assert_named(error, what, names)
        return
    assert what not in ("meta", "no memory", "more rows than memory", "many empty rows") or all(
        t.numel() == 0 or t.device.type == "meta" for t in found
    ), f"{what} was computed with"
    if what != "more rows than memory" and all(t.device.type != "meta" for t in found):
        assert_agrees([t.detach() for t in found], evaluate, arguments, terms(arguments))


@contextlib.contextmanager
def silence():
    # Deprecated tensor kinds warn when they are made.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    if op.startswith("guided"):
        guidance = wide.pop("guidance").view(-1, *[1] * (teacher.dim() - 1))
        uncond = wide.pop("teacher_uncond")
        teacher = uncond + guidance * (teacher - uncond)
    for half in ("gen", "real"):
        a, b, d = (wide[f"{name}_{half}"] for name in "abd")
        by_a = 2 / abs(a) if a and max(abs(b), abs(d)) <= 16 * abs(a) else 0.0
        wide |= {f"a_{half}": by_a * d**2, f"b_{half}": 0.0, f"d_{half}": 0.0, f"c_{half}": by_a * b**2}
    wide |= {"fake_out": teacher, "teacher_out": None, "mean": True, "want_fake": False}
    rows = reference.fake(**wide)[1].nan_to_num(0.0, 0.0, 0.0).abs().sum().item()
    # The mean's own factor is at most 1.
    return {0: rows} if op.endswith("loss") else {0: rows, 1: rows}


def check_operator(op, arguments, draw, terms=lambda arguments: None):
    """The call gives what float64 gives, and with one argument replaced that or a refusal."""

    def run():
        return outputs(getattr(ops, op)(**arguments))

    assert_agrees(run(), evaluate_with(op), arguments, terms(arguments))
    with silence():
        before = dict(arguments)
        what = spoil(draw, arguments)
        if what is not None:
            # What a fused call does without must have no say in its result: a column of zeros, or no rows. For q_rows
            # there is q.
            without_say = what == "missing" and op in FUSED and before.get("q_rows") is arguments.get("q_rows")
            given = before if without_say else arguments
            check_spoiled(run, evaluate_with(op), given, what, [argument.name for argument in schema(op)], terms)


class Layer:
    """Images of one call, each with its own offset and perhaps in the same memory, and the parameters beside them."""

    def __init__(self, draw, least=0):
        self.batch, self.height, self.width = (draw(st.integers(least, most)) for most in (3, 9, 9))
        self.channels, self.out = (draw(st.sampled_from([c for c in CHANNELS if c >= least])) for _ in range(2))
        self.dtype = draw(st.sampled_from(DTYPES))
        self.real = torch.float64 if self.dtype == torch.float64 else torch.float32
        seed = draw(st.integers(0, 2**32))
        self.generator, self.pick = torch.Generator().manual_seed(seed), random.Random(seed)
        self.groups = self.pick.choice([g for g in range(1, self.channels + 1) if self.channels % g == 0] or [1])
        self.scale = self.pick.choice((1.0, 1.0, 0.0, 1e-2, 30.0))
        self.pool = self.random(self.batch * max(self.channels, self.out) * self.height * self.width + 9)

    def random(self, *shape, dtype=None):
        return (torch.randn(shape, generator=self.generator) * self.scale).to(dtype or self.dtype)

    def images(self, channels):
        shape = (self.batch, channels, self.height, self.width)
        memory = self.pool if self.pick.randrange(4) == 0 else self.random(math.prod(shape) + 9)
        strides = [channels * self.height * self.width, 1, channels * self.width, channels]
        # The stride of a dimension of size 1 says nothing.
        strides = [self.pick.choice((0, 1, s, 1000)) if n == 1 else s for n, s in zip(shape, strides, strict=True)]
        return memory.as_strided(shape, strides, self.pick.randrange(9))

    def filters(self):
        """3x3 filters with their dimensions in any order, perhaps with gaps, perhaps some of them the same memory."""
        sizes, order = (self.out, self.channels, 3, 3), self.pick.sample(range(4), 4)
        weight = self.random(*(sizes[d] for d in order), dtype=self.real).permute([order.index(d) for d in range(4)])
        return self.pick.choice((weight, weight, strided(weight), weight[:1, :1].expand(sizes)))

    def of_channels(self, channels):
        return self.random(channels, dtype=self.real)

    def maybe(self, value):
        return self.pick.choice((None, value))

    def arguments(self, op):
        x = self.images(self.channels)
        if op.startswith("conv"):
            weight = self.filters()
            if op == "conv3x3":
                return {"x": x, "weight": weight, "bias": self.maybe(self.of_channels(self.out))}
            wants = {name: self.pick.choice((True, False)) for name in ("want_x", "want_weight")}
            return {"grad": self.images(self.out), "x": x, "weight": weight, **wants}
        shift = self.maybe(self.random(self.batch, self.channels, dtype=self.real))
        weight, bias = self.of_channels(self.channels), self.of_channels(self.channels)
        common = {"x": x, "shift": shift, "weight": weight, "bias": bias}
        if op == "norm_silu":
            return {**common, "groups": self.groups, "eps": self.pick.choice((1e-5, 1e-2))}
        statistics = self.random(self.batch, self.groups, 2, dtype=self.real)
        return {"grad": self.images(self.channels), **common, "statistics": statistics}


@needs_extension
@pytest.mark.parametrize("op", LAYERS)
@fuzzed
@given(st.data())
def test_layer_operator(op, data):
    layer = Layer(data.draw)
    if op.startswith("norm") and layer.channels == 0:
        with pytest.raises(RuntimeError, match="groups must divide the 0 channels of x"):
            getattr(ops, op)(**layer.arguments(op))
        return
    check_operator(op, layer.arguments(op), data.draw, layer_terms)


def largest(tensor):
    return tensor.abs().max().item() if tensor is not None and tensor.numel() else 0.0


def layer_terms(arguments):
    return norm_terms(arguments) if "shift" in arguments else conv_terms(arguments)


def conv_terms(arguments):
    """What a convolution's results are made of by Winograd's filtering: of whole filters and whole patches.

    Of an image of one pixel only the filters' middle counts. The others' part of it cancels but for its rounding, which
    is all there is to see where they are large beside the middle.
    """
    wide = widened_all(arguments)
    if "grad" not in wide:
        return {0: norm(wide["x"]) * norm(wide["weight"])}
    return {0: norm(wide["grad"]) * norm(wide["weight"]), 1: norm(wide["grad"]) * norm(wide["x"])}


def norm_terms(arguments):
    """What a normalisation's results are made of, which cancels where a group has but few values.

    ``z = h weight rstd + (bias - mean weight rstd)`` loses the mean; a gradient in ``h`` its mean over the group and
    its part along ``n``, of which ``h rstd`` is a term.
    """
    wide = widened_all(arguments)
    x, shift, weight = wide["x"], wide["shift"], wide["weight"]
    statistics = wide.get("statistics")
    if statistics is None:
        statistics = reference.norm_silu(**{name: wide[name] for name in wide if name != "grad"})[1]
    rstd, h = largest(statistics[..., 1]), x if shift is None else x + shift[..., None, None]
    if "grad" not in arguments:
        return {0: norm(h) * rstd * largest(weight)}
    size = norm(wide["grad"]) * (1 + rstd) * (1 + largest(weight)) * (1 + rstd * largest(h))
    return dict.fromkeys(range(4), size)


def plain_conv3x3(x, weight, bias):
    # torch's own way back refuses filters in some orders.
    return F.conv2d(x, weight.contiguous(), bias, padding=1)


def plain_norm_silu(x, shift, weight, bias, groups, eps):
    # Written out: torch's own way back reads memory it has not got where its input wants no gradient.
    h = x if shift is None else x + shift[..., None, None]
    grouped = h.reshape(h.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    n = centred * (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    return F.silu(n.reshape(h.shape) * weight[:, None, None] + bias[:, None, None])


PLAIN = {"conv3x3": plain_conv3x3, "norm_silu": plain_norm_silu}


@needs_extension
@pytest.mark.parametrize("op", PLAIN)
@fuzzed
@given(st.data())
def test_layer_gradients(op, data):
    """Whatever requires a gradient and in whatever layout the incoming one comes: torch's own layers in float64."""
    layer = Layer(data.draw, least=1)
    arguments = layer.arguments(op)
    floats = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    wanted = [name for name in floats if layer.pick.randrange(2)]
    channels = layer.out if op == "conv3x3" else layer.channels
    grad = layer.images(channels)
    grad = layer.pick.choice((grad, grad.contiguous(), grad[:1, :1, :1, :1].expand(grad.shape)))

    def results(function):
        def evaluate(arguments):
            arguments = dict(arguments)
            grad = arguments.pop("grad")
            leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
            y = function(**arguments | leaves)
            y = y[0] if isinstance(y, tuple) else y
            assert y.requires_grad == bool(wanted)
            return [y.detach(), *(torch.autograd.grad(y, list(leaves.values()), grad) if wanted else ())]

        return evaluate

    arguments["grad"] = grad
    found = results(getattr(ops, op))(arguments)
    of_y = layer_terms({name: value for name, value in arguments.items() if name != "grad"})
    of_grads = layer_terms(arguments)
    if op == "conv3x3":
        of_grads = dict(zip(("x", "weight"), of_grads.values(), strict=True))
        terms = of_y | {i: of_grads[name] for i, name in enumerate(wanted, 1) if name in of_grads}
    else:
        terms = dict.fromkeys(range(len(found)), of_grads[0]) | of_y
    assert_agrees(found, results(PLAIN[op]), arguments, terms)


def in_place(op, namespace, written):
    """``op`` on its own copies of what it writes, returned behind its result, as a function of named arguments."""

    def evaluate(arguments):
        arguments = {
            name: ([t.clone() for t in value] if isinstance(value, list) else value.clone())
            if name in written
            else value
            for name, value in arguments.items()
        }
        result = getattr(namespace, op)(**arguments)
        changed = [arguments[name] for name in written]
        flat = [t for value in changed for t in (value if isinstance(value, list) else [value])]
        return [*([] if result is None else [result]), *(t for t in flat if t.is_floating_point())]

    return evaluate


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


# Arguments of the optimiser's step that hold numbers, by the reference's shape.
NUMBERS = {"norm": (), "step": (), "lr": (-1,), "counts": (2,), "ema_decays": (-1,)}


def check_list_op(op, written, arguments, draw, exact=None):
    """As the two tests of the fused operators, for one that writes into lists of tensors.

    ``exact`` takes the place of the reference's own result, from the arguments.
    """
    names = [argument.name for argument in schema(op)]

    def evaluate(wide):
        found = in_place(op, reference, written)(wide)
        return found if exact is None else [exact(wide), *found[1:]]

    assert_agrees(in_place(op, ops, written)(arguments), evaluate, arguments)
    with silence():
        what = spoil(draw, arguments)
        if what is None:
            return
        before = {name: bits(value) for name, value in arguments.items()}
        comparable = all(map(plain, arguments.values()))
        copy = as_they_share(arguments) if comparable else None
        try:
            # The clones of in_place would undo what was spoiled, so this runs on the arguments themselves.
            result = getattr(ops, op)(**arguments)
        except REFUSALS as error:
            assert_named(error, what, names)
            assert {name: bits(value) for name, value in arguments.items()} == before, (
                "a refused call has changed something"
            )
            return
    assert comparable, f"{what} was computed with"

    def results(result, arguments):
        flat = [
            t for name in written for t in (arguments[name] if isinstance(arguments[name], list) else [arguments[name]])
        ]
        return [*([] if result is None else [result]), *(t.detach() for t in flat if t.is_floating_point())]

    @torch.no_grad()
    def evaluate_shared(wide):
        # The operator counts the elements of what holds numbers, the reference wants their shapes.
        numbers = {name: value for name, value in wide.items() if name in NUMBERS}
        wide |= {name: value.reshape(NUMBERS[name]) for name, value in numbers.items()}
        if "scale" in wide and wide["scale"].dim() > 1:
            wide["scale"] = wide["scale"].flatten()
        wanted = None if exact is None else exact(wide)
        found = results(getattr(reference, op)(**wide), wide)
        return found if exact is None else [wanted, *found[1:]]

    def widen(given):
        return as_they_share(given, lambda memory: memory.double() if memory.is_floating_point() else memory)

    assert_agrees(results(result, arguments), evaluate_shared, copy, widen=widen)


def bits(value):
    """The content of a tensor, for comparison; None if it cannot be read."""
    if isinstance(value, list):
        return [bits(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    if not plain(value) or value.numel() > 2**20 or value.untyped_storage().nbytes() == 0:
        return None
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach()).flatten().view(torch.uint8).tolist()


def parameters(draw, generator, dtype):
    """Shapes and layouts of a few parameters, as a function that draws tensors like them."""
    count = draw(st.integers(1, 4))
    shapes = [tuple(draw(st.lists(st.integers(0, 5), max_size=4))) for _ in range(count)]
    if draw(st.integers(0, 3)) == 0:
        shapes[0] = (draw(st.sampled_from(LONG)),)
    orders = [draw(st.permutations(range(len(shape)))) for shape in shapes]

    def like(*lead):
        tensors = []
        for shape, order in zip(shapes, orders, strict=True):
            strides, step = [0] * len(shape), 1
            for d in reversed(order):
                strides[d] = step
                step *= max(shape[d], 1)
            room = torch.randn(math.prod(lead) * step + 3, generator=generator).to(dtype)
            tensors.append(room.as_strided((*lead, *shape), (*[step] * len(lead), *strides), draw(st.integers(0, 3))))
        return tensors

    return like


@needs_extension
@fuzzed
@given(st.data())
def test_begin_step(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    grads = parameters(draw, generator, draw(st.sampled_from((torch.float32, torch.float64))))()
    if draw(st.integers(0, 9)) == 0 and grads[0].numel():
        grads[0][(0,) * grads[0].dim()] = math.inf
    steps = [torch.tensor(float(draw(st.integers(0, 9)))) for _ in range(draw(st.integers(0, 3)))]
    counts = torch.tensor([draw(st.integers(0, 9)), 0])
    written = ("steps", "counts")

    def exact(wide):
        """The norm: the reference's own sum in float64 is off by more places than the kernel's."""
        squares = (value * value for grad in wide["grads"] for value in grad.flatten().tolist())
        return wide["grads"][0].new_tensor(math.sqrt(math.fsum(squares)), dtype=torch.float64)

    arguments = {"grads": grads, "steps": steps, "counts": counts}
    check_list_op("begin_step_", written, arguments, draw, exact)


@needs_extension
@fuzzed
@given(st.data())
def test_adam(data):
    draw = data.draw
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    like = parameters(draw, generator, dtype)
    rows, beta1 = draw(st.integers(0, 3)), draw(st.sampled_from((0.0, 0.5, 0.9)))
    arguments = {
        "params": like(),
        "grads": like(),
        "exp_avgs": like() if beta1 or draw(st.booleans()) else [],
        "exp_avg_sqs": [t.square_() for t in like()],
        "emas": like(rows) if rows else [],
        "norm": torch.tensor(draw(st.sampled_from((0.0, 0.5, 3.0, math.inf, math.nan))), dtype=dtype),
        "step": torch.tensor(float(draw(st.integers(1, 9)))),
        "lr": torch.rand(draw(st.integers(1, 3)), generator=generator, dtype=torch.float64),
        "counts": torch.tensor([draw(st.integers(1, 9)), 0]),
        "ema_decays": torch.rand(rows, generator=generator, dtype=torch.float64),
        "clip": draw(st.sampled_from((0.0, 1.0))),
        "beta1": beta1,
        "beta2": draw(st.sampled_from((0.9, 0.999))),
        "eps": draw(st.sampled_from((1e-8, 1e-2))),
        "weight_decay": draw(st.sampled_from((0.0, 0.1))),
        "maximize": draw(st.booleans()),
        "ema_warmup": draw(st.booleans()),
    }
    for argument in schema("adam_"):
        if argument.name not in arguments and not argument.has_default_value():
            arguments[argument.name] = []
    lists = ["params", "grads", "exp_avgs", "exp_avg_sqs", "emas"]
    written = [name for name in lists if name != "grads"]
    check_list_op("adam_", written, arguments, draw)


@needs_extension
@fuzzed
@given(st.data())
def test_adam_refuses_memory_that_it_would_write_twice(data):
    draw = data.draw
    like = parameters(draw, torch.Generator().manual_seed(0), torch.float32)
    lists = {name: like() for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    lists["emas"] = like(2)
    one, other = draw(st.permutations(sorted(lists)))[:2]
    i = draw(st.integers(0, len(lists["params"]) - 1))
    tensor = lists[other][i][0] if other == "emas" else lists[other][i]
    if tensor.numel() == 0:
        return
    room = tensor.as_strided((2, *tensor.shape), (0, *tensor.stride())) if one == "emas" else tensor
    lists[one] = [room if k == i else t for k, t in enumerate(lists[one])]
    numbers = [
        torch.tensor(1.0),
        torch.tensor(1.0),
        torch.tensor([0.1]),
        torch.tensor([1, 0]),
        torch.tensor([0.9, 0.99]),
    ]
    with pytest.raises(RuntimeError, match="must not share memory with"):
        ops.adam_(*(lists[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")), *numbers,
                  1.0, 0.5, 0.9, 1e-8, 0.0, False, False)  # fmt: skip


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


@pytest.mark.skipif("REALUID_FAST_SANITIZE" not in os.environ, reason="for `make sanitize`")
def test_what_runs_here_is_the_sanitized_build():
    library = extension._library()
    assert b"__asan_report_load" in library.read_bytes()
    assert b"__ubsan_handle" in library.read_bytes()


def test_going_back_through_updated_parameters_is_refused():
    """As after torch's own optimisers: the saved weights are not what they were."""
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    optimiser = rf.optim.FusedAdam([p], lr=0.1)
    p.grad = torch.ones(3)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


THREADS = 4


def together(work):
    """``work(i)`` of every i at once, each in its own thread, released at one moment; the results in order."""
    results, gate = [None] * THREADS, threading.Barrier(THREADS)

    def run(i):
        gate.wait()
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_threads_get_the_same_bits_on_shared_inputs():
    generator = torch.Generator().manual_seed(1)
    teacher, fake, x = (torch.randn(8, 5000, generator=generator) for _ in range(3))
    coef = rf.paths.Linear().coefficients(torch.rand(8, generator=generator))
    key = rf.NoiseStream(5).next_key()
    objective = rf.objectives.RealUID(0.92, 0.94)

    def calls(_):
        leaf = fake.detach().requires_grad_()
        rf.functional.fake_loss(
            objective, fake_out=leaf, x=x, x_t=None, coef=coef, noise=key, n_real=4, noise_rows=4
        ).backward()
        return [
            rf.interpolate(x, coef, key),
            *rf.functional.matching_grads(out=fake, x=x, x_t=None, coef=coef, noise=key),
            *rf.functional.fake_grads(
                objective, fake_out=fake, x=x, x_t=None, coef=coef, noise=key, n_real=4, noise_rows=4
            ),
            *(
                t
                for t in rf.functional.generator_grads(
                    objective, teacher_out=teacher, fake_out=fake, x=x, x_t=None, coef=coef, noise=key
                )
                if t is not None
            ),
            leaf.grad,
        ]

    alone = calls(0)
    for _ in range(5):
        assert all(same(found, alone) for found in together(calls))


@needs_extension
def test_threads_get_the_same_bits_of_layers():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 32, 9, 9, generator=generator).contiguous(memory_format=torch.channels_last)
    conv, norm = torch.randn(32, 32, 3, 3, generator=generator), torch.randn(2, 32, generator=generator)

    def calls(_):
        leaves = [t.detach().requires_grad_() for t in (x, conv, *norm)]
        h, _ = ops.norm_silu(leaves[0], None, leaves[2], leaves[3], 8, 1e-5)
        y = ops.conv3x3(h, leaves[1], None)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    alone = calls(0)
    for _ in range(5):
        assert all(same(found, alone) for found in together(calls))


LARGE = 2**30 + 4


# Not with the other tests: it writes 4.3 GB, which a small machine may not have, and may take a minute of page faults.
# `make fuzz` runs it.
@needs_extension
@pytest.mark.skipif(EXAMPLES < 100, reason="takes up to a minute and 5 GB: a part of `make fuzz`")
def test_more_elements_than_32_bits_count():
    """Two rows of 2^30 + 4: offsets of the second one's end, in elements and in bytes, are beyond what an int holds."""
    coef = rf.paths.Linear().coefficients(torch.tensor([0.25, 0.5]))
    key = rf.NoiseStream(7).next_key()
    # Memory that nothing has written takes none.
    found = ops.interpolate(torch.zeros(2, LARGE, dtype=torch.bfloat16), coef, key, None, 2)
    for row, first in ((0, 0), (0, LARGE - 4096), (1, 0), (1, LARGE - 4096)):
        wanted = coef[row, 2] * philox.normals(key, 4096, torch.float32, row * LARGE + first)
        # Rounded to bfloat16, perhaps to the other neighbour.
        torch.testing.assert_close(found[row, first : first + 4096].float(), wanted, rtol=2**-7, atol=1e-6)


def test_threads_have_their_own_streams_and_optimisers():
    def work(i):
        stream = rf.NoiseStream(i)
        net = torch.nn.Linear(70, 90)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(rf.noise.normal(stream.next_key(), torch.empty_like(p).view(1, -1)).view_as(p))
        optimiser = rf.optim.Optimiser(net, lr=0.1, ema_decays=(0.9,))
        for _ in range(5):
            x = rf.noise.normal(stream.next_key(), torch.empty(16, 70))
            optimiser.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()
        return [*(p.detach() for p in net.parameters()), *optimiser.ema[0.9].values(), stream.state]

    alone = [work(i) for i in range(THREADS)]
    for _ in range(3):
        assert all(same(found, wanted) for found, wanted in zip(together(work), alone, strict=True))


@pytest.mark.skipif(extension.native is None, reason="the C++ extension was not built")
def test_threads_get_the_same_normals_for_numpy():
    alone = extension.native.normals(3, 4, 5, (10_001,)).tobytes()
    draw = together(lambda _: [extension.native.normals(3, 4, 5, (10_001,)).tobytes() for _ in range(5)])
    assert {bits for drawn in draw for bits in drawn} == {alone}
