"""Tree attention over a paged KV cache, bit-exact in everything but a row's own path.

Keys of a row at position p lie in two parts whose border depends on p alone (``kernels/layout.py``). Committed windows
at fixed positions are read through the page table, once for a block of rows, and multiplied on the matrix
units. The tail, at most TAIL_LANES positions, is gathered per row through its path, lane j being position
shared_end(p) + j whatever the tree looks like, so that the same key always meets the same place of the same sum.

As in split-KV decoding (Dao et al., Flash-Decoding, 2023) programs of one head run beside one another: window w belongs
to part w modulo PARTS, in ascending order, and tails have programs of their own. Each leaves its maximum, sum and
mixture; the last to arrive merges them in a fixed order. A window that is dead for a row multiplies by exactly one and
adds exactly zero, so a neighbour's longer text changes nothing.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.arrival import arrive
from kernels.gpu.config import AttentionTiles, attention_tiles
from kernels.gpu.early import prefetch_keys, starts_early, wait_for_previous
from kernels.gpu.launch import architecture, arrivals, cdiv, is_amd, launch
from kernels.gpu.route import Route
from kernels.layout import DEPTH_LIMIT, TAIL_ALIGNMENT, TAIL_LANES

LOG2E = 1.4426950408889634  # exp(x) = exp2(LOG2E x), folded into the scale


@triton.jit
def _online(scores, maximum, total):
    """One step of a running softmax: weights of ``scores`` [.., n], the factor of what is already mixed, the new state.

    Where a row's scores are all dead the weights are exactly zero and the factor is exactly one, or, where nothing is
    mixed yet, zero.
    """
    new = tl.maximum(maximum, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - safe[:, None])
    factor = tl.exp2(maximum - safe)
    return weights, factor, new, total * factor + tl.sum(weights, 1)


@triton.jit
def over_windows(
    q,  # [BLOCK_ROWS, D]
    k_head_ptr,  # this head of [slots, H, D]
    v_head_ptr,
    page_table_ptr,
    sequence,  # int32 [BLOCK_ROWS]
    end,  # int32 [BLOCK_ROWS], first position of the tail, 0 for dead rows
    num_sequences,
    stride_table,
    scale,
    part,
    C: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Maximum, sum and mixture of the windows that belong to ``part``: sequences in order, windows in order."""
    offs_d = tl.arange(0, D)
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    mixed = tl.zeros((BLOCK_ROWS, D), tl.float32)
    for b in range(num_sequences):
        mine = tl.where(sequence == b, end, 0)
        last = tl.max(mine, 0)
        for start in range(part * WINDOW, last, PARTS * WINDOW):
            lane = start + tl.arange(0, WINDOW)
            live = lane < last
            page = tl.load(page_table_ptr + b * stride_table + lane // PAGE_SIZE, mask=live, other=0)
            slot = (page * PAGE_SIZE + lane % PAGE_SIZE).to(tl.int64) * C
            k = tl.load(k_head_ptr + slot[None, :] + offs_d[:, None], mask=live[None, :], other=0.0)
            v = tl.load(v_head_ptr + slot[:, None] + offs_d[None, :], mask=live[:, None], other=0.0)  # on its way, too
            scores = tl.dot(q, k, input_precision="ieee") * scale
            scores = tl.where(lane[None, :] < mine[:, None], scores, float("-inf"))
            weights, factor, maximum, total = _online(scores, maximum, total)
            mixed = mixed * factor[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return maximum, total, mixed


@triton.jit
def _tails(
    q,  # float32 [TAIL_ROWS, D], scaled
    k_head_ptr,
    v_head_ptr,
    tail_slots_ptr,  # int32 [N, LANES]
    row,  # int64 [TAIL_ROWS]
    mask_row,
    C: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    STEP: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Maximum, sum and mixture of each row's own tail, STEP lanes at a time, on the vector units in float32."""
    offs_d = tl.arange(0, D)
    maximum = tl.full((TAIL_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((TAIL_ROWS,), tl.float32)
    mixed = tl.zeros((TAIL_ROWS, D), tl.float32)
    for start in tl.static_range(0, LANES, STEP):
        lane = start + tl.arange(0, STEP)
        exists = mask_row[:, None] & (lane < LANES)[None, :]
        slot = tl.load(tail_slots_ptr + row[:, None] * LANES + lane[None, :], mask=exists, other=0)
        live = slot >= PAGE_SIZE
        offs = slot.to(tl.int64)[:, :, None] * C + offs_d[None, None, :]
        k = tl.load(k_head_ptr + offs, mask=live[:, :, None], other=0.0).to(tl.float32)
        v = tl.load(v_head_ptr + offs, mask=live[:, :, None], other=0.0).to(tl.float32)
        scores = tl.where(live, tl.sum(q[:, None, :] * k, 2), float("-inf"))
        weights, factor, maximum, total = _online(scores, maximum, total)
        mixed = mixed * factor[:, None] + tl.sum(weights[:, :, None] * v, 1)
    return maximum, total, mixed


@triton.jit
def load_queries(q_head_ptr, first, num_rows, C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers int64 [ROWS] from ``first``, which of them exist, and their queries [ROWS, D]."""
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    mask_row = row < num_rows
    offs = row[:, None] * C + tl.arange(0, D)[None, :]
    return row, mask_row, tl.load(q_head_ptr + offs, mask=mask_row[:, None], other=0.0)


@triton.jit
def _leave(mixed_ptr, maxima_ptr, sums_ptr, state, mask_row, maximum, total, mixed, D: tl.constexpr):
    """Store what one program has summed, for the one that merges."""
    tl.store(maxima_ptr + state, maximum, mask=mask_row)
    tl.store(sums_ptr + state, total, mask=mask_row)
    tl.store(mixed_ptr + state[:, None] * D + tl.arange(0, D)[None, :], mixed, mask=mask_row[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_sequences", "stride_table", "scale"])
def _tree_attention_kernel(
    q_ptr,  # [N, H, D]
    k_cache_ptr,  # [slots, H, D]
    v_cache_ptr,  # [slots, H, D]
    out_ptr,  # [N, H, D]
    page_table_ptr,  # int32 [B, stride_table]
    sequences_ptr,  # int32 [N]
    positions_ptr,  # int32 [N]
    tail_slots_ptr,  # int32 [N, LANES]
    mixed_ptr,  # float32 [PARTS + 1, N, H, D], the tails last
    maxima_ptr,  # float32 [PARTS + 1, N, H], to the base 2
    sums_ptr,  # float32 [PARTS + 1, N, H]
    arrivals_ptr,  # int32 [row blocks, H], zero before and after
    num_rows,  # N
    num_slots,
    num_sequences,  # B
    stride_table,
    scale,  # of the scores, times log2(e)
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    AMD: tl.constexpr,
    WINDOW: tl.constexpr,
    LANES: tl.constexpr,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Grid (H, row blocks, PARTS + BLOCK_ROWS / TAIL_ROWS): one part of the windows, or the tails of a few rows.

    Reads each window once per row block and each tail once per row: 2 D values a key.
    """
    head, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C: tl.constexpr = H * D
    q_head_ptr, k_head_ptr, v_head_ptr = q_ptr + head * D, k_cache_ptr + head * D, v_cache_ptr + head * D
    stride_part = num_rows.to(tl.int64) * H
    first = block * BLOCK_ROWS
    tail_first = first + (part - PARTS) * TAIL_ROWS
    if starts_early():
        prefetch_keys(
            k_head_ptr,
            v_head_ptr,
            page_table_ptr,
            sequences_ptr,
            positions_ptr,
            tail_slots_ptr,
            tl.minimum(tl.maximum(first, tail_first), num_rows - 1),
            num_slots,
            stride_table,
            part,
            C,
            D,
            PAGE_SIZE,
            PARTS,
            WINDOW,
            LANES,
            DEPTH,
            ALIGNMENT,
        )
    wait_for_previous()
    if tail_first >= num_rows:  # tails of rows that do not exist; of a window, part - PARTS is below 0
        return
    if part < PARTS:
        row, mask_row, q = load_queries(q_head_ptr, first, num_rows, C, D, BLOCK_ROWS)
        sequence = tl.load(sequences_ptr + row, mask=mask_row, other=0)
        position = tl.load(positions_ptr + row, mask=mask_row, other=0)
        end = tl.maximum(position - DEPTH, 0) // ALIGNMENT * ALIGNMENT  # shared_end of kernels/layout.py
        maximum, total, mixed = over_windows(
            q,
            k_head_ptr,
            v_head_ptr,
            page_table_ptr,
            sequence,
            end,
            num_sequences,
            stride_table,
            scale,
            part,
            C,
            D,
            PAGE_SIZE,
            PARTS,
            WINDOW,
            BLOCK_ROWS,
        )
        state = part * stride_part + row * H + head
        _leave(mixed_ptr, maxima_ptr, sums_ptr, state, mask_row, maximum, total, mixed, D)
    else:
        tail_row, mask_tail, tail_q = load_queries(q_head_ptr, tail_first, num_rows, C, D, TAIL_ROWS)
        tail_maximum, tail_total, tail_mixed = _tails(
            tail_q.to(tl.float32) * scale,
            k_head_ptr,
            v_head_ptr,
            tail_slots_ptr,
            tail_row,
            mask_tail,
            C,
            D,
            PAGE_SIZE,
            LANES,
            STEP,
            TAIL_ROWS,
        )
        tail_state = PARTS * stride_part + tail_row * H + head
        _leave(mixed_ptr, maxima_ptr, sums_ptr, tail_state, mask_tail, tail_maximum, tail_total, tail_mixed, D)

    arrival_ptr = arrivals_ptr + block * H + head
    with_tails = tl.cdiv(tl.minimum(num_rows - first, BLOCK_ROWS), TAIL_ROWS)
    if arrive(arrival_ptr, AMD) < PARTS + with_tails - 1:
        return
    tl.store(arrival_ptr, 0)
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_ROWS)
    live = rows < num_rows
    offs_d = tl.arange(0, D)
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    for i in tl.static_range(PARTS + 1):
        state_of = i * stride_part + rows * H + head
        part_max = tl.load(maxima_ptr + state_of, mask=live, other=float("-inf"), cache_modifier=".cg")
        largest = tl.maximum(largest, part_max)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    output = tl.zeros((BLOCK_ROWS, D), tl.float32)
    for i in tl.static_range(PARTS + 1):
        offs = i * stride_part + rows * H + head
        part_max = tl.load(maxima_ptr + offs, mask=live, other=float("-inf"), cache_modifier=".cg")
        factor = tl.exp2(part_max - safe)
        part_sum = tl.load(sums_ptr + offs, mask=live, other=0.0, cache_modifier=".cg")
        part_mixed = tl.load(
            mixed_ptr + offs[:, None] * D + offs_d[None, :],
            mask=live[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        weight_sum += part_sum * factor
        output += part_mixed * factor[:, None]
    output = (output / weight_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * C + head * D + offs_d[None, :], output, mask=live[:, None])


def tree_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    out: torch.Tensor,  # [N, H * D], written
    route: Route,
    scale: float,
    tiles: AttentionTiles | None = None,  # None = the architecture's own
) -> torch.Tensor:
    """Launch tree attention into ``out``; arguments checked by ``kernels.gpu.forward.tree_attention``."""
    num_rows, num_heads, dim = q.shape
    tiles = tiles or attention_tiles(architecture(q.device), dim, q.dtype)
    blocks, parts = cdiv(num_rows, tiles.rows), tiles.parts
    scratch = {"dtype": torch.float32, "device": q.device}
    launch(
        _tree_attention_kernel,
        (num_heads, blocks, parts + tiles.rows // tiles.tail_rows),
        {
            "q_ptr": q,
            "k_cache_ptr": k_cache,
            "v_cache_ptr": v_cache,
            "out_ptr": out,
            "page_table_ptr": route.page_table,
            "sequences_ptr": route.sequences,
            "positions_ptr": route.positions,
            "tail_slots_ptr": route.tail_slots,
            "mixed_ptr": torch.empty(parts + 1, num_rows, num_heads, dim, **scratch),
            "maxima_ptr": torch.empty(parts + 1, num_rows, num_heads, **scratch),
            "sums_ptr": torch.empty(parts + 1, num_rows, num_heads, **scratch),
            "arrivals_ptr": arrivals(blocks * num_heads, q.device),
            "num_rows": num_rows,
            "num_slots": len(k_cache),
            "num_sequences": len(route.page_table),
            "stride_table": route.page_table.stride(0),
            "scale": scale * LOG2E,
        },
        {
            "H": num_heads,
            "D": dim,
            "PAGE_SIZE": route.page_size,
            "PARTS": parts,
            "AMD": is_amd(),
            "WINDOW": tiles.window,
            "LANES": TAIL_LANES,
            "STEP": tiles.tail_step,
            "DEPTH": DEPTH_LIMIT,
            "ALIGNMENT": TAIL_ALIGNMENT,
            "BLOCK_ROWS": tiles.rows,
            "TAIL_ROWS": tiles.tail_rows,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        all_registers=tiles.all_registers,
    )
    return out
