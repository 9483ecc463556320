"""Where a loss stopped being finite: the step is done again, watching every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anorm.data.random import seed_of, stream

if TYPE_CHECKING:
    from anorm.engine.run import Run


def explain(run: Run, step: int) -> str:
    """One sentence with the step and the first layer whose output, or gradient, is not finite. Called by every process.

    The step's own batch and dropout are drawn again. Non-finite gradients were not applied (except by optimizers that
    cannot be told so on a GPU), so the weights are those of that step; on a GPU, or with several processes, which are
    asked every log.every steps, those of a step soon after it.
    """
    where = [found for found in run.world.gather(_first(run, step)) if found]
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


def _first(run: Run, step: int) -> str | None:
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
        for k, batch in enumerate(next(iter(run.train.epoch(epoch, within)))):
            number = run.train.micro_batch_number(k)
            if not batch.inputs.isfinite().all():
                found.append("the images")
            images, target = run.mixing.mix(batch.inputs, batch.targets, stream(run.settings.seed, "mix", step, number))
            torch.manual_seed(seed_of(run.settings.seed, "dropout", step, number))
            with run.autocast():
                logits = run.model(images)
            run.scaler.scale(run.mixing.loss(logits, target)).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _watch(name: str, found: list[str]):
    def check(tensor: Tensor, what: str, layer: nn.Module) -> None:
        if not found and not tensor.isfinite().all():
            found.append(f"the {what} of {name} ({type(layer).__name__})")

    def hook(layer: nn.Module, inputs: object, output: object) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                check(tensor, "output", layer)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: check(gradient, "gradient at the output", layer))

    return hook
