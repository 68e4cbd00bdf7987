"""Checkpoints: written in the background, verified by a checksum, rotated, and the newest sound one found again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..errors import UserError

FORMAT = 3
# After torch's own file: this mark, the length of what it covers, and its SHA-256. torch.load does not mind.
MARK = b"realuid_fast\x00\x00\x00\x01"
TRAILER = struct.Struct("<16sQ32s")
_CHUNK = 1 << 20


class Checkpoints:
    """The checkpoints of one run, ``update-00000500.pt`` in ``folder``, of which the newest ``keep`` stay.

    A file appears under its name only when it is complete and on disk, and the oldest goes only then, so that a save
    which is interrupted or fails loses nothing. Every file ends in a checksum of itself.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._pending: Future[Path] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def files(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("update-*.pt"))

    @property
    def lost(self) -> bool:
        """Whether there were checkpoints and every one of them is damaged."""
        return not self.files() and any(self.folder.glob("update-*.damaged*"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``state`` (tensors and plain values) and torch's own generator states as the checkpoint of ``step``.

        Raises:
            UserError: this or an earlier checkpoint cannot be written.
        """
        self.save_soon(step, state)
        self.wait()
        return self._file(step)

    def save_soon(self, step: int, state: dict[str, Any]) -> None:
        """:meth:`save`, in a thread: returns when the state is copied to host memory and may change again.

        One checkpoint is written at a time; a second call waits for the first.

        Raises:
            UserError: an earlier checkpoint could not be written.
        """
        self.wait()
        content = {"format": FORMAT, "torch_rng": _generator_states(), **state}
        content, ready = _snapshot(content)
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._thread.submit(self._write, step, content, ready)

    def check(self) -> None:
        """Raise what a save in the background ran into; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a save in the background finish, whatever comes of it."""
        with contextlib.suppress(UserError):
            self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def load(self) -> dict[str, Any]:
        """The newest checkpoint that is sound; also restores torch's own generator states. No code in a file runs.

        Damaged ones are renamed to ``*.damaged`` with a warning, and the one before is taken.

        Raises:
            UserError: there is none, none is sound, or one was written by another version.
        """
        for file in reversed(self.files()):
            try:
                content = read(file)
                _set_generator_states(content.pop("torch_rng", {}))
            except Damaged as damage:
                aside = _set_aside(file)
                warnings.warn(f"{file} is damaged ({damage}): set aside as {aside.name}", stacklevel=2)
                continue
            return content
        why = ": every one was damaged and is set aside there" if self.lost else ""
        raise UserError(f"there is no checkpoint to resume from in {self.folder}{why}")

    def _file(self, step: int) -> Path:
        return self.folder / f"update-{step:08d}.pt"

    def _write(self, step: int, content: dict[str, Any], ready: torch.cuda.Event | None) -> Path:
        if ready is not None:
            ready.synchronize()
        file = self._file(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as stream:
                hashed = _Hashed(stream)
                torch.save(content, cast(BinaryIO, hashed))
                stream.write(TRAILER.pack(MARK, hashed.length, hashed.digest()))
            for old in self.files()[: -self.keep]:
                old.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            # torch's writer turns a failed write into a RuntimeError of its own, with the OSError before it.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise UserError(f"the checkpoint {file} cannot be written: {cause.strerror or cause}") from None
        return file


class Damaged(Exception):
    """A checkpoint that is not what was written."""


def read(file: Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU, after its checksum was found right; nothing in it is executed.

    Raises:
        Damaged: it is cut short, altered or no checkpoint.
        UserError: it may not be read, or is whole but of another version of the format.
    """
    try:
        with file.open("rb") as stream:
            _verify(stream)
            stream.seek(0)
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except (Damaged, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # What a foreign file makes the reader raise is anything.
        raise Damaged(f"torch cannot read it: {type(error).__name__}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} is no checkpoint of this version")
    return content


def _verify(stream: BinaryIO) -> None:
    size = stream.seek(0, os.SEEK_END)
    if size < TRAILER.size:
        raise Damaged("it is cut short")
    stream.seek(size - TRAILER.size)
    mark, length, digest = TRAILER.unpack(stream.read(TRAILER.size))
    if mark != MARK:
        raise Damaged("it is cut short, or of another version")
    if length != size - TRAILER.size:
        raise Damaged(f"it has {size - TRAILER.size} bytes of {length}")
    stream.seek(0)
    found = hashlib.sha256()
    while length:
        part = stream.read(min(_CHUNK, length))
        if not part:
            raise Damaged("it is cut short")
        found.update(part)
        length -= len(part)
    if found.digest() != digest:
        raise Damaged("its checksum is wrong")


class _Hashed:
    """A stream to write to that adds up what it passes on."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash, self.length = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        written = self._stream.write(data)
        self._hash.update(data)
        self.length += written
        return written

    def flush(self) -> None:
        self._stream.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose content replaces ``file`` in one step when the block ends, and is on disk then.

    Where the block or the disk fails, ``file`` stays as it was.
    """
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    # The new name itself is on disk only with its folder.
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _set_aside(file: Path) -> Path:
    aside = file.with_suffix(".damaged")
    count = 1
    while aside.exists():
        count += 1
        aside = file.with_suffix(f".damaged{count}")
    try:
        file.rename(aside)
    except OSError as error:
        raise UserError(f"{file} is damaged and cannot be set aside: {error.strerror or error}") from None
    return aside


def _snapshot(state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """A copy in host memory, and the event after which it is complete; None where it is now.

    From CUDA the copies go to pinned memory behind what is in the stream already: the host does not wait, and what the
    next update overwrites was read before.
    """
    on_device = False

    def copy(value: Any) -> Any:
        nonlocal on_device
        if isinstance(value, Tensor):
            value = value.detach()
            if value.device.type != "cuda":
                return value.to("cpu", copy=True)
            on_device = True
            return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {key: copy(v) for key, v in value.items()}
        return type(value)(map(copy, value)) if type(value) in (list, tuple) else value

    copied = copy(state)
    if not on_device:
        return copied, None
    ready = torch.cuda.Event()
    ready.record()
    return copied, ready


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generator_states(states: dict[str, Tensor]) -> None:
    try:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (KeyError, TypeError, RuntimeError):
        raise Damaged("it lacks torch's generator states") from None
