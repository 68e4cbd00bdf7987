"""One run on several processes, each with a device and a share of the batch: torchrun's ranks over torch.distributed.

Every rank draws its own noise, times and labels and reads its own rows of every real batch. Gradients are averaged over
all ranks before each optimiser step, so all ranks take the same step. By default every rank holds the whole state,
gradients are averaged while the backward pass goes on, and rank 0 alone writes the state. With :mod:`.sharding` the
state is spread over the ranks. Either way a run can be resumed on any number of ranks that divides the batch.
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
# Bytes of gradients in one message: so many that the message's time is set by bandwidth and not by latency.
PIECE = 2**25
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


def share(batch: int, parts: int, name: str) -> int:
    """Rows of one forward pass on this rank, for a batch that all ranks together make in ``parts`` passes each.

    Raises:
        UserError: ``batch``, the setting ``name``, does not divide by ranks times ``parts``.
    """
    if batch % (size() * parts):
        ranks = f"{size()} ranks" if size() > 1 else "1 rank"
        raise UserError(f"{name} {batch} does not divide by {ranks} times run.accumulate {parts}")
    return batch // (size() * parts)


def seed(common: int) -> int:
    """This rank's own seed, made from one that all ranks have in common. Rank 0 keeps the common one."""
    return (common + rank() * _STRIDE) % 2**63


def average(optimiser: Optimiser, parts: int = 1, sharded: bool = False) -> None:
    """Let the optimiser step along the mean over all ranks of gradients that were summed over ``parts`` passes.

    The gradients of a ``sharded`` network are means over the ranks already: FSDP2 averages them during the backward
    pass.
    """
    ranks = 1 if sharded else size()
    if ranks > 1:
        mean = Mean(optimiser.adam, ranks, parts)
        optimiser.adam.reduce, optimiser.adam.settle = mean, mean.settle
    elif parts > 1:
        optimiser.adam.reduce = lambda gradients: torch._foreach_mul_(list(gradients), 1 / parts)


class Mean:
    """Averages an optimiser's gradients, summed over ``parts`` backward passes, over all ranks.

    The flat gradient is reduced in pieces of :data:`PIECE` bytes or more, from its end to its beginning. A piece is
    sent as soon as the last backward pass has made all of its gradients, while earlier layers are still to come. The
    pieces follow from the parameters' sizes alone and are sent in a fixed order, so every run on as many ranks adds in
    the same order. DDP does not promise that: it lays out its buckets again after its first backward pass, and once
    more when a run is resumed.

    :meth:`FusedAdam.step` calls the object. The call sends the pieces that were not sent yet, such as one with a
    parameter without a gradient, and waits for all of them.
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
        """Wait for the pieces that were sent; their gradients are means afterwards.

        On a GPU the stream waits and the host does not. With gloo the host waits.
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
            # Point the gradients at the flat buffer. Otherwise the step would copy this rank's own there once more.
            self._flat.attach(piece)
            buffer, homes = self._flat.gradients(piece), []
        elif homes:
            buffer = torch._utils._flatten_dense_tensors(homes)
        else:
            return
        self._running.append((buffer, homes, dist.all_reduce(buffer, async_op=True)))


def pieces(sizes: Sequence[int], least: int) -> list[slice]:
    """Runs of neighbours with at least ``least`` in sum, from the last to the first; the first may have less."""
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


class RanksDiffer(UserError):
    """The ranks of a run were started with different settings; every rank raises it."""

    of_all_ranks = True


def check_alike(settings: Mapping[str, Any]) -> None:
    """Compare ``settings``, nested by name, and the package's and torch's code over all ranks; all ranks must call.

    Of ``run.device`` only the kind is compared: ranks have different GPUs.

    Raises:
        RanksDiffer: on every rank, with the first key that differs and both values.
    """
    if size() == 1:
        return
    own = {"realuid_fast": _code(), "torch": str(torch.__version__), **_flat(settings)}
    if "run.device" in own:
        own["run.device"] = own["run.device"].partition(":")[0]
    # Values are compared by their repr, so that NaN equals NaN.
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
    """Whether an error of torch says that another rank is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
    return size() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
