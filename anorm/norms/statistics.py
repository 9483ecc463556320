"""The statistics of all norms of a network at once, whoever wrote them: pooled over processes, held, taken afresh."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from anorm.norms.base import Norm, RunningNorm

__all__ = ["freeze_stats", "set_sync", "tracking_norms", "update_stats"]


def set_sync(model: nn.Module, sync: bool = True) -> int:
    """Pool every statistic over N over all processes (or take each process's own), and return the number of layers.

    Laws here pool by themselves, AN's attention norm included, weighted by true counts. A torch BatchNorm becomes an
    ``nn.SyncBatchNorm`` in place (with ``sync``; the way back does not exist), which wants a GPU. Instead of
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)``. Build the optimizer afterwards.

    Raises ValueError for a batch norm of another library, which cannot be told to.
    """
    count = 0
    for module in list(model.modules()):
        if isinstance(module, RunningNorm):
            module.sync = sync
            count += 1
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, (RunningNorm, nn.SyncBatchNorm)) and sync:
                setattr(module, name, _synchronized(child))
                count += 1
    if sync and isinstance(model, _BatchNorm) and not isinstance(model, (RunningNorm, nn.SyncBatchNorm)):
        raise ValueError(
            f"{type(model).__name__} is itself the layer to replace: give set_sync the network that holds it"
        )
    return count


def _synchronized(layer: nn.Module) -> nn.Module:
    if type(layer).forward is _BatchNorm.forward:
        return nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    if type(layer).__module__.startswith("timm."):
        from timm.layers import BatchNormAct2d, convert_sync_batchnorm

        if isinstance(layer, BatchNormAct2d):
            return convert_sync_batchnorm(layer)
    raise ValueError(
        f"set_sync does not reach a {type(layer).__name__}, a batch norm with a forward of its own: replace it first "
        "(anorm.convert)"
    )


def freeze_stats(model: nn.Module, frozen: bool = True) -> int:
    """Hold the running statistics (or let them go), and return the number of layers that have any.

    A held layer standardizes with its running statistics in training too and leaves them as they are, whatever
    ``model.train()`` says; its affine learns on. ``requires_grad_(False)`` on its parameters holds these too. Norms of
    torch and timm are held by a hook that puts them into evaluation before each call. Instead of
    ``timm.layers.freeze_batch_norm_2d(model)``, of ``eval()`` after each ``train()``, and of norm_eval in detection
    codes.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Norm):
            module.frozen = frozen
            count += isinstance(module, RunningNorm) and bool(module.tracked)
        elif isinstance(module, _NormBase) and module.track_running_stats:
            hooks = [key for key, hook in module._forward_pre_hooks.items() if hook is _evaluate]
            if frozen and not hooks:
                module.register_forward_pre_hook(_evaluate)
            elif not frozen:
                for key in hooks:
                    del module._forward_pre_hooks[key]
                module.training = model.training
            count += 1
    return count


def _evaluate(module: nn.Module, args: tuple) -> None:
    module.training = False


@torch.no_grad()
def update_stats(model: nn.Module, batches: Iterable) -> int:
    """Take all running statistics afresh, as averages over ``batches``, and return the number of batches.

    Args:
        model: any network; norms of torch and timm are reached too, frozen ones (``freeze_stats``) stay as they are.
        batches: images (N, C, H, W), or tuples and lists that start with them; each goes to the model's device.

    The rest of the network is in evaluation meanwhile (no dropout); modes and momenta are put back. Instead of
    ``torch.optim.swa_utils.update_bn(loader, model)``, which works on these norms too, with dropout on.

    Raises ValueError, with the statistics as they were, where no batch comes.
    """
    tracking = tracking_norms(model)
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in tracking]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in tracking]
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    count, done = 0, False
    try:
        model.eval()
        for norm in tracking:
            norm.training = True
            norm.reset_running_stats()
            norm.momentum = None
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            model(images.to(device))
            count += 1
        done = count > 0
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum, buffers in zip(tracking, momenta, kept, strict=True):
            norm.momentum = momentum
            for name, buffer in () if done else buffers.items():
                getattr(norm, name).copy_(buffer)
    if not count:
        raise ValueError("update_stats got no batch: a loader that was used up, or an empty one")
    return count


def tracking_norms(model: nn.Module) -> list[nn.Module]:
    """The norms that track statistics of the batch in training, torch's and timm's among them; none that is held."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and not getattr(module, "frozen", False)
        and _evaluate not in module._forward_pre_hooks.values()
    ]
