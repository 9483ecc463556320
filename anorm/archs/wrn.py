"""Wide ResNets for 32 x 32 images: WRN-16-4, 40-2, 40-4 and 40-10 (Zagoruyko and Komodakis, BMVC 2016, Table 1).

A 3x3 stem of 16 channels, three stages of n = (depth - 4) / 6 pre-activation blocks with 16 k, 32 k and 64 k channels,
norm and ReLU, average, linear.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site

__all__ = ["ARCHS", "WideResNet"]


class PreActBlock(nn.Module):
    """h = relu(norm1(x)); y = conv3x3(relu(norm2(conv3x3(h)))) + (x or, where the shape changes, conv1x1(h)).

    A norm stands in front of its convolution and none before the residual add. So there is no ``zero_init``: a norm2
    of zeros would let no gradient through its ReLU.
    """

    def __init__(self, inputs: int, width: int, stride: int, dropout: float, site, norm: MakeNorm) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn1 = norm(site(inputs, role="spatial", block_norm=1, act="relu"))
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(site(width, role="spatial", block_norm=2, focus=True, last=True, act="relu"))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != width
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(x)
        y = self.bn2(self.conv1(h))
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(h))


class WideResNet(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, num_classes).

    Args:
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        depth: 6 n + 4.
        widen: k, the factor on the widths 16, 32 and 64.
        dropout: rate between the two convolutions of a block.
    """

    def __init__(
        self,
        norm: MakeNorm,
        num_classes: int = 1000,
        in_channels: int = 3,
        depth: int = 40,
        widen: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet has depth 6 n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}")
        if widen < 1:
            raise ValueError(f"widen={widen} must be at least 1")
        inputs = 16
        self.conv1 = nn.Conv2d(in_channels, inputs, 3, padding=1, bias=False)
        self.feature_info: dict[str, FeatureInfo] = {}
        for stage in range(3):
            site, width = partial(Site, stage=stage, stages=3), 16 * widen * 2**stage
            blocks = nn.Sequential()
            for i in range((depth - 4) // 6):
                blocks.append(PreActBlock(inputs, width, 2 if stage and i == 0 else 1, dropout, site, norm))
                inputs = width
            self.add_module(f"layer{stage + 1}", blocks)
            self.feature_info[f"layer{stage + 1}"] = FeatureInfo(width, 2**stage)
        self.bn = norm(Site(inputs, 2, 3, "final", act="relu"))
        self.fc = nn.Linear(inputs, num_classes)
        he_init(self)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"layer1": stride 1, "layer2": stride 2, "layer3": stride 4}, the last behind norm and ReLU."""
        x = self.conv1(x)
        maps = {}
        for name in self.feature_info:
            maps[name] = x = getattr(self, name)(x)
        maps["layer3"] = self.bn(x)
        return maps

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's map -> logits."""
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_stages(x)["layer3"])


SIZES = ((16, 4), (40, 2), (40, 4), (40, 10))
ARCHS = {f"wrn_{depth}_{widen}": partial(WideResNet, depth=depth, widen=widen) for depth, widen in SIZES}
