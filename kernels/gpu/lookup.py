"""draft² on the device: the contexts of nodes are hashed, probed and turned into children in one launch.

Beside the baked table stands a small one that every pass of a stage above refills (``kernels.gpu.learn``); a node is
answered from there where the last tokens are found in it, of several contexts from the longest.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.contexts import CONTEXTS, context_keys, hash_context
from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch, require
from kernels.gpu.noise import gumbel, load_seed, philox_word
from kernels.gpu.tree import require_progress, require_tree
from kernels.layout import MAX_PROBES, Progress, RecentTable, Sampling, SuccessorTable, Tree


@triton.jit
def answer(
    w,  # int32 [R], places of ``nodes``
    exists_w,
    nodes_ptr,
    tree_tokens_ptr,
    paths_ptr,
    depths_ptr,
    text_ptr,
    length_ptr,
    seed_ptr,
    keys_ptr,
    rows_ptr,
    tokens_ptr,
    log_probs_ptr,
    log_rest_ptr,
    recent_keys_ptr,
    recent_tokens_ptr,
    recent_log_probs_ptr,
    recent_log_rest_ptr,
    recent_levels_ptr,
    children_ptr,
    scores_ptr,
    levels_ptr,
    temperature,
    tau,
    num_buckets,
    num_recent,
    PATH: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_CONTEXTS: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    RECENT_WIDTH: tl.constexpr,
    CHILDREN: tl.constexpr,
    NOISE: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Children, edge scores and levels of some nodes: all probes are loaded together, then a row of a table each."""
    node = tl.load(nodes_ptr + w, mask=exists_w, other=-1)
    live = node >= 0
    length = tl.load(length_ptr)
    depth = tl.load(depths_ptr + node, mask=live, other=0)
    last = tl.load(tree_tokens_ptr + node, mask=live, other=0).to(tl.int64)
    keys, are_known, previous = context_keys(
        node, live, depth, length, tree_tokens_ptr, paths_ptr, text_ptr, PATH, LONGEST, BLOCK_CONTEXTS
    )
    key = previous * V + last
    known = live & (length + depth > 1)
    offs = tl.arange(0, PROBES)[None, :]
    bucket = (hash_context(key, num_buckets)[:, None] + offs) & (num_buckets - 1)
    found_keys = tl.load(keys_ptr + bucket, mask=known[:, None], other=-1)
    slot, is_recent = tl.zeros_like(key), node < -1
    if recent_keys_ptr is not None:
        place = hash_context(keys, num_recent)
        there = are_known & (tl.load(recent_keys_ptr + place, mask=are_known, other=-1) == keys)
        context = tl.arange(0, BLOCK_CONTEXTS)[None, :]
        longest = tl.max(tl.where(there, context, -1), 1)  # of the contexts that are found
        slot = tl.sum(tl.where(context == longest[:, None], place, 0), 1)
        is_recent = longest >= 0
    hit = (found_keys == key[:, None]) & known[:, None]
    probe = tl.min(tl.where(hit, offs, PROBES), 1)
    found = tl.max(tl.where(offs == probe[:, None], bucket, -1), 1)
    is_baked = live & ~is_recent
    row = tl.load(rows_ptr + found, mask=is_baked & (found >= 0), other=0).to(tl.int64)

    lane = tl.arange(0, BLOCK)[None, :]
    token, score = tl.full((1, BLOCK), -1, tl.int32), tl.full((1, BLOCK), float("-inf"), tl.float32)
    rest, level = tl.zeros_like(node).to(tl.float32), tl.zeros_like(node)
    if recent_keys_ptr is not None:  # asked for before the number of the baked row has come
        use = is_recent[:, None] & (lane < RECENT_WIDTH) & (lane < WIDTH)  # a row is no wider than the table's own
        token = tl.load(recent_tokens_ptr + slot[:, None] * RECENT_WIDTH + lane, mask=use, other=-1)
        score = tl.load(recent_log_probs_ptr + slot[:, None] * RECENT_WIDTH + lane, mask=use, other=float("-inf"))
        rest = tl.load(recent_log_rest_ptr + slot, mask=is_recent, other=0.0)
        level = tl.load(recent_levels_ptr + slot, mask=is_recent, other=0)
    use = is_baked[:, None] & (lane < WIDTH)
    place = tl.where(found >= 0, row, last)[:, None] * WIDTH + lane
    token = tl.load(tokens_ptr + place, mask=use, other=token)
    score = tl.where(use, tl.load(log_probs_ptr + place, mask=use, other=0.0) / temperature, score)
    row_rest = tl.load(log_rest_ptr + tl.where(found >= 0, row, last), mask=is_baked, other=0.0) / temperature
    rest = tl.where(is_baked, row_rest, rest)
    tl.store(levels_ptr + w, level, mask=exists_w)
    if NOISE:
        score = score + gumbel(philox_word(load_seed(seed_ptr), token, (length + depth)[:, None]))
    score = score / tau
    rest = rest / tau
    largest = tl.maximum(tl.max(score, 1), rest)
    total = largest + tl.log(tl.sum(tl.exp(score - largest[:, None]), 1) + tl.exp(rest - largest))
    for i in tl.static_range(CHILDREN):
        top = tl.max(score, 1)
        at = tl.min(tl.where(score == top[:, None], lane, BLOCK), 1)
        child = tl.sum(tl.where(lane == at[:, None], token, 0), 1)
        tl.store(children_ptr + w * CHILDREN + i, tl.where(live, child, 0), mask=exists_w)
        tl.store(scores_ptr + w * CHILDREN + i, tl.where(live, top - total, float("-inf")), mask=exists_w)
        score = tl.where(lane == at[:, None], float("-inf"), score)


@triton.jit(do_not_specialize=["temperature", "tau", "num_buckets", "num_recent"])
def _lookup_kernel(
    nodes_ptr,  # int32 [W], -1 = none
    tree_tokens_ptr,  # int32 [M]
    paths_ptr,  # int32 [M, PATH]
    depths_ptr,  # int32 [M]
    text_ptr,  # int32 [any]
    length_ptr,  # int32 [1]
    seed_ptr,  # int32 [2]
    keys_ptr,  # int64 [buckets], previous * V + last, -1 empty
    rows_ptr,  # int32 [buckets]
    tokens_ptr,  # int32 [rows, WIDTH]
    log_probs_ptr,  # float32 [rows, WIDTH]
    log_rest_ptr,  # float32 [rows]
    recent_keys_ptr,  # int64 [recent], -1 empty, or None
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
    PATH: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_CONTEXTS: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    RECENT_WIDTH: tl.constexpr,
    CHILDREN: tl.constexpr,
    NOISE: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (W,): one node."""
    wait_for_previous()
    w = tl.program_id(0) + tl.zeros((1,), tl.int32)
    answer(
        w,
        w >= 0,
        nodes_ptr,
        tree_tokens_ptr,
        paths_ptr,
        depths_ptr,
        text_ptr,
        length_ptr,
        seed_ptr,
        keys_ptr,
        rows_ptr,
        tokens_ptr,
        log_probs_ptr,
        log_rest_ptr,
        recent_keys_ptr,
        recent_tokens_ptr,
        recent_log_probs_ptr,
        recent_log_rest_ptr,
        recent_levels_ptr,
        children_ptr,
        scores_ptr,
        levels_ptr,
        temperature,
        tau,
        num_buckets,
        num_recent,
        PATH,
        LONGEST,
        BLOCK_CONTEXTS,
        V,
        WIDTH,
        RECENT_WIDTH,
        CHILDREN,
        NOISE,
        PROBES,
        BLOCK,
    )


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
    require("nodes", nodes, (None,), torch.int32, tree.tokens.device)
    answers, arguments, constants = prepare(table, tree, progress, sampling, len(nodes), num_children, tau, recent)
    launch(_lookup_kernel, (len(nodes),), {"nodes_ptr": nodes, **arguments}, constants, num_warps=1)
    return answers


def prepare(
    table: SuccessorTable,
    tree: Tree,
    progress: Progress,
    sampling: Sampling,
    num_nodes: int,
    num_children: int,
    tau: float,
    recent: RecentTable | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict, dict]:
    """Room for the answers to ``num_nodes`` nodes, and a kernel's arguments and constants, all checked."""
    device, width = tree.tokens.device, table.tokens.shape[1]
    require_tree(tree)
    require_progress(progress, device)
    require("seed", sampling.seed, (2,), torch.int32, device)
    require("keys", table.keys, (None,), torch.int64, device)
    _require_power_of_two("keys", table.keys)
    require("rows", table.rows, (len(table.keys),), torch.int32, device)
    require("tokens", table.tokens, (None, None), torch.int32, device)
    require("log_probs", table.log_probs, tuple(table.tokens.shape), torch.float32, device)
    require("log_rest", table.log_rest, (len(table.tokens),), torch.float32, device)
    keys, tokens, log_probs, log_rest, known = recent or (None,) * 5
    recent_width = 0 if recent is None else require_recent(recent, device)
    num_children = min(num_children, width)
    children = torch.empty(num_nodes, num_children, dtype=torch.int32, device=device)
    scores = torch.empty(num_nodes, num_children, dtype=torch.float32, device=device)
    levels = torch.empty(num_nodes, dtype=torch.int32, device=device)
    arguments = {
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
        "tree_tokens_ptr": tree.tokens,
        "paths_ptr": tree.paths,
        "depths_ptr": tree.depths,
        "children_ptr": children,
        "scores_ptr": scores,
        "levels_ptr": levels,
        "temperature": float(sampling.temperature),
        "tau": float(tau),
        "num_buckets": len(table.keys),
        "num_recent": 1 if recent is None else len(keys),
    }
    constants = {
        **CONTEXTS,
        "V": table.vocab_size,
        "WIDTH": width,
        "RECENT_WIDTH": recent_width,
        "CHILDREN": num_children,
        "NOISE": sampling.noise,
        "PROBES": MAX_PROBES,
        "BLOCK": triton.next_power_of_2(max(width, recent_width)),
    }
    return (children, scores, levels), arguments, constants


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
