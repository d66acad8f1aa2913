"""What holds for a token tree after any sequence of operations."""

import math

import numpy as np
import pytest
import torch

from kernels.layout import DEPTH_LIMIT
from kernels.reference import insert_children, new_tree, reroot, select_nodes


def path_of(tree, node: int) -> list[int]:
    return [ancestor for ancestor in tree.paths[node].tolist() if ancestor >= 0]


def check_invariants(tree) -> None:
    """What the loop relies on after every operation."""
    n = int(tree.num_nodes)
    assert 1 <= n <= len(tree.tokens)
    assert tree.parents[0] == -1 and tree.depths[0] == 0 and tree.edge_scores[0] == tree.path_scores[0] == 0
    children = set()
    for node in range(n):
        parent = int(tree.parents[node])
        assert path_of(tree, node) == (path_of(tree, parent) if node else []) + [node]
        assert (tree.paths[node, int(tree.depths[node]) + 1 :] == -1).all()
        if node:
            assert 0 <= parent < node and tree.depths[node] == tree.depths[parent] + 1
            assert tree.path_scores[node] == tree.path_scores[parent] + tree.edge_scores[node]
            assert tree.path_scores[node] <= tree.path_scores[parent]
            assert tree.scored[parent] >= tree.sources[node] >= 0
            children.add((parent, int(tree.tokens[node])))
    assert len(children) == n - 1, "two children of one node carry the same token"


def check_selection(tree, stage: int, nodes: torch.Tensor, width: int) -> None:
    """Closed under parents: a chosen node's parent is chosen or scored already."""
    chosen = set(nodes.tolist())
    assert len(chosen) == len(nodes) <= width
    for node in chosen - {0}:
        parent = int(tree.parents[node])
        assert parent in chosen or tree.scored[parent] >= stage


def random_step(tree, rng: np.random.Generator, vocab_size: int) -> None:
    """Score some nodes by a random stage, or walk to a random node and re-root there or on a new token."""
    if rng.random() < 0.8:
        stage, width, count = int(rng.integers(3)), int(rng.integers(1, 9)), int(rng.integers(1, vocab_size + 1))
        max_depth = int(rng.integers(1, DEPTH_LIMIT + 1))
        nodes = select_nodes(tree, stage, width, max_depth - 1)
        check_selection(tree, stage, nodes, width)
        tokens = np.stack([rng.permutation(vocab_size)[:count] for _ in nodes]) if len(nodes) else np.empty((0, count))
        scores = -rng.exponential(size=tokens.shape)
        scores[rng.random(tokens.shape) < 0.1] = -math.inf
        scores[rng.random(tokens.shape) < 0.2] = 0.0
        insert_children(tree, stage, nodes, torch.from_numpy(tokens).int(), torch.from_numpy(scores).float(), max_depth)
    else:
        reroot(tree, int(rng.integers(int(tree.num_nodes))), int(rng.integers(vocab_size)))


@pytest.mark.parametrize("capacity", [1, 2, 13, 200])
def test_invariants_hold_after_any_operations(capacity):
    """300 random steps over a small vocabulary, so that guesses merge, are rejected and are re-rooted onto often."""
    rng, tree = np.random.default_rng(capacity), new_tree(capacity, root=0)
    for _ in range(300):
        random_step(tree, rng, vocab_size=4)
        check_invariants(tree)
