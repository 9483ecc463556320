"""Whole detectors: reference models in both geometries, sizes, the calling convention, what users may get wrong."""

import re

import numpy as np
import pytest
import torch
from recipe_weights import arrays, described, fill, unpack

import anorm
from anorm.norms.base import Norm

PUBLISHED = {
    "mask_rcnn_r50_an_head_an_gn": ("mask_rcnn", "resnet50", "an", "an_gn"),
    "cascade_mask_rcnn_r50_bn": ("cascade_mask_rcnn", "resnet50", "bn", None),
    "htc_r50_bn": ("htc", "resnet50", "bn", None),
}


def authors_names(detector):
    """Our names -> the authors', from MMDetection 1's convention alone (not from the table that is tested)."""
    single = len(detector.roi.stages) == 1
    found = {}
    for name in detector.state_dict():
        new = re.sub(r"^backbone\.network\.", "backbone.", name)
        new = re.sub(r"^fpn\.lateral\.", "neck.lateral_convs.", new)
        new = re.sub(r"^fpn\.output\.", "neck.fpn_convs.", new)
        new = re.sub(r"^rpn\.convs\.0\.conv\.", "rpn_head.rpn_conv.", new)
        new = re.sub(r"^rpn\.(cls|reg)\.", r"rpn_head.rpn_\1.", new)
        number = "" if single else r"\1."
        new = re.sub(r"^roi\.box_heads\.(\d)\.", f"bbox_head.{number}", new)
        new = re.sub(r"^roi\.mask_heads\.(\d)\.", f"mask_head.{number}", new)
        if "bbox_head" in new:
            new = new.replace("convs.", "shared_convs.").replace("fcs.", "shared_fcs.")
            new = re.sub(r"\.(cls|reg)\.(weight|bias)$", r".fc_\1.\2", new)
            new = re.sub(r"\.norm\.(weight|bias)$", r".agn.\1_", new)
            new = new.replace(".norm.attention.fc.", ".agn.attention_weights.attention.0.")
        if "mask_head" in new:
            new = re.sub(r"\.logits\.", ".conv_logits.", new).replace(".flow.", ".conv_res.")
        new = new.replace("roi.semantic.lateral.", "semantic_head.lateral_convs.")
        new = new.replace("roi.semantic.embedding.", "semantic_head.conv_embedding.")
        new = new.replace("roi.semantic.convs.", "semantic_head.convs.")
        new = new.replace("roi.semantic.logits.", "semantic_head.conv_logits.")
        new = new.replace(".norm.", ".gn.")
        if re.search(r"backbone\.layer.*bn2\.(base|attention)\.", name.replace("network.", "")):
            new = new.replace("bn2.base.", "bn2.")
            new = new.replace("bn2.attention.fc.", "bn2.attention_weights.attention.0.")
            new = new.replace("bn2.attention.gn.", "bn2.attention_weights.attention.1.")
        elif new.startswith("backbone.layer") and detector.backbone.network.layer1[
            0
        ].bn2.__class__.__name__ == ("AttentiveNorm"):
            new = re.sub(r"bn2\.(weight|bias)$", r"bn2.\1_", new)
        found[name] = new
    return found


def published(case, geometry, tmp_path):
    """A detector with the recipe's weights, loaded from a file in the authors' names."""
    name, arch, norm, head_norm = PUBLISHED[case]
    every = 10**6
    detector = anorm.create_detector(
        name,
        arch,
        norm=norm,
        head_norm=head_norm,
        geometry=geometry,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=every,
        rpn_positive_fraction=1.0,
        box_batch_size_per_image=every,
        box_positive_fraction=1.0,
        box_detections_per_img=20,
    ).double()
    side = described(f"model_{case}_{geometry}")
    names = authors_names(detector)
    shapes = {own: tuple(value.shape) for own, value in detector.state_dict().items()}
    # a linear layer of an attention network is a 1x1 convolution there
    state = {
        new: fill(new, (*shapes[own], 1, 1) if ".attention.0.weight" in new else shapes[own])
        * side["factors"].get(new, 1.0)
        for own, new in names.items()
    }
    torch.save(state, tmp_path / "authors.pth")
    report = anorm.load_weights(detector, tmp_path / "authors.pth")
    assert report.complete and report.loaded == len(state)
    return detector, names, side


def images_and_targets(geometry):
    stored, targets = arrays("images"), []
    images = [stored[f"img{i}"].permute(2, 0, 1).double() / 255 for i in range(2)]
    for i, (image, truth) in enumerate(zip(images, described("truth"), strict=True)):
        height, width = image.shape[1:]
        masks = unpack(stored[f"masks{i}"], 160)
        assert not masks[:, height:].any() and not masks[:, :, width:].any()
        targets.append(
            {
                "boxes": geometry.from_xywh(torch.tensor(truth["xywh"], dtype=torch.float64)),
                "labels": torch.tensor(truth["labels"]),
                "masks": masks[:, :height, :width],
                "semantic": stored["semantic"][i, 0],
            }
        )
    return images, targets


def runs(rle):
    """COCO's compressed run lengths -> a bitmap (H, W)."""
    counts, i, text = [], 0, rle["counts"]
    while i < len(text):
        value, shift, more = 0, 0, True
        while more:
            char = ord(text[i]) - 48
            value |= (char & 31) << shift
            more = bool(char & 32)
            i, shift = i + 1, shift + 5
            if not more and char & 16:
                value |= -1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    bits = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool)
    return torch.from_numpy(bits.reshape(rle["size"][::-1]).T.copy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "geometry"),
    [
        ("mask_rcnn_r50_an_head_an_gn", "legacy"),
        ("cascade_mask_rcnn_r50_bn", "legacy"),
        ("htc_r50_bn", "modern"),
    ],
)
def test_published_models(case, geometry, tmp_path):
    detector, names, side = published(case, geometry, tmp_path)
    kept = arrays(f"model_{case}_{geometry}")
    images, targets = images_and_targets(detector.geometry)
    detector.eval()
    # in one batch, so that both stand on the reference's canvas of 160 x 160
    plain = detector(images)
    results = {"test0": plain[0], "test1": plain[1]}
    if case.startswith("mask"):
        results["test0_rescaled"] = detector(images, originals=[(96, 120, 1.25), (152, 116)])[0]
    for key, result in results.items():
        made = torch.cat((result["boxes"], result["scores"][:, None]), 1)
        torch.testing.assert_close(made, kept[f"{key}.det"], rtol=0, atol=1e-7)
        assert torch.equal(result["labels"], kept[f"{key}.labels"].long() + 1)
    for made, rle in zip(plain[0]["masks"], side["test0.rle"], strict=True):
        assert torch.equal(made, runs(rle))
    if "train.total" not in kept:
        return
    detector.train()
    for module in detector.modules():
        if isinstance(module, Norm):
            anorm.freeze_stats(module)
    for part in ("conv1", "bn1", "layer1"):
        detector.backbone.network.get_submodule(part).requires_grad_(False)
    losses = detector(images, targets)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(float(kept[f"train.{name}"].sum()), rel=1e-9), name
    sum(losses.values()).backward()
    ours = {new: own for own, new in names.items()}
    parameters = dict(detector.named_parameters())
    for name, norm in zip(side["train.grad_names"], kept["train.grad_l2"].tolist(), strict=True):
        gradient = parameters[ours[name]].grad
        assert (0.0 if gradient is None else float(gradient.norm())) == pytest.approx(norm, rel=1e-6), name


def sizes(*args, **options):
    with torch.device("meta"):
        detector = anorm.create_detector(*args, **options)
    parameters = list(detector.named_parameters())
    return sum(p.numel() for _, p in parameters)


@pytest.mark.parametrize(
    ("count", "name", "arch", "norm", "head_norm"),
    [
        (45_711_413, "mask_rcnn", "resnet50", "bn", None),
        (45_909_801, "mask_rcnn", "resnet50", "an", None),
        (45_715_509, "mask_rcnn", "resnet50", "gn", "gn"),
        (45_957_989, "mask_rcnn", "resnet50", "an", "an_gn"),
        (64_703_541, "mask_rcnn", "resnet101", "bn", None),
        (65_155_025, "mask_rcnn", "resnet101", "an", None),
        (64_707_637, "mask_rcnn", "resnet101", "gn", "gn"),
        (65_203_213, "mask_rcnn", "resnet101", "an", "an_gn"),
        pytest.param(33_094_760, "mask_rcnn", "aognet12m", "bn", None, marks=pytest.mark.slow),
        pytest.param(33_209_016, "mask_rcnn", "aognet12m", "an", None, marks=pytest.mark.slow),
        pytest.param(33_257_204, "mask_rcnn", "aognet12m", "an", "an_gn", marks=pytest.mark.slow),
        pytest.param(60_732_153, "mask_rcnn", "aognet40m", "bn", None, marks=pytest.mark.slow),
        pytest.param(60_968_029, "mask_rcnn", "aognet40m", "an", None, marks=pytest.mark.slow),
        pytest.param(61_016_217, "mask_rcnn", "aognet40m", "an", "an_gn", marks=pytest.mark.slow),
        (96_317_505, "cascade_mask_rcnn", "resnet101", "bn", None),
        (96_768_989, "cascade_mask_rcnn", "resnet101", "an", None),
        pytest.param(92_346_117, "cascade_mask_rcnn", "aognet40m", "bn", None, marks=pytest.mark.slow),
        pytest.param(92_581_993, "cascade_mask_rcnn", "aognet40m", "an", None, marks=pytest.mark.slow),
        (77_325_377, "cascade_mask_rcnn", "resnet50", "bn", None),
        (99_316_984, "htc", "resnet101", "bn", None),
        (99_768_468, "htc", "resnet101", "an", None),
        (80_324_856, "htc", "resnet50", "bn", None),
        (23_152_885, "mask_rcnn", "mobilenetv2", "bn", None),
        (48_226_357, "mask_rcnn", "resnet50", {"name": "se", "place": "last", "reduction": 16}, None),
    ],
)
def test_sizes_to_the_digit(count, name, arch, norm, head_norm):
    """MobileNetV2's printed 22.72 M is reachable from no natural network: 23,152,885 is its taps' arithmetic."""
    assert sizes(name, arch, norm=norm, head_norm=head_norm) == count


def test_htc_without_its_semantic_branch():
    assert sizes("htc", "resnet101", norm="bn", semantic_classes=0) == 96_514_881


@pytest.mark.parametrize(
    ("arch", "norm", "count"),
    [
        ("resnet50", "bn", 23_282_688),
        ("resnet50", "an", 23_475_640),
        ("resnet101", "an", 42_720_864),
        pytest.param("aognet12m", "an", 11_419_739, marks=pytest.mark.slow),
    ],
)
def test_what_the_authors_code_trains_of_a_backbone(arch, norm, count):
    with torch.device("meta"):
        backbone = anorm.create_detector("mask_rcnn", arch, norm=norm).backbone
    backbone.freeze("code")
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == count
    for module in backbone.train().modules():
        assert not isinstance(module, Norm) or not module.learning


@pytest.mark.parametrize(("arch", "mixtures"), [("resnet50", 133_120), ("resnet101", 307_200)])
def test_the_paper_holds_mixtures_and_affines_too(arch, mixtures):
    learning = {}
    for policy in ("code", "paper"):
        with torch.device("meta"):
            backbone = anorm.create_detector("mask_rcnn", arch, norm="an").backbone
        backbone.freeze(policy)
        learning[policy] = {name for name, p in backbone.named_parameters() if p.requires_grad}
    held = learning["code"] - learning["paper"]
    sizes = {name: p.numel() for name, p in backbone.named_parameters()}
    mixed = {name for name in held if re.search(r"bn2\.(weight|bias)$", name)}
    assert sum(sizes[name] for name in mixed) == mixtures
    assert all(re.search(r"(bn[13]|downsample\.1)\.(weight|bias)$", name) for name in held - mixed)
    attention = {name for name in learning["paper"] if ".attention." in name}
    assert attention and all(not name.startswith("network.layer1") for name in attention)


def test_the_configuration_freezes_by_policy():
    from anorm.engine.optim import freeze

    with torch.device("meta"):
        detector = anorm.create_detector("mask_rcnn", "resnet18", norm="an", head_norm="an_gn")
    [said] = freeze(detector, ["paper"])
    assert "frozen as in the paper" in said
    assert all(p.requires_grad for name, p in detector.named_parameters() if not name.startswith("backbone"))
    with pytest.raises(ValueError, match="matches nothing"):
        freeze(detector, ["papers"])
