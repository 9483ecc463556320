"""What ``hardware`` settings mean on this machine: devices, processes, precision, layout, compilation."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from anorm.data.feeds.workers import keep_freed_memory
from anorm.engine.distributed import World
from anorm.engine.settings import Hardware

Autocast = Callable[[], AbstractContextManager]


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


def decide(asked: Hardware, world: World | None = None, machine: Machine | None = None) -> Hardware:
    """``asked`` with every "auto", and the number of processes, decided for ``machine`` (default: this one).

    world: the processes that another launcher started; they are as many as they are.
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
    if world is not None:
        if asked.processes not in ("auto", world.size):
            raise ValueError(
                f"hardware.processes={asked.processes}, but {world.size} processes were started: leave it out"
            )
        processes, local = world.size, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # a task of srun may see its own GPU alone
    task = world is not None and world.size > 1 and os.environ.get("SLURM_STEP_NUM_TASKS") == str(world.size)
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


def compiled(
    model: nn.Module,
    batch: int,
    image_size: int,
    device: torch.device,
    autocast: Autocast,
    hardware: Hardware,
) -> nn.Module:
    """torch.compile of the plain network, compared with it on random images first.

    batch: images of a micro-batch. Another number here would have training compiled for any number, without the layouts
    that inductor chooses for a known one. Raises ValueError when the two differ by more than their precision explains.
    """
    faster = torch.compile(model)
    images = _noise(batch, image_size, device, hardware)
    model.eval()
    with torch.no_grad(), autocast():
        expected, found = model(images).float(), faster(images).float()
    model.train()
    difference = (found - expected).abs().max() / expected.abs().max()
    # a few hundred roundings of the arithmetic's precision: 2^-11 of fp16 and tf32, 2^-8 of bf16, 2^-24 of
    # fp32
    allowed = {"fp16": 0.05, "tf32": 0.05, "bf16": 0.2}.get(hardware.dtype, 1e-4)
    if not difference <= allowed:
        raise ValueError(
            f"hardware.compile=true changes this network's outputs by {100 * difference:.3g} % (explained "
            f"would be {100 * allowed:g} %): set hardware.compile=false"
        )
    return faster


def distributed(network: nn.Module, device: torch.device) -> nn.Module:
    """The network over all processes. Their statistics are joined where they are needed, by dist.stats, and
    not overwritten at every step by those of rank 0, as DDP does by default.
    """
    # of 1x1 convolutions in channels_last, whose strides are ambiguous: nothing is copied
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    # its name until torch 2.14
    no_overwriting = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return nn.parallel.DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{no_overwriting: False},
    )


def settle(
    network: nn.Module,
    batch: int,
    image_size: int,
    device: torch.device,
    autocast: Autocast,
    hardware: Hardware,
) -> None:
    """One backward pass of what ``distributed`` made, on noise, of which nothing remains: DDP lays its buckets out anew
    after the first, and the place of a gradient in a bucket decides the order in which more than two processes sum it.
    So a run that continues sums its first step as the uninterrupted one did.
    """
    kept = [buffer.clone() for buffer in network.buffers()]
    network.train()
    with autocast():
        output = network(_noise(batch, image_size, device, hardware))
    output.float().sum().backward()
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(network.buffers(), kept, strict=True):
            buffer.copy_(value)


def _noise(batch: int, image_size: int, device: torch.device, hardware: Hardware) -> Tensor:
    """A micro-batch of random images, the same everywhere."""
    images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return images.to(
        device, memory_format=torch.channels_last if hardware.channels_last else torch.contiguous_format
    )


def place(model: nn.Module, hardware: Hardware, device: torch.device) -> None:
    """Onto the device, in the layout and, for fp64, the precision that ``hardware`` asks for."""
    model.to(device, memory_format=torch.channels_last if hardware.channels_last else torch.contiguous_format)
    if hardware.dtype == "fp64":
        model.double().register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))


def set_backends(hardware: Hardware, resume: dict | None) -> None:
    """The process-wide switches of torch."""
    # sums depend on the number of threads: a resumed run keeps its own
    torch.set_num_threads(resume["threads"] if resume else hardware.threads)
    if hardware.device == "cpu":
        keep_freed_memory()
    fast = hardware.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast
    torch.backends.cudnn.benchmark = not hardware.deterministic
    torch.use_deterministic_algorithms(hardware.deterministic)
    if hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def autocast_of(hardware: Hardware, device: torch.device) -> Autocast:
    """The context that a forward pass runs in."""
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(hardware.dtype)
    return nullcontext if kind is None else partial(torch.autocast, device.type, dtype=kind)
