"""Detection and instance segmentation: Mask R-CNN, Cascade Mask R-CNN, HTC; judged by COCO's average precision."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anorm.data.scenes import Resize, Scene, Scenes
from anorm.data.sources.base import Batch, Dataset, Source
from anorm.detection import coco_eval
from anorm.detection.detectors import create_detector
from anorm.detection.geometry import geometry as geometry_of
from anorm.detection.roi import Original
from anorm.tasks.base import Judge, Metric, Rows, Task

__all__ = ["TASKS", "CascadeMaskRCNN", "Detection", "HybridTaskCascade", "MaskRCNN"]

KINDS = {"box": "bbox", "mask": "segm"}
WORDS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar1": "AR 1",
    "ar10": "AR 10",
    "ar100": "AR 100",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}
STAGED = tuple(f"s{stage}.{name}" for stage in range(3) for name in ("loss_cls", "loss_bbox", "loss_mask"))


class Detection(Task):
    """Images -> boxes, labels and masks (see ``anorm.detection.detectors.Detector``).

    Metrics are COCO's twelve numbers for boxes and for masks, in percent (-1 where there is nothing to find).

    Args:
        head_norm: of pyramid, box head and mask head, as in ``create_detector``.
        geometry: "modern", "legacy" or "torchvision": what a box is.
        box_head: "4conv1fc" or "2fc"; None: the detector's own.
        anchor_scale: an anchor's side in strides; 8 for COCO.
        proposals: how many of a level are kept before NMS, and of an image after it, in training (2000 in the papers).
        rois: RoIs of an image that the heads train on (512 in the papers).
        detections: most detections of an image.
        width, hidden: channels of pyramid and heads, and of their linear layers (256 and 1024 in the papers).
        evaluator: hotcoco, faster_coco_eval or pycocotools; None: the first that is installed.
    """

    metrics = {
        f"{kind}_{number}": Metric(f"{kind} {word}", unit="%")
        for kind in KINDS
        for number, word in WORDS.items()
    }
    shown = ("box_ap", "mask_ap")
    best = "box_ap"
    losses: ClassVar[tuple[str, ...]] = (
        "loss_rpn_cls",
        "loss_rpn_bbox",
        "loss_cls",
        "loss_bbox",
        "loss_mask",
    )
    takes = Scenes
    family: ClassVar[str]

    def __init__(
        self,
        classes: list[str],
        channels: int = 3,
        mix: Any = None,
        head_norm: str | dict | None = None,
        geometry: str = "modern",
        box_head: str | None = None,
        anchor_scale: float = 8.0,
        proposals: int = 2000,
        rois: int = 512,
        detections: int = 100,
        width: int = 256,
        hidden: int = 1024,
        evaluator: str | None = None,
    ) -> None:
        super().__init__(classes, channels)
        if channels != 3:
            raise ValueError(f"task={self.family} takes images of 3 channels, not {channels}")
        for key in ("mixup", "cutmix", "label_smoothing"):
            if mix is not None and getattr(mix, key):
                raise ValueError(
                    f"mix.{key}={getattr(mix, key)}: task={self.family} mixes no images; set it to 0"
                )
        self.geometry = geometry_of(geometry)
        # a missing package is found out now and not after an epoch
        self.evaluator = coco_eval.backend(evaluator)
        self.options = {
            "head_norm": head_norm,
            "num_classes": len(classes),
            "geometry": geometry,
            "box_head": box_head,
            "anchor_scale": anchor_scale,
            "rpn_pre_nms_top_n_train": proposals,
            "rpn_post_nms_top_n_train": proposals,
            "box_batch_size_per_image": rois,
            "box_detections_per_img": detections,
            "width": width,
            "hidden": hidden,
        }

    def create(self, arch: str, norm: Any, **arch_options) -> nn.Module:
        return create_detector(self.family, arch, norm, arch_options=arch_options, **self.options)

    def example(self, n: int, source: Source) -> Batch:
        """Images of the data's size with four objects each."""
        scenes, draws = [], torch.Generator().manual_seed(0)
        size = source.train.resize.size(*source.train.shapes[0].tolist())
        for _ in range(n):
            image = torch.randint(256, (3, *size), generator=draws, dtype=torch.uint8)
            corner = torch.rand(4, 2, generator=draws, dtype=torch.float64) / 2
            xywh = torch.cat((corner, torch.full_like(corner, 0.4)), 1)
            xywh = xywh * torch.tensor((size[1], size[0], size[1], size[0]))
            masks = torch.zeros(4, *size, dtype=torch.uint8)
            for mask, (x, y, w, h) in zip(masks, xywh.long().tolist(), strict=True):
                mask[y : y + h, x : x + w] = 1
            semantic = torch.zeros(size, dtype=torch.uint8)
            labels = torch.arange(4) % len(self.classes) + 1
            scenes.append(Scene(image, xywh, labels, masks, semantic, size, 1.0, False))
        return Batch([scene.image for scene in scenes], scenes, torch.arange(n))

    def prepare(self, batch: Batch, rng: torch.Generator) -> tuple[tuple, None]:
        """The samplers draw from a seed for each image, so from the micro-batch's number alone."""
        seeds = torch.randint(2**62, (len(batch.targets),), generator=rng).tolist()
        return (batch.inputs, [self._target(scene) for scene in batch.targets], None, seeds), None

    def _target(self, scene: Scene) -> dict[str, Tensor]:
        size = tuple(scene.image.shape[1:])
        boxes = self.geometry.ground_truth(scene.xywh, scene.original, size, scene.scale, scene.flipped)
        kept = (self.geometry.sizes(boxes) > 0).all(1)  # cutting to the image may leave nothing
        target = {"boxes": boxes[kept].float(), "labels": scene.labels[kept], "masks": scene.masks[kept]}
        return target if scene.semantic is None else target | {"semantic": scene.semantic}

    def loss(self, outputs: dict[str, Tensor], target: None) -> dict[str, Tensor]:
        """Each is a mean over the anchors, RoIs or pixels of the micro-batch, in each process by itself."""
        return outputs

    def inputs(self, batch: Batch) -> tuple:
        return batch.inputs, None, [self._original(scene) for scene in batch.targets]

    def _original(self, scene: Scene) -> Original:
        (height, width), (new_height, new_width) = scene.original, scene.image.shape[1:]
        scale = scene.scale if self.geometry.one_scale else (new_width / width, new_height / height)
        return Original(height, width, scale)

    def inputs_of(self, image: Tensor, card: dict) -> tuple:
        """Return the detector's inputs for an image, uint8 (3,H,W), read as the run's card (``card``) says."""
        resize = Resize(card["short_side"], card["long_side"], card["resize"])
        original = tuple(image.shape[1:])
        scene = Scene(
            resize(image),
            torch.empty(0, 4),
            torch.empty(0),
            None,
            None,
            original,
            resize.scale(*original),
            False,
        )
        return self.inputs(Batch([scene.image], [scene], torch.arange(1)))

    def judge(self, images: Dataset) -> Judge:
        return _Judge(self, images)

    def metrics_of(self, sums: Tensor, rows: Rows) -> dict[str, float]:
        found = {}
        for kind in KINDS:
            scores = self.scores(rows, kind)
            found |= {f"{kind}_{n}": 100 * v if v >= 0 else -1.0 for n, v in scores.numbers.items()}
        return found

    def scores(self, rows: Rows, kind: str) -> coco_eval.Scores:
        """COCO's numbers of the gathered rows for "box" or "mask"."""
        ids = sorted({number for of_image in rows["categories"] for number in of_image})
        annotations = [annotation for of_image in rows["annotations"] for annotation in of_image]
        truth = {
            "images": rows["image"],
            "annotations": [{"id": i, "iscrowd": 0} | a | {"id": i} for i, a in enumerate(annotations, 1)],
            "categories": [
                {"id": number, "name": name} for number, name in zip(ids, self.classes, strict=True)
            ],
        }
        detections = [found for of_image in rows["detections"] for found in of_image]
        keep = "bbox" if kind == "box" else "segmentation"
        drop = "segmentation" if kind == "box" else "bbox"
        assert all(keep in found for found in detections)
        only = [{key: value for key, value in found.items() if key != drop} for found in detections]
        return coco_eval.evaluate(truth, only, KINDS[kind], self.evaluator)

    def predictions(self, rows: Rows, identity: str) -> dict[str, bytes]:
        """COCO's results, as its server and other programs take them."""
        found = [detection for of_image in rows["detections"] for detection in of_image]
        return {".json": json.dumps(found, separators=(",", ":")).encode()}

    def card(self, source: Source) -> dict:
        resize = source.val.resize
        return {
            "classes": source.classes,
            "images": source.val.identity,
            "mean": source.mean,
            "std": source.std,
            "image_size": source.val.image_size,
            "resize": resize.kind,
            "short_side": resize.short_side,
            "long_side": resize.long_side,
            "geometry": self.geometry.name,
            "categories": source.val.categories,
        }


class MaskRCNN(Detection):
    """Mask R-CNN (He et al., ICCV 2017) on a feature pyramid."""

    family = "mask_rcnn"


class CascadeMaskRCNN(Detection):
    """Cascade Mask R-CNN (Cai and Vasconcelos, CVPR 2018): three stages of rising IoU."""

    family = "cascade_mask_rcnn"
    losses = ("loss_rpn_cls", "loss_rpn_bbox", *STAGED)


class HybridTaskCascade(CascadeMaskRCNN):
    """Hybrid Task Cascade (Chen et al., CVPR 2019): interleaved stages and a semantic branch.

    semantic_classes: of that branch (COCO-stuff has 183 with the background); 0 leaves it out.
    """

    family = "htc"
    losses = ("loss_rpn_cls", "loss_rpn_bbox", "loss_semantic_seg", *STAGED)

    def __init__(
        self,
        classes: list[str],
        channels: int = 3,
        mix: Any = None,
        head_norm: str | dict | None = None,
        geometry: str = "modern",
        box_head: str | None = None,
        anchor_scale: float = 8.0,
        proposals: int = 2000,
        rois: int = 512,
        detections: int = 100,
        width: int = 256,
        hidden: int = 1024,
        evaluator: str | None = None,
        semantic_classes: int = 183,
    ) -> None:
        super().__init__(
            classes,
            channels,
            mix,
            head_norm,
            geometry,
            box_head,
            anchor_scale,
            proposals,
            rois,
            detections,
            width,
            hidden,
            evaluator,
        )
        self.options["semantic_classes"] = semantic_classes
        if not semantic_classes:
            self.losses = tuple(name for name in self.losses if name != "loss_semantic_seg")


TASKS = {task.family: task for task in (MaskRCNN, CascadeMaskRCNN, HybridTaskCascade)}


class _Judge(Judge):
    """A row an image: COCO's entry of it, its annotations, the ids of the categories, and its detections.

    The truth travels with the rows, so that images passed over count on neither side. Masks are written as run lengths
    at once, for which the device is waited for: kept as they are, a thousand images would fill the memory.
    """

    def __init__(self, task: Detection, images: Dataset) -> None:
        self.task, self.images = task, images
        self.rows: Rows = {"image": [], "annotations": [], "categories": [], "detections": []}

    def add(self, outputs: list[dict[str, Tensor]], batch: Batch) -> None:
        for index, found in zip(batch.indices.tolist(), outputs, strict=False):
            image, annotations = self.images.truth(index)
            boxes = self.task.geometry.to_xywh(found["boxes"])
            masks = coco_eval.encode_masks(found["masks"])
            row = {
                "image": image,
                "annotations": annotations,
                "categories": self.images.categories,
                "detections": coco_eval.results(
                    image["id"], self.images.categories, boxes, found["labels"], found["scores"], masks
                ),
            }
            for name, value in row.items():
                self.rows[name].append(value)

    def done(self) -> tuple[Tensor, Rows]:
        return torch.zeros(1, dtype=torch.float64), self.rows
