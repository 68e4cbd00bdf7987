"""Classifiers whose features a distance is measured in: the shipped one of the digits, and those that users train."""

import numpy as np
import pytest
import torch

import realuid_fast as rf
from realuid_fast import cli, data
from realuid_fast.errors import UserError
from realuid_fast.evaluate import classifier
from realuid_fast.evaluate.distances import frechet_distance
from realuid_fast.evaluate.measure import Measure
from realuid_fast.models.checksums import CHECKSUM, with_checksum


def test_shipped_classifier_recognises_held_out_digits():
    digits = data.load("digits")
    logits = classifier.digit_classifier()(digits.heldout)
    assert (logits.argmax(1) == digits.heldout_labels).float().mean() > 0.96


def test_digit_distance_orders_what_it_should():
    digits = data.load("digits")
    heldout = classifier.digit_features(digits.heldout)

    def distance(images):
        return frechet_distance(classifier.digit_features(images), heldout)

    noise = torch.randn(digits.train.shape, generator=torch.Generator().manual_seed(0))
    floor, slight, strong = (
        distance(digits.train),
        distance(digits.train + 0.3 * noise),
        distance(digits.train + noise),
    )
    assert heldout.shape == (445, 64)
    assert floor < slight < strong
    assert floor == pytest.approx(3.0789, rel=1e-3)
    # One class missing is far from the data although every image is real.
    assert distance(digits.train[digits.train_labels != 3]) > 5 * floor


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier of the digits after two passes, as the command writes it."""
    file = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    assert cli.main(["train-classifier", "--epochs", "2", "--out", str(file)]) == 0
    return file


def test_the_command_trains_on_the_training_split_and_says_how_well(trained, capsys):
    net, description = classifier.read(trained)
    again, accuracy = classifier.train_classifier(epochs=2)
    for name, value in again.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    assert description["heldout_accuracy"] == round(accuracy, 4) > 0.3
    capsys.readouterr()
    assert cli.main(["train-classifier", "--out", str(trained)]) == 2
    assert "exists: give --overwrite or another name" in capsys.readouterr().err


def test_runs_and_evaluations_are_measured_in_its_features(trained, tmp_path, capsys):
    digits = data.load("digits")
    measure = Measure(digits, classifier=str(trained))
    assert "features of a classifier of digits" in measure.name
    net, _ = classifier.read(trained)
    with torch.no_grad():
        wanted = frechet_distance(net.features(digits.train), net.features(digits.heldout))
    assert measure(digits.train).distance == pytest.approx(wanted, rel=1e-5)
    words = ["evaluate", "--teacher", "digits", "--samples", "40", "--steps", "1", "--classifier", str(trained)]
    assert cli.main(words) == 0
    assert "features of a classifier of digits" in capsys.readouterr().out
    settings = ["distill.updates=1", "distill.batch=4", "run.evaluate_every=1", "run.evaluate_samples=20"]
    settings += ["run.tensorboard=false", "run.progress=false", "run.teacher_steps=0", f"run.classifier={trained}"]
    assert cli.main(["distill", "--out", str(tmp_path / "run"), "--set", *settings]) == 0
    assert "features of a classifier of digits" in capsys.readouterr().out


def test_shipped_classifiers_are_known_by_name():
    net, described = classifier.read("mnist")
    assert net.shape == (1, 16, 16)
    assert (described["data"], described["heldout_accuracy"]) == ("idx", 0.9924)
    # The shipped teacher's digits are digits: the classifier is sure of most of them, and finds all ten.
    noise = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = net(rf.load("mnist-teacher")(noise, steps=10)).softmax(1).max(1)
    assert float((found.values > 0.9).float().mean()) > 0.7
    assert len(found.indices.unique()) == 10
    assert classifier.read("digits")[0].shape == (1, 8, 8)


def test_a_classifier_of_other_images_or_a_bad_file_is_named(trained, tmp_path):
    colour = data.Dataset("colour", torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8))
    with pytest.raises(UserError, match=r"is for images of shape \(1, 8, 8\), 'colour' has samples of \(3, 8, 8\)"):
        Measure(colour, classifier=str(trained))
    with pytest.raises(UserError, match=r"none\.safetensors cannot be read: No such file"):
        classifier.read(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="it is a folder and not a regular file"):
        classifier.read(tmp_path)
    whole, bad = trained.read_bytes(), tmp_path / "bad.safetensors"
    for at in np.linspace(0, len(whole) - 1, 50).astype(int):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="is damaged or holds no classifier"):
            classifier.read(bad)
    # A size that no memory holds is refused before anything is taken for it.
    net, description = classifier.read(trained)
    del description[CHECKSUM]
    described = {**description, "network": {"channels": 1, "size": 10**6, "classes": 10}}
    bad.write_bytes(with_checksum(net.state_dict(), "realuid_fast", described))
    with pytest.raises(UserError, match="is damaged or holds no classifier"):
        classifier.read(bad)


def test_data_without_labels_or_of_points_cannot_train_one():
    with pytest.raises(UserError, match="a classifier needs labels, data set 'plain' has none"):
        classifier.train_classifier(dataset=data.Dataset("plain", torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)))
    labels = torch.zeros(4, dtype=torch.int64)
    wide = data.Dataset("wide", torch.zeros(4, 1, 8, 16), torch.zeros(4, 1, 8, 16), labels, labels)
    with pytest.raises(UserError, match=r"square images \(channels, size, size\), 'wide' has \(1, 8, 16\)"):
        classifier.train_classifier(dataset=wide)
    with pytest.raises(UserError, match="a size from 4"):
        classifier.Classifier(1, 3, 10)


def test_a_missing_shipped_classifier_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="images must have shape"):
        classifier.digit_features(torch.zeros(2, 3, 8, 8))
    monkeypatch.setattr(classifier, "CLASSIFIER_FILE", tmp_path / "none.safetensors")
    classifier.digit_classifier.cache_clear()
    with pytest.raises(UserError, match="cannot be read: No such file or directory; reinstall, or run realuid-fast"):
        classifier.digit_classifier()
    classifier.digit_classifier.cache_clear()
