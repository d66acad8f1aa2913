"""Fused sampling: temperature, top-k, top-p, min-p, noise and argmax of a row in one program, without sorting it.

The draw rule is ``kernels.reference.draw``: token = argmax over the survivors of logits / temperature + gumbel(seed,
position, token). Two kernels compute it.

The narrow one serves greedy decoding and small top-k. The output head keeps the largest logit of every VOCAB_TILE
tokens. The k-th largest of those maxima is itself a logit that at least k logits reach, so every survivor is at or
above it and lies in a tile whose maximum is: about k tiles of the 786 that GPT-2 has. Their logits are searched for the
exact k-th largest by bisection on the bits (16 steps suffice for bfloat16 logits, whose low bits are zero), survivors,
ties at the k-th value included, are compacted in order of their ids, and noise is computed for them alone.

The wide kernel takes any k, no top-k at all, and rows whose ties overflow the narrow one: the same bisections, over the
whole row.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import FLOATS, launch, require
from kernels.gpu.noise import gumbel, load_seed, philox_word
from kernels.gpu.order import best, first, kth_largest, nucleus_cut, order
from kernels.gpu.sampling_wide import draw_wide_kernel
from kernels.layout import MAX_CHILDREN, VOCAB_TILE, Sampling

NARROW_K = MAX_CHILDREN  # largest top-k and number of children of the narrow kernel
_SEARCH_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}  # of a logit as float32, zeros not counted


@triton.jit
def _candidates(value, exists, temperature, top_k, NOISE: tl.constexpr, BITS: tl.constexpr):
    """Which of ``value`` can be drawn: under noise the top_k and all that tie with the last of them, else top_k alone.

    What equals the last value once divided by the temperature ties with it.
    """
    seen_by_search: tl.constexpr = -(1 << (32 - BITS))
    keys = tl.where(exists, order(value) & seen_by_search, -2147483648)
    if NOISE:
        reached = exists & (keys >= kth_largest(keys, top_k, BITS))
        least = tl.min(tl.where(reached, value, float("inf")))
        return exists & (tl.div_rn(value, temperature) >= tl.div_rn(least, temperature))
    else:
        return best(keys, exists, top_k, BITS)


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "log_min_p", "tau"])
def _draw_narrow_kernel(
    logits_ptr,  # [N, V], rows STRIDE apart
    positions_ptr,  # int32 [N]
    seed_ptr,  # int32 [2]
    tile_maxima_ptr,  # float32 [N, cdiv(V, TILE)]
    tokens_ptr,  # int32 [N], written
    children_ptr,  # int32 [N, CHILDREN], written
    edges_ptr,  # float32 [N, CHILDREN], written
    log_probs_ptr,  # float32 [N] or None, written
    child_log_probs_ptr,  # float32 [N, CHILDREN] or None, written
    overflow_ptr,  # int32 [N] or None, written: 1 = the wide kernel must do this row
    tiles_ptr,  # int32 [N, TILES], scratch
    ids_ptr,  # int32 [N, SLOTS], scratch
    values_ptr,  # float32 [N, SLOTS], scratch
    temperature,
    top_k,  # survivors; without noise, candidates
    top_p,
    log_min_p,  # the lowest float = off; -inf would turn an infinite logit into NaN
    tau,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    NOISE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    CHILDREN: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): one row. Reads its tile maxima and about ``top_k`` tiles of logits, all for greedy children."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * STRIDE
    NUM_TILES: tl.constexpr = tl.cdiv(V, TILE)

    # tiles that can hold one of the highest top_k logits
    tile = tl.arange(0, BLOCK_MAXIMA)
    exists = tile < NUM_TILES
    maxima = tl.load(tile_maxima_ptr + row * NUM_TILES + tile, mask=exists, other=float("-inf"))
    is_nan = tl.max((maxima != maxima).to(tl.int32)) > 0
    wanted = _candidates(maxima, exists, temperature, top_k, NOISE, BITS)
    num_tiles = tl.sum(wanted.to(tl.int32))
    place = tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(tiles_ptr + row * TILES + place, tile, mask=wanted & (place < TILES))
    tl.debug_barrier()

    # the logits that can be among them, and the exact top_k-th
    lane = tl.arange(0, TILES * TILE)
    chosen = tl.load(tiles_ptr + row * TILES + lane // TILE, mask=lane // TILE < num_tiles, other=NUM_TILES)
    token = chosen * TILE + lane % TILE
    exists = token < V
    value = tl.load(logits_row_ptr + token, mask=exists, other=float("-inf")).to(tl.float32)
    wanted = _candidates(value, exists, temperature, top_k, NOISE, BITS)
    num_survivors = tl.sum(wanted.to(tl.int32))
    place = tl.cumsum(wanted.to(tl.int32), 0) - 1
    wanted = wanted & (place < SLOTS)
    chosen = tl.load(tiles_ptr + row * TILES + lane // TILE, mask=wanted, other=0, volatile=True)  # spares registers
    tl.store(ids_ptr + row * SLOTS + place, chosen * TILE + lane % TILE, mask=wanted)
    tl.store(values_ptr + row * SLOTS + place, value, mask=wanted)
    if overflow_ptr is not None:
        overflows = (num_tiles > TILES) | (num_survivors > SLOTS)
        tl.store(overflow_ptr + row, overflows.to(tl.int32))
    tl.debug_barrier()

    # filters, noise and the draw, on the survivors alone
    lane = tl.arange(0, SLOTS)
    exists = lane < num_survivors
    ids = tl.load(ids_ptr + row * SLOTS + lane, mask=exists, other=0)
    score = tl.load(values_ptr + row * SLOTS + lane, mask=exists, other=float("-inf"))
    largest = tl.max(score)
    if NOISE:
        score = tl.div_rn(score, temperature)
        largest = tl.div_rn(largest, temperature)
        if NUCLEUS:
            keys = tl.where(exists, order(score), -2147483648)
            mass = tl.where(exists, tl.exp(score - largest), 0.0)
            wanted_mass = top_p * tl.sum(mass)
            cut = nucleus_cut(keys, mass, wanted_mass, 32)
            equal = keys == cut
            before = tl.sum(tl.where(keys > cut, mass, 0.0)) + (tl.cumsum(equal.to(tl.int32), 0) - 1) * mass
            exists = exists & ((keys > cut) | (equal & (before < wanted_mass)))
        exists = exists & (score >= largest + log_min_p)
        score = tl.where(exists, score, float("-inf"))
    plain = score
    if NOISE:
        score = score + gumbel(philox_word(load_seed(seed_ptr), ids, tl.load(positions_ptr + row)))
    highest = tl.max(score)
    drawn = first(score == highest, lane, SLOTS)
    drawn_id = tl.sum(tl.where(lane == drawn, ids, 0))
    is_nan = is_nan | (highest != highest) | (drawn == SLOTS)
    tl.store(tokens_ptr + row, tl.where(is_nan, -1, drawn_id))
    highest = tl.where(is_nan, float("nan"), highest)  # and so are all edges and log-probabilities
    largest = tl.where(is_nan, float("nan"), largest)

    if NOISE:
        total = tl.sum(tl.exp((score - highest) / tau))
        plain_total = tl.sum(tl.exp(plain - largest))
    elif (CHILDREN > 0) | (log_probs_ptr is not None):
        offs = tl.arange(0, BLOCK)
        total = 0.0
        plain_total = 0.0
        for start in range(0, V, BLOCK):
            x = (
                tl.load(logits_row_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
                - highest
            )
            total += tl.sum(tl.exp(x / tau))
            plain_total += tl.sum(tl.exp(x))
    if log_probs_ptr is not None:
        drawn_score = tl.sum(tl.where(lane == drawn, plain, 0.0))
        tl.store(log_probs_ptr + row, drawn_score - largest - tl.log(plain_total))
    for child in tl.static_range(CHILDREN):
        top = tl.max(score)
        index = first(score == top, lane, SLOTS)
        at = row * CHILDREN + child
        tl.store(children_ptr + at, tl.sum(tl.where(lane == index, ids, 0)))
        tl.store(edges_ptr + at, (top - highest) / tau - tl.log(total))
        if child_log_probs_ptr is not None:
            plain_at = tl.sum(tl.where(lane == index, plain, 0.0))
            plain_at = tl.where(top > float("-inf"), plain_at, top)
            tl.store(child_log_probs_ptr + at, plain_at - largest - tl.log(plain_total))
        score = tl.where(lane == index, float("-inf"), score)


@triton.jit
def _tile_maxima_kernel(logits_ptr, maxima_ptr, V: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Grid (N, tiles): the largest logit of one tile, NaN if one of them is."""
    wait_for_previous()
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits_ptr + row * STRIDE + token, mask=token < V, other=float("-inf")).to(tl.float32)
    is_nan = tl.max((value != value).to(tl.int32)) > 0
    tl.store(maxima_ptr + row * tl.num_programs(1) + tile, tl.where(is_nan, float("nan"), tl.max(value)))


def draw(
    logits: torch.Tensor,  # [N, V], rows may be apart
    positions: torch.Tensor,  # int32 [N], absolute position of the token being drawn
    sampling: Sampling,
    num_children: int = 0,
    tau: float = 1.0,
    tile_maxima: torch.Tensor | None = None,  # float32 [N, cdiv(V, VOCAB_TILE)], from ``lm_head``
    log_probs: torch.Tensor | None = None,  # float32 [N], written
    child_log_probs: torch.Tensor | None = None,  # float32 [N, m], written
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw each row's token and, for the next tree, its best children; see ``kernels.reference.draw``.

    One or two launches, and one more where ``tile_maxima`` are not given. Raises ValueError for more children than
    MAX_CHILDREN.
    """
    num_rows, vocab_size = logits.shape
    device, width = logits.device, min(num_children, logits.shape[1])
    if logits.dtype not in FLOATS or logits.stride(1) != 1:
        raise ValueError(f"logits must be floats in rows of stride 1, got {logits.dtype}, strides {logits.stride()}")
    if width > MAX_CHILDREN:
        raise ValueError(f"num_children must be at most {MAX_CHILDREN}, got {num_children}")
    require("positions", positions, (num_rows,), torch.int32, device)
    require("seed", sampling.seed, (2,), torch.int32, device)
    if log_probs is not None:
        require("log_probs", log_probs, (num_rows,), torch.float32, device)
    if child_log_probs is not None:
        require("child_log_probs", child_log_probs, (num_rows, width), torch.float32, device)
    integers = {"dtype": torch.int32, "device": device}
    floats = {"dtype": torch.float32, "device": device}
    tokens = torch.empty(num_rows, **integers)
    children, edges = torch.empty(num_rows, width, **integers), torch.empty(num_rows, width, **floats)
    arguments = {
        "logits_ptr": logits,
        "positions_ptr": positions,
        "seed_ptr": sampling.seed,
        "tokens_ptr": tokens,
        "children_ptr": children,
        "edges_ptr": edges,
        "log_probs_ptr": log_probs,
        "child_log_probs_ptr": child_log_probs,
        "temperature": float(sampling.temperature),
        "top_p": max(float(sampling.top_p), torch.finfo(torch.float32).tiny),  # never no mass at all: one token stays
        "log_min_p": math.log(sampling.min_p) if sampling.min_p > 0 else -torch.finfo(torch.float32).max,
        "tau": float(tau),
    }
    constants = {
        "V": vocab_size,
        "STRIDE": logits.stride(0),
        "NUCLEUS": sampling.top_p < 1.0,
        "CHILDREN": width,
        "BITS": _SEARCH_BITS[logits.dtype],
        "BLOCK": min(2048, triton.next_power_of_2(vocab_size)),
    }
    top_k = min(sampling.top_k, vocab_size) if sampling.noise else max(1, width)
    overflow = None
    if 0 < top_k <= NARROW_K:
        overflow = torch.empty(num_rows, **integers) if sampling.noise else None
        _draw_narrow(arguments, constants, logits, tile_maxima, overflow, top_k, sampling.noise)
    if sampling.noise:
        scores = torch.empty(num_rows, vocab_size, **floats)
        arguments |= {"overflow_ptr": overflow, "scores_ptr": scores, "top_k": top_k if top_k < vocab_size else 0}
        launch(draw_wide_kernel, (num_rows,), arguments, constants, num_warps=8, all_registers=True)
    return tokens, children, edges


def _draw_narrow(arguments, constants, logits, tile_maxima, overflow, top_k: int, noise: bool) -> None:
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, VOCAB_TILE)
    shared = {"V": vocab_size, "STRIDE": logits.stride(0), "TILE": VOCAB_TILE}
    if tile_maxima is None:
        tile_maxima = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
        pointers = {"logits_ptr": logits, "maxima_ptr": tile_maxima}
        launch(_tile_maxima_kernel, (num_rows, num_tiles), pointers, shared, num_warps=1)
    require("tile_maxima", tile_maxima, (num_rows, num_tiles), torch.float32, logits.device)
    room = 2 if noise else 1  # for ties at the k-th value: all survive
    tiles = min(triton.next_power_of_2(room * top_k), triton.next_power_of_2(num_tiles))
    slots = triton.next_power_of_2(room * top_k)
    scratch = {
        "tile_maxima_ptr": tile_maxima,
        "overflow_ptr": overflow,
        "tiles_ptr": torch.empty(num_rows, tiles, dtype=torch.int32, device=logits.device),
        "ids_ptr": torch.empty(num_rows, slots, dtype=torch.int32, device=logits.device),
        "values_ptr": torch.empty(num_rows, slots, dtype=torch.float32, device=logits.device),
        "top_k": top_k,
    }
    sizes = {"TILES": tiles, "SLOTS": slots, "BLOCK_MAXIMA": triton.next_power_of_2(num_tiles), "NOISE": noise}
    pointers, constants = arguments | scratch, constants | shared | sizes
    launch(_draw_narrow_kernel, (num_rows,), pointers, constants, num_warps=8, all_registers=True)
