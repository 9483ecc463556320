"""Images with objects in them: what a data set of detection reads, resizes, mirrors and hands on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anorm.data import bilinear
from anorm.data.decode import BadImage
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, ON_ERROR, Batch, Dataset

__all__ = ["FetchedScenes", "Resize", "Scene", "Scenes", "nearest"]

RESIZES = ("antialias", "opencv")


class Scene(NamedTuple):
    """One image with its objects, as read; ``geometry`` decides later what a box is.

    image: uint8 (3,H,W), resized, mirrored where ``flipped``. xywh: float64 (n,4), in pixels of the original.
    labels: int64 (n,), from 1 on. masks: uint8 (n,H,W), or None in evaluation. semantic: uint8 (H,W) or None.
    original: its height and width. scale: the factor that was asked for, before the size was rounded.
    """

    image: Tensor
    xywh: Tensor
    labels: Tensor
    masks: Tensor | None
    semantic: Tensor | None
    original: tuple[int, int]
    scale: float
    flipped: bool


class FetchedScenes(NamedTuple):
    """See ``Fetched``."""

    scenes: list[Scene]
    indices: Tensor
    bad: list[tuple[int, str]]


class Resize(NamedTuple):
    """Largest size within ``long_side`` x ``short_side`` pixels that keeps the ratio; ``None`` as a side: no resize.

    kind: "antialias" (torchvision's bilinear with antialiasing) or "opencv" (OpenCV's without it, as MMDetection did).
    """

    short_side: int | None
    long_side: int | None
    kind: str = "antialias"

    def scale(self, height: int, width: int) -> float:
        """The one factor for both sides."""
        if self.short_side is None:
            return 1.0
        return min(self.long_side / max(height, width), self.short_side / min(height, width))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after it: each side times the factor, rounded half up."""
        scale = self.scale(height, width)
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3,H,W) -> uint8 (3,h,w)."""
        size = self.size(*image.shape[1:])
        if size == tuple(image.shape[1:]):
            return image
        if self.kind == "opencv":
            return bilinear.resize(image, size)
        from torchvision.transforms.v2 import functional

        return functional.resize(image, list(size), antialias=True)


def nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (..., H, W) in another size: pixel i takes floor(i * source / target), as OpenCV's nearest neighbour."""
    height, width = maps.shape[-2:]
    rows = (torch.arange(size[0], dtype=torch.float64) * (height / size[0])).long().clamp(max=height - 1)
    columns = (torch.arange(size[1], dtype=torch.float64) * (width / size[1])).long().clamp(max=width - 1)
    return maps[..., rows[:, None], columns]


class Scenes(Dataset):
    """Images with objects. A subclass reads them; this class resizes, mirrors and orders.

    categories: the id of label 1, 2, ... in the source's own numbers. flip: the probability of mirroring in training.
    shapes (N,2): heights and widths, for the order by aspect ratio.
    """

    holds = "images with objects"
    categories: list[int]
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, resize: Resize, flip: float, shapes: Tensor, on_error: str = "error") -> None:
        if on_error not in ON_ERROR:
            raise ValueError(
                f"data.on_error={on_error!r} is unknown: choose error (stop) or skip (count and list)"
            )
        if resize.kind not in RESIZES:
            raise ValueError(f"data.resize={resize.kind!r} is none of {', '.join(RESIZES)}")
        self.resize, self.flip, self.shapes, self.on_error = resize, flip, shapes, on_error

    def __len__(self) -> int:
        return len(self.shapes)

    @abstractmethod
    def read(self, index: int, masks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return image uint8 (3,H,W), xywh (n,4), labels (n,), masks (n,H,W) where asked for, semantic map or None.

        In training what a detector learns from: without crowds. Raises BadImage.
        """

    @abstractmethod
    def truth(self, index: int) -> tuple[dict, list[dict]]:
        """Return COCO's entries of the image and of all its annotations, with crowds, for evaluation."""

    @property
    def image_size(self) -> int:
        """The longer side of the largest image, in pixels, after the resize."""
        return max(max(self.resize.size(*shape)) for shape in self.shapes.unique(dim=0).tolist())

    def order(self, rng: torch.Generator, global_batch: int) -> Tensor:
        """Return a permutation; within each step upright images and those that are wider than high stand apart.

        A micro-batch then is of one kind, but for one that may hold the border, and little is padded. Steps are cut
        into micro-batches in this order, so that it is the same for any number of processes. Which kind comes first is
        drawn for each step: otherwise the first process would see upright images alone.
        """
        mixed = torch.randperm(len(self), generator=rng)
        step = torch.arange(len(self)) // global_batch
        first = torch.randint(2, (int(step[-1]) + 1,), generator=rng)
        wide = (self.shapes[:, 1] > self.shapes[:, 0])[mixed].long()
        return mixed[(step * 2 + (wide ^ first[step])).sort(stable=True).indices]

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedScenes:
        scenes, kept, bad = [], [], []
        for position, index in enumerate(indices):
            found = self._one(int(index), None if rngs is None else rngs[position], bad)
            if found is not None:
                scenes.append(found[0])
                kept.append(found[1])
        return FetchedScenes(scenes, torch.tensor(kept, dtype=torch.int64), bad)

    def finish(
        self, fetched: FetchedScenes, device: torch.device, memory_format: torch.memory_format
    ) -> Batch:
        """Return Batch(images, scenes, indices): lists, with every tensor on the device."""
        moved = [
            scene._replace(
                **{
                    name: value.to(device, non_blocking=True)
                    for name, value in scene._asdict().items()
                    if isinstance(value, Tensor)
                }
            )
            for scene in fetched.scenes
        ]
        return Batch([scene.image for scene in moved], moved, fetched.indices)

    def _one(self, index: int, rng, bad: list[tuple[int, str]]) -> tuple[Scene, int] | None:
        """The scene and its index; for training the next good one's, for evaluation None, if it is bad."""
        for at in (index,) if rng is None else range(index, index + len(self)):
            at %= len(self)
            try:
                return self._scene(at, rng), at
            except BadImage as error:
                if self.on_error == "error":
                    raise error.with_advice from error
                bad.append((at, str(error)))
        if rng is None:
            return None
        raise BadImage(f"every one of the {len(self)} training images is unreadable; the first: {bad[0][1]}")

    def _scene(self, index: int, rng: torch.Generator | None) -> Scene:
        image, xywh, labels, masks, semantic = self.read(index, masks=rng is not None)
        original = tuple(image.shape[1:])
        flipped = rng is not None and bool(torch.rand((), generator=rng) < self.flip)
        image, size = self.resize(image), self.resize.size(*original)
        maps = [None if m is None else nearest(m, size) for m in (masks, semantic)]
        if flipped:
            image, *maps = [None if m is None else m.flip(-1) for m in (image, *maps)]
        return Scene(image.contiguous(), xywh, labels, *maps, original, self.resize.scale(*original), flipped)
