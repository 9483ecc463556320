"""Processes: who this one is among the others, and what they do together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anorm.processes.interrupt import Interrupted

LAUNCHED = "ANORM_LAUNCHED"
"""Set in the environment of processes that our own launcher starts."""
TIMEOUT = timedelta(minutes=20)
"""One for all: compilation, an index of a slow disk and rank 0's writing take minutes, and a hang costs this once."""


@dataclass(frozen=True)
class World:
    """This process's place. ``size`` 1 needs no process group. launcher: the process id of torch's, where that began us."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    launcher: int | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over processes, on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        found = [None] * self.size if self.main else None
        dist.gather_object(value, found)
        return found or []

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, on all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def on(self, device: str) -> World:
        """Return the same place, computing on "cpu" or on the "gpu" of its local rank."""
        if device != "gpu":
            return replace(self, device=torch.device("cpu"))
        return replace(self, device=torch.device("cuda", self.local_rank % torch.cuda.device_count()))

    def end_if_orphaned(self) -> None:
        """End this process, saving nothing, when its launcher was killed: the repeated command needs the run's folder."""
        if self.launcher not in (None, os.getppid()):
            os._exit(128 + signal.SIGINT)

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """Return on all processes what ``make`` returns on rank 0. When it raises there, the others exit with status 2."""
        if self.size == 1:
            return make()
        box: list[Any] = [False, None]
        try:
            if self.main:
                box = [True, make()]
        finally:
            dist.broadcast_object_list(box)
            if not box[0]:
                _leave_together()
        if not box[0]:
            raise SystemExit(2)
        return box[1]


@contextmanager
def enter(world: World | None, device: str) -> Iterator[World]:
    """Give the world of this process: the one given, the one that the elastic launcher describes in the
    environment, or one alone.

    device: "cpu" or "gpu".
    """
    if world is not None:
        yield world.on(device)
    elif LAUNCHED not in os.environ:
        yield World().on(device)
    else:
        with process_group() as joined:
            yield joined.on(device)


@contextmanager
def process_group() -> Iterator[World]:
    """Join the group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe; leave it at the end.

    GPU tensors travel over NCCL; CPU tensors, which need no device to wait for, over gloo. A peer that does
    not answer for ``TIMEOUT`` ends the process. After an exception the group is left as it is: taking it down
    is something that all do together, and the others may be waiting elsewhere for this process.
    """
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)
    # loaders fork their workers when InfiniBand's memory is registered already
    os.environ.setdefault("RDMAV_FORK_SAFE", "1")
    world = World(rank, size, local, launcher=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
    if world.launcher is not None:
        threading.Thread(target=_watch_launcher, args=(world,), daemon=True).start()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    yield world
    _leave_together()


def _watch_launcher(world: World) -> None:
    """End this process once torchrun is gone: its death sends nothing, and a process that waits for a GPU hears no signal."""
    while True:
        world.end_if_orphaned()
        time.sleep(1)


def _leave_together() -> None:
    dist.barrier()  # no one closes the connection that another still reads from
    dist.destroy_process_group()


def exit_on_failure(work: Callable[[], int]) -> int:
    """Return ``work()``'s status if 0; else end this process at once, without taking the group down.

    The interpreter's own end would wait for the others to leave the group. The launcher, or the connections that break,
    tell them.
    """
    try:
        status = work()
    except Exception:
        # where the cause is that another ended, the launcher names that one, and ends this one meanwhile
        time.sleep(2)
        traceback.print_exc()
        status = 1
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class Agreement:
    """Requests (stop, save) that all processes act on at the same step boundary.

    A signal, or rank 0's clock, sets a bit here; ``due()`` is called by all at every boundary and returns the
    bits that any process had set by the previous boundary: the exchange runs beside the step and costs it nothing.
    """

    SAVE = 256

    def __init__(self, world: World):
        self.world, self.wanted, self._pending = world, 0, None
        self._previous = {}
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
            number = getattr(signal, name)
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # as nohup asks for SIGHUP
            self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            self.world.end_if_orphaned()  # what our launcher's death sends
        self.wanted = max(self.wanted & ~self.SAVE, number) | (self.wanted & self.SAVE)

    def ask_to_save(self) -> None:
        self.wanted |= self.SAVE

    def end_alone(self) -> None:
        """Raises Interrupted if a signal asked this process to stop. For work that is not in steps and starts from a
        checkpoint: the others are not waited for.
        """
        if wanted := self.wanted & ~self.SAVE:
            raise Interrupted(wanted)

    def due(self) -> tuple[int, bool]:
        """Return (number of the signal to stop for, or 0; whether to save)."""
        if self.world.size == 1:
            wanted = self.wanted
        else:
            wanted = 0
            if self._pending is not None:
                flags, work = self._pending
                work.wait()
                wanted = int(flags[0]) | (self.SAVE if flags[1] else 0)
            flags = torch.tensor([self.wanted & ~self.SAVE, self.wanted & self.SAVE])
            self._pending = (flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True))
        self.wanted &= ~self.SAVE
        return wanted & ~self.SAVE, bool(wanted & self.SAVE)

    def close(self) -> None:
        if self._pending is not None:
            self._pending[1].wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
