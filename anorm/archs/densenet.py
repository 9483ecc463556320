"""DenseNet-121, 161, 169, 201 (Huang et al., CVPR 2017, Table 1) in torchvision's names.

With BN it is torchvision's function exactly. Every layer of a dense block reads the concatenation of all maps before:

    x_l = conv3x3(relu(norm2(conv1x1(relu(norm1([x_0, ..., x_{l-1}]))))))

A norm stands in front of its convolution here and takes that convolution's role. AN's place (the ``focus``) is norm2.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site

__all__ = ["ARCHS", "DenseNet"]


class DenseLayer(nn.Module):
    """norm, ReLU, 1x1 to 4 * growth channels, norm, ReLU, 3x3: (N, C, H, W) -> (N, growth, H, W)."""

    def __init__(self, inputs: int, growth: int, dropout: float, site, norm: MakeNorm) -> None:
        super().__init__()
        width = 4 * growth
        self.dropout = dropout
        self.norm1 = norm(site(inputs, role="reduce", block_norm=1, act="relu"))
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm2 = norm(site(width, role="spatial", block_norm=2, focus=True, last=True, act="relu"))
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class DenseBlock(nn.ModuleDict):
    """(N, C, H, W) -> (N, C + layers * growth, H, W)."""

    def __init__(self, inputs: int, layers: int, growth: int, dropout: float, site, norm: MakeNorm) -> None:
        super().__init__()
        for i in range(layers):
            self[f"denselayer{i + 1}"] = DenseLayer(inputs + i * growth, growth, dropout, site, norm)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.values():
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


class Transition(nn.Sequential):
    """norm, ReLU, 1x1 to half the channels, 2x2 average: (N, C, H, W) -> (N, C/2, H/2, W/2)."""

    def __init__(self, inputs: int, site, norm: MakeNorm) -> None:
        super().__init__()
        self.norm = norm(site(inputs, role="transition", act="relu"))
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        growth: channels that each layer adds.
        blocks: layers of each dense block.
        width: channels of the stem.
        dropout: rate behind each layer's 3x3.
    """

    def __init__(
        self,
        norm: MakeNorm,
        num_classes: int = 1000,
        in_channels: int = 3,
        growth: int = 32,
        blocks: tuple[int, ...] = (6, 12, 24, 16),
        width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(blocks)
        self.features = nn.Sequential()
        self.features.conv0 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.features.norm0 = norm(Site(width, 0, stages, "stem", act="relu"))
        self.features.pool0 = nn.MaxPool2d(3, 2, 1)
        self.feature_info: dict[str, FeatureInfo] = {}
        for stage, layers in enumerate(blocks):
            site = partial(Site, stage=stage, stages=stages)
            name = f"denseblock{stage + 1}"
            self.features.add_module(name, DenseBlock(width, layers, growth, dropout, site, norm))
            width += layers * growth
            self.feature_info[name] = FeatureInfo(width, 4 * 2**stage)
            if stage < stages - 1:
                self.features.add_module(f"transition{stage + 1}", Transition(width, site, norm))
                width //= 2
        self.features.norm5 = norm(Site(width, stages - 1, stages, "final", act="relu"))
        self.classifier = nn.Linear(width, num_classes)
        he_init(self)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"denseblock1": (N, C, H/4, W/4), ...}: each block's output, the last behind norm and ReLU."""
        maps = {}
        for name, module in self.features.named_children():
            x = module(x)
            if name in self.feature_info:
                maps[name] = x
        maps[list(maps)[-1]] = x
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


ARCHS = {
    "densenet121": partial(DenseNet, growth=32, blocks=(6, 12, 24, 16), width=64),
    "densenet161": partial(DenseNet, growth=48, blocks=(6, 12, 36, 24), width=96),
    "densenet169": partial(DenseNet, growth=32, blocks=(6, 12, 32, 32), width=64),
    "densenet201": partial(DenseNet, growth=32, blocks=(6, 12, 48, 32), width=64),
}
