"""OpenCV's bilinear resize of 8-bit images, exactly: half-pixel centres, no antialiasing, 11-bit fixed point.

MMDetection resized its images and its mask targets with it. The arithmetic truncates: of a 0/1 mask a true value of
up to 0.62 can become 0 (and ``torchvision``'s or PIL's resize, which antialias, are several grey levels apart).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Taps", "blend", "resize", "taps"]

ONE = 2048


class Taps(NamedTuple):
    """For each output pixel the two input pixels (int64) and their weights in 1 / 2048 (int32)."""

    low: Tensor
    high: Tensor
    weight_low: Tensor
    weight_high: Tensor


def taps(length: Tensor | int, size: int) -> Taps:
    """Input lengths (...) -> the taps (..., size) of an axis resized to ``size`` pixels."""
    length = torch.as_tensor(length)
    scale = 1.0 / (size / length.double())
    at = torch.arange(size, device=length.device, dtype=torch.float64) + 0.5
    at = (at * scale[..., None] - 0.5).float()
    low = at.floor()
    fraction = at - low
    last = (length[..., None] - 1).float()
    fraction = torch.where((low < 0) | (low >= last), torch.zeros_like(fraction), fraction)
    low = torch.minimum(low.clamp(min=0), last)
    high = torch.minimum(low + 1, last)
    weights = (((1 - fraction) * ONE).round().int(), (fraction * ONE).round().int())
    return Taps(low.long(), high.long(), *weights)


def blend(top: Tensor, bottom: Tensor, weight_top: Tensor, weight_bottom: Tensor) -> Tensor:
    """Rows already weighted horizontally (int32, value * 2048) -> uint8, as OpenCV's vertical pass rounds."""
    total = ((weight_top * (top >> 4)) >> 16) + ((weight_bottom * (bottom >> 4)) >> 16)
    return ((total + 2) >> 2).to(torch.uint8)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """8-bit images (..., H, W) -> (..., size): bilinear without antialiasing."""
    rows, columns = taps(image.shape[-2], size[0]), taps(image.shape[-1], size[1])
    image = image.int()
    wide = image[..., columns.low] * columns.weight_low + image[..., columns.high] * columns.weight_high
    return blend(
        wide[..., rows.low, :], wide[..., rows.high, :], rows.weight_low[:, None], rows.weight_high[:, None]
    )
