"""VGG-13, 16 and 19 with normalization, for 32 x 32 images (Simonyan and Zisserman, ICLR 2015, Table 1: B, D, E).

A norm stands behind every convolution, and one linear layer replaces the three of the ImageNet networks, as is usual
on CIFAR. No paper says where AN stands in a VGG: its ``focus`` is the last norm of each stage here.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site

__all__ = ["ARCHS", "VGG"]

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, num_classes).

    Args:
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        layers: number of 3x3 convolutions in each of the five stages; a 2x2 max-pool follows each stage.
    """

    def __init__(
        self,
        norm: MakeNorm,
        num_classes: int = 1000,
        in_channels: int = 3,
        layers: tuple[int, int, int, int, int] = (2, 2, 3, 3, 3),
    ) -> None:
        super().__init__()
        self.feature_info: dict[str, FeatureInfo] = {}
        inputs = in_channels
        for stage, (width, depth) in enumerate(zip(WIDTHS, layers, strict=True)):
            block = nn.Sequential()
            for i in range(depth):
                last = i == depth - 1
                block.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                block.append(
                    norm(
                        Site(width, stage, 5, "spatial", block_norm=i + 1, focus=last, last=last, act="relu")
                    )
                )
                inputs = width
            self.add_module(f"stage{stage + 1}", block)
            self.feature_info[f"stage{stage + 1}"] = FeatureInfo(width, 2**stage)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(inputs, num_classes)
        he_init(self)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"stage1": stride 1, ..., "stage5": stride 16}, each before its stage's pool."""
        maps = {}
        for name in self.feature_info:
            maps[name] = getattr(self, name)(x)
            x = self.pool(maps[name])
        return maps

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's map -> logits."""
        return self.classifier(self.pool(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_stages(x)["stage5"])


ARCHS = {
    "vgg13": partial(VGG, layers=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, layers=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, layers=(2, 2, 4, 4, 4)),
}
