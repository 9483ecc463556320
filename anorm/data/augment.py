"""What training does to an image besides crop and flip: the colour and rotation steps of published recipes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anorm.words import nearest

POLICIES = ("imagenet", "cifar10", "svhn")


@dataclass(frozen=True)
class Augment:
    """Steps in this order, each by torchvision: rotation, AutoAugment, colour jitter, grayscale.

    rotation: largest angle in degrees, either way. autoaugment: policy of Cubuk et al. (2019), one of imagenet, cifar10,
    svhn. jitter: j makes brightness, contrast and saturation factors in 1 - j .. 1 + j, and hue shifts up to min(j, 1/2)
    of the circle. grayscale: probability of three equal channels.
    Raises ValueError for values outside their limits.
    """

    rotation: float = 0.0
    autoaugment: str | None = None
    jitter: float = 0.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"data.rotation={self.rotation} must be an angle in degrees, 0 to 180")
        if self.autoaugment is not None and self.autoaugment not in POLICIES:
            raise ValueError(
                f"data.autoaugment={self.autoaugment} is unknown{nearest(self.autoaugment, POLICIES)}"
            )
        for name in ("jitter", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must lie between 0 and 1")

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.rotation or self.autoaugment or self.jitter or self.grayscale)

    def __call__(self, image: Tensor, rng: torch.Generator) -> Tensor:
        """Return uint8 (3,H,W) changed by draws that depend on ``rng`` alone.

        torchvision draws from the global generator, so it is seeded from ``rng`` here and put back after.
        """
        seed = int(torch.randint(2**62, (), generator=rng))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for step in self._steps():
                image = step(image)
        return image

    def _steps(self) -> list:
        from torchvision.transforms import v2

        steps = []
        if self.rotation:
            steps.append(v2.RandomRotation(self.rotation))
        if self.autoaugment:
            steps.append(v2.AutoAugment(v2.AutoAugmentPolicy(self.autoaugment)))
        if self.jitter:
            j = self.jitter
            steps.append(v2.ColorJitter(j, j, j, min(j, 0.5)))
        if self.grayscale:
            steps.append(v2.RandomGrayscale(self.grayscale))
        return steps
