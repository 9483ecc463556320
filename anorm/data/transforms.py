"""Crops and flips of one decoded image: the random choices are separate from the pixels, so every loader shares them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INTERPOLATIONS = ("bilinear", "bicubic")
ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after ten draws and takes the centre
DRAWS = 3 + 2 * ATTEMPTS


class Window(NamedTuple):
    """The part of an image that becomes the sample, in pixels of the decoded image, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirror: bool

    def cut(self, image: Tensor) -> Tensor:
        """Return the window's pixels of (C,H,W)."""
        return image[:, self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Crop:
    """Random resized crop and flip for training, resize and centre crop for evaluation (both antialiased).

    image_size: side of the result, pixels. eval_resize: short side before the evaluation's centre crop (default:
    256/224 of image_size). interpolation: "bilinear" or "bicubic". crop_scale: range of the crop's share of the area.
    crop_ratio: range of its width / height. flip: mirror with probability 1/2.
    The distribution is torchvision's RandomResizedCrop; the region is cut out before it is resized.
    """

    image_size: int = 224
    eval_resize: int | None = None
    interpolation: str = "bilinear"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"data.image_size={self.image_size} must be a positive number of pixels")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(
                f"data.eval_resize={self.eval_resize} is below data.image_size={self.image_size}: "
                "the centre crop would not fit; raise it, or leave it out for 256/224 of the image size"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"data.interpolation={self.interpolation!r} is unknown: choose {' or '.join(INTERPOLATIONS)}"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"data.crop_scale={list(self.crop_scale)} must be two rising shares of the area in (0, 1]"
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio={list(self.crop_ratio)} must be two rising positive ratios")

    @property
    def short_side(self) -> int:
        """Short side of the resized image that the evaluation crops, pixels."""
        return self.eval_resize or round(self.image_size * 256 / 224)

    def window(self, height: int, width: int, rng: torch.Generator) -> Window:
        """Draw the training window in an image of height x width pixels."""
        draws = torch.rand(DRAWS, generator=rng, dtype=torch.float64).tolist()
        mirror = self.flip and draws[0] < 0.5
        log_low, log_high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for attempt in range(ATTEMPTS):
            share, shape = draws[3 + 2 * attempt], draws[4 + 2 * attempt]
            area = height * width * (self.crop_scale[0] + share * (self.crop_scale[1] - self.crop_scale[0]))
            ratio = math.exp(log_low + shape * (log_high - log_low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Window(int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1)), h, w, mirror)
        h = min(height, round(width / self.crop_ratio[0]))
        w = min(width, round(height * self.crop_ratio[1]))
        return Window((height - h) // 2, (width - w) // 2, h, w, mirror)

    def evaluation(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return what `evaluate` does to an image: (height, width) after the resize, (top, left) of the centre crop in that.

        Rounded as torchvision rounds.
        """
        short = self.short_side
        tall, wide = (
            (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        )
        return (tall, wide), (round((tall - self.image_size) / 2), round((wide - self.image_size) / 2))

    def train(self, pixels: Tensor, window: Window) -> Tensor:
        """Resize the window's pixels, uint8 (3,h,w), to (3,S,S), S = image_size, and mirror them where it says so."""
        resized = self._resize(pixels, (self.image_size, self.image_size))
        return resized.flip(-1) if window.mirror else resized

    def evaluate(self, image: Tensor) -> Tensor:
        """Resize uint8 (3,H,W) to the short side `short_side` and return its centre, (3,S,S)."""
        size, (top, left) = self.evaluation(image.shape[1], image.shape[2])
        return self._resize(image, size)[:, top : top + self.image_size, left : left + self.image_size]

    def _resize(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize antialiased, in uint8, by what torchvision's v2 calls. The kernel is fastest on H x W x 3 in memory."""
        if image.shape[1:] == size:
            return image
        # the result gets the layout of the batch's strides; [None] on the image itself would give it others
        batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(batch, size, mode=self.interpolation, antialias=True)[0]
