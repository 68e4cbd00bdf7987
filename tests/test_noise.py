"""The noise stream: Philox's published answers, the normals' law, independence and keys."""

import pytest
import torch
from scipy import stats

import realuid_fast as rf
from realuid_fast.ops.philox import normals, philox4x32

# Random123's published vectors for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
BACKENDS = [row.name for row in rf.backends.report() if row.name in ("torch", "cpp") and row.why_not is None]


def draw(n, seed=7, offset=0, dtype=torch.float32, backend="torch"):
    key = torch.tensor([seed, offset])
    with rf.backend(backend):
        return rf.noise.normal(key, torch.empty(1, n, dtype=dtype)).flatten()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    def parse(text):
        return tuple(torch.tensor([int(word, 16)]) for word in text.split())

    assert [int(w) for w in philox4x32(parse(counter), parse(key))] == [int(w) for w in parse(words)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2**33])
def test_backends_draw_the_same_numbers(backend, seed, offset):
    expected = normals(torch.tensor([seed, offset]), 1003, torch.float64)
    for dtype in (torch.float32, torch.float64):
        # 1e-4 absolute is the contract between backends.
        torch.testing.assert_close(draw(1003, seed, offset, dtype, backend).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_law_is_standard_normal(backend):
    n = 1 << 18
    values = draw(n, backend=backend).double()
    # Five standard errors: sqrt(1/n), sqrt(2/n), sqrt(6/n) skewness, sqrt(24/n) excess kurtosis.
    assert abs(values.mean()) < 5 * (1 / n) ** 0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(stats.skew(values)) < 5 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(values)) < 5 * (24 / n) ** 0.5
    assert stats.kstest(values, "norm").pvalue > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_keys_and_seeds_are_independent(backend):
    n = 1 << 16
    base = draw(n, seed=5, offset=0, backend=backend).double()
    others = [base.roll(lag) for lag in (1, 2, 3, 4, 64)]
    others += [draw(n, 5, 1, backend=backend).double(), draw(n, 6, 0, backend=backend).double()]
    for other in others:
        for f in (lambda v: v, lambda v: v.abs() - v.abs().mean(), lambda v: v.square() - 1):
            correlation = torch.corrcoef(torch.stack((f(base), f(other))))[0, 1]
            assert abs(correlation) < 5 / n**0.5  # five standard errors
    # Pairs of one Box-Muller transform are the likeliest to be tied together.
    assert abs(torch.corrcoef(torch.stack((base[0::2].square(), base[1::2].square())))[0, 1]) < 5 / (n / 2) ** 0.5


def test_stream_advances_and_resumes():
    stream = rf.NoiseStream(11)
    first, second = stream.next_key(), stream.next_key()
    assert first.tolist() == [11, 0]
    assert second.tolist() == [11, 1]
    resumed = rf.NoiseStream(0)
    resumed.load_state_dict(stream.state_dict())
    assert torch.equal(resumed.next_key(), stream.next_key())


def test_layout_follows_memory_order():
    like = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    key = torch.tensor([3, 9])
    for backend in BACKENDS:
        with rf.backend(backend):
            values = rf.noise.normal(key, like)
        assert values.stride() == like.stride()
        in_memory = values.permute(0, 2, 3, 1).flatten()
        torch.testing.assert_close(in_memory, normals(key, 120, torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: rf.NoiseStream(-1), r"seed must be an integer in \[0, 2\^63\)"),
        (lambda: rf.NoiseStream(1.5), "seed must be an integer"),
        (lambda: rf.noise.normal(torch.zeros(3, dtype=torch.int64), torch.empty(2, 2)), "key must be a key from"),
        (lambda: rf.noise.normal(torch.zeros(2), torch.empty(2, 2)), "key must be a key from"),
        (lambda: rf.noise.normal(torch.zeros(2, dtype=torch.int64, device="meta"), torch.empty(2)), "key is on meta"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(rf.errors.UserError, match=sentence):
        call()
