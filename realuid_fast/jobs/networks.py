"""The networks that a configuration describes: their settings, filled in from the data, and untrained weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..data import Dataset
from ..errors import UserError
from ..networks import build
from ..settings import Config


def fresh(network: dict[str, Any], seed: int) -> nn.Module:
    """An untrained network, whose weights follow from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(network)


def network_for(config: Config, dataset: Dataset) -> dict[str, Any]:
    """The configured network, with the samples' shape and classes filled in where they are not given.

    Raises:
        UserError: the network's shape is not the samples', it wants labels that the data do not have, or it is given a
            number of classes without ``class_cond``.
    """
    network = dict(config.network)
    network.setdefault("kind", "unet" if len(dataset.shape) == 3 else "mlp")
    key = "shape" if network["kind"] == "mlp" else "dim"
    network.setdefault(key, list(dataset.shape))
    # A shape that is not a list is refused by the network itself, in its own words.
    if isinstance(network[key], (list, tuple)) and tuple(network[key]) != dataset.shape:
        raise UserError(f"network.{key} is {list(network[key])}, the data have samples of shape {list(dataset.shape)}")
    if network.get("class_cond"):
        if not dataset.classes:
            hint = ": the images must all lie in folders of classes" if dataset.name == "folder" else ""
            raise UserError(f"network.class_cond is true, but data set '{dataset.name}' has no labels{hint}")
        network.setdefault("num_classes", dataset.classes)
    elif network["kind"] == "unet" and "num_classes" in network:
        raise UserError(
            "network.num_classes is given without network.class_cond, so the network would see no labels: set "
            "network.class_cond=true, where the number of classes follows from the data, or leave num_classes out"
        )
    if config.teacher.label_dropout:
        network.setdefault("null_label", True)
    return network
