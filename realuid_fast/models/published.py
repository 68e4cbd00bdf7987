"""Teachers by name or file, and checkpoints of ``torch.save`` as others publish them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import pickles
from .files import SHIPPED, Description, Model, few, filled, load

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")  # suffixes of files of torch.save
# Parameters of a discriminator's head. Networks of the published code have one, and their output does not depend on it.
HEAD = frozenset(f"cls_pred_branch.{layer}.{kind}" for layer in (0, 1, 3, 4, 6) for kind in ("weight", "bias"))
# Settings of torchcfm's U-Net, which the published code trains too. They cannot be read off a state dict.
PUBLISHED = {"time_scale": 1.0, "norm_groups": 32}


def load_teacher(
    source: str | Path,
    network: Mapping[str, Any] | None = None,
    decay: float | None = None,
    data: Mapping[str, Any] | None = None,
) -> Model:
    """A teacher: a shipped one by name (``"digits"``), a file of this package, or a published checkpoint.

    Args:
        source: a shipped name, a ``.safetensors`` file, the folder of a finished run of ``train-teacher``, or a
            checkpoint written by ``torch.save`` (``.pt``, ``.pth``, ``.ckpt``), whose dictionary holds ``ema_models``
            or, a student's, ``ema_gens`` (decay to state dict), ``ema_model``, ``net_model``, or is itself a state
            dict. It is read as tensors and plain values only: no code in it runs.
        network: the network of a published checkpoint, which does not describe it. :func:`published` says when its
            ``time_scale`` and ``norm_groups`` are replaced.
        decay: the decay of the average to take, 0 for the last weights; the largest by default. A file of this package
            has one average; if it says its decay, that must be this one.
        data: the data that a published checkpoint was trained on, for its description.

    Raises:
        UserError: the source does not exist or cannot be read, or parameters are missing or unexpected.
    """
    name = str(source)
    if name in SHIPPED:
        return load(SHIPPED[name], role="teacher")
    file = Path(source)
    if not file.exists():
        raise UserError(f"there is no teacher {name!r}: neither a file nor one of the shipped ({', '.join(SHIPPED)})")
    if (file / "config.yaml").exists():
        file /= "teacher.safetensors"
        if not file.exists():
            raise UserError(f"the folder {source} holds no teacher.safetensors: it is no finished run of train-teacher")
    if file.is_dir() or file.suffix == ".pkl":
        raise UserError(f"{file} is not read as it is: realuid-fast convert makes a file for this package of it")
    if file.suffix not in CHECKPOINTS:
        model = load(file, role="teacher")
        if decay is not None and model.description.decay not in (None, decay):
            raise UserError(f"{file} holds the average {model.description.decay:g}, not the one of decay {decay:g}")
        return model
    if not network:
        raise UserError(f"{file} does not say which network it holds: give its configuration as 'network'")
    described, state = published(file, network, decay)
    net = filled(described, state, str(file))
    description = Description(network=described, data=dict(data or {}), command=f"read from {file.name}", decay=decay)
    return Model(net, description)


def published(
    file: str | Path, network: Mapping[str, Any], decay: float | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Network and state dict of a checkpoint of ``torch.save``, see :func:`published_state`, whose errors it raises.

    A state dict does not show ``time_scale`` and ``norm_groups``. torchcfm's U-Net, which the published code trains,
    always has 1 and 32. Where ``network`` says otherwise and the state has that U-Net's layout, a warning names both. A
    checkpoint in the form of torchcfm or of the published code (``ema_models``, ``ema_gens``, ``ema_model``,
    ``net_model``, a discriminator's head) gets the published values; a plain state dict keeps those of ``network``.
    """
    state, recognised = _published(Path(file), decay)
    return settled(network, state, str(file), recognised), state


def settled(network: Mapping[str, Any], state: Mapping[str, Tensor], where: str, recognised: bool) -> dict[str, Any]:
    """``network``, with the :data:`PUBLISHED` settings if ``recognised``; warns if other values were asked for."""
    asked = {key: network[key] for key, value in PUBLISHED.items() if network.get(key, value) != value}
    if not asked or network.get("kind") != "unet" or not _is_torchcfms(state):
        return dict(network)
    theirs = " and ".join(f"{key} = {PUBLISHED[key]:g}" for key in asked)
    ours = " and ".join(f"{key} = {value}" for key, value in asked.items())
    if recognised:
        warnings.warn(
            f"{where} is a checkpoint of torchcfm or of the published code, whose U-Net has {theirs}: this is taken, "
            f"not the configuration's {ours} (which a file of the state dict alone would keep)",
            stacklevel=4,
        )
        return {**network, **{key: PUBLISHED[key] for key in asked}}
    settings = " ".join(f"network.{key}={PUBLISHED[key]:g}" for key in asked)
    warnings.warn(
        f"{where} holds weights without {' and '.join(asked)}: the configuration's {ours} is taken, and wrong outputs "
        f"follow if it is a U-Net of torchcfm, which has {theirs} ({settings})",
        stacklevel=4,
    )
    return dict(network)


def _is_torchcfms(state: Mapping[str, Tensor]) -> bool:
    """Whether torchcfm's U-Net can have these weights: its middle has attention, and 32 divides every normalisation."""
    norms = [len(value) for name, value in state.items() if name.endswith(".weight") and value.dim() == 1]
    return "middle_block.1.qkv.weight" in state and all(width % PUBLISHED["norm_groups"] == 0 for width in norms)


def published_state(file: str | Path, decay: float | None = None) -> dict[str, Tensor]:
    """State dict inside a checkpoint of ``torch.save``, without the ``module.`` of parallel training before its names
    or the ``model.`` of a network inside another (EDM's preconditioning in DMD2's files) before all of them.

    The published code's networks carry a discriminator's head, the parameters :data:`HEAD`: it is left out, with a
    warning, since no sample depends on it. Every other name is handed on.

    Args:
        file: the checkpoint.
        decay: the decay of the average to take, 0 for the last weights (``gen`` or ``net_model`` beside the averages);
            the largest by default.

    Raises:
        UserError: the file is damaged or foreign, lacks that average, or holds no state dict.
    """
    return _published(Path(file), decay)[0]


def _published(file: Path, decay: float | None) -> tuple[dict[str, Tensor], bool]:
    """The state dict, and whether it is recognised as torchcfm's or the published code's."""
    try:
        content = pickles.load(file, str(file))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception:
        # A damaged pickle can make torch's reader raise any kind of exception: KeyError, IndexError, TypeError, ...
        raise UserError(f"{file} is no checkpoint that holds tensors and plain values alone{_beside(file)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a dictionary of parameters")
    recognised = True
    averages = next((content[name] for name in ("ema_models", "ema_gens") if name in content), None)
    last = content.get("gen" if "ema_gens" in content and "ema_models" not in content else "net_model")
    if averages is not None:
        state = _chosen_average(file, averages, last, decay)
    elif decay == 0 and last is not None:
        state = last
    elif decay is not None:
        raise UserError(f"{file} has no averages by decay, so none of {decay:g} can be taken from it")
    else:
        recognised = "ema_model" in content or "net_model" in content
        state = content.get("ema_model", content.get("net_model", content))
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        there = few([str(key)[:40] for key in content])
        raise UserError(
            f"{file} holds no state dict, plain or under ema_models, ema_gens, ema_model or net_model; it holds "
            f"{there or 'nothing'}: save the state dict among them alone"
        )
    for name, value in state.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            raise UserError(f"{file} holds {name} as no plain tensor of real numbers")
    state = plain_names(state)
    if any(name.startswith("shadow_params.") for name in state):
        raise UserError(
            f"{file} holds averages without names (shadow_params.0 and so on, as flow_matching's EMA keeps them): "
            "turn that object to eval(), which copies them into its network, and save that network's state dict"
        )
    if HEAD & set(state):
        recognised = True
        warnings.warn(f"{file} has a discriminator's head, cls_pred_branch: it is left out", stacklevel=4)
    return {name: value for name, value in state.items() if name not in HEAD}, recognised


def plain_names(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """The state with the network's own names: without ``module.``, and without ``model.`` if all names have it."""
    plain = {str(key).removeprefix("module."): value for key, value in state.items()}
    if all(name.startswith("model.") for name in plain):
        plain = {name.removeprefix("model."): value for name, value in plain.items()}
    return plain


def _beside(file: Path) -> str:
    """A clause that names the objects for which torch refuses a file, such as ``argparse.Namespace``; empty if none."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:
        return ""
    named = few([name[:60] for name in sorted(names)], 3)
    return f": it also holds {named}, which is not read; save its state dict alone" if named else ""


def _chosen_average(file: Path, averages: Mapping[Any, Any], last: Any, decay: float | None) -> Any:
    try:
        by_decay = {float(key): value for key, value in averages.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(f"{file} has averages that are not told apart by their decay") from None
    if not by_decay:
        raise UserError(f"{file} has an empty dictionary of averages")
    if last is not None:
        by_decay.setdefault(0.0, last)
    chosen = max(by_decay) if decay is None else decay
    if chosen not in by_decay:
        there = ", ".join(f"{d:g}" for d in sorted(by_decay))
        raise UserError(f"{file} has no average of decay {chosen:g}, only {there}")
    return by_decay[chosen]
