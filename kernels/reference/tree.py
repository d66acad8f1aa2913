"""Torch twins of the tree operations. Trees are small, so the twins walk them node by node on the host.

Every function changes the ``Tree`` it is given in place. Order is always (path score falling, index rising); since a
child's path score never exceeds its parent's and its index is higher, a parent always comes before its child.
"""

import math

import numpy as np
import torch

from kernels.layout import DEPTH_LIMIT, Tree
from kernels.reference.compiled import compiled, in_numpy


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


def select_nodes(
    tree: Tree, stage: int, width: int, max_depth: int | torch.Tensor, min_score: float = -math.inf
) -> torch.Tensor:
    """The ``width`` best nodes that ``stage`` has not scored, by path score: int32 [<= width], rising;
    on a GPU, where shapes are fixed, [width] with -1 behind them.

    Nodes deeper than ``max_depth`` (a number, or an int32 tensor whose first element counts), nodes whose path score is
    not above ``min_score`` and nodes below a rejected edge (score -inf) are never taken. What is returned together with
    what ``stage`` has scored, or another in its place, is closed under taking parents.
    """
    return torch.from_numpy(select(in_numpy(tree), stage, width, _number(max_depth), np.float32(min_score)))


@compiled
def select(tree, stage, width, max_depth, min_score):
    found, count = np.empty(tree.num_nodes[0], np.int32), 0
    for node in range(len(found)):
        if tree.scored[node] < stage and tree.depths[node] <= max_depth and tree.path_scores[node] > min_score:
            found[count] = node
            count += 1
    if count <= width or width == 0:
        return found[: min(count, width)]
    least = np.partition(tree.path_scores[found[:count]], count - width)[count - width]
    num_above = 0
    for node in found[:count]:
        num_above += tree.path_scores[node] > least
    kept, room = 0, width - num_above  # for those that equal the last, lowest index first
    for node in found[:count]:
        score = tree.path_scores[node]
        if score > least or (score == least and room > 0):
            room -= score == least
            found[kept] = node
            kept += 1
    return found[:kept]


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
    levels = torch.full_like(nodes, stage) if levels is None else levels
    columns = (nodes.numpy(), children.numpy(), scores.numpy(), levels.numpy())
    insert(in_numpy(tree), stage, *columns, min(_number(max_depth), DEPTH_LIMIT))


@compiled
def insert(tree, stage, nodes, children, scores, levels, max_depth):
    n = tree.num_nodes[0]
    first, sibling = np.full(n, -1, np.int32), np.full(n, -1, np.int32)  # the children that each node has by now
    for child in range(n - 1, 0, -1):
        sibling[child] = first[tree.parents[child]]
        first[tree.parents[child]] = child
    for row in range(len(nodes)):
        node = nodes[row]
        tree.scored[node] = max(levels[row], stage)
        child = first[node]
        while child >= 0:
            tree.edge_scores[child] = -np.inf
            child = sibling[child]
        for column in range(children.shape[1]):
            token, score = children[row, column], scores[row, column]
            if np.isnan(score):
                tree.failed[0] = stage + 1
            if not score > -np.inf or tree.depths[node] >= max_depth:
                continue
            child = first[node]
            while child >= 0 and tree.tokens[child] != token:
                child = sibling[child]
            if child >= 0:
                tree.edge_scores[child] = score
                tree.sources[child] = min(tree.sources[child], stage)
            elif n < len(tree.tokens):
                depth = tree.depths[node] + 1
                tree.tokens[n], tree.parents[n], tree.depths[n] = token, node, depth
                tree.edge_scores[n], tree.sources[n], tree.scored[n] = score, stage, -1
                for level in range(tree.paths.shape[1]):
                    tree.paths[n, level] = tree.paths[node, level] if level < depth else -1
                tree.paths[n, depth] = n
                n += 1
    tree.num_nodes[0] = n
    for node in range(1, n):  # parents first
        tree.path_scores[node] = tree.path_scores[tree.parents[node]] + tree.edge_scores[node]


def _number(value: int | torch.Tensor) -> int:
    return value if isinstance(value, int) else int(value.numpy()[0])


def reroot(tree: Tree, last_accepted: int, next_token: int) -> torch.Tensor:
    """Make ``next_token`` below node ``last_accepted`` the root; keep the subtree that lower stages have built there.

    Returns the old index of every node of the new tree, int32 [num_nodes]; -1 for a root that no stage had proposed.
    """
    return torch.from_numpy(move_root(in_numpy(tree), last_accepted, next_token))


@compiled
def move_root(tree, last_accepted, next_token):
    n = tree.num_nodes[0]
    kept, renamed = np.full(max(n, 1), -1, np.int32), np.full(n + 1, -1, np.int32)  # one more for the -1 of paths
    count, up = 0, 0
    for node in range(n):  # each moves to a lower index or stays
        parent, edge = tree.parents[node], tree.edge_scores[node]
        if count == 0:
            if parent != last_accepted or tree.tokens[node] != next_token:
                continue
            up, edge = tree.depths[node], np.float32(0)
        elif parent < 0 or renamed[parent] < 0 or edge == -np.inf:
            continue
        kept[count], renamed[node] = node, count
        tree.tokens[count], tree.sources[count] = tree.tokens[node], tree.sources[node]
        tree.scored[count], tree.edge_scores[count] = tree.scored[node], edge
        tree.parents[count] = renamed[parent] if count else -1
        tree.path_scores[count] = tree.path_scores[tree.parents[count]] + edge if count else edge
        depth, length = tree.depths[node] - up, tree.paths.shape[1]
        tree.depths[count] = depth
        for level in range(length):
            tree.paths[count, level] = renamed[tree.paths[node, level + up]] if level <= depth else -1
        count += 1
    if count == 0:
        tree.tokens[0], tree.scored[0], tree.parents[0], tree.depths[0] = next_token, -1, -1, 0
        tree.edge_scores[0] = tree.path_scores[0] = 0
        tree.paths[0] = -1
        tree.paths[0, 0] = 0
        count = 1
    tree.num_nodes[0] = count
    return kept[:count]
