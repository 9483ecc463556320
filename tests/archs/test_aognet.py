"""AOGNet: recorded blocks, parameter counts to the digit, the sites of its norms, dropout as a mask."""

import json
from functools import partial

import numpy as np
import published_weights as published
import pytest
import torch
from torch.nn import functional as F

import anorm
from anorm.archs import aog, aognet
from anorm.norms.attentive import AttentiveNorm
from anorm.norms.base import Site
from anorm.norms.batch import BatchNorm
from anorm.weights import translate

BLOCKS = sorted(path.stem for path in published.ARRAYS.glob("aog_block_*.npz"))


def small(norm="bn", **options):
    sizes = {
        "widths": (8, 16, 24),
        "blocks": (2, 1),
        "dims": (2, 4),
        "symmetry": (1, 2),
        "dropout": (0.0, 0.5),
    }
    return anorm.create_model("aognet12m", norm, num_classes=5, **sizes | options)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_recorded_block(name, mode):
    """Every node's output, all gradients and statistics of whole blocks, in float64."""
    recorded = np.load(published.ARRAYS / f"{name}.npz")
    dim, symmetry, inputs, outputs, k = (int(size) for size in recorded["sizes"])
    params, buffers = ([json.loads(entry) for entry in recorded[key]] for key in ("params", "buffers"))

    def norm(site):
        return (
            AttentiveNorm(site.channels, site.act, k=k)
            if k and site.focus
            else BatchNorm(site.channels, site.act)
        )

    site = partial(Site, stage=0, stages=1)
    block = aognet.Block(inputs, outputs, aog.build(dim, symmetry), 0.25, 0.0, site, norm).double()
    prefix = "stage1.blocks.0."
    named = {f"stage0.stage_0_block_0.{key}": tuple(shape) for key, shape in params + buffers}
    _, places = translate(named, {prefix + key for key in block.state_dict()})
    place = {key: places[f"stage0.stage_0_block_0.{key}"].removeprefix(prefix) for key, _ in params + buffers}
    own = block.state_dict()
    values = published.state(params + buffers)
    block.load_state_dict({place[key]: value.reshape(own[place[key]].shape) for key, value in values.items()})

    block.train(mode == "train")
    x = torch.from_numpy(recorded["x"]).requires_grad_()
    nodes = block.forward_nodes(x)
    y = block.norm(nodes[0])
    y.backward(torch.from_numpy(recorded["g"]))

    def close(ours, key, tolerance=1e-9):
        np.testing.assert_allclose(ours.detach(), recorded[key], rtol=tolerance, atol=tolerance)

    if mode == "train":
        close(y, "train.y")
        close(x.grad, "train.gx")
        close(torch.stack([block.get_buffer(place[k]).sum() for k, _ in buffers]), "train.buffer_sum_after")
    else:
        close(y[:2], "eval.y_first2")
    for i, node in nodes.items():
        close(node.sum((2, 3)), f"{mode}.node_sum.{i}")
    close(x.grad.sum((2, 3)), f"{mode}.gx_sum")
    gradients = [block.get_parameter(place[k]).grad.flatten() for k, _ in params]
    close(torch.stack([g.norm() for g in gradients]), f"{mode}.grad_l2")
    close(torch.stack([F.pad(g[:4], (0, 4 - len(g[:4]))) for g in gradients]), f"{mode}.grad_first4")


@pytest.mark.parametrize(
    "arch, norm, count",
    [
        ("aognet12m", "bn", 12_259_099),
        ("aognet12m", "an", 12_373_355),
        ("aognet40m", "bn", 40_153_004),
        ("aognet40m", "an", 40_388_880),
    ],
)
def test_parameter_counts(arch, norm, count):
    with torch.device("meta"):
        model = anorm.create_model(arch, norm)
    assert sum(p.numel() for p in model.parameters()) == count


def test_parameters_by_part():
    """12M with BN: stem, stages and classifier one by one."""
    with torch.device("meta"):
        model = anorm.create_model("aognet12m")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {
        "stem": 7_472,
        "stage1": 116_656,
        "stage2": 561_088,
        "stage3": 4_066_080,
        "stage4": 6_682_803,
        "fc": 825_000,
    }


@pytest.mark.parametrize(
    "arch, k_by_width",
    [
        ("aognet12m", {20: 10, 32: 10, 48: 10, 64: 10, 96: 20, 128: 20, 206: 20}),
        ("aognet40m", {35: 10, 56: 10, 84: 10, 112: 10, 149: 20, 186: 20, 224: 20, 350: 20}),
    ],
)
def test_attentive_norm_stands_on_full_width_nodes(arch, k_by_width):
    with torch.device("meta"):
        model = anorm.create_model(arch, "an")
    found = {name: m for name, m in model.named_modules() if isinstance(m, AttentiveNorm)}
    assert len(found) == {"aognet12m": 24, "aognet40m": 28}[arch]
    assert all(name.endswith(".norm2") for name in found)
    assert {m.channels: m.k for m in found.values()} == k_by_width


def test_block_widths_round_to_the_slices():
    assert aognet.block_widths(448, 896, 3, 4) == [596, 744, 896]
    assert aognet.block_widths(256, 512, 2, 4) == [384, 512]
    assert aognet.block_widths(10, 20, 2, 2) == [14, 20]  # step 5 is between 4 and 6: ties go down
    assert aognet.slices(11, 4) == [3, 3, 3, 2]


def test_forward_stages_match_feature_info():
    model = small()
    maps = model.forward_stages(torch.randn(2, 3, 32, 32))
    assert list(maps) == list(model.feature_info) == ["stage1", "stage2"]
    for name, (channels, stride) in model.feature_info.items():
        assert maps[name].shape == (2, channels, 32 // stride, 32 // stride)


def test_dropout_is_dropout2d_before_the_residual():
    """The mask on the last norm's coefficients equals torch's Dropout2d of its output, for the same drawn mask."""
    torch.manual_seed(0)
    site = partial(Site, stage=0, stages=1)
    node = aognet.Node(6, 8, 0.5, 0.4, False, site, lambda s: BatchNorm(s.channels, s.act)).double().train()
    op, res = torch.randn(2, 5, 6, 4, 4, dtype=torch.double)
    torch.manual_seed(1)
    y = node(op, res)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(5, 8, dtype=torch.double), 0.4)
    assert mask.unique().tolist() == [0.0, 1 / 0.6]
    branch = node.conv3(node.norm2(node.conv2(node.norm1(node.conv1(op)))))
    branch = F.batch_norm(branch, None, None, node.norm3.weight, node.norm3.bias, training=True)
    expected = (branch * mask[:, :, None, None] + node.shortcut(res)).relu()
    torch.testing.assert_close(y, expected)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = small(), torch.randn(2, 3, 32, 32)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_zero_init_makes_identity_nodes():
    model = small(zero_init=True, dropout=(0.0, 0.0))
    nodes = [m for m in model.modules() if isinstance(m, aognet.Node)]
    assert {bool(n.norm3.weight.any()) for n in nodes if n.shortcut is None} == {False}
    assert all(n.norm3.weight.all() for n in nodes if n.shortcut is not None)
    node = next(n for n in nodes if n.shortcut is None)
    x = torch.rand(2, node.conv1.in_channels, 4, 4)
    torch.testing.assert_close(node(x, x), x)


@pytest.mark.parametrize("norm", [name for name in anorm.list_norms() if name != "module"])
def test_every_norm_trains_a_step(norm):
    torch.manual_seed(0)
    model = small(norm)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_uneven_stage_lists_are_said():
    with pytest.raises(ValueError, match="need 2 dims"):
        small(dims=(2, 2, 4))
