"""Images of one size that are held in memory as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from anorm.data.augment import Augment
from anorm.data.sources.base import FetchedImages, LabelledImages

LUMA = (0.299, 0.587, 0.114)
"""Of ITU-R BT.601: what a gray value is made of."""


class StoredImages(LabelledImages):
    """uint8 images (N,C,S,S) with labels (N,), in memory. In training: shifted by up to ``pad`` pixels (zeros come in),
    mirrored with probability 1/2 where ``flip``, then ``augment``.

    identity: given, or of the content. Workers pay only where ``augment`` has something to do.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int = 0,
        flip: bool = False,
        augment: Augment | None = None,
        identity: str | None = None,
    ):
        count, channels, height, width = images.shape
        assert images.dtype == torch.uint8 and height == width and len(labels) == count, images.shape
        check_levels(mean, std, channels)
        if not 0 <= pad < width:
            raise ValueError(f"data.pad={pad} must lie between 0 and the image size, {width}")
        self.images, self.labels, self.image_size = images.contiguous(), labels.long(), width
        self.mean, self.std, self.pad, self.flip = tuple(mean), tuple(std), pad, flip
        self.augment = augment or Augment()
        self.in_memory = not self.augment
        self.identity = identity or content_digest(images, self.labels)

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[index]
        if rngs is not None and len(index) and (self.pad or self.flip):
            images = self._moved(images, torch.stack([torch.rand(3, generator=rng) for rng in rngs]))
        if rngs is not None and self.augment:
            images = torch.stack([self.augment(image, rng) for image, rng in zip(images, rngs, strict=True)])
        return FetchedImages(images, self.labels[index], index, [])

    def _moved(self, images: Tensor, draws: Tensor) -> Tensor:
        """Shift by two draws of each row, mirror by the third."""
        padded = F.pad(images, (self.pad,) * 4)
        offsets = (draws[:, :2] * (2 * self.pad + 1)).long()
        places = torch.arange(self.image_size)
        mirrored = (draws[:, 2] < 0.5) & self.flip
        columns = torch.where(mirrored[:, None], places.flip(0), places) + offsets[:, 1:]
        rows = offsets[:, :1] + places
        n = torch.arange(len(images))[:, None, None]
        return padded[n, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def decoded(self, index: int) -> Tensor:
        """The whole image, uint8 (C,S,S)."""
        return self.images[index]


def check_levels(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise ValueError unless mean and std have a value a channel, std above zero."""
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(
            f"data.mean={list(mean)} and data.std={list(std)} need {channels} value{'s' if channels > 1 else ''} "
            "each, std above zero"
        )


def content_digest(images: Tensor | numpy.ndarray, labels: Tensor) -> str:
    """A digest of every pixel and label."""
    digest = hashlib.blake2b(numpy.ascontiguousarray(images), digest_size=16)
    digest.update(numpy.ascontiguousarray(labels))
    return digest.hexdigest()


def to_gray(images: Tensor) -> Tensor:
    """uint8 (n,3,H,W) -> uint8 (n,1,H,W); images whose channels are equal keep their values."""
    weights = torch.tensor(LUMA, dtype=torch.float64).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).round().clamp(0, 255).to(torch.uint8)
