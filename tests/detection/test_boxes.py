"""Every definition of a detector's boxes and masks against reference arrays, in both geometries (float64)."""

import numpy as np
import pytest
import torch
from recipe_weights import arrays, unpack
from torch.nn import functional as F

from anorm.detection import boxes, masks, ops
from anorm.detection.boxes import Thresholds
from anorm.detection.fpn_rpn import smooth_l1
from anorm.detection.geometry import GEOMETRIES, MODERN, TORCHVISION, geometry

BOTH = pytest.mark.parametrize("name", ["legacy", "modern"])
STDS = ((1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
RATIOS = (0.5, 1.0, 2.0)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a.double(), torch.as_tensor(b).double(), rtol=0, atol=atol)


@BOTH
@pytest.mark.parametrize("size", [(128, 160), (100, 75)])
def test_anchors(name, size):
    stored = arrays("anchors")
    for level, stride in enumerate((4, 8, 16, 32, 64)):
        key = f"{name}.{size[0]}x{size[1]}.level{level}"
        base = GEOMETRIES[name].base_anchors(stride, 8.0, RATIOS)
        close(base, stored[f"{name}.base.level{level}"])
        cells = tuple(-(-side // stride) for side in size)
        made = boxes.anchors(base, stride, cells)
        close(made[:12], stored[f"{key}.first12"])
        close(made[-3:], stored[f"{key}.last3"])
        close(made.sum(0), stored[f"{key}.sum"], 1e-6)
        inside = (made[:, :2] >= 0).all(1) & (made[:, 2] < size[1]) & (made[:, 3] < size[0])
        assert int(inside.sum()) == int(stored[f"{key}.inside_count"])


def test_torchvision_rounds_its_base_anchors():
    close(TORCHVISION.base_anchors(4, 8.0, RATIOS), arrays("anchors")["torchvision_rounds.base.level0"])


@BOTH
def test_deltas(name):
    g, stored = GEOMETRIES[name], arrays("delta_coder")
    size = tuple(stored["img_hw"].tolist())
    for i, stds in enumerate(STDS):
        key = f"{name}.stds{i}"
        close(g.encode(stored["boxes"], stored["targets"], stds), stored[f"{key}.encoded"])
        made = g.decode(stored["boxes"], stored["deltas"], stds)
        close(made, stored[f"{key}.decoded_unclipped"])
        close(g.clip(made, size), stored[f"{key}.decoded_clipped"])
        classes = stored["deltas_6classes"].view(12, 6, 4)
        made = g.clip(g.decode(stored["boxes"][:12, None].expand_as(classes), classes, stds), size)
        close(made.flatten(1), stored[f"{key}.decoded_6classes"])


@BOTH
def test_decode_undoes_encode(name):
    g, stored = GEOMETRIES[name], arrays("delta_coder")
    deltas = g.encode(stored["boxes"], stored["targets"], STDS[1])
    close(g.decode(stored["boxes"], deltas, STDS[1]), stored["targets"])


@BOTH
def test_iou(name):
    g, stored = GEOMETRIES[name], arrays("iou")
    close(g.iou(stored["a"], stored["b"]), stored[f"{name}.iou"], 1e-12)
    close(g.iou(stored["a"], stored["b"], over_a=True), stored[f"{name}.iof"], 1e-12)


@BOTH
@pytest.mark.parametrize("kind", ["rpn", "rcnn50", "rcnn60", "rcnn70"])
@pytest.mark.parametrize("weak", [True, False])
def test_assignment(name, kind, weak):
    stored = arrays("assignment")
    iou = {"rpn": 0.7, "rcnn50": 0.5, "rcnn60": 0.6, "rcnn70": 0.7}[kind]
    least = 0.3 if kind == "rpn" else iou
    at = Thresholds(iou, least, least if weak else None)
    made = boxes.assign(GEOMETRIES[name], stored["boxes"], stored["gt"], at)
    # stored: 1-based index, 0 for a negative, -1 for neither
    assert torch.equal(made.truth + 1, stored[f"{name}.{kind}.low{int(weak)}.ignore_iof-1.gt_inds"].long())
    close(made.iou, stored[f"{name}.{kind}.max_overlaps"], 1e-12)


@BOTH
def test_without_ground_truth_everything_is_negative(name):
    stored = arrays("assignment")
    made = boxes.assign(GEOMETRIES[name], stored["boxes"], stored["gt"][:0], Thresholds(0.5, 0.5, 0.5))
    assert torch.equal(made.truth + 1, stored[f"{name}.no_gt"])


@BOTH
def test_nms(name):
    stored = arrays("nms")
    for threshold in (0.3, 0.5, 0.7):
        kept = GEOMETRIES[name].nms(stored["boxes"], stored["scores"], threshold)
        by_score = kept[stored["scores"][kept].sort(descending=True, stable=True).indices]
        assert torch.equal(by_score, stored[f"{name}.nms{threshold}.keep_score_order"])
    kept = GEOMETRIES[name].nms(stored["edge_boxes"], stored["edge_scores"], 0.5)
    assert torch.equal(kept.sort().values, stored[f"{name}.edge_nms0.5.keep"].sort().values)


@BOTH
@pytest.mark.parametrize("agnostic", [0, 1])
@pytest.mark.parametrize("most", [15, 100])
def test_detections_of_an_image(name, agnostic, most):
    stored = arrays("postprocess")
    scores = stored["scores_bg_first"]
    label, roi = (scores[:, 1:].t() > 0.05).nonzero().unbind(1)
    per_class = stored["boxes_6slots"].view(60, 6, 4)
    box = stored["boxes_agnostic"][roi] if agnostic else per_class[roi, label + 1]
    score = scores[roi, label + 1]
    keep = boxes.best_by_class(GEOMETRIES[name], box, score, label, 0.5, most)
    key = f"{name}.agnostic{agnostic}.max{most}"
    close(torch.cat((box[keep], score[keep, None]), 1), stored[f"{key}.det"], 1e-12)
    assert torch.equal(label[keep], stored[f"{key}.labels"])


@pytest.mark.parametrize("align", [ops.roi_align, ops.roi_align_plain])
@pytest.mark.parametrize("size", [7, 14])
def test_roi_align(align, size, monkeypatch):
    monkeypatch.setattr(ops, "roi_align", align)
    stored = arrays("roi_align")
    variants = {"modern": "aligned_true", "torchvision": "aligned_false", "legacy": "legacy"}
    for name, key in variants.items():
        features = stored["feat"].clone().requires_grad_()
        made = GEOMETRIES[name].roi_align(features, stored["rois"], size, float(stored["scale"]))
        close(made, stored[f"{key}.out{size}"], 1e-10)
        made.backward(stored[f"upstream{size}"])
        close(features.grad, stored[f"{key}.grad{size}"], 1e-10)


def test_legacy_roi_align_is_not_a_box_grown_by_one():
    """A tempting emulation differs for RoIs below one cell; the stored result of it is what we must not give."""
    stored = arrays("roi_align")
    made = GEOMETRIES["legacy"].roi_align(stored["feat"], stored["rois"], 7, float(stored["scale"]))
    assert (made - stored["plus_one_then_aligned_false.out7"]).abs().max() > 0.5


@BOTH
def test_levels(name):
    stored = arrays("roi_align")
    assert torch.equal(GEOMETRIES[name].levels(stored["level.rois"][:, 1:], 4), stored[f"level.{name}"])


@BOTH
@pytest.mark.parametrize("align", [ops.roi_align, ops.roi_align_plain])
def test_mask_targets(name, align, monkeypatch):
    monkeypatch.setattr(ops, "roi_align", align)
    stored = arrays("mask_targets")
    bitmaps = unpack(stored["masks"], int(stored["mask_shape"][1]))
    made = GEOMETRIES[name].targets(bitmaps, stored["mask_index"], stored["boxes"], 28)
    assert torch.equal(made.to(torch.uint8), stored[f"{name}.targets"])


@BOTH
def test_pasting(name):
    stored = arrays("mask_paste")
    size = tuple(stored["img_hw"].tolist())
    made = GEOMETRIES[name].paste(stored["probs"].double(), stored["boxes"], size)
    assert torch.equal(made.to(torch.uint8), unpack(stored[f"{name}.masks"], size[1]))


def test_losses_and_their_gradients():
    stored = arrays("losses")
    for kind in ("rpn_box", "rcnn_box"):
        weight, target = stored[f"{kind}_weight"], stored[f"{kind}_target"]
        x = stored[f"{kind}_pred"].clone().requires_grad_()
        used = weight[:, 0] > 0
        total = smooth_l1(x[used], target[used], float(stored[f"{kind}_beta"]))
        loss = total / float(stored["rpn_avg_factor"])
        close(loss, stored[f"{kind}_loss"], 1e-12)
        loss.backward()
        close(x.grad, stored[f"{kind}_grad"], 1e-12)
    used = stored["rpn_weights"] > 0
    x = stored["rpn_logits"].clone().requires_grad_()
    total = F.binary_cross_entropy_with_logits(
        x[used, 0], stored["rpn_labels"][used].double(), reduction="sum"
    )
    loss = total / float(stored["rpn_avg_factor"])
    close(loss, stored["rpn_loss"], 1e-12)
    loss.backward()
    close(x.grad, stored["rpn_grad"], 1e-12)
    x = stored["mask_logits"].double().requires_grad_()
    own = x[torch.arange(4), stored["mask_labels"]]
    loss = F.binary_cross_entropy_with_logits(own, stored["mask_target"].double())
    close(loss, stored["mask_loss"], 1e-6)


def test_plain_nms_is_the_compiled_one():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * 100
    made = torch.cat((corner, corner + 5 + 30 * torch.rand(300, 2, generator=generator)), 1)
    scores = (torch.rand(300, generator=generator) * 20).round() / 20  # many ties
    for threshold in (0.2, 0.5, 0.9):
        assert torch.equal(ops.nms(made, scores, threshold), ops.nms_plain(made, scores, threshold))
    assert ops.nms_plain(made[:0], scores[:0], 0.5).tolist() == []


@pytest.mark.parametrize("sampling", [0, 1, 3])
@pytest.mark.parametrize("aligned", [True, False])
def test_plain_roi_align_is_the_compiled_one(sampling, aligned):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 4, 9, 13, generator=generator, dtype=torch.float64, requires_grad=True)
    corner = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 80 - 10
    extent = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 60 - 2
    rois = torch.cat((torch.arange(40)[:, None] % 2, corner, corner + extent), 1)
    upstream = torch.randn(40, 4, 5, 5, generator=generator, dtype=torch.float64)
    results = []
    for align in (ops.roi_align, ops.roi_align_plain):
        made = align(features, rois, 5, 0.125, sampling, aligned)
        results.append((made, *torch.autograd.grad(made, features, upstream)))
    for compiled, plain in zip(*results, strict=True):
        close(plain, compiled, 1e-12)


def test_without_torchvision_a_warning_names_the_reason(monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    ops.compiled.cache_clear()
    try:
        assert not ops.compiled()
        assert "torchvision is not usable" in caplog.text
        assert ops.nms(
            torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.5, 0.6]), 0.5
        ).tolist() == [1]
    finally:
        ops.compiled.cache_clear()


def test_samples_are_ascending_limited_and_drawn_from_the_given_stream():
    truth = torch.tensor([0, -1, -2, 3, -1, -1, 1, -1, 2, -2])
    positive, negative = boxes.sample(truth, 6, 0.5, torch.Generator().manual_seed(3))
    again = boxes.sample(truth, 6, 0.5, torch.Generator().manual_seed(3))
    assert [p.tolist() for p in again] == [positive.tolist(), negative.tolist()]
    assert len(positive) == len(negative) == 3
    assert (truth[positive] >= 0).all() and (truth[negative] == -1).all()
    assert positive.tolist() == sorted(positive.tolist())
    # too few positives: negatives fill up
    positive, negative = boxes.sample(truth, 8, 1.0, torch.Generator())
    assert (len(positive), len(negative)) == (4, 4)


def test_draws_cover_all_candidates_alike():
    truth = torch.zeros(10, dtype=torch.long)
    counts = np.zeros(10)
    for seed in range(2000):
        counts[boxes.sample(truth, 6, 0.5, torch.Generator().manual_seed(seed))[0].numpy()] += 1
    # each index is drawn with probability 0.3: five binomial deviations around 600
    assert abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_an_unknown_geometry_names_the_known():
    with pytest.raises(ValueError, match="modern, legacy, torchvision"):
        geometry("ancient")


def test_flip_and_coco_boxes():
    xywh = torch.tensor([[2.0, 3.0, 10.0, 4.0]])
    for g in GEOMETRIES.values():
        made = g.from_xywh(xywh)
        assert torch.equal(g.to_xywh(made), xywh)
        flipped = g.to_xywh(g.flip(made, 40))
        assert flipped.tolist() == [[28.0, 3.0, 10.0, 4.0]]


def test_soft_targets_keep_fractions():
    bitmap = torch.zeros(1, 8, 8)
    bitmap[:, :, 3:] = 1
    made = masks.soft_targets(bitmap, torch.tensor([0]), torch.tensor([[0.0, 0, 8, 8]]), 4)
    assert ((made > 0) & (made < 1)).any()
    hard = MODERN.targets(bitmap, torch.tensor([0]), torch.tensor([[0.0, 0, 8, 8]]), 4)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
