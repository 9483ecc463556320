"""Images that cost nothing to make: for measuring the training loop, and for trying a set-up without data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anorm.data.random import stream
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, FetchedImages, LabelledImages, Source

POOL = 256


class PooledNoise(LabelledImages):
    """Image i is number i mod POOL of a fixed pool: noise about a class's mean colours, so that a loss can fall."""

    in_memory = True
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, pool: Tensor, count: int, num_classes: int):
        self._pool, self.image_size = pool, pool.shape[1]  # (POOL,S,S,3): rows copy at memory speed
        self.labels = torch.arange(count) % len(pool) % num_classes
        self.identity = f"noise-{self.image_size}-{num_classes}-{count}"

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = self._pool.index_select(0, index % len(self._pool)).permute(0, 3, 1, 2)
        return FetchedImages(images, self.labels[index], index, [])


def synthetic(
    image_size: int = 224, num_classes: int = 1000, train_images: int = 12800, val_images: int = 1000
) -> Source:
    """Noise in ImageNet's shape. Raises ValueError for sizes below one."""
    for name, value in (
        ("image_size", image_size),
        ("num_classes", num_classes),
        ("train_images", train_images),
        ("val_images", val_images),
    ):
        if value < 1:
            raise ValueError(f"data.{name}={value} must be at least 1")
    rng = stream(0, "synthetic images", image_size, num_classes)
    colours = torch.randint(64, 192, (num_classes, 3, 1, 1), generator=rng, dtype=torch.int16)
    noise = torch.randint(-64, 64, (POOL, 3, image_size, image_size), generator=rng, dtype=torch.int16)
    pool = (noise + colours[torch.arange(POOL) % num_classes]).to(torch.uint8)
    pool = pool.permute(0, 2, 3, 1).contiguous()
    identity = f"synthetic-{image_size}-{num_classes}-{train_images}-{val_images}"
    return Source(
        PooledNoise(pool, train_images, num_classes),
        {"val": PooledNoise(pool, val_images, num_classes)},
        [f"class {k}" for k in range(num_classes)],
        identity,
    )


SOURCES = {"synthetic": synthetic}
