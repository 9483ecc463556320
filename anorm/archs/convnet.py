"""The small ConvNet of the digits benchmarks: conv, pool, conv, pool, fc, fc (LeCun et al., 1998).

In the form of Zhou et al., "AFN: Adaptive Fusion Normalization" (section 4): 3x3 convolutions of 16 and 32 channels
with a norm between each convolution and its ReLU, and linear layers to 128 and to the classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site

__all__ = ["ARCHS", "ConvNet"]


class ConvNet(nn.Module):
    """Images (N, in_channels, image_size, image_size) -> logits (N, num_classes).

    Args:
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        image_size: side of the images, which sizes the first linear layer.
    """

    def __init__(
        self, norm: MakeNorm, num_classes: int = 1000, in_channels: int = 3, image_size: int = 32
    ) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"image_size={image_size}: two 2x2 pools need at least 4")
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = norm(Site(16, 0, 2, "spatial", block_norm=1, focus=True, last=True, act="relu"))
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = norm(Site(32, 1, 2, "spatial", block_norm=1, focus=True, last=True, act="relu"))
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * (image_size // 4) ** 2, 128)
        self.fc2 = nn.Linear(128, num_classes)
        self.feature_info = {"stage1": FeatureInfo(16, 1), "stage2": FeatureInfo(32, 2)}
        he_init(self)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"stage1": stride 1, "stage2": stride 2}, each before its stage's pool."""
        first = self.bn1(self.conv1(x))
        return {"stage1": first, "stage2": self.bn2(self.conv2(self.pool(first)))}

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.shape[2:] != (self.image_size, self.image_size):  # else a tracer's stand-in
            raise ValueError(
                f"this ConvNet is built for images of {self.image_size} x {self.image_size}, got "
                f"{x.shape[2]} x {x.shape[3]}: give image_size (arch.image_size=...)"
            )
        x = self.pool(self.forward_stages(x)["stage2"])
        return self.fc2(self.fc1(x.flatten(1)).relu())


ARCHS = {"convnet": ConvNet}
