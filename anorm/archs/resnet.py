"""ResNet (He et al., CVPR 2016) with the stride on the 3x3 convolution, in torchvision's names.

With BN it is torchvision's function exactly. AN's place (the ``focus``) is the norm behind a bottleneck's 3x3, and the
first norm of a basic block.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site

__all__ = ["ARCHS", "ResNet"]

STEMS = ("7x7", "deep", "cifar")
SHORTCUTS = ("conv", "avgpool")
WIDTHS = (64, 128, 256, 512)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """3x3, norm, ReLU, 3x3, norm, + shortcut, ReLU. AN at the first norm, as in the published ResNet-34.

    The paper's text says the last 3x3 (section 4, "Where to apply AN"): ``norm.place=text``.
    """

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: nn.Module | None, site, norm: MakeNorm
    ) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = norm(site(width, role="spatial", block_norm=1, focus=True, text=False, act="relu"))
        self.conv2 = conv(width, width, 3)
        self.bn2 = norm(site(width, role="spatial", block_norm=2, text=True, last=True, act="relu"))
        self.downsample = shortcut

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), shortcut)


class Bottleneck(nn.Module):
    """1x1, norm, ReLU, 3x3, norm, ReLU, 1x1, norm, + shortcut, ReLU. AN at the second norm."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: nn.Module | None, site, norm: MakeNorm
    ) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = norm(site(width, role="reduce", block_norm=1, act="relu"))
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = norm(site(width, role="spatial", block_norm=2, focus=True, act="relu"))
        self.conv3 = conv(width, 4 * width, 1)
        self.bn3 = norm(site(4 * width, role="expand", block_norm=3, last=True, act="relu"))
        self.downsample = shortcut

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(y), shortcut)


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        block, layers: the block's class and the number of blocks in each of the four stages.
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        stem: "7x7" (stride 2, then 3x3 max-pool: vanilla), "deep" (three 3x3 of 32, 32, 64 channels, then 2x2
            max-pool: the state-of-the-art setup of section 4.2), "cifar" (one 3x3 of stride 1, no pool).
        shortcut: the projection where the shape changes: "conv" (1x1 with the stride) or "avgpool" (2x2 average
            pool, then 1x1 of stride 1; He et al., "Bag of tricks", ResNet-D).
        zero_init: the last norm of each block starts at zero, so that a block starts as its shortcut (zero-gamma).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        norm: MakeNorm,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: str = "7x7",
        shortcut: str = "conv",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem={stem!r} is none of {', '.join(STEMS)}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut={shortcut!r} is none of {', '.join(SHORTCUTS)}")
        self.avgpool_shortcut = shortcut == "avgpool"
        self._make_stem(stem, in_channels, norm)
        inputs = 64
        for stage, (width, depth) in enumerate(zip(WIDTHS, layers, strict=True)):
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(self._make_block(block, inputs, width, stride, stage, norm))
                inputs = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        first = 1 if stem == "cifar" else 4
        self.feature_info = {
            f"layer{s + 1}": FeatureInfo(w * block.expansion, first * 2**s) for s, w in enumerate(WIDTHS)
        }
        he_init(self)
        if zero_init:
            for module in self.modules():
                if isinstance(module, block):
                    module.last_norm.zero_init()

    def _make_stem(self, stem: str, in_channels: int, norm: MakeNorm) -> None:
        site = partial(Site, stage=0, stages=4, role="stem", act="relu")
        if stem == "deep":
            self.conv1 = nn.Sequential(
                OrderedDict(
                    (
                        ("0", conv(in_channels, 32, 3, 2)),
                        ("1", norm(site(32))),
                        ("3", conv(32, 32, 3)),
                        ("4", norm(site(32))),
                        ("6", conv(32, 64, 3)),
                    )
                )
            )
            pool = nn.MaxPool2d(2, 2)
        elif stem == "7x7":
            self.conv1, pool = conv(in_channels, 64, 7, 2), nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1, pool = conv(in_channels, 64, 3), nn.Identity()
        self.bn1 = norm(site(64))
        self.maxpool = pool

    def _make_block(
        self, block, inputs: int, width: int, stride: int, stage: int, norm: MakeNorm
    ) -> nn.Module:
        site = partial(Site, stage=stage, stages=4)
        outputs = width * block.expansion
        shortcut = None
        if stride != 1 or inputs != outputs:
            pooled = self.avgpool_shortcut and stride != 1
            layers = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)] if pooled else []
            layers += [
                conv(inputs, outputs, 1, 1 if pooled else stride),
                norm(site(outputs, role="shortcut")),
            ]
            shortcut = nn.Sequential(*layers)
        return block(inputs, width, stride, shortcut, site, norm)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"layer1": (N, C, H/4, W/4), ..., "layer4"}; channels and strides in ``feature_info``."""
        x = self.maxpool(self.bn1(self.conv1(x)))
        maps = {}
        for name in self.feature_info:
            maps[name] = x = getattr(self, name)(x)
        return maps

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's map -> logits."""
        return self.fc(self.avgpool(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_stages(x)["layer4"])


ARCHS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
}
BASIC = ("resnet18", "resnet34")
"""Those of basic blocks, where AN's published place and that of the paper's text differ."""
