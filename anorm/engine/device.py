"""What ``hardware`` settings mean on this machine: devices, processes, precision, layout, compilation."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from anorm.config.settings import Hardware
from anorm.data.feeds.workers import keep_freed_memory

Autocast = Callable[[], AbstractContextManager]


def compiled(
    model: nn.Module, inputs: tuple, device: torch.device, autocast: Autocast, hardware: Hardware
) -> nn.Module:
    """Return torch.compile of the plain network, after comparing both on a task's example.

    inputs: of a micro-batch. For another number of images training would be compiled for any number, without the layouts
    that inductor chooses for a known one. Raises ValueError when the two differ by more than their precision explains.
    """
    faster = torch.compile(model)
    inputs = on_device(inputs, device, hardware)
    model.eval()
    with torch.no_grad(), autocast():
        expected = model(*inputs)
        if not torch.is_tensor(expected):
            raise ValueError(
                "hardware.compile=true is for networks whose answer is one tensor, which can be compared: set "
                "hardware.compile=false"
            )
        expected, found = expected.float(), faster(*inputs).float()
    model.train()
    difference = (found - expected).abs().max() / expected.abs().max()
    # a few hundred roundings of the arithmetic's precision: 2^-11 of fp16 and tf32, 2^-8 of bf16, 2^-24 of fp32
    allowed = {"fp16": 0.05, "tf32": 0.05, "bf16": 0.2}.get(hardware.dtype, 1e-4)
    if not difference <= allowed:
        raise ValueError(
            f"hardware.compile=true changes this network's outputs by {100 * difference:.3g} % (explained "
            f"would be {100 * allowed:g} %): set hardware.compile=false"
        )
    return faster


def distributed(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network under DDP, without DDP's habit of overwriting every rank's statistics with rank 0's at each step:
    ``join_statistics`` joins them where a number depends on them, as dist.stats says.
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


def fix_bucket_order(network: nn.Module, backward: Callable[[], None]) -> None:
    """Run one ``backward`` through what ``distributed`` made, and undo it: DDP rebuilds its buckets after the first, and
    a gradient's place in a bucket decides the order in which more than two processes sum it. A resumed run must sum its
    first step as the uninterrupted one did.
    """
    kept = [buffer.clone() for buffer in network.buffers()]
    network.train()
    backward()
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(network.buffers(), kept, strict=True):
            buffer.copy_(value)


def on_device(values: Any, device: torch.device, hardware: Hardware) -> Any:
    """Return ``values`` with every tensor on the device, images in the layout that ``hardware`` asks for."""

    def moved(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        images = value.dim() == 4 and hardware.channels_last
        return value.to(device, memory_format=torch.channels_last if images else torch.preserve_format)

    return tree_map(moved, values)


def place(model: nn.Module, hardware: Hardware, device: torch.device) -> None:
    """Move the network to the device, in the layout and, for fp64, the precision that ``hardware`` asks for."""
    model.to(device, memory_format=torch.channels_last if hardware.channels_last else torch.contiguous_format)
    if hardware.dtype == "fp64":
        doubles_inputs(model.double())


def doubles_inputs(network: nn.Module) -> None:
    """Let a network take images of single precision in float64."""
    network.register_forward_pre_hook(lambda module, inputs: tree_map(_double, inputs))


def _double(value: Any) -> Any:
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def set_backends(hardware: Hardware, resume: dict | None) -> None:
    """Set the process-wide switches of torch."""
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
    """Return what makes the context of a forward pass."""
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(hardware.dtype)
    return nullcontext if kind is None else partial(torch.autocast, device.type, dtype=kind)
