"""Names of other programs' detectors, translated into ours: MMDetection 1, torchvision, detectron-style exports.

MMDetection 1 and torchvision put the background first, as here, so only names differ. The heads of MMDetection 2 and 3
(``roi_head.``) and of detectron2 put it last and have no place here: with ``strict=False`` backbone, pyramid and RPN load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from anorm import weights

__all__ = ["translate"]

BACKBONE = "backbone.network."

MMDETECTION = (
    (r"neck\.lateral_convs\.(\d)\.", r"fpn.lateral.\1."),
    (r"neck\.fpn_convs\.(\d)\.", r"fpn.output.\1."),
    (r"rpn_head\.rpn_conv\.", "rpn.convs.0.conv."),
    (r"rpn_head\.rpn_(cls|reg)\.", r"rpn.\1."),
    (r"bbox_head\.(\d)\.shared_convs\.(\d)\.", r"roi.box_heads.\1.convs.\2."),
    (r"bbox_head\.(\d)\.shared_fcs\.(\d)\.", r"roi.box_heads.\1.fcs.\2."),
    (r"bbox_head\.(\d)\.fc_(cls|reg)\.", r"roi.box_heads.\1.\2."),
    (r"mask_head\.(\d)\.convs\.(\d)\.", r"roi.mask_heads.\1.convs.\2."),
    (r"mask_head\.(\d)\.upsample\.", r"roi.mask_heads.\1.upsample."),
    (r"mask_head\.(\d)\.conv_logits\.", r"roi.mask_heads.\1.logits."),
    (r"mask_head\.(\d)\.conv_res\.", r"roi.mask_heads.\1.flow."),
    (r"semantic_head\.lateral_convs\.(\d)\.", r"roi.semantic.lateral.\1."),
    (r"semantic_head\.convs\.(\d)\.", r"roi.semantic.convs.\1."),
    (r"semantic_head\.conv_embedding\.", "roi.semantic.embedding."),
    (r"semantic_head\.conv_logits\.", "roi.semantic.logits."),
)

TORCHVISION = (
    (r"backbone\.body\.", BACKBONE),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?(?=weight|bias)", r"fpn.lateral.\1.conv."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.1\.", r"fpn.lateral.\1.norm."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?(?=weight|bias)", r"fpn.output.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.1\.", r"fpn.output.\1.norm."),
    (r"rpn\.head\.conv\.(?=weight|bias)", "rpn.convs.0.conv."),
    (r"rpn\.head\.conv\.(\d)\.0\.", r"rpn.convs.\1.conv."),
    (r"rpn\.head\.cls_logits\.", "rpn.cls."),
    (r"rpn\.head\.bbox_pred\.", "rpn.reg."),
    (r"roi_heads\.box_head\.fc6\.", "roi.box_heads.0.fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "roi.box_heads.0.fcs.1."),
    (r"roi_heads\.box_head\.([0-3])\.0\.", r"roi.box_heads.0.convs.\1.conv."),
    (r"roi_heads\.box_head\.([0-3])\.1\.", r"roi.box_heads.0.convs.\1.norm."),
    (r"roi_heads\.box_head\.5\.", "roi.box_heads.0.fcs.0."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi.box_heads.0.cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi.box_heads.0.reg."),
    (r"roi_heads\.mask_head\.([0-3])\.0\.", r"roi.mask_heads.0.convs.\1.conv."),
    (r"roi_heads\.mask_head\.([0-3])\.1\.", r"roi.mask_heads.0.convs.\1.norm."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "roi.mask_heads.0.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi.mask_heads.0.logits."),
)
OLD_MASK_HEAD = re.compile(r"roi_heads\.mask_head\.mask_fcn([1-4])\.")

DETECTRON = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", f"{BACKBONE}bn1."),
    (r"backbone\.bottom_up\.stem\.conv1\.", f"{BACKBONE}conv1."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.convs.0.conv."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.cls."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.reg."),
)
DETECTRON_BLOCK = re.compile(r"backbone\.bottom_up\.res([2-5])\.(\d+)\.(?:conv([1-3])|shortcut)\.(norm\.)?")
DETECTRON_FPN = re.compile(r"backbone\.fpn_(lateral|output)([2-5])\.(norm\.)?")


def translate(shapes: dict[str, tuple[int, ...]], target: Iterable[str]) -> tuple[str, dict[str, str]]:
    """(style of a file's names, {name in the file: name in the detector}); see ``anorm.weights.translate``."""
    target = set(target)
    if target.issuperset(shapes):
        return "own names", {name: name for name in shapes}
    if any(name.startswith("neck.") for name in shapes):
        return _mmdetection(shapes, target)
    if any(name.startswith("backbone.body.") for name in shapes):
        return "torchvision's names", {name: _torchvision(name) for name in shapes}
    if any(name.startswith("backbone.bottom_up.") for name in shapes):
        return "detectron2's names", {name: _detectron(name) for name in shapes}
    if not any(name.startswith(BACKBONE) for name in shapes):
        # a classifier's file: its backbone finds its places, the heads are missing
        style, places = _backbone({name: name for name in shapes}, shapes, target)
        return f"a backbone in {style}", places
    return weights.translate(shapes, target)


def _backbone(inner: dict[str, str], shapes, target: set[str]) -> tuple[str, dict[str, str]]:
    """{name in the file: name within the network} -> the style, {name in the file: name in the detector}."""
    own = {name.removeprefix(BACKBONE) for name in target if name.startswith(BACKBONE)}
    style, places = weights.translate({short: shapes[name] for name, short in inner.items()}, own)
    return style, {name: BACKBONE + places[short] for name, short in inner.items()}


def _mmdetection(shapes, target: set[str]) -> tuple[str, dict[str, str]]:
    inner = {n: n.removeprefix("backbone.") for n in shapes if n.startswith("backbone.")}
    style, places = _backbone(inner, shapes, target)
    for name in shapes.keys() - inner.keys():
        # a single stage has no number there
        numbered = re.sub(r"^(bbox_head|mask_head)\.(?!\d)", r"\1.0.", name)
        new = _first(MMDETECTION, numbered)
        module, _, rest = new.partition(".gn.") if ".gn." in new else new.partition(".agn.")
        places[name] = f"{module}.norm.{_attention(rest)}" if rest else new
    return "MMDetection's names", {name: places[name] for name in shapes}


def _attention(rest: str) -> str:
    return rest.replace("attention_weights.attention.0.", "attention.fc.").removesuffix("_")


def _torchvision(name: str) -> str:
    if match := OLD_MASK_HEAD.match(name):
        return f"roi.mask_heads.0.convs.{int(match[1]) - 1}.conv.{name[match.end() :]}"
    return _first(TORCHVISION, name)


def _detectron(name: str) -> str:
    """Backbone, pyramid and RPN; detectron2's heads have the background last, and no place here."""
    if match := DETECTRON_BLOCK.match(name):
        stage, block, conv, norm = match.groups()
        kind = "bn" if norm else "conv"
        layer = f"{kind}{conv}" if conv else f"downsample.{1 if norm else 0}"
        return f"{BACKBONE}layer{int(stage) - 1}.{block}.{layer}.{name[match.end() :]}"
    if match := DETECTRON_FPN.match(name):
        return f"fpn.{match[1]}.{int(match[2]) - 2}.{'norm' if match[3] else 'conv'}.{name[match.end() :]}"
    return _first(DETECTRON, name)


def _first(rules: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, replacement in rules:
        new, count = re.subn("^" + pattern, replacement, name)
        if count:
            return new
    return name
