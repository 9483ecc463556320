"""MobileNetV2 (Sandler et al., CVPR 2018, Table 2) in torchvision's names, with any width multiplier.

With BN it is torchvision's function exactly. Its seven stages are the seven rows of that table. AN's place (the
``focus``) is the norm behind each depthwise convolution, before its ReLU6.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site

__all__ = ["ARCHS", "MobileNetV2"]

ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and the first block's stride."""


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and never more than 10 % below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv_norm(inputs: int, outputs: int, kernel: int, norm: nn.Module, stride: int = 1, groups: int = 1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm)


class InvertedResidual(nn.Module):
    """1x1 to expansion * C, 3x3 depthwise, linear 1x1; plus the input where the shape stays.

    The depthwise norm counts as the block's second and the linear one as its third, also where nothing expands.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, site, norm: MakeNorm) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        width = inputs * expansion
        self.conv = nn.Sequential()
        if expansion != 1:
            expand = norm(site(width, role="expand", block_norm=1, act="relu6"))
            self.conv.append(conv_norm(inputs, width, 1, expand))
        depthwise = norm(site(width, role="spatial", block_norm=2, focus=True, act="relu6"))
        self.conv.append(conv_norm(width, width, 3, depthwise, stride, groups=width))
        self.conv.append(nn.Conv2d(width, outputs, 1, bias=False))
        self.conv.append(norm(site(outputs, role="reduce", block_norm=3, last=True)))

    @property
    def last_norm(self) -> nn.Module:
        return self.conv[-1]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for module in self.conv[:-1]:
            y = module(y)
        return self.last_norm(y, x) if self.residual else self.last_norm(y)


class MobileNetV2(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        width_mult: factor on every width, rounded to multiples of 8; the last 1x1 never gets narrower than 1280.
        dropout: rate before the classifier.
        zero_init: the last norm of each block with a shortcut starts at zero.
    """

    def __init__(
        self,
        norm: MakeNorm,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"width_mult={width_mult} must be positive")
        stages = len(ROWS)
        inputs = round_channels(32 * width_mult)
        stem = norm(Site(inputs, 0, stages, "stem", act="relu6"))
        self.features = nn.Sequential(conv_norm(in_channels, inputs, 3, stem, stride=2))
        self.feature_info: dict[str, FeatureInfo] = {}
        self.ends: dict[int, str] = {}
        total = 2
        for stage, (expansion, width, depth, stride) in enumerate(ROWS):
            site = partial(Site, stage=stage, stages=stages)
            outputs = round_channels(width * width_mult)
            for i in range(depth):
                block = InvertedResidual(inputs, outputs, stride if i == 0 else 1, expansion, site, norm)
                self.features.append(block)
                inputs = outputs
            total *= stride
            self.feature_info[f"stage{stage + 1}"] = FeatureInfo(outputs, total)
            self.ends[len(self.features) - 1] = f"stage{stage + 1}"
        outputs = round_channels(1280 * max(1.0, width_mult))
        final = norm(Site(outputs, stages - 1, stages, "final", act="relu6"))
        self.features.append(conv_norm(inputs, outputs, 1, final))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(outputs, num_classes))
        he_init(self)
        nn.init.normal_(self.classifier[1].weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier[1].bias)
        for module in self.modules():
            if zero_init and isinstance(module, InvertedResidual) and module.residual:
                module.last_norm.zero_init()

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"stage1": stride 2, ..., "stage7": stride 32} behind each row, before the last 1x1."""
        maps = {}
        for i, module in enumerate(self.features[:-1]):
            x = module(x)
            if i in self.ends:
                maps[self.ends[i]] = x
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


ARCHS = {"mobilenetv2": MobileNetV2}
