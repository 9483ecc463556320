"""Heads at small width against reference arrays: outputs, and gradients of inputs and parameters (float64)."""

import re

import pytest
import torch
from recipe_weights import arrays, described, fill

from anorm.detection.detectors import _head_norms
from anorm.detection.fpn_rpn import FPN
from anorm.detection.htc import SemanticHead
from anorm.detection.names import MMDETECTION, _attention
from anorm.detection.roi import BoxHead, MaskHead


def own_name(name):
    numbered = re.sub(r"^(bbox_head|mask_head)\.(?!\d)", r"\1.0.", name)
    for pattern, replacement in MMDETECTION:
        numbered = re.sub(f"^{pattern}", replacement, numbered)
    numbered = re.sub(r"^roi\.(?:box_heads\.0|mask_heads\.0|semantic)\.", "", numbered)
    module, mark, rest = re.split(r"(\.a?gn\.)", numbered) if "gn." in numbered else (numbered, "", "")
    return f"{module}.norm.{_attention(rest)}" if mark else module


def load(head, names):
    places = {own_name(name): name for name in names}
    parameters = dict(head.double().named_parameters())
    assert parameters.keys() == places.keys()
    with torch.no_grad():
        for place, name in places.items():
            parameters[place].copy_(fill(name, names[name]).reshape(parameters[place].shape))
    return {name: parameters[place] for place, name in places.items()}


def check(head, stored, names, call):
    """Outputs, gradients of inputs and of every tensor; arrays stored as float32 to 1e-6 of their maximum."""
    parameters = load(head, names)
    inputs = [
        stored[f"in{i}"].double().requires_grad_() for i in range(sum(k.startswith("in") for k in stored))
    ]
    outputs = call(inputs)
    upstream = [stored[f"up{i}"].double() for i in range(len(outputs))]
    torch.autograd.backward(outputs, upstream)

    def close(made, kept):
        share = 1e-6 if kept.dtype == torch.float32 else 1e-9
        made = made.reshape(kept.shape)
        assert (made - kept.double()).abs().max() <= share * kept.abs().max()

    for i, output in enumerate(outputs):
        close(output, stored[f"out{i}"])
    for i, x in enumerate(inputs):
        close(x.grad, stored[f"gin{i}"])
    for name, parameter in parameters.items():
        if f"g.{name}" in stored:
            close(parameter.grad, stored[f"g.{name}"])
    return parameters


def test_box_head_with_attentive_normalization():
    kept = described("head_box_an_gn")
    head = BoxHead(64, 8, hidden=48, norm=_head_norms("an_gn")["box"])
    assert [conv.norm.k for conv in head.convs] == [10, 10, 20, 20]
    stored = arrays("head_box_an_gn")
    parameters = check(head, stored, kept["names"], lambda inputs: head(inputs[0]))
    for name, row in zip(kept["grad_order"], stored["grad_l2_sum_first4"], strict=True):
        assert float(parameters[name].grad.norm()) == pytest.approx(float(row[0]), rel=1e-9)


def test_semantic_head():
    kept = described("head_semantic")
    head = SemanticHead(5, 32, 11)
    check(head, arrays("head_semantic"), kept["names"], head)


def test_the_semantic_loss_leaves_ignored_pixels_out():
    head = SemanticHead(2, 8, 5)
    logits = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    target = torch.randint(5, (1, 4, 4))
    target[0, :2] = 255
    loss = head.loss(logits, list(target))
    rows = logits[0, :, 2:].flatten(1).t().log_softmax(1)
    expected = -rows[torch.arange(8), target[0, 2:].flatten()].mean() * 0.2
    torch.testing.assert_close(loss, expected)
    # a map of the image: every eighth pixel counts
    full = target.repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(head.loss(logits, list(full)), expected)
    # nothing but ignored pixels: no loss, and no NaN
    assert head.loss(logits, [torch.full((4, 4), 255)]) == 0


def test_norms_of_the_parts_by_themselves():
    norms = _head_norms({"box": "sn", "fpn": {"name": "gn", "groups": 8}})
    assert norms["mask"] is None
    fpn = FPN((8, 16), 16, norms["fpn"])
    assert fpn.lateral[0].norm.groups == 8 and fpn.lateral[0].conv.bias is None
    assert type(BoxHead(16, 3, hidden=8, norm=norms["box"]).convs[0].norm).__name__ == "SwitchableNorm"
    mask = MaskHead(16, 3, norms["mask"])
    assert mask.convs[0].norm is None and mask.convs[0].conv.bias is not None


def test_attention_stands_in_the_box_head_and_its_base_elsewhere():
    norms = _head_norms("an_gn")
    FPN((8, 16, 16, 16), 32, norms["fpn"])
    BoxHead(32, 3, hidden=8, norm=norms["box"])
    MaskHead(32, 3, norms["mask"])
    assert {part: dict(norm.built) for part, norm in norms.items()} == {
        "fpn": {"gn": 8},
        "box": {"an_gn": 4},
        "mask": {"gn": 4},
    }


def test_a_part_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="head_norm has no part rpn; it has fpn, box, mask"):
        _head_norms({"rpn": "gn"})
    with pytest.raises(ValueError, match="4conv1fc, 2fc"):
        BoxHead(8, 3, kind="3fc")
