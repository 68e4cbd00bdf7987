"""One run on several processes, each with a device and a share of the batch: torchrun's ranks over torch.distributed.

Every rank draws its own noise, times and labels and reads its own rows of every real batch. Gradients are averaged over
all ranks before each optimiser step, so all ranks take the same step. By default every rank holds the whole state,
gradients are averaged while the backward pass goes on, and rank 0 alone writes the state. With :mod:`.sharding` the
state is spread over the ranks. Either way a run can be resumed on any number of ranks that divides the batch.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map_only

from ..errors import UserError

# Rank 0 evaluates and draws pictures while the others wait. A rank that dies is noticed by torchrun at once.
PATIENCE = timedelta(hours=2)
# The distance between the seeds of two ranks: 2^63 over the golden ratio, made odd so that its multiples modulo 2^63
# are all different.
_STRIDE = 0x4F1BBCDCBFA53E0B
# Backends of process groups that were not destroyed, because this rank alone failed and the others would not answer.
_left: list[str] = []


def rank() -> int:
    """This process' number among the ranks; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device(name: str) -> str:
    """The device of this process for ``run.device``: under torchrun ``cuda`` means the GPU of the local rank."""
    if "LOCAL_RANK" not in os.environ:
        return name
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(f"run.device must be cuda where torchrun gives each of a machine's ranks its GPU, got {name}")
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name


def restarted(folder: Path) -> bool:
    """Whether torchrun restarted this process because one of its group had died, after the run had begun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (folder / "config.yaml").is_file()


@contextlib.contextmanager
def joined(on: str, alone: bool = False) -> Iterator[None]:
    """The process group that torchrun's environment describes, for a run on device ``on``; none without torchrun.

    With ``alone`` a single process makes a group of one, which FSDP2 needs.
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
        # Messages about control flow are CPU tensors and go by gloo, so that nobody waits for a GPU to exchange them.
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
    """Make the default process group with torch's ``init_process_group``; end it and its threads after the block."""
    # The functions of torch.distributed.nn take as a default argument the group that exists when the module is
    # imported. Imported later, it would keep our group alive, and the group's threads abort the process while the
    # interpreter shuts down.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group(backend, **settings)
    # A thread of gloo frees the last tensor after it has reported the sum as done. Freeing may need the interpreter's
    # lock, which destroy_process_group holds while it waits for that thread: a deadlock. So give the thread a moment.
    moment, waits = 0.1, False
    try:
        yield
    except BaseException as error:
        # A short moment: torchrun may be about to kill this process, which still has an error to report.
        moment = 0.005
        # If this rank alone failed, NCCL would wait here for the other ranks, and they would wait for this one.
        waits = "nccl" in backend and size() > 1 and not getattr(error, "of_all_ranks", False)
        raise
    finally:
        time.sleep(moment)
        if waits:
            _left.append(backend)
        else:
            dist.destroy_process_group()


def unended() -> bool:
    """Whether a process group could not be ended, so that the process must end by :func:`leave`."""
    return bool(_left)


def leave(code: int) -> None:
    """End the process at once with ``code`` if a group could not be ended, whose threads would keep it alive."""
    if _left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _place() -> dict[str, Any]:
    """The store, rank and size that torchrun's environment gives, with keys of their own after every restart.

    Restarted processes get the same store as the first ones, whose addresses are still in it. A rank that read such an
    address before it was replaced would wait for a connection that nobody makes. On several hosts the keys stay as they
    are, because hosts can count different numbers of restarts.
    """
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return {"store": store, "rank": rank, "world_size": size}


def share(batch: int, parts: int) -> int:
    """Rows of one forward pass on this rank, for a batch that all ranks together make in ``parts`` passes each.

    Raises:
        UserError: ``batch`` does not divide by ranks times ``parts``.
    """
    if batch % (size() * parts):
        ranks = f"{size()} ranks" if size() > 1 else "1 rank"
        raise UserError(f"batch {batch} does not divide by {ranks} times run.accumulate {parts}")
    return batch // (size() * parts)


def seed(common: int) -> int:
    """This rank's own seed, made from one that all ranks have in common. Rank 0 keeps the common one."""
    return (common + rank() * _STRIDE) % 2**63


def averaged(sums: Tensor) -> Tensor:
    """The mean of a tensor over all ranks."""
    if size() > 1:
        dist.all_reduce(sums)
        sums /= size()
    return sums


def agreed(mine: bool) -> bool:
    """Whether ``mine`` is true on any rank; all ranks must call."""
    if size() == 1:
        return mine
    said = torch.tensor([int(mine)])
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait() -> None:
    """Wait until all ranks have called this."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))


def gathered(own: dict[str, Any]) -> list[dict[str, Any]]:
    """The ``own`` state of every rank, in order, for a checkpoint; all ranks must call."""
    if size() == 1:
        return [own]
    everyone: list[Any] = [None] * size()
    # A tensor on a GPU would arrive on the sender's GPU, so send copies in host memory.
    dist.all_gather_object(everyone, tree_map_only(Tensor, Tensor.cpu, own))
    return everyone


def _died(error: BaseException) -> bool:
    """Whether an error of torch says that another rank is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
    return size() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
