"""The fused calls on a GPU against the float64 reference; ``small`` cases are what compute-sanitizer can watch."""

import pytest
import torch

import realuid_fast as rf
from realuid_fast.noise import normal
from realuid_fast.ops import reference

pytest.importorskip("triton", reason="the triton package is not installed")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CUDA = "cuda"
# Relative L2 error against float64 on the same rounded inputs. float32: roundings of 6e-8 and noise that the contract
# has within 1e-4 absolute, of which 2e-5 is seen. Half precision adds half a unit in the last place.
TOLERANCE = {F32: 5e-5, BF16: 2**-8, F16: 2**-11 + 5e-5}
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = {
    "small_points": (5, 2),
    "small_odd": (11, 7),
    "small_images": (6, 3, 8, 8),
    "small_odd_row": (4, 1027),
    "images": (64, 3, 32, 32),
    "overlapping_tail": (8, 1300),
    "odd_images": (16, 3, 15, 15),
    "video": (4, 4, 5, 12, 26),
}


class Case:
    """Inputs of the calls on the GPU, and their twins in float64 on the CPU with the noise of the definition."""

    def __init__(self, shape, dtype, keyed, last=False):
        rows, draws = shape[0], torch.Generator().manual_seed(1)
        layout = LAYOUTS.get(len(shape), torch.contiguous_format) if last else torch.contiguous_format

        def tensor(*size):
            return torch.randn(size, generator=draws).to(dtype).contiguous(memory_format=layout)

        self.half = rows // 2
        self.cpu = [tensor(*shape) for _ in range(3)]
        self.coef = torch.randn(rows, 9, generator=draws)
        self.coef[:, 1] = self.coef[:, 4] = self.coef[:, 7] = 0
        self.key = torch.tensor([0x0123_4567_89AB, (3 << 32) + 41])
        self.noise = self.key if keyed else tensor(*shape)
        self.shared = self.key if keyed else tensor(rows - self.half, *shape[1:])

    def on(self, device, double):
        def moved(tensor):
            tensor = tensor.to(device)
            return tensor.double() if double and tensor.is_floating_point() else tensor

        return *map(moved, self.cpu), moved(self.coef), moved(self.noise), moved(self.shared)


def close(got, want, dtype, size):
    """Relative to ``size`` where the result is a mean whose terms may cancel."""
    got = got.cpu()
    assert got.shape == want.shape
    assert got.dtype in (dtype, F32)
    size = want.norm() if got.dim() else size
    assert float((got.double() - want).norm() / size) <= TOLERANCE[got.dtype]


def poisoned(call):
    """``call`` on memory whose every unwritten element is NaN, which torch sees to in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def results(case, device, double):
    """Every call's outputs."""
    x, out, other, coef, noise, shared = case.on(device, double)
    rows = x.shape[0]
    generated = rows - case.half
    fakes, scalars = (0.9, 1.0, 0.0, 1.2, 0.1, 0.1, 0.0, 0.4), rf.objectives.RealUID(0.92, 0.94).generator_scalars
    op = torch.ops.realuid_fast_reference if double else torch.ops.realuid_fast
    return {
        "interpolate": [op.interpolate(x, coef, noise, None, rows)],
        "matching": list(op.matching(out, x, None, coef, noise, None, rows, True, True)),
        "fake": list(op.fake(out, x, None, coef, shared, *[None] * 4, generated, case.half, *fakes, True, True)),
        "generator": list(
            op.generator(other, out, x, None, coef, noise, *[None] * 4, *scalars, *[True] * 4, *[False] * 2)
        ),
    }


@pytest.mark.parametrize("keyed", [True, False], ids=["keyed", "given"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, keyed):
    for last in {False, len(SHAPES[shape]) in LAYOUTS}:
        case = Case(SHAPES[shape], dtype, keyed, last)
        want = results(case, "cpu", True)
        for name, outputs in poisoned(lambda case=case: results(case, CUDA, False)).items():
            expected = want[name]
            for mine, theirs in zip(outputs, expected, strict=True):
                if theirs.numel():
                    close(mine, theirs, dtype, size=expected[min(1, len(expected) - 1)].abs().mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_the_definitions_and_repeat_to_the_bit(shape):
    like = torch.empty(SHAPES[shape], device=CUDA)
    key = torch.tensor([7, 9], device=CUDA)
    got = normal(key, like)
    want = reference.normal_like(key.cpu(), like.cpu().double(), like.shape[0])
    # The noise contract: 1e-4 absolute on every backend.
    assert float((got.cpu().double() - want).abs().max()) < 1e-4
    assert torch.equal(got, normal(key, like))


@pytest.mark.parametrize("shape", ["small_odd", "images"])
def test_losses_repeat_to_the_bit(shape):
    case = Case(SHAPES[shape], BF16, True)
    first, second = results(case, CUDA, False), results(case, CUDA, False)
    for name, outputs in first.items():
        assert all(torch.equal(a, b) for a, b in zip(outputs, second[name], strict=True)), name


def test_backward_hands_the_gradients_on():
    case = Case(SHAPES["images"], F32, True)
    x, out, other, coef, noise, _ = case.on(CUDA, False)
    objective = rf.objectives.RealUID(0.92, 0.94)
    leaves = [tensor.requires_grad_() for tensor in (other, out, x)]
    names = ("teacher_out", "fake_out", "x")
    inputs = dict(zip(names, leaves, strict=True), x_t=None, coef=coef, noise=noise)
    (rf.functional.generator_loss(objective, **inputs) * 0.5).backward()
    held = {name: value.detach() for name, value in inputs.items() if value is not None}
    grads = rf.functional.generator_grads(objective, **held, x_t=None)
    for leaf, want in zip(leaves, (grads.teacher_out, grads.fake_out, grads.x), strict=True):
        torch.testing.assert_close(leaf.grad, 0.5 * want, rtol=1e-6, atol=0)


def test_more_than_2_31_elements():
    """Offsets beyond 32 bits: the last rows come out as they do alone."""
    rows, dim = 2**19 + 8, 4096
    if torch.cuda.mem_get_info()[0] < 8 * rows * dim:
        pytest.skip(f"needs {8 * rows * dim / 1e9:.0f} GB of GPU memory")
    x = torch.ones(rows, dim, dtype=BF16, device=CUDA)
    coef = torch.zeros(rows, 9, device=CUDA)
    coef[:, 0], coef[:, 2] = torch.arange(rows, device=CUDA) % 7, 1.0
    noise = torch.full((1, dim), 2.0, dtype=BF16, device=CUDA)
    out = rf.interpolate(x, coef, noise, noise_rows=1)
    assert float((out[:, 0].float() - coef[:, 0] - 2).abs().max()) == 0
    assert float((out[:, -1].float() - coef[:, 0] - 2).abs().max()) == 0
    # Drawn noise of the last rows: their Philox counters pass 2^29.
    key = torch.tensor([1, 2], device=CUDA)
    coef[:, 0] = 0
    drawn = rf.interpolate(x, coef, key)
    assert not torch.equal(drawn[-1], drawn[0])
    assert not torch.equal(drawn[-1], drawn[-(2**19) - 1])
    assert abs(float(drawn[-4096:].float().mean())) < 1e-3
    assert abs(float(drawn[-4096:].float().std()) - 1) < 1e-3
