"""Torch twins of the tree operations. Trees are small, so the twins walk them in numpy on the host.

Every function changes the ``Tree`` it is given in place. Order is always (path score falling, index rising); since a
child's path score never exceeds its parent's and its index is higher, a parent always comes before its child.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from kernels.layout import DEPTH_LIMIT, Tree


def new_tree(capacity: int, device: torch.device | str = "cpu", root: int | None = None) -> Tree:
    """A tree with room for ``capacity`` nodes: empty, or ``root``'s token alone."""
    integers = {"dtype": torch.int32, "device": device}
    floats = {"dtype": torch.float32, "device": device}
    tree = Tree(
        tokens=torch.full((capacity,), -1, **integers),
        parents=torch.full((capacity,), -1, **integers),
        depths=torch.zeros(capacity, **integers),
        edge_scores=torch.zeros(capacity, **floats),
        path_scores=torch.zeros(capacity, **floats),
        sources=torch.zeros(capacity, **integers),
        scored=torch.full((capacity,), -1, **integers),
        paths=torch.full((capacity, DEPTH_LIMIT + 1), -1, **integers),
        num_nodes=torch.zeros(1, **integers),
        failed=torch.zeros(1, **integers),
    )
    if root is not None:
        tree.tokens[0], tree.paths[0, 0], tree.num_nodes[0] = root, 0, 1
    return tree


def in_numpy(columns: NamedTuple) -> NamedTuple:
    """The same structure over numpy views of its tensors, which must lie on the host; other members stay."""
    return type(columns)(*(column.numpy() if isinstance(column, torch.Tensor) else column for column in columns))


def select_nodes(
    tree: Tree, stage: int, width: int, max_depth: int | torch.Tensor, min_score: float = -math.inf
) -> torch.Tensor:
    """The ``width`` best nodes that ``stage`` has not scored, by path score: int32 [<= width], rising.

    Nodes deeper than ``max_depth`` (a number, or an int32 tensor whose first element counts), nodes whose path score is
    not above ``min_score`` and nodes below a rejected edge (score -inf) are never taken. What is returned together with
    what ``stage`` has scored, or another in its place, is closed under taking parents.
    """
    tree = in_numpy(tree)
    n = tree.num_nodes[0]
    scores = tree.path_scores[:n]
    free = (tree.scored[:n] < stage) & (tree.depths[:n] <= _number(max_depth)) & (scores > np.float32(min_score))
    nodes = np.flatnonzero(free)
    best = nodes[np.argsort(-scores[nodes], kind="stable")[:width]]
    return torch.from_numpy(np.sort(best).astype(np.int32))


def insert_children(
    tree: Tree,
    stage: int,
    nodes: torch.Tensor,  # int32 [n], the nodes that ``stage`` has just scored
    children: torch.Tensor,  # int32 [n, m]
    scores: torch.Tensor,  # float32 [n, m], edge scores, -inf = no child
    max_depth: int | torch.Tensor,
    levels: torch.Tensor | None = None,  # int32 [n], stages whose scoring this replaces, where higher than ``stage``
) -> None:
    """Give each node the children that ``stage`` ranks best.

    A child that a lower stage had guessed keeps its index and its subtree and takes the new edge score; a guess that
    the stage does not rank is rejected (edge score -inf, and so is its subtree). Path scores of all descendants follow.
    When the tree is full, further children are dropped. A NaN score marks the tree as failed.
    """
    tree, max_depth = in_numpy(tree), _number(max_depth)
    nodes, children, scores = nodes.numpy(), children.numpy(), scores.numpy()
    if np.isnan(scores).any():
        tree.failed[0] = stage + 1
    n = int(tree.num_nodes[0])
    tree.scored[nodes] = stage if levels is None else np.maximum(levels.numpy(), stage)
    allowed = (scores > -np.inf) & (tree.depths[nodes] < max_depth)[:, None]
    guessed = _children_of(tree, nodes)
    if len(guessed):
        allowed &= ~_rescore(tree, stage, nodes, children, scores, allowed, guessed)
    row, column = (index[: len(tree.tokens) - n] for index in np.nonzero(allowed))
    parents, new = nodes[row], np.arange(n, n + len(row))
    tree.tokens[new], tree.edge_scores[new] = children[row, column], scores[row, column]
    tree.parents[new], tree.depths[new] = parents, tree.depths[parents] + 1
    tree.sources[new], tree.scored[new] = stage, -1
    tree.paths[new] = tree.paths[parents]
    tree.paths[new, tree.depths[new]] = new
    tree.num_nodes[0] = n + len(row)
    if len(guessed):
        sum_paths(tree)
    else:  # no other path has changed
        tree.path_scores[new] = tree.path_scores[parents] + tree.edge_scores[new]


def _children_of(tree: Tree, nodes: np.ndarray) -> np.ndarray:
    """Indices of all children of ``nodes``."""
    is_parent = np.zeros(len(tree.tokens) + 1, dtype=bool)  # one more for the -1 of the root
    is_parent[nodes] = True
    return np.flatnonzero(is_parent[tree.parents[: tree.num_nodes[0]]])


def _rescore(tree: Tree, stage: int, nodes, children, scores, allowed, guessed: np.ndarray) -> np.ndarray:
    """Give ``guessed``, all children of ``nodes``, the edge scores of this stage; which entries [n, m] they are."""
    known = np.zeros(allowed.shape, dtype=bool)
    parents, tokens = tree.parents[guessed].tolist(), tree.tokens[guessed].tolist()
    index_of = dict(zip(zip(parents, tokens, strict=True), guessed.tolist(), strict=True))
    tree.edge_scores[guessed] = -np.inf
    for row, node in enumerate(nodes.tolist()):
        for column, token in enumerate(children[row].tolist()):
            index = index_of.get((node, token))
            if index is not None and allowed[row, column]:
                known[row, column] = True
                tree.edge_scores[index] = scores[row, column]
                tree.sources[index] = min(tree.sources[index], stage)
    return known


def _number(value: int | torch.Tensor) -> int:
    return value if isinstance(value, int) else value.numpy()[0]


def sum_paths(tree: Tree) -> None:
    """Path scores from edge scores, level by level; ``tree`` holds numpy columns."""
    n = tree.num_nodes[0]
    parents, depths = tree.parents[:n], tree.depths[:n]
    edges, sums = tree.edge_scores[:n], tree.path_scores[:n]
    for depth in range(1, int(depths.max(initial=0)) + 1):
        level = np.flatnonzero(depths == depth)
        sums[level] = sums[parents[level]] + edges[level]


def reroot(tree: Tree, last_accepted: int, next_token: int) -> torch.Tensor:
    """Make ``next_token`` below node ``last_accepted`` the root; keep the subtree that lower stages have built there.

    Returns the old index of every node of the new tree, int32 [num_nodes]; -1 for a root that no stage had proposed.
    """
    tree = in_numpy(tree)
    n = tree.num_nodes[0]
    parents, edges = tree.parents[:n], tree.edge_scores[:n]
    below = np.flatnonzero((parents == last_accepted) & (tree.tokens[:n] == next_token))
    inside = np.zeros(n, dtype=bool)
    inside[below] = True
    kept = [int(below[0])] if len(below) else [-1]
    for node in range(kept[0] + 1, n) if len(below) else ():
        if inside[parents[node]] and edges[node] > -np.inf:
            inside[node] = True
            kept.append(node)
    old = np.array(kept, dtype=np.int32)
    count = len(old)
    if len(below):
        renamed = np.full(n + 1, -1, dtype=np.int32)
        renamed[old] = np.arange(count, dtype=np.int32)
        depth = int(tree.depths[old[0]])
        for column in (tree.tokens, tree.depths, tree.edge_scores, tree.sources, tree.scored):
            column[:count] = column[old]
        tree.depths[:count] -= depth
        tree.parents[:count] = renamed[parents[old]]
        shifted = np.full((count, DEPTH_LIMIT + 1), -1, dtype=np.int32)
        shifted[:, : DEPTH_LIMIT + 1 - depth] = renamed[tree.paths[old][:, depth:]]
        tree.paths[:count] = shifted
    else:
        tree.tokens[0], tree.scored[0] = next_token, -1
        tree.paths[0] = -1
        tree.paths[0, 0] = 0
    tree.parents[0], tree.depths[0] = -1, 0
    tree.edge_scores[0] = tree.path_scores[0] = 0.0
    tree.num_nodes[0] = count
    sum_paths(tree)
    return torch.from_numpy(old)
