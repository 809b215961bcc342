"""Several processes as one trainer: torchrun starts them, this module divides the work.

Each process computes its own rows of every batch; gradients are averaged. Process 0 alone writes files. A decision of
one process for all (open the run, stop) is sent to the others, so that no process waits for one that has left.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, console, select_device

Answer = TypeVar("Answer")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: long enough for a measurement on process 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes that train together, as one of them sees them."""

    rank: int = 0
    size: int = 1
    hosts: Any = field(default=None, repr=False)
    """Process group on the CPUs, for messages between the processes."""
    disks: Any = field(default=None, repr=False)
    """Separate process group for checkpoints, which are written during training."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def decide(self, question: Callable[[], Answer]) -> Answer:
        """Process 0 answers for all. Its CrateError stops the others too, silently: one line is enough."""
        if self.size == 1:
            return question()
        said: list[Any] = [None, None]
        failure: CrateError | None = None
        if self.leads:
            try:
                said[0] = question()
            except CrateError as error:
                failure, said[1] = error, str(error)
        dist.broadcast_object_list(said, src=0, group=self.hosts)
        if failure is not None:
            raise failure
        if said[1] is not None:
            raise SystemExit(2)
        return said[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true for some process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.hosts)
        return bool(flags)

    def gather(self, value: Answer) -> list[Answer]:
        """The value of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes, the same in each."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.size

    def sum_on_hosts(self, value: Tensor) -> Tensor:
        """The sum over processes of numbers on the CPU, the same in each."""
        if self.size > 1:
            dist.all_reduce(value, group=self.hosts)
        return value


ALONE = World()
"""One process that trains by itself."""


@contextlib.contextmanager
def join_world(name: DeviceName) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started, if it did; yield the world and the device of this process.

    Processes other than 0 fall silent. Raises CrateError for a device that is not there.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield ALONE, select_device(name)
        return
    device = select_device(name)
    if device.type == "mps":
        raise CrateError(f"{size} processes cannot share one MPS device. Train with one, or with --device cpu")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if local >= found:
            raise CrateError(
                f"process {local} of this machine needs a GPU, the machine has {found}. "
                f"Start with: torchrun --nproc-per-node {found}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun keeps its store when it starts the processes again: a fresh process would find a dead one's address.
        # On several machines, which may count their attempts differently, recipes/paper.sh has the remedy.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    console.quiet = rank > 0
    try:
        hosts, disks = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
        yield World(rank=rank, size=size, hosts=hosts, disks=disks), device
    except CrateError:
        if rank > 0:  # every process may have found it; one line is enough
            raise SystemExit(2) from None
        raise
    finally:
        dist.destroy_process_group()
