"""Feature pyramid (Lin et al., CVPR 2017) and region proposal network (Ren et al., 2015) on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.archs.base import MakeNorm
from anorm.detection.boxes import Thresholds, anchors, assign, sample
from anorm.detection.geometry import Geometry
from anorm.norms.base import Site

__all__ = ["FPN", "RPN", "ConvNorm", "Proposals", "smooth_l1"]


class ConvNorm(nn.Module):
    """Convolution, norm if any (then no bias), activation if any: (N, inputs, H, W) -> (N, outputs, H, W)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        norm: MakeNorm | None = None,
        site: Callable[..., Site] | None = None,
        act: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm is None)
        self.norm = None if norm is None else norm(site(outputs, act=act))
        self.relu = norm is None and act is not None
        assert act in (None, "relu"), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            return self.norm(x)
        return F.relu(x) if self.relu else x


class FPN(nn.Module):
    """Maps of the backbone, finest first -> one map of ``channels`` for each and a coarser one, strides doubling.

    1x1 laterals, nearest upsampling added from the top down, 3x3 outputs, no activation; the last map takes every
    second cell of the one before.
    """

    def __init__(self, inputs: Sequence[int], channels: int = 256, norm: MakeNorm | None = None) -> None:
        super().__init__()
        site = partial(Site, stages=len(inputs))
        self.lateral = nn.ModuleList(
            ConvNorm(n, channels, 1, norm, partial(site, stage=i, role="lateral"))
            for i, n in enumerate(inputs)
        )
        self.output = nn.ModuleList(
            ConvNorm(channels, channels, 3, norm, partial(site, stage=i, role="output"))
            for i in range(len(inputs))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            below = merged[i - 1]
            merged[i - 1] = below + F.interpolate(merged[i], size=below.shape[-2:], mode="nearest")
        pyramid = [output(x) for output, x in zip(self.output, merged, strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, 2)]


class Proposals(NamedTuple):
    """How many proposals: the best ``per_level`` before NMS, the best ``most`` of an image after it."""

    per_level: int
    most: int


TRAIN, TEST = Proposals(2000, 2000), Proposals(1000, 1000)
MATCH = Thresholds(0.7, 0.3, 0.3)


class RPN(nn.Module):
    """Pyramid -> proposals, and the losses of objectness and box.

    Args:
        channels: of the pyramid.
        strides: of its maps.
        geometry: what a box is.
        scale, ratios: an anchor's side in strides, and its h / w.
        train, test: number of proposals.
        samples, positive: anchors an image that are trained, and the largest share of positives.
        nms: IoU above which a proposal is dropped, within a level.
        convs: 3x3 convolutions before the two outputs (torchvision's second model has two).
    """

    stds = (1.0, 1.0, 1.0, 1.0)
    beta = 1 / 9

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        geometry: Geometry,
        scale: float = 8.0,
        ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
        train: Proposals = TRAIN,
        test: Proposals = TEST,
        samples: int = 256,
        positive: float = 0.5,
        nms: float = 0.7,
        thresholds: Thresholds = MATCH,
        convs: int = 1,
    ) -> None:
        super().__init__()
        self.geometry, self.strides = geometry, tuple(strides)
        self.train_proposals, self.test_proposals, self.nms = train, test, nms
        self.samples, self.positive, self.thresholds = samples, positive, thresholds
        self.base = [geometry.base_anchors(stride, scale, ratios) for stride in strides]
        self.convs = nn.ModuleList(ConvNorm(channels, channels, 3, act="relu") for _ in range(convs))
        self.cls = nn.Conv2d(channels, len(ratios), 1)
        self.reg = nn.Conv2d(channels, 4 * len(ratios), 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each level objectness logits (N, H * W * a) and deltas (N, H * W * a, 4), float32 or float64."""
        logits, deltas = [], []
        for x in pyramid:
            for conv in self.convs:
                x = conv(x)
            logits.append(_full(self.cls(x)).permute(0, 2, 3, 1).flatten(1))
            deltas.append(_full(self.reg(x)).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        return logits, deltas

    def anchors(self, pyramid: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Anchors of each level (H * W * a, 4)."""
        return [
            anchors(base.to(x.device, dtype), stride, x.shape[-2:])
            for base, stride, x in zip(self.base, self.strides, pyramid, strict=True)
        ]

    @torch.no_grad()
    def propose(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        levels: list[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image boxes (n, 4) by descending score, and their objectness logits (n,).

        The best of each level are decoded, cut to the image and thinned by NMS; then the best of all levels stay.
        """
        number = self.train_proposals if self.training else self.test_proposals
        found = []
        for i, size in enumerate(sizes):
            boxes, scores = [], []
            for logit, delta, anchor in zip(logits, deltas, levels, strict=True):
                score, these = logit[i], slice(None)
                if len(score) > number.per_level:
                    score, these = score.topk(number.per_level)
                box = self.geometry.decode(anchor[these], delta[i][these], self.stds)
                box = self.geometry.clip(box, size)
                wide = (self.geometry.sizes(box) > self.geometry.least).all(1)
                box, score = box[wide], score[wide]
                keep = self.geometry.nms(box, score, self.nms)
                boxes.append(box[keep])
                scores.append(score[keep])
            score = torch.cat(scores)
            score, order = score.sort(descending=True, stable=True)
            found.append((torch.cat(boxes)[order[: number.most]], score[: number.most]))
        return found

    def losses(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        levels: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        truths: Sequence[Tensor],
        draws: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """Cross-entropy of objectness and smooth L1 of the positives' deltas, both sums over the sampled anchors.

        Both are divided by the number of sampled anchors of the whole batch (this process's micro-batch).
        """
        logit, delta, anchor = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(levels)
        chosen, labels, positives, targets, count = [], [], [], [], 0
        for i, (truth, (height, width)) in enumerate(zip(truths, sizes, strict=True)):
            inside = torch.arange(len(anchor), device=anchor.device)
            if self.geometry.inside:
                within = (anchor[:, :2] >= 0).all(1) & (anchor[:, 2] < width) & (anchor[:, 3] < height)
                inside = within.nonzero()[:, 0]
            near = anchor[inside]
            index = assign(self.geometry, near, truth, self.thresholds).truth
            positive, negative = sample(index, self.samples, self.positive, draws[i])
            start = i * len(anchor)
            chosen += [start + inside[positive], start + inside[negative]]
            labels += [logit.new_ones(len(positive)), logit.new_zeros(len(negative))]
            positives.append(start + inside[positive])
            if len(positive):
                targets.append(self.geometry.encode(near[positive], truth[index[positive]], self.stds))
            count += max(len(positive), 1) + max(len(negative), 1)
        label, target = torch.cat(labels), torch.cat(targets) if targets else delta.new_zeros(0, 4)
        objectness = F.binary_cross_entropy_with_logits(
            logit.flatten()[torch.cat(chosen)], label, reduction="sum"
        )
        box = smooth_l1(delta.flatten(0, 1)[torch.cat(positives)], target, self.beta)
        return {"loss_rpn_cls": objectness / count, "loss_rpn_bbox": box / count}


def smooth_l1(x: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of d^2 / (2 beta) where d = |x - target| < beta, of d - beta / 2 elsewhere (Girshick, Fast R-CNN, eq. 3)."""
    return F.smooth_l1_loss(x, target, reduction="sum", beta=beta)


def _full(x: Tensor) -> Tensor:
    """Boxes and losses are computed in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
