"""Reads pickled networks of Karras et al. (2206.00364) without running any code in them.

Such a file holds the source code of its classes beside their state, and unpickling it the usual way runs that code.
Here a pickle is read as data: the few names that such files need are bound to inert stand-ins (:data:`ALLOWED`), every
other name is refused, and the source text inside is never compiled. The class' name, the arguments that the network was
built with, and its tensors are taken from the file, and nothing else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...files import check_regular
from .. import pickles
from ..files import Description
from ..pickles import Reader

DEEPEST = 32  # most levels of modules inside one another; a U-Net has five
NETWORKS = {"SongUNet": "song-unet", "DhariwalUNet": "dhariwal-unet"}
# Karras et al.'s range of noise levels (their algorithm 1 and table 1). A network's own range may narrow it.
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
VP_CONSTANTS = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}


class Inert:
    """Stands for an object of a class in the file. It has the class' name and the object's attributes, and no code."""

    def __init__(self, name: str = "", attributes: Any = None) -> None:
        self.name, self.attributes = name, attributes

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _ModuleDict(Inert):
    pass


class _ModuleList(Inert):
    pass


class _EasyDict(dict):
    """A dictionary. Attributes that the file would set on it are dropped."""

    def __init__(self) -> None:
        """Begin with no entry. The reader adds entries one by one and checks each key."""

    def __setstate__(self, state: Any) -> None:
        pass


class _NumpyType:
    """The letters of a numpy type, such as ``f8``."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Function:
    """A function that the file may call. The file may not set attributes on it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UserError("it sets a state on an object that has none")


def _persistent(meta: Any) -> Inert:
    if not isinstance(meta, Mapping):
        raise UserError("a persistent object in it is not described by a dictionary")
    name = meta.get("class_name")
    return Inert(name if isinstance(name, str) else "", meta.get("state"))


def _numpy_scalar(kind: Any, data: Any = None) -> float | int:
    import numpy as np

    if not isinstance(kind, _NumpyType) or kind.code not in ("f4", "f8", "i4", "i8", "b1") or kind.order not in "<>|=":
        raise UserError("a numpy scalar in it is none of float32, float64, int32, int64 and bool")
    return np.frombuffer(data, np.dtype(kind.order.replace("|", "=") + kind.code), 1)[0].item()


def _storage(data: Any) -> Any:
    # The bytes are a pickle of their own. They are read by torch's reader of tensors and plain values.
    return pickles.load(io.BytesIO(data), "a tensor's content in it")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, torch.TypedStorage):
        raise UserError("a tensor in it has no storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise UserError("a tensor in it has an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    held = storage._untyped_storage
    # Both conditions are needed: with strides of 0 one stored element stands for any number of elements.
    if 0 not in size and max(last + 1, math.prod(size)) > held.nbytes() // storage.dtype.itemsize:
        raise UserError("a tensor in it is larger than its storage")
    return torch.empty(0, dtype=storage.dtype).set_(held, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise UserError("a parameter in it is not a tensor")
    return data


# Every name that a file may use, with its stand-in.
ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(_persistent),
    ("dnnlib.util", "EasyDict"): _EasyDict,
    ("collections", "OrderedDict"): _Function(pickles.ordered_dict),
    ("builtins", "set"): _Function(pickles.plain_set),
    ("__builtin__", "set"): _Function(pickles.plain_set),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch.storage", "_load_from_bytes"): _Function(_storage),
    ("torch.nn.modules.container", "ModuleDict"): _ModuleDict,
    ("torch.nn.modules.container", "ModuleList"): _ModuleList,
    ("numpy.core.multiarray", "scalar"): _Function(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Function(_numpy_scalar),
    ("numpy", "dtype"): _NumpyType,
}


class _Reader(Reader):
    """An unpickler that knows no names but :data:`ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"it holds {module}.{name}, which an EDM network does not")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it refers to objects outside of the file")


def read(file: Path) -> tuple[dict[str, Tensor], Description]:
    """State of the raw network ``F`` in a pickled EDM network or training snapshot, and its description.

    Of a snapshot the network ``ema`` is taken. The description's path is :class:`~realuid_fast.paths.VE` with the
    prediction of the preconditioning: ``edm``, ``vp`` or ``ve``. Networks of improved DDPM predict ``noise`` on their
    own table of noise levels, :class:`~realuid_fast.paths.DiscreteVP`.

    Raises:
        UserError: the file holds something that such a network does not have; the error names it. No code in the file
            has run then either.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            content = _Reader(stream).load()
    except UserError as error:
        raise UserError(f"{file} is no pickled EDM network: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # A damaged pickle can make the reader raise any kind of exception.
        raise UserError(f"{file} is no pickled EDM network: {type(error).__name__} while reading it") from None
    try:
        state, described = _understood(content)
        if sum(value.nbytes for value in state.values()) > file.stat().st_size:
            raise UserError("its parameters take more bytes than the file has")
        return state, described
    except UserError as error:
        raise UserError(f"{file} is no EDM network that can be converted: {error}") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no EDM network that can be converted: {type(error).__name__} in it") from None


def _understood(content: Any) -> tuple[dict[str, Tensor], Description]:
    if isinstance(content, Mapping):
        if "ema" not in content:
            raise UserError(f"its dictionary has no entry 'ema', only {', '.join(map(str, list(content)[:8]))}")
        content = content["ema"]
    outer = _module(content, "the network")
    inner = _module(_entries(outer, "_modules").get("model"), "the network's part 'model'")
    kind = NETWORKS.get(inner.name)
    if kind is None:
        raise UserError(f"its network is a {inner.name!r}, not {' or '.join(NETWORKS)}")
    path, settings, predict = _preconditioning(outer)
    return _state(inner, set()), Description(
        network={"kind": kind, **_settings(inner)},
        path=path,
        path_settings=settings,
        predict=predict,
        preprocessing="pixels / 127.5 - 1",
    )


def _settings(inner: Inert) -> dict[str, Any]:
    """The network's settings from the arguments that it was built with."""
    positional, named = inner.attributes.get("_init_args"), inner.attributes.get("_init_kwargs")
    if not isinstance(named, Mapping) or not isinstance(positional, (list, tuple)):
        raise UserError("it does not hold the arguments that its network was built with")
    settings = dict(named)
    order = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim")
    if len(positional) > len(order):
        raise UserError("its network was built with more unnamed arguments than can be told apart")
    settings |= dict(zip(order, positional, strict=False))
    try:
        side, channels = int(settings.pop("img_resolution")), int(settings.pop("in_channels"))
        settings["dim"] = [channels, side, side]
        settings["null_label"] = bool(settings.pop("label_dropout", 0)) and bool(settings.get("label_dim"))
        out = int(settings.pop("out_channels", channels))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError("its network was built without a size or number of channels") from None
    if out != channels:
        settings["out_channels"] = out
    return {key: _plain(key, value) for key, value in settings.items()}


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and all(v is None or isinstance(v, (bool, int, float, str)) for v in value):
        return list(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"the setting {key} of its network is neither a number, nor a text, nor a list of these")


def _preconditioning(outer: Inert) -> tuple[str, dict[str, Any], str]:
    """The path, its settings and the prediction of a preconditioning class."""
    name = outer.name
    if name == "iDDPMPrecond":
        table = _entries(outer, "_buffers").get("u")
        if not isinstance(table, Tensor) or table.dim() != 1 or len(table) < 4:
            raise UserError("its table of noise levels 'u' is missing")
        # u falls from the largest level to zero; step k of M has the level u[M - 1 - k].
        sigma = table.double()[:-1].flip(0)
        return "vp-discrete", {"alphas_cumprod": (1 / (1 + sigma**2)).tolist()}, "noise"
    if name not in ("EDMPrecond", "VPPrecond", "VEPrecond"):
        raise UserError(f"its preconditioning {name!r} is none of EDMPrecond, VPPrecond, VEPrecond and iDDPMPrecond")
    low, high = (_number(outer, key) for key in ("sigma_min", "sigma_max"))
    settings = {"sigma_min": max(low, SIGMA_MIN), "sigma_max": min(high, SIGMA_MAX)}
    if name == "EDMPrecond":
        return "ve", {**settings, "sigma_data": _number(outer, "sigma_data")}, "edm"
    if name == "VPPrecond":
        for key, value in VP_CONSTANTS.items():
            if not math.isclose(found := _number(outer, key), value):
                raise UserError(f"its preconditioning has {key} = {found:g} where the prediction 'vp' has {value:g}")
    return "ve", settings, name[:2].lower()


def _number(module: Inert, key: str) -> float:
    value = module.attributes.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise UserError(f"its preconditioning has no number {key}")
    return float(value)


def _module(value: Any, what: str) -> Inert:
    if not isinstance(value, Inert) or not isinstance(value.attributes, Mapping):
        raise UserError(f"{what} is missing")
    return value


def _entries(module: Inert, key: str) -> Mapping[str, Any]:
    found = module.attributes.get(key)
    if not isinstance(found, Mapping):
        raise UserError(f"a module in it has no {key}")
    return found


def _state(module: Inert, seen: set[int], prefix: str = "") -> dict[str, Tensor]:
    """Parameters and saved buffers of a module and of those inside it, by their names."""
    # Visit each module once: a file can make a module contain itself, or another one twice at every level.
    if id(module) in seen or prefix.count(".") > DEEPEST:
        raise UserError(f"the module {prefix.rstrip('.') or 'model'} is inside itself or in two places")
    seen.add(id(module))
    passing = module.attributes.get("_non_persistent_buffers_set") or ()
    state: dict[str, Tensor] = {}
    for key in ("_parameters", "_buffers"):
        for name, value in _entries(module, key).items():
            if value is None or (key == "_buffers" and name in passing):
                continue
            if not isinstance(value, Tensor):
                raise UserError(f"{prefix}{name} is no tensor")
            state[f"{prefix}{name}"] = value
    for name, inside in _entries(module, "_modules").items():
        if inside is not None:
            state |= _state(_module(inside, f"the module {prefix}{name}"), seen, f"{prefix}{name}.")
    return state
