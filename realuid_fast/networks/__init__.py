"""Networks called as ``net(t, x, y=None)``, built from the plain mapping that checkpoints store."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import UserError
from .diffusers import Diffusers
from .edm import DhariwalUNet, SongUNet
from .mlp import MLP
from .unet import UNet

KINDS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "mlp": MLP,
    "song-unet": SongUNet,
    "dhariwal-unet": DhariwalUNet,
    "diffusers": Diffusers,
}

__all__ = ["KINDS", "MLP", "DhariwalUNet", "Diffusers", "SongUNet", "UNet", "build"]


def build(config: Mapping[str, Any]) -> nn.Module:
    """Network of a mapping ``{"kind": NAME, ...}``, a name in :data:`KINDS`; the other keys are its constructor's.

    Raises :class:`UserError` for an unknown kind, a missing or unknown key, and values the network refuses.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind == "yours":
        raise UserError("the network is a module of your own: give it to teachers.load as 'net', see teachers.wrap")
    if kind not in KINDS:
        raise UserError(f"network kind must be one of {', '.join(KINDS)}; got {kind!r}")
    known = inspect.signature(KINDS[kind]).parameters
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(f"network '{kind}' has no setting {', '.join(unknown)}; it takes {', '.join(known)}")
    missing = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in settings]
    if missing:
        raise UserError(f"network '{kind}' needs the setting {', '.join(missing)}")
    return KINDS[kind](**settings)
