"""Checkpoints: written in the background, verified by a checksum, rotated, and the newest sound one found again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import NotWritten, UserError
from ..files import is_own, remove, replacing, sync
from ..optim import is_sharded
from . import distributed
from .sharding import Damaged, OwnRows, Shards, joined, split

FORMAT = 3
SHARDED = 4  # a checkpoint whose sharded tensors are in files beside it
# A trailer behind torch's own file: this mark, the file's length, and its SHA-256. torch.load ignores the trailer.
MARK = b"realuid_fast\x00\x00\x00\x01"
TRAILER = struct.Struct("<16sQ32s")
# Every name that a run gives to a file in its folder of checkpoints. Files with other names are never touched.
_STEP, _DIGEST = r"update-(\d{8,})", r"[0-9a-f]{16}"
_CHECKPOINT = re.compile(rf"{_STEP}\.pt")
_SHARD = re.compile(rf"{_STEP}\.{_DIGEST}\.shard")
_DAMAGED = re.compile(rf"{_STEP}(\.{_DIGEST})?\.damaged\d*")
_HALF = re.compile(rf"{_STEP}\.rank\d+(\.part)?|\.{_STEP}\.(pt|rank\d+)\.{_DIGEST}\.part")
_CHUNK = 1 << 20


class Checkpoints:
    """The checkpoints of one run, ``update-00000500.pt`` in ``folder``, of which the newest ``keep`` stay.

    A file appears under its name only when it is complete and on disk. Only then is the oldest one deleted, so a save
    that is interrupted or fails loses nothing. Every file ends in a checksum of itself.

    With ``sharded`` all ranks save together, and nothing is gathered: each writes its rows of the sharded tensors to
    ``update-00000500.<checksum>.shard``. When all have done so, rank 0 writes ``update-00000500.pt`` with everything
    else and the names of these files, which makes the checkpoint complete. Any number of ranks can read it.

    ``guard`` is called before every change to the folder, and raises if the folder is no longer this run's.
    ``identity`` names the run. Every checkpoint repeats it, and a checkpoint with another identity is refused.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        sharded: bool = False,
        guard: Callable[[], object] = lambda: None,
        identity: str | None = None,
    ) -> None:
        self.folder, self.keep, self.identity, self._guard = folder, keep, identity, guard
        # A group of its own: the writing threads exchange messages while training does so in the default group.
        self._group = dist.new_group(backend="gloo", timeout=distributed.PATIENCE) if sharded else None
        self._pending: Future[Path] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def files(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return files(self.folder)

    @property
    def lost(self) -> bool:
        """Whether there were checkpoints and every one of them is damaged."""
        return not self.files() and bool(_named(self.folder, _DAMAGED))

    def save(self, step: int, state: dict[str, Any], first: Callable[[], object] | None = None) -> Path:
        """Write ``state`` (tensors and plain values) as the checkpoint of ``step``.

        ``first`` is called before anything is written, to bring to disk what the checkpoint relies on, such as logs.

        Raises:
            UserError: this or an earlier checkpoint cannot be written.
        """
        self.save_soon(step, state, first)
        self.wait()
        return self._file(step)

    def save_soon(self, step: int, state: dict[str, Any], first: Callable[[], object] | None = None) -> None:
        """:meth:`save` in a thread. It returns once ``state`` may change again: the copy is made, or queued on CUDA.

        One checkpoint is written at a time; a second call waits for the first.

        Raises:
            UserError: an earlier checkpoint could not be written.
        """
        self.wait()
        content, ready = _snapshot({"format": FORMAT, "run": self.identity, **state})
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._thread.submit(self._write, step, content, ready, first)

    def check(self) -> None:
        """Raise the error of a save in the background, if it has failed by now; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in the background is on disk; raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a save in the background finish. Its error, if it fails, is dropped."""
        with contextlib.suppress(UserError):
            self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def load(self, verify: bool = True) -> dict[str, Any]:
        """The newest sound checkpoint. No code in a file is executed.

        A damaged checkpoint is renamed to ``*.damaged`` with a warning, and the one before it is taken. Sharded tensors
        come as :class:`Rows`. Without ``verify`` the checksums of their files are not computed: rank 0 has done it.

        Raises:
            UserError: there is no checkpoint, none is sound, or the newest sound one is of another version or run.
        """
        for file in reversed(self.files()):
            try:
                content = read(file, verify)
                # Earlier versions gave a run no identity.
                if None not in (run := content.get("run"), self.identity) and run != self.identity:
                    raise UserError(
                        f"{file} is a checkpoint of another run ({run!s:.32}; this run is {self.identity}): move it "
                        "out of the folder"
                    )
            except Damaged as damage:
                aside = _set_aside(file)
                warnings.warn(f"{file} is damaged ({damage}): set aside as {aside.name}", stacklevel=2)
                continue
            return content
        why = ": every one was damaged and is set aside there" if self.lost else ""
        raise UserError(f"there is no checkpoint to resume from in {self.folder}{why}")

    def _file(self, step: int) -> Path:
        return self.folder / f"update-{step:08d}.pt"

    def _write(
        self,
        step: int,
        content: dict[str, Any],
        ready: torch.cuda.Event | None,
        first: Callable[[], object] | None = None,
    ) -> Path:
        if ready is not None:
            ready.synchronize()
        file = self._file(step)
        if self._group is not None:
            # If one rank fails to write its rows, this call raises on all ranks.
            content, first = self._write_shards(file, content, first), None
            if dist.get_rank(self._group):
                return file
        with _sentences(f"the checkpoint {file}"):
            self._guard()
            if first is not None:
                first()
            self._make_folder()
            with replacing(file) as stream:
                _write_verified(stream, content)
                self._guard()
            self._guard()
            self._rotate(step)
        return file

    def _make_folder(self) -> None:
        # Its parents are not made: a run's folder that was deleted must not come back without a configuration.
        if not self.folder.is_dir():
            self.folder.mkdir(exist_ok=True)
            sync(self.folder.parent)

    def _rotate(self, step: int) -> None:
        """Delete the checkpoints that the one of ``step`` replaces, and leftovers of earlier steps."""
        older = [file for file in self.files() if _step(file) < step and is_own(file)]
        remove(older[: max(len(older) + 1 - self.keep, 0)])
        steps = {_step(file) for file in self.files()}
        # Shards of a later step stay: another rank may already be saving it.
        remove(f for f in _named(self.folder, _SHARD, _HALF) if _step(f) not in steps and _step(f) < step)

    def _write_shards(self, file: Path, content: dict[str, Any], first: Callable[[], object] | None) -> dict[str, Any]:
        """Write this rank's rows and wait for all ranks; the content of the ``.pt`` file, which names all shards.

        A shard's name is its checksum. So a step that is saved a second time overwrites no shard that the first
        checkpoint needs.
        """
        rest, rows = split(content)
        said: tuple[str, str]
        try:
            with _sentences(f"the checkpoint {file}"):
                self._guard()
                if first is not None:
                    first()
                self._make_folder()
                # The shard is complete under this name, but no checkpoint refers to it yet.
                whole = file.with_name(f"{file.stem}.rank{dist.get_rank(self._group)}")
                with replacing(whole) as stream:
                    digest = _write_verified(stream, rows)
                name = f"{file.stem}.{digest.hex()[:16]}.shard"
                os.replace(whole, file.with_name(name))
                sync(file.parent)
                said = name, ""
        except UserError as error:
            said = "", str(error)
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, said, group=self._group)
        if failures := [failure for _, failure in everyone if failure]:
            raise NotWritten(failures[0])
        return {**rest, "format": SHARDED, "shards": [name for name, _ in everyone]}


def files(folder: Path) -> list[Path]:
    """Everything in a run's folder of checkpoints that has a checkpoint's name, oldest first."""
    return sorted(_named(folder, _CHECKPOINT), key=_step)


def clear(folder: Path) -> None:
    """Delete every file that a run has written to its folder of checkpoints; other files stay."""
    remove(_named(folder, _CHECKPOINT, _SHARD, _DAMAGED, _HALF))


def clear_half_written(folder: Path) -> None:
    """Delete half-written files of a process that was killed. No process may be writing there meanwhile."""
    remove(_named(folder, _HALF))


def _named(folder: Path, *patterns: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if any(pattern.fullmatch(file.name) for pattern in patterns)]


def read(file: Path, verify: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, once its checksum has been verified. No code in it is executed.

    Sharded tensors come as :class:`Rows` of the files beside it. With ``verify`` the checksums of these are verified
    as well.

    Raises:
        Damaged: the file or a shard beside it is missing, cut short, altered or no checkpoint.
        UserError: the file cannot be read, or it is whole but of another version of the format.
    """
    content = _read_verified(file)
    version = content.get("format") if isinstance(content, dict) else None
    # The type is checked too: a tensor in this place would compare with a number without an error.
    if not isinstance(version, int) or version not in (FORMAT, SHARDED):
        raise UserError(f"{file} is no checkpoint of this version")
    if version == FORMAT:
        return content
    names = content.pop("shards", None)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and _SHARD.fullmatch(n) for n in names):
        raise Damaged("it does not name its shards")
    for name in names:
        try:
            with _opened(file.parent / name) as stream:
                if verify and _verify(stream).hex()[:16] != name.split(".")[-2]:
                    raise Damaged(f"{name} is another file")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except Damaged as damage:
            raise Damaged(f"{name}: {damage}") from None
        except OSError as error:
            raise UserError(f"{file.parent / name} cannot be read: {error.strerror or error}") from None
    return joined(content, Shards(file.parent, names))


def _read_verified(file: Path) -> Any:
    try:
        with _opened(file) as stream:
            _verify(stream)
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except (Damaged, MemoryError):
        raise
    except FileNotFoundError:
        raise Damaged("it is a link to nothing" if file.is_symlink() else "it is gone") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # A file from elsewhere can make torch's reader raise any kind of exception.
        raise Damaged(f"torch cannot read it: {type(error).__name__}") from None


def _opened(file: Path) -> BinaryIO:
    """Open a regular file or a link to one. Anything else is refused: reading a pipe or a device may never end."""
    if file.exists() and not file.is_file():
        raise Damaged("it is not a regular file")
    return file.open("rb")


def _verify(stream: BinaryIO) -> bytes:
    """The checksum at a file's end; raises :class:`Damaged` if it is not that of the bytes before it."""
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
        chunk = stream.read(min(_CHUNK, length))
        if not chunk:
            raise Damaged("it is cut short")
        found.update(chunk)
        length -= len(chunk)
    if found.digest() != digest:
        raise Damaged("its checksum is wrong")
    return digest


def _write_verified(stream: BinaryIO, content: Any) -> bytes:
    """Write ``content`` and, behind it, its checksum; returns the checksum."""
    hashed = _Hashed(stream)
    torch.save(content, cast(BinaryIO, hashed))
    digest = hashed.digest()
    stream.write(TRAILER.pack(MARK, hashed.length, digest))
    return digest


@contextlib.contextmanager
def _sentences(what: str) -> Iterator[None]:
    """Turn a failure to write inside the block into an error whose sentence names ``what``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer raises a RuntimeError after a failed write. Its context is the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise NotWritten(f"{what} cannot be written: {cause.strerror or cause}") from None


class _Hashed:
    """A stream that hashes and counts the bytes that it passes on to another stream."""

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


def _step(file: Path) -> int:
    return int(file.name.removeprefix(".").split(".")[0].removeprefix("update-"))


def _set_aside(file: Path) -> Path:
    for shard in sorted(_named(file.parent, _SHARD)):
        if _step(shard) == _step(file):
            _renamed(shard)
    return _renamed(file)


def _renamed(file: Path) -> Path:
    aside = file.with_suffix(".damaged")
    count = 1
    while os.path.lexists(aside):
        count += 1
        aside = file.with_suffix(f".damaged{count}")
    try:
        file.rename(aside)
    except OSError as error:
        raise UserError(f"{file} is damaged and cannot be set aside: {error.strerror or error}") from None
    return aside


def _snapshot(state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """A copy of the state in host memory, and the CUDA event after which it is complete; None if it is complete now.

    Copies from CUDA go to pinned memory and are queued in the current stream. So the host does not wait, and the next
    update overwrites a tensor only after it was copied.
    """
    on_device = False

    def copy(value: Any) -> Any:
        nonlocal on_device
        if isinstance(value, Tensor):
            value = value.detach()
            if is_sharded(value):
                return OwnRows(tuple(value.shape), copy(value.to_local()))
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
