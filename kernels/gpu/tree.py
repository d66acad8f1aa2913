"""Growth of the token tree on the device: which nodes a stage scores next, and what its verdict does to the tree.

One program each: a tree has a few hundred nodes, and what costs is the number of launches and of dependent loads.
Stores that other threads of the program read are separated from those reads by a barrier.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch, require
from kernels.gpu.order import best, order
from kernels.layout import DEPTH_LIMIT, RECORD, Chain, Progress, Tree

PATH = DEPTH_LIMIT + 1
BLOCK_PATH = triton.next_power_of_2(PATH)


@triton.jit
def choose(
    path_scores_ptr,
    depths_ptr,
    scored_ptr,
    num_nodes_ptr,
    max_depth_ptr,
    nodes_ptr,
    stage,
    min_score,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Store the WIDTH best free nodes, rising, then -1."""
    lane = tl.arange(0, BLOCK)
    live = lane < tl.load(num_nodes_ptr)
    score = tl.load(path_scores_ptr + lane, mask=live, other=float("-inf"))
    free = live & (score > min_score) & (tl.load(scored_ptr + lane, mask=live, other=0) < stage)
    free = free & (tl.load(depths_ptr + lane, mask=live, other=0) <= tl.load(max_depth_ptr))
    keys = tl.where(free, order(score), -2147483648)
    chosen = best(keys, free, WIDTH, 32)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    offs = tl.arange(0, BLOCK_WIDTH)
    tl.store(nodes_ptr + offs, -1, mask=(offs < WIDTH) & (offs >= tl.sum(chosen.to(tl.int32))))
    tl.store(nodes_ptr + place, lane, mask=chosen)


@triton.jit(do_not_specialize=["stage", "min_score"])
def _select_kernel(
    path_scores_ptr,  # float32 [M]
    depths_ptr,  # int32 [M]
    scored_ptr,  # int32 [M]
    num_nodes_ptr,  # int32 [1]
    max_depth_ptr,  # int32 [any], the first one counts
    nodes_ptr,  # int32 [WIDTH], written
    stage,
    min_score,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Grid (1,)."""
    wait_for_previous()
    choose(
        path_scores_ptr,
        depths_ptr,
        scored_ptr,
        num_nodes_ptr,
        max_depth_ptr,
        nodes_ptr,
        stage,
        min_score,
        WIDTH,
        BLOCK,
        BLOCK_WIDTH,
    )


def select_nodes(
    tree: Tree, stage: int, width: int, max_depth: torch.Tensor, min_score: float = -math.inf
) -> torch.Tensor:
    """The ``width`` best nodes that ``stage`` has not scored: int32 [width], rising, then -1. One launch.

    ``max_depth`` is an int32 tensor whose first element counts; see ``kernels.reference``.
    """
    device = tree.tokens.device
    require_tree(tree)
    require("max_depth", max_depth, (None,), torch.int32, device)
    nodes = torch.empty(width, dtype=torch.int32, device=device)
    launch(
        _select_kernel,
        (1,),
        {
            "path_scores_ptr": tree.path_scores,
            "depths_ptr": tree.depths,
            "scored_ptr": tree.scored,
            "num_nodes_ptr": tree.num_nodes,
            "max_depth_ptr": max_depth,
            "nodes_ptr": nodes,
            "stage": stage,
            "min_score": float(min_score),
        },
        {
            "WIDTH": width,
            "BLOCK": triton.next_power_of_2(len(tree.tokens)),
            "BLOCK_WIDTH": triton.next_power_of_2(width),
        },
    )
    return nodes


@triton.jit
def sum_paths(paths_ptr, edges_ptr, path_scores_ptr, depths_ptr, num_nodes, PATH: tl.constexpr, BLOCK: tl.constexpr):
    """Path scores of all nodes: edges added from the root down, as a parent's score plus the node's own edge."""
    node = tl.arange(0, BLOCK)
    live = node < num_nodes
    depth = tl.load(depths_ptr + node, mask=live, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for d in range(1, tl.max(depth) + 1):
        mask = live & (depth >= d)
        ancestor = tl.load(paths_ptr + node * PATH + d, mask=mask, other=0)
        total += tl.load(edges_ptr + ancestor, mask=mask, other=0.0)
    tl.store(path_scores_ptr + node, total, mask=live)


@triton.jit
def insert(
    tokens_ptr,
    parents_ptr,
    depths_ptr,
    edges_ptr,
    path_scores_ptr,
    sources_ptr,
    scored_ptr,
    paths_ptr,
    num_nodes_ptr,
    failed_ptr,
    nodes_ptr,
    children_ptr,
    scores_ptr,
    levels_ptr,
    max_depth_ptr,
    stage,
    M: tl.constexpr,
    W: tl.constexpr,
    CHILDREN: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_PATH: tl.constexpr,
):
    """Entry e is child e % CHILDREN of node e / CHILDREN; newcomers are numbered in the order of entries."""
    entry = tl.arange(0, BLOCK_ENTRIES)
    exists = entry < W * CHILDREN
    node = tl.load(nodes_ptr + entry // CHILDREN, mask=exists, other=-1)
    exists = exists & (node >= 0)
    token = tl.load(children_ptr + entry, mask=exists, other=-1)
    score = tl.load(scores_ptr + entry, mask=exists, other=float("-inf"))
    depth = tl.load(depths_ptr + node, mask=exists, other=0)
    num_nodes = tl.load(num_nodes_ptr)
    valid = exists & (score > float("-inf")) & (depth < tl.minimum(tl.load(max_depth_ptr), PATH - 1))
    tl.store(failed_ptr, stage + 1, mask=tl.max((exists & (score != score)).to(tl.int32)) > 0)
    level = tl.full((BLOCK_ENTRIES,), stage, tl.int32)
    if levels_ptr is not None:
        level = tl.maximum(level, tl.load(levels_ptr + entry // CHILDREN, mask=exists, other=0))
    tl.store(scored_ptr + node, level, mask=exists)

    # guesses of lower stages: those that this stage ranks keep their index, the others are rejected
    index = tl.full((BLOCK_ENTRIES,), -1, tl.int32)
    for start in range(0, num_nodes, CHUNK):
        other = start + tl.arange(0, CHUNK)
        live = (other > 0) & (other < num_nodes)
        parent = tl.load(parents_ptr + other, mask=live, other=-2)
        child = tl.load(tokens_ptr + other, mask=live, other=-2)
        below = exists[:, None] & (node[:, None] == parent[None, :])
        tl.store(edges_ptr + other, float("-inf"), mask=live & (tl.max(below.to(tl.int32), 0) > 0))
        same = below & valid[:, None] & (token[:, None] == child[None, :])
        index = tl.maximum(index, tl.max(tl.where(same, other[None, :], -1), 1))
    tl.debug_barrier()

    known = index >= 0
    new = valid & (index < 0)
    place = num_nodes + tl.cumsum(new.to(tl.int32), 0) - 1
    new = new & (place < M)
    index = tl.where(new, place, index)
    old_source = tl.load(sources_ptr + index, mask=known, other=stage)
    tl.store(edges_ptr + index, score, mask=known | new)
    tl.store(sources_ptr + index, tl.minimum(old_source, stage), mask=known | new)
    tl.store(tokens_ptr + index, token, mask=new)
    tl.store(parents_ptr + index, node, mask=new)
    tl.store(depths_ptr + index, depth + 1, mask=new)
    tl.store(scored_ptr + index, -1, mask=new)
    tl.debug_barrier()

    # paths of the newcomers: their parents', and themselves
    d = tl.arange(0, BLOCK_PATH)[None, :]
    count = num_nodes + tl.sum(new.to(tl.int32))
    for start in range(num_nodes, count, CHUNK):
        member = start + tl.arange(0, CHUNK)[:, None]
        live = member < count
        own = tl.load(depths_ptr + member, mask=live, other=0)
        parent = tl.load(parents_ptr + member, mask=live, other=0)
        path = tl.load(paths_ptr + parent * PATH + d, mask=live & (d < own), other=-1)
        tl.store(paths_ptr + member * PATH + d, tl.where(d == own, member, path), mask=live & (d < PATH))
    tl.store(num_nodes_ptr, count)
    tl.debug_barrier()
    sum_paths(paths_ptr, edges_ptr, path_scores_ptr, depths_ptr, count, PATH, BLOCK)


@triton.jit(do_not_specialize=["stage"])
def _insert_kernel(
    tokens_ptr,  # int32 [M]
    parents_ptr,  # int32 [M]
    depths_ptr,  # int32 [M]
    edges_ptr,  # float32 [M]
    path_scores_ptr,  # float32 [M]
    sources_ptr,  # int32 [M]
    scored_ptr,  # int32 [M]
    paths_ptr,  # int32 [M, PATH]
    num_nodes_ptr,  # int32 [1]
    failed_ptr,  # int32 [1]
    nodes_ptr,  # int32 [W], -1 = none
    children_ptr,  # int32 [W, CHILDREN]
    scores_ptr,  # float32 [W, CHILDREN]
    levels_ptr,  # int32 [W] or None
    max_depth_ptr,  # int32 [any], the first one counts
    stage,
    M: tl.constexpr,
    W: tl.constexpr,
    CHILDREN: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK: tl.constexpr,  # of nodes
    CHUNK: tl.constexpr,  # of nodes at a time
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_PATH: tl.constexpr,
):
    """Grid (1,)."""
    wait_for_previous()
    insert(
        tokens_ptr,
        parents_ptr,
        depths_ptr,
        edges_ptr,
        path_scores_ptr,
        sources_ptr,
        scored_ptr,
        paths_ptr,
        num_nodes_ptr,
        failed_ptr,
        nodes_ptr,
        children_ptr,
        scores_ptr,
        levels_ptr,
        max_depth_ptr,
        stage,
        M,
        W,
        CHILDREN,
        PATH,
        BLOCK,
        CHUNK,
        BLOCK_ENTRIES,
        BLOCK_PATH,
    )


def insert_children(
    tree: Tree,
    stage: int,
    nodes: torch.Tensor,  # int32 [W], the nodes that ``stage`` has just scored, -1 = none
    children: torch.Tensor,  # int32 [W, m]
    scores: torch.Tensor,  # float32 [W, m], edge scores, -inf = no child
    max_depth: torch.Tensor,  # int32, the first element counts
    levels: torch.Tensor | None = None,  # int32 [W], stages whose scoring this replaces, where higher than ``stage``
) -> None:
    """Give each node the children that ``stage`` ranks best; see ``kernels.reference``. One launch."""
    device = tree.tokens.device
    require_tree(tree)
    require("nodes", nodes, (None,), torch.int32, device)
    require("children", children, (len(nodes), None), torch.int32, device)
    require("scores", scores, tuple(children.shape), torch.float32, device)
    require("max_depth", max_depth, (None,), torch.int32, device)
    if levels is not None:
        require("levels", levels, (len(nodes),), torch.int32, device)
    launch(
        _insert_kernel,
        (1,),
        {
            **tree_pointers(tree),
            "nodes_ptr": nodes,
            "children_ptr": children,
            "scores_ptr": scores,
            "levels_ptr": levels,
            "max_depth_ptr": max_depth,
            "stage": stage,
        },
        insert_constants(tree, children),
        num_warps=8,
        all_registers=True,
    )


def insert_constants(tree: Tree, children: torch.Tensor) -> dict[str, int]:
    """Constants of ``insert`` for ``children`` [W, m]."""
    capacity = len(tree.tokens)
    return {
        "M": capacity,
        "W": len(children),
        "CHILDREN": children.shape[1],
        "PATH": PATH,
        "BLOCK": triton.next_power_of_2(capacity),
        "CHUNK": max(4, min(64, 8192 // triton.next_power_of_2(children.numel()))),
        "BLOCK_ENTRIES": triton.next_power_of_2(children.numel()),
        "BLOCK_PATH": BLOCK_PATH,
    }


def tree_pointers(tree: Tree) -> dict[str, torch.Tensor]:
    """The columns of ``tree`` under the names that kernels give them."""
    names = {"edge_scores": "edges"}
    return {f"{names.get(name, name)}_ptr": column for name, column in tree._asdict().items()}


def require_tree(tree: Tree) -> None:
    """Raise ValueError unless every column of ``tree`` is what the kernels read."""
    capacity, device = len(tree.tokens), tree.tokens.device
    for name, column in tree._asdict().items():
        shape = {"paths": (capacity, PATH), "num_nodes": (1,), "failed": (1,)}.get(name, (capacity,))
        require(name, column, shape, torch.float32 if name.endswith("scores") else torch.int32, device)


def require_progress(progress: Progress, device: torch.device) -> None:
    """Raise ValueError unless every column of ``progress`` is what the kernels read."""
    shapes = {"reach": (len(progress.contexts), 4), "record": (RECORD,)}
    shapes |= dict.fromkeys(("length", "end", "max_depth", "state"), (1,))
    for name, column in progress._asdict().items():
        require(name, column, shapes.get(name, (None,)), torch.int32, device)


def require_chain(chain: Chain, capacity: int, device: torch.device) -> None:
    """Raise ValueError unless every column of ``chain`` is what the kernels read, for trees of ``capacity`` nodes."""
    num_caches = len(chain.page_tables)
    shapes = {"page_tables": (num_caches, None), "cached_len": (num_caches,)}
    for name, column in chain._asdict().items():
        require(name, column, shapes.get(name, (num_caches, capacity)), torch.int32, device)
