"""One run on several processes, each with a device and a share of the batch: torchrun's ranks over torch.distributed.

Every rank takes the same steps: it draws its own noise, times and labels, reads its own rows of every real batch, and
the gradients are averaged over all ranks before each optimiser step. Either every rank holds the whole state, gradients
come together while the backward pass goes on and rank 0 alone writes the state; or state is shared out as well
(:mod:`.sharding`). Both go on with any number of ranks that divides the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map_only

import realuid_fast

from ..errors import UserError
from ..optim import FusedAdam, Optimiser

# Rank 0 evaluates and draws pictures while the others wait. A rank that dies is noticed by torchrun at once.
PATIENCE = timedelta(hours=2)
# Bytes of gradients that go round together: long enough for the wires to matter more than a message's latency.
PIECE = 2**25
# Odd, so that its multiples modulo 2^63 are all different: 2^63 over the golden ratio.
_STRIDE = 0x4F1BBCDCBFA53E0B
# The backend of a group that an error of this rank alone has left as it was.
_left: list[str] = []


def rank() -> int:
    """This process' number, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device(name: str) -> str:
    """``run.device`` of this process: under torchrun ``cuda`` is the GPU of its local rank."""
    if "LOCAL_RANK" not in os.environ:
        return name
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(f"run.device must be cuda where torchrun gives each of a machine's ranks its GPU, got {name}")
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name


def restarted(folder: Path) -> bool:
    """Whether torchrun has started this process again after one of its group had died, in a run that had begun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (folder / "config.yaml").is_file()


@contextlib.contextmanager
def joined(on: str, alone: bool = False) -> Iterator[None]:
    """The process group that torchrun's environment describes, for a run on device ``on``; none without torchrun.

    With ``alone`` a process without others is a group too, as what FSDP2 holds needs one.
    """
    single = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if (single and not alone) or dist.is_initialized():
        yield
        return
    place = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if single else _place()
    backend = "gloo"
    if torch.device(on).type == "cuda":
        if (own := torch.device(device(on))).index is not None:
            torch.cuda.set_device(own)
        # What is agreed between hosts goes past the GPUs, which need not be waited for then.
        backend = "cpu:gloo,cuda:nccl"
    with group(backend, timeout=PATIENCE, **place):
        try:
            yield
        except RuntimeError as error:
            if not _died(error):
                raise
            me, lines = rank(), str(error).strip().splitlines()
            raise UserError(
                f"rank {me} lost another rank, whose own message says why ({lines[0][:200]}); --resume, or torchrun "
                "with --max-restarts, goes on from the last checkpoint"
            ) from None


@contextlib.contextmanager
def group(backend: str, **settings: Any) -> Iterator[None]:
    """The default process group, made with torch's ``init_process_group``, and gone with all its threads afterwards."""
    # Its functions have the group that exists when it is imported for a default argument: it would outlive us, and its
    # threads end the process with an abort when they are still there while the interpreter winds up.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group(backend, **settings)
    # A thread of gloo lets go of the last tensor after it has said that the sum is there. That may take the
    # interpreter's lock, which destroy_process_group holds while it waits for the thread.
    moment, waits = 0.1, False
    try:
        yield
    except BaseException as error:
        # Whoever started us may be about to end us, and there is something to be said before.
        moment = 0.005
        # NCCL would wait here for ranks that know nothing of the error, and they for this one.
        waits = "nccl" in backend and size() > 1 and not getattr(error, "of_all_ranks", False)
        raise
    finally:
        time.sleep(moment)
        if waits:
            _left.append(backend)
        else:
            dist.destroy_process_group()


def unended() -> bool:
    """Whether there is a process group that could not be ended, for :func:`leave` to get away from."""
    return bool(_left)


def leave(code: int) -> None:
    """End the process with ``code``, at once where its group could not be ended: its threads would keep it."""
    if _left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _place() -> dict[str, Any]:
    """Where ranks meet by torchrun's environment, apart from those before a restart.

    Restarted processes get the store of the first ones, whose addresses are still in it: a rank that reads one before
    it is replaced waits for a connection that nobody makes. On several hosts not all count the same restarts.
    """
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return {"store": store, "rank": rank, "world_size": size}


def share(batch: int, parts: int, name: str) -> int:
    """This rank's part of a batch that all ranks make in ``parts`` goes.

    Raises:
        UserError: ``batch``, called ``name``, does not divide.
    """
    if batch % (size() * parts):
        ranks = f"{size()} ranks" if size() > 1 else "1 rank"
        raise UserError(f"{name} {batch} does not divide by {ranks} times run.accumulate {parts}")
    return batch // (size() * parts)


def seed(common: int) -> int:
    """This rank's seed in place of one that all ranks have; rank 0 keeps it, and no two ranks have the same."""
    return (common + rank() * _STRIDE) % 2**63


def average(optimiser: Optimiser, parts: int = 1, sharded: bool = False) -> None:
    """From now on the optimiser steps along the mean over all ranks of gradients that were summed over ``parts`` goes.

    Those of ``sharded`` networks are means over the ranks already: FSDP2 takes them, part by part, while the backward
    pass goes on.
    """
    ranks = 1 if sharded else size()
    if ranks > 1:
        mean = Mean(optimiser.adam, ranks, parts)
        optimiser.adam.reduce, optimiser.adam.settle = mean, mean.settle
    elif parts > 1:
        optimiser.adam.reduce = lambda gradients: torch._foreach_mul_(list(gradients), 1 / parts)


class Mean:
    """Takes the mean over all ranks of an optimiser's gradients, summed over ``parts`` backward passes.

    The flat gradient goes round in pieces of :data:`PIECE` bytes or more, from its end to its beginning: a piece sets
    out when the last backward pass has made all of its gradients, while those of the layers before are still to come.
    Pieces are what the parameters' sizes make of them and set out in one order, so that every run of as many ranks adds
    them up alike; DDP lays its buckets anew after its first backward pass, and again when a run is resumed.

    Calling it, which :meth:`FusedAdam.step` does, sends what has not set out (a piece with a parameter that takes no
    part) and waits for the rest.
    """

    def __init__(self, adam: FusedAdam, ranks: int, parts: int) -> None:
        self._params: list[nn.Parameter] = [p for group in adam.param_groups for p in group["params"]]
        self._flat = adam.flat_storage[0] if len(adam.flat_storage) == 1 else None
        self._factor, self._parts = 1 / (ranks * parts), parts
        self._pieces = pieces([p.numel() * p.element_size() for p in self._params], PIECE)
        self._sent, self._running = 0, list[tuple[Tensor, list[Tensor], Any]]()
        self._missing = self._all()
        for i, piece in enumerate(self._pieces):
            for p in self._params[piece]:
                p.register_post_accumulate_grad_hook(partial(self._arrived, i))

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        while self._sent < len(self._pieces):
            self._send()
        self.settle()
        self._sent, self._missing = 0, self._all()

    def settle(self) -> None:
        """Wait for what is on its way; gradients that have set out are means then.

        On a GPU the stream waits and the host does not; gloo has nothing but the host to wait.
        """
        for buffer, homes, work in self._running:
            work.wait()
            buffer.mul_(self._factor)
            if homes:
                torch._foreach_copy_(homes, torch._utils._unflatten_dense_tensors(buffer, homes))
        self._running.clear()

    def _all(self) -> list[int]:
        return [self._parts * len(self._params[piece]) for piece in self._pieces]

    def _arrived(self, i: int, _: Tensor) -> None:
        """A backward pass has added to the gradient of a parameter of piece ``i``."""
        self._missing[i] -= 1
        if self._missing[i] < 0:
            raise RuntimeError(f"a gradient was added to after it had gone to the other ranks: {self._parts} a step")
        while self._sent < len(self._pieces) and self._missing[self._sent] == 0:
            self._send()

    def _send(self) -> None:
        piece = self._pieces[self._sent]
        self._sent += 1
        homes = [p.grad for p in self._params[piece] if p.grad is not None]
        if self._flat is not None and self._flat.gather(piece):
            # Where the step looks for gradients; else it would bring those of this rank there once more.
            self._flat.attach(piece)
            buffer, homes = self._flat.gradients(piece), []
        elif homes:
            buffer = torch._utils._flatten_dense_tensors(homes)
        else:
            return
        self._running.append((buffer, homes, dist.all_reduce(buffer, async_op=True)))


def pieces(sizes: Sequence[int], least: int) -> list[slice]:
    """Neighbours that make at least so much together, from the last to the first, where less may be left."""
    found, end, held = [], len(sizes), 0
    for first in reversed(range(len(sizes))):
        held += sizes[first]
        if held >= least or first == 0:
            found.append(slice(first, end))
            end, held = first, 0
    return found


def averaged(sums: Tensor) -> Tensor:
    """The mean of a tensor over all ranks."""
    if size() > 1:
        dist.all_reduce(sums)
        sums /= size()
    return sums


def agreed(mine: bool) -> bool:
    """Whether any rank says so; all ranks must ask."""
    if size() == 1:
        return mine
    said = torch.tensor([int(mine)])
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait() -> None:
    """Until all ranks are here."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))


def gathered(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank has of its own, for a checkpoint; all ranks must call."""
    if size() == 1:
        return [own]
    everyone: list[Any] = [None] * size()
    # Each rank would get another's tensors on that one's GPU.
    dist.all_gather_object(everyone, tree_map_only(Tensor, Tensor.cpu, own))
    return everyone


class RanksDiffer(UserError):
    """The ranks of a run were started with different settings; every rank raises it."""

    of_all_ranks = True


def check_alike(settings: Mapping[str, Any]) -> None:
    """Compare ``settings``, nested by name, and the package's and torch's code over all ranks; all ranks must call.

    Of a device the kind is compared alone.

    Raises:
        RanksDiffer: on every rank, with the first key that differs and both values.
    """
    if size() == 1:
        return
    own = {"realuid_fast": _code(), "torch": str(torch.__version__), **_flat(settings)}
    if "run.device" in own:
        own["run.device"] = own["run.device"].partition(":")[0]
    # As words, in which a number that is none equals itself.
    first, *others = gathered({key: repr(value) for key, value in own.items()})
    for other, found in enumerate(others, 1):
        for key in {**first, **found}:
            one, two = (each.get(key, "not there") for each in (first, found))
            if one != two:
                raise RanksDiffer(
                    f"the ranks of a run must have the same settings and the same code: {key} is {one} on rank 0 and "
                    f"{two} on rank {other}"
                )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _code() -> str:
    """The package's version and a hash of its Python files."""
    content, root = hashlib.sha256(), Path(realuid_fast.__file__).parent
    for file in sorted(root.rglob("*.py")):
        content.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return f"{realuid_fast.__version__} ({content.hexdigest()[:12]})"


def _died(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
    return size() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
