"""Torch twin of the rows of a stage's pass, made from the tree, the text and the stage's cache.

It works on the host in numpy and leaves dead rows out; its Triton counterpart returns the full width with -1 there.
"""

import numpy as np
import torch

from kernels.layout import Chain, Progress, Rows, Tree


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
    length, first = int(progress.length), int(chain.cached_len[cache])
    if int(reach[0]) < 0:
        first = length
        nodes = nodes[:0]
    assert length - first <= num_head, f"{length - first} committed tokens to catch up with, room for {num_head}"
    cached, paths = chain.cached[cache].numpy(), tree.paths.numpy()
    needed = np.unique(paths[nodes.numpy()])
    needed = needed[needed > 0]
    below = needed[cached[needed] == 0]
    if len(below) > num_rows:
        dropped = np.isin(paths[nodes.numpy()], below[num_rows:]).any(1)
        nodes, below = nodes[torch.from_numpy(~dropped)], below[:num_rows]
    cached[below] = 1
    if int(reach[0]) >= 0:
        chain.cached_len[cache] = length
    head = torch.arange(first, length, dtype=torch.int32)
    assert len(head) or not (nodes == 0).any(), "the root is to be scored, but the cache has its K/V already"
    row_of = len(head) + np.searchsorted(below, nodes.numpy())
    row_of[nodes.numpy() == 0] = len(head) - 1
    below = torch.from_numpy(below)
    return Rows(
        tokens=torch.cat([progress.text[first:length], tree.tokens[below]]),
        positions=torch.cat([head, length - 1 + tree.depths[below]]),
        slot_mapping=torch.cat([chain.page_tables[cache, first:length], chain.node_slots[cache, below]]),
        paths=torch.cat([tree.paths.new_zeros(len(head), tree.paths.shape[1]), tree.paths[below]]),
        nodes=nodes,
        row_of=torch.from_numpy(row_of),
        draw_positions=length + tree.depths[nodes],
    )
