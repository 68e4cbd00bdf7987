"""Random calls of every operator and every fused call: each gives what float64 gives, or refuses by name.

The arguments are drawn from the operators' schemas: shapes, layouts, offsets, types, aliases, extreme numbers, then one
argument may be replaced by something that does not belong there. ``REALUID_FAST_FUZZ=10000`` sets the number of
examples of each operator (``make fuzz``). Negative strides are not among them: torch has none, ``flip`` makes a copy.
"""

import contextlib
import math
import os
import random
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st

from realuid_fast import ops as operators
from realuid_fast.ops import extension

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


def largest(tensor):
    return tensor.abs().max().item() if tensor is not None and tensor.numel() else 0.0


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
