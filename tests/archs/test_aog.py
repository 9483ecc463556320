"""The grammar against the published graphs, and against its own definition where no graph is published."""

import json
import pathlib
import random
import sys

import pytest

from anorm.archs import aog

GRAPHS = json.loads((pathlib.Path(__file__).parent / "arrays" / "aog_graphs.json").read_text())
EVERY = [(dim, symmetry) for dim in range(1, 9) for symmetry in (0, 1, 2)]


@pytest.mark.parametrize("name", GRAPHS)
def test_published_graph(name):
    dim, symmetry, lateral = (int(part[-1]) for part in name.split("_"))
    published = GRAPHS[name]
    grammar = aog.build(dim, symmetry, bool(lateral))
    assert grammar.order == published["DFS"]
    assert len(grammar.nodes) == len(published["nodes"])
    for node, want in zip(grammar.nodes, published["nodes"], strict=True):
        split = [node.split, node.width - node.split] if node.split else None
        assert (node.id, node.kind, node.start, node.end, split) == tuple(
            want[k] for k in ("id", "type", "x1", "x2", "split")
        )
        assert node.inputs == want["children_in_order"]
        assert sorted(node.parents) == sorted(want["parents"])
        assert node.paths == want["npaths"]


@pytest.mark.parametrize("dim, symmetry", EVERY)
def test_order_is_a_schedule(dim, symmetry):
    grammar = aog.build(dim, symmetry)
    done: set[int] = set()
    for i in grammar.order:
        assert done.issuperset(grammar.nodes[i].inputs)
        done.add(i)
    assert len(grammar.order) == len(grammar.nodes) and grammar.order[-1] == 0


@pytest.mark.parametrize("dim, symmetry", EVERY)
def test_children_tile_their_parent(dim, symmetry):
    for node in (grammar := aog.build(dim, symmetry)).nodes:
        children = [grammar.nodes[c] for c in node.children]
        if node.kind == aog.AND:
            left, right = sorted(children, key=lambda c: c.start)
            assert (left.start, left.end + 1, right.end) == (node.start, right.start, node.end)
            assert left.kind == right.kind == aog.OR and left.width == node.split
        elif node.kind == aog.OR:
            assert all((c.start, c.end) == (node.start, node.end) for c in children)
            assert [c.kind for c in children].count(aog.T) == 1
        else:
            assert not children and node.lateral is None


@pytest.mark.parametrize("dim", range(2, 9))
def test_symmetry_halves_the_splits(dim):
    def root_splits(symmetry):
        nodes = aog.build(dim, symmetry).nodes
        return [nodes[c].split for c in sorted(nodes[0].children) if nodes[c].kind == aog.AND]

    assert root_splits(0) == list(range(1, dim))
    assert root_splits(1) == [left for left in range(1, dim) if left <= dim - left]
    assert root_splits(2) == [left for left in range(dim - 1, 0, -1) if left >= dim - left]


@pytest.mark.parametrize("dim, symmetry", EVERY)
def test_paths_count_parse_paths(dim, symmetry):
    """Brute force: walk every path from the root."""
    grammar = aog.build(dim, symmetry)
    seen = [0] * len(grammar.nodes)

    def walk(i):
        seen[i] += 1
        for child in grammar.nodes[i].children:
            walk(child)

    walk(0)
    assert seen == [node.paths for node in grammar.nodes]


def test_residual_scales_of_the_shipped_graph():
    grammar = aog.build(4, symmetry=1)
    scales = {
        n.id: [grammar.residual_scale(n, c) for c in n.children] for n in grammar.nodes if n.kind == aog.AND
    }
    assert scales == {2: [0.5, 1.0], 3: [1.0, 0.5], 10: [0.5, 0.5], 12: [0.5, 0.5], 14: [1.0, 1.0]}
    assert [n.id for n in grammar.nodes if grammar.lateral_in_residual(n)] == [12, 16]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="compares with CPython's own hash table")
def test_hash_order_is_that_of_a_set():
    draw = random.Random(0)
    for size in [1, 2, 2, 2, 3, 4, 5, 6, 7, 9, 20, 60] * 40:
        ids = draw.sample(range(draw.choice([size, 20, 200, 10000]) + size), size)
        assert aog.hash_order(ids) == list(set(ids))


@pytest.mark.parametrize("arguments, words", [((0,), "dim >= 1"), ((4, 3), "symmetry")])
def test_wrong_arguments_are_said(arguments, words):
    with pytest.raises(ValueError, match=words):
        aog.build(*arguments)
