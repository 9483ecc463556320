"""How a detector is called, what it refuses, whose weights it takes."""

import pytest
import torch

import anorm
from anorm.detection import ops

FAMILIES = ("mask_rcnn", "cascade_mask_rcnn", "htc")


def small(name="mask_rcnn", norm="gn", **options):
    torch.manual_seed(0)
    options = {
        "num_classes": 3,
        "semantic_classes": 4,
        "anchor_scale": 4.0,
        "box_score_thresh": 0.0,
    } | options
    # few RoIs: the heads are what costs time here
    options = {
        "box_batch_size_per_image": 12,
        "rpn_post_nms_top_n_train": 30,
        "rpn_post_nms_top_n_test": 12,
    } | options
    options["box_detections_per_img"] = 6
    return anorm.create_detector(name, "resnet18", norm=norm, **options)


def scene(objects=2, size=(52, 64), semantic=True):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(objects))
    masks = torch.zeros(objects, *size, dtype=torch.bool)
    boxes = torch.tensor([[10.0 + 5 * i, 12, 40 + 5 * i, 50] for i in range(objects)]).reshape(-1, 4)
    for mask in masks:
        mask[12:48, 10:45] = True
    target = {"boxes": boxes, "labels": torch.arange(objects) % 3 + 1, "masks": masks}
    return image, target | ({"semantic": torch.zeros(size, dtype=torch.uint8)} if semantic else {})


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_reach_every_parameter(name):
    detector = small(name)
    images, targets = zip(scene(2), scene(1, (60, 50)), strict=True)
    losses = detector(list(images), list(targets))
    wanted = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    if name != "mask_rcnn":
        wanted = {f"s{s}.{n}" for s in range(3) for n in wanted if "rpn" not in n} | {
            "loss_rpn_cls",
            "loss_rpn_bbox",
        }
    assert losses.keys() == wanted | ({"loss_semantic_seg"} if name == "htc" else set())
    assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    # DDP waits for every one of them
    assert [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("geometry", ["modern", "legacy", "torchvision"])
def test_images_without_objects(name, geometry):
    detector = small(name, geometry=geometry)
    images, targets = zip(scene(0), scene(0), strict=True)
    losses = detector(list(images), list(targets))
    assert all(loss.isfinite() for loss in losses.values())
    assert all(loss == 0 for n, loss in losses.items() if n.endswith(("loss_bbox", "loss_mask")))
    sum(losses.values()).backward()
    assert [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("head_norm", ["gn", "an_gn", "bn", "sn"])
def test_norms_in_heads_train_on_no_roi(head_norm):
    """Without positives a mask head sees an empty batch."""
    detector = small(head_norm=head_norm)
    losses = detector(*[list(part) for part in zip(scene(0), scene(0), strict=True)])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)


def test_detections():
    detector = small().eval()
    image, _ = scene()
    results = detector([image, image[:, :40]])
    assert [set(r) for r in results] == [{"boxes", "labels", "scores", "masks"}] * 2
    for result, size in zip(results, ((52, 64), (40, 64)), strict=True):
        count = len(result["scores"])
        assert 0 < count <= 6
        assert result["boxes"].shape == (count, 4) and result["labels"].shape == (count,)
        assert result["masks"].shape == (count, *size) and result["masks"].dtype == torch.bool
        assert (result["scores"].diff() <= 0).all()
        assert result["labels"].min() >= 1 and result["labels"].max() <= 3
        assert (result["boxes"][:, 2] <= size[1]).all() and (result["boxes"][:, 3] <= size[0]).all()


def test_bytes_are_the_same_images():
    detector = small().eval()
    image = (scene()[0] * 255).to(torch.uint8)
    one, other = detector([image])[0], detector([image.float() / 255])[0]
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_results_in_pixels_of_the_original():
    detector = small().eval()
    image, _ = scene()
    plain, halved = detector([image])[0], detector([image], originals=[(26, 32, 2.0)])[0]
    torch.testing.assert_close(halved["boxes"], plain["boxes"] / 2)
    assert halved["masks"].shape[1:] == (26, 32)


def test_no_proposal_at_all():
    detector = small(geometry="modern").eval()
    detector.rpn.test_proposals = detector.rpn.test_proposals._replace(most=0)
    result = detector([scene()[0]])[0]
    assert len(result["boxes"]) == 0 and result["masks"].shape == (0, 52, 64)


def test_draws_belong_to_the_image_not_to_the_batch():
    """Each process sees other neighbours: seeds make the losses of the parts those of the whole."""
    detector = small(rpn_batch_size_per_image=8, box_batch_size_per_image=8).eval()
    detector.train()
    images, targets = zip(scene(2, (64, 64)), scene(1, (64, 64)), strict=True)
    together = detector(list(images), list(targets), seeds=[5, 6])
    again = detector(list(images), list(targets), seeds=[5, 6])
    assert all(torch.equal(together[key], again[key]) for key in together)
    parts = [detector([i], [t], seeds=[s]) for i, t, s in zip(images, targets, (5, 6), strict=True)]
    # both images give 8 anchors and 8 RoIs, so the batch's mean is the mean of the two
    for key in ("loss_rpn_cls", "loss_cls", "loss_bbox"):
        torch.testing.assert_close(together[key], (parts[0][key] + parts[1][key]) / 2)
    other = detector(list(images), list(targets), seeds=[7, 8])
    assert not torch.equal(other["loss_rpn_cls"], together["loss_rpn_cls"])


def test_plain_operators_give_the_same_detector(monkeypatch):
    detector = small("cascade_mask_rcnn").double()
    image, target = scene()
    losses = detector([image], [target], seeds=[1])
    result = detector.eval()([image])[0]
    monkeypatch.setattr(ops, "compiled", lambda: False)
    plain = detector.eval()([image])[0]
    for key in result:
        torch.testing.assert_close(plain[key], result[key], rtol=1e-9, atol=1e-9)
    for key, loss in detector.train()([image], [target], seeds=[1]).items():
        torch.testing.assert_close(loss, losses[key], rtol=1e-9, atol=1e-9)


def test_autocast_computes_boxes_in_full_precision():
    detector = small()
    image, target = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector([image], [target])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, "labels must be from 1 to 3"),
        ({"labels": torch.tensor([1, 4])}, "labels must be from 1 to 3"),
        ({"masks": torch.zeros(2, 52, 63)}, r"must be \(n, 4\), \(n,\) and \(n, 52, 64\)"),
        ({"boxes": torch.tensor([[1.0, 1, 1, 5], [2, 2, 9, 9]])}, "no area"),
    ],
)
def test_bad_targets_are_named(change, message):
    image, target = scene()
    with pytest.raises(ValueError, match=message):
        small()([image], [target | change])


def test_bad_calls_are_named():
    detector = small()
    with pytest.raises(ValueError, match=r"detector\(images, targets\)"):
        detector([scene()[0]])
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        detector.eval()([torch.rand(1, 8, 8)])
    with pytest.raises(ValueError, match="semantic_classes=0"):
        small("htc")([scene()[0]], [scene(semantic=False)[1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mask_rcn"}, "did you mean mask_rcnn"),
        ({"geometry": "old"}, "modern, legacy"),
        ({"box_head": "5conv"}, "4conv1fc, 2fc"),
        ({"box_nms": 0.5}, "did you mean box_nms_thresh"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_names_are_answered_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        anorm.create_detector(**{"arch": "resnet18", "norm": "bn"} | arguments)


def test_a_backbone_of_timm():
    detector = anorm.create_detector("mask_rcnn", "timm:resnet18", norm="gn", num_classes=2)
    assert detector.backbone.channels == (64, 128, 256, 512)
    assert not any("fc" in n for n, _ in detector.backbone.named_parameters())
    losses = detector([scene()[0]], [scene()[1] | {"labels": torch.tensor([1, 2])}])
    sum(losses.values()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []


def test_the_summary_says_what_was_built():
    summary = small(norm="an", head_norm="an_gn").norm_summary
    assert "box: an_gn x4" in summary and "fpn: gn x8" in summary


@pytest.mark.parametrize(("version", "count"), [(1, 360), (2, 432)])
def test_torchvisions_detectors(version, count, tmp_path):
    """In geometry="torchvision" ours are torchvision's Mask R-CNNs; that object lists what they do otherwise.

    Their weights are drawn anew where the defaults would detect nothing.
    """
    detection = pytest.importorskip("torchvision.models.detection")
    build = detection.maskrcnn_resnet50_fpn if version == 1 else detection.maskrcnn_resnet50_fpn_v2
    torch.manual_seed(0)
    theirs = build(
        weights=None, weights_backbone=None, num_classes=21, min_size=96, max_size=999, box_score_thresh=0.02
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            std = {"cls_score.weight": 0.03, "bbox_pred.weight": 0.01}.get(".".join(name.split(".")[-2:]))
            std = 0.03 if name.startswith("rpn") and parameter.dim() == 4 else std
            if std:
                parameter.normal_(std=std)
    torch.save(theirs.state_dict(), tmp_path / "torchvision.pth")
    options = {"box_head": "2fc"} if version == 1 else {"head_norm": "bn", "rpn_convs": 2}
    ours = anorm.create_detector(
        norm="bn", num_classes=20, geometry="torchvision", box_score_thresh=0.02, **options
    )
    report = anorm.load_weights(ours.double(), tmp_path / "torchvision.pth")
    assert (report.loaded, report.style) == (count, "torchvision's names")
    image = torch.rand(3, 96, 130, dtype=torch.float64)
    with torch.no_grad():
        wanted, made = theirs([image])[0], ours.eval()([image])[0]
    assert len(made["boxes"]) > 3
    assert torch.equal(made["labels"], wanted["labels"])
    torch.testing.assert_close(made["boxes"], wanted["boxes"], rtol=0, atol=1e-6)
    torch.testing.assert_close(made["scores"], wanted["scores"], rtol=0, atol=1e-8)
    # a pixel at one half to the last digit may fall to either side
    clear = (wanted["masks"][:, 0] - 0.5).abs() > 1e-6
    assert torch.equal(made["masks"] & clear, (wanted["masks"][:, 0] > 0.5) & clear)


def test_a_classifiers_weights_fill_the_backbone(tmp_path):
    classifier = anorm.create_model("resnet18", norm="gn", num_classes=7)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    detector = small()
    report = anorm.load_weights(detector, tmp_path / "classifier.pth", strict=False)
    assert "backbone" in report.style and report.unexpected == ["fc.weight", "fc.bias"]
    assert torch.equal(detector.backbone.network.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)


def test_own_weights_come_back(tmp_path):
    one, other = small(head_norm="an_gn"), small(head_norm="an_gn")
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1.0)
    torch.save(one.state_dict(), tmp_path / "own.pth")
    assert anorm.load_weights(other, tmp_path / "own.pth").complete
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_heads_with_the_background_last_are_not_taken_for_ours(tmp_path):
    """MMDetection 2 and detectron2: the shapes of fc_cls fit, its rows mean other classes."""
    detector = small()
    state = {"neck.lateral_convs.0.conv.weight": detector.fpn.lateral[0].conv.weight.detach() + 1}
    state |= {"roi_head.bbox_head.fc_cls.weight": detector.roi.box_heads[0].cls.weight.detach()}
    torch.save(state, tmp_path / "other.pth")
    report = anorm.load_weights(detector, tmp_path / "other.pth", strict=False)
    assert report.loaded == 1 and report.unexpected == ["roi_head.bbox_head.fc_cls.weight"]
    state = {
        "backbone.bottom_up.res2.0.conv1.weight": detector.backbone.network.layer1[0].conv1.weight.detach()
    }
    state |= {"backbone.fpn_output5.bias": detector.fpn.output[3].conv.bias.detach()}
    state |= {"roi_heads.box_predictor.cls_score.weight": detector.roi.box_heads[0].cls.weight.detach()}
    torch.save(state, tmp_path / "other.pth")
    report = anorm.load_weights(detector, tmp_path / "other.pth", strict=False)
    assert report.loaded == 2 and report.unexpected == ["roi_heads.box_predictor.cls_score.weight"]


def test_training_starts_from_a_classifiers_file(tmp_path):
    """weights=FILE of the configuration: every tensor of the backbone finds its place, heads stay as they are."""
    classifier = anorm.create_model("mobilenetv2", norm="an", num_classes=7)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in classifier.state_dict().items()}}, tmp_path / "c.pth"
    )
    detector = anorm.create_detector("mask_rcnn", "mobilenetv2", norm="an", num_classes=3, width=16, hidden=8)
    head = detector.roi.box_heads[0].cls.weight.clone()
    report = anorm.load_weights(detector, tmp_path / "c.pth", head="replace")
    assert report.new_head and report.complete
    ours = detector.backbone.network.state_dict()
    assert report.loaded == len(ours) and torch.equal(
        ours["features.3.conv.1.0.weight"], classifier.features[3].conv[1][0].weight
    )
    assert torch.equal(detector.roi.box_heads[0].cls.weight, head)
    # another network's file is refused
    torch.save(
        anorm.create_model("mobilenetv2", norm="bn", num_classes=7, width_mult=0.5).state_dict(),
        tmp_path / "c.pth",
    )
    with pytest.raises(ValueError, match="does not fit"):
        anorm.load_weights(detector, tmp_path / "c.pth", head="replace")


def test_another_number_of_classes_leaves_the_last_layers_new(tmp_path):
    torch.save(small("htc", num_classes=5).state_dict(), tmp_path / "five.pth")
    detector = small("htc")
    report = anorm.load_weights(detector, tmp_path / "five.pth", head="replace")
    assert report.new_head and report.complete and report.loaded < len(detector.state_dict())
    with pytest.raises(ValueError, match="other shapes"):
        anorm.load_weights(detector, tmp_path / "five.pth")


def test_a_norm_that_cannot_train_on_one_roi_is_refused():
    """AN's attention over BN takes statistics over RoIs; a batch may hold one positive."""
    with pytest.raises(ValueError, match="mask head.*one positive RoI"):
        small(head_norm={"mask": {"name": "an", "place": "all"}})
    for norm in ("bn", "an_gn", "sn", "se"):
        small(head_norm={"mask": {"name": norm, "place": "all"}})


def test_norms_of_other_libraries_are_frozen_too():
    backbone = anorm.create_detector("mask_rcnn", "timm:resnet18", "timm:batchnorm2d", num_classes=2).backbone
    said = backbone.freeze("paper")
    assert "statistics of 20 norms" in said
    backbone.train()
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    backbone(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(b, before[n]) for n, b in backbone.named_buffers())
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if "bn" in n)
