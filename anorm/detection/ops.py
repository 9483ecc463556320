"""The two operators of region detectors: torchvision's compiled ones, or plain PyTorch with the same results.

Both follow torchvision's definitions: ``nms`` drops a box whose IoU with a better one is above the threshold, ties in
score keep the order of the input; ``roi_align`` averages bilinear samples (He et al., Mask R-CNN, 2017, section 3).
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

__all__ = ["compiled", "nms", "nms_plain", "roi_align", "roi_align_plain"]

_log = logging.getLogger(__name__)


@cache
def compiled() -> bool:
    """Whether torchvision's operators can be called; a warning says why not."""
    try:
        import torchvision  # noqa: F401  registers the operators
    except (ImportError, RuntimeError) as error:  # RuntimeError: built against another torch
        _log.warning(
            "detection runs on plain PyTorch, many times slower: torchvision is not usable (%s)", error
        )
        return False
    return True


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that survive, by descending score. boxes (n, 4) as x1 y1 x2 y2, scores (n,)."""
    if compiled():
        return torch.ops.torchvision.nms(boxes, scores, threshold)
    return nms_plain(boxes, scores, threshold)


def roi_align(
    features: Tensor, rois: Tensor, size: int, scale: float, sampling: int = 2, aligned: bool = True
) -> Tensor:
    """Features (N, C, H, W) inside RoIs (n, 5: image, x1 y1 x2 y2 in pixels) -> (n, C, size, size).

    Args:
        scale: feature cells per pixel.
        sampling: samples per bin and axis; 0 takes as many as there are cells in a bin.
        aligned: shift by half a cell, so that a RoI's centre stays a centre; False also widens RoIs below one cell.
    """
    if compiled():
        return torch.ops.torchvision.roi_align(features, rois, scale, size, size, sampling, aligned)
    return roi_align_plain(features, rois, size, scale, sampling, aligned)


def nms_plain(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """``nms`` in plain PyTorch: O(n^2) memory."""
    order = scores.sort(descending=True, stable=True).indices
    x1, y1, x2, y2 = boxes[order].unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    w = (torch.minimum(x2[:, None], x2) - torch.maximum(x1[:, None], x1)).clamp(min=0)
    h = (torch.minimum(y2[:, None], y2) - torch.maximum(y1[:, None], y1)).clamp(min=0)
    inter = w * h
    close = (inter / (areas[:, None] + areas - inter) > threshold).cpu()
    alive = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if alive[i]:
            alive[i + 1 :] &= ~close[i, i + 1 :]
    return order[alive.to(order.device)]


def roi_align_plain(
    features: Tensor, rois: Tensor, size: int, scale: float, sampling: int = 2, aligned: bool = True
) -> Tensor:
    """``roi_align`` in plain PyTorch: gathers the four cells around each sample."""
    n, channels, (height, width) = len(rois), features.shape[1], features.shape[2:]
    flat = features.permute(0, 2, 3, 1).reshape(-1, channels)
    start = rois[:, 1:3] * scale - (0.5 if aligned else 0.0)
    extent = rois[:, 3:5] * scale - (0.5 if aligned else 0.0) - start
    if not aligned:
        extent = extent.clamp(min=1.0)
    grids = (
        torch.full((n, 2), sampling, device=rois.device)
        if sampling > 0
        else (extent / size).ceil().long().clamp(min=0)
    )
    out = features.new_zeros(n, channels, size, size)
    for grid in grids.unique(dim=0):
        these = (grids == grid).all(1).nonzero()[:, 0]
        columns, rows = grid.tolist()
        if columns and rows:
            x = _samples(start[these, 0], extent[these, 0], size, columns, width)
            y = _samples(start[these, 1], extent[these, 1], size, rows, height)
            image = rois[these, 0].long() * height
            total = 0.0
            for row, row_weight in zip(y[:2], y[2:], strict=True):
                for column, column_weight in zip(x[:2], x[2:], strict=True):
                    cell = (image[:, None] + row)[:, :, None] * width + column[:, None, :]
                    weight = row_weight[:, :, None] * column_weight[:, None, :]
                    total = total + flat[cell.flatten()].view(*cell.shape, channels) * weight[..., None]
            total = total.view(len(these), size, rows, size, columns, channels).mean((2, 4))
            out = out.index_put((these,), total.permute(0, 3, 1, 2))
    return out


def _samples(start: Tensor, extent: Tensor, size: int, grid: int, length: int):
    """Cells below and above each of the size * grid samples (n, size * grid), and their weights."""
    steps = (torch.arange(size * grid, device=start.device, dtype=start.dtype) + 0.5) / grid
    at = start[:, None] + steps * (extent / size)[:, None]
    inside = (at >= -1) & (at <= length)
    at = at.clamp(min=0)
    low = at.long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    fraction = torch.where(low < length - 1, at - low, 0.0)
    return low, high, (1 - fraction) * inside, fraction * inside
