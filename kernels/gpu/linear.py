"""Linear layers for few rows: weights are streamed once, everything around the product is fused into it.

    y = epilogue(prologue(x) @ weight.T)        x [N, K], weight [M, K], y [N, M]

prologue: nothing or layer norm; epilogue: bias, GELU, residual, scatter of keys and values into the paged cache, or the
maximum of each tile of the vocabulary. With one row a pass reads M * K weights and next to nothing else, so it is bound
by memory, and so it is with a block of rows; more blocks find their weights in the L2 cache. A layer norm finds its
moments left behind by the layer that wrote the rows (``kernels.gpu.moments``); one with a residual leaves those of its
own rows.

One binary serves every N (``num_rows`` is never specialised on): the row tile is padded, the loop over K is serial, and
where M alone would leave multiprocessors idle, K is cut into a fixed number of splits. Each split leaves its sum in
memory; the last one to arrive adds them in index order, so the sum does not depend on who was last. Which rows of the
tile are alive changes no bit of the others: a row of a matrix product is computed from its own row of x. With few rows
the weights may be the left operand (``swapped``): a warp group multiplies at least 64 rows of that one, and reads both
from shared memory.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from kernels.gpu.arrival import arrive
from kernels.gpu.config import LinearTiles, linear_tiles, prefill_tiles
from kernels.gpu.early import prefetch_rows, starts_early, wait_for_previous
from kernels.gpu.launch import FLOATS, architecture, arrivals, cdiv, is_amd, launch, next_power_of_2, require
from kernels.gpu.moments import load_moments, row_moments, store_moments
from kernels.layout import MAX_ROWS, MOMENT_PART, VOCAB_TILE, Quantized

_ACTIVATIONS = {None: 0, "gelu_tanh": 1, "gelu": 2}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:  # x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z))
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x


@triton.jit
def _finish(
    acc,  # float32 [BLOCK_ROWS, BLOCK_OUT]
    bias_ptr,
    residual_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    tile_maxima_ptr,
    out_moments_ptr,
    offs_row,  # int64 [BLOCK_ROWS]
    mask_row,
    tile,
    M: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PART: tl.constexpr,
    scales_ptr,
):
    """The epilogue: everything after the product of one tile."""
    column = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_out = column < M
    mask = mask_row[:, None] & mask_out[None, :]
    if scales_ptr is not None:
        acc *= tl.load(scales_ptr + column, mask=mask_out, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=mask_out, other=0.0).to(tl.float32)[None, :]
    acc = _activate(acc, ACTIVATION)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs_row[:, None] * M + column[None, :], mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    y = acc.to(out_ptr.dtype.element_ty)
    if slot_mapping_ptr is not None:  # M = 3 C; a tile lies in the queries, in the keys or in the values
        C: tl.constexpr = M // 3
        part = tile * BLOCK_OUT // C
        column -= part * C
        if part == 0:
            tl.store(out_ptr + offs_row[:, None] * C + column[None, :], y, mask=mask)
        else:
            slot = tl.load(slot_mapping_ptr + offs_row, mask=mask_row, other=-1).to(tl.int64)
            target = slot[:, None] * C + column[None, :]
            mask_slot = (slot >= 0)[:, None] & mask_out[None, :]
            if part == 1:
                tl.store(k_cache_ptr + target, y, mask=mask_slot)
            else:
                tl.store(v_cache_ptr + target, y, mask=mask_slot)
    else:
        tl.store(out_ptr + offs_row[:, None] * OUT_STRIDE + column[None, :], y, mask=mask)
    if out_moments_ptr is not None:
        first = tile * (BLOCK_OUT // PART)
        store_moments(out_moments_ptr, y.to(tl.float32), first, offs_row, mask_row, M, tl.cdiv(M, PART), PART)
    if tile_maxima_ptr is not None:
        logits = tl.where(mask_out[None, :], y.to(tl.float32), float("-inf"))
        is_nan = tl.max((logits != logits).to(tl.int32), 1) > 0  # a maximum alone would drop it
        largest = tl.where(is_nan, float("nan"), tl.max(logits, 1))
        tl.store(tile_maxima_ptr + offs_row * tl.cdiv(M, BLOCK_OUT) + tile, largest, mask=mask_row)


@triton.jit
def _load_affine(norm_weight_ptr, norm_bias_ptr, k, K: tl.constexpr):
    """Gain and shift of a layer norm at the places ``k``."""
    gain = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0)
    return gain, tl.load(norm_bias_ptr + k, mask=k < K, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,  # [N, K]
    weight_ptr,  # [M, K], in x's dtype or int8
    bias_ptr,  # [M] or None
    norm_weight_ptr,  # [K] or None: no layer norm
    norm_bias_ptr,  # [K] or None
    residual_ptr,  # [N, M] or None
    out_ptr,  # [N, M], rows OUT_STRIDE apart; queries [N, M // 3] when slots are given
    k_cache_ptr,  # [slots, M // 3] or None
    v_cache_ptr,  # [slots, M // 3] or None
    slot_mapping_ptr,  # int32 [N], -1 = nowhere, or None
    tile_maxima_ptr,  # float32 [N, cdiv(M, BLOCK_OUT)] or None
    moments_ptr,  # float32 [N, 2, cdiv(K, PART)] of x, or None: no layer norm
    out_moments_ptr,  # float32 [N, 2, cdiv(M, PART)], written, or None
    partial_ptr,  # float32 [SPLITS, N, M] or None
    arrivals_ptr,  # int32 [row tiles * output tiles], zero before and after, or None
    num_rows,  # N
    M: tl.constexpr,
    K: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    AMD: tl.constexpr,
    SWAPPED: tl.constexpr,
    scales_ptr=None,  # float32 [M] of an int8 weight, or None
    rows_ptr=None,  # int32 [N], the rows of x and of its moments that are taken, or None: all, in order
):
    """Grid (row tiles, output tiles, SPLITS): [BLOCK_ROWS, BLOCK_OUT] outputs over one split of K.

    Reads BLOCK_OUT * K / SPLITS weights once and the live rows of x. Row tiles are neighbours in launch order, so a
    second row tile finds its weights in the L2 cache.
    """
    row_tile, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < num_rows
    column = tile.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_out = column < M
    offs_k = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    if starts_early():
        COUNT: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
        first, only = split * COUNT, tl.zeros((1,), tl.int64)
        prefetch_rows(weight_ptr, column, first, M, K, COUNT)
        if norm_weight_ptr is not None:
            prefetch_rows(norm_weight_ptr, only, first, 1, K, COUNT)
            prefetch_rows(norm_bias_ptr, only, first, 1, K, COUNT)
        if bias_ptr is not None:
            prefetch_rows(bias_ptr, only, tile * BLOCK_OUT, 1, M, BLOCK_OUT)
    wait_for_previous()
    offs_x = offs_row if rows_ptr is None else tl.load(rows_ptr + offs_row, mask=mask_row, other=0).to(tl.int64)
    if norm_weight_ptr is not None:
        gain, shift = _load_affine(norm_weight_ptr, norm_bias_ptr, split * STEPS * BLOCK_K + offs_k, K)
        mean, scale = load_moments(moments_ptr, offs_x, mask_row, K, tl.cdiv(K, PART), PART, BLOCK_PARTS, EPS)

    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS) if SWAPPED else (BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for step in range(STEPS):
        k = (split * STEPS + step) * BLOCK_K + offs_k
        mask_k = k < K
        weight = tl.load(
            weight_ptr + column[None, :] * K + k[:, None],
            mask=mask_out[None, :] & mask_k[:, None],
            other=0.0,
            eviction_policy="evict_first",
        )
        if scales_ptr is not None:  # an integer of 8 bits is exact in each of these dtypes
            weight = weight.to(x_ptr.dtype.element_ty)
        mask_x = mask_row[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs_x[:, None] * K + k[None, :], mask=mask_x, other=0.0)
        if norm_weight_ptr is not None:
            # Those of the next step are asked for here: nothing pipelines loads of a few bytes a thread.
            next_gain, next_shift = _load_affine(norm_weight_ptr, norm_bias_ptr, k + BLOCK_K, K)
            normal = (x.to(tl.float32) - mean[:, None]) * scale[:, None]
            x = (normal * gain.to(tl.float32)[None, :] + shift.to(tl.float32)[None, :]).to(weight.dtype)
            gain, shift = next_gain, next_shift
        if SWAPPED:
            acc = tl.dot(tl.trans(weight), tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weight, acc, input_precision="ieee")
    if SWAPPED:
        acc = tl.trans(acc)

    if SPLITS > 1:
        offs = offs_row[:, None] * M + column[None, :]
        mask = mask_row[:, None] & mask_out[None, :]
        stride = num_rows.to(tl.int64) * M
        tl.store(partial_ptr + split * stride + offs, acc, mask=mask)
        arrival_ptr = arrivals_ptr + row_tile * tl.num_programs(1) + tile
        if arrive(arrival_ptr, AMD) < SPLITS - 1:
            return
        tl.store(arrival_ptr, 0)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for i in tl.static_range(SPLITS):  # past the L1 cache, which other multiprocessors do not write through
            acc += tl.load(partial_ptr + i * stride + offs, mask=mask, other=0.0, cache_modifier=".cg")
    _finish(
        acc,
        bias_ptr,
        residual_ptr,
        out_ptr,
        k_cache_ptr,
        v_cache_ptr,
        slot_mapping_ptr,
        tile_maxima_ptr,
        out_moments_ptr,
        offs_row,
        mask_row,
        tile,
        M,
        OUT_STRIDE,
        ACTIVATION,
        BLOCK_OUT,
        PART,
        scales_ptr,
    )


def linear(
    x: torch.Tensor,  # [N, K], or [R, K] with ``rows``
    weight: torch.Tensor | Quantized,  # [M, K]
    out: torch.Tensor,  # [N, M], written; rows may be apart
    *,
    rows: torch.Tensor | None = None,  # int32 [N], the rows of x that are taken
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # weight [K], bias [K], eps
    moments: torch.Tensor | None = None,  # float32 [rows of x, 2, P], for ``norm``; None = taken here, one launch more
    activation: str | None = None,
    residual: torch.Tensor | None = None,  # [N, M]
    scatter: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,  # K and V caches [slots, H, D], slots [N]
    tile_maxima: torch.Tensor | None = None,  # float32 [N, M / VOCAB_TILE], written
    out_moments: torch.Tensor | None = None,  # float32 [N, 2, P] of out, written
    tiles: LinearTiles | None = None,  # None = the architecture's own
) -> torch.Tensor:
    """Launch one fused linear layer into ``out``; the operations of the forward pass are calls of this.

    Raises ValueError before the launch for what the kernel does not take: see ``require``, and rows over capacity.
    """
    depth, num_rows = x.shape[1], len(x if rows is None else rows)
    num_outputs, device, dtype = weight.shape[0], x.device, x.dtype
    require("x", x, (None, None), FLOATS, device)
    if rows is not None:
        require("rows", rows, (None,), torch.int32, device)
    scales = None
    if isinstance(weight, Quantized):
        weight, scales = weight.values, weight.scales
        require("scales", scales, (num_outputs,), torch.float32, device)
    require("weight", weight, (None, depth), dtype if scales is None else torch.int8, device)
    if bias is not None:
        require("bias", bias, (num_outputs,), dtype, device)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    if norm is not None:
        require("norm_weight", norm_weight, (depth,), dtype, device)
        require("norm_bias", norm_bias, (depth,), dtype, device)
    if moments is not None:
        require("moments", moments, (len(x), 2, cdiv(depth, MOMENT_PART)), torch.float32, device)
    if residual is not None:
        require("residual", residual, (num_rows, num_outputs), dtype, device)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(_ACTIVATIONS)}, got {activation!r}")
    if num_rows < 1:
        raise ValueError("x must have at least one row, got 0")
    columns = num_outputs if scatter is None else num_outputs // 3
    if (out.dtype, out.device, len(out), out[0].numel()) != (dtype, device, num_rows, columns) or out.stride(-1) != 1:
        raise ValueError(
            f"out must hold {num_rows} rows of {columns} {dtype}, stride 1, on {device}, "
            f"got {out.dtype} {list(out.shape)}, strides {out.stride()} on {out.device}"
        )
    arch = architecture(device)
    if tiles is None and num_rows > MAX_ROWS:
        tiles = prefill_tiles(arch, dtype, scales is not None)
        if scatter is not None and (num_outputs // 3) % tiles.outputs:
            tiles = replace(tiles, outputs=64)  # divides every width
    tiles = tiles or linear_tiles(arch, num_outputs, depth, dtype, scales is not None)
    if scatter is not None and (num_outputs // 3) % tiles.outputs:
        raise ValueError(f"a width of {num_outputs // 3} is no multiple of the {tiles.outputs} outputs of a tile")
    if tile_maxima is not None:
        if tiles.outputs != VOCAB_TILE:
            raise ValueError(f"tile_maxima need tiles of {VOCAB_TILE} outputs, got {tiles.outputs}")
        require("tile_maxima", tile_maxima, (num_rows, cdiv(num_outputs, VOCAB_TILE)), torch.float32, device)
    if out_moments is not None:
        if tiles.outputs % MOMENT_PART:
            raise ValueError(f"moments need tiles of a multiple of {MOMENT_PART} outputs, got {tiles.outputs}")
        require("moments", out_moments, (num_rows, 2, cdiv(num_outputs, MOMENT_PART)), torch.float32, device)
    if norm is not None and moments is None:
        moments = row_moments(x)
    k_cache, v_cache, slots = scatter or (None, None, None)
    grid = (cdiv(num_rows, tiles.rows), cdiv(num_outputs, tiles.outputs), tiles.splits)
    partial = counters = None
    if tiles.splits > 1:
        partial = torch.empty(tiles.splits, num_rows, num_outputs, dtype=torch.float32, device=device)
        counters = arrivals(grid[0] * grid[1], device)
    launch(
        _linear_kernel,
        grid,
        {
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "norm_weight_ptr": norm_weight,
            "norm_bias_ptr": norm_bias,
            "residual_ptr": residual,
            "out_ptr": out,
            "k_cache_ptr": k_cache,
            "v_cache_ptr": v_cache,
            "slot_mapping_ptr": slots,
            "tile_maxima_ptr": tile_maxima,
            "moments_ptr": moments,
            "out_moments_ptr": out_moments,
            "partial_ptr": partial,
            "arrivals_ptr": counters,
            "num_rows": num_rows,
            **({} if scales is None else {"scales_ptr": scales}),
            **({} if rows is None else {"rows_ptr": rows}),
        },
        {
            "M": num_outputs,
            "K": depth,
            "OUT_STRIDE": out.stride(0),
            "EPS": eps,
            "ACTIVATION": _ACTIVATIONS[activation],
            "PART": MOMENT_PART,
            "BLOCK_PARTS": next_power_of_2(cdiv(depth, MOMENT_PART)),
            "AMD": is_amd(),
            "BLOCK_ROWS": tiles.rows,
            "BLOCK_OUT": tiles.outputs,
            "BLOCK_K": tiles.depth,
            "SPLITS": tiles.splits,
            "SWAPPED": tiles.swapped,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        all_registers=tiles.all_registers,
    )
    return out
