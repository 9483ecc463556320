"""What a box is: the one object that tells the pixels of MMDetection 1 from those of today's libraries.

``LEGACY``: a box holds its last pixel, so its width is x2 - x1 + 1 (MMDetection 1, with which the published detectors
were trained and tested). ``MODERN``: a box is its edges, width x2 - x1 (MMDetection 2 and 3, detectron2, torchvision).
``TORCHVISION``: modern, with the deviations of torchvision's ``MaskRCNN``, for detectors trained there. Every
difference between them is a field or a method here; nothing else asks which one it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anorm.detection import masks, ops

__all__ = ["GEOMETRIES", "LEGACY", "MODERN", "TORCHVISION", "Geometry", "geometry"]

LARGEST = math.log(1000 / 16)
"""Limit of dw and dh, so that an exponential never overflows."""


@dataclass(frozen=True)
class Geometry:
    """Boxes (n, 4) are x1 y1 x2 y2 in pixels of the image, sizes (H, W) those of the unpadded image.

    Attributes:
        one: what a width has beyond x2 - x1.
        rounded_anchors: base anchors are rounded to whole pixels, half to even.
        clamp_below: dw and dh are limited below too.
        aligned: RoIAlign's half-cell shift.
        by_score: detections come out by score also when they are few; otherwise class by class.
        weak_matches: in the RoI heads too a ground truth takes its best boxes below the threshold for positives.
        inside: only anchors inside the image train the RPN.
        least, least_found: proposals must be wider and higher than this many pixels, detections at least as wide.
        one_scale: ground truth is resized by the factor that was asked for, not by each side's true one.
        targets, window: mask targets, and the interpolation that pastes a mask (``anorm.detection.masks``).
        at_least_half: a pixel of exactly one half belongs to a mask.
    """

    name: str
    one: float
    rounded_anchors: bool
    by_score: bool
    targets: masks.Targets
    window: masks.Window
    at_least_half: bool
    clamp_below: bool = True
    aligned: bool = True
    weak_matches: bool = True
    inside: bool = True
    least: float = 0.0
    least_found: float = 0.0
    level_eps_inside: bool = True
    one_scale: bool = False

    def sizes(self, boxes: Tensor) -> Tensor:
        """Widths and heights (..., 2)."""
        return boxes[..., 2:] - boxes[..., :2] + self.one

    def centres(self, boxes: Tensor) -> Tensor:
        """Centres (..., 2)."""
        return (boxes[..., :2] + boxes[..., 2:]) * 0.5

    def clip(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes cut to an image (H, W)."""
        height, width = (float(side) - self.one for side in size)
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)

    def encode(self, boxes: Tensor, targets: Tensor, stds: tuple[float, ...]) -> Tensor:
        """Deltas dx dy dw dh (n, 4) that lead from boxes to targets, divided by ``stds`` (Girshick et al., R-CNN)."""
        size = self.sizes(boxes)
        shift = (self.centres(targets) - self.centres(boxes)) / size
        return torch.cat((shift, (self.sizes(targets) / size).log()), -1) / boxes.new_tensor(stds)

    def decode(self, boxes: Tensor, deltas: Tensor, stds: tuple[float, ...]) -> Tensor:
        """Boxes (..., 4) that the deltas (..., 4) lead to; inverse of ``encode``, unclipped."""
        deltas = deltas * deltas.new_tensor(stds)
        size = self.sizes(boxes)
        grown = deltas[..., 2:].clamp(-LARGEST if self.clamp_below else None, LARGEST).exp()
        centre, half = self.centres(boxes) + deltas[..., :2] * size, (size * grown - self.one) * 0.5
        return torch.cat((centre - half, centre + half), -1)

    def from_xywh(self, xywh: Tensor) -> Tensor:
        """COCO's x y w h (n, 4) -> boxes."""
        return torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:] - self.one), 1)

    def to_xywh(self, boxes: Tensor) -> Tensor:
        """Boxes -> COCO's x y w h (n, 4)."""
        return torch.cat((boxes[:, :2], self.sizes(boxes)), 1)

    def flip(self, boxes: Tensor, width: float) -> Tensor:
        """Boxes of an image of that width mirrored left to right."""
        x1, y1, x2, y2 = boxes.unbind(1)
        return torch.stack((width - x2 - self.one, y1, width - x1 - self.one, y2), 1)

    def ground_truth(
        self,
        xywh: Tensor,
        original: tuple[int, int],
        size: tuple[int, int],
        scale: float,
        flipped: bool,
    ) -> Tensor:
        """COCO's boxes of an image (H, W) -> boxes of the same image resized to ``size``, cut to it, mirrored."""
        if self.one_scale:
            x, y = scale, scale
        else:
            x, y = size[1] / original[1], size[0] / original[0]
        boxes = self.clip(self.from_xywh(xywh) * xywh.new_tensor((x, y, x, y)), size)
        return self.flip(boxes, size[1]) if flipped else boxes

    def base_anchors(self, stride: int, scale: float, ratios: tuple[float, ...]) -> Tensor:
        """Anchors (ratios, 4) of the cell (0, 0): area (stride * scale)^2, ratio h / w; float64."""
        root = torch.tensor(ratios, dtype=torch.float64).sqrt()
        side = stride * scale
        half = (torch.stack((side / root, side * root), 1) - self.one) * 0.5
        centre = 0.5 * (stride - 1) * self.one
        anchors = torch.cat((centre - half, centre + half), 1)
        return anchors.round() if self.rounded_anchors else anchors

    def areas(self, boxes: Tensor) -> Tensor:
        """Areas (n,)."""
        return self.sizes(boxes).prod(-1)

    def iou(self, a: Tensor, b: Tensor, over_a: bool = False) -> Tensor:
        """Intersection over union (n, m); ``over_a``: over the area of a (iof)."""
        low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
        inter = (high - low + self.one).clamp(min=0).prod(-1)
        union = self.areas(a)[:, None]
        if not over_a:
            union = union + self.areas(b) - inter
        return inter / union.clamp(min=1e-6)

    def nms(self, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        """Indices of the boxes that survive, ascending (torchvision's operator on the boxes' outer edges)."""
        outer = boxes + boxes.new_tensor((0.0, 0.0, self.one, self.one)) if self.one else boxes
        return ops.nms(outer, scores, threshold).sort().values

    def roi_align(self, features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
        """RoIs (n, 5) of a map with ``scale`` cells a pixel -> (n, C, size, size), 2 x 2 samples a bin.

        The legacy operator takes [x1 * scale, (x2 + 1) * scale] without the shift and without a least size; the
        aligned operator computes the same on boxes moved by half a cell.
        """
        if self.one:
            shift = 0.5 / scale
            rois = rois + rois.new_tensor((0.0, shift, shift, shift + self.one, shift + self.one))
        return ops.roi_align(features, rois, size, scale, 2, self.aligned)

    def levels(self, boxes: Tensor, count: int, finest: float = 56.0) -> Tensor:
        """Pyramid level of each RoI (n,): floor(log2(sqrt(w h) / finest)), 0 to count - 1 (Lin et al., FPN, eq. 1)."""
        ratio = self.areas(boxes).sqrt() / finest
        level = (ratio + 1e-6).log2() if self.level_eps_inside else ratio.log2() + 1e-6
        return level.floor().clamp(0, count - 1).long()

    def paste(self, probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Mask probabilities (n, m, m) of boxes (n, 4) -> masks (n, H, W), bool."""
        return masks.paste(probabilities, boxes, size, self.window, self.at_least_half)


LEGACY = Geometry("legacy", 1.0, True, False, masks.crop_targets, masks.integer_window, False, one_scale=True)
MODERN = Geometry("modern", 0.0, False, True, masks.aligned_targets, masks.pixel_window, True)
TORCHVISION = Geometry(
    "torchvision",
    0.0,
    True,
    True,
    masks.soft_targets,
    masks.padded_window,
    False,
    clamp_below=False,
    aligned=False,
    weak_matches=False,
    inside=False,
    least=1e-3,
    least_found=1e-2,
    level_eps_inside=False,
)
GEOMETRIES = {g.name: g for g in (MODERN, LEGACY, TORCHVISION)}


def geometry(name: str) -> Geometry:
    """The geometry by name; ValueError for another."""
    if name not in GEOMETRIES:
        raise ValueError(f"geometry={name!r} is none of {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]
