"""What ``hardware`` settings mean on a machine: devices, processes, precision, loader workers."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch

from anorm.config.settings import Hardware

FOR_V100 = "pip install 'torch==2.14.*' torchvision --index-url https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class Machine:
    """What decisions depend on. capability: of its GPUs, (0, 0) where not known; kernels: what torch brings
    for GPUs, such as sm_80.
    """

    gpus: int
    cores: int
    capability: tuple[int, int] = (0, 0)
    gpu: str = "its GPU"
    kernels: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
        if not gpus:
            return cls(0, cores)
        found = min((torch.cuda.get_device_capability(i), torch.cuda.get_device_name(i)) for i in range(gpus))
        return cls(gpus, cores, *found, tuple(torch.cuda.get_arch_list()))

    @property
    def without_kernels(self) -> str | None:
        """Why torch cannot compute on the GPUs and what to install; None where it can, or nothing is known.

        sm_XY runs on capability X.Y and later minor ones, compute_XY (compiled at its first use) on all later.
        """
        known = [
            name.rstrip("af").split("_") for name in self.kernels if name.startswith(("sm_", "compute_"))
        ]
        if not known or not self.capability[0]:
            return None
        for kind, digits in known:
            major, minor = int(digits[:-1]), int(digits[-1])
            if kind == "sm" and major == self.capability[0] and minor <= self.capability[1]:
                return None
            if kind == "compute" and (major, minor) <= self.capability:
                return None
        capability = ".".join(map(str, self.capability))
        return (
            f"this torch ({torch.__version__}) has no kernels for {self.gpu}, compute capability "
            f"{capability}: "
            + (
                "the newest that has is 2.14 built for CUDA 12.6, with a driver of the R580 series: "
                f"{FOR_V100}"
                if self.capability == (7, 0)
                else "install a build of torch for it (pytorch.org)"
            )
        )


def decide(asked: Hardware, started: int | None = None, machine: Machine | None = None) -> Hardware:
    """Return ``asked`` with every "auto", and the number of processes, decided for ``machine`` (default: this one).

    started: how many processes another launcher started, or None.
    Raises ValueError where the machine lacks what is asked for.
    """
    machine = machine or Machine.here()
    gpus = machine.gpus
    if asked.device == "gpu" and gpus == 0:
        raise ValueError(
            "hardware=gpu, but torch sees no GPU here: set hardware=cpu, or install a torch build for this "
            "GPU's driver (python -m anorm says more)"
        )
    gpu = asked.device == "gpu" or (asked.device == "auto" and gpus > 0)
    if gpu and machine.without_kernels:
        raise ValueError(machine.without_kernels)
    processes = (gpus if gpu else 1) if asked.processes == "auto" else asked.processes
    local = processes
    if started is not None:
        if asked.processes not in ("auto", started):
            raise ValueError(
                f"hardware.processes={asked.processes}, but {started} processes were started: leave it out"
            )
        processes, local = started, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # a task of srun may see its own GPU alone
    task = (started or 0) > 1 and os.environ.get("SLURM_STEP_NUM_TASKS") == str(started)
    if gpu and local > gpus and not (task and "SLURM_GPUS_PER_TASK" in os.environ):
        raise ValueError(
            f"hardware.processes={processes}, but there are {gpus} GPUs: one process a GPU at most"
        )
    cores = max(1, machine.cores // local)
    if task:  # and may be bound to its own cores
        cores = min(machine.cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    return dataclasses.replace(
        asked,
        device="gpu" if gpu else "cpu",
        processes=processes,
        dtype=_dtype(asked, gpu, machine),
        channels_last=gpu if asked.channels_last == "auto" else asked.channels_last,
        workers=min(8, cores) if asked.workers == "auto" else asked.workers,
        threads=cores if asked.threads == "auto" else asked.threads,
    )


def _dtype(asked: Hardware, gpu: bool, machine: Machine) -> str:
    if asked.dtype == "auto":
        return "fp16" if gpu else "fp32"
    if not gpu and asked.dtype in ("fp16", "tf32"):
        raise ValueError(f"hardware.dtype={asked.dtype} is for GPUs: on a CPU use fp32 (or bf16)")
    if gpu and asked.dtype in ("bf16", "tf32") and 0 < machine.capability[0] < 8:
        raise ValueError(
            f"hardware.dtype={asked.dtype} needs a GPU of compute capability 8.0 (A100) or later; "
            f"{machine.gpu} has {'.'.join(map(str, machine.capability))} and no arithmetic of this kind: use fp16 or fp32"
        )
    return asked.dtype


def check_batches(micro: int, whole: int, processes: int) -> None:
    """Raises ValueError, naming the nearest that works, unless a global batch of ``whole`` images is a whole
    number of batches of ``micro`` on every process.
    """
    if whole % micro == 0 and (whole // micro) % processes == 0:
        return
    fitting = [n for n in range(1, whole // micro + 1) if whole % micro == 0 and (whole // micro) % n == 0]
    sizes = [n for n in range(1, whole + 1) if whole % (n * processes) == 0]
    ways = []
    if fitting:
        ways.append(f"hardware.processes={min(fitting, key=lambda n: abs(n - processes))}")
    if sizes:
        ways.append(f"batch_size={min(sizes, key=lambda n: (abs(n - micro), -n))}")
    ways.append(f"optim.global_batch={max(1, round(whole / (micro * processes))) * micro * processes}")
    raise ValueError(
        f"optim.global_batch={whole} is no whole number of batches of batch_size={micro} on {processes} "
        f"process{'es' if processes > 1 else ''}: set {' or '.join(ways)}"
    )
