"""The distance that a run evaluates, and the labels that it evaluates with."""

import math

import pytest
import torch

from realuid_fast import data
from realuid_fast.errors import UserError
from realuid_fast.evaluate.measure import Measure
from realuid_fast.networks import build

from ..helpers import LABELLED, MLP, POINTS


def test_measure_names_what_it_measures():
    digits, points = data.load("digits"), data.load(POINTS)
    measure = Measure(digits)
    assert "classifier" in measure.name
    assert measure(digits.pixels("heldout")).distance == pytest.approx(0.0, abs=1e-6)
    assert measure.floor().distance > 1.0
    assert Measure(points).name.startswith("sliced Wasserstein")
    assert measure(torch.full((20, 1, 8, 8), math.nan)).distance == math.inf
    # To the training split the same digits are at 0, and the held-out ones as far as the training digits from those.
    assert measure.to_train(digits.pixels("train")) == pytest.approx(0.0, abs=1e-6)
    assert measure.to_train(digits.pixels("heldout")) == pytest.approx(measure.floor().distance, rel=1e-6)
    assert measure.to_train(torch.full((20, 1, 8, 8), math.nan)) == math.inf
    assert Measure(points).to_train(points.pixels("train")) == pytest.approx(0.0, abs=1e-6)
    # Between two sets, either way round.
    held, train = digits.pixels("heldout"), digits.pixels("train")
    assert measure.between(held, train) == pytest.approx(measure.between(train, held), rel=1e-6)
    assert measure.between(held, train) == measure.to_train(held)
    for either, of in ((measure, train), (Measure(points), points.pixels("train"))):
        assert either.between(of, torch.full_like(of, math.nan)) == math.inf
    images = data.Dataset(
        "folder", torch.randint(0, 256, (30, 3, 4, 4)).byte(), torch.randint(0, 256, (9, 3, 4, 4)).byte()
    )
    pixels = Measure(images)
    assert pixels.name == "Fréchet distance, 29 principal components of the pixels"
    assert pixels(images.pixels("heldout")).distance == pytest.approx(0.0, abs=1e-6)
    assert pixels(torch.ones(20, 3, 4, 4)).distance > pixels.floor().distance
    with pytest.raises(UserError, match="at least 2 held-out samples"):
        Measure(data.Dataset("folder", images.train, images.heldout[:1]))


def test_labels_keep_the_datas_proportions():
    digits = data.load("digits")
    measure, net = Measure(digits), build(LABELLED)
    labels = measure.labels(net, 2 * len(digits))
    assert torch.equal(labels.bincount(), 2 * digits.train_labels.bincount())
    assert measure.labels(build(MLP), 10) is None
