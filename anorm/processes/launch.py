"""One process a device: here, through torch's elastic launcher, or as torchrun and srun started us."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anorm.processes.interrupt import interruptible
from anorm.processes.world import LAUNCHED, World, exit_on_failure, process_group

Rank = Callable[..., int]


@contextmanager
def joined_by_others() -> Iterator[World | None]:
    """Give the world of this process when torchrun, or srun with several tasks, started it as one of several; else None.

    A batch script has SLURM_NTASKS and SLURM_PROCID too, and is one process: srun alone numbers a step's tasks.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        pass
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ.update(slurm_environment(os.environ))
    else:
        yield None
        return
    with process_group() as world:
        yield world


def slurm_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """torch's names for what srun sets; an address or port that is set already stays."""
    a_node = (
        slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm.get("SLURM_NTASKS_PER_NODE") or "1"
    )  # such as 4(x2)
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm.get("SLURM_STEP_NUM_TASKS") or slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": re.match(r"\d+", a_node)[0],
        "MASTER_ADDR": slurm.get("MASTER_ADDR")
        or first_host(slurm.get("SLURM_STEP_NODELIST") or slurm["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(20000 + int(slurm["SLURM_JOB_ID"]) % 20000),
    }


def first_host(nodelist: str) -> str:
    """Return the first of a Slurm list of hosts: "gpu[003-007,12],cpu1" -> "gpu003"."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return prefix + numbers.split(",")[0].split("-")[0] + tail.split(",")[0]


def launch(rank: Rank, processes: int, *arguments: Any) -> int:
    """Run ``rank(*arguments)`` in ``processes`` processes on this machine; its exit status.

    One process runs here. Of several, the first to fail ends the others; what it had to say is printed.
    """
    if processes == 1:
        with interruptible():
            return rank(*arguments)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # it would report each failure in 30 lines
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"anorm-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        local_addr=_local_address(),
        signals_to_handle=",".join(
            name
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
            if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN  # nohup
        ),
    )
    os.environ[LAUNCHED] = "1"
    with tempfile.TemporaryDirectory(prefix="anorm-") as words:
        try:
            return max(elastic_launch(config, _in_rank)(rank, words, *arguments).values())
        except ChildFailedError as error:
            return _report(error, processes, Path(words))
        except Exception as error:
            # The signal may hit one of torch's own finally blocks: SignalException then sits in __context__. Such a
            # block stops the ranks with SIGTERM, whatever the signal was.
            while error is not None and not isinstance(error, SignalException):
                error = error.__context__
            if error is None:
                raise
            print("\n".join(path.read_text() for path in sorted(Path(words).iterdir())[:1]), flush=True)
            return 128 + int(error.sigval)
        finally:
            del os.environ[LAUNCHED]


def _local_address() -> str:
    """Return an address of this machine that resolves: a container's own host name need not."""
    try:
        socket.getaddrinfo(socket.getfqdn(), None)
    except OSError:
        return "localhost"
    return socket.gethostname() if socket.gethostname() == socket.getfqdn() else "localhost"


def _in_rank(rank: Rank, words: str, *arguments: Any) -> int:
    """Run a rank in its new process. A status other than 0 ends the process, or the launcher would not notice."""
    return exit_on_failure(lambda: rank(*arguments, words=Path(words) / f"{int(os.environ['RANK']):05d}"))


def _report(error: Any, processes: int, words: Path) -> int:
    """Print why the first process failed; its status."""
    said = [path.read_text() for path in sorted(words.iterdir())]
    number, failure = error.get_first_failure()
    if said:
        print(said[0], file=sys.stderr, flush=True)
    elif failure.exitcode < 0:
        whose = (
            " (on GPUs most often NCCL's, as another did not answer)"
            if failure.exitcode == -signal.SIGABRT
            else ""
        )
        print(
            f"error: process {number} (of 0 to {processes - 1}) was killed by signal {-failure.exitcode}{whose}; "
            "the others were stopped. Repeat the command to continue from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    else:
        print(
            f"error: process {number} ended with status {failure.exitcode}; see its traceback above. Repeat "
            "the command to continue from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    return failure.exitcode if failure.exitcode > 0 else 1
