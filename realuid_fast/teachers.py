"""Networks on disk: safetensors with a description of what is inside, and checkpoints as others publish them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import paths
from .errors import UserError
from .networks import build

FORMAT = 2  # 2 knows a path's settings
KEY = "realuid_fast"
ASSETS = Path(__file__).parent / "assets"
SHIPPED = {"digits": ASSETS / "digits_teacher.safetensors"}
ROLES = ("teacher", "student")


@dataclass(frozen=True)
class Description:
    """What a network file says about itself, stored as JSON under the metadata key ``realuid_fast``.

    ``network`` is what :func:`realuid_fast.networks.build` takes; ``data`` what :func:`realuid_fast.data.load` takes.
    ``path`` and ``path_settings`` are what :func:`realuid_fast.paths.build` takes, ``predict`` one of its predictions.
    ``t_start`` is a student's start time and ``times`` those of its further steps (see
    :class:`realuid_fast.train.generator.Generator`), ``teacher`` what it was distilled from.
    """

    network: dict[str, Any]
    role: str = "teacher"
    path: str = "linear"
    predict: str = "velocity"
    data: dict[str, Any] = field(default_factory=dict)
    preprocessing: str = ""
    command: str = ""
    t_start: float = 0.0
    teacher: str = ""
    path_settings: dict[str, Any] = field(default_factory=dict)
    times: tuple[float, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(map(float, self.times)))  # JSON has lists

    def interpolant(self) -> paths.Path:
        """The path; raises :class:`UserError` where this version does not have it."""
        return paths.build(self.path, self.path_settings)


@dataclass(frozen=True)
class Model:
    """A network with its description, in evaluation mode."""

    net: nn.Module
    description: Description


def save(file: str | Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write a state dict and its description as safetensors; ``file`` is replaced in one step, never half written."""
    from safetensors.torch import save as serialise

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {KEY: json.dumps(asdict(description), sort_keys=True)}
    file = Path(file)
    part = file.with_name(file.name + ".part")
    try:
        # Written by ourselves: the library's own writer makes files that only their owner can read.
        with part.open("wb") as stream:
            stream.write(serialise(tensors, metadata=metadata))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None


def load(file: str | Path, role: str | None = None) -> Model:
    """Network of a safetensors file that :func:`save` wrote.

    Args:
        file: the file.
        role: ``"teacher"`` or ``"student"`` to refuse the other.

    Raises:
        UserError: a missing or foreign file, a newer format, the other role, or parameters that do not fit the
            described network (each one named).
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        raise UserError(f"{file} is no safetensors file") from None
    if KEY not in metadata:
        raise UserError(f"{file} was not written by realuid_fast: its metadata has no entry '{KEY}'")
    description = _description(file, metadata[KEY])
    if role is not None and description.role != role:
        raise UserError(f"{file} holds a {description.role}, a {role} is wanted")
    return Model(_filled(description.network, tensors, str(file)), description)


def _filled(network: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> nn.Module:
    """The network of a description with the parameters ``state``, in evaluation mode."""
    try:
        # First without memory: a damaged description may ask for more than there is.
        with torch.device("meta"):
            _check_fit(build(network), state, where)
        net = build(network)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} describes a network that cannot be built: {str(error).splitlines()[0]}") from None
    load_exactly(net, state, where)
    return net.eval()


def _description(file: Path, text: str) -> Description:
    known = {f.name for f in fields(Description)}
    try:
        content = json.loads(text)
        if content.get("format", 0) > FORMAT:
            raise UserError(f"{file} has format {content['format']}, this version reads {FORMAT}: update the package")
        if "role" not in content or "network" not in content:
            kind = content.get("kind", "something else")
            raise UserError(f"{file} holds no teacher or student but {kind}")
        return Description(**{key: value for key, value in content.items() if key in known})
    except UserError:
        raise
    except (TypeError, AttributeError, ValueError):
        raise UserError(f"{file} has a damaged description under its metadata entry '{KEY}'") from None


def load_teacher(
    source: str | Path,
    network: Mapping[str, Any] | None = None,
    decay: float | None = None,
    data: Mapping[str, Any] | None = None,
) -> Model:
    """A teacher: a shipped one by name (``"digits"``), a file of this package, or a published checkpoint.

    Args:
        source: a shipped name, a ``.safetensors`` file, or a checkpoint written by ``torch.save`` (``.pt``, ``.pth``,
            ``.ckpt``), whose dictionary holds ``ema_models`` or, a student's, ``ema_gens`` (decay to state dict),
            ``ema_model``, ``net_model``, or is itself a state dict. It is read as tensors and plain values only: no
            code in it runs.
        network: the network of a published checkpoint, which does not say it itself.
        decay: which of its averages to take; the largest when not given.
        data: what a published checkpoint was trained on, for its description.

    Raises:
        UserError: nothing there, a foreign file, missing or unexpected parameters.
    """
    name = str(source)
    if name in SHIPPED:
        return load(SHIPPED[name], role="teacher")
    file = Path(source)
    if not file.exists():
        raise UserError(f"there is no teacher {name!r}: neither a file nor one of the shipped ({', '.join(SHIPPED)})")
    if file.suffix not in (".pt", ".pth", ".ckpt", ".bin"):
        return load(file, role="teacher")
    if not network:
        raise UserError(f"{file} does not say which network it holds: give its configuration as 'network'")
    net = _filled(network, published_state(file, decay), str(file))
    description = Description(network=dict(network), data=dict(data or {}), command=f"read from {file.name}")
    return Model(net, description)


def published_state(file: str | Path, decay: float | None = None) -> dict[str, Tensor]:
    """State dict inside a checkpoint of ``torch.save``, with a ``module.`` prefix of parallel training taken off."""
    file = Path(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        # What a damaged pickle makes torch's reader trip over is of every kind: KeyError, IndexError, TypeError, ...
        raise UserError(f"{file} is no checkpoint that holds tensors and plain values alone") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a dictionary of parameters")
    averages = next((content[name] for name in ("ema_models", "ema_gens") if name in content), None)
    if averages is not None:
        content = _chosen_average(file, averages, decay)
    elif decay is not None:
        raise UserError(f"{file} has no averages by decay, so none of {decay:g} can be taken from it")
    else:
        content = content.get("ema_model", content.get("net_model", content))
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds no state dict, plain or under ema_models, ema_model or net_model")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _chosen_average(file: Path, averages: Mapping[Any, Any], decay: float | None) -> dict[str, Tensor]:
    by_decay = {float(key): value for key, value in averages.items()}
    if not by_decay:
        raise UserError(f"{file} has an empty dictionary of averages")
    chosen = max(by_decay) if decay is None else decay
    if chosen not in by_decay:
        there = ", ".join(f"{d:g}" for d in sorted(by_decay))
        raise UserError(f"{file} has no average of decay {chosen:g}, only {there}")
    return by_decay[chosen]


def load_exactly(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy ``state`` into ``net``; a :class:`UserError` lists what is missing, unexpected or of another shape."""
    _check_fit(net, state, where)
    net.load_state_dict(dict(state))


def _check_fit(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = net.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    reshaped = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in set(own) & set(state)
        if own[name].shape != state[name].shape
    )
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if faults := [f"{what} {_few(names)}" for what, names in lists.items() if names]:
        raise UserError(f"{where} does not fit the network: {'; '.join(faults)}")


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
