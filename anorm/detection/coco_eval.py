"""COCO's average precision and recall, and its files of results.

pycocotools is the definition. hotcoco and faster-coco-eval compute the same numbers faster, and are taken where they can
be imported (``BACKENDS`` in this order; a test holds them equal).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

__all__ = ["BACKENDS", "NUMBERS", "Scores", "backend", "decode_mask", "encode_masks", "evaluate", "results"]

BACKENDS = {
    "hotcoco": ("hotcoco", "COCO", "COCOeval"),
    "faster_coco_eval": ("faster_coco_eval", "COCO", "COCOeval_faster"),
    "pycocotools": ("pycocotools", "coco.COCO", "cocoeval.COCOeval"),
}
NUMBERS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
NUMBERS += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
"""The twelve, in pycocotools' order: precision over IoU 0.5 to 0.95, at 0.5, at 0.75, by area; recall with at most 1,
10, 100 detections an image, and by area with 100."""


class Scores(NamedTuple):
    """numbers: by the names in ``NUMBERS``, 0 to 1, -1 where there is nothing to find. by_class: AP of each category
    id, None without ground truth. precision: at IoU 0.5 over recall 0, 0.01, ... 1, mean over the classes (101,).
    """

    numbers: dict[str, float]
    by_class: dict[int, float | None]
    precision: numpy.ndarray


def backend(name: str | None = None) -> str:
    """The name of the package that evaluates: the one asked for, or the first that can be imported.

    Raises ModuleNotFoundError, with what to install, where there is none.
    """
    for candidate in [name] if name else BACKENDS:
        if candidate not in BACKENDS:
            raise ValueError(f"evaluator {candidate!r} is none of {', '.join(BACKENDS)}")
        with contextlib.suppress(ImportError):
            importlib.import_module(BACKENDS[candidate][0])
            return candidate
    missing = name or "pycocotools"
    raise ModuleNotFoundError(f"evaluation on COCO needs {missing}: pip install anorm[det]", name=missing)


def evaluate(truth: dict, detections: Sequence[dict], kind: str, name: str | None = None) -> Scores:
    """COCO's numbers of detections against ground truth.

    Args:
        truth: a COCO JSON: images, annotations (bbox, area, iscrowd, segmentation), categories.
        detections: COCO results: image_id, category_id, score, and bbox (x y w h) or segmentation (RLE).
        kind: "bbox" or "segm".
        name: which package computes them.
    """
    package, dataset, evaluator = BACKENDS[backend(name)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        COCO, evaluation = (_attribute(package, path) for path in (dataset, evaluator))
        # the packages write into what they are given
        annotated = _load(COCO, copy.deepcopy(truth))
        run = evaluation(
            annotated, annotated.loadRes(copy.deepcopy(_never_empty(truth, detections, kind))), kind
        )
        run.evaluate()
        run.accumulate()
        found = run.eval
    precision, recall = numpy.asarray(found["precision"]), numpy.asarray(found["recall"])
    shape = (10, 101, len(truth["categories"]), 4, 3)
    precision, recall = precision.reshape(shape), recall.reshape(10, *shape[2:])
    ids = sorted(category["id"] for category in truth["categories"])
    by_class = {}
    for k, category in enumerate(ids):
        value = _mean(precision[:, :, k, 0, 2])
        by_class[category] = None if value == -1 else value
    at_half = precision[0, :, :, 0, 2]
    at_half = at_half[:, (at_half > -1).all(0)]
    curve = at_half.mean(1) if at_half.size else numpy.full(101, -1.0)
    return Scores(_numbers(precision, recall), by_class, curve)


def _numbers(precision: numpy.ndarray, recall: numpy.ndarray) -> dict[str, float]:
    """The twelve from precision (IoU, recall, class, area, most) and recall (IoU, class, area, most)."""
    values = [_mean(precision[iou, :, :, 0, 2]) for iou in (slice(None), 0, 5)]
    values += [_mean(precision[:, :, :, area, 2]) for area in (1, 2, 3)]
    values += [_mean(recall[:, :, 0, most]) for most in (0, 1, 2)]
    values += [_mean(recall[:, :, area, 2]) for area in (1, 2, 3)]
    return dict(zip(NUMBERS, values, strict=True))


def _mean(values: numpy.ndarray) -> float:
    """The mean of what is defined; -1 where nothing is."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _never_empty(truth: dict, detections: Sequence[dict], kind: str) -> list[dict]:
    """The packages refuse an empty list; a false positive of score 0 gives the same zeros."""
    if detections or not truth["images"]:
        return list(detections)
    image = truth["images"][0]
    found = {"image_id": image["id"], "category_id": truth["categories"][0]["id"], "score": 0.0}
    if kind == "bbox":
        return [found | {"bbox": [0.0, 0.0, 0.0, 0.0]}]
    size = image["height"], image["width"]
    return [found | {"segmentation": encode_masks(torch.zeros(1, *size, dtype=torch.bool))[0]}]


def _load(COCO, truth: dict):
    if COCO.__module__.startswith("hotcoco"):
        return COCO(truth)
    annotated = COCO()
    annotated.dataset = truth
    annotated.createIndex()
    return annotated


def _attribute(package: str, path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"{package}.{module}" if module else package), name)


def results(
    image_id: int,
    categories: Sequence[int],
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor,
    masks: Sequence[dict],
) -> list[dict]:
    """An image's detections as COCO results, one dict each with both bbox and segmentation.

    categories: the id of label 1, 2, ...; boxes (n, 4) as x y w h; masks: RLE of ``encode_masks``.
    """
    return [
        {
            "image_id": image_id,
            "category_id": categories[label - 1],
            "bbox": [round(side, 4) for side in box],
            "score": score,
            "segmentation": mask,
        }
        for box, label, score, mask in zip(
            boxes.tolist(), labels.tolist(), scores.tolist(), masks, strict=True
        )
    ]


def encode_masks(masks: Tensor) -> list[dict]:
    """Masks (n, H, W) of bool -> COCO's compressed run lengths, ``counts`` as text."""
    coder = importlib.import_module("pycocotools.mask")
    columns = numpy.asfortranarray(masks.cpu().numpy().astype(numpy.uint8).transpose(1, 2, 0))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in coder.encode(columns)]


def decode_mask(rle: dict) -> Tensor:
    """COCO's run lengths, compressed or not -> mask (H, W) of bool."""
    coder = importlib.import_module("pycocotools.mask")
    if isinstance(rle["counts"], list):
        rle = coder.frPyObjects(rle, *rle["size"])
    with warnings.catch_warnings():
        # pycocotools 2.0.11 with numpy 2: its array type lacks an argument that numpy asks for
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.from_numpy(coder.decode(rle).astype(bool))
