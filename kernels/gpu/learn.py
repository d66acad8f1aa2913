"""What a stage has just drawn, remembered for draft² in a small table that lives as long as the generation."""

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch, require
from kernels.gpu.lookup import hash_context, require_recent, token_before
from kernels.gpu.tree import require_progress, require_tree
from kernels.layout import LEAST_REST, Progress, RecentTable, Tree


@triton.jit(do_not_specialize=["num_recent", "level"])
def _learn_kernel(
    nodes_ptr,  # int32 [W], -1 = none
    tree_tokens_ptr,  # int32 [M]
    parents_ptr,  # int32 [M]
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
    V: tl.constexpr,
    W: tl.constexpr,
    CHILDREN: tl.constexpr,
    RECENT_WIDTH: tl.constexpr,
    LEAST_REST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (1,): all nodes; of those that fall into one bucket the last one writes, unless a better row is there."""
    wait_for_previous()
    w = tl.arange(0, BLOCK_W)
    node = tl.load(nodes_ptr + w, mask=w < W, other=-1)
    live = node >= 0
    previous = token_before(node, live, tree_tokens_ptr, parents_ptr, text_ptr, tl.load(length_ptr))
    key = previous * V + tl.load(tree_tokens_ptr + node, mask=live, other=0)
    lane = tl.arange(0, BLOCK)[None, :]
    has = live[:, None] & (lane < CHILDREN) & (lane < RECENT_WIDTH)
    token = tl.load(children_ptr + w[:, None] * CHILDREN + lane, mask=has, other=0)
    log_prob = tl.load(log_probs_ptr + w[:, None] * CHILDREN + lane, mask=has, other=float("-inf"))
    live = live & (previous >= 0) & (tl.max((log_prob > float("-inf")).to(tl.int32), 1) > 0)
    slot = hash_context(key, num_recent)
    held = live & (tl.load(recent_keys_ptr + slot, mask=live, other=-1) == key)
    live = live & ~(held & (tl.load(recent_levels_ptr + slot, mask=live, other=0) > level))
    slot = tl.where(live, slot, -1)
    later = (slot[:, None] == slot[None, :]) & (w[:, None] < w[None, :])
    live = live & (tl.max(later.to(tl.int32), 1) == 0)
    rest = tl.maximum(1.0 - tl.sum(tl.exp(log_prob), 1), LEAST_REST)
    tl.debug_barrier()  # what is in a bucket has been read
    target = slot[:, None] * RECENT_WIDTH + lane
    tl.store(recent_keys_ptr + slot, key, mask=live)
    tl.store(recent_log_rest_ptr + slot, tl.log(rest), mask=live)
    tl.store(recent_levels_ptr + slot, tl.full((BLOCK_W,), level, tl.int32), mask=live)
    tl.store(recent_tokens_ptr + target, token, mask=has & live[:, None])
    tl.store(recent_log_probs_ptr + target, log_prob, mask=live[:, None] & (lane < RECENT_WIDTH))


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
            "parents_ptr": tree.parents,
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
            "V": recent.vocab_size,
            "W": len(nodes),
            "CHILDREN": children.shape[1],
            "RECENT_WIDTH": width,
            "LEAST_REST": LEAST_REST,
            "BLOCK_W": triton.next_power_of_2(len(nodes)),
            "BLOCK": triton.next_power_of_2(max(width, children.shape[1])),
        },
    )
