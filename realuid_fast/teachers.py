"""Networks on disk: safetensors files that describe their network, and checkpoints as others publish them."""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import choices, paths, pickles
from .checksums import CHECKSUM, matches, with_checksum
from .errors import NotWritten, UserError
from .files import check_regular, replacing
from .networks import at_most, build
from .sampling import follows_flow

FORMAT = 3  # 2 knows a path's settings, 3 has a checksum
KEY = "realuid_fast"
SHIPPED = choices.TEACHERS
ROLES = ("teacher", "student")
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")  # suffixes of files of torch.save
# Parameters of a discriminator's head. Networks of the published code have one, and their output does not depend on it.
HEAD = frozenset(f"cls_pred_branch.{layer}.{kind}" for layer in (0, 1, 3, 4, 6) for kind in ("weight", "bias"))
# Settings of torchcfm's U-Net, which the published code trains too. They cannot be read off a state dict.
PUBLISHED = {"time_scale": 1.0, "norm_groups": 32}
MOST_MISSING = 1_000  # a network may have this many parameters more than its file, and an error then names them
MOST_UNSAVED = 2**28  # most numbers in tables that no file holds, such as a transformer's positions: 1 GB


@dataclass(frozen=True)
class Description:
    """The description in a network file, stored as JSON under the metadata key ``realuid_fast``.

    ``network`` is the argument of :func:`realuid_fast.networks.build`, ``data`` that of :func:`realuid_fast.data.load`,
    ``path`` and ``path_settings`` those of :func:`realuid_fast.paths.build`; ``predict`` is a prediction on that path.
    ``t_start`` is a student's start time, ``times`` the times of its further steps (see
    :class:`realuid_fast.generator.Generator`), and ``teacher`` the teacher that it was distilled from. ``decay`` is the
    decay of the average that the file holds: 0 for the last weights, None if unknown.
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
    decay: float | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(map(float, self.times)))  # JSON has lists

    def interpolant(self) -> paths.Path:
        """The path; raises :class:`UserError` if this version does not have it."""
        return paths.build(self.path, self.path_settings)


@dataclass(frozen=True)
class Model:
    """A network with its description, in evaluation mode.

    If the teacher is a function and not a network (:func:`wrap`), ``function`` is the teacher, and ``net`` only gives
    the weights that students start from.
    """

    net: nn.Module
    description: Description
    function: nn.Module | None = None


class Called(nn.Module):
    """A network of any signature as ``net(t, x, y)``, see :func:`wrap`."""

    def __init__(
        self, net: nn.Module, call: Callable[..., Tensor] | None = None, num_classes: int = 0, null_label: bool = False
    ) -> None:
        super().__init__()
        self.net, self._call = net, call
        self.num_classes = num_classes or None
        self.null_label = num_classes if null_label else None

    def forward(self, t: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(t, x, y) if self._call is None else self._call(self.net, t, x, y)


def wrap(
    net: nn.Module,
    dim: Sequence[int],
    path: str = "linear",
    predict: str = "velocity",
    path_settings: Mapping[str, Any] | None = None,
    call: Callable[..., Tensor] | None = None,
    num_classes: int = 0,
    null_label: bool = False,
    preprocessing: str = "",
    teacher: Callable[..., Tensor] | None = None,
) -> Model:
    """Any network of yours as a teacher that :class:`realuid_fast.train.distill.Distiller` takes.

    Its student is saved like every other; :func:`load` fills ``wrap(...).net`` with it, given as ``net``.

    Args:
        net: the network; student and fake model start from copies of it.
        dim: shape of one sample, such as ``(3, 32, 32)``.
        path, path_settings: the path that it was trained on, as :func:`realuid_fast.paths.build` takes them.
        predict: its prediction, one of :data:`realuid_fast.paths.PREDICTIONS`.
        call: ``call(net, t, x, y)`` for a network of another signature: ``t`` ``(B,)`` as
            :meth:`realuid_fast.paths.Path.network_time` gives it, ``x`` ``(B, *dim)``, ``y`` ``(B,)`` int64 labels or
            None; it returns the prediction, shaped like ``x``. By default the network is called as ``net(t, x, y)``.
        num_classes, null_label: the number of labels, and whether the network knows the one after them as "no label".
        preprocessing: a description of its samples, in words.
        teacher: ``teacher(t, x, y)``, any function to use as the teacher in place of ``net``. Student and fake model
            still start from ``net``. If an objective's gradient flows through the teacher, autograd must go through it.

    Raises:
        UserError: ``net`` is not a module, or this version does not have the path or the prediction.
    """
    if not isinstance(net, nn.Module):
        raise UserError(f"net must be a torch.nn.Module, whose weights a student can start from, not {net!r:.60}")
    if null_label and not num_classes:
        raise UserError("null_label needs num_classes")
    description = Description(
        network={"kind": "yours", "dim": [int(v) for v in dim]},
        path=path,
        path_settings=dict(path_settings or {}),
        predict=predict,
        preprocessing=preprocessing,
    )
    follows_flow(description.interpolant(), predict)
    function = None
    if teacher is not None:
        # Wrapped in a module, so that it is called, asked for its labels and compiled like a network.
        asked = teacher
        function = Called(nn.Identity(), lambda _, t, x, y: asked(t, x, y), num_classes, null_label).eval()
    return Model(Called(net, call, num_classes, null_label).eval(), description, function)


def save(file: str | Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write a state dict and its description as safetensors; ``file`` is replaced in one step, never half written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    file = Path(file)
    try:
        # Not written by the safetensors library, whose files only their owner can read.
        with replacing(file) as stream:
            stream.write(with_checksum(tensors, KEY, asdict(description)))
    except OSError as error:
        raise NotWritten(f"{file} cannot be written: {error.strerror or error}") from None


def load(file: str | Path, role: str | None = None, net: nn.Module | None = None) -> Model:
    """The network of a safetensors file that :func:`save` wrote.

    Args:
        file: the file.
        role: ``"teacher"`` or ``"student"`` to refuse the other.
        net: the network to fill, if this package cannot build it itself, see :func:`wrap`.

    Raises:
        UserError: a missing, damaged or foreign file, a newer format, the other role, or parameters that do not fit the
            described network or are not finite (each one named). The checksum that :func:`save` wrote is compared;
            files of earlier formats may have none.
    """
    file = Path(file)
    tensors, metadata = read_safetensors(file)
    if KEY not in metadata:
        raise UserError(f"{file} was not written by realuid_fast: its metadata has no entry '{KEY}'")
    description = _description(file, metadata[KEY])
    if role is not None and description.role != role:
        raise UserError(f"{file} holds a {description.role}, a {role} is wanted")
    if net is None:
        return Model(filled(description.network, tensors, str(file)), description)
    load_exactly(net, tensors, str(file))
    return Model(net.eval(), description)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises :class:`UserError` for a missing or damaged one."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise UserError(f"there is no file {file}")
    try:
        check_regular(file)
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or _first_line(error)
        raise UserError(f"{file} is no safetensors file, or a damaged one: {reason}") from None


def filled(
    network: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> nn.Module:
    """The network of a description with the parameters ``state``, in evaluation mode; errors of :func:`load_exactly`.

    Parameters that may be missing keep the values of a fresh network, which are the same every time.
    """
    # Allow twice as many parameters as the file has, because a constructor may make a layer and replace it.
    most = 2 * len(state) + MOST_MISSING * (10 if allow_missing else 1)
    try:
        # Build it without memory first: a damaged description may ask for more memory than there is.
        with torch.device("meta"), at_most(most, f"{where} does not fit the network: it"):
            net = build(network)
        _check_fit(net, state, where, allow_missing, allow_unexpected)
        own = net.state_dict()
        if sum(table.numel() for name, table in net.named_buffers() if name not in own) > MOST_UNSAVED:
            raise UserError(f"{where} describes a network with tables of more than {MOST_UNSAVED:,} numbers")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            net = build(network)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} describes a network that cannot be built: {_first_line(error)}") from None
    load_exactly(net, state, where, allow_missing, allow_unexpected)
    return net.eval()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _description(file: Path, text: str) -> Description:
    known = {f.name for f in fields(Description)}
    try:
        content = json.loads(text)
        if content.get("format", 0) > FORMAT:
            raise UserError(f"{file} has format {content['format']}, this version reads {FORMAT}: update the package")
        if "role" not in content or "network" not in content:
            kind = content.get("kind", "something else")
            raise UserError(f"{file} holds no teacher or student but {kind}")
        if (CHECKSUM in content or content.get("format", 0) >= 3) and not matches(file, content.get(CHECKSUM)):
            raise UserError(f"{file} is damaged: its bytes do not have the checksum that was written with them")
        return Description(**{key: value for key, value in content.items() if key in known})
    except UserError:
        raise
    except (TypeError, AttributeError, ValueError, OverflowError, RecursionError):
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
        there = _few([str(key)[:40] for key in content])
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
    named = _few([name[:60] for name in sorted(names)], 3)
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


def load_exactly(
    net: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Copy ``state`` into ``net``, every parameter and buffer.

    Args:
        where: the name of the state's origin, for errors.
        allow_missing, allow_unexpected: names, or patterns with ``*`` and ``?``, of parameters that may be missing from
            ``state``, and of entries of ``state`` that ``net`` need not have.

    Raises:
        UserError: a name is missing or unexpected, a shape differs, or a value is not finite.
    """
    _check_fit(net, state, where, allow_missing, allow_unexpected)
    own = net.state_dict()
    wanted = {name: value for name, value in state.items() if name in own}
    for name, value in wanted.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{where} holds values that are not finite, first in {name}")
    net.load_state_dict(wanted, strict=False)


def _check_fit(
    net: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    own = net.state_dict()
    missing = _not_allowed(set(own) - set(state), allow_missing)
    unexpected = _not_allowed(set(state) - set(own), allow_unexpected)
    reshaped = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in set(own) & set(state)
        if own[name].shape != state[name].shape
    )
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if faults := [f"{what} {_few(names)}" for what, names in lists.items() if names]:
        raise UserError(f"{where} does not fit the network: {'; '.join(faults)}")


def _not_allowed(names: set[str], patterns: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
