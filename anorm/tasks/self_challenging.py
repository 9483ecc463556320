"""Representation self-challenging (Huang et al., ECCV 2020): classification whose strongest features are muted in training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from anorm.tasks.classification import Classification
from anorm.tasks.mixing import Target

VARIANTS = ("curriculum", "domainbed")


class SelfChallengingClassification(Classification):
    """Classification of images whose features that the answer hangs on most are set to zero for a part of the batch.

    Evaluation, the network and its checkpoints are those of plain classification. The network needs ``forward_stages``
    and ``forward_head`` (or timm's ``forward_features`` and ``forward_head``). Not together with mixup or CutMix.

    Args:
        variant: "curriculum", the authors' last version, on the last stage's map: of each micro-batch either positions or
            channels are muted, with probability 1/2 each, for a share of images that grows with the epochs; or
            "domainbed", on the pooled features (Gulrajani and Lopez-Paz, 2021), the same share from the start.
        drop_positions, drop_channels: the parts of positions and channels that are muted ("domainbed": channels alone).
        images: the first share of images that are muted; the curriculum adds ``images_step`` after every
            ``images_epochs`` epochs, up to 1.
        flip_copies: put the mirrored copy of every image into the batch too, as the authors do: an image then counts
            twice in the loss and in batch statistics, and once in everything that is reported.
    """

    def __init__(
        self,
        classes: list[str],
        channels: int = 3,
        mix: Any = None,
        variant: str = "curriculum",
        drop_positions: float = 1 / 3,
        drop_channels: float | None = None,
        images: float | None = None,
        images_step: float = 0.2,
        images_epochs: int = 10,
        flip_copies: bool = False,
    ):
        super().__init__(classes, channels, mix)
        if self.mixing.mixes:
            raise ValueError(
                "task=self_challenging mutes what speaks for an image's class, and mixed images have two: set "
                "mix.mixup=0 mix.cutmix=0, or task=classification"
            )
        if variant not in VARIANTS:
            raise ValueError(f"task.variant={variant} is unknown: choose curriculum or domainbed")
        if drop_channels is None:
            drop_channels = 1 / 3.2 if variant == "curriculum" else 1 / 3
        if images is None:
            images = 0.3 if variant == "curriculum" else 1 / 3
        parts = {"drop_positions": drop_positions, "drop_channels": drop_channels, "images": images}
        for name, value in parts.items():
            if not 0 < value < 1:
                raise ValueError(f"task.{name}={value} must lie between 0 and 1")
        if images_step < 0 or images_epochs < 1:
            raise ValueError(
                f"task.images_step={images_step} must be 0 or more, and task.images_epochs={images_epochs} at least 1"
            )
        self.variant, self.drop_positions, self.drop_channels = variant, drop_positions, drop_channels
        self.images, self.images_step, self.images_epochs = images, images_step, images_epochs
        self.flip_copies, self.share = flip_copies, images

    def begin(self, epoch: int) -> None:
        if self.variant == "curriculum":
            self.share = min(1.0, self.images + self.images_step * (epoch // self.images_epochs))

    def network(self, model: nn.Module) -> nn.Module:
        return SelfChallenging(model, self.variant, self.drop_positions, self.drop_channels)

    def prepare(self, batch, rng: torch.Generator) -> tuple[tuple, Target]:
        images, labels = batch.inputs, batch.targets
        if self.flip_copies:
            images, labels = torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])
        of_positions = bool(torch.rand((), generator=rng) < 0.5)
        return (images, labels, of_positions, self.share), Target(labels, None, 1.0)


class SelfChallenging(nn.Module):
    """Images (N,C,H,W), labels (N,), whether positions are muted (else channels), and the share of images -> logits (N,K).

    With z (N,C,h,w) the last map, f the head, s = sum_i f(z)_{i,y_i} and g = ds/dz, all of it in one forward that DDP wraps:

        curriculum   positions: the ceil(hw/3) largest of sum_c z_c mean(g_c);  channels: the ceil(C/3.2) largest of mean(g_c)
        domainbed    channels whose sum of g is not below its (1 - 1/3) quantile over channels
        images       those whose probability of the true class falls most when muted: the share of them, and of the
                     curriculum only where it falls by more than 1e-4

    and the answer is f(z mask). The mask is a constant to the backward pass. What it depends on is computed in evaluation
    mode for the curriculum, as published, so the head's dropout and statistics are not touched by it.
    """

    LEAST = 1e-4

    def __init__(self, model: nn.Module, variant: str, drop_positions: float, drop_channels: float):
        super().__init__()
        self.model, self.variant = model, variant
        self.drop_positions, self.drop_channels = drop_positions, drop_channels
        self._two_parts(model)

    @staticmethod
    def _two_parts(model: nn.Module) -> nn.Module:
        """The module that has both parts. Raises ValueError where there is none."""
        for module in (model, getattr(model, "network", None)):
            if hasattr(module, "forward_head") and (
                hasattr(module, "forward_stages") or hasattr(module, "forward_features")
            ):
                return module
        raise ValueError(
            f"task=self_challenging needs a network in two parts, forward_stages and forward_head, which "
            f"{type(model).__name__} is not: take a ResNet, a VGG or a network of timm"
        )

    def forward(self, images: Tensor, labels: Tensor, of_positions: bool, share: float) -> Tensor:
        parts = self._two_parts(self.model)
        if hasattr(parts, "forward_stages"):
            z = list(parts.forward_stages(images).values())[-1]
        else:
            z = parts.forward_features(images)
        curriculum = self.variant == "curriculum"
        training = [module for module in self.modules() if module.training]
        if curriculum:
            self.eval()
        try:
            mask = self.mask(z.detach(), parts.forward_head, labels, of_positions, share)
        finally:
            for module in training if curriculum else ():
                module.training = True
        return parts.forward_head(z * mask)

    def mask(self, z: Tensor, head, labels: Tensor, of_positions: bool, share: float) -> Tensor:
        """Return 0 where ``z`` is muted, 1 elsewhere, in a shape that goes with (N,C,h,w)."""
        with torch.enable_grad():
            z = z.requires_grad_()
            logits = head(z)
            (gradient,) = torch.autograd.grad(logits.float().gather(1, labels[:, None]).sum(), z)
        z, gradient = z.detach().float(), gradient.float()
        if self.variant == "domainbed":
            weight = gradient.sum((2, 3))
            muted = weight >= torch.quantile(weight, 1 - self.drop_channels, dim=1, keepdim=True)
            muted = muted[:, :, None, None]
        elif of_positions and z[0, 0].numel() > 1:
            weight = (z * gradient.mean((2, 3), keepdim=True)).sum(1)
            muted = _largest(weight.flatten(1), self.drop_positions).view_as(weight)[:, None]
        else:
            muted = _largest(gradient.mean((2, 3)), self.drop_channels)[:, :, None, None]
        with torch.no_grad():
            kept = (~muted).to(logits.dtype)
            before, after = (
                values.float().softmax(1).gather(1, labels[:, None])[:, 0]
                for values in (logits.detach(), head(z.to(logits.dtype) * kept))
            )
            falls = before - after
            if self.variant == "domainbed":
                chosen = falls >= torch.quantile(falls, 1 - share)
            else:
                falls = (falls - self.LEAST).clamp(min=0)
                place = min(round(len(falls) * share), len(falls) - 1)
                chosen = falls > falls.sort(descending=True).values[place]
            return torch.where(chosen[:, None, None, None], kept, torch.ones_like(kept))


def _largest(values: Tensor, part: float) -> Tensor:
    """True at the ceil(part n) largest of each row of (N,n): those above the next one, so fewer where several are equal."""
    count = values.shape[1]
    k = min(math.ceil(part * count), count - 1)
    return values > values.sort(dim=1, descending=True).values[:, k : k + 1]


TASKS = {"self_challenging": SelfChallengingClassification}
