"""The running statistics of norms: those of all processes joined, and which of them an evaluation uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anorm.engine import checkpoint
from anorm.norms.base import RunningNorm
from anorm.norms.statistics import tracking_norms
from anorm.processes.world import World


@torch.no_grad()
def join_statistics(world: World, model: nn.Module, how: str) -> None:
    """Give every process the same buffers: floats averaged ("mean") or rank 0's ("rank0"), integers rank 0's.

    One all-reduce in float64, so that equal values stay what they are.
    """
    if world.size == 1:
        return
    floats = [b for b in model.buffers() if b.is_floating_point()]
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            dist.broadcast(buffer, 0)
    if not floats:
        return
    flat = torch.cat([b.detach().double().flatten() for b in floats])
    if how == "mean":
        dist.all_reduce(flat)
        flat /= world.size
    else:
        dist.broadcast(flat, 0)
    for buffer, value in zip(floats, flat.split([b.numel() for b in floats]), strict=True):
        buffer.copy_(value.view_as(buffer))


def joined(buffers: list[list[Tensor]], how: str) -> list[Tensor]:
    """Return what ``join_statistics`` makes of the buffers of each process."""
    return [
        torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)
        if how == "mean" and values[0].is_floating_point()
        else values[0]
        for values in zip(*buffers, strict=True)
    ]


def gather_buffers(world: World, model: nn.Module) -> list[list[Tensor]]:
    """Return the buffers of every process, on rank 0."""
    return world.gather([buffer.to("cpu", copy=True) for buffer in model.buffers()])


def with_buffers(state: dict[str, Tensor], model: nn.Module, values: list[Tensor]) -> dict[str, Tensor]:
    """Return ``state``, of ``model``, with other values of its buffers."""
    named = zip((name for name, _ in model.named_buffers()), values, strict=True)
    return state | {name: value for name, value in named if name in state}


def join_again(model: nn.Module, path: Path, how: str) -> None:
    """Give ``model`` the statistics that each process of a run had at its checkpoint ``path``, joined as ``how``
    says. Raises ValueError where the file holds none.
    """
    held = (
        checkpoint.load(path).get("processes", {}).get("before_joining") if path.suffix == ".ckpt" else None
    )
    if not held:
        raise ValueError(
            f"{path} does not hold the statistics of each process: dist.stats is for the last checkpoints of a run "
            "(last.ckpt, last-1.ckpt, ...)"
        )
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), joined(held, how), strict=True):
            buffer.copy_(value)


@contextmanager
def statistics_from(model: nn.Module, source: str, recalibrate: Callable[[], None]) -> Iterator[None]:
    """Let norms evaluate, within, with their running statistics ("running"), each batch's own ("batch"), or statistics
    taken afresh from training batches by ``recalibrate`` ("recalibrated"). Afterwards all is as before.
    """
    norms = tracking_norms(model)
    ours = [norm for norm in norms if isinstance(norm, RunningNorm)]
    before = [norm.eval_stats for norm in ours]  # a law may have its own way (afn_as_released)
    if source == "running":
        yield
    elif source == "batch":
        for norm in ours:
            norm.eval_stats = "batch"
        try:
            yield
        finally:
            for norm, stats in zip(ours, before, strict=True):
                norm.eval_stats = stats
    else:
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative average
        for norm in ours:
            norm.eval_stats = "running"
        try:
            recalibrate()
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for norm, stats in zip(ours, before, strict=True):
                norm.eval_stats = stats
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


def uses_batch_statistics(model: nn.Module) -> bool:
    """Return whether a norm of ``model`` standardizes with the statistics of the batch in evaluation, as it now stands:
    one of ours by ``eval_stats``, one of torch's that tracks none.
    """
    return any(
        module.eval_stats == "batch" and not module.frozen
        if isinstance(module, RunningNorm)
        else isinstance(module, _BatchNorm) and module.running_mean is None
        for module in model.modules()
    )


def check_statistics(model: nn.Module, source: str) -> None:
    """Raise ValueError where ``source`` does not reach the statistics of a norm of another library."""
    for module in model.modules():
        tracks = any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
        if not tracks or isinstance(module, RunningNorm) or source == "running":
            continue
        if source == "batch" or not isinstance(module, _BatchNorm):
            other = " or recalibrated" if isinstance(module, _BatchNorm) else ""
            raise ValueError(
                f"eval.stats={source} does not reach a {type(module).__name__} of another library: set "
                f"eval.stats=running{other}"
            )
