"""Classification: cross-entropy on mixed images and labels; accuracy, loss and calibration."""

from __future__ import annotations

import io
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.data.sources.base import Batch, Dataset, LabelledImages, Source
from anorm.registry import create_model
from anorm.tasks.base import Judge, Metric, Rows, Task
from anorm.tasks.mixing import Mixing, Target

BINS = 15
"""Of the expected calibration error, equal in width."""


class Classification(Task):
    """Images (n,C,H,W) -> logits (n,K); mixup, CutMix and label smoothing between the loader and the loss.

    mean_class_accuracy is the mean over the classes that have images of the share of each that is right (macro average).
    ece is the expected calibration error (Guo et al. 2017, section 2): with bins of the first class's probability,
    sum over bins of |images in it| / N * |accuracy in it - mean probability in it|, in percent.
    """

    metrics = {
        "top1": Metric("top-1", as_error=True, per_image="top1"),
        "top5": Metric("top-5", as_error=True, per_image="top5"),
        "loss": Metric("loss", unit="", higher_is_better=False, digits=4),
        "mean_class_accuracy": Metric("mean class accuracy"),
        "ece": Metric("calibration error", higher_is_better=False),
    }
    shown = ("top1", "top5")
    best = "top1"
    losses = ("cross_entropy",)
    takes = LabelledImages

    def __init__(self, classes: list[str], channels: int = 3, mix: Any = None):
        super().__init__(classes, channels)
        mixing = (mix.mixup, mix.cutmix, mix.label_smoothing) if mix else ()
        self.mixing = Mixing(*mixing, num_classes=len(classes))

    def create(self, arch: str, norm: Any, **arch_options) -> nn.Module:
        return create_model(arch, norm, len(self.classes), self.channels, **arch_options)

    def example(self, n: int, source: Source) -> Batch:
        size, draws = source.image_size, torch.Generator().manual_seed(0)
        images = torch.randn(n, self.channels, size, size, generator=draws)
        return Batch(images, torch.arange(n) % len(self.classes), torch.arange(n))

    def prepare(self, batch: Batch, rng: torch.Generator) -> tuple[tuple, Target]:
        images, target = self.mixing.mix(batch.inputs, batch.targets, rng)
        return (images,), target

    def loss(self, outputs: Tensor, target: Target) -> dict[str, Tensor]:
        return {"cross_entropy": self.mixing.loss(outputs, target)}

    def inputs(self, batch: Batch) -> tuple:
        return (batch.inputs,)

    def judge(self, images: Dataset) -> Judge:
        return _Judge()

    def metrics_of(self, sums: Tensor, rows: Rows) -> dict[str, float]:
        images = len(rows["label"])
        first, among_five, loss = sums.tolist()
        return {
            "top1": 100 * first / images,
            "top5": 100 * among_five / images,
            "loss": loss / images,
            "mean_class_accuracy": 100 * mean_class_accuracy(rows["label"], rows["top1"]),
            "ece": 100 * calibration_error(rows["confidence"], rows["top1"]),
        }

    def predictions(self, rows: Rows, identity: str) -> dict[str, bytes]:
        """Return predictions.npz: for every image index, label, predicted (classes), top1, top5 (whether the label was
        first, or among five), confidence (of the predicted class). data: the identity of the images, so that results of
        other images are not compared with these.
        """
        content = io.BytesIO()
        numpy.savez_compressed(content, data=numpy.array(identity), **rows)
        return {".npz": content.getvalue()}

    def card(self, source: Source) -> dict:
        crop = getattr(source.val, "crop", None)
        return {
            "classes": source.classes,
            "images": source.val.identity,
            "mean": source.mean,
            "std": source.std,
            "image_size": source.image_size,
            "eval_resize": crop.short_side if crop else source.image_size,
            "interpolation": crop.interpolation if crop else "bilinear",
        }


TASKS = {"classification": Classification}


class _Judge(Judge):
    """Sums: first, among five, loss. A row: the label, the class that was first, whether the label was first, or among
    five (of at most as many classes as there are), and the probability of the class that was first.
    """

    COLUMNS = {
        "label": torch.int64,
        "predicted": torch.int64,
        "top1": torch.bool,
        "top5": torch.bool,
        "confidence": torch.float32,
    }

    def __init__(self):
        self.sums: Tensor | None = None
        self.rows: list[tuple[Tensor, ...]] = []

    def add(self, outputs: Tensor, batch: Batch) -> None:
        count = len(batch.indices)
        logits, labels = outputs[:count], batch.targets[:count]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1])).indices
        right = ranked == labels[:, None]
        first, among_five = right[:, 0], right.any(1)
        sums = torch.stack((first.sum(), among_five.sum(), losses.double().sum()))
        self.sums = sums if self.sums is None else self.sums + sums
        self.rows.append((labels, ranked[:, 0], first, among_five, logits.softmax(1).amax(1)))

    def done(self) -> tuple[Tensor, Rows]:
        if self.sums is None:  # a process that was given no image
            empty = {name: torch.empty(0, dtype=kind).numpy() for name, kind in self.COLUMNS.items()}
            return torch.zeros(3, dtype=torch.float64), empty
        columns = (torch.cat(column).cpu().numpy() for column in zip(*self.rows, strict=True))
        return self.sums.cpu(), dict(zip(self.COLUMNS, columns, strict=True))


def mean_class_accuracy(label: numpy.ndarray, right: numpy.ndarray) -> float:
    """Return the mean over the classes in ``label`` of the share of each that is right, in [0, 1]."""
    _, of_class, images = numpy.unique(label, return_inverse=True, return_counts=True)
    return float(numpy.mean(numpy.bincount(of_class, weights=right) / images))


def calibration_error(confidence: numpy.ndarray, right: numpy.ndarray, bins: int = BINS) -> float:
    """Return sum_b |sum of (right - confidence) over bin b| / N, in [0, 1]; bin b is ((b - 1) / bins, b / bins]."""
    # in float64: 7/15 in float32 may lie on either side of the edge
    confidence = confidence.astype(numpy.float64)
    of_bin = numpy.clip(numpy.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = numpy.bincount(of_bin, weights=right - confidence, minlength=bins)
    return float(numpy.abs(gaps).sum() / len(confidence))
