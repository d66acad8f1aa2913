"""draft² on the device: the contexts of all nodes are hashed, probed and turned into children in one launch.

Beside the baked table stands a small one that the sampler itself refills at every pass of a stage above; a context
found there is answered from there.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch, require
from kernels.gpu.noise import gumbel, load_seed, philox_word
from kernels.gpu.order import first
from kernels.gpu.tree import insert_children, require_progress, require_tree, select_nodes
from kernels.layout import LEAST_REST, MAX_PROBES, Progress, RecentTable, Sampling, SuccessorTable, Tree


@triton.jit
def _hash(key, num_buckets):
    """First bucket of an int64 key, ``hash_context`` of kernels.reference."""
    return (key * -7046029254386353131 >> 32) & (num_buckets - 1)


@triton.jit
def _previous(node, live, tree_tokens_ptr, parents_ptr, text_ptr, length):
    """The token before each live node's own, in the tree or in the text: int64, -1 where there is none."""
    parent = tl.load(parents_ptr + node, mask=live, other=-1)
    before_root = tl.load(text_ptr + length - 2, mask=length > 1, other=-1)
    return tl.load(tree_tokens_ptr + parent, mask=live & (parent >= 0), other=before_root).to(tl.int64)


@triton.jit(do_not_specialize=["temperature", "tau", "num_buckets", "num_recent"])
def _lookup_kernel(
    nodes_ptr,  # int32 [W], -1 = none
    tree_tokens_ptr,  # int32 [M]
    parents_ptr,  # int32 [M]
    depths_ptr,  # int32 [M]
    text_ptr,  # int32 [any]
    length_ptr,  # int32 [1]
    seed_ptr,  # int32 [2]
    keys_ptr,  # int64 [buckets], previous * V + last, -1 empty
    rows_ptr,  # int32 [buckets]
    tokens_ptr,  # int32 [rows, WIDTH]
    log_probs_ptr,  # float32 [rows, WIDTH]
    log_rest_ptr,  # float32 [rows]
    recent_keys_ptr,  # int64 [recent] or None
    recent_tokens_ptr,  # int32 [recent, RECENT_WIDTH] or None
    recent_log_probs_ptr,  # float32 [recent, RECENT_WIDTH] or None
    recent_log_rest_ptr,  # float32 [recent] or None
    recent_levels_ptr,  # int32 [recent] or None
    children_ptr,  # int32 [W, CHILDREN], written
    scores_ptr,  # float32 [W, CHILDREN], written
    levels_ptr,  # int32 [W], written
    temperature,
    tau,
    num_buckets,  # a power of two
    num_recent,  # a power of two
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    RECENT_WIDTH: tl.constexpr,
    CHILDREN: tl.constexpr,
    NOISE: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (W,): one node. Its probes are loaded together, then one row of the table."""
    wait_for_previous()
    w = tl.program_id(0)
    node = tl.load(nodes_ptr + w)
    child = tl.arange(0, triton.next_power_of_2(CHILDREN))
    if node < 0:
        tl.store(children_ptr + w * CHILDREN + child, 0, mask=child < CHILDREN)
        tl.store(scores_ptr + w * CHILDREN + child, float("-inf"), mask=child < CHILDREN)
        tl.store(levels_ptr + w, 0)
        return
    length = tl.load(length_ptr)
    last = tl.load(tree_tokens_ptr + node).to(tl.int64)
    previous = _previous(node, node >= 0, tree_tokens_ptr, parents_ptr, text_ptr, length)
    key = previous * V + last
    offs = tl.arange(0, PROBES)
    bucket = (_hash(key, num_buckets) + offs) & (num_buckets - 1)
    hit = (tl.load(keys_ptr + bucket) == key) & (previous >= 0)
    probe = first(hit, offs, PROBES)
    found = tl.max(tl.where(offs == probe, bucket, -1))
    row = tl.load(rows_ptr + found, mask=found >= 0, other=0).to(tl.int64)
    row = tl.where(found >= 0, row, last)

    lane = tl.arange(0, BLOCK)
    exists = lane < WIDTH
    token = tl.load(tokens_ptr + row * WIDTH + lane, mask=exists, other=-1)
    score = tl.load(log_probs_ptr + row * WIDTH + lane, mask=exists, other=float("-inf")) / temperature
    rest = tl.load(log_rest_ptr + row) / temperature
    level = 0
    if recent_keys_ptr is not None:
        slot = _hash(key, num_recent)
        is_recent = (tl.load(recent_keys_ptr + slot) == key) & (previous >= 0)
        use = is_recent & (lane < RECENT_WIDTH)
        exists = tl.where(is_recent, lane < RECENT_WIDTH, exists)
        token = tl.load(recent_tokens_ptr + slot * RECENT_WIDTH + lane, mask=use, other=token)
        score = tl.load(recent_log_probs_ptr + slot * RECENT_WIDTH + lane, mask=use, other=score)
        rest = tl.load(recent_log_rest_ptr + slot, mask=is_recent, other=rest)
        level = tl.load(recent_levels_ptr + slot, mask=is_recent, other=0)
    tl.store(levels_ptr + w, level)
    if NOISE:
        position = length + tl.load(depths_ptr + node)
        score = score + gumbel(philox_word(load_seed(seed_ptr), token, position))
    score = tl.where(exists, score, float("-inf")) / tau
    rest = rest / tau
    largest = tl.maximum(tl.max(score), rest)
    total = largest + tl.log(tl.sum(tl.exp(score - largest)) + tl.exp(rest - largest))
    for i in tl.static_range(CHILDREN):
        top = tl.max(score)
        at = first(score == top, lane, BLOCK)
        tl.store(children_ptr + w * CHILDREN + i, tl.sum(tl.where(lane == at, token, 0)))
        tl.store(scores_ptr + w * CHILDREN + i, top - total)
        score = tl.where(lane == at, float("-inf"), score)


def lookup_nodes(
    table: SuccessorTable,
    tree: Tree,
    nodes: torch.Tensor,  # int32 [W], -1 = none
    progress: Progress,
    sampling: Sampling,
    num_children: int,
    tau: float,
    recent: RecentTable | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table's best children of each node, their edge scores, and the level of a remembered row, 0 for another; see
    ``kernels.reference``. One launch.

    int32 [W, m], float32 [W, m] and int32 [W]; the scores of a dead node are -inf.
    """
    device, width = tree.tokens.device, table.tokens.shape[1]
    require_tree(tree)
    require_progress(progress, device)
    require("nodes", nodes, (None,), torch.int32, device)
    require("seed", sampling.seed, (2,), torch.int32, device)
    require("keys", table.keys, (None,), torch.int64, device)
    _require_power_of_two("keys", table.keys)
    require("rows", table.rows, (len(table.keys),), torch.int32, device)
    require("tokens", table.tokens, (None, None), torch.int32, device)
    require("log_probs", table.log_probs, tuple(table.tokens.shape), torch.float32, device)
    require("log_rest", table.log_rest, (len(table.tokens),), torch.float32, device)
    keys, tokens, log_probs, log_rest, known, _ = recent or (None,) * 6
    recent_width = 0 if recent is None else require_recent(recent, device)
    num_children = min(num_children, width)
    children = torch.empty(len(nodes), num_children, dtype=torch.int32, device=device)
    scores = torch.empty(len(nodes), num_children, dtype=torch.float32, device=device)
    levels = torch.empty(len(nodes), dtype=torch.int32, device=device)
    launch(
        _lookup_kernel,
        (len(nodes),),
        {
            "nodes_ptr": nodes,
            "tree_tokens_ptr": tree.tokens,
            "parents_ptr": tree.parents,
            "depths_ptr": tree.depths,
            "text_ptr": progress.text,
            "length_ptr": progress.length,
            "seed_ptr": sampling.seed,
            "keys_ptr": table.keys,
            "rows_ptr": table.rows,
            "tokens_ptr": table.tokens,
            "log_probs_ptr": table.log_probs,
            "log_rest_ptr": table.log_rest,
            "recent_keys_ptr": keys,
            "recent_tokens_ptr": tokens,
            "recent_log_probs_ptr": log_probs,
            "recent_log_rest_ptr": log_rest,
            "recent_levels_ptr": known,
            "children_ptr": children,
            "scores_ptr": scores,
            "levels_ptr": levels,
            "temperature": float(sampling.temperature),
            "tau": float(tau),
            "num_buckets": len(table.keys),
            "num_recent": 1 if recent is None else len(keys),
        },
        {
            "V": table.vocab_size,
            "WIDTH": width,
            "RECENT_WIDTH": recent_width,
            "CHILDREN": num_children,
            "NOISE": sampling.noise,
            "PROBES": MAX_PROBES,
            "BLOCK": triton.next_power_of_2(max(width, recent_width)),
        },
        num_warps=1,
    )
    return children, scores, levels


def extend_tree(
    table: SuccessorTable,
    tree: Tree,
    progress: Progress,
    sampling: Sampling,
    rounds: int,
    width: int,
    num_children: int,
    tau: float,
    recent: RecentTable | None = None,
) -> int:
    """``select_nodes``, ``lookup_nodes``, ``insert_children`` as stage 0, ``rounds`` times; how many nodes at most it
    looked up. Three launches a round."""
    for _ in range(rounds):
        nodes = select_nodes(tree, 0, width, progress.reach[0])
        children, scores, levels = lookup_nodes(table, tree, nodes, progress, sampling, num_children, tau, recent)
        insert_children(tree, 0, nodes, children, scores, progress.reach[-1], levels)
    return rounds * width


def _require_power_of_two(name: str, buckets: torch.Tensor) -> None:
    if len(buckets).bit_count() != 1:
        raise ValueError(f"{name} must have a power of two of buckets, got {len(buckets)}")


def require_recent(recent: RecentTable, device: torch.device) -> int:
    """Raise ValueError unless ``recent`` is what the kernels read; its width."""
    num_buckets, width = recent.tokens.shape
    _require_power_of_two("recent.keys", recent.keys)
    require("recent.keys", recent.keys, (num_buckets,), torch.int64, device)
    require("recent.tokens", recent.tokens, (num_buckets, width), torch.int32, device)
    require("recent.log_probs", recent.log_probs, (num_buckets, width), torch.float32, device)
    require("recent.log_rest", recent.log_rest, (num_buckets,), torch.float32, device)
    require("recent.levels", recent.levels, (num_buckets,), torch.int32, device)
    return width


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
    previous = _previous(node, live, tree_tokens_ptr, parents_ptr, text_ptr, tl.load(length_ptr))
    key = previous * V + tl.load(tree_tokens_ptr + node, mask=live, other=0)
    lane = tl.arange(0, BLOCK)[None, :]
    has = live[:, None] & (lane < CHILDREN) & (lane < RECENT_WIDTH)
    token = tl.load(children_ptr + w[:, None] * CHILDREN + lane, mask=has, other=0)
    log_prob = tl.load(log_probs_ptr + w[:, None] * CHILDREN + lane, mask=has, other=float("-inf"))
    live = live & (previous >= 0) & (tl.max((log_prob > float("-inf")).to(tl.int32), 1) > 0)
    slot = _hash(key, num_recent)
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
