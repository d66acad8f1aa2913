"""What a stage has just drawn, remembered for draft² in a small table that lives as long as the generation."""

import torch
import triton
import triton.language as tl

from kernels.gpu.contexts import CONTEXTS, context_keys, hash_context
from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch, require
from kernels.gpu.lookup import require_recent
from kernels.gpu.tree import require_progress, require_tree
from kernels.layout import LEAST_REST, Progress, RecentTable, Tree


@triton.jit(do_not_specialize=["num_recent", "level"])
def _learn_kernel(
    nodes_ptr,  # int32 [W], -1 = none
    tree_tokens_ptr,  # int32 [M]
    depths_ptr,  # int32 [M]
    paths_ptr,  # int32 [M, PATH]
    text_ptr,  # int32 [any]
    length_ptr,  # int32 [1]
    children_ptr,  # int32 [W, CHILDREN]
    log_probs_ptr,  # float32 [W, CHILDREN]
    recent_keys_ptr,  # int64 [recent], written, as all below
    recent_tokens_ptr,  # int32 [recent, RECENT_WIDTH]
    recent_log_probs_ptr,  # float32 [recent, RECENT_WIDTH]
    recent_log_rest_ptr,  # float32 [recent]
    recent_levels_ptr,  # int32 [recent]
    num_recent,  # a power of two
    level,
    PATH: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_CONTEXTS: tl.constexpr,
    W: tl.constexpr,
    CHILDREN: tl.constexpr,
    RECENT_WIDTH: tl.constexpr,
    LEAST_REST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (1,): all nodes after 2, 4, ... tokens; of those that fall into one bucket the last one writes, unless a
    better row is there."""
    wait_for_previous()
    w = tl.arange(0, BLOCK_W)
    node = tl.load(nodes_ptr + w, mask=w < W, other=-1)
    exists = node >= 0
    length = tl.load(length_ptr)
    depth = tl.load(depths_ptr + node, mask=exists, other=0)
    lane = tl.arange(0, BLOCK)[None, :]
    has = exists[:, None] & (lane < CHILDREN) & (lane < RECENT_WIDTH)
    token = tl.load(children_ptr + w[:, None] * CHILDREN + lane, mask=has, other=0)
    log_prob = tl.load(log_probs_ptr + w[:, None] * CHILDREN + lane, mask=has, other=float("-inf"))
    rest = tl.log(tl.maximum(1.0 - tl.sum(tl.exp(log_prob), 1), LEAST_REST))
    exists = exists & (tl.max((log_prob > float("-inf")).to(tl.int32), 1) > 0)
    keys, live, _ = context_keys(
        node, exists, depth, length, tree_tokens_ptr, paths_ptr, text_ptr, PATH, LONGEST, BLOCK_CONTEXTS
    )
    slots = hash_context(keys, num_recent)
    held = tl.load(recent_keys_ptr + slots, mask=live, other=-1) == keys
    live = live & ~(held & (tl.load(recent_levels_ptr + slots, mask=live, other=0) > level))
    slots = tl.where(live, slots, -1)
    context = tl.arange(0, BLOCK_CONTEXTS)[None, :]
    for i in tl.static_range(BLOCK_CONTEXTS):
        tl.debug_barrier()  # what is in the buckets has been read; a longer context is written after a shorter one
        slot = tl.max(tl.where(context == i, slots, -1), 1)
        later = (slot[:, None] == slot[None, :]) & (w[:, None] < w[None, :])
        last = (slot >= 0) & (tl.max(later.to(tl.int32), 1) == 0)
        target = slot[:, None] * RECENT_WIDTH + lane
        tl.store(recent_keys_ptr + slot, tl.max(tl.where(context == i, keys, -1), 1), mask=last)
        tl.store(recent_log_rest_ptr + slot, rest, mask=last)
        tl.store(recent_levels_ptr + slot, tl.full((BLOCK_W,), level, tl.int32), mask=last)
        tl.store(recent_tokens_ptr + target, token, mask=has & last[:, None])
        tl.store(recent_log_probs_ptr + target, log_prob, mask=last[:, None] & (lane < RECENT_WIDTH))


def learn(
    recent: RecentTable,
    tree: Tree,
    nodes: torch.Tensor,  # int32 [W], -1 = none
    progress: Progress,
    children: torch.Tensor,  # int32 [W, m]
    log_probs: torch.Tensor,  # float32 [W, m], of the children, at the generation's temperature, without noise
    level: int = 0,
) -> None:
    """Remember what a stage has just drawn at ``nodes``; see ``kernels.reference``. One launch."""
    device = tree.tokens.device
    require_tree(tree)
    require_progress(progress, device)
    require("nodes", nodes, (None,), torch.int32, device)
    require("children", children, (len(nodes), None), torch.int32, device)
    require("log_probs", log_probs, tuple(children.shape), torch.float32, device)
    width = require_recent(recent, device)
    launch(
        _learn_kernel,
        (1,),
        {
            "nodes_ptr": nodes,
            "tree_tokens_ptr": tree.tokens,
            "depths_ptr": tree.depths,
            "paths_ptr": tree.paths,
            "text_ptr": progress.text,
            "length_ptr": progress.length,
            "children_ptr": children,
            "log_probs_ptr": log_probs,
            "recent_keys_ptr": recent.keys,
            "recent_tokens_ptr": recent.tokens,
            "recent_log_probs_ptr": recent.log_probs,
            "recent_log_rest_ptr": recent.log_rest,
            "recent_levels_ptr": recent.levels,
            "num_recent": len(recent.keys),
            "level": level,
        },
        {
            **CONTEXTS,
            "W": len(nodes),
            "CHILDREN": children.shape[1],
            "RECENT_WIDTH": width,
            "LEAST_REST": LEAST_REST,
            "BLOCK_W": triton.next_power_of_2(len(nodes)),
            "BLOCK": triton.next_power_of_2(max(width, children.shape[1])),
        },
    )
