"""The compiled noise: known answers of Philox, the normals' accuracy, moments and independence."""

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast.ops import extension

from .philox64 import OFFSET, SEED, philox_words, stream64

pytestmark = pytest.mark.skipif(extension.why_missing() is not None, reason=str(extension.why_missing()))


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4 * (2**32 - 5) + 3, 2**34 - 128, 2**34 - 160, 2**62 + 1])
@pytest.mark.parametrize("count", [1, 3, 4, 63, 64, 65, 300])
def test_normals_at_any_position(start, count):
    # Past element 2^34 the group number needs the counter's second word: from the first vector on, between two vectors,
    # and within one that is not the first.
    wanted = stream64(count, start).numpy()
    for dtype, atol in (("float32", 1e-6), ("float64", 1e-14)):
        got = extension.native.normals(SEED, OFFSET, start, (count,), dtype)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


def test_every_mantissa_near_one_keeps_its_radius():
    """u1 = 1 gives radius 0 and the smallest radii are as accurate as the large ones."""
    x = extension.native.normals(7, 0, 0, (1 << 22,))
    wanted = stream64(1 << 22, seed=7, offset=0).numpy()
    assert np.isfinite(x).all()
    small = np.abs(wanted) < 1e-3
    assert small.sum() > 1000
    # The angle is a multiple of 2 pi 2^-24, so a value near an axis is small by cancellation: absolute error there.
    np.testing.assert_allclose(x[small], wanted[small], rtol=1e-5, atol=4e-7)


# Known answers of Random123 for philox4x32-10 (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert tuple(extension.native.philox(counter, key)) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS[:1] + KNOWN_ANSWERS[2:])
def test_vectorised_philox_known_answers(counter, key, answer):
    """The normals of the known counters are those of the known words."""
    group = counter[0] | counter[1] << 32
    seed, offset = key[0] | key[1] << 32, counter[2] | counter[3] << 32
    if group >= 2**62:
        # The element number 4 * group does not fit; the same words come from the stream's own evaluation.
        words = philox_words(seed, offset, np.array([group], dtype=np.uint64))
        assert tuple(int(w[0]) for w in words) == answer
        return
    got = extension.native.normals(seed, offset, 4 * group, (4,))
    w = [np.uint64(v) for v in answer]
    for pair in (0, 2):
        r = np.sqrt(-2 * np.log((float(w[pair] >> np.uint64(8)) + 1) * 2.0**-24))
        theta = 2 * np.pi * float(w[pair + 1] >> np.uint64(8)) * 2.0**-24
        np.testing.assert_allclose(got[pair : pair + 2], [r * np.cos(theta), r * np.sin(theta)], rtol=0, atol=1e-6)


def test_moments_and_independence_of_the_normals():
    x = extension.native.normals(3, 0, 0, (4_000_000,)).astype(np.float64)
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs((x**2).mean() - 1) < 5 * np.sqrt(2 / x.size)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / x.size)
    for lag in (1, 2, 3, 4, 64):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / np.sqrt(x.size)
    other = extension.native.normals(3, 1, 0, (4_000_000,))
    assert abs((x * other).mean()) < 5 / np.sqrt(x.size)


def test_numpy_stream_draws_what_the_tensor_stream_draws():
    ours, theirs = extension.native.NoiseStream(11), rf.NoiseStream(11)
    for shape in ((3, 5), (70,)):
        wanted = rf.noise.normal(theirs.next_key(), torch.empty(shape))
        np.testing.assert_array_equal(ours.normal(shape), wanted.numpy())
    assert (ours.seed, ours.offset) == (11, 2)
