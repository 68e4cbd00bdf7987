"""Safetensors files with a checksum of themselves, so that no damaged byte is read as a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CHECKSUM = "checksum"
_NO_CHECKSUM = "0" * 64  # what the checksum reads as while it is computed
_CHUNK = 1 << 20


def with_checksum(tensors: Mapping[str, Tensor], key: str, content: Mapping[str, Any]) -> bytearray:
    """A safetensors file whose metadata entry ``key`` is ``content`` as JSON, with a SHA-256 of the whole file in it.

    The checksum is the entry :data:`CHECKSUM` of that JSON. It covers every byte of the file but its own 64 digits,
    which are computed as zeros. :func:`matches` compares it.
    """
    from safetensors.torch import save

    # The checksum is part of this entry and first in it: safetensors writes several entries in an order that changes.
    ordered = json.loads(json.dumps(content, sort_keys=True))
    raw = bytearray(save(dict(tensors), metadata={key: json.dumps({CHECKSUM: _NO_CHECKSUM, **ordered})}))
    first = raw.index(_NO_CHECKSUM.encode())
    raw[first : first + len(_NO_CHECKSUM)] = hashlib.sha256(raw).hexdigest().encode()
    return raw


def matches(file: Path, checksum: object) -> bool:
    """Whether ``checksum``, found in the safetensors file ``file``, is that of its bytes."""
    if not isinstance(checksum, str) or len(checksum) != len(_NO_CHECKSUM):
        return False
    with file.open("rb") as stream:
        size = stream.read(8)
        header = stream.read(int.from_bytes(size, "little"))
        found = hashlib.sha256(size + header.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1))
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest() == checksum
