"""data.loader=torch: worker processes of torch's DataLoader; each answers whole requests."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from anorm.data.feeds.base import Feed, Request, generators
from anorm.data.sources.base import Dataset, Fetched


class Failed(str):
    """An error message from a worker to its rank. As an exception it would arrive wrapped in the worker's traceback."""


class _Answers(TorchDataset):
    """The data set as the DataLoader sees it: Request -> Fetched, or Failed where the user is to mend something."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, request: Request) -> Fetched | Failed:
        try:
            return self.dataset.fetch(request.indices.tolist(), generators(request, self.seed))
        except ValueError as error:
            return Failed(error)


class WorkerFeed(Feed):
    """Answers requests by ``workers`` processes; 0: in this process, when an answer is asked for."""

    def __init__(self, dataset: Dataset, seed: int, workers: int, device: torch.device):
        super().__init__()
        self._requests = _Requests()
        self._answers, pin = _Answers(dataset, seed), device.type == "cuda"
        self._loader = None
        if workers or pin:
            self._loader = DataLoader(
                self._answers,
                batch_size=None,
                sampler=self._requests,
                num_workers=workers,
                pin_memory=pin,
                persistent_workers=workers > 0,
                worker_init_fn=start_worker,
                # else every epoch takes a draw from the model's global generator
                generator=torch.Generator(),
            )

    def run(self, requests: Iterable[Request]) -> Iterator[Fetched]:
        # no name for the iterator: in the frame of a traceback it would outlive close(), and its workers with it
        for answer in self._answer(requests):
            if isinstance(answer, Failed):
                raise ValueError(str(answer))
            self.note(answer.bad)
            yield answer

    def _answer(self, requests: Iterable[Request]) -> Iterator[Fetched | Failed]:
        if self._loader is None:  # a DataLoader costs 30 microseconds a batch
            return map(self._answers.__getitem__, requests)
        self._requests.current = requests
        with forking():
            return iter(self._loader)

    def close(self) -> None:
        self._loader = None  # the DataLoader ends its workers when it is collected


class _Requests:
    """A sampler whose content is replaced for each run, so that the DataLoader and its workers outlive an epoch."""

    current: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.current)


@contextmanager
def forking() -> Iterator[None]:
    """Keep the garbage collector off while workers are forked.

    Workers inherit the rank's garbage. If a worker collects another loader's leftovers, it closes that loader's queues, or
    waits for DALI's threads, which it does not have; and each object that it looks at copies a page of the rank's memory.
    ``start_worker`` sets the inherited objects aside and turns the collector on.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def start_worker(worker: int) -> None:
    """Set up a worker: its own collector, its allocator, its signals. Runs first in every worker."""
    gc.freeze()
    gc.enable()
    keep_freed_memory()
    _leave_signals_to_the_rank()


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of up to 1 GiB; do nothing on other C libraries.

    Decoded photographs, and the maps and gradients of a step on a CPU, are larger than what glibc keeps. Each would be
    mapped, cleared page by page and given back, which is a tenth of a worker's time and a quarter of a step's.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        for option in (m_trim_threshold, m_mmap_threshold):
            libc.mallopt(option, 1 << 30)


def _leave_signals_to_the_rank() -> None:
    """Let only the rank end this worker: through the DataLoader's own means, the last of which is SIGTERM.

    Ctrl-C and Slurm signal every process of a job. If a worker obeyed, its rank would lack the batches that it needs to
    reach the end of its step, where it saves.
    """
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
