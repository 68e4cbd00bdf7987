"""Threads that call at once, elements beyond 32 bits, a build that checks itself."""

import os
import threading

import pytest
import torch

import realuid_fast as rf
from realuid_fast.ops import extension, philox

from .random_calls import EXAMPLES, needs_extension, ops


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
