"""draft² on the device: the contexts of all nodes are hashed, probed and turned into children in one launch."""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import launch, require
from kernels.gpu.noise import first, gumbel, philox_word, seed_words
from kernels.gpu.tree import require_tree
from kernels.layout import MAX_PROBES, Progress, Sampling, SuccessorTable, Tree


@triton.jit(do_not_specialize=["seed_low", "seed_high", "temperature", "tau", "num_buckets"])
def _lookup_kernel(
    nodes_ptr,  # int32 [W], -1 = none
    tree_tokens_ptr,  # int32 [M]
    parents_ptr,  # int32 [M]
    depths_ptr,  # int32 [M]
    text_ptr,  # int32 [any]
    length_ptr,  # int32 [1]
    keys_ptr,  # int64 [buckets], previous * V + last, -1 empty
    rows_ptr,  # int32 [buckets]
    tokens_ptr,  # int32 [rows, WIDTH]
    log_probs_ptr,  # float32 [rows, WIDTH]
    log_rest_ptr,  # float32 [rows]
    children_ptr,  # int32 [W, CHILDREN], written
    scores_ptr,  # float32 [W, CHILDREN], written
    seed_low,
    seed_high,
    temperature,
    tau,
    num_buckets,  # a power of two
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    CHILDREN: tl.constexpr,
    NOISE: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (W,): one node. Its probes are loaded together, then one row of the table."""
    w = tl.program_id(0)
    node = tl.load(nodes_ptr + w)
    child = tl.arange(0, triton.next_power_of_2(CHILDREN))
    if node < 0:
        tl.store(children_ptr + w * CHILDREN + child, 0, mask=child < CHILDREN)
        tl.store(scores_ptr + w * CHILDREN + child, float("-inf"), mask=child < CHILDREN)
        return
    length = tl.load(length_ptr)
    parent = tl.load(parents_ptr + node)
    last = tl.load(tree_tokens_ptr + node).to(tl.int64)
    in_text = tl.load(text_ptr + length - 2, mask=(parent < 0) & (length > 1), other=-1)
    previous = tl.load(tree_tokens_ptr + parent, mask=parent >= 0, other=in_text).to(tl.int64)

    key = previous * V + last
    offs = tl.arange(0, PROBES)
    bucket = ((key * -7046029254386353131 >> 32) & (num_buckets - 1)) + offs  # the hash of kernels.reference
    bucket = tl.where(bucket >= num_buckets, bucket - num_buckets, bucket)
    hit = (tl.load(keys_ptr + bucket) == key) & (previous >= 0)
    probe = first(hit, offs, PROBES)
    found = tl.max(tl.where(offs == probe, bucket, -1))
    row = tl.load(rows_ptr + found, mask=found >= 0, other=0).to(tl.int64)
    row = tl.where(found >= 0, row, last)

    lane = tl.arange(0, BLOCK)
    exists = lane < WIDTH
    token = tl.load(tokens_ptr + row * WIDTH + lane, mask=exists, other=-1)
    score = tl.load(log_probs_ptr + row * WIDTH + lane, mask=exists, other=float("-inf")) / temperature
    rest = tl.load(log_rest_ptr + row) / temperature / tau
    if NOISE:
        position = length + tl.load(depths_ptr + node)
        score = score + gumbel(philox_word(seed_low, seed_high, token, position))
    score = tl.where(exists, score, float("-inf")) / tau
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's best children of each node and their edge scores; see ``kernels.reference``. One launch.

    int32 [W, m] and float32 [W, m]; the scores of a dead node are -inf.
    """
    device, width = tree.tokens.device, table.tokens.shape[1]
    require_tree(tree)
    require("nodes", nodes, (None,), torch.int32, device)
    require("keys", table.keys, (None,), torch.int64, device)
    require("rows", table.rows, (len(table.keys),), torch.int32, device)
    require("tokens", table.tokens, (None, None), torch.int32, device)
    require("log_probs", table.log_probs, tuple(table.tokens.shape), torch.float32, device)
    require("log_rest", table.log_rest, (len(table.tokens),), torch.float32, device)
    num_children = min(num_children, width)
    children = torch.empty(len(nodes), num_children, dtype=torch.int32, device=device)
    scores = torch.empty(len(nodes), num_children, dtype=torch.float32, device=device)
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
            "keys_ptr": table.keys,
            "rows_ptr": table.rows,
            "tokens_ptr": table.tokens,
            "log_probs_ptr": table.log_probs,
            "log_rest_ptr": table.log_rest,
            "children_ptr": children,
            "scores_ptr": scores,
            **seed_words(sampling.seed),
            "temperature": float(sampling.temperature),
            "tau": float(tau),
            "num_buckets": len(table.keys),
        },
        {
            "V": table.vocab_size,
            "WIDTH": width,
            "CHILDREN": num_children,
            "NOISE": sampling.noise,
            "PROBES": MAX_PROBES,
            "BLOCK": triton.next_power_of_2(width),
        },
        num_warps=1,
    )
    return children, scores
