"""Verification in one launch: walk, emit, commit the K/V of every stage, move the root, record what happened.

One program. The walk is a few comparisons over the rows of the pass in registers; then the tree and the caches are
renumbered in place: whatever moves is loaded whole before any of it is stored, with a barrier between.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch, require
from kernels.gpu.tree import BLOCK_PATH, PATH, require_chain, require_progress, require_tree, sum_paths, tree_pointers
from kernels.layout import EOS, LENGTH, MAX_STAGES, RECORD, Chain, Progress, Record, Tree

_EMITTED, _STATE, _PROPOSED = tl.constexpr(Record.EMITTED), tl.constexpr(Record.STATE), tl.constexpr(Record.PROPOSED)
_TOKENS, _SOURCES, _TRIED = tl.constexpr(Record.TOKENS), tl.constexpr(Record.SOURCES), tl.constexpr(Record.TRIED)
_EOS, _LENGTH, _STAGES = tl.constexpr(EOS), tl.constexpr(LENGTH), tl.constexpr(MAX_STAGES)


@triton.jit
def _move(column_ptr, lane, inside, target):
    """column[target] = column[lane] for the nodes inside."""
    value = tl.load(column_ptr + lane, mask=inside, other=0)
    tl.debug_barrier()
    tl.store(column_ptr + target, value, mask=inside)


@triton.jit
def _commit(
    page_table_ptr,  # int32 [positions], of one stage
    node_slots_ptr,  # int32 [M]
    cached_ptr,  # int32 [M]
    cached_len_ptr,
    path,  # int32 [BLOCK_PATH], accepted nodes, then the new root if it is one, then -1
    lane,
    inside,
    target,  # int32 [BLOCK], new number of every node that stays, later places for the others
    length,
    M: tl.constexpr,
):
    """Exchange slots for the part of the path that this cache has, then rename the slots."""
    step = tl.arange(0, path.shape[0])
    on_path = path >= 0
    has = tl.load(cached_ptr + path, mask=on_path, other=0) > 0
    up_to_date = tl.load(cached_len_ptr) == length
    missing = tl.cumsum((on_path & ~has).to(tl.int32), 0)
    linked = on_path & has & (missing == 0) & up_to_date
    spare = tl.load(page_table_ptr + length + step, mask=linked, other=0)
    own = tl.load(node_slots_ptr + path, mask=linked, other=0)
    tl.debug_barrier()
    tl.store(page_table_ptr + length + step, own, mask=linked)
    tl.store(node_slots_ptr + path, spare, mask=linked)
    tl.store(cached_ptr + path, 0, mask=linked)
    tl.store(cached_len_ptr, length + tl.sum(linked.to(tl.int32)), mask=up_to_date)
    tl.debug_barrier()
    exists = lane < M
    slot = tl.load(node_slots_ptr + lane, mask=exists, other=0)
    cached = tl.load(cached_ptr + lane, mask=exists, other=0)
    tl.debug_barrier()
    tl.store(node_slots_ptr + target, slot, mask=exists)
    tl.store(cached_ptr + target, tl.where(inside, cached, 0), mask=exists)


@triton.jit(do_not_specialize=["stage_count", "num_caches", "stride_table", "num_eos"])
def _verify_kernel(
    tokens_ptr,  # int32 [M], the tree's columns
    parents_ptr,
    depths_ptr,
    edges_ptr,
    path_scores_ptr,
    sources_ptr,
    scored_ptr,
    paths_ptr,  # int32 [M, PATH]
    num_nodes_ptr,  # int32 [1]
    failed_ptr,  # int32 [1]
    rows_ptr,  # int32 [W], nodes of the pass, root first, -1 = none
    drawn_ptr,  # int32 [W]
    text_ptr,  # int32 [any]
    length_ptr,  # int32 [1]
    end_ptr,  # int32 [1]
    reach_ptr,  # int32 [stages, 4]
    contexts_ptr,  # int32 [stages]
    max_depth_ptr,  # int32 [1]
    eos_ptr,  # int32 [num_eos]
    state_ptr,  # int32 [1]
    record_ptr,  # int32 [RECORD]
    page_tables_ptr,  # int32 [C, stride_table]
    node_slots_ptr,  # int32 [C, M]
    cached_ptr,  # int32 [C, M]
    cached_len_ptr,  # int32 [C]
    rank_ptr,  # int32 [M], scratch
    stage_count,
    num_caches,
    stride_table,
    num_eos,
    M: tl.constexpr,
    W: tl.constexpr,
    PATH: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_PATH: tl.constexpr,
    BLOCK_RECORD: tl.constexpr,
    BLOCK_EOS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (1,): one generation."""
    wait_for_previous()
    state = tl.load(state_ptr)
    offs = tl.arange(0, BLOCK_RECORD)
    tl.store(record_ptr + offs, tl.where(offs == _STATE, state, 0), mask=offs < RECORD)
    if state != 0:
        return
    stage = tl.arange(0, _STAGES)
    w = tl.arange(0, BLOCK_W)
    node = tl.load(rows_ptr + w, mask=w < W, other=-1)
    in_pass = node >= 0
    drawn = tl.load(drawn_ptr + w, mask=in_pass, other=0)
    token = tl.load(tokens_ptr + node, mask=in_pass, other=-1)
    parent = tl.load(parents_ptr + node, mask=in_pass, other=-2)
    source = tl.load(sources_ptr + node, mask=in_pass, other=0)
    length, end = tl.load(length_ptr), tl.load(end_ptr)
    failed = tl.load(failed_ptr)
    failed = tl.where((failed == 0) & (tl.min(drawn) < 0), stage_count, failed)
    tl.debug_barrier()  # all warps have read what is written below
    if failed != 0:
        tl.store(state_ptr, -failed)
        tl.store(record_ptr + _STATE, -failed)
        tl.store(reach_ptr + 4 * stage, -1, mask=stage < stage_count)
        return

    # walk from the root to the child whose token was drawn
    offs_eos = tl.arange(0, BLOCK_EOS)
    eos = tl.load(eos_ptr + offs_eos, mask=offs_eos < num_eos, other=-1)
    step = tl.arange(0, BLOCK_PATH)
    path = tl.full((BLOCK_PATH,), -1, tl.int32)
    at = tl.full((), 0, tl.int32)
    accepted = tl.full((), 0, tl.int32)
    ended = tl.full((), 0, tl.int32)
    walking = tl.full((), 1, tl.int32)
    while walking > 0:
        is_child = in_pass & (parent == at)
        proposers = tl.max((is_child[:, None] & (source[:, None] == stage[None, :])).to(tl.int32), 0)
        tl.store(record_ptr + _TRIED + accepted, tl.sum(proposers << stage))
        wanted = tl.max(tl.where(node == at, drawn, -1))
        child = tl.min(tl.where(is_child & (token == wanted), node, M))
        walks = (child < M) & (accepted < end - length - 1)
        tl.store(record_ptr + _TOKENS + accepted, wanted, mask=walks)
        tl.store(record_ptr + _SOURCES + accepted, tl.max(tl.where(node == child, source, 0)), mask=walks)
        path = tl.where((step == accepted) & walks, child, path)
        at = tl.where(walks, child, at)
        accepted += walks.to(tl.int32)
        ended = tl.max((walks & (eos == wanted) & (wanted >= 0)).to(tl.int32))
        walking = walks.to(tl.int32) - ended

    # emit
    next_token = tl.max(tl.where(node == at, drawn, -1))
    emitted = accepted + 1 - ended
    tl.store(record_ptr + _TOKENS + accepted, next_token, mask=ended == 0)
    tl.store(record_ptr + _SOURCES + accepted, stage_count - 1, mask=ended == 0)
    proposed = in_pass & (node > 0)
    counts = tl.sum((proposed[:, None] & (source[:, None] == stage[None, :])).to(tl.int32), 0)
    tl.store(record_ptr + _PROPOSED + stage, counts)
    tl.store(record_ptr + _EMITTED, emitted)
    tl.store(text_ptr + length + step, tl.load(tokens_ptr + path, mask=path >= 0, other=0), mask=path >= 0)
    tl.store(text_ptr + length + accepted, next_token, mask=ended == 0)
    tl.store(length_ptr, length + emitted)
    is_eos = (ended > 0) | (tl.max((eos == next_token).to(tl.int32)) > 0)
    state = tl.where(is_eos, _EOS, tl.where(length + emitted >= end, _LENGTH, 0))
    tl.store(state_ptr, state)
    tl.store(record_ptr + _STATE, state)
    deepest = tl.minimum(tl.load(max_depth_ptr), end - length - emitted - 1)
    deepest = tl.where(state == 0, deepest, -1)
    context = tl.load(contexts_ptr + stage, mask=stage < stage_count, other=0)
    reach = tl.where(deepest >= 0, tl.minimum(deepest - 1, context - length - emitted), -1)
    tl.store(reach_ptr + 4 * stage, tl.where(stage == stage_count - 1, deepest, reach), mask=stage < stage_count)

    # the new root is a node that a lower stage had proposed, or a token that nobody had: then root is M
    num_nodes = tl.load(num_nodes_ptr)
    lane = tl.arange(0, BLOCK)
    live = lane < num_nodes
    old_parent = tl.load(parents_ptr + lane, mask=live, other=-2)
    depth = tl.load(depths_ptr + lane, mask=live, other=0)
    edge = tl.load(edges_ptr + lane, mask=live, other=0.0)
    matches = live & (old_parent == at) & (tl.load(tokens_ptr + lane, mask=live, other=-2) == next_token)
    root = tl.min(tl.where(matches & (ended == 0), lane, M))
    root_depth = tl.max(tl.where(lane == root, depth, 0))
    inside = live & (depth >= root_depth) & (root < M)
    inside = inside & (tl.load(paths_ptr + lane * PATH + root_depth, mask=inside, other=-1) == root)
    for d in range(root_depth + 1, tl.max(tl.where(inside, depth, 0)) + 1):
        passes = inside & (depth >= d)
        ancestor = tl.load(paths_ptr + lane * PATH + d, mask=passes, other=0)
        inside = inside & (tl.load(edges_ptr + ancestor, mask=passes, other=0.0) > float("-inf"))
    rank = tl.cumsum(inside.to(tl.int32), 0) - 1
    kept = tl.sum(inside.to(tl.int32))
    target = tl.where(inside, rank, kept + lane - rank - 1)
    tl.store(rank_ptr + lane, tl.where(inside, rank, -1), mask=lane < M)

    # the caches, while nodes have their old numbers
    path = tl.where((step == accepted) & (root < M), root, path)
    for c in range(num_caches):
        _commit(
            page_tables_ptr + c * stride_table,
            node_slots_ptr + c * M,
            cached_ptr + c * M,
            cached_len_ptr + c,
            path,
            lane,
            inside,
            target,
            length,
            M,
        )

    # the tree
    tl.debug_barrier()
    _move(tokens_ptr, lane, inside, target)
    _move(sources_ptr, lane, inside, target)
    _move(scored_ptr, lane, inside, target)
    tl.store(edges_ptr + target, tl.where(lane == root, 0.0, edge), mask=inside)
    tl.store(depths_ptr + target, depth - root_depth, mask=inside)
    new_parent = tl.load(rank_ptr + old_parent, mask=inside & (lane != root), other=-1)
    tl.store(parents_ptr + target, new_parent, mask=inside)
    d = tl.arange(0, BLOCK_PATH)[None, :]
    for start in range(0, num_nodes, CHUNK):  # rows only move to the front, so a chunk never overwrites a later one
        member = start + tl.arange(0, CHUNK)
        place = tl.load(rank_ptr + member, mask=member < num_nodes, other=-1)[:, None]
        from_root = (place >= 0) & (d + root_depth < PATH)
        old_path = tl.load(paths_ptr + member[:, None] * PATH + d + root_depth, mask=from_root, other=-1)
        new_path = tl.load(rank_ptr + old_path, mask=old_path >= 0, other=-1)
        tl.debug_barrier()
        tl.store(paths_ptr + place * PATH + d, new_path, mask=(place >= 0) & (d < PATH))
    if root == M:
        tl.store(tokens_ptr, next_token)
        tl.store(scored_ptr, -1)
        tl.store(parents_ptr, -1)
        tl.store(depths_ptr, 0)
        tl.store(edges_ptr, 0.0)
        tl.store(paths_ptr + step, tl.where(step == 0, 0, -1), mask=step < PATH)
    count = tl.maximum(kept, 1)
    tl.store(num_nodes_ptr, count)
    tl.debug_barrier()
    sum_paths(paths_ptr, edges_ptr, path_scores_ptr, depths_ptr, count, PATH, BLOCK)


def verify_and_commit(
    tree: Tree,
    rows: torch.Tensor,  # int32 [W], the nodes of the oracle's pass, root first, -1 = none
    drawn: torch.Tensor,  # int32 [W], the oracle's token at each of them, -1 = NaN logits
    progress: Progress,
    chain: Chain,
) -> None:
    """Walk, emit, commit, and move the root: all that follows the oracle's draw; see ``kernels.reference``.

    One launch. Raises ValueError for more stages than MAX_STAGES.
    """
    device, capacity, num_stages = tree.tokens.device, len(tree.tokens), len(progress.contexts)
    if num_stages > MAX_STAGES:
        raise ValueError(f"a chain has at most {MAX_STAGES} stages, got {num_stages}")
    require_tree(tree)
    require("rows", rows, (None,), torch.int32, device)
    require("drawn", drawn, (len(rows),), torch.int32, device)
    require_progress(progress, device)
    require_chain(chain, capacity, device)
    launch(
        _verify_kernel,
        (1,),
        {
            **tree_pointers(tree),
            "rows_ptr": rows,
            "drawn_ptr": drawn,
            "text_ptr": progress.text,
            "length_ptr": progress.length,
            "end_ptr": progress.end,
            "reach_ptr": progress.reach,
            "contexts_ptr": progress.contexts,
            "max_depth_ptr": progress.max_depth,
            "eos_ptr": progress.eos,
            "state_ptr": progress.state,
            "record_ptr": progress.record,
            "page_tables_ptr": chain.page_tables,
            "node_slots_ptr": chain.node_slots,
            "cached_ptr": chain.cached,
            "cached_len_ptr": chain.cached_len,
            "rank_ptr": torch.empty(capacity, dtype=torch.int32, device=device),
            "stage_count": num_stages,
            "num_caches": len(chain.page_tables),
            "stride_table": chain.page_tables.stride(0),
            "num_eos": len(progress.eos),
        },
        {
            "M": capacity,
            "W": len(rows),
            "PATH": PATH,
            "RECORD": RECORD,
            "BLOCK": triton.next_power_of_2(capacity),
            "BLOCK_W": triton.next_power_of_2(len(rows)),
            "BLOCK_PATH": BLOCK_PATH,
            "BLOCK_RECORD": triton.next_power_of_2(RECORD),
            "BLOCK_EOS": triton.next_power_of_2(len(progress.eos)),
            "CHUNK": 64,
        },
    )
