"""Anchors, assignment of boxes to ground truth, sampling, and the choice of what is detected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anorm.detection.geometry import Geometry

__all__ = ["Assignment", "Thresholds", "anchors", "assign", "best_by_class", "generators", "sample"]


class Thresholds(NamedTuple):
    """IoU from which a box is positive, below which it is negative, and that a ground truth's best box needs."""

    positive: float
    negative: float
    least: float | None


class Assignment(NamedTuple):
    """For each box the index of its ground truth, -1 for a negative, -2 for neither (n,), and its best IoU (n,)."""

    truth: Tensor
    iou: Tensor


def anchors(base: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Base anchors (a, 4) at every cell of a map of ``size`` cells -> (H * W * a, 4): rows, columns, then anchors."""
    y, x = (torch.arange(n, dtype=base.dtype, device=base.device) * stride for n in size)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack((x, y, x, y), -1)[:, :, None] + base).reshape(-1, 4)


def assign(geometry: Geometry, boxes: Tensor, truth: Tensor, at: Thresholds) -> Assignment:
    """Each box to its ground truth (Ren et al., Faster R-CNN, section 3.1.2).

    A box below ``negative`` with every truth is negative; from ``positive`` on it takes the truth of largest IoU (the
    first of equal ones). Then each truth in order takes every box with its largest IoU, if that is at least ``least``.
    """
    if len(truth) == 0:
        return Assignment(boxes.new_full((len(boxes),), -1, dtype=torch.long), boxes.new_zeros(len(boxes)))
    if len(boxes) == 0:
        return Assignment(boxes.new_zeros(0, dtype=torch.long), boxes.new_zeros(0))
    iou = geometry.iou(truth, boxes)
    best, index = iou.max(0)
    found = torch.full_like(index, -2)
    found[best < at.negative] = -1
    found = torch.where(best >= at.positive, index, found)
    if at.least is not None:
        largest = iou.max(1, keepdim=True).values
        takes = (iou == largest) & (largest >= at.least)
        number = torch.arange(1, len(truth) + 1, device=boxes.device)[:, None]
        last = (takes * number).max(0).values
        found = torch.where(last > 0, last - 1, found)
    return Assignment(found, best)


def generators(seeds: Sequence[int] | None, count: int) -> list[torch.Generator]:
    """One stream of random numbers an image: its draws then do not depend on the images beside it.

    Without seeds they are drawn from torch's default generator.
    """
    if seeds is None:
        seeds = torch.randint(2**62, (count,)).tolist()
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} images")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def sample(truth: Tensor, number: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of at most number * share positives and of negatives that fill up to ``number``, both ascending.

    Drawn on the CPU and only where there are too many, so that every device draws the same.
    """
    positive = _draw((truth >= 0).nonzero()[:, 0], int(number * share), generator)
    negative = _draw((truth == -1).nonzero()[:, 0], number - len(positive), generator)
    return positive, negative


def _draw(indices: Tensor, most: int, generator: torch.Generator) -> Tensor:
    if len(indices) <= most:
        return indices
    chosen = torch.randperm(len(indices), generator=generator)[:most].sort().values
    return indices[chosen.to(indices.device)]


def best_by_class(
    geometry: Geometry, boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, most: int
) -> Tensor:
    """Indices of at most ``most`` boxes after NMS within each class. The input is sorted by label.

    In the legacy geometry they stay in the order (class, index) unless there are more than ``most``.
    """
    counts = torch.bincount(labels).tolist() if len(labels) else []
    kept, start = [], 0
    for count in counts:
        if count:
            these = slice(start, start + count)
            kept.append(start + geometry.nms(boxes[these], scores[these], threshold))
            start += count
    keep = torch.cat(kept) if kept else labels.new_zeros(0)
    if geometry.by_score or len(keep) > most:
        keep = keep[scores[keep].sort(descending=True, stable=True).indices[:most]]
    return keep
