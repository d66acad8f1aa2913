"""Torch twin of the rows of a stage's pass, made from the tree, the text and the stage's cache.

It works on the host and leaves dead rows out; its Triton counterpart returns the full width with -1 there.
"""

import numpy as np
import torch

from kernels.layout import Chain, Progress, Rows, Tree
from kernels.reference.compiled import compiled, in_numpy


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
    progress, nodes = in_numpy(progress), nodes.numpy()
    nodes = nodes[nodes >= 0]
    length, first = int(progress.length[0]), int(chain.cached_len.numpy()[cache])
    if reach.numpy()[0] < 0:
        first, nodes = length, nodes[:0]
    assert length - first <= num_head, f"{length - first} committed tokens to catch up with, room for {num_head}"
    columns = _rows(in_numpy(tree), nodes, progress.text, first, length, in_numpy(chain), cache, num_rows)
    assert columns[6].min(initial=0) >= 0, "a node is to be scored whose K/V the cache has already"
    return Rows(*map(torch.from_numpy, columns))


@compiled
def _rows(tree, nodes, text, first, length, chain, cache, num_rows):
    cached, row_of_node = chain.cached[cache], np.full(len(tree.tokens), -1, np.int32)
    num_head = length - first
    for node in nodes:
        for ancestor in tree.paths[node]:
            if ancestor > 0 and not cached[ancestor]:
                row_of_node[ancestor] = 0  # wanted
    count = num_head
    for node in range(1, len(row_of_node)):
        if row_of_node[node] >= 0 and count - num_head < num_rows:
            row_of_node[node] = count
            count += 1
        else:
            row_of_node[node] = -1
    row_of_node[0] = num_head - 1

    tokens, positions, slots = np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.int32)
    paths = np.zeros((count, tree.paths.shape[1]), np.int32)
    for row in range(num_head):
        tokens[row], positions[row], slots[row] = text[first + row], first + row, chain.page_tables[cache, first + row]
    for node in range(1, len(row_of_node)):
        row = row_of_node[node]
        if row >= 0:
            tokens[row], positions[row] = tree.tokens[node], length - 1 + tree.depths[node]
            slots[row] = chain.node_slots[cache, node]
            for level in range(paths.shape[1]):
                paths[row, level] = tree.paths[node, level]

    kept, row_of, draw_positions = np.empty_like(nodes), np.empty(len(nodes), np.int64), np.empty_like(nodes)
    num_kept = 0
    for node in nodes:
        dropped = False
        for ancestor in tree.paths[node]:
            if ancestor > 0 and not cached[ancestor] and row_of_node[ancestor] < 0:
                dropped = True
        if not dropped:
            kept[num_kept], row_of[num_kept] = node, row_of_node[node]
            draw_positions[num_kept] = length + tree.depths[node]
            num_kept += 1
    for node in range(1, len(row_of_node)):
        if row_of_node[node] >= 0:
            cached[node] = 1
    if first < length:
        chain.cached_len[cache] = length
    return (
        tokens,
        positions,
        np.zeros_like(tokens),
        slots,
        paths,
        kept[:num_kept],
        row_of[:num_kept],
        draw_positions[:num_kept],
    )
