"""ResNet-20/32/56/110 for 32 x 32 images (He et al., CVPR 2016, section 4.2), in the names of ``resnet``.

A 3x3 stem, three stages of n = (depth - 2) / 6 basic blocks with 16, 32 and 64 channels, average, linear. Where a block
changes the shape its shortcut is option A (every second pixel, new channels zero: no parameters; the paper's choice
here) or option B (1x1 convolution of stride 2 and a norm).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.archs.resnet import BasicBlock
from anorm.norms.base import Site

__all__ = ["ARCHS", "CifarResNet"]

WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option A: (N, C, H, W) -> (N, outputs, H/2, W/2), every second pixel, zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class CifarResNet(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, num_classes).

    Args:
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        depth: 6 n + 2.
        option: "A" or "B", the shortcut where the shape changes (section 3.3).
        zero_init: the last norm of each block starts at zero.
    """

    def __init__(
        self,
        norm: MakeNorm,
        num_classes: int = 1000,
        in_channels: int = 3,
        depth: int = 20,
        option: str = "A",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6 n + 2 (8, 14, 20, ...), got {depth}")
        if option not in ("A", "B"):
            raise ValueError(f"option={option!r} is neither 'A' (zero padding) nor 'B' (1x1 convolution)")
        self.option = option
        inputs = WIDTHS[0]
        self.conv1 = nn.Conv2d(in_channels, inputs, 3, padding=1, bias=False)
        self.bn1 = norm(Site(inputs, 0, 3, "stem", act="relu"))
        for stage, width in enumerate(WIDTHS):
            blocks = nn.Sequential()
            for i in range((depth - 2) // 6):
                site = partial(Site, stage=stage, stages=3)
                halve = stage > 0 and i == 0
                shortcut = self._shortcut(inputs, width, site, norm) if halve else None
                blocks.append(BasicBlock(inputs, width, 2 if halve else 1, shortcut, site, norm))
                inputs = width
            self.add_module(f"layer{stage + 1}", blocks)
        self.fc = nn.Linear(inputs, num_classes)
        self.feature_info = {f"layer{s + 1}": FeatureInfo(width, 2**s) for s, width in enumerate(WIDTHS)}
        he_init(self)
        for module in self.modules():
            if zero_init and isinstance(module, BasicBlock):
                module.last_norm.zero_init()

    def _shortcut(self, inputs: int, outputs: int, site, norm: MakeNorm) -> nn.Module:
        if self.option == "A":
            return PadShortcut(inputs, outputs)
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, 2, bias=False), norm(site(outputs, role="shortcut"))
        )

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"layer1": stride 1, "layer2": stride 2, "layer3": stride 4}."""
        x = self.bn1(self.conv1(x))
        maps = {}
        for name in self.feature_info:
            maps[name] = x = getattr(self, name)(x)
        return maps

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's map -> logits."""
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_stages(x)["layer3"])


ARCHS = {f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in (20, 32, 56, 110)}
BASIC = tuple(ARCHS)
