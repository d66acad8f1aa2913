"""Sampling over the whole vocabulary: any top-k, none, and rows whose ties overflow ``kernels.gpu.sampling``."""

import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.noise import gumbel, load_seed, philox_word
from kernels.gpu.order import first, order


@triton.jit
def _row_block(logits_row_ptr, start, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """Token ids, which exist, logits and their scores at temperature, from ``start``."""
    token = start + tl.arange(0, BLOCK)
    exists = token < V
    value = tl.load(logits_row_ptr + token, mask=exists, other=float("-inf")).to(tl.float32)
    return token, exists, value, tl.div_rn(value, temperature)


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "log_min_p", "tau"])
def draw_wide_kernel(
    logits_ptr,  # [N, V], rows STRIDE apart
    positions_ptr,  # int32 [N]
    seed_ptr,  # int32 [2]
    tokens_ptr,  # int32 [N], written
    children_ptr,  # int32 [N, CHILDREN], written
    edges_ptr,  # float32 [N, CHILDREN], written
    log_probs_ptr,  # float32 [N] or None, written
    child_log_probs_ptr,  # float32 [N, CHILDREN] or None, written
    overflow_ptr,  # int32 [N]: which rows to do; None = all
    scores_ptr,  # float32 [N, V], scratch
    temperature,
    top_k,  # 0 = off
    top_p,
    log_min_p,
    tau,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    CHILDREN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): one row with noise, over the whole vocabulary; the bisections re-read it from the L2 cache."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    if overflow_ptr is not None:  # noqa: SIM102  known when compiled, unlike what it points to
        if tl.load(overflow_ptr + row) == 0:
            return
    logits_row_ptr = logits_ptr + row * STRIDE
    scores_row_ptr = scores_ptr + row * V
    position, seed = tl.load(positions_ptr + row), load_seed(seed_ptr)

    largest = float("-inf")
    num_nan = 0
    for start in range(0, V, BLOCK):
        _, _, value, score = _row_block(logits_row_ptr, start, temperature, V, BLOCK)
        largest = tl.maximum(largest, tl.max(score))
        num_nan += tl.sum((value != value).to(tl.int32))
    kth = tl.full((), -2147483648, tl.int32)
    floor = tl.full((), float("-inf"), tl.float32)  # of the scores that top-k lets through
    if top_k > 0:
        for i in range(BITS):
            trial = kth + (tl.full((), 1, tl.int32) << (31 - i))
            count = 0
            for start in range(0, V, BLOCK):
                _, exists, value, _ = _row_block(logits_row_ptr, start, temperature, V, BLOCK)
                count += tl.sum((exists & (order(value) >= trial)).to(tl.int32))
            kth = tl.where(count >= top_k, trial, kth)
        kth = tl.where(kth < 0, kth | ((1 << (32 - BITS)) - 1), kth)
        floor = tl.div_rn((kth ^ ((kth >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), temperature)
    cut = tl.full((), -2147483648, tl.int32)
    before_cut = 0.0
    wanted_mass = 0.0
    if NUCLEUS:
        for start in range(0, V, BLOCK):
            _, exists, value, score = _row_block(logits_row_ptr, start, temperature, V, BLOCK)
            live = exists & (score >= floor)
            wanted_mass += tl.sum(tl.where(live, tl.exp(score - largest), 0.0))
        wanted_mass = wanted_mass * top_p
        for i in range(32):
            trial = cut + (tl.full((), 1, tl.int32) << (31 - i))
            mass_above = 0.0
            for start in range(0, V, BLOCK):
                _, exists, value, score = _row_block(logits_row_ptr, start, temperature, V, BLOCK)
                live = exists & (score >= floor) & (order(score) > trial)
                mass_above += tl.sum(tl.where(live, tl.exp(score - largest), 0.0))
            cut = tl.where(mass_above >= wanted_mass, trial, cut)
        cut += 1
        for start in range(0, V, BLOCK):
            _, exists, value, score = _row_block(logits_row_ptr, start, temperature, V, BLOCK)
            live = exists & (score >= floor) & (order(score) > cut)
            before_cut += tl.sum(tl.where(live, tl.exp(score - largest), 0.0))

    best = float("-inf")
    best_id = 0
    best_plain = 0.0
    plain_total = 0.0
    num_equal = 0
    for start in range(0, V, BLOCK):
        token, exists, value, score = _row_block(logits_row_ptr, start, temperature, V, BLOCK)
        live = exists & (score >= floor) & (score >= largest + log_min_p)
        mass = tl.exp(score - largest)
        if NUCLEUS:
            keys = order(score)
            equal = exists & (keys == cut)
            rank = num_equal + tl.cumsum(equal.to(tl.int32), 0) - 1
            num_equal += tl.sum(equal.to(tl.int32))
            live = live & ((keys > cut) | (equal & (before_cut + rank * mass < wanted_mass)))
        plain_total += tl.sum(tl.where(live, mass, 0.0))
        plain = score
        score = tl.where(live, score + gumbel(philox_word(seed, token, position)), float("-inf"))
        tl.store(scores_row_ptr + token, score, mask=exists)
        top = tl.max(score)
        at = first(score == top, token, V)
        better = top > best
        best_plain = tl.where(better, tl.sum(tl.where(token == at, plain, 0.0)), best_plain)
        best_id = tl.where(better, at, best_id)
        best = tl.maximum(best, top)
    tl.store(tokens_ptr + row, tl.where(num_nan > 0, -1, best_id))
    best = tl.where(num_nan > 0, float("nan"), best)  # and so are all edges and log-probabilities
    largest = tl.where(num_nan > 0, float("nan"), largest)
    if log_probs_ptr is not None:
        tl.store(log_probs_ptr + row, best_plain - largest - tl.log(plain_total))
    if CHILDREN > 0:
        tl.debug_barrier()
        total = 0.0
        for start in range(0, V, BLOCK):
            token = start + tl.arange(0, BLOCK)
            score = tl.load(scores_row_ptr + token, mask=token < V, other=float("-inf"))
            total += tl.sum(tl.exp((score - best) / tau))
        last, last_id = best, best_id
        for child in range(CHILDREN):
            tl.store(children_ptr + row * CHILDREN + child, last_id)
            tl.store(edges_ptr + row * CHILDREN + child, (last - best) / tau - tl.log(total))
            if child_log_probs_ptr is not None:
                plain = tl.div_rn(tl.load(logits_row_ptr + last_id).to(tl.float32), temperature)
                plain = tl.where(last > float("-inf"), plain, last)
                tl.store(child_log_probs_ptr + row * CHILDREN + child, plain - largest - tl.log(plain_total))
            above, above_id = last, last_id  # the next one comes after it in (score falling, id rising)
            last = float("-inf")
            last_id = 0
            for start in range(0, V, BLOCK):
                token = start + tl.arange(0, BLOCK)
                score = tl.load(scores_row_ptr + token, mask=token < V, other=float("-inf"))
                later = (score < above) | ((score == above) & (token > above_id))
                score = tl.where(later, score, float("-inf"))
                top = tl.max(score)
                last_id = tl.where(top > last, first(score == top, token, V), last_id)
                last = tl.maximum(last, top)
