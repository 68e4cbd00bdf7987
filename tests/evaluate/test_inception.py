"""The Inception network of published distances: its resize, its weights' file, and what it does without either."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from realuid_fast import data
from realuid_fast.errors import UserError
from realuid_fast.evaluate import inception
from realuid_fast.evaluate.inception import Inception

installed = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed"
)


def random_weights(seed=0):
    """A state dict of the published layout, of random convolutions that keep activations at their size."""
    network = inception._library().FeatureExtractorInceptionV3
    with mock.patch.object(torch, "load"), mock.patch.object(network, "load_state_dict"):
        net = network("random", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    return net.state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(random_weights(), file)
    return file


@pytest.fixture(scope="module")
def features(weights):
    return Inception(weights)


def legacy_resize(image, height, width):
    """TensorFlow 1's ResizeBilinear without align_corners, pixel by pixel: a source coordinate is the target's times
    the ratio of the sizes, in float32, and the neighbour past the edge is the edge.
    """
    rows, columns = len(image), len(image[0])
    out = torch.empty(height, width)
    scale_y, scale_x = torch.tensor(rows / height).float(), torch.tensor(columns / width).float()
    for i in range(height):
        y = i * scale_y
        top = int(y)
        bottom, dy = min(top + 1, rows - 1), y - top
        for j in range(width):
            x = j * scale_x
            left = int(x)
            right, dx = min(left + 1, columns - 1), x - left
            above = image[top][left] + (image[top][right] - image[top][left]) * dx
            below = image[bottom][left] + (image[bottom][right] - image[bottom][left]) * dx
            out[i, j] = above + (below - above) * dy
    return out


@installed
def test_the_network_sees_the_legacy_resize(features):
    images = torch.randint(0, 256, (1, 3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = []
    hook = features._net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    features(images)
    hook.remove()
    assert seen[0].shape == (1, 3, 299, 299)
    expected = (legacy_resize(images[0, 1].float().tolist(), 299, 299) - 128) / 128
    # Pixels of up to 255 over 128, in float32.
    torch.testing.assert_close(seen[0][0, 1], expected, rtol=0, atol=1e-6)
    # It is not today's resize, with half pixel centres.
    modern = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear")
    assert float(((modern - 128) / 128 - seen[0]).abs().max()) > 0.1


@installed
def test_features_of_bytes_floats_and_grey_images(features):
    images = torch.randint(0, 256, (3, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = features(images)
    assert found.shape == (3, 2048)
    assert found.dtype == torch.float32
    assert float(found.std(0).mean()) > 1e-3
    assert torch.equal(found, features(data.to_float(images)))
    # Images of their own, to rounding of convolutions in another batch.
    torch.testing.assert_close(features(images[1:2]), found[1:2], rtol=1e-4, atol=1e-4)
    grey = images[:, :1]
    assert torch.equal(features(grey), features(grey.expand(-1, 3, -1, -1).contiguous()))
    clipped = features(torch.full((1, 3, 8, 8), 7.0))
    assert torch.equal(clipped, features(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)))
    for bad in (torch.zeros(1, 2, 8, 8), torch.zeros(3, 8, 8)):
        with pytest.raises(UserError, match="images must be"):
            features(bad)


@installed
def test_the_protocol_names_the_weights(features, weights):
    import hashlib

    protocol = features.protocol()
    assert protocol["weights"] == "pt_inception.pth"
    assert protocol["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert protocol["published_weights"] is False
    assert "TensorFlow 1 bilinear to 299x299" in protocol["resize"]
    features.sha256, before = inception.PUBLISHED + "0" * 56, features.sha256
    assert features.published
    features.sha256 = before


@installed
def test_safetensors_are_as_good(features, weights, tmp_path):
    file = tmp_path / "inception.safetensors"
    save_file({name: value.contiguous() for name, value in random_weights().items()}, str(file))
    images = torch.zeros(1, 3, 8, 8)
    assert torch.equal(Inception(file)(images), features(images))


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@installed
def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(
        UserError, match=r"there are no Inception weights .*pt_inception-2015-12-05-6726825d.*nothing is"
    ):
        Inception(tmp_path / "none.pth")
    file, mark = tmp_path / "file.pth", tmp_path / "executed"
    torch.save({"weight": Payload(str(mark))}, file)
    with pytest.raises(UserError, match="holds more than tensors"):
        Inception(file)
    assert not mark.exists()
    for content in (b"", b"PK\x03\x04", b"\x80\x02."):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a state dict"):
            Inception(file)
    state = random_weights()
    for change, sentence in (
        ({"fc.weight": torch.zeros(1000, 2048)}, "do not fit the Inception network: .*fc.weight"),
        ({"fc.bias": torch.full((1008,), float("nan"))}, "has weights that are not finite"),
        ({"extra": torch.zeros(1)}, "do not fit the Inception network: .*Unexpected.*extra"),
        ({"fc.bias": "text"}, "is no state dict"),
    ):
        torch.save({**state, **change}, file)
        with pytest.raises(UserError, match=sentence):
            Inception(file)
    del state["fc.bias"]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"Missing.*fc\.bias"):
        Inception(file)


@installed
def test_the_library_gets_nothing_of_the_users_file(weights, monkeypatch):
    given, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: (given.append((file, how)), load(file, **how))[1])
    Inception(weights)
    assert all(isinstance(file, io.BytesIO) for file, _ in given)
    assert given[0][1]["weights_only"] is True
    assert given[0][0].getvalue() != given[1][0].getvalue()


@installed
def test_only_the_network_of_the_library_is_imported():
    code = """
import sys
from realuid_fast.evaluate import inception
before = set(sys.modules)
assert inception._library().FeatureExtractorInceptionV3
assert not [name for name in sys.modules if name.split(".")[0] in ("torch_fidelity", "torchvision")]
sys.modules["torch_fidelity"] = marker = type(sys)("torch_fidelity")
marker.__path__ = []
try:
    inception._library()
except ModuleNotFoundError:
    print("the imported one is used")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the imported one is used"


def test_without_the_library(weights_anywhere, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="need torch-fidelity, which is not installed: pip install --no-deps"):
        Inception(weights_anywhere)


@pytest.fixture
def weights_anywhere(tmp_path):
    file = Path(tmp_path / "some.pth")
    torch.save({"weight": torch.zeros(1)}, file)
    return file
