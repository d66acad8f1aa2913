"""Torch twin of the rows of a stage's pass, made from the tree, the text and the stage's cache.

It works on the host in numpy and leaves dead rows out; its Triton counterpart returns the full width with -1 there.
"""

import numpy as np
import torch

from kernels.layout import Chain, Progress, Rows, Tree
from kernels.reference.tree import in_numpy


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
    """The rows of a pass that gives every node of ``nodes`` its last hidden state.

    At the head stand the committed tokens that the stage has not seen, the root the last of them. Then come the nodes,
    and those ancestors of theirs that only a higher stage has run; where there is no room for all, nodes are dropped,
    last ones first. The caches count all of them as seen.
    """
    tree, progress, chain = in_numpy(tree), in_numpy(progress), in_numpy(chain)
    nodes, length, first = nodes.numpy(), int(progress.length[0]), int(chain.cached_len[cache])
    reachable = reach.numpy()[0] >= 0
    if not reachable:
        first = length
        nodes = nodes[:0]
    assert length - first <= num_head, f"{length - first} committed tokens to catch up with, room for {num_head}"
    cached = chain.cached[cache]
    inside = np.zeros(len(cached) + 1, dtype=bool)  # one more for the -1 of paths
    inside[tree.paths[nodes]] = True
    below = np.flatnonzero(inside[1:-1] & (cached[1:] == 0)) + 1
    if len(below) > num_rows:
        nodes = nodes[~np.isin(tree.paths[nodes], below[num_rows:]).any(1)]
        below = below[:num_rows]
    cached[below] = 1
    if reachable:
        chain.cached_len[cache] = length
    head = np.arange(first, length, dtype=np.int32)
    assert len(head) or not (nodes == 0).any(), "the root is to be scored, but the cache has its K/V already"
    row_of = len(head) + np.searchsorted(below, nodes)
    row_of[nodes == 0] = len(head) - 1
    columns = Rows(
        tokens=np.concatenate([progress.text[first:length], tree.tokens[below]]),
        positions=np.concatenate([head, length - 1 + tree.depths[below]]),
        slot_mapping=np.concatenate([chain.page_tables[cache, first:length], chain.node_slots[cache, below]]),
        paths=np.concatenate([np.zeros((len(head), tree.paths.shape[1]), np.int32), tree.paths[below]]),
        nodes=nodes,
        row_of=row_of,
        draw_positions=length + tree.depths[nodes],
    )
    return Rows(*map(torch.from_numpy, columns))
