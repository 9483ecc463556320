"""COCO's numbers: pycocotools' own, equal in every package, right where the answer is known."""

import copy

import numpy as np
import pytest
import torch
from recipe_weights import described

from anorm.detection import coco_eval
from anorm.detection.coco_eval import BACKENDS, NUMBERS, evaluate

KINDS = {"bbox": "detections_bbox", "segm": "detections_segm"}


@pytest.fixture(scope="module")
def stored():
    return described("coco_eval")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_twelve_numbers_and_the_classes(name, kind, stored):
    pytest.importorskip(name)
    scores = evaluate(stored["ground_truth"], stored[KINDS[kind]], kind, name)
    wanted = stored["expected"][kind]
    np.testing.assert_allclose([scores.numbers[n] for n in NUMBERS], wanted["stats12"], rtol=0, atol=1e-12)
    per_class = wanted["per_class_ap"]
    per_class = per_class.values() if isinstance(per_class, dict) else per_class
    for made, value in zip(scores.by_class.values(), per_class, strict=True):
        assert made == (None if value is None else pytest.approx(value, abs=1e-12))


@pytest.mark.parametrize("kind", KINDS)
def test_ground_truth_as_detections_is_perfect(kind, stored):
    truth = copy.deepcopy(stored["ground_truth"])
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    mask = pytest.importorskip("pycocotools.mask")
    found = []
    for annotation in truth["annotations"]:
        if annotation.get("iscrowd"):
            continue
        rle = annotation["segmentation"]
        if isinstance(rle, list):
            rle = mask.merge(mask.frPyObjects(rle, *sizes[annotation["image_id"]]))
        elif isinstance(rle["counts"], list):
            rle = mask.frPyObjects(rle, *rle["size"])
        if not mask.area(rle):  # a polygon between pixels: nothing can match it
            annotation["ignore"] = annotation["iscrowd"] = 1
            continue
        shared = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        found.append(shared | {"segmentation": rle, "score": 1.0})
    scores = evaluate(truth, found, kind)
    assert scores.numbers["ap"] == scores.numbers["ap50"] == 1.0
    assert set(scores.by_class.values()) <= {1.0, None}
    np.testing.assert_array_equal(scores.precision, np.ones(101))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_detections_score_nothing(name, kind, stored):
    pytest.importorskip(name)
    scores = evaluate(stored["ground_truth"], [], kind, name)
    assert {scores.numbers[n] for n in ("ap", "ap50", "ar100")} == {0.0}


def test_what_is_given_stays_as_it_is(stored):
    truth, found = copy.deepcopy(stored["ground_truth"]), copy.deepcopy(stored["detections_bbox"])
    evaluate(truth, found, "bbox")
    assert truth == stored["ground_truth"] and found == stored["detections_bbox"]


def test_masks_come_back_from_run_lengths():
    masks = torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(0)) > 0.6
    masks[1] = False
    coded = coco_eval.encode_masks(masks)
    assert all(torch.equal(coco_eval.decode_mask(rle), mask) for rle, mask in zip(coded, masks, strict=True))
    assert coded[0]["size"] == [17, 23] and isinstance(coded[0]["counts"], str)  # JSON takes it
    plain = {"size": [2, 2], "counts": [1, 2, 1]}
    assert coco_eval.decode_mask(plain).tolist() == [[False, True], [True, False]]


def test_a_missing_package_is_named(monkeypatch):
    import sys

    for package, _, _ in BACKENDS.values():
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install anorm\[det\]"):
        coco_eval.backend()
    with pytest.raises(ValueError, match="hotcoco, faster_coco_eval, pycocotools"):
        coco_eval.backend("cocoapi")
