"""RoI heads in one or several stages: Mask R-CNN is one stage, Cascade Mask R-CNN three, HTC three interleaved ones.

He et al., Mask R-CNN (ICCV 2017); Cai and Vasconcelos, Cascade R-CNN (CVPR 2018); Chen et al., Hybrid Task Cascade
(CVPR 2019). Label 0 is the background, 1 to num_classes the objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.archs.base import MakeNorm
from anorm.detection.boxes import Thresholds, assign, best_by_class, sample
from anorm.detection.fpn_rpn import ConvNorm, smooth_l1
from anorm.detection.geometry import Geometry
from anorm.norms.base import Site

__all__ = ["BoxHead", "MaskHead", "Original", "RoIHeads", "Sample", "Stage", "pool"]

BOX_HEADS = ("4conv1fc", "2fc")


class Original(NamedTuple):
    """The image before it was resized: boxes are divided by ``scale`` (one, or one for x and one for y)."""

    height: int
    width: int
    scale: float | tuple[float, float] = 1.0


@dataclass(frozen=True)
class Stage:
    """IoU from which a box of this stage is an object, the scale of its deltas, and the weight of its losses."""

    iou: float
    stds: tuple[float, ...]
    weight: float = 1.0


SINGLE = (Stage(0.5, (0.1, 0.1, 0.2, 0.2)),)
CASCADE = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


@dataclass(frozen=True)
class Sample:
    """The boxes of one image that a stage trains on: ``positives`` first, then negatives.

    ``truth``: index of each positive's ground truth; ``given``: which boxes (n,) are ground truth themselves.
    """

    boxes: Tensor
    positives: int
    truth: Tensor
    given: Tensor


class BoxHead(nn.Module):
    """RoI features (n, C, 7, 7) -> class logits (n, num_classes + 1) and deltas (n, 4 * (num_classes + 1) or 4).

    Args:
        channels: C.
        num_classes: without the background.
        kind: "4conv1fc" (four 3x3 convolutions, with the norm if any, and a linear layer) or "2fc".
        agnostic: one set of deltas for all classes.
        hidden: width of the linear layers.
        norm: makes the layer for each ``Site`` (role "box", stage 0 to 3 of 4: AN has K = 10, 10, 20, 20 here).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        kind: str = "4conv1fc",
        agnostic: bool = False,
        hidden: int = 1024,
        norm: MakeNorm | None = None,
    ) -> None:
        super().__init__()
        if kind not in BOX_HEADS:
            raise ValueError(f"box_head={kind!r} is none of {', '.join(BOX_HEADS)}")
        convs = 4 if kind == "4conv1fc" else 0
        site = partial(Site, stages=4, role="box", focus=True)
        self.convs = nn.ModuleList(
            ConvNorm(channels, channels, 3, norm, partial(site, stage=i), "relu") for i in range(convs)
        )
        widths = (channels * 49, hidden) if convs else (channels * 49, hidden, hidden)
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.cls = nn.Linear(hidden, num_classes + 1)
        self.reg = nn.Linear(hidden, 4 if agnostic else 4 * (num_classes + 1))
        _he(self.convs)
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.cls, 0.01), (self.reg, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = conv(x)
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        return self.cls(x), self.reg(x)


class MaskHead(nn.Module):
    """RoI features (n, C, 14, 14) -> mask logits (n, num_classes + 1, 28, 28) (channel 0 is never trained).

    Args:
        channels, num_classes, norm: as in ``BoxHead`` (role "mask").
        flow: the head takes in the features of the stage before (HTC, section 3.1): x + ReLU(1x1(last)).
    """

    def __init__(
        self, channels: int, num_classes: int, norm: MakeNorm | None = None, flow: bool = False
    ) -> None:
        super().__init__()
        site = partial(Site, stages=4, role="mask")
        self.convs = nn.ModuleList(
            ConvNorm(channels, channels, 3, norm, partial(site, stage=i), "relu") for i in range(4)
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.logits = nn.Conv2d(channels, num_classes + 1, 1)
        self.flow = ConvNorm(channels, channels, 1, act="relu") if flow else None
        _he(self)

    def features(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        """What the logits, and the next stage's head, are made of: (n, C, 14, 14)."""
        if last is not None:
            x = x + self.flow(last)
        for conv in self.convs:
            x = conv(x)
        return x

    def forward(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        return self.predict(self.features(x, last))

    def predict(self, features: Tensor) -> Tensor:
        """Features -> logits."""
        return self.logits(F.relu(self.upsample(features)))


def pool(
    geometry: Geometry, pyramid: Sequence[Tensor], strides: Sequence[int], rois: Tensor, size: int
) -> Tensor:
    """RoIAlign of each RoI (n, 5) on the level that its size asks for -> (n, C, size, size)."""
    level = geometry.levels(rois[:, 1:], len(pyramid))
    groups = [(level == i).nonzero()[:, 0] for i in range(len(pyramid))]
    pooled = [
        geometry.roi_align(x, rois[group].to(x.dtype), size, 1.0 / stride)
        for x, stride, group in zip(pyramid, strides, groups, strict=True)
        if len(group)
    ]
    if not pooled:
        return pyramid[0].new_zeros(0, pyramid[0].shape[1], size, size)
    return torch.cat(pooled)[torch.cat(groups).argsort()]


class RoIHeads(nn.Module):
    """Pyramid and proposals -> losses in training, detections in evaluation.

    Args:
        geometry: what a box is.
        strides: of the pyramid's maps that are pooled from (all but the coarsest).
        stages: one for Mask R-CNN; several refine the boxes from stage to stage and average what they predict.
        box_heads, mask_heads: one of each a stage.
        semantic: HTC's branch; its features are added to the pooled ones.
        interleaved: HTC: masks train on the boxes that the same stage has refined, and the mask heads pass on features.
        samples, positive: RoIs an image that are trained, and the largest share of positives.
        score, nms, detections: a detection's least score, NMS within a class, most detections of an image.
    """

    def __init__(
        self,
        geometry: Geometry,
        strides: Sequence[int],
        stages: Sequence[Stage],
        box_heads: Sequence[BoxHead],
        mask_heads: Sequence[MaskHead],
        semantic: nn.Module | None = None,
        interleaved: bool = False,
        samples: int = 512,
        positive: float = 0.25,
        score: float = 0.05,
        nms: float = 0.5,
        detections: int = 100,
    ) -> None:
        super().__init__()
        self.geometry, self.strides, self.stages = geometry, tuple(strides), tuple(stages)
        self.interleaved = interleaved
        self.samples, self.positive = samples, positive
        self.score, self.nms, self.detections = score, nms, detections
        self.box_heads = nn.ModuleList(box_heads)
        self.mask_heads = nn.ModuleList(mask_heads)
        self.semantic = semantic

    # training

    def losses(
        self,
        pyramid: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
        draws: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """Losses by name, the stages' as s0., s1., ... where there are several, each with its stage's weight.

        ``loss_cls``: cross-entropy, mean over the RoIs of the batch; ``loss_bbox``: smooth L1 of the positives, also
        divided by the number of all RoIs; ``loss_mask``: cross-entropy of the own class's channel, mean over positives.
        """
        losses: dict[str, Tensor] = {}
        context = None
        if self.semantic is not None:
            logits, context = self.semantic(pyramid)
            losses["loss_semantic_seg"] = self.semantic.loss(logits, [t["semantic"] for t in targets])
        for s, stage in enumerate(self.stages):
            samples = self._sample(stage, proposals, targets, draws)
            rois = _with_image([sample.boxes for sample in samples])
            logits, deltas = self._predict_boxes(s, pyramid, context, rois)
            found = self._box_losses(stage, samples, logits, deltas, targets)
            if s + 1 < len(self.stages) or self.interleaved:
                proposals = self._refine(stage, samples, deltas.detach(), sizes)
            if self.interleaved:
                samples = self._sample(stage, proposals, targets, draws)
            found["loss_mask"] = self._mask_loss(s, pyramid, context, samples, targets)
            prefix = f"s{s}." if len(self.stages) > 1 else ""
            losses |= {f"{prefix}{name}": loss * stage.weight for name, loss in found.items()}
        return losses

    def _sample(self, stage: Stage, proposals, targets, draws) -> list[Sample]:
        weak = stage.iou if self.geometry.weak_matches else None
        thresholds = Thresholds(stage.iou, stage.iou, weak)
        samples = []
        for boxes, target, draw in zip(proposals, targets, draws, strict=True):
            truth = target["boxes"]
            index = assign(self.geometry, boxes, truth, thresholds).truth
            boxes = torch.cat((truth, boxes))
            index = torch.cat((torch.arange(len(truth), device=index.device), index))
            positive, negative = sample(index, self.samples, self.positive, draw)
            chosen = torch.cat((positive, negative))
            samples.append(Sample(boxes[chosen], len(positive), index[positive], chosen < len(truth)))
        return samples

    def _predict_boxes(self, s: int, pyramid, context, rois: Tensor) -> tuple[Tensor, Tensor]:
        x = pool(self.geometry, pyramid[:-1], self.strides, rois, 7)
        if context is not None:
            x = x + F.adaptive_avg_pool2d(self.semantic.pool(self.geometry, context, rois), 7)
        logits, deltas = self.box_heads[s](x)
        return _full(logits), _full(deltas)

    def _box_losses(self, stage: Stage, samples, logits, deltas, targets) -> dict[str, Tensor]:
        labels, chosen, wanted, start = [], [], [], 0
        for sample_, target in zip(samples, targets, strict=True):
            label = target["labels"][sample_.truth]
            labels += [label, label.new_zeros(len(sample_.boxes) - sample_.positives)]
            chosen.append(torch.arange(start, start + sample_.positives, device=logits.device))
            wanted.append(
                self.geometry.encode(
                    sample_.boxes[: sample_.positives], target["boxes"][sample_.truth], stage.stds
                )
            )
            start += len(sample_.boxes)
        label, chosen = torch.cat(labels), torch.cat(chosen)
        columns = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
        which = label[chosen] if columns.shape[1] > 1 else torch.zeros_like(chosen)
        box = smooth_l1(columns[chosen, which], torch.cat(wanted), beta=1.0)
        cls = F.cross_entropy(logits, label, reduction="sum")
        return {"loss_cls": cls / max(start, 1), "loss_bbox": box / max(start, 1)}

    @torch.no_grad()
    def _refine(self, stage: Stage, samples, deltas: Tensor, sizes) -> list[Tensor]:
        """The boxes that the stage's own deltas lead to; those that are ground truth are left out."""
        assert deltas.shape[1] == 4, "a cascade's regression knows no class"
        refined = []
        parts = deltas.split([len(sample_.boxes) for sample_ in samples])
        for sample_, part, size in zip(samples, parts, sizes, strict=True):
            boxes = self.geometry.clip(self.geometry.decode(sample_.boxes, part, stage.stds), size)
            refined.append(boxes[~sample_.given])
        return refined

    def _mask_loss(self, s: int, pyramid, context, samples, targets) -> Tensor:
        positives = [sample_.boxes[: sample_.positives] for sample_ in samples]
        features = self._pool_masks(pyramid, context, _with_image(positives))
        logits = _full(self._mask_logits(s, features))
        label = torch.cat([t["labels"][sample_.truth] for t, sample_ in zip(targets, samples, strict=True)])
        wanted = torch.cat(
            [
                self.geometry.targets(target["masks"], sample_.truth, boxes, logits.shape[-1])
                for target, sample_, boxes in zip(targets, samples, positives, strict=True)
                if len(boxes)
            ]
            or [logits.new_zeros(0, *logits.shape[2:])]
        )
        own = logits[torch.arange(len(label), device=label.device), label]
        total = F.binary_cross_entropy_with_logits(own, wanted.to(own.dtype), reduction="sum")
        return total / max(own.numel(), 1)

    # evaluation

    @torch.no_grad()
    def detect(
        self,
        pyramid: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        originals: Sequence[Original],
    ) -> list[dict[str, Tensor]]:
        """For each image boxes, labels, scores and masks, in pixels of the original image.

        Several stages: the mean of their logits, the boxes of the last, the mean of their masks' probabilities.
        """
        context = None if self.semantic is None else self.semantic(pyramid)[1]
        counts = [len(boxes) for boxes in proposals]
        boxes, logits = list(proposals), []
        for s, stage in enumerate(self.stages):
            logit, deltas = self._predict_boxes(s, pyramid, context, _with_image(boxes))
            logits.append(logit)
            if s + 1 < len(self.stages):
                boxes = [
                    self.geometry.clip(self.geometry.decode(box, part, stage.stds), size)
                    for box, part, size in zip(boxes, deltas.split(counts), sizes, strict=True)
                ]
        scores = torch.stack(logits).mean(0).softmax(1).split(counts)
        found = [
            self._choose(*per_image)
            for per_image in zip(boxes, deltas.split(counts), scores, sizes, originals, strict=True)
        ]
        masks = self._predict_masks(pyramid, context, found, originals)
        for result, probabilities, original in zip(found, masks, originals, strict=True):
            size = (original.height, original.width)
            result["masks"] = self.geometry.paste(probabilities, result["boxes"], size).to(
                probabilities.device
            )
        return found

    def _choose(self, boxes: Tensor, deltas: Tensor, scores: Tensor, size, original: Original):
        """Detections of one image: candidates above the least score, class by class, then NMS within each class."""
        label, roi = (scores[:, 1:].t() > self.score).nonzero().unbind(1)
        columns = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
        delta = columns[roi, label + 1 if columns.shape[1] > 1 else torch.zeros_like(label)]
        box = self.geometry.decode(boxes[roi], delta, self.stages[-1].stds)
        box = self.geometry.clip(box, size) / _scale(original, box)
        score = scores[roi, label + 1]
        wide = (self.geometry.sizes(box) >= self.geometry.least_found).all(1)
        box, score, label = box[wide], score[wide], label[wide]
        keep = best_by_class(self.geometry, box, score, label, self.nms, self.detections)
        return {"boxes": box[keep], "labels": label[keep] + 1, "scores": score[keep]}

    def _predict_masks(self, pyramid, context, found, originals) -> Sequence[Tensor]:
        """Probabilities (n, 28, 28) of the detected class, for each image."""
        rois = _with_image(
            [result["boxes"] * _scale(o, result["boxes"]) for result, o in zip(found, originals, strict=True)]
        )
        label = torch.cat([result["labels"] for result in found])
        features, last, total = self._pool_masks(pyramid, context, rois), None, 0.0
        own = torch.arange(len(label), device=label.device)
        for head in self.mask_heads:
            hidden = head.features(features, last)
            last = hidden if self.interleaved else None
            total = total + _full(head.predict(hidden))[own, label].sigmoid()
        return (total / len(self.mask_heads)).split([len(result["labels"]) for result in found])

    # both

    def _pool_masks(self, pyramid, context, rois: Tensor) -> Tensor:
        x = pool(self.geometry, pyramid[:-1], self.strides, rois, 14)
        return x if context is None else x + self.semantic.pool(self.geometry, context, rois)

    def _mask_logits(self, s: int, features: Tensor) -> Tensor:
        """Logits of stage s; interleaved, the features have passed the heads of the stages before."""
        last = None
        for head in self.mask_heads[:s] if self.interleaved else ():
            last = head.features(features, last)
        return self.mask_heads[s](features, last)


def _with_image(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes of each image (n_i, 4) -> RoIs (sum n_i, 5) with the image's number in front."""
    number = torch.repeat_interleave(
        torch.arange(len(boxes), device=boxes[0].device),
        torch.tensor([len(b) for b in boxes], device=boxes[0].device),
    )
    return torch.cat((number[:, None].to(boxes[0].dtype), torch.cat(list(boxes))), 1)


def _scale(original: Original, boxes: Tensor) -> Tensor:
    scale = original.scale
    x, y = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    return boxes.new_tensor((x, y, x, y))


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _he(module: nn.Module) -> None:
    """He initialisation, normal, fan-out, of every convolution below."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
