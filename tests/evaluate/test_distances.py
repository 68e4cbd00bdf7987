"""Metrics against closed forms, independent implementations and torch-fidelity."""

import importlib
import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance_nd

from realuid_fast.errors import UserError
from realuid_fast.evaluate import distances


def cloud(n, d, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix) * scale + shift


def test_frechet_distance_matches_the_matrix_square_root():
    a, b = cloud(300, 6, 0), cloud(200, 6, 1, shift=0.3)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    gap = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = gap + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_shifted_and_scaled_sets():
    a = cloud(100, 4, 2)
    assert distances.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert distances.frechet_distance(a, a + 2.0) == pytest.approx(16, rel=1e-8)
    # Scaling by s about the mean leaves (1 - s)^2 tr(C).
    scaled = (a - a.mean(0)) * 3 + a.mean(0)
    assert distances.frechet_distance(a, scaled) == pytest.approx(4 * distances.moments(a)[1].trace().item(), rel=1e-8)


def test_frechet_distance_survives_singular_covariances():
    a = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    distance = distances.frechet_distance(a, torch.zeros(4, 20))
    expected = a.double().mean(0).square().sum() + distances.moments(a)[1].trace()
    assert distance == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Covariances that commute: ``|d|^2 + sum (sqrt a - sqrt b)^2`` over the eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    a, b = torch.rand(2, 30, generator=generator, dtype=torch.float64).square()
    b[:5] = 0
    apart = torch.randn(30, generator=generator, dtype=torch.float64)
    expected = apart.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    covariances = [(axes * values) @ axes.T for values in (a, b)]
    zero = torch.zeros_like(apart)
    found = distances.frechet_of_moments(zero, covariances[0], apart, covariances[1])
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_moments_of_parts_are_those_of_the_whole():
    """Also far from zero, where sums of squares would lose all digits: 1e8 leaves float64 eight of them."""
    features = cloud(500, 6, 0) + 1e8
    moments = distances.Moments()
    for part in features.split([1, 99, 300, 100]):
        moments.add(part)
    mean, covariance = distances.moments(features)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.covariance, covariance, rtol=1e-6, atol=1e-6)
    one = distances.Moments()
    one.add(features[:1])
    with pytest.raises(UserError, match="at least 2 features, there are 1"):
        _ = one.covariance


def test_kernel_distance_is_the_double_loop():
    a, b = cloud(7, 5, 0), cloud(9, 5, 1, shift=0.5)

    def kernel(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / 5 + 1) ** 3

    def loop(x, y):
        n = len(x)
        within = [sum(kernel(s[i], s[j]) for i in range(n) for j in range(n) if i != j) for s in (x, y)]
        return sum(within) / (n * (n - 1)) - 2 * sum(kernel(p, q) for p in x for q in y) / n**2

    value, error = distances.kernel_distance(a, b, subsets=4, size=6, seed=3)
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(4):
        x = a[torch.randperm(7, generator=generator)[:6]]
        found.append(loop(x, b[torch.randperm(9, generator=generator)[:6]]))
    assert value == pytest.approx(np.mean(found), rel=1e-10)
    assert error == pytest.approx(np.std(found, ddof=1) / 2, rel=1e-10)
    # A subset is never larger than a set.
    assert distances.kernel_distance(a, b[:7], 1, 1000)[0] == pytest.approx(loop(a, b[:7]), rel=1e-10)
    # Subsets that are all of both sets are one and the same; their deviation is that of rounding, and no error.
    whole, unknown = distances.kernel_distance(a, b[:7], 50, 1000)
    assert whole == pytest.approx(loop(a, b[:7]), rel=1e-10)
    assert math.isnan(unknown)
    assert distances.kernel_distance(a, b, 50, 1000)[1] > 1e-6


def test_kernel_distance_of_one_law_is_zero_within_its_error():
    a, b = torch.randn(2, 2000, 8, generator=torch.Generator().manual_seed(0))
    value, error = distances.kernel_distance(a, b, subsets=30, size=200)
    assert abs(value) < 4 * error
    far, _ = distances.kernel_distance(a, b + 1, subsets=30, size=200)
    assert far > 100 * error


def test_sliced_wasserstein_in_one_dimension_is_the_sorted_distance():
    a, b = torch.randn(500, 1), torch.randn(500, 1) + 1
    expected = (a.sort(0).values - b.sort(0).values).square().mean().sqrt().item()
    assert distances.sliced_wasserstein(a, b) == pytest.approx(expected, rel=1e-6)


def test_sliced_wasserstein_of_a_shift():
    """A shift by s has W_2 = |<u, s>| along u, and <u, s>^2 averages to |s|^2 / d."""
    a = cloud(50, 4, 0)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0])
    expected = (shift.square().sum() / 4).sqrt().item()
    assert distances.sliced_wasserstein(a, a + shift, projections=4096) == pytest.approx(expected, rel=0.05)
    assert distances.sliced_wasserstein(a, a[torch.randperm(50)]) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_compares_sets_of_different_size():
    a = cloud(400, 3, 0)
    assert distances.sliced_wasserstein(a, a.repeat(3, 1)) == pytest.approx(0, abs=1e-12)
    far = distances.sliced_wasserstein(a, a[:100] + 5)
    assert far == pytest.approx(distances.sliced_wasserstein(a[:100] + 5, a), rel=1e-12)
    exact = wasserstein_distance_nd(a[:40].numpy(), (a[:40] + 5).numpy())
    assert 0.4 * exact < far < exact


def test_precision_and_recall_on_separated_and_partial_sets():
    real = cloud(200, 2, 0)
    assert distances.precision_recall(real, real.clone()) == (1.0, 1.0)
    assert distances.precision_recall(real, real + 1000) == (0.0, 0.0)
    two = torch.cat([real, real + 1000])
    precision, recall = distances.precision_recall(two, real.clone())
    assert precision == 1.0
    assert recall == pytest.approx(0.5)


def test_precision_follows_its_definition():
    real, generated = cloud(60, 3, 0).numpy(), cloud(40, 3, 1).numpy()
    distance = np.linalg.norm(real[:, None] - real[None], axis=2)
    radius = np.sort(distance, axis=1)[:, 3]
    inside = (np.linalg.norm(generated[:, None] - real[None], axis=2) <= radius).any(1)
    precision, _ = distances.precision_recall(torch.from_numpy(real), torch.from_numpy(generated), k=3)
    assert precision == pytest.approx(inside.mean())


# -- the same features through torch-fidelity


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity's modules of its three metrics, as they compute from features.

    What they import beside that loads images and networks, by way of torchvision, which is not installed.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        # The package does not need it. Where make has installed the peers, tests/test_supply.py sees that it is there.
        pytest.skip("torch-fidelity is not installed: there is nothing to compare with")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    package, unused = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.utils")
    package.__path__ = list(spec.submodule_search_locations)
    unused.__getattr__ = lambda name: None
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, unused.__name__, unused)
    yield types.SimpleNamespace(
        **{n: importlib.import_module(f"torch_fidelity.metric_{n}") for n in ("fid", "kid", "prc")}
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


def test_frechet_distance_is_torch_fidelitys(fidelity):
    a, b = cloud(700, 40, 0), cloud(500, 40, 1, scale=1.3, shift=0.4)
    theirs = [fidelity.fid.fid_features_to_statistics(each) for each in (a, b)]
    expected = fidelity.fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    given = [torch.from_numpy(each[key]) for each in theirs for key in ("mu", "sigma")]
    assert distances.frechet_of_moments(*given) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_torch_fidelitys_of_few_samples(fidelity):
    """Fewer than dimensions: eigenvalues that are 0 come out as 1e-16 of the largest, and roots 1e-8 of its root."""
    a, b = cloud(30, 40, 0), cloud(25, 40, 1, shift=0.4)
    theirs = [fidelity.fid.fid_features_to_statistics(each) for each in (a, b)]
    expected = fidelity.fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_torch_fidelitys(fidelity, monkeypatch):
    """On the same subsets: theirs are numpy's draws, so they are given ours. And they report a standard deviation over
    the number of subsets, here it is the standard error, with one degree of freedom less.
    """

    class Draws:
        def __init__(self, seed):
            self._generator = torch.Generator().manual_seed(seed)

        def choice(self, count, size, replace):
            assert not replace
            return torch.randperm(count, generator=self._generator)[:size].numpy()

    monkeypatch.setattr(np.random, "RandomState", Draws)
    a, b = cloud(90, 12, 0), cloud(70, 12, 1, shift=0.5)
    found = fidelity.kid.kid_features_to_metric(a, b, kid_subsets=9, kid_subset_size=40, rng_seed=5, verbose=False)
    value, error = distances.kernel_distance(a, b, subsets=9, size=40, seed=5)
    assert value == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-12)
    assert error == pytest.approx(found["kernel_inception_distance_std"] / (9 - 1) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("in_parts", [False, True])
def test_precision_and_recall_are_torch_fidelitys(fidelity, in_parts):
    """As counts: they take the mean in float32."""
    real, generated = cloud(1500, 6, 0), cloud(1300, 6, 1, scale=0.8)
    found = fidelity.prc.prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=400, save_cpu_ram=in_parts, verbose=False
    )
    precision, recall = distances.precision_recall(real, generated, 3)
    assert 0.1 < precision < 0.9
    assert 0.1 < recall < 0.9
    assert precision * 1300 == pytest.approx(round(found["precision"] * 1300), abs=1e-9)
    assert recall * 1500 == pytest.approx(round(found["recall"] * 1500), abs=1e-9)


def test_errors_name_the_argument():
    points = torch.zeros(10, 2)
    with pytest.raises(UserError, match="a and b must be"):
        distances.frechet_distance(points, torch.zeros(10, 3))
    with pytest.raises(UserError, match="b must hold finite features"):
        distances.frechet_distance(points, points / 0)
    with pytest.raises(UserError, match="features must have shape"):
        distances.frechet_distance(points, points[:1])
    with pytest.raises(UserError, match="a and b must be"):
        distances.kernel_distance(points, torch.zeros(10, 3))
    with pytest.raises(UserError, match="subsets must be at least 1 and size at least 2, got 0 and 10"):
        distances.kernel_distance(points, points, subsets=0)
    with pytest.raises(UserError, match="a and b must hold"):
        distances.sliced_wasserstein(points, torch.zeros(10, 3))
    with pytest.raises(UserError, match="real and generated"):
        distances.precision_recall(points, torch.zeros(10, 3))
    with pytest.raises(UserError, match="k must be"):
        distances.precision_recall(points, points, k=10)
