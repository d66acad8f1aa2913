"""The rows of a stage's pass, made on the device from the tree, the text and the stage's cache."""

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch, require
from kernels.gpu.tree import BLOCK_PATH, PATH, require_chain, require_progress, require_tree
from kernels.layout import Chain, Progress, Rows, Tree


@triton.jit(do_not_specialize=["cache", "stride_table"])
def _stage_rows_kernel(
    tree_tokens_ptr,  # int32 [M]
    depths_ptr,  # int32 [M]
    tree_paths_ptr,  # int32 [M, PATH]
    nodes_ptr,  # int32 [W], rising, -1 = none
    text_ptr,  # int32 [any]
    length_ptr,  # int32 [1]
    reach_ptr,  # int32 [any], the first one counts
    page_tables_ptr,  # int32 [C, stride_table]
    node_slots_ptr,  # int32 [C, M]
    cached_ptr,  # int32 [C, M]
    cached_len_ptr,  # int32 [C]
    mark_ptr,  # int32 [M], scratch
    row_ptr,  # int32 [M], scratch
    node_of_ptr,  # int32 [ROWS], scratch
    tokens_ptr,  # int32 [HEAD + ROWS], written, as all below
    positions_ptr,  # int32 [HEAD + ROWS]
    sequences_ptr,  # int32 [HEAD + ROWS]
    slot_mapping_ptr,  # int32 [HEAD + ROWS]
    paths_ptr,  # int32 [HEAD + ROWS, PATH]
    kept_ptr,  # int32 [W]
    row_of_ptr,  # int32 [W]
    draw_positions_ptr,  # int32 [W]
    cache,
    stride_table,
    M: tl.constexpr,
    W: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PATH: tl.constexpr,
):
    """Grid (1,): committed tokens first, then every node on the paths of ``nodes`` that the cache has not."""
    wait_for_previous()
    length = tl.load(length_ptr)
    active = tl.load(reach_ptr) >= 0
    first = tl.load(cached_len_ptr + cache)
    lane = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_PATH)[None, :]
    w = tl.arange(0, BLOCK_W)
    tl.store(mark_ptr + lane, 0, mask=lane < M)
    row = tl.arange(0, BLOCK_ROWS)
    tl.store(node_of_ptr + row, -1, mask=row < ROWS)
    tl.debug_barrier()

    # mark the paths, number the marked nodes that the cache has not
    node = tl.load(nodes_ptr + w, mask=(w < W) & active, other=-1)
    path = tl.load(tree_paths_ptr + node[:, None] * PATH + d, mask=(node >= 0)[:, None] & (d < PATH), other=-1)
    tl.store(mark_ptr + path, 1, mask=path > 0)
    tl.debug_barrier()
    cached = tl.load(cached_ptr + cache * M + lane, mask=lane < M, other=1)
    needed = (tl.load(mark_ptr + lane, mask=lane < M, other=0) > 0) & (cached == 0)
    place = tl.cumsum(needed.to(tl.int32), 0) - 1
    fits = needed & (place < ROWS)
    tl.store(row_ptr + lane, tl.where(needed, place, -1), mask=lane < M)
    tl.store(node_of_ptr + place, lane, mask=fits)
    tl.store(cached_ptr + cache * M + lane, 1, mask=fits)
    tl.store(cached_len_ptr + cache, length, mask=active)
    tl.debug_barrier()

    # the nodes to score: those whose whole path is cached or in a row
    place_on_path = tl.load(row_ptr + path, mask=path > 0, other=-1)
    kept = (node >= 0) & (tl.max(place_on_path, 1) < ROWS)
    own = tl.load(row_ptr + node, mask=node >= 0, other=0)
    tl.store(kept_ptr + w, tl.where(kept, node, -1), mask=w < W)
    row_of = tl.where(node == 0, tl.maximum(length - 1 - first, 0), HEAD + own)
    tl.store(row_of_ptr + w, tl.where(kept, row_of, 0), mask=w < W)
    depth = tl.load(depths_ptr + node, mask=kept, other=0)
    tl.store(draw_positions_ptr + w, length + depth, mask=w < W)

    # committed tokens
    offs = tl.arange(0, BLOCK_HEAD)
    position = first + offs
    live = active & (position < length) & (offs < HEAD)
    tl.store(tokens_ptr + offs, tl.load(text_ptr + position, mask=live, other=0), mask=offs < HEAD)
    tl.store(positions_ptr + offs, tl.where(live, position, 0), mask=offs < HEAD)
    tl.store(sequences_ptr + offs, 0, mask=offs < HEAD)
    slot = tl.load(page_tables_ptr + cache * stride_table + position, mask=live, other=-1)
    tl.store(slot_mapping_ptr + offs, slot, mask=offs < HEAD)
    tl.store(paths_ptr + offs[:, None] * PATH + d, 0, mask=(offs < HEAD)[:, None] & (d < PATH))

    # nodes
    node = tl.load(node_of_ptr + row, mask=row < ROWS, other=-1)
    live = node >= 0
    depth = tl.load(depths_ptr + node, mask=live, other=0)
    at = HEAD + row
    tl.store(tokens_ptr + at, tl.load(tree_tokens_ptr + node, mask=live, other=0), mask=row < ROWS)
    tl.store(positions_ptr + at, tl.where(live, length - 1 + depth, 0), mask=row < ROWS)
    tl.store(sequences_ptr + at, 0, mask=row < ROWS)
    slot = tl.load(node_slots_ptr + cache * M + node, mask=live, other=-1)
    tl.store(slot_mapping_ptr + at, slot, mask=row < ROWS)
    path = tl.load(tree_paths_ptr + node[:, None] * PATH + d, mask=live[:, None] & (d < PATH), other=-1)
    tl.store(paths_ptr + at[:, None] * PATH + d, path, mask=(row < ROWS)[:, None] & (d < PATH))


def stage_rows(
    tree: Tree,
    nodes: torch.Tensor,  # int32 [W], rising, -1 = none
    progress: Progress,
    chain: Chain,
    cache: int,  # the stage's row of ``chain``
    reach: torch.Tensor,  # int32 [4], the stage's row of ``progress.reach``
    num_head: int,  # room for committed tokens
    num_rows: int,  # room for nodes
) -> Rows:
    """The rows of a pass that gives every node of ``nodes`` its last hidden state; see ``kernels.reference``.

    One launch; always ``num_head + num_rows`` rows, dead ones with slot -1.
    """
    device, capacity, width = tree.tokens.device, len(tree.tokens), len(nodes)
    require_tree(tree)
    require("nodes", nodes, (None,), torch.int32, device)
    require("reach", reach, (None,), torch.int32, device)
    require_progress(progress, device)
    require_chain(chain, capacity, device)
    if not 0 <= cache < len(chain.page_tables):
        raise ValueError(f"cache must be one of {len(chain.page_tables)} rows of the chain, got {cache}")

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    total = num_head + num_rows
    rows = Rows(
        integers(total),
        integers(total),
        integers(total),
        integers(total),
        integers(total, PATH),
        integers(width),
        integers(width),
        integers(width),
    )
    launch(
        _stage_rows_kernel,
        (1,),
        {
            "tree_tokens_ptr": tree.tokens,
            "depths_ptr": tree.depths,
            "tree_paths_ptr": tree.paths,
            "nodes_ptr": nodes,
            "text_ptr": progress.text,
            "length_ptr": progress.length,
            "reach_ptr": reach,
            "page_tables_ptr": chain.page_tables,
            "node_slots_ptr": chain.node_slots,
            "cached_ptr": chain.cached,
            "cached_len_ptr": chain.cached_len,
            "mark_ptr": integers(capacity),
            "row_ptr": integers(capacity),
            "node_of_ptr": integers(num_rows),
            "tokens_ptr": rows.tokens,
            "positions_ptr": rows.positions,
            "sequences_ptr": rows.sequences,
            "slot_mapping_ptr": rows.slot_mapping,
            "paths_ptr": rows.paths,
            "kept_ptr": rows.nodes,
            "row_of_ptr": rows.row_of,
            "draw_positions_ptr": rows.draw_positions,
            "cache": cache,
            "stride_table": chain.page_tables.stride(0),
        },
        {
            "M": capacity,
            "W": width,
            "HEAD": num_head,
            "ROWS": num_rows,
            "PATH": PATH,
            "BLOCK": triton.next_power_of_2(capacity),
            "BLOCK_W": triton.next_power_of_2(width),
            "BLOCK_HEAD": triton.next_power_of_2(max(1, num_head)),
            "BLOCK_ROWS": triton.next_power_of_2(num_rows),
            "BLOCK_PATH": BLOCK_PATH,
        },
    )
    return rows
