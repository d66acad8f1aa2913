"""Torch twin of verification with commit: all that follows the oracle's draw, up to the next iteration.

All state is in ``Progress``, ``Tree`` and ``Chain``, changed in place.
"""

import numpy as np
import torch

from kernels.layout import EOS, LENGTH, RUNNING, Chain, Progress, Record, Tree
from kernels.reference.compiled import compiled, in_numpy
from kernels.reference.tree import move_root

EMITTED, STATE, PROPOSED, TOKENS = Record.EMITTED, Record.STATE, Record.PROPOSED, Record.TOKENS
SOURCES, TRIED = Record.SOURCES, Record.TRIED


def verify_and_commit(
    tree: Tree,
    rows: torch.Tensor,  # int32 [W], the nodes of the oracle's pass, root first, -1 = none
    drawn: torch.Tensor,  # int32 [W], the oracle's token at each of them, -1 = NaN logits
    progress: Progress,
    chain: Chain,
) -> None:
    """Walk, emit, commit, and move the root: all that follows the oracle's draw.

    The accepted path and the token drawn at its end are appended to the text, up to an end-of-text token and to
    ``progress.end``. Every stage's K/V of that path is linked to its positions as far as the stage has it; what stages
    have built below the new root stays, its nodes renumbered, and everything else is spare again. When the generation
    is over, or a stage gave NaN, further calls emit nothing.
    """
    _verify_and_commit(in_numpy(tree), rows.numpy(), drawn.numpy(), in_numpy(progress), in_numpy(chain))


@compiled
def _verify_and_commit(tree, rows, drawn, progress, chain):
    record, num_stages, failed = progress.record, len(progress.contexts), tree.failed[0]
    record[:] = 0
    record[STATE] = progress.state[0]
    if progress.state[0] != RUNNING:
        return
    for row in range(len(rows)):
        if rows[row] >= 0 and drawn[row] < 0 and failed == 0:
            failed = num_stages
    if failed > 0:
        progress.state[0] = record[STATE] = -failed
        progress.reach[:, 0] = -1
        return
    length, end = progress.length[0], progress.end[0]
    accepted, next_token, ended = _walk(tree, rows, drawn, end - length - 1, progress.eos)
    last = accepted[-1] if len(accepted) else 0
    emitted = np.empty(len(accepted) + 1, np.int32)
    emitted[:-1], emitted[-1] = tree.tokens[accepted], next_token
    if ended:
        emitted = emitted[:-1]
    length += len(emitted)
    record[EMITTED] = len(emitted)
    record[TOKENS : TOKENS + len(emitted)] = emitted
    sources, tried = record[SOURCES:], record[TRIED : TRIED + len(emitted)]
    _note_sources(tree, rows, accepted, num_stages - 1, record[PROPOSED:], sources, tried)
    progress.text[length - len(emitted) : length] = emitted
    progress.length[0] = length
    if length >= end:
        progress.state[0] = LENGTH
    for token in progress.eos:
        if token == emitted[-1]:
            progress.state[0] = EOS
    record[STATE] = progress.state[0]
    kept = np.full(1, -1, np.int32) if ended else move_root(tree, last, next_token)
    _commit(chain, length - len(emitted), accepted, kept)
    deepest = -1
    if progress.state[0] == RUNNING:
        deepest = min(progress.max_depth[0], end - length - 1)
    for stage in range(num_stages - 1):
        progress.reach[stage, 0] = min(progress.contexts[stage] - length, deepest - 1) if deepest >= 0 else -1
    progress.reach[num_stages - 1, 0] = deepest


def verify(
    tree: Tree,
    rows: torch.Tensor,  # int32 [n], the nodes of the oracle's pass, root first, -1 = none
    drawn: torch.Tensor,  # int32 [n], the oracle's token at each of them
    max_accepted: int,
    eos_token_ids: tuple[int, ...],
) -> tuple[torch.Tensor, int, bool]:
    """Walk from the root to the child whose token equals the drawn one; stop where there is none.

    Returns the accepted nodes int32 [a] (root excluded, a <= max_accepted), the token drawn at the end of the walk, and
    whether the emitted run ``tokens[accepted] + [next_token]`` ends early because an accepted node is an end-of-text
    token: then that node is the last accepted one and the next token is not part of the run.

    Example: root 0 with children 1 ("a") and 2 ("b"), 3 ("c") below 1; drawn "a", "c", "x", "y" at 0, 1, 2, 3: the walk
    goes 0 -> 1 -> 3, accepted [1, 3], next token "y".
    """
    eos = np.array(eos_token_ids, dtype=np.int32)
    accepted, next_token, ended = _walk(in_numpy(tree), rows.numpy(), drawn.numpy(), max_accepted, eos)
    return torch.from_numpy(accepted), int(next_token), bool(ended)


@compiled
def _walk(tree, rows, drawn, max_accepted, eos):
    accepted = np.empty(len(rows), np.int32)
    count, at, ended = 0, 0, False
    while count < max_accepted and not ended:
        found = -1
        for row in range(1, len(rows)):
            node = rows[row]
            if found < 0 and node > 0 and tree.parents[node] == rows[at] and tree.tokens[node] == drawn[at]:
                found = row
        if found < 0:
            break
        at = found
        accepted[count] = rows[at]
        count += 1
        for token in eos:
            ended = ended or token == tree.tokens[rows[at]]
    return accepted[:count], drawn[at], ended


@compiled
def _note_sources(tree, rows, accepted, oracle, proposed, sources, tried):
    """Who proposed the nodes of the pass, who each emitted token, and who a child where that one was drawn."""
    for row in range(1, len(rows)):
        if rows[row] > 0:
            proposed[tree.sources[rows[row]]] += 1
    for i in range(len(tried)):
        sources[i] = tree.sources[accepted[i]] if i < len(accepted) else oracle
        visited = accepted[i - 1] if i else 0
        for row in range(1, len(rows)):
            if rows[row] > 0 and tree.parents[rows[row]] == visited:
                tried[i] |= 1 << tree.sources[rows[row]]


@compiled
def _commit(chain, length, accepted, kept):
    """In each cache link the path's K/V as far as it has it, and rename the slots of the nodes that stay."""
    num_caches, capacity = chain.node_slots.shape
    for cache in range(num_caches):
        table, slots, cached = chain.page_tables[cache], chain.node_slots[cache], chain.cached[cache]
        if chain.cached_len[cache] == length:
            position = length
            for i in range(len(accepted) + 1):  # the path, then the new root
                node = accepted[i] if i < len(accepted) else kept[0]
                if node < 0 or not cached[node]:
                    break
                table[position], slots[node] = slots[node], table[position]
                cached[node] = 0
                position += 1
            chain.cached_len[cache] = position
        inside = np.zeros(capacity, np.bool_)
        for node in kept:
            if node >= 0:
                inside[node] = True
        old_slots, old_cached = slots.copy(), cached.copy()
        count = 0
        for staying in (True, False):
            for node in range(capacity):
                if inside[node] == staying:
                    slots[count], cached[count] = old_slots[node], old_cached[node] if staying else 0
                    count += 1
