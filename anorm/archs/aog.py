"""The AND-OR grammar of AOGNet: which nodes a block has, who feeds whom, in which order.

Li, Song and Wu, "AOGNets: Compositional Grammatical Architectures for Deep Learning" (CVPR 2019), section 3.
Pure data: this module knows no tensors. A block of `dim` unit channel slices is a sentence of length `dim`:

    T[a, b]     terminal: the slices a..b of the block's input
    AND[a, b]   with a split l: the concatenation of OR[a, a+l-1] and OR[a+l, b]
    OR[a, b]    the sum of T[a, b] and of every AND[a, b]

Spans are inclusive. A node that several others need exists once, so the grammar is a directed acyclic graph whose
root is OR[0, dim-1]. Lateral edges join neighbours of one kind and one width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

T, AND, OR = "T", "AND", "OR"


@dataclass
class Node:
    """A node of the grammar.

    id        position in order of creation (root = 0)
    kind      "T", "AND" or "OR"
    start, end  inclusive span of channel slices
    split     width of the left part of an AND, else 0
    children  ids of the syntactic inputs, in the order in which they are concatenated or summed
    lateral   id of the neighbour that also feeds this node, or None
    parents   ids of all nodes that this node feeds, laterally too
    paths     how many syntactic paths lead from the root to this node
    """

    id: int
    kind: str
    start: int
    end: int
    split: int = 0
    children: list[int] = field(default_factory=list)
    lateral: int | None = None
    parents: list[int] = field(default_factory=list)
    paths: int = 0

    @property
    def width(self) -> int:
        return self.end - self.start + 1

    @property
    def inputs(self) -> list[int]:
        """All nodes that must be known before this one: syntactic children, then the lateral one."""
        return self.children if self.lateral is None else [*self.children, self.lateral]

    def __str__(self) -> str:
        split = f" {self.split}+{self.width - self.split}" if self.split else ""
        return f"{self.id}:{self.kind}[{self.start}-{self.end}]{split}"


@dataclass
class Grammar:
    """All nodes (`nodes[i].id == i`, root first) and the `order` in which to evaluate them (root last)."""

    nodes: list[Node]
    order: list[int]

    @property
    def dim(self) -> int:
        return self.nodes[0].width

    def spans_all(self, node: Node) -> bool:
        """True for a node over the whole block: the root, its terminal and its ANDs."""
        return node.width == self.dim

    def residual_scale(self, node: Node, child: int) -> float:
        """Factor on a syntactic child in the residual sum or concatenation: paths(node) / paths(child).

        It removes the double counting of a child that several nodes share (AOGNets, section 3.3).
        """
        return node.paths / self.nodes[child].paths

    def lateral_in_residual(self, node: Node) -> bool:
        """True if the lateral child also joins the residual: only where no common parent brings it in anyway."""
        return node.lateral is not None and not set(node.parents) & set(self.nodes[node.lateral].parents)


def build(dim: int, symmetry: int = 0, lateral: bool = True) -> Grammar:
    """The grammar of a block with `dim` unit slices.

    symmetry  0: every binary split; 1: of two mirrored splits the one with the smaller left part;
              2: the one with the larger left part.
    lateral   add the lateral edges between neighbouring non-terminals.
    """
    if dim < 1:
        raise ValueError(f"an AND-OR grammar needs dim >= 1, got {dim}")
    if symmetry not in (0, 1, 2):
        raise ValueError(
            f"symmetry must be 0 (all splits), 1 (small left part) or 2 (large left part), got {symmetry}"
        )
    nodes = _expand(dim, symmetry)
    _count_paths(nodes)
    if lateral:
        _add_lateral_edges(nodes)
    for node in nodes:
        for child in node.inputs:
            nodes[child].parents.append(node.id)
    return Grammar(nodes, _post_order(nodes))


def _expand(dim: int, symmetry: int) -> list[Node]:
    """Breadth-first expansion from the root; the list of nodes is its own queue."""
    nodes: list[Node] = []
    known: dict[tuple, int] = {}

    def node_id(kind: str, start: int, end: int, split: int = 0) -> int:
        key = kind, start, end, split
        if key not in known:
            known[key] = len(nodes)
            nodes.append(Node(len(nodes), *key))
        return known[key]

    node_id(OR, 0, dim - 1)
    for node in nodes:  # grows while we walk
        a, b = node.start, node.end
        if node.kind == OR:
            children = [node_id(T, a, b)] + [
                node_id(AND, a, b, left) for left in _splits(node.width, symmetry)
            ]
        elif node.kind == AND:
            children = [node_id(OR, a, a + node.split - 1), node_id(OR, a + node.split, b)]
        else:
            children = []
        node.children = hash_order(children)
    return nodes


def _splits(width: int, symmetry: int) -> Iterable[int]:
    """Widths of the left part, in order of creation."""
    if symmetry == 1:
        return range(1, width // 2 + 1)
    if symmetry == 2:
        return range(width - 1, (width - 1) // 2, -1)
    return range(1, width)


def hash_order(ids: list[int]) -> list[int]:
    """The distinct `ids` in the order in which CPython (3.7 and newer) iterates `set(ids)`.

    Published AOGNet weights fix the order in which an AND concatenates its two parts, and the program that made
    them passed child ids through a set. Small integers come out of a hash table in the order of their slots: 15 and 7
    share slot 7 of 8, so AND[1-3] of dim 4, symmetry 1, is OR[2-3] followed by OR[1-1]. The table is written out
    here so that the networks do not depend on an interpreter's internals.
    """
    table: list[int | None] = [None] * 8
    for new in dict.fromkeys(ids):
        table[_free_slot(table, new)] = new
        held = [i for i in table if i is not None]
        if len(held) * 5 >= (len(table) - 1) * 3:  # three fifths full: grow to the power of two above 4 n
            table = [None] * (1 << (4 * len(held)).bit_length())
            for i in held:
                table[_free_slot(table, i)] = i
    return [i for i in table if i is not None]


def _free_slot(table: list[int | None], key: int) -> int:
    """Open addressing: nine neighbours where they fit into the table, else a jump mixed with the key's high bits."""
    mask = len(table) - 1
    slot, perturb = key & mask, key
    while True:
        run = range(slot, slot + 10) if slot + 9 <= mask else range(slot, slot + 1)
        for i in run:
            if table[i] is None:
                return i
        perturb >>= 5
        slot = (slot * 5 + 1 + perturb) & mask


def _count_paths(nodes: list[Node]) -> None:
    """paths(root) = 1; paths(n) = sum over n's syntactic parents. Wider nodes first, an OR before its ANDs and T."""
    nodes[0].paths = 1
    for node in sorted(nodes, key=lambda n: (-n.width, n.kind != OR)):
        for child in node.children:
            nodes[child].paths += node.paths


def _add_lateral_edges(nodes: list[Node]) -> None:
    """Chains among nodes of one kind and width, narrow ones first.

    ORs stand by their left end and a chain runs to the right; ANDs stand by the right end of their left part (then by
    their left end) and a chain runs to the left. Where a width has a single node, the next chain runs the other way.
    """
    places = {OR: lambda n: n.start, AND: lambda n: (n.start + n.split - 1, n.start)}
    for kind, place in places.items():
        rightward = kind == OR
        turned = False
        for width in sorted({n.width for n in nodes if n.kind == kind}):
            row = sorted((n for n in nodes if n.kind == kind and n.width == width), key=place)
            if len(row) < 2:
                turned = True
                continue
            if rightward == turned:
                row.reverse()
            for giver, taker in itertools.pairwise(row):
                taker.lateral = giver.id
            turned = False


def _post_order(nodes: list[Node]) -> list[int]:
    """Depth first from the root, inputs before the node that needs them."""
    order: list[int] = []

    def visit(node: Node) -> None:
        if node.id not in order:
            for child in node.inputs:
                visit(nodes[child])
            order.append(node.id)

    visit(nodes[0])
    return order
