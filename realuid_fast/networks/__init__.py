"""Networks called as ``net(t, x, y=None)``, built from the plain mapping that checkpoints store."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import UserError
from .diffusers import Diffusers
from .edm import DhariwalUNet, SongUNet
from .mlp import MLP
from .unet import UNet

MOST_PARAMETERS = 20_000  # tensors; the largest published networks have a tenth of them
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
        raise UserError("the network is your own module: give the module to teachers.load as 'net', see teachers.wrap")
    if kind not in KINDS:
        raise UserError(f"network kind must be one of {', '.join(KINDS)}; got {kind!r}")
    known = inspect.signature(KINDS[kind]).parameters
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(f"network '{kind}' has no setting {', '.join(unknown)}; it takes {', '.join(known)}")
    missing = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in settings]
    if missing:
        raise UserError(f"network '{kind}' needs the setting {', '.join(missing)}")
    try:
        with at_most(MOST_PARAMETERS, f"network '{kind}'"):
            net = KINDS[kind](**settings)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
        # Sizes that no memory holds, text in the place of a number, an empty list.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"network '{kind}' cannot be built with these settings: {reason}") from error
    net.built_from = dict(config)  # type: ignore[assignment]  # a trainer writes it into a file's description
    return net


@contextmanager
def at_most(count: int, where: str) -> Iterator[None]:
    """Stops building a network once it has more than ``count`` tensors of parameters; the error names ``where``.

    A description of a hundred bytes may ask for any number of layers, and each takes its time, even on the device meta.
    """
    here, made = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        # Other threads' networks are shown to the hook too.
        if threading.get_ident() != here:
            return
        made += 1
        if made > count:
            raise UserError(f"{where} asks for more than {count:,} parameters")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
