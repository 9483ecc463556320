"""Masks between images and the small square in which a head predicts them: targets one way, pasting the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from anorm.data import bilinear
from anorm.detection import ops

__all__ = [
    "Targets",
    "Window",
    "aligned_targets",
    "crop_targets",
    "integer_window",
    "padded_window",
    "paste",
    "pixel_window",
    "soft_targets",
]

Targets = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(bitmaps (g, H, W) of an image, index of the bitmap of each box (n,), boxes (n, 4), size) -> (n, size, size)."""

Window = Callable[[float, float, int, int], tuple[int, Tensor]]
"""(low, high edge of a box on one axis, mask size m, image side) -> (first pixel, where each pixel from there lies in
the mask with a border of zeros: 1 to m are its cells, 0 and m + 1 the border)."""


def crop_targets(bitmaps: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """MMDetection 1: the box in whole pixels is cut out and resized as OpenCV resizes 8-bit images."""
    height, width = bitmaps.shape[-2:]
    x1, y1, x2, y2 = boxes.long().unbind(1)
    x1, x2, y1, y2 = (
        x1.clamp(0, width - 1),
        x2.clamp(0, width - 1),
        y1.clamp(0, height - 1),
        y2.clamp(0, height - 1),
    )
    columns = bilinear.taps((x2 - x1 + 1).clamp(min=1), size)
    rows = bilinear.taps((y2 - y1 + 1).clamp(min=1), size)
    bitmaps = bitmaps.int()

    def row(at: Tensor) -> Tensor:
        where = index[:, None, None], (y1[:, None] + at)[:, :, None]
        left = bitmaps[(*where, (x1[:, None] + columns.low)[:, None])] * columns.weight_low[:, None]
        return left + bitmaps[(*where, (x1[:, None] + columns.high)[:, None])] * columns.weight_high[:, None]

    weights = rows.weight_low[:, :, None], rows.weight_high[:, :, None]
    return bilinear.blend(row(rows.low), row(rows.high), *weights).to(boxes.dtype)


def soft_targets(bitmaps: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """torchvision: RoIAlign of the bitmap without the half-pixel shift; fractions stay fractions."""
    rois = torch.cat((index[:, None].to(boxes.dtype), boxes), 1)
    return ops.roi_align(bitmaps[:, None].to(boxes.dtype), rois, size, 1.0, 0, aligned=False)[:, 0]


def aligned_targets(bitmaps: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """MMDetection 3: RoIAlign of the bitmap with as many samples as pixels, 1 from one half on."""
    rois = torch.cat((index[:, None].to(boxes.dtype), boxes), 1)
    soft = ops.roi_align(bitmaps[:, None].to(boxes.dtype), rois, size, 1.0, 0, aligned=True)
    return (soft[:, 0] >= 0.5).to(boxes.dtype)


def pixel_window(low: float, high: float, size: int, side: int) -> tuple[int, Tensor]:
    """Samples the mask at pixel centres. One pixel around the box is enough: beyond it no value reaches one half."""
    first, last = max(int(low) - 1, 0), min(int(high) + 2, side)
    pixels = torch.arange(first, max(last, first), dtype=torch.float64) + 0.5
    return first, (pixels - low) / max(high - low, 1e-12) * size + 0.5


def integer_window(low: float, high: float, size: int, side: int) -> tuple[int, Tensor]:
    """Resizes the mask to the box in whole pixels, edges repeated."""
    first = int(low)
    length = max(int(high) - first + 1, 1)
    at = (torch.arange(length, dtype=torch.float64) + 0.5) * (size / length) + 0.5
    return first, at.clamp(1, size)


def padded_window(low: float, high: float, size: int, side: int) -> tuple[int, Tensor]:
    """torchvision: a cell of zeros around the mask, the box grown likewise, then whole pixels."""
    centre, half = (low + high) * 0.5, (high - low) * 0.5 * ((size + 2) / size)
    first = int(centre - half)
    length = max(int(centre + half) - first + 1, 1)
    return first, (torch.arange(length, dtype=torch.float64) + 0.5) * ((size + 2) / length) - 0.5


def paste(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], window: Window, at_least_half: bool
) -> Tensor:
    """Probabilities (n, m, m) of boxes (n, 4) -> masks (n, H, W), bool, on the CPU; bilinear between cells."""
    height, width = size
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    padded = F.pad(probabilities.detach().cpu(), (1, 1, 1, 1))
    for mask, patch, (x1, y1, x2, y2) in zip(pasted, padded, boxes.tolist(), strict=True):
        x, columns = window(x1, x2, patch.shape[0] - 2, width)
        y, rows = window(y1, y2, patch.shape[0] - 2, height)
        values = _between(_between(patch, columns, 1), rows, 0)
        inside = values >= 0.5 if at_least_half else values > 0.5
        above, left = max(-y, 0), max(-x, 0)
        target = mask[y + above : y + len(rows), x + left : x + len(columns)]
        target.copy_(inside[above : above + target.shape[0], left : left + target.shape[1]])
    return pasted


def _between(patch: Tensor, at: Tensor, dim: int) -> Tensor:
    """Linear interpolation of one dimension at the positions ``at``; beyond the ends the last value."""
    at = at.clamp(0, patch.shape[dim] - 1)
    low = at.long().clamp(max=patch.shape[dim] - 2)
    fraction = (at - low).to(patch.dtype)
    if dim == 0:
        fraction = fraction[:, None]
    return torch.lerp(patch.index_select(dim, low), patch.index_select(dim, low + 1), fraction)
