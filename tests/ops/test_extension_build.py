"""What the compiled operators refuse, every instruction set, memory that is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from realuid_fast.objectives import UID
from realuid_fast.ops import extension

pytestmark = pytest.mark.skipif(extension.why_missing() is not None, reason=str(extension.why_missing()))
ops = torch.ops.realuid_fast


def test_optimiser_arguments_get_a_sentence_with_their_name():
    one, step, counts, rate = torch.ones(4, 3), torch.tensor(1.0), torch.tensor([1, 0]), torch.tensor([0.1])
    none = torch.zeros(0, dtype=torch.float64)

    def adam(
        params=one, grad=one, avgs=(), square=one, emas=(), norm=step, lr=rate, counts=counts, decays=none, beta=0.0
    ):
        lists = [params.clone()], [grad], list(avgs), [square.clone()], list(emas)
        ops.adam_(*lists, norm, step, lr, counts, decays, 1.0, beta, 0.9, 1e-8, 0.0, False, False)

    bad("grads must have at least one tensor", lambda: ops.begin_step_([], [step], counts))
    bad("grads must be float32 or float64", lambda: ops.begin_step_([one.half()], [step], counts))
    bad("grads must have no gaps", lambda: ops.begin_step_([one[:, ::2]], [step], counts))
    bad("grads must all be on the CPU and of one dtype", lambda: ops.begin_step_([one, one.double()], [step], counts))
    bad("steps must be float32", lambda: ops.begin_step_([one], [counts[0]], counts))
    bad("counts must be a contiguous int64", lambda: ops.begin_step_([one], [step], step))
    bad(r"grads\[0\] must have .*the shape", lambda: adam(grad=torch.ones(4)))
    bad(r"grads\[0\] must have the shape and the memory layout", lambda: adam(grad=torch.ones(3, 4).T))
    bad("exp_avg_sqs must be on the CPU with the dtype", lambda: adam(square=one.double()))
    bad("exp_avgs are needed unless beta1 is 0", lambda: adam(beta=0.5))
    bad("exp_avgs must have 1 tensors like params, got 2", lambda: adam(avgs=[one, one], beta=0.5))
    bad("emas must have 1 tensors like params, got 0", lambda: adam(decays=torch.tensor([0.9])))
    bad(r"emas\[0\] must have a row for each average", lambda: adam(emas=[one], decays=torch.tensor([0.9])))
    bad("lr must be a contiguous CPU tensor with 1 or more", lambda: adam(lr=torch.zeros(0)))
    bad("lr must be float32 or float64", lambda: adam(lr=torch.tensor([1])))


def bad(sentence, call):
    with pytest.raises(RuntimeError, match=sentence):
        call()


def test_wrong_arguments_get_a_sentence_with_their_name():
    x, key = torch.randn(4, 6), torch.tensor([1, 2])
    coef = torch.zeros(4, 9)
    scalars = UID().generator_scalars
    half = (1.0, 1.0, 0.0, 1.0)

    def generator(teacher=x, fake=x, x=x, x_t=None, coef=coef, noise=key, y=None, want_x_t=False):
        return ops.generator(teacher, fake, x, x_t, coef, noise, y, *[None] * 3, *scalars, *[True] * 4, want_x_t, False)

    def fake(teacher=None, noise_rows=4, n_real=0, d=0.0):
        first = (1.0, 1.0, d, 1.0)
        return ops.fake(x, x, None, coef, key, teacher, *[None] * 3, noise_rows, n_real, *first, *half, True, True)

    wide = torch.randn(4, 12)[:, ::2]
    shifted = coef.clone()
    shifted[2, 7] = 0.5
    bad("teacher_out must have size 6 in dimension 1", lambda: generator(teacher=torch.randn(4, 5)))
    bad("teacher_out must have as many dimensions as x", lambda: generator(teacher=torch.randn(4, 6, 1)))
    bad("fake_out must have the dtype of x", lambda: generator(fake=x.double()))
    bad("x must be dense in memory", lambda: generator(x=wide))
    images = torch.randn(4, 3, 2, 2)
    bad(
        "endpoint must have the memory layout of x",
        lambda: ops.interpolate(images, coef, key, images.to(memory_format=torch.channels_last), 4),
    )
    bad("x must be float32, bfloat16, float16 or float64", lambda: generator(x=torch.zeros(4, 6, dtype=torch.int32)))
    bad(r"coef must be a contiguous CPU tensor of shape \(4, 9\)", lambda: generator(coef=torch.zeros(4, 8)))
    bad("coef must be float32", lambda: generator(coef=coef.double()))
    bad("noise as a key must be an int64 CPU tensor of shape", lambda: generator(noise=torch.tensor([1, 2, 3])))
    bad("noise must have size 4 in dimension 0", lambda: generator(noise=torch.randn(3, 6)))
    bad("endpoint must have size 6 in dimension 1", lambda: generator(y=torch.randn(4, 7)))
    bad("x_t is needed: row 2 of coef has k_x", lambda: generator(coef=shifted))
    with_endpoint = coef.clone()
    with_endpoint[1, 4] = 0.5
    bad("endpoint is needed: row 1 of coef has q", lambda: generator(coef=with_endpoint))
    bad("x_t is needed where its gradient is asked for", lambda: generator(want_x_t=True))
    bad("teacher_out is needed", lambda: fake(d=0.5))
    bad("n_real must be between 0 and the 4 rows, got 5", lambda: fake(n_real=5))
    bad("noise_rows must be positive, got 0", lambda: fake(noise_rows=0))
    bad("key must be an int64 tensor", lambda: ops.normal_like(torch.zeros(2), x, 4))
    bad("scale must have 1 or 4 elements, got 3", lambda: ops.scale_grads_([x.clone()], torch.ones(3)))
    bad("scale must be a float32 or float64", lambda: ops.scale_grads_([x.clone()], torch.ones(4, dtype=torch.int64)))


def test_channels_last_samples_must_be_outermost():
    transposed, key = torch.randn(6, 4).T, torch.tensor([1, 2])
    bad("like must be dense in memory with samples outermost", lambda: ops.normal_like(key, transposed, 4))


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def runnable():
    return [name for name, runs in extension.native.cpu().items() if runs] if extension.native else []


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The tests of agreement and of layers, once more in a process that is held to one instruction set."""
    if isa not in runnable():
        pytest.skip(f"this processor does not run {isa}")
    if extension.isa() == isa:
        pytest.skip(f"{isa} is what those tests run on")
    shapes = "9001 or 67 or 16 or values or mantissa or position"
    names = ("test_extension.py", "test_extension_noise.py", "test_layers.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    layers = "test_layers and ((test_conv3x3 and filters and last) or test_norm_silu or test_empty)"
    code = "import sys, pytest; from realuid_fast.ops import extension; print('held to', extension.isa()); "
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    chosen = f"((agree or normals) and ({shapes})) or ({layers})"
    command = ["-c", code, "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "REALUID_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
    assert result.stdout.startswith(f"held to {isa}\n")


def test_an_unknown_instruction_set_is_an_error():
    code = """
import torch, realuid_fast
print(realuid_fast.backends.report()[1].why_not)
torch.ops.realuid_fast.normal_like(torch.tensor([1, 2]), torch.empty(2, 2), 2)
"""
    result = python(code, REALUID_FAST_CPU_ISA="sse9")
    assert "REALUID_FAST_CPU_ISA must be avx512, avx2 or baseline, got sse9" in result.stdout
    assert result.returncode != 0
    assert "REALUID_FAST_CPU_ISA must be avx512, avx2 or baseline, got sse9" in result.stderr


def test_importing_the_package_builds_nothing():
    code = "import sys, realuid_fast; print('setuptools' in sys.modules, 'torch.utils.cpp_extension' in sys.modules)"
    assert python(code).stdout.split() == ["False", "False"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_kept_memory_is_not_faulted_in_again():
    code = """
import resource, torch
from realuid_fast.ops import extension

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.full((40 << 20,), 1, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back, kept = faults(), extension.keep_freed_memory()
faults()
print(kept, given_back, faults())
"""
    kept, given_back, after = python(code).stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    # 40 MB are 10,240 pages of 4 KiB, or 20 huge ones.
    assert int(given_back) >= 10 * 20
    assert int(after) < int(given_back) / 10


def test_the_bandwidth_probe_measures_something():
    measured = extension.native.bandwidth(megabytes=8, repeats=2)
    assert measured["copy"] > 0.1
    assert measured["fill"] > 0.1
    with pytest.raises(ValueError, match="must be positive"):
        extension.native.bandwidth(megabytes=0)
