"""The autograd nodes in C++ and in Python: the same bits, the same refusals, whatever torch does to a graph."""

import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import realuid_fast as rf
from realuid_fast import tensors
from realuid_fast.cli import main
from realuid_fast.errors import UserError
from realuid_fast.ops import extension, registry

from ..functional.calls import GENERAL, KEY, REAL, UID, batch, zero_k_x

WAYS = ("C++", "Python")
AWAY = f"there are no nodes in C++: {extension.why_no_nodes()}"
# The nodes are bound to one version of torch, and a build without them is a sound one. `make dist` asks for them.
needs_nodes = pytest.mark.skipif(extension.why_no_nodes() is not None, reason=AWAY)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every test of this fixture runs on the nodes in C++ and on those in Python."""
    return choose(request.param, monkeypatch)


def choose(way, monkeypatch):
    if way == "Python":
        monkeypatch.setattr(registry, "_NODES", {})
    elif extension.why_no_nodes() is not None:
        pytest.skip(AWAY)
    return way


def generator(b, objective=REAL, **changed):
    inputs = {"teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY}
    return rf.functional.generator_loss(objective, **inputs | changed)


def leaves_of(b):
    return [tensor.requires_grad_() for tensor in (b.teacher, b.fake, b.x, b.x_t)]


def by_name(b, noise, reduction):
    """Every differentiable call on the tensors of ``b``: its result and the tensors that want a gradient."""
    inputs = {"x_t": b.x_t, "coef": b.coef, "noise": noise, "reduction": reduction}
    guided = {"teacher_uncond": b.uncond, "guidance": b.guidance}
    fixed = {**inputs, "x": b.x.detach(), "x_t": b.x_t.detach()}
    teacher = b.teacher.detach()
    guided_fake = {"teacher_uncond": b.uncond.detach(), "guidance": b.guidance, "teacher_out": teacher}
    everything = {**inputs, "teacher_out": b.teacher, "fake_out": b.fake, "x": b.x}
    yield "interpolate", rf.interpolate(b.x, b.coef, noise, b.endpoint), (b.x, b.endpoint)
    yield "interpolate one", rf.interpolate(b.x, b.coef, noise, b.endpoint.detach()), (b.x,)
    yield "interpolate the other", rf.interpolate(b.x.detach(), b.coef, noise, b.endpoint), (b.endpoint,)
    yield "matching", rf.functional.matching_loss(out=b.fake, **fixed), (b.fake,)
    yield "fake", rf.functional.fake_loss(REAL, fake_out=b.fake, **fixed, n_real=2), (b.fake,)
    yield (
        "general",
        rf.functional.fake_loss(GENERAL, fake_out=b.fake, **fixed, n_real=2, teacher_out=teacher),
        (b.fake,),
    )
    yield "guided fake", rf.functional.fake_loss(GENERAL, fake_out=b.fake, **fixed, n_real=2, **guided_fake), (b.fake,)
    yield "generator", rf.functional.generator_loss(REAL, **everything), (b.teacher, b.fake, b.x, b.x_t)
    some = {**everything, "teacher_out": teacher, "x_t": b.x_t.detach()}
    yield "generator, some", rf.functional.generator_loss(REAL, **some), (b.fake, b.x)
    yield "guided", rf.functional.generator_loss(REAL, **everything, **guided), (b.teacher, b.uncond, b.x)
    yield "only x", rf.functional.generator_loss(rf.objectives.DMD(), **everything), (b.x,)
    yield (
        "normalised",
        rf.functional.generator_loss(rf.objectives.NormalisedRealUID(0.9, 0.94), **everything),
        (b.fake,),
    )


@needs_nodes
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_bits(dtype, layout, reduction, monkeypatch):
    found = {}
    for way in WAYS:
        choose(way, monkeypatch)
        b = batch((6, 3, 4, 2), dtype, layout)
        for tensor in (b.teacher, b.fake, b.x, b.x_t, b.endpoint, b.uncond):
            tensor.requires_grad_()
        for noise in (KEY, b.noise):
            for name, result, leaves in by_name(b, noise, reduction):
                assert ("CppNode" in result.grad_fn.name()) == (way == "C++" and name != "normalised"), name
                incoming = torch.empty_like(result).copy_(torch.linspace(-1, 2, result.numel()).view_as(result))
                grads = torch.autograd.grad(result, leaves, incoming)
                assert all(grad.stride() == leaf.stride() for grad, leaf in zip(grads, leaves, strict=True))
                found.setdefault(name, []).append((result, *grads))
    for name, results in found.items():
        half = len(results) // 2
        for one, other in zip(results[:half], results[half:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), name


def explicit(b, noise):
    """Every call of explicit gradients on the tensors of ``b``: its results, some of which may be None."""
    inputs = {"x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": noise, "endpoint": b.endpoint}
    outs, rf_f = {"teacher_out": b.teacher, "fake_out": b.fake}, rf.functional
    yield "matching", rf_f.matching_grads(out=b.fake, **inputs)
    yield "fake", rf_f.fake_grads(REAL, fake_out=b.fake, **inputs, n_real=2)
    yield "general", rf_f.fake_grads(GENERAL, **outs, **inputs, n_real=2)
    yield "generator", rf_f.generator_grads(REAL, **outs, **inputs)
    without = {**inputs, "x_t": None, "coef": zero_k_x(b.coef), "endpoint": None}
    yield "generator, no x_t", rf_f.generator_grads(REAL, **outs, **without)


@needs_nodes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_explicit_gradients_have_the_same_bits_without_a_check_in_python(dtype, layout, monkeypatch):
    b = batch((6, 3, 4, 2), dtype, layout)
    for tensor in (b.teacher, b.fake, b.x, b.x_t, b.endpoint):
        tensor.requires_grad_()
    for noise in (KEY, b.noise):
        with monkeypatch.context() as patch:
            patch.setattr(rf.functional, "check", lambda *_, **__: pytest.fail("Python checked a plain call"))
            patch.setattr(tensors, "check", rf.functional.check)
            found = dict(explicit(b, noise))
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_NODES", {})
            expected = dict(explicit(b, noise))
        for name, results in expected.items():
            assert type(found[name]) is type(results)
            for one, other in zip(found[name], results, strict=True):
                assert (one is None) == (other is None), name
                if one is not None:
                    assert torch.equal(one, other)
                    assert one.stride() == other.stride()
                    assert not one.requires_grad


def test_a_loss_without_gradient_records_nothing(way):
    b = batch((4, 6), torch.float32)
    expected = generator(b)
    leaves_of(b)
    with torch.no_grad():
        assert not generator(b).requires_grad
        assert torch.equal(generator(b), expected)
    b = batch((4, 6), torch.float32)
    with torch.inference_mode():
        assert torch.equal(generator(b), expected)
        assert not rf.interpolate(b.x, b.coef, KEY).requires_grad


def test_second_derivatives_and_forward_mode_are_refused(way):
    b = batch((4, 6), torch.float32)
    leaves = leaves_of(b)
    for call, result in (("generator_loss", generator(b)), ("interpolate", rf.interpolate(b.x, b.coef, KEY).sum())):
        with pytest.raises(
            RuntimeError, match=f"^{call} has no second derivative: call backward without create_graph=True$"
        ):
            torch.autograd.grad(result, leaves, create_graph=True, allow_unused=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(b.x.detach(), b.x.detach())
        with pytest.raises(UserError, match=r"^generator_loss has no forward-mode derivative"):
            generator(b, x=dual)
        with pytest.raises(UserError, match=r"^interpolate has no forward-mode derivative"):
            rf.interpolate(dual, b.coef, KEY)


def test_a_graph_is_walked_once_or_kept(way):
    b = batch((4, 6), torch.float32)
    leaves = leaves_of(b)
    for result in (generator(b), 3 * generator(b), rf.interpolate(b.x, b.coef, KEY, b.x_t).sum()):
        first = torch.autograd.grad(result, leaves, retain_graph=True, allow_unused=True)
        kept = [None if grad is None else grad.clone() for grad in first]
        for grad in first:
            if grad is not None:
                grad.zero_()  # the caller's own, which no later backward pass may see
        last = torch.autograd.grad(result, leaves, allow_unused=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(kept, last, strict=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(result, leaves, allow_unused=True)


def test_gradients_accumulate_and_hooks_see_them(way):
    b, seen = batch((4, 6), torch.float32), []
    leaves = leaves_of(b)
    leaves[0].register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    once = torch.autograd.grad(generator(b), leaves)
    loss = generator(b)
    loss.grad_fn.register_hook(lambda of_inputs, of_outputs: seen.append(of_outputs[0]))
    (loss + 3 * loss).backward()
    generator(b).backward()
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 5 * grad)
    assert len(seen) == 4
    assert 4.0 in [found.item() for found in seen if found.dim() == 0]
    (part,) = torch.autograd.grad(generator(b), leaves[2:3])
    assert torch.equal(part, once[2])
    generator(b).backward(inputs=leaves[1])
    torch.testing.assert_close(leaves[1].grad, 6 * once[1])
    torch.testing.assert_close(leaves[2].grad, 5 * once[2])


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_comes_back_as_none(way):
    b = batch((4, 6), torch.float32)
    leaves = leaves_of(b)
    for result in (generator(b), rf.interpolate(b.x, b.coef, KEY)):
        grads = torch.autograd.grad(NoGradient.apply(result).sum(), leaves, allow_unused=True)
        assert grads == (None,) * 4


def test_what_torch_wraps_around_a_graph(way):
    """Saved tensors elsewhere, checkpoints, anomaly mode, a batch of incoming gradients, a compiled backward pass."""
    b = batch((4, 6), torch.float32)
    leaves = leaves_of(b)
    expected = torch.autograd.grad(generator(b), leaves)

    def same(grads):
        return all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))

    with torch.autograd.graph.save_on_cpu():
        loss = generator(b)
    assert same(torch.autograd.grad(loss, leaves))
    loss = checkpoint(lambda *_: generator(b), *leaves, use_reentrant=False)
    assert same(torch.autograd.grad(loss, leaves))
    with torch.autograd.detect_anomaly(check_nan=False):
        assert same(torch.autograd.grad(generator(b), leaves))
    rows = generator(b, reduction="none")
    one_each = torch.autograd.grad(rows, leaves, torch.eye(4), is_grads_batched=True)
    for grads, grad in zip(one_each, expected, strict=True):
        torch.testing.assert_close(grads.sum(0) / 4, grad)
        assert (grads[0, 1:] == 0).all()
    x_t = rf.interpolate(b.x, b.coef, KEY)
    one_each, expected_x = (
        torch.autograd.grad(x_t, b.x, torch.ones(2, 4, 6), is_grads_batched=True, retain_graph=True),
        torch.autograd.grad(x_t, b.x, torch.ones(4, 6)),
    )
    assert torch.equal(one_each[0][1], expected_x[0])
    loss = generator(b)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert same([leaf.grad for leaf in leaves])


def test_tensors_that_are_no_plain_ones(way):
    b = batch((4, 6), torch.float32)
    leaves = leaves_of(b)
    expected = torch.autograd.grad(generator(b), leaves)

    class Subclass(torch.Tensor):
        pass

    for wrap in (lambda v: v.as_subclass(Subclass), lambda v: TwoTensor(v, v.clone())):
        leaves = [wrap(v.detach().clone()).requires_grad_() for v in (b.teacher, b.fake, b.x, b.x_t)]
        teacher, fake, x, x_t = leaves
        loss = generator(b, teacher_out=teacher, fake_out=fake, x=x, x_t=x_t)
        assert type(loss) is type(x)
        for grad, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(grad.a if isinstance(grad, TwoTensor) else grad.as_subclass(torch.Tensor), other)
    inputs = [tensor.detach() for tensor in (*leaves_of(b), b.coef, KEY)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        assert shapes_of_grads(b, *fakes) == [b.x.shape] * 4
    assert shapes_of_grads(b, *(tensor.to("meta") for tensor in inputs)) == [b.x.shape] * 4


def shapes_of_grads(b, teacher, fake, x, x_t, coef, key):
    leaves = [tensor.requires_grad_() for tensor in (teacher, fake, x, x_t)]
    loss = generator(b, teacher_out=teacher, fake_out=fake, x=x, x_t=x_t, coef=coef, noise=key)
    return [grad.shape for grad in torch.autograd.grad(loss, leaves)]


def test_autocast_casts_to_float32(way):
    b = batch((4, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fake = b.fake.bfloat16().requires_grad_()
        loss = generator(b, fake_out=fake, teacher_out=b.teacher.bfloat16())
        loss.backward()
    assert loss.dtype == torch.float32
    assert fake.grad.dtype == torch.bfloat16


def test_two_threads(way):
    b = batch((16, 300), torch.float32)
    leaves = leaves_of(b)
    expected = torch.autograd.grad(3 * generator(b), leaves)
    shared, wrong = 3 * generator(b), []

    def work():
        for _ in range(50):
            own = 3 * generator(b)
            for loss, keep in ((own, False), (shared, True)):
                grads = torch.autograd.grad(loss, leaves, retain_graph=keep)
                wrong.extend(1 for a, e in zip(grads, expected, strict=True) if not torch.equal(a, e))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_nodes
def test_calls_that_do_not_fit_get_the_sentences_of_python():
    b = batch((4, 6), torch.float32)
    wide = b.x.clone().requires_grad_()
    parts = {"teacher_out": b.teacher, "fake_out": b.fake, "x": b.x, "x_t": b.x_t, "coef": b.coef, "noise": KEY}

    def grads(**changed):
        return rf.functional.generator_grads(REAL, **parts | changed)

    for sentence, call in {
        "teacher_out must be a torch.Tensor, not NoneType": lambda: grads(teacher_out=None),
        r"fake_out must have shape \(4, 6\) to go": lambda: grads(fake_out=b.fake[:2]),
        "gives no gradient in coef": lambda: grads(coef=b.coef.clone().requires_grad_()),
        "gives no gradient in noise": lambda: grads(noise=wide),
        "x_t is needed: row 1 of coef": lambda: grads(x_t=None),
        "objective must be an Objective": lambda: rf.functional.generator_grads(None, **parts),
        "n_real must be 0 for UID": lambda: rf.functional.fake_grads(
            UID, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY, n_real=2
        ),
        "out must be a torch.Tensor": lambda: rf.functional.matching_grads(
            out=None, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY
        ),
        "teacher_out must be a torch.Tensor, not list": lambda: generator(b, teacher_out=[1.0]),
        "fake_out must be given": lambda: generator(b, fake_out=None),
        "x must have a batch dimension": lambda: generator(b, x=torch.tensor(1.0)),
        "x must be float32, bfloat16": lambda: generator(b, x=b.x.long()),
        "x must be contiguous or channels_last": lambda: generator(b, x=torch.randn(6, 4).T),
        r"fake_out must have shape \(4, 6\)": lambda: generator(b, fake_out=b.fake[:3]),
        "x_t must have x's dtype": lambda: generator(b, x_t=b.x_t.half()),
        r"coef must have shape \(4, 9\)": lambda: generator(b, coef=b.coef[:, :8]),
        "coef must be contiguous torch.float32": lambda: generator(b, coef=b.coef.double()),
        "no gradient in coef": lambda: generator(b, coef=b.coef.clone().requires_grad_()),
        "no gradient in noise": lambda: generator(b, noise=wide),
        "no gradient in endpoint": lambda: generator(b, endpoint=wide),
        r"noise must have shape \(4, 6\)": lambda: generator(b, noise=b.noise[:2]),
        "an int64 tensor of shape": lambda: generator(b, noise=torch.tensor([1, 2, 3])),
        "x_t is needed: row 1 of coef has k_x": lambda: generator(b, x_t=None),
        "noise_rows must be a whole number": lambda: rf.interpolate(b.x, b.coef, KEY, noise_rows=True),
        "noise_rows must lie between 1": lambda: rf.interpolate(b.x, b.coef, KEY, noise_rows=5),
        "n_real must leave": lambda: rf.functional.fake_loss(
            REAL, fake_out=b.fake, x=b.x, x_t=b.x_t, coef=b.coef, noise=KEY, n_real=4
        ),
        "no gradient in x:": lambda: rf.functional.fake_loss(
            UID, fake_out=b.fake, x=wide, x_t=b.x_t, coef=b.coef, noise=KEY
        ),
        "reduction must be": lambda: generator(b, reduction="sum"),
    }.items():
        with pytest.raises((UserError, RuntimeError), match=sentence):
            call()


@needs_nodes
def test_shared_noise_and_no_samples():
    b = batch((4, 6), torch.float32)
    shared = rf.interpolate(b.x, b.coef, KEY, noise_rows=2)
    assert torch.equal(shared, rf.interpolate(b.x, b.coef, rf.noise.normal(KEY, b.x[:2]), noise_rows=2))
    assert torch.equal(shared[:2], rf.interpolate(b.x, b.coef, KEY)[:2])
    empty = torch.zeros(0, 6).requires_grad_()
    loss = rf.functional.matching_loss(out=empty, x=empty.detach(), x_t=None, coef=zero_k_x(b.coef[:0]), noise=KEY)
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 6)


def test_nodes_of_another_torch_are_left_alone(monkeypatch, tmp_path, capsys):
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(extension, "_no_nodes", None)
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "ops" / "extension.py"))
    assert not extension.load_nodes()
    assert extension.why_no_nodes() == "they were not built"
    for version in ("2.12.1+cu130", "2.11.0"):
        (tmp_path / f"_nodes.{version}.so").touch()
    assert not extension.load_nodes()
    reason = f"they were built with torch 2.11.0, 2.12.1+cu130, this is {torch.__version__}"
    assert extension.why_no_nodes() == reason
    main(["info"])
    assert f"autograd nodes in Python, slower for a few samples: {reason}\n" in capsys.readouterr().out
    (tmp_path / f"_nodes.{torch.__version__}.so").write_text("no library")
    assert not extension.load_nodes()
    assert extension.why_no_nodes().startswith("they do not load (")
