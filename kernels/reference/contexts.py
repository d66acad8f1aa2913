"""The tokens up to a node, in the tree and in the text, and the keys of them by which draft2 looks up what follows."""

import numpy as np
import torch

from kernels.layout import LONGEST_CONTEXT, NUM_CONTEXTS
from kernels.reference.compiled import compiled

MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # of Fibonacci hashing, as int64
_POSITIVE = 2**63 - 1


def hash_context(key: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """First bucket of int64 ``key`` in a table of ``num_buckets`` (a power of two): Fibonacci hashing, 32 bits."""
    return ((key * MULTIPLIER >> 32) & 0xFFFFFFFF) % num_buckets


hash_of = compiled(hash_context)


@compiled
def tokens_before(tree, nodes, text, length):
    """The last LONGEST_CONTEXT tokens up to each of ``nodes``, its own first: int64 [W, LONGEST_CONTEXT]; and how many
    there are in all, which is the position of the next: int64 [W], 0 where there is no node. Others are 0."""
    latest, counts = np.zeros((len(nodes), LONGEST_CONTEXT), np.int64), np.zeros(len(nodes), np.int64)
    for i in range(len(nodes)):
        if nodes[i] >= 0:
            depth = np.int64(tree.depths[nodes[i]])
            counts[i] = length[0] + depth
            for back in range(min(LONGEST_CONTEXT, counts[i])):
                at = depth - back
                in_tree = at >= 0
                latest[i, back] = tree.tokens[tree.paths[nodes[i], at]] if in_tree else text[length[0] - 1 + at]
    return latest, counts


@compiled
def context_keys(latest, counts):
    """Keys in a ``RecentTable`` of the last 2, 4, ..., LONGEST_CONTEXT tokens, shortest first: int64 [contexts, N], -1
    where there are not so many. They are sums of the tokens times powers of MULTIPLIER, modulo 2**63."""
    keys = np.full((NUM_CONTEXTS, len(latest)), -1, np.int64)
    key, power = np.zeros(len(latest), np.int64), np.ones(1, np.int64)
    context, length = 0, 2
    for back in range(LONGEST_CONTEXT):
        key += (latest[:, back] + 1) * power
        power *= MULTIPLIER
        if back + 1 == length:
            keys[context] = np.where(counts >= length, key & _POSITIVE, -1)
            context, length = context + 1, 2 * length
    return keys
