"""Runs as jobs of a Slurm cluster, through submitit: frozen configurations, one task a node, requeued when
preempted or out of time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anorm.config.frozen import Config
from anorm.config.machine import Machine
from anorm.processes.errors import user_errors
from anorm.processes.launch import slurm_environment

FOLDER = Path(".slurm")
"""Beside the run folders: frozen configurations, job scripts, what jobs printed."""
OURS = ("ntasks", "ntasks-per-node", "array", "output", "error", "open-mode", "signal", "requeue")
WARNING, PATIENCE = 180, 120
"""Seconds between Slurm's signal and its kill, and those given to the run to save."""
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


@dataclass(frozen=True)
class Wishes:
    """What a job asks of Slurm. time: minutes, or Slurm's [DAYS-]HOURS:MINUTES[:SECONDS]; other: any further
    option of sbatch by its long name.
    """

    time: int
    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    other: dict[str, str | bool]

    @property
    def machine(self) -> Machine:
        """What is known of the nodes before the job starts."""
        return Machine(self.nodes * self.gpus_per_node, 1)


def wishes_from(words: list[str]) -> Wishes:
    """Return the wishes in ``slurm.KEY=VALUE ...``. Raises ValueError in words."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.removeprefix("slurm.").partition("=")
        if not equals or not key or not value:
            raise ValueError(
                f"{word}: give slurm.OPTION=VALUE, with a long option of sbatch: slurm.partition=gpu"
            )
        if (key := key.replace("_", "-")) in OURS:
            raise ValueError(
                f"slurm.{key} is decided by train.py: one task a node, requeued after its signal"
            )
        found[key] = value
    gpus = whole(found.pop("gpus-per-node", "8"), "gpus-per-node", 0)
    return Wishes(
        minutes(found.pop("time", "1440")),
        whole(found.pop("nodes", "1"), "nodes", 1),
        gpus,
        whole(found.pop("cpus-per-task", str(8 * gpus or 1)), "cpus-per-task", 1),
        {key: True if value == "true" else value for key, value in found.items()},
    )


def minutes(text: str) -> int:
    """Return the minutes of a duration as Slurm writes it: "90", "90:00", "1:30:00", "1-12", "1-12:30"."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(
            f"slurm.time={text} is no duration: give minutes, hours:minutes:seconds or days-hours"
        )
    days, *rest = (int(part) if part else 0 for part in match.groups())
    if match[1]:
        return max(1, days * 1440 + rest[0] * 60 + rest[1])
    return max(1, rest[0] * 60 + rest[1] if match[4] else rest[0])


def whole(text: str, key: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"slurm.{key}={text} must be a whole number, {least} or more")
    return int(text)


class Training:
    """What a job's task does: train.py on its node. Pickled when submitted, and again when requeued."""

    def __init__(self, script: Path, config: Path, processes: int | str):
        self.script, self.config, self.processes, self.running = script, config, processes, None

    def __call__(self) -> int:
        """Run to the end. On the first node a failure is an error, for Slurm to see; the others follow it."""
        # in a session of its own: Slurm's signal comes to the task, and is passed on once
        self.running = subprocess.Popen(self.command(), start_new_session=True)
        status = self.running.wait()
        if status and os.environ.get("SLURM_PROCID", "0") == "0":
            raise RuntimeError(f"train.py ended with status {status}; its words are above")
        return status

    def command(self) -> list[str]:
        """train.py launches the ranks of one node itself; over several nodes torchrun does."""
        train = [str(self.script), "--config", str(self.config)]
        nodes = int(os.environ.get("SLURM_NTASKS", 1))
        if nodes == 1:
            return [sys.executable, *train]
        import torch

        local = torch.cuda.device_count() or 1 if self.processes == "auto" else self.processes // nodes
        slurm = slurm_environment(os.environ)
        options = {
            "nnodes": nodes,
            "node-rank": slurm["RANK"],
            "nproc-per-node": local,
            "master-addr": slurm["MASTER_ADDR"],
            "master-port": slurm["MASTER_PORT"],
            "signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        }
        words = [f"--{key}={value}" for key, value in options.items()]
        return [sys.executable, "-m", "torch.distributed.run", *words, *train]

    def checkpoint(self):
        """Called in submitit's signal handler, on the first node: let all processes save, then be requeued.

        The process is watched without being waited for, which the interrupted wait() does.
        """
        from submitit.helpers import DelayedSubmission

        deadline = time.monotonic() + PATIENCE
        try:
            os.kill(self.running.pid, signal.SIGUSR2)
            while time.monotonic() < deadline:
                if os.waitid(os.P_PID, self.running.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    break
                time.sleep(0.1)
        except (AttributeError, ProcessLookupError, ChildProcessError):
            pass  # not started, or ended already
        return DelayedSubmission(Training(self.script, self.config, self.processes))


def submit_all(
    jobs: list[Any], script: Path, compose: Callable[[Any], Config], runs: Path, wishes: Wishes
) -> int:
    """Submit each of ``jobs`` with the configuration that ``compose`` gives for it. One that cannot be submitted stops no
    other; returns 0, or 2 when there was such a one.
    """
    statuses = []
    for job in jobs:
        with user_errors() as outcome:
            number = submit(script, compose(job), runs, wishes)
            print(f"job {number}: {log_of(runs, number)}", flush=True)
        statuses.append(outcome.status)
    return max(statuses)


def submit(script: Path, config: Config, runs: Path, wishes: Wishes) -> str:
    """Queue ``script --config FILE`` with this configuration in the file; returns the job's number.

    Raises ValueError where there is no Slurm, or it refuses.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise ValueError(f"there is no {command} here: submit from a machine of a Slurm cluster")
    processes, frozen = config.settings.hardware.processes, config.text()
    if processes != "auto" and processes % wishes.nodes:
        raise ValueError(
            f"hardware.processes={processes} on slurm.nodes={wishes.nodes}: as many on each node"
        )
    folder = (runs / FOLDER).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.blake2b(frozen.encode(), digest_size=8).hexdigest()}.yaml"
    file.write_text(frozen)
    executor = submitit.SlurmExecutor(folder, max_num_timeout=1000)
    # srun_args: since Slurm 22.05 srun does not take sbatch's number of processors
    executor.update_parameters(
        job_name=f"{config.choices['arch']}-{config.choices['norm']}-s{config.settings.seed}",
        time=wishes.time,
        nodes=wishes.nodes,
        ntasks_per_node=1,
        cpus_per_task=wishes.cpus_per_task,
        srun_args=[f"--cpus-per-task={wishes.cpus_per_task}"],
        signal_delay_s=WARNING,
        stderr_to_stdout=True,
        additional_parameters={"requeue": True, **wishes.other},
        **({"gpus_per_node": wishes.gpus_per_node} if wishes.gpus_per_node else {}),
    )
    try:
        return executor.submit(Training(script, file, processes)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"Slurm refuses the job: {' '.join(str(error).split())}") from error


def log_of(runs: Path, job: str) -> Path:
    """Return the file of what the first node's task of a job prints."""
    return (runs / FOLDER).resolve() / f"{job}_0_log.out"


def active(job: str) -> bool:
    """Whether Slurm still has a job: waiting, running, or requeued."""
    told = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
    if told.returncode and "Invalid job id" not in told.stderr:  # what it says of jobs long gone
        raise ValueError(f"squeue does not tell the state of job {job}: {told.stderr.strip()}")
    return any(state not in ENDED for state in told.stdout.split())
