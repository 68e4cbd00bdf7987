"""Networks on disk: safetensors files that describe their network."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import choices, paths
from ..errors import NotWritten, UserError
from ..files import check_regular, replacing
from ..networks import at_most, build
from .checksums import CHECKSUM, matches, with_checksum

FORMAT = 5  # 2 knows a path's settings, 3 has a checksum, 4 may be ancestral, 5 may have steps
KEY = "realuid_fast"
SHIPPED = choices.TEACHERS
ROLES = ("teacher", "student")
MOST_MISSING = 1_000  # a network may have this many parameters more than its file, and an error then names them
MOST_UNSAVED = 2**28  # most numbers in tables that no file holds, such as a transformer's positions: 1 GB


@dataclass(frozen=True)
class Description:
    """The description in a network file, stored as JSON under the metadata key ``realuid_fast``.

    ``network`` is the argument of :func:`realuid_fast.networks.build`, ``data`` that of :func:`realuid_fast.data.load`,
    ``path`` and ``path_settings`` those of :func:`realuid_fast.paths.build`; ``predict`` is a prediction on that path.
    ``t_start`` is a student's start time, ``times`` the times of its further steps and ``ancestral`` whether those draw
    from the posterior (see :class:`.generator.Generator`). A student with ``steps`` makes one of these numbers of DDIM
    steps (see :class:`.few_steps.FewSteps`). ``teacher`` is the teacher that it was distilled from.
    ``decay`` is the decay of the average that the file holds: 0 for the last weights, None if unknown.
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
    ancestral: bool = False
    steps: tuple[int, ...] = ()
    format: int = 3

    def __post_init__(self) -> None:
        if self.ancestral or self.steps:
            # Earlier versions would draw a student's further states with fresh noise.
            object.__setattr__(self, "format", FORMAT if self.steps else 4)
        object.__setattr__(self, "times", tuple(map(float, self.times)))  # JSON has lists
        object.__setattr__(self, "steps", tuple(map(int, self.steps)))

    @property
    def evaluations(self) -> int:
        """Evaluations of a student's network a sample, the most that it is trained for."""
        return self.steps[-1] if self.steps else 1 + len(self.times)

    def checked(self) -> Description:
        """This description; raises :class:`UserError` if it has no path, so that a file would not say how to sample."""
        if not self.path:
            raise UserError(
                "description must be given: the path is none of realuid_fast.paths.PATHS, so that a file cannot name "
                "it. Enter the class of the path there, or give the trainer a teachers.Description"
            )
        return self

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


def save(file: str | Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write a state dict and its description as safetensors; ``file`` is replaced in one step, never half written.

    Raises:
        UserError: an argument of another type, a description without a path, or a file that cannot be written.
    """
    for name, value, kind in (("state", state, Mapping), ("description", description, Description)):
        if not isinstance(value, kind):
            raise UserError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    description.checked()
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights are one tensor of two names, and safetensors refuses memory that two names share.
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
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
            described network, by name, shape or type, or are not finite (each one named). The checksum that
            :func:`save` wrote is compared; files of earlier formats may have none.
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
    """Tensors and metadata of a safetensors file; raises :class:`UserError` if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        if not file.exists():
            raise UserError(f"there is no file {file}")
        check_regular(file)
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except PermissionError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
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
        UserError: a name is missing or unexpected, a shape differs, a number is whole or complex where ``net`` has a
            float or the reverse, a float has 8 bits, or a value is not finite.
    """
    _check_fit(net, state, where, allow_missing, allow_unexpected)
    own = net.state_dict()
    wanted = {name: value for name, value in state.items() if name in own}
    for name, value in wanted.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{where} holds values that are not finite, first in {name}")
    net.load_state_dict(wanted, strict=False)


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
    retyped = sorted(
        f"{name} {state[name].dtype} instead of {own[name].dtype}"
        for name in set(own) & set(state)
        if _kind(state[name]) != _kind(own[name])
    )
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped, "of another type": retyped}
    if faults := [f"{what} {few(names)}" for what, names in lists.items() if names]:
        raise UserError(f"{where} does not fit the network: {'; '.join(faults)}")


def _kind(tensor: Tensor) -> str:
    """The types that are cast into one another without a loss of meaning. Floats of 8 bits lack their scales."""
    if not tensor.is_floating_point():
        return "complex" if tensor.is_complex() else "whole"
    return "float" if tensor.element_size() > 1 else "float of 8 bits"


def _not_allowed(names: set[str], patterns: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
