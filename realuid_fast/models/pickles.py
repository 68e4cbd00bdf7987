"""Reads files of ``torch.save`` as plain values, in memory and time in proportion to their size."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from ..errors import UserError
from ..files import check_regular

# An old file is not an archive but a row of pickles: mark, version, system, content, names of its storages.
_LEGACY_PICKLES = 5


class Reader(pickle._Unpickler):
    """An unpickler that refuses a tuple of tuples as a key of a dictionary or as an element of a set.

    A tuple that holds a second one twice, which holds a third one twice, and so on forty times, takes a few hundred
    bytes of a file, and its hash takes hours.

    The base class is the unpickler in Python, not the one in C: that one allocates memory in proportion to the largest
    memo number in the file.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)


def check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys whose hash may take unbounded time, see :class:`Reader`."""
    if any(isinstance(key, tuple) and any(isinstance(part, tuple) for part in key) for key in keys):
        raise UserError("a key in it is a tuple of tuples")


def ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    """An ordered dictionary made from a mapping or from pairs, after a check of its keys."""
    check_keys(pairs if isinstance(pairs, dict) else [key for key, _ in pairs])
    return OrderedDict(pairs)


def plain_set(elements: Any = ()) -> set[Any]:
    """A set made after a check of its elements."""
    check_keys(elements)
    return set(elements)


def _check_keys_at(opcode: bytes, keys: slice) -> None:
    """Have :class:`Reader` check the objects that an opcode is about to hash, which ``keys`` picks from the stack."""
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
    """Reads a file before torch does, without its tensors, to make sure that reading ends."""

    def __init__(self, stream: Any, held: int) -> None:
        super().__init__(stream)
        self._left, self._seen = held, set[Any]()

    def find_class(self, module: str, name: str) -> Any:
        return {"OrderedDict": ordered_dict, "Counter": ordered_dict, "set": plain_set}.get(name, _Anything)

    def persistent_load(self, pid: Any) -> Any:
        # ("storage", type, name, device, number of elements). torch allocates the memory before it looks for the
        # elements, so the number is checked here.
        name, count = pid[2], pid[4]
        check_keys([name])
        if name not in self._seen:
            self._seen.add(name)
            self._left -= count
        if self._left < 0:
            raise UserError("it declares storages of more numbers than it has bytes")
        return _Anything()


def load(source: Path | io.BytesIO, where: str) -> Any:
    """The content of a file of ``torch.save``, as tensors and plain values. No code in it is executed.

    Raises:
        UserError: reading ``source`` (named ``where``) would take memory or time out of proportion to its size.
        Exception: any kind, from torch's reader, for a damaged or foreign file.
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
    """The uncompressed entries of an archive of torch.save; None for an old file, which is not an archive."""
    try:
        # is_zipfile itself raises for an archive of several disks.
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
