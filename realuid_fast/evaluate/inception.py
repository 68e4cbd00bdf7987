"""Features of the Inception network that published distances are measured in, from weights that the user has on disk.

The network is torch-fidelity's: Inception v3 as TensorFlow had it in 2015, with its bilinear resize to 299x299 (no half
pixel centres, no antialiasing). Published Fréchet Inception distances use this network and this resize (Heusel et al.,
2017, 1706.08500). Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import to_bytes
from ..errors import UserError
from ..files import read_regular
from ..models import pickles
from ..precision import Precision

FEATURES = 2048
MOST_BYTES = 2**30  # the largest file of weights that is read; the published one has 95 MB
# The first digits of the SHA-256 of the weights that everybody uses; they are part of the file's name.
PUBLISHED = "6726825d"
LIBRARY = "torch-fidelity"
RESIZE = "TensorFlow 1 bilinear to 299x299, no antialiasing"
HOW_TO_GET = (
    f"the weights are a file of 95 MB that the projects pytorch-fid (pt_inception-2015-12-05-{PUBLISHED}.pth) and "
    f"torch-fidelity (weights-inception-2015-12-05-{PUBLISHED}.pth, the same bytes) publish with their releases; "
    "nothing is downloaded here"
)


class Inception:
    """The features ``(N, 2048)`` float32 of images, from the last average pooling.

    Arithmetic is float32 without TF32. ``sha256`` is the checksum of the weights' file.

    Args:
        weights: a state dict as ``torch.save`` wrote it, read as tensors only: no code in it runs; or the same as
            safetensors.
        device: where the network runs.

    Raises:
        UserError: torch-fidelity or the file is missing, or the weights do not fit the network.
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        self.file, self.device = Path(weights), torch.device(device)
        state, self.sha256 = _read(self.file)
        network = _library().FeatureExtractorInceptionV3
        # The library unpickles any file that it is given. So it gets a file with nothing but the tensors read above.
        checked = io.BytesIO()
        torch.save(state, checked)
        checked.seek(0)
        try:
            net = network("inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=checked)
        except RuntimeError as error:
            lines = " ".join(str(error).split())
            raise UserError(f"the weights {self.file} do not fit the Inception network: {lines[:300]}") from None
        self._net = net.to(self.device, memory_format=torch.channels_last)
        self._precision = Precision("float32", self.device)

    @property
    def published(self) -> bool:
        """Whether these are the weights that published distances are measured with."""
        return self.sha256.startswith(PUBLISHED)

    def __call__(self, images: Tensor) -> Tensor:
        """Features of ``images (N, 3, H, W)``, uint8 or in ``[-1, 1]``, which are clipped and rounded to bytes.

        One channel is repeated to three.
        """
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"images must be (N, 3, H, W) or (N, 1, H, W), got {tuple(images.shape)}")
        images = images.to(self.device)
        images = images if images.dtype == torch.uint8 else to_bytes(images)
        with torch.no_grad(), self._precision.turn():
            return self._net(images.expand(-1, 3, -1, -1))[0]

    def protocol(self) -> dict[str, Any]:
        """The properties of network and images that must agree for two distances to be comparable."""
        return {
            "network": "Inception v3 (TensorFlow, 2015-12-05), last average pooling, 2048 features",
            "weights": self.file.name,
            "weights_sha256": self.sha256,
            "published_weights": self.published,
            "resize": RESIZE,
            "images": "rounded to bytes",
            "library": f"{LIBRARY} {importlib.metadata.version(LIBRARY)}",
        }


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors in a weights' file, and its SHA-256."""
    try:
        raw = read_regular(file, MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"there are no Inception weights {file}: {HOW_TO_GET}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(raw)
        else:
            state = pickles.load(io.BytesIO(raw), str(file))
    except UserError as error:
        raise UserError(f"{error}; {HOW_TO_GET}") from None
    except Exception as error:
        what = "holds more than tensors" if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise UserError(f"{file} cannot be read as a state dict ({what}): {HOW_TO_GET}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is no state dict: {HOW_TO_GET}")
    if any(not bool(torch.isfinite(value).all()) for value in state.values()):
        raise UserError(f"{file} has weights that are not finite")
    return dict(state), hashlib.sha256(raw).hexdigest()


def _library() -> types.ModuleType:
    """torch-fidelity's module of the network, without the rest of the package.

    Importing the whole package imports torchvision, for networks and data sets that are not used here, and torchvision
    has no build for every torch. So the package's ``__init__`` is not run, unless it has been imported already.
    """
    package, wanted = "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"
    if package in sys.modules:
        return importlib.import_module(wanted)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise UserError(
            f"Inception features need {LIBRARY}, which is not installed: pip install --no-deps {LIBRARY}==0.4.0"
        )
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = bare
    try:
        return importlib.import_module(wanted)
    finally:
        # Remove the bare package, so that a later import of torch_fidelity gets the whole of it.
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
