"""Scenes of coloured shapes with exact masks: detection without a download, in minutes on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anorm.data.random import stream
from anorm.data.scenes import Resize, Scenes
from anorm.data.sources.base import Source

CLASSES = ("disc", "square", "triangle", "ring", "cross")


def inside(kind: str, x: Tensor, y: Tensor) -> Tensor:
    """Whether points lie in the shape of radius 1 at the origin."""
    r = (x.square() + y.square()).sqrt()
    if kind == "disc":
        return r <= 1
    if kind == "ring":
        return (r <= 1) & (r >= 0.55)
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) <= 0.85
    if kind == "cross":
        return (torch.minimum(x.abs(), y.abs()) <= 0.3) & (torch.maximum(x.abs(), y.abs()) <= 0.95)
    assert kind == "triangle", kind
    return (y <= 0.75) & (y >= 1.6 * x.abs() - 0.95)


class ShapeScenes(Scenes):
    """Scene i is drawn from (split, i) alone: up to ``most`` shapes, later ones in front of earlier ones.

    One scene in 16 is empty, one in 8 holds a crowd: many small discs under one annotation. Radii run from 3 pixels to
    half the image. What less than 12 pixels are seen of is no object.
    """

    in_memory = True

    def __init__(self, split: str, count: int, side: int, most: int, flip: float, semantic: bool) -> None:
        super().__init__(Resize(None, None), flip, torch.tensor([[side, side]]).expand(count, 2))
        self.split, self.side, self.most, self.semantic = split, side, most, semantic
        self.categories = list(range(1, len(CLASSES) + 1))
        self.identity = f"shapes-2-{split}-{count}-{side}-{most}"

    def draw(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image uint8 (3,S,S), labels (n,) from 1 on, masks bool (n,S,S) of what is seen, crowd (n,) of bool."""
        side, rng = self.side, stream(0, f"shapes {self.split}", index)

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=rng).item()

        y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
        slope = uniform(0, 2 * math.pi)
        shade = (x * math.cos(slope) + y * math.sin(slope)) / side * uniform(0, 60)
        image = torch.rand(3, 1, 1, generator=rng) * 120 + 40 + shade
        masks, labels, crowd = [], [], []

        def put(kind: int, radius: float, at: tuple[float, float], colour: Tensor, turn: float) -> Tensor:
            u, v = (x - at[0]) / radius, (y - at[1]) / radius
            u, v = u * math.cos(turn) - v * math.sin(turn), u * math.sin(turn) + v * math.cos(turn)
            mask = inside(CLASSES[kind], u, v)
            image[:, mask] = colour
            for other in masks:
                other &= ~mask
            return mask

        def colour() -> Tensor:
            return torch.rand(3, 1, generator=rng) * 255

        empty = uniform(0, 1) < 1 / 16
        for _ in range(0 if empty else int(uniform(1, self.most + 1))):
            kind = int(uniform(0, len(CLASSES)))
            size = uniform(0, 1)
            # some tiny, some huge, most between a sixteenth and a fifth of the side
            radius = (
                uniform(3, 5)
                if size < 0.1
                else side * (uniform(0.3, 0.5) if size > 0.95 else uniform(0.07, 0.2))
            )
            place = uniform(0, side), uniform(0, side)
            mask = put(kind, radius, place, colour(), uniform(-0.3, 0.3))
            masks.append(mask)
            labels.append(kind + 1)
            crowd.append(False)
        if not empty and uniform(0, 1) < 1 / 8:
            centre, whole, shared = (
                (uniform(0, side), uniform(0, side)),
                torch.zeros(side, side).bool(),
                colour(),
            )
            for _ in range(12):
                place = centre[0] + uniform(-9, 9), centre[1] + uniform(-9, 9)
                whole |= put(0, uniform(1.5, 2.5), place, shared, 0.0)
            masks.append(whole)
            labels.append(1)
            crowd.append(True)
        image = image + torch.randn(3, side, side, generator=rng) * 8
        seen = [i for i, mask in enumerate(masks) if int(mask.sum()) >= 12]
        stacked = (
            torch.stack([masks[i] for i in seen]) if seen else torch.zeros(0, side, side, dtype=torch.bool)
        )
        return (
            image.clamp(0, 255).to(torch.uint8),
            torch.tensor([labels[i] for i in seen], dtype=torch.int64),
            stacked,
            torch.tensor([crowd[i] for i in seen], dtype=torch.bool),
        )

    def read(self, index: int, masks: bool):
        image, labels, found, crowd = self.draw(index)
        semantic = None
        if self.semantic:
            semantic = (found * labels[:, None, None]).amax(0).to(torch.uint8) if len(found) else image[0] * 0
        found, labels = found[~crowd], labels[~crowd]
        return image, boxes_of(found), labels, found.to(torch.uint8) if masks else None, semantic

    def truth(self, index: int) -> tuple[dict, list[dict]]:
        _, labels, masks, crowd = self.draw(index)
        image = {"id": index, "file_name": f"{self.split}/{index}", "height": self.side, "width": self.side}
        annotations = [
            {
                "image_id": index,
                "category_id": label,
                "bbox": box,
                "area": float(mask.sum()),
                "iscrowd": int(many),
                "segmentation": {"size": [self.side, self.side], "counts": run_lengths(mask)},
            }
            for label, box, mask, many in zip(
                labels.tolist(), boxes_of(masks).tolist(), masks, crowd.tolist(), strict=True
            )
        ]
        return image, annotations


def boxes_of(masks: Tensor) -> Tensor:
    """Masks (n,H,W), none empty -> the boxes around them, x y w h (n,4), float64."""
    if not len(masks):
        return torch.zeros(0, 4, dtype=torch.float64)
    edges = []
    for seen in (masks.any(1), masks.any(2)):  # columns, rows
        first, last = seen.int().argmax(1), seen.shape[1] - seen.flip(1).int().argmax(1)
        edges.append((first, last - first))
    (x, w), (y, h) = edges
    return torch.stack((x, y, w, h), 1).double()


def run_lengths(mask: Tensor) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, the first run of zeros."""
    flat = mask.t().flatten().int()
    change = (flat.diff() != 0).nonzero()[:, 0] + 1
    ends = torch.cat((torch.tensor([0]), change, torch.tensor([len(flat)])))
    runs = ends.diff().tolist()
    return [0, *runs] if flat[0] else runs


def shapes(
    train_images: int = 1200,
    val_images: int = 100,
    image_size: int = 96,
    most: int = 5,
    flip: float = 0.5,
    semantic_classes: int | None = None,
) -> Source:
    """Generated scenes of five classes. Raises ValueError for sizes that are not possible.

    most: shapes in a scene, at most. semantic_classes: those of the task's semantic branch, None or 0 without.
    """
    for name, value, least in (
        ("train_images", train_images, 1),
        ("val_images", val_images, 1),
        ("image_size", image_size, 32),
        ("most", most, 1),
    ):
        if value < least:
            raise ValueError(f"data.{name}={value} must be at least {least}")
    if semantic_classes and semantic_classes <= len(CLASSES):
        raise ValueError(
            f"task.semantic_classes={semantic_classes} must be more than the {len(CLASSES)} shapes"
        )
    train = ShapeScenes("train", train_images, image_size, most, flip, bool(semantic_classes))
    val = ShapeScenes("val", val_images, image_size, most, 0.0, False)
    return Source(train, {"val": val}, list(CLASSES), f"{train.identity}-{val.identity}")


SOURCES = {"shapes": shapes}
