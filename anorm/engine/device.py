"""What ``hardware`` settings mean on this machine: devices, processes, precision, layout, compilation."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from anorm.config.settings import Hardware
from anorm.data.feeds.workers import keep_freed_memory

Autocast = Callable[[], AbstractContextManager]


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
