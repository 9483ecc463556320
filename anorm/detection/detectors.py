"""Mask R-CNN, Cascade Mask R-CNN and Hybrid Task Cascade over any backbone, with any norm; torchvision's convention."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from anorm.archs.base import MakeNorm
from anorm.detection import names
from anorm.detection.boxes import generators
from anorm.detection.fpn_rpn import FPN, RPN, Proposals
from anorm.detection.geometry import Geometry, geometry
from anorm.detection.htc import SemanticHead
from anorm.detection.roi import CASCADE, SINGLE, BoxHead, MaskHead, Original, RoIHeads
from anorm.norms.base import Norm, outermost_norms
from anorm.norms.placement import Placement
from anorm.norms.statistics import freeze_stats
from anorm.registry import create_model
from anorm.weights import LoadReport
from anorm.words import nearest

__all__ = ["DETECTORS", "Backbone", "Detector", "create_detector"]

MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
PARTS = ("fpn", "box", "mask")


class Backbone(nn.Module):
    """The part of a classification network that makes feature maps: images -> the deepest map of each stride.

    The last four strides that double are kept; whatever their maps do not need (classifier, MobileNetV2's last 1x1)
    is taken out, so that it neither counts nor waits for a gradient. The state_dict has the network's own names.

    Attributes:
        channels, strides: of the maps, finest first.
    """

    def __init__(self, network: nn.Module, name: str = "this network") -> None:
        super().__init__()
        if not hasattr(network, "forward_stages"):
            raise ValueError(f"{name} has no forward_stages: it cannot be a detector's backbone")
        deepest = {info.stride: (stage, info.channels) for stage, info in network.feature_info.items()}
        strides = sorted(deepest)[-4:]
        doubling = all(b == 2 * a for a, b in zip(strides, strides[1:], strict=False))
        if len(strides) < 2 or not doubling:
            raise ValueError(
                f"{name} has maps at strides {sorted(deepest)}: a pyramid needs some that double"
            )
        self.strides = tuple(strides)
        self.stages = tuple(deepest[stride][0] for stride in strides)
        self.channels = tuple(deepest[stride][1] for stride in strides)
        self.pruned, self._first = _prune(network, self.stages)
        self.network = network
        self.norm_summary = getattr(network, "norm_summary", "")

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.network.forward_stages(images)
        return [maps[stage] for stage in self.stages]

    def freeze(self, policy: str) -> str:
        """Stop learning what a published way of fine-tuning holds; return it in words.

        Both hold the first stage and what stands before it, and all running statistics, those within AN's attention
        too. "code": as the authors' code did, every other parameter learns. "paper": the affines and mixtures of norms
        are held as well, so that of the norms only attention learns (ECCV paper, section 4.3).
        """
        assert policy in ("paper", "code"), policy
        parameters, held = dict(self.network.named_parameters()), set(self._first)
        statistics = freeze_stats(self.network)
        if policy == "paper":
            for name, norm in outermost_norms(self.network):
                roles = norm.param_needs().items()
                held |= {f"{name}.{own}" for own, need in roles if need.role in ("norm", "mixture")}
            for name, module in self.network.named_modules():  # torch's and timm's
                if isinstance(module, _NormBase) and not isinstance(module, Norm):
                    held |= {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
        for name in held:
            parameters[name].requires_grad_(False)
        count = sum(parameters[name].numel() for name in held)
        return f"frozen as in the {policy}: {count:,} parameters of the backbone, the statistics of {statistics} norms"


class Detector(nn.Module):
    """Images -> losses in training, detections in evaluation.

    ``detector(images, targets)`` in training: images, a list of (3, H, W) in 0 to 1 (or uint8); targets, a list of
    {"boxes": (n, 4) in pixels, "labels": (n,) from 1 to num_classes, "masks": (n, H, W), and for HTC's branch
    "semantic": (H, W) with 255 for ignored pixels}. Returns a dict of losses, whose sum is to be minimised:
    loss_rpn_cls, loss_rpn_bbox, loss_cls, loss_bbox, loss_mask (s0.loss_cls, ... for stages) and loss_semantic_seg.

    ``detector(images)`` in evaluation: a list of {"boxes": (n, 4), "labels": (n,), "scores": (n,), "masks": (n, H, W)
    of bool}. ``originals`` (``Original`` for each image) asks for pixels of the image before it was resized.

    Boxes are x1 y1 x2 y2 of ``geometry``. Images are normalised with ImageNet's mean and deviation, then padded with
    zeros to a multiple of 32 and to the largest of the batch.

    ``seeds``, one an image, make the draws of the samplers independent of the batch and of the process.
    """

    divisor = 32

    def __init__(self, backbone: Backbone, fpn: FPN, rpn: RPN, roi: RoIHeads, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.fpn, self.rpn, self.roi = backbone, fpn, rpn, roi
        self.num_classes = num_classes
        self.register_buffer("mean", torch.tensor(MEAN, dtype=torch.float64), persistent=False)
        self.register_buffer("std", torch.tensor(STD, dtype=torch.float64), persistent=False)

    @property
    def geometry(self) -> Geometry:
        """What a box is to this detector."""
        return self.roi.geometry

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        originals: Sequence[Original | tuple] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        sizes = [tuple(image.shape[-2:]) for image in images]
        canvas = self.batch(images)
        if self.training:
            if targets is None:
                raise ValueError("in training a detector is called as detector(images, targets)")
            targets = [self._target(t, s, canvas) for t, s in zip(targets, sizes, strict=True)]
        pyramid = self.fpn(self.backbone(canvas))
        logits, deltas = self.rpn(pyramid)
        levels = self.rpn.anchors(pyramid, deltas[0].dtype)
        proposals = [boxes for boxes, _ in self.rpn.propose(logits, deltas, levels, sizes)]
        if self.training:
            draws = generators(seeds, len(sizes))
            truths = [target["boxes"] for target in targets]
            losses = self.rpn.losses(logits, deltas, levels, sizes, truths, draws)
            return losses | self.roi.losses(pyramid, proposals, sizes, targets, draws)
        originals = originals or [(height, width) for height, width in sizes]
        return self.roi.detect(pyramid, proposals, sizes, [Original(*o) for o in originals])

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images of their own sizes -> one normalised, padded tensor (N, 3, H, W)."""
        height, width = (
            -(-max(image.shape[side] for image in images) // self.divisor) * self.divisor for side in (-2, -1)
        )
        dtype = self.rpn.cls.weight.dtype
        canvas = torch.zeros(len(images), 3, height, width, dtype=dtype, device=self.rpn.cls.weight.device)
        mean, std = self.mean.to(dtype)[:, None, None], self.std.to(dtype)[:, None, None]
        for place, image in zip(canvas, images, strict=True):
            if image.dim() != 3 or image.shape[0] != 3:
                raise ValueError(f"an image is (3, H, W), not {tuple(image.shape)}")
            scaled = image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)
            place[:, : image.shape[1], : image.shape[2]] = (scaled - mean) / std
        return canvas

    def _target(self, target: dict[str, Tensor], size: tuple[int, int], canvas: Tensor) -> dict[str, Tensor]:
        """One image's target, checked, its maps padded to the canvas."""
        boxes, labels, masks = (target[key] for key in ("boxes", "labels", "masks"))
        count = len(boxes)
        if boxes.shape != (count, 4) or labels.shape != (count,) or masks.shape != (count, *size):
            raise ValueError(
                f"boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)} and masks {tuple(masks.shape)} of an image "
                f"of {size[0]} x {size[1]} must be (n, 4), (n,) and (n, {size[0]}, {size[1]})"
            )
        if count and not 1 <= int(labels.min()) <= int(labels.max()) <= self.num_classes:
            raise ValueError(f"labels must be from 1 to {self.num_classes}, not {labels.unique().tolist()}")
        if count and not bool((self.geometry.sizes(boxes) > 0).all()):
            raise ValueError("a target box has no area: leave it out")
        height, width = canvas.shape[-2:]
        edges = (0, width - size[1], 0, height - size[0])
        found = {"boxes": boxes.to(canvas), "labels": labels.to(canvas.device), "masks": F.pad(masks, edges)}
        found["masks"] = found["masks"].to(canvas.device)
        if self.roi.semantic is not None:
            if "semantic" not in target:
                raise ValueError(
                    'the semantic branch needs target["semantic"]; without maps: semantic_classes=0'
                )
            semantic = target["semantic"].to(canvas.device)
            if semantic.shape == size:
                # MMDetection pads with class 0, not with 255
                semantic = F.pad(semantic, edges)
            found["semantic"] = semantic
        return found

    @property
    def freeze_policies(self) -> dict[str, Callable[[], str]]:
        """Words that ``freeze`` of the configuration takes besides its own."""
        return {
            "paper": lambda: self.backbone.freeze("paper"),
            "code": lambda: self.backbone.freeze("code"),
            "none": lambda: "frozen: nothing",
        }

    def forgive_head(self, report: LoadReport, fits: dict[str, Tensor]) -> None:
        """Called by ``anorm.load_weights`` with head="replace": a classifier's file fills the backbone alone, a detector's
        of another number of classes leaves the layers that depend on it as they are.
        """
        if report.style.startswith("a backbone"):
            new = {name for name in self.state_dict() if not name.startswith("backbone.")}
            gone = self.backbone.pruned
            report.unexpected = [
                name for name in report.unexpected if not any(f"{name}.".startswith(f"{p}.") for p in gone)
            ]
        else:
            last = r"roi\.(box_heads\.\d\.(cls|reg)|mask_heads\.\d\.logits|semantic\.logits)\."
            named = {name for name in self.state_dict() if re.match(last, name)}
            new = named if not named.isdisjoint(report.missing + report.mismatched) else set()
        report.new_head = bool(new)
        report.missing = [name for name in report.missing if name not in new]
        report.mismatched = [name for name in report.mismatched if name not in new]
        for name in new & fits.keys():
            del fits[name]

    def translate_names(self, shapes: dict[str, tuple[int, ...]], target: Sequence[str]):
        """Called by ``anorm.load_weights``: see ``anorm.detection.names``."""
        return names.translate(shapes, target)


def create_detector(
    name: str = "mask_rcnn",
    arch: str = "resnet50",
    norm: str | dict | MakeNorm = "an",
    head_norm: str | dict | MakeNorm | None = None,
    num_classes: int = 80,
    geometry: str = "modern",
    box_head: str | None = None,
    semantic_classes: int = 183,
    arch_options: dict | None = None,
    **options,
) -> Detector:
    """A detector by name, in torchvision's calling convention (see ``Detector``).

    Args:
        name: "mask_rcnn", "cascade_mask_rcnn" or "htc".
        arch: backbone, one of ``anorm.list_archs()`` or ``timm:NAME``, with maps at doubling strides.
        norm: of the backbone, as in ``create_model``.
        head_norm: of pyramid, box head (4conv1fc) and mask head: None (biases instead), a law's name, a dict as for
            ``norm``; or {"fpn": ..., "box": ..., "mask": ...} with one for each. "an_gn" puts AN over GN into the
            box head (K = 10, 10, 20, 20) and GN elsewhere, as the paper's AN (w/ GN) heads.
        num_classes: without the background; the networks have one output more, and label 0 is the background.
        geometry: "modern", "legacy" (MMDetection 1, for the authors' checkpoints) or "torchvision".
        box_head: "4conv1fc" (the default of Mask R-CNN) or "2fc" (of the cascades).
        semantic_classes: of HTC's semantic branch; 0 for HTC without it.
        arch_options: of the architecture.
        options: by the names of torchvision's ``MaskRCNN``: rpn_pre_nms_top_n_train,
            rpn_pre_nms_top_n_test, rpn_post_nms_top_n_train, rpn_post_nms_top_n_test, rpn_nms_thresh,
            rpn_batch_size_per_image, rpn_positive_fraction, box_batch_size_per_image, box_positive_fraction,
            box_score_thresh, box_nms_thresh, box_detections_per_img; anchor_scale (8: an anchor's side in strides),
            rpn_convs (1), width (256: channels of pyramid and heads) and hidden (1024: of the linear layers).

    Raises ValueError for what does not exist, naming what does.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}{nearest(str(name), DETECTORS)}")
    known = [p.name for p in inspect.signature(_assemble).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"a detector has no option {option!r}{nearest(option, known)}")
    for what, value, least in (("num_classes", num_classes, 1), ("semantic_classes", semantic_classes, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{what}={value!r} must be a number from {least} on")
    network = create_model(arch, norm, **(arch_options or {}))
    return _assemble(
        DETECTORS[name],
        Backbone(network, arch),
        head_norm,
        num_classes,
        geometry,
        box_head,
        semantic_classes,
        **options,
    )


class Family:
    """What tells the detectors apart: stages, the usual box head, the least score, and HTC's additions."""

    def __init__(self, stages, box_head: str, score: float = 0.05, interleaved: bool = False) -> None:
        self.stages, self.box_head, self.score, self.interleaved = stages, box_head, score, interleaved


DETECTORS = {
    "mask_rcnn": Family(SINGLE, "4conv1fc"),
    "cascade_mask_rcnn": Family(CASCADE, "2fc"),
    "htc": Family(CASCADE, "2fc", score=0.001, interleaved=True),
}


def _assemble(
    family: Family,
    backbone: Backbone,
    head_norm,
    num_classes: int,
    geometry_name: str,
    box_head: str | None,
    semantic_classes: int,
    *,
    rpn_pre_nms_top_n_train: int = 2000,
    rpn_pre_nms_top_n_test: int = 1000,
    rpn_post_nms_top_n_train: int = 2000,
    rpn_post_nms_top_n_test: int = 1000,
    rpn_nms_thresh: float = 0.7,
    rpn_batch_size_per_image: int = 256,
    rpn_positive_fraction: float = 0.5,
    box_batch_size_per_image: int = 512,
    box_positive_fraction: float = 0.25,
    box_score_thresh: float | None = None,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    anchor_scale: float = 8.0,
    rpn_convs: int = 1,
    width: int = 256,
    hidden: int = 1024,
) -> Detector:
    boxes = geometry(geometry_name)
    norms = _head_norms(head_norm)
    strides = (*backbone.strides, 2 * backbone.strides[-1])
    fpn = FPN(backbone.channels, width, norms["fpn"])
    rpn = RPN(
        width,
        strides,
        boxes,
        anchor_scale,
        train=Proposals(rpn_pre_nms_top_n_train, rpn_post_nms_top_n_train),
        test=Proposals(rpn_pre_nms_top_n_test, rpn_post_nms_top_n_test),
        samples=rpn_batch_size_per_image,
        positive=rpn_positive_fraction,
        nms=rpn_nms_thresh,
        convs=rpn_convs,
    )
    kind, cascade = box_head or family.box_head, len(family.stages) > 1
    heads = [BoxHead(width, num_classes, kind, cascade, hidden, norms["box"]) for _ in family.stages]
    masks = [MaskHead(width, num_classes, norms["mask"], family.interleaved) for _ in family.stages]
    _check_one_roi(masks[0], width)
    if family.interleaved:
        # no stage comes before the first: the published files have these weights, no gradient reaches them
        masks[0].flow.requires_grad_(False)
    semantic = None
    if family.interleaved and semantic_classes:
        semantic = SemanticHead(len(strides), width, semantic_classes, strides[1], 1)
    roi = RoIHeads(
        boxes,
        strides[:-1],
        family.stages,
        heads,
        masks,
        semantic,
        family.interleaved,
        samples=box_batch_size_per_image,
        positive=box_positive_fraction,
        score=family.score if box_score_thresh is None else box_score_thresh,
        nms=box_nms_thresh,
        detections=box_detections_per_img,
    )
    detector = Detector(backbone, fpn, rpn, roi, num_classes)
    summaries = {part: norm.summary() for part, norm in norms.items() if isinstance(norm, Placement)}
    heads_summary = "; ".join(f"{part}: {text}" for part, text in summaries.items() if text)
    detector.norm_summary = "; ".join(filter(None, (backbone.norm_summary, heads_summary)))
    return detector


def _check_one_roi(head: MaskHead, channels: int) -> None:
    """Raise ValueError for a norm that cannot train on one RoI: a batch may have one positive, at any step."""
    norm = copy.deepcopy(head.convs[0].norm)
    if norm is None:
        return
    try:
        norm.train()(torch.zeros(1, channels, 14, 14, device=head.logits.weight.device))
    except ValueError as error:
        raise ValueError(
            f"head_norm of the mask head: {type(norm).__name__} cannot train where a batch has one positive RoI "
            f"({error}); give the mask head another norm: head_norm={{mask: gn, ...}}"
        ) from error


def _head_norms(head_norm) -> dict[str, Callable | None]:
    """The norm of each part; ValueError for a part that does not exist."""
    if not isinstance(head_norm, dict) or "name" in head_norm:
        head_norm = dict.fromkeys(PARTS, head_norm)
    if unknown := set(head_norm) - set(PARTS):
        raise ValueError(
            f"head_norm has no part {', '.join(sorted(unknown))}; it has {', '.join(PARTS)}, or a name"
        )
    return {part: _make_norm(head_norm.get(part)) for part in PARTS}


def _make_norm(norm) -> Callable | None:
    if norm is None or norm == "none":
        return None
    if callable(norm):
        return norm
    return Placement(**({"name": norm} if isinstance(norm, str) else norm))


def _prune(network: nn.Module, stages: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Replace every module whose parameters none of the stages depends on by the identity.

    Returns the names of these modules, and of the parameters that the first stage depends on.
    """
    training = network.training
    device = next(network.parameters()).device
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def reached(total: Tensor) -> set[str]:
        found = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

    with torch.enable_grad():
        maps = network.eval().forward_stages(torch.zeros(1, 3, 64, 64, device=device))
        needed = reached(sum(maps[stage].sum() for stage in stages))
        first = reached(maps[stages[0]].sum())
    network.train(training)
    gone = []

    def prune(module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            own = {f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()}
            if own and needed.isdisjoint(own):
                setattr(module, name, nn.Identity())
                gone.append(prefix + name)
            else:
                prune(child, f"{prefix}{name}.")

    prune(network, "")
    return tuple(gone), tuple(sorted(first))
