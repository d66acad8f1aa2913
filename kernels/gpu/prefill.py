"""Causal attention of a long prompt: a pass of more than MAX_ROWS committed rows of one sequence.

Tiles are larger than in decoding and no row has a path of its own, so keys are read once for a block of queries. A
row's result depends on its position and the tokens before it, not on how many rows the pass has; it need not have the
bits of a decoding pass, since every method prefills the same prompt through the same passes.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.attention import LOG2E, load_queries, over_windows
from kernels.gpu.config import prefill_attention_tiles
from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import cdiv, launch
from kernels.gpu.route import Route


@triton.jit(do_not_specialize=["num_rows", "stride_table", "scale"])
def _prefill_attention_kernel(
    q_ptr,  # [N, H, D]
    k_cache_ptr,  # [slots, H, D]
    v_cache_ptr,  # [slots, H, D]
    out_ptr,  # [N, H, D]
    page_table_ptr,  # int32 [B, stride_table]
    sequences_ptr,  # int32 [N], the same for all rows
    positions_ptr,  # int32 [N], ascending
    num_rows,  # N
    stride_table,
    scale,  # of the scores, times log2(e)
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid (row blocks, H): causal attention of committed rows, windows in ascending order from position 0."""
    wait_for_previous()
    block, head = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = H * D
    row, mask_row, q = load_queries(q_ptr + head * D, block * BLOCK_ROWS, num_rows, C, D, BLOCK_ROWS)
    end = tl.load(positions_ptr + row, mask=mask_row, other=-1) + 1
    sequence = tl.load(sequences_ptr).to(tl.int64)
    maximum, total, mixed = over_windows(
        q,
        k_cache_ptr + head * D,
        v_cache_ptr + head * D,
        page_table_ptr + sequence * stride_table,
        tl.zeros_like(end),  # the only sequence of the shifted table
        end,
        1,
        stride_table,
        scale,
        0,
        C,
        D,
        PAGE_SIZE,
        1,
        WINDOW,
        BLOCK_ROWS,
    )
    output = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    offs = row[:, None] * C + head * D + tl.arange(0, D)[None, :]
    tl.store(out_ptr + offs, output, mask=mask_row[:, None])


def prefill_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    out: torch.Tensor,  # [N, H * D], written
    route: Route,
    scale: float,
) -> torch.Tensor:
    """Launch causal attention into ``out``; arguments checked by ``kernels.gpu.forward.tree_attention``."""
    num_rows, num_heads, dim = q.shape
    rows, window = prefill_attention_tiles(dim, q.dtype)
    launch(
        _prefill_attention_kernel,
        (cdiv(num_rows, rows), num_heads),
        {
            "q_ptr": q,
            "k_cache_ptr": k_cache,
            "v_cache_ptr": v_cache,
            "out_ptr": out,
            "page_table_ptr": route.page_table,
            "sequences_ptr": route.sequences,
            "positions_ptr": route.positions,
            "num_rows": num_rows,
            "stride_table": route.page_table.stride(0),
            "scale": scale * LOG2E,
        },
        {"H": num_heads, "D": dim, "PAGE_SIZE": route.page_size, "WINDOW": window, "BLOCK_ROWS": rows},
        num_warps=4,
        num_stages=2,
    )
    return out
