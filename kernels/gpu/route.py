"""What a pass needs before its first layer: embeddings, and the slots that every row reads."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import FLOATS, launch, require
from kernels.gpu.moments import constants, store_moments
from kernels.layout import DEPTH_LIMIT, MAX_ROWS, NULL_PAGE, TAIL_ALIGNMENT, TAIL_LANES


class Route(NamedTuple):
    """Where the rows of one pass write and read; the same for every layer."""

    page_table: torch.Tensor  # int32 [B, pages per sequence]
    page_size: int
    sequences: torch.Tensor  # int32 [N]
    positions: torch.Tensor  # int32 [N]
    slot_mapping: torch.Tensor  # int32 [N]
    tail_slots: torch.Tensor | None  # int32 [N, TAIL_LANES]; None: a prefill pass


@triton.jit
def _embed_kernel(
    tokens_ptr,  # int32 [N]
    positions_ptr,  # int32 [N]
    wte_ptr,  # [V, WIDTH]
    wpe_ptr,  # [P, WIDTH]
    out_ptr,  # [N, WIDTH]
    moments_ptr,  # float32 [N, 2, PARTS], written, or None
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): one row."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = column < WIDTH
    token = tl.load(tokens_ptr + row).to(tl.int64)[:, None]
    position = tl.load(positions_ptr + row).to(tl.int64)[:, None]
    word = tl.load(wte_ptr + token * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    place = tl.load(wpe_ptr + position * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    y = (word + place).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * WIDTH + column, y, mask=mask)
    if moments_ptr is not None:
        store_moments(moments_ptr, y.to(tl.float32), 0, row, row >= 0, WIDTH, PARTS, PART)


def embed(
    tokens: torch.Tensor,  # int32 [N]
    positions: torch.Tensor,  # int32 [N]
    wte: torch.Tensor,  # [V, C]
    wpe: torch.Tensor,  # [P, C]
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of the result, written
) -> torch.Tensor:
    """Sum of token and position embeddings -> [N, C]. One launch.

    Ids are not checked on the device: the caller keeps tokens below V and positions below P.
    """
    num_rows, width = len(tokens), wte.shape[-1]
    require("tokens", tokens, (None,), torch.int32, wte.device)
    require("positions", positions, (num_rows,), torch.int32, wte.device)
    require("wte", wte, (None, None), FLOATS, wte.device)
    require("wpe", wpe, (None, width), wte.dtype, wte.device)
    compiled = constants(width)
    if moments is not None:
        require("moments", moments, (num_rows, 2, compiled["PARTS"]), torch.float32, wte.device)
    out = torch.empty(num_rows, width, dtype=wte.dtype, device=wte.device)
    arguments = {"tokens_ptr": tokens, "positions_ptr": positions, "wte_ptr": wte, "wpe_ptr": wpe, "out_ptr": out}
    launch(_embed_kernel, (num_rows,), {**arguments, "moments_ptr": moments}, compiled)
    return out


@triton.jit(do_not_specialize=["stride_table", "stride_paths"])
def _route_kernel(
    page_table_ptr,  # int32 [B, stride_table]
    committed_ptr,  # int32 [B]
    sequences_ptr,  # int32 [N]
    positions_ptr,  # int32 [N]
    paths_ptr,  # int32 [N, stride_paths]
    node_slots_ptr,  # int32 [nodes]
    tail_slots_ptr,  # int32 [N, LANES], written
    stride_table,
    stride_paths,
    PAGE_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): the tail slots of one row, a slot of the null page where a lane is dead."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    sequence = tl.load(sequences_ptr + row).to(tl.int64)
    position = tl.load(positions_ptr + row)
    committed = tl.load(committed_ptr + sequence)
    lane = tl.maximum(position - DEPTH, 0) // ALIGNMENT * ALIGNMENT + offs
    live = (offs < LANES) & (lane <= position)
    linked = live & (lane < committed)
    page = tl.load(page_table_ptr + sequence * stride_table + lane // PAGE_SIZE, mask=linked, other=0)
    depth = lane - committed + 1  # position committed - 1 is the root, at depth 0
    on_path = live & (lane >= committed) & (depth < stride_paths)
    node = tl.load(paths_ptr + row * stride_paths + depth, mask=on_path, other=-1)
    of_node = tl.load(node_slots_ptr + node, mask=on_path & (node >= 0), other=-1)
    slot = tl.where(linked, page * PAGE_SIZE + lane % PAGE_SIZE, of_node)
    tl.store(tail_slots_ptr + row * LANES + offs, tl.where(live & (slot >= 0), slot, 0), mask=offs < LANES)


def route(
    page_table: torch.Tensor,  # int32 [B, pages per sequence], NULL_PAGE beyond the last page
    page_size: int,
    committed: torch.Tensor,  # int32 [B], positions resolved by the page table, the root's included
    sequences: torch.Tensor,  # int32 [N], the sequence each row belongs to
    positions: torch.Tensor,  # int32 [N]
    paths: torch.Tensor,  # int32 [N, depth + 1], node ids, root first; [N, 1] where all rows are committed
    node_slots: torch.Tensor,  # int32 [nodes], where each node's K/V lies
    slot_mapping: torch.Tensor,  # int32 [N], where each row's K/V goes, -1 = nowhere
) -> Route:
    """Resolve positions and paths to slots, once per pass, for ``layer_norm_qkv`` and ``tree_attention``. One launch.

    A pass of more than MAX_ROWS rows is a prefill: consecutive committed rows of one sequence, marked by paths of one
    column. Raises ValueError for a tree of that many rows.
    """
    assert NULL_PAGE == 0, "kernels mask with slot 0"
    num_rows, device = len(positions), page_table.device
    require("page_table", page_table, (None, None), torch.int32, device)
    require("committed", committed, (len(page_table),), torch.int32, device)
    require("sequences", sequences, (num_rows,), torch.int32, device)
    require("positions", positions, (None,), torch.int32, device)
    require("paths", paths, (num_rows, None), torch.int32, device)
    require("node_slots", node_slots, (None,), torch.int32, device)
    require("slot_mapping", slot_mapping, (num_rows,), torch.int32, device)
    if num_rows > MAX_ROWS:
        if paths.shape[1] > 1:
            raise ValueError(f"a pass over a tree has at most {MAX_ROWS} rows, got {num_rows}")
        return Route(page_table, page_size, sequences, positions, slot_mapping, None)
    tail_slots = torch.empty(num_rows, TAIL_LANES, dtype=torch.int32, device=device)
    launch(
        _route_kernel,
        (num_rows,),
        {
            "page_table_ptr": page_table,
            "committed_ptr": committed,
            "sequences_ptr": sequences,
            "positions_ptr": positions,
            "paths_ptr": paths,
            "node_slots_ptr": node_slots,
            "tail_slots_ptr": tail_slots,
            "stride_table": page_table.stride(0),
            "stride_paths": paths.stride(0),
        },
        {
            "PAGE_SIZE": page_size,
            "LANES": TAIL_LANES,
            "DEPTH": DEPTH_LIMIT,
            "ALIGNMENT": TAIL_ALIGNMENT,
            "BLOCK": triton.next_power_of_2(TAIL_LANES),
        },
        num_warps=1,
    )
    return Route(page_table, page_size, sequences, positions, slot_mapping, tail_slots)
