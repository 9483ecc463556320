"""AOGNet-12M and AOGNet-40M: each block is an AND-OR grammar (``aog``) whose nodes are bottlenecks.

Li, Song and Wu, "AOGNets: Compositional Grammatical Architectures for Deep Learning" (CVPR 2019); the sizes and AN's
place are those of Attentive Normalization (ECCV 2020). A node has two inputs, ``op`` for the convolutions and ``res``
for the shortcut:

    y = relu(mask * norm3(conv1x1(relu(norm2(conv3x3(relu(norm1(conv1x1(op)))))))) + shortcut(res))

    T    op = res = its slice of the block's input
    AND  op = concat(children)      res = concat(child * paths(node) / paths(child))
    OR   op = sum(children)         res = sum(child * paths(node) / paths(child))

and a lateral neighbour is added to op, and to res where no common parent brings it in already. AN's place (the
``focus``) is norm2 of the nodes over a block's full width.
"""

from __future__ import annotations

import functools
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.archs import aog
from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site

__all__ = ["ARCHS", "AOGNet"]


class ConvNorm(nn.Sequential):
    """norm(conv(x)); the norm carries the activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = norm


class Node(nn.Module):
    """The bottleneck of one node: op, res (N, inputs, H, W) -> (N, outputs, H, W).

    Dropout2d before the residual add is a factor per (n, c) on the last norm's scale and shift, so that the add and
    the ReLU stay fused with that norm.
    """

    def __init__(
        self, inputs: int, outputs: int, ratio: float, dropout: float, focus: bool, site, norm: MakeNorm
    ) -> None:
        super().__init__()
        width = max(4, math.floor(ratio * outputs + 0.5))  # halves round up: 154.5 gives 155
        self.dropout = dropout
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = norm(site(width, role="reduce", block_norm=1, act="relu"))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(site(width, role="spatial", block_norm=2, focus=focus, act="relu"))
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = norm(site(outputs, role="expand", block_norm=3, last=True, act="relu"))
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = ConvNorm(inputs, outputs, 1, norm(site(outputs, role="shortcut")))

    def forward(self, op: Tensor, res: Tensor) -> Tensor:
        y = self.conv3(self.norm2(self.conv2(self.norm1(self.conv1(op)))))
        if self.shortcut is not None:
            res = self.shortcut(res)
        if not (self.training and self.dropout):
            return self.norm3(y, res)
        ones = torch.ones(y.shape[:2], device=y.device, dtype=torch.promote_types(y.dtype, torch.float32))
        return self.norm3(y, res, mask=F.dropout(ones, self.dropout))


class Block(nn.Module):
    """One grammar over slices of the channels, then norm and ReLU: (N, inputs, H, W) -> (N, outputs, H, W)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        grammar: aog.Grammar,
        ratio: float,
        dropout: float,
        site,
        norm: MakeNorm,
    ) -> None:
        super().__init__()
        self.grammar = grammar
        self.slices = slices(inputs, grammar.dim)
        self.nodes = nn.ModuleDict()
        for i in grammar.order:
            node = grammar.nodes[i]
            after = sum(slices(outputs, grammar.dim)[node.start : node.end + 1])
            before = sum(self.slices[node.start : node.end + 1]) if node.kind == aog.T else after
            self.nodes[str(i)] = Node(before, after, ratio, dropout, grammar.spans_all(node), site, norm)
        self.norm = norm(site(outputs, role="final", act="relu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.forward_nodes(x)[0])

    def forward_nodes(self, x: Tensor) -> dict[int, Tensor]:
        """Every node's output, by its id in the grammar; the root has id 0."""
        outputs: dict[int, Tensor] = {}
        for i in self.grammar.order:
            node = self.grammar.nodes[i]
            if node.kind == aog.T:
                op = res = x.narrow(
                    1, sum(self.slices[: node.start]), sum(self.slices[node.start : node.end + 1])
                )
            else:
                op, res = self._gather(outputs, node)
            outputs[i] = self.nodes[str(i)](op, res)
        return outputs

    def _gather(self, outputs: dict[int, Tensor], node: aog.Node) -> tuple[Tensor, Tensor]:
        join = partial(torch.cat, dim=1) if node.kind == aog.AND else partial(functools.reduce, torch.add)
        children = [outputs[c] for c in node.children]
        scales = [self.grammar.residual_scale(node, c) for c in node.children]
        op = res = join(children)
        if any(scale != 1 for scale in scales):
            res = join(
                [
                    child if scale == 1 else child * scale
                    for child, scale in zip(children, scales, strict=True)
                ]
            )
        if node.lateral is not None:
            same, neighbour = res is op, outputs[node.lateral]
            op = op + neighbour
            if self.grammar.lateral_in_residual(node):
                res = op if same else res + neighbour
        return op, res


def slices(channels: int, parts: int) -> list[int]:
    """Widths of ``parts`` contiguous slices; what does not divide evenly goes to the first ones."""
    return [channels // parts + (i < channels % parts) for i in range(parts)]


def block_widths(inputs: int, outputs: int, blocks: int, dim: int) -> list[int]:
    """Channels behind each block of a stage: equal steps, rounded to the nearest multiple of ``dim`` (ties down)."""
    step = dim * math.ceil((outputs - inputs) // blocks / dim - 0.5)
    return [inputs + step * i for i in range(1, blocks)] + [outputs]


class Stage(nn.Sequential):
    """A halving transition (1x1, norm, ReLU, 2x2 average) but for the first stage, then blocks of growing width."""

    def __init__(
        self,
        inputs: int,
        widths: list[int],
        halve: bool,
        grammar: aog.Grammar,
        ratio: float,
        dropout: float,
        site,
        norm: MakeNorm,
    ) -> None:
        super().__init__()
        if halve:
            self.transition = ConvNorm(inputs, inputs, 1, norm(site(inputs, role="transition", act="relu")))
            self.pool = nn.AvgPool2d(2)
        self.blocks = nn.Sequential()
        for outputs in widths:
            self.blocks.append(Block(inputs, outputs, grammar, ratio, dropout, site, norm))
            inputs = outputs


class AOGNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes): a stem of three 3x3 and a 2x2 max-pool, then stages of blocks.

    Args:
        norm: makes the layer for each ``Site``.
        num_classes, in_channels: of the classifier and the images.
        widths: channels behind the stem and behind each stage.
        blocks, dims, symmetry, dropout: for each stage the number of blocks, their slices, which of two mirrored
            splits their grammar keeps (``aog.build``) and the Dropout2d rate of their nodes.
        ratio: channels inside a bottleneck over its output channels.
        zero_init: the last norm of each node whose shortcut is the identity starts at zero.
    """

    def __init__(
        self,
        norm: MakeNorm,
        num_classes: int = 1000,
        in_channels: int = 3,
        widths: tuple[int, ...] = (32, 128, 256, 512, 824),
        blocks: tuple[int, ...] = (2, 2, 2, 1),
        dims: tuple[int, ...] = (2, 2, 4, 4),
        symmetry: tuple[int, ...] = (1, 2, 1, 2),
        dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1),
        ratio: float = 0.25,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        stages = len(blocks)
        for name, value, count in (
            ("widths", widths, stages + 1),
            ("dims", dims, stages),
            ("symmetry", symmetry, stages),
            ("dropout", dropout, stages),
        ):
            if len(value) != count:
                raise ValueError(f"{stages} stages (blocks={blocks}) need {count} {name}, got {value}")
        site = partial(Site, stage=0, stages=stages, role="stem", act="relu")
        half, inputs = widths[0] // 2, widths[0]
        self.stem = nn.Sequential(
            ConvNorm(in_channels, half, 3, norm(site(half)), stride=2),
            ConvNorm(half, half, 3, norm(site(half))),
            ConvNorm(half, inputs, 3, norm(site(inputs))),
            nn.MaxPool2d(2),
        )
        self.feature_info: dict[str, FeatureInfo] = {}
        for stage, outputs in enumerate(widths[1:]):
            site = partial(Site, stage=stage, stages=stages)
            inner = block_widths(inputs, outputs, blocks[stage], dims[stage])
            grammar = aog.build(dims[stage], symmetry[stage])
            name = f"stage{stage + 1}"
            self.add_module(name, Stage(inputs, inner, stage > 0, grammar, ratio, dropout[stage], site, norm))
            self.feature_info[name] = FeatureInfo(outputs, 4 * 2**stage)
            inputs = outputs
        self.fc = nn.Linear(inputs, num_classes)
        he_init(self)
        for module in self.modules():
            if zero_init and isinstance(module, Node) and module.shortcut is None:
                module.norm3.zero_init()

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps {"stage1": (N, C, H/4, W/4), ..., "stage4": (N, C, H/32, W/32)}."""
        x = self.stem(x)
        maps = {}
        for name in self.feature_info:
            maps[name] = x = getattr(self, name)(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        *_, last = self.forward_stages(x).values()
        return self.fc(last.mean((2, 3)))


ARCHS = {
    "aognet12m": partial(AOGNet, widths=(32, 128, 256, 512, 824), blocks=(2, 2, 2, 1)),
    "aognet40m": partial(AOGNet, widths=(56, 224, 448, 896, 1400), blocks=(2, 2, 3, 1)),
}
