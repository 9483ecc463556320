"""The semantic branch of Hybrid Task Cascade (Chen et al., CVPR 2019, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.detection.fpn_rpn import ConvNorm
from anorm.detection.geometry import Geometry

__all__ = ["SemanticHead"]


class SemanticHead(nn.Module):
    """Pyramid -> logits (N, classes, H/8, W/8) of every pixel's class, and the features (N, C, H/8, W/8) behind them.

    Every level is resized to stride 8 (bilinear, corners aligned) and projected (1x1, ReLU); their sum passes four
    3x3 convolutions with ReLU; logits and features are a 1x1 each.

    Args:
        levels: of the pyramid.
        channels, classes: of the features and the logits.
        stride: of the map that the others are resized to.
        fusion: its place in the pyramid.
        weight: of the loss.
    """

    ignored = 255

    def __init__(
        self,
        levels: int = 5,
        channels: int = 256,
        classes: int = 183,
        stride: int = 8,
        fusion: int = 1,
        weight: float = 0.2,
    ) -> None:
        super().__init__()
        self.stride, self.fusion, self.weight, self.classes = stride, fusion, weight, classes
        self.lateral = nn.ModuleList(ConvNorm(channels, channels, 1, act="relu") for _ in range(levels))
        self.convs = nn.ModuleList(ConvNorm(channels, channels, 3, act="relu") for _ in range(4))
        self.embedding = ConvNorm(channels, channels, 1, act="relu")
        self.logits = nn.Conv2d(channels, classes, 1)
        nn.init.kaiming_normal_(self.logits.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        size = pyramid[self.fusion].shape[-2:]
        fused = self.lateral[self.fusion](pyramid[self.fusion])
        for i, (lateral, x) in enumerate(zip(self.lateral, pyramid, strict=True)):
            if i != self.fusion:
                fused = fused + lateral(F.interpolate(x, size=size, mode="bilinear", align_corners=True))
        for conv in self.convs:
            fused = conv(fused)
        return self.logits(fused), self.embedding(fused)

    def pool(self, geometry: Geometry, features: Tensor, rois: Tensor) -> Tensor:
        """RoIAlign of the features -> (n, C, 14, 14)."""
        return geometry.roi_align(features, rois.to(features.dtype), 14, 1.0 / self.stride)

    def loss(self, logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """weight * cross-entropy, mean over the pixels that are not 255.

        A map is (h, w) at the logits' stride, or of the padded image, of which every stride-th pixel counts (nearest
        neighbour).
        """
        size = logits.shape[-2:]
        target = torch.stack(
            [m if m.shape == size else m[:: self.stride, :: self.stride] for m in maps]
        ).long()
        if target.shape[-2:] != size:
            raise ValueError(f"semantic maps of {tuple(target.shape[-2:])} for logits of {tuple(size)}")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        counted = (target != self.ignored).sum().clamp(min=1)
        total = F.cross_entropy(logits, target, ignore_index=self.ignored, reduction="sum")
        return self.weight * total / counted
