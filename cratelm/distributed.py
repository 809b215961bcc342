"""Work with several processes, which torchrun starts: training, and the collection of records.

Each process computes its share. Only process 0 writes the final files. In a training it broadcasts its decisions (open
the run, stop) to the others, so no process waits for one that has exited.
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

_Answer = TypeVar("_Answer")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: long enough for a measurement on process 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Rank, number and process groups of the processes that work together."""

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

    def decide(self, question: Callable[[], _Answer]) -> _Answer:
        """The answer of process 0, in all processes. If it raises CrateError, the others exit without a message."""
        if self.size == 1:
            return question()
        message: list[Any] = [None, False]  # the answer, and whether there was an error
        failure: CrateError | None = None
        if self.leads:
            try:
                message[0] = question()
            except CrateError as error:
                failure, message[1] = error, True
        dist.broadcast_object_list(message, src=0, group=self.hosts)
        if failure is not None:
            raise failure
        if message[1]:
            raise SystemExit(2)
        return message[0]

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier(group=self.hosts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in some process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.hosts)
        return bool(flags)

    def gather(self, value: _Answer) -> list[_Answer]:
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
"""One process that works by itself."""


@contextlib.contextmanager
def join_world(name: DeviceName, *, same_errors: bool = True) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started, if it did; yield the world and the device of this process.

    Only process 0 prints; also errors, unless `same_errors` is False: one process may fail alone. Raises CrateError for
    a device that is not available.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield ALONE, select_device(name)
        return
    device = select_device(name)
    if device.type == "mps":
        raise CrateError(f"{size} processes cannot share one MPS device. Use one process, or --device cpu")
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise CrateError(
                f"each process needs a GPU, got {local + 1} or more processes and {gpus} GPUs on this machine. "
                f"Start with: torchrun --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun keeps its store when it restarts the processes, and with it the addresses of dead processes.
        # On several machines, which may count their attempts differently, recipes/paper.sh has the remedy.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    console.quiet = rank > 0
    try:
        hosts, disks = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
        yield World(rank=rank, size=size, hosts=hosts, disks=disks), device
    except CrateError:
        if rank > 0 and same_errors:  # process 0 prints the message
            raise SystemExit(2) from None
        raise
    finally:
        dist.destroy_process_group()
