"""Files of ``torch.save`` read as plain values, in no more memory and time than their bytes account for."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from .errors import UserError
from .files import check_regular

_LEGACY_PICKLES = 5  # of an old file, which is no archive: mark, version, system, content, names of its storages


class Reader(pickle._Unpickler):
    """An unpickler that refuses a tuple of tuples as a key of a dictionary or as an element of a set.

    A tuple that holds another one twice, which holds another one twice, and so on forty times, takes a few hundred
    bytes of a file, and its hash takes hours.

    It is the one in Python, since the one in C takes memory by the largest number that a file gives to one of its
    objects.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)


def check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys whose hash may take unbounded time, see :class:`Reader`."""
    if any(isinstance(key, tuple) and any(isinstance(part, tuple) for part in key) for key in keys):
        raise UserError("a key in it is a tuple of tuples")


def ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    """An ordered dictionary of a mapping or of pairs, whose keys are checked."""
    check_keys(pairs if isinstance(pairs, dict) else [key for key, _ in pairs])
    return OrderedDict(pairs)


def plain_set(elements: Any = ()) -> set[Any]:
    """A set of elements that are checked."""
    check_keys(elements)
    return set(elements)


def _check_keys_at(opcode: bytes, keys: slice) -> None:
    """Have :class:`Reader` check what it is about to hash, the part ``keys`` of its stack."""
    inherited: Callable[[Any], None] = Reader.dispatch[opcode[0]]

    def load(reader: Any) -> None:
        check_keys(reader.stack[keys])
        inherited(reader)

    Reader.dispatch[opcode[0]] = load


_check_keys_at(pickle.SETITEM, slice(-2, -1))
_check_keys_at(pickle.SETITEMS, slice(None, None, 2))
_check_keys_at(pickle.DICT, slice(None, None, 2))
_check_keys_at(pickle.ADDITEMS, slice(None))
_check_keys_at(pickle.FROZENSET, slice(None))


class _Anything:
    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Trial(Reader):
    """Reads what torch is going to read, with nothing in the place of tensors, to see that it ends."""

    def __init__(self, stream: Any, held: int) -> None:
        super().__init__(stream)
        self._left, self._seen = held, set[Any]()

    def find_class(self, module: str, name: str) -> Any:
        return {"OrderedDict": ordered_dict, "Counter": ordered_dict, "set": plain_set}.get(name, _Anything)

    def persistent_load(self, pid: Any) -> Any:
        # ("storage", type, name, device, number of elements): torch takes memory before it looks for the elements.
        name, count = pid[2], pid[4]
        check_keys([name])
        if name not in self._seen:
            self._seen.add(name)
            self._left -= count
        if self._left < 0:
            raise UserError("it declares storages of more numbers than it has bytes")
        return _Anything()


def load(source: Path | io.BytesIO, where: str) -> Any:
    """What ``torch.save`` wrote, as tensors and plain values: no code in it runs.

    Raises:
        UserError: what ``source``, called ``where``, holds would take more memory or time than its bytes account for.
        Exception: whatever torch's reader trips over in a damaged or foreign file.
    """
    if isinstance(source, io.BytesIO):
        _check(source, len(source.getbuffer()), where)
        source.seek(0)
    else:
        check_regular(source)
        with source.open("rb") as stream:
            _check(stream, source.stat().st_size, where)
    return torch.load(source, map_location="cpu", weights_only=True)


def _check(stream: BinaryIO, held: int, where: str) -> None:
    entries = _entries(stream, held, where)
    stream.seek(0)
    try:
        if entries is None:
            for _ in range(_LEGACY_PICKLES):
                _Trial(stream, held).load()
            return
        with zipfile.ZipFile(stream) as archive:
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as pickled:
                        _Trial(pickled, held).load()
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from None


def _entries(stream: BinaryIO, held: int, where: str) -> list[zipfile.ZipInfo] | None:
    """The entries of an archive, which torch.save stores as they are; None for a file of old, which is no archive."""
    try:
        # Which raises too, for an archive of several disks.
        if not zipfile.is_zipfile(stream):
            return None
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception:
        raise UserError(f"{where} is a damaged archive") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(
            f"{where} is a compressed archive, which torch.save does not write: it could unpack to any size"
        )
    declared = sum(entry.file_size for entry in entries)
    if declared > held:
        raise UserError(f"{where} declares {declared:,} bytes of content and holds {held:,}: it is damaged")
    return entries
