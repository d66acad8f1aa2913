"""The tokens up to a node, in the tree and in the text, and the keys of them by which draft² looks up what follows."""

import triton
import triton.language as tl

from kernels.gpu.launch import next_power_of_2
from kernels.gpu.tree import PATH
from kernels.layout import LONGEST_CONTEXT, NUM_CONTEXTS
from kernels.reference import contexts

CONTEXTS = {  # constants of ``context_keys``
    "PATH": PATH,
    "LONGEST": LONGEST_CONTEXT,
    "BLOCK_CONTEXTS": next_power_of_2(NUM_CONTEXTS),
}
MULTIPLIER = tl.constexpr(contexts.MULTIPLIER)
POSITIVE = tl.constexpr(2**63 - 1)


@triton.jit
def hash_context(key, num_buckets):
    """First bucket of an int64 key, ``hash_context`` of kernels.reference."""
    return (key * MULTIPLIER >> 32) & (num_buckets - 1)


@triton.jit
def context_keys(
    node,  # int32 [R]
    live,
    depth,
    length,
    tree_tokens_ptr,
    paths_ptr,
    text_ptr,
    PATH: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_CONTEXTS: tl.constexpr,
):
    """``context_keys`` of kernels.reference: int64 [R, BLOCK_CONTEXTS], of the last 2, 4, ... tokens up to each node in
    the tree and in the text; which of them there are; and the token before the node's own, int64 [R]."""
    back = tl.arange(0, LONGEST)[None, :]
    at = depth[:, None] - back
    exists = live[:, None] & (length + at > 0)
    in_tree = exists & (at >= 0)
    member = tl.load(paths_ptr + node[:, None] * PATH + at, mask=in_tree, other=0)
    in_text = tl.load(text_ptr + length - 1 + at, mask=exists & (at < 0), other=0)
    token = tl.load(tree_tokens_ptr + member, mask=in_tree, other=in_text).to(tl.int64)
    power = tl.full((1, LONGEST), 1, tl.int64)
    for i in tl.static_range(1, LONGEST):
        power = tl.where(back >= i, power * MULTIPLIER, power)
    weighted = (token + 1) * power
    tokens = tl.full((BLOCK_CONTEXTS,), 2, tl.int32) << tl.arange(0, BLOCK_CONTEXTS)
    key = tl.sum(tl.where(back[:, :, None] < tokens[None, None, :], weighted[:, :, None], 0), 1) & POSITIVE
    known = live[:, None] & ((length + depth)[:, None] >= tokens[None, :]) & (tokens <= LONGEST)[None, :]
    return key, known, tl.sum(tl.where(back == 1, token, 0), 1)
