"""Where a loss stopped being finite: the step is done again, watching every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from anorm.engine.run import Run


def explain(run: Run, step: int, backward: Callable[..., list[Tensor]]) -> str:
    """Return one sentence with the step and the first layer whose output, or gradient, is not finite. Called by every process.

    backward: the loop's, run again on the step's own batch and dropout. Non-finite gradients were not applied (except by optimizers that
    cannot be told so on a GPU), so the weights are those of that step; on a GPU, or with several processes, which are
    asked every log.every steps, those of a step soon after it.
    """
    where = [found for found in run.world.gather(_first(run, step, backward)) if found]
    first = (
        where[0]
        if where
        else "nothing when the step was repeated (an overflow that depends on the order of sums?)"
    )
    epoch = step // run.train.steps_per_epoch + 1
    return (
        f"the loss or its gradient is not finite at step {step} (epoch {epoch}); first: {first}. Lower "
        "optim.lr, lengthen schedule.warmup_epochs, set optim.clip=1, or use hardware.dtype=fp32 or bf16"
    )


def _first(run: Run, step: int, backward: Callable[..., list[Tensor]]) -> str | None:
    for name, parameter in run.model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name}"
    epoch, within = divmod(step, run.train.steps_per_epoch)
    found: list[str] = []
    handles = [
        layer.register_forward_hook(_watch(name or "the network", found))
        for name, layer in run.model.named_modules()
    ]
    run.model.train()
    run.model.zero_grad()
    try:
        batches = next(iter(run.train.epoch(epoch, within)))
        for k, batch in enumerate(batches):
            if not all(
                tensor.isfinite().all() for tensor in tree_leaves(batch.inputs) if torch.is_tensor(tensor)
            ):
                found.append("the images")
            backward(run, run.plain, step, k, batch, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _watch(name: str, found: list[str]):
    def check(tensor: Tensor, what: str, layer: nn.Module) -> None:
        if not found and not tensor.isfinite().all():
            found.append(f"the {what} of {name} ({type(layer).__name__})")

    def hook(layer: nn.Module, inputs: object, output: object) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                check(tensor, "output", layer)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: check(gradient, "gradient at the output", layer))

    return hook
