"""Detections drawn on their image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw"]

COLOURS = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (184, 168, 0)
)  # fmt: skip


def draw(image: Tensor, found: dict[str, Tensor], classes: Sequence[str], least: float = 0.5) -> Image:
    """Return a picture of an image, uint8 (3,H,W), with the detections of a score from ``least`` on.

    Each has its mask at half strength, its box, its class and its score; the best ones are on top.
    """
    from PIL import Image as Picture
    from PIL import ImageDraw

    shown = [i for i in found["scores"].argsort().tolist() if found["scores"][i] >= least]
    pixels = image.cpu().float()
    for i in shown:
        mask, colour = found["masks"][i].cpu(), _colour(found, i)
        pixels[:, mask] = 0.5 * pixels[:, mask] + 0.5 * torch.tensor(colour, dtype=torch.float32)[:, None]
    picture = Picture.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    for i in shown:
        x1, y1, x2, y2 = found["boxes"][i].tolist()
        colour, text = _colour(found, i), f"{classes[int(found['labels'][i]) - 1]} {found['scores'][i]:.2f}"
        pen.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=colour, width=2)
        left, top, right, bottom = pen.textbbox((x1 + 2, max(y1 - 12, 0)), text)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
        pen.text((x1 + 2, max(y1 - 12, 0)), text, fill="white")
    return picture


def _colour(found: dict[str, Tensor], index: int) -> tuple[int, int, int]:
    return COLOURS[int(found["labels"][index]) % len(COLOURS)]
