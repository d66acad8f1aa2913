"""Torch twin of verification with commit: all that follows the oracle's draw, up to the next iteration.

All state is in ``Progress``, ``Tree`` and ``Chain``, changed in place.
"""

import numpy as np
import torch

from kernels.layout import EOS, LENGTH, RUNNING, Chain, Progress, Record, Tree
from kernels.reference.tree import in_numpy, reroot


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
    tree, progress, chain = in_numpy(tree), in_numpy(progress), in_numpy(chain)
    record = progress.record
    record[:] = 0
    record[Record.STATE] = progress.state[0]
    if progress.state[0] != RUNNING:
        return
    num_stages = len(progress.contexts)
    if tree.failed[0] or drawn.numpy().min() < 0:
        progress.state[0] = record[Record.STATE] = -(tree.failed[0] or num_stages)
        progress.reach[:, 0] = -1
        return
    length, end, eos = int(progress.length[0]), int(progress.end[0]), progress.eos.tolist()
    accepted, next_token, ended = verify(tree, rows, drawn, end - length - 1, tuple(eos))
    accepted = accepted.tolist()
    emitted = tree.tokens[accepted].tolist() + ([] if ended else [next_token])
    _record(tree, rows.numpy()[1:], accepted, emitted, num_stages - 1, record)
    progress.text[length : length + len(emitted)] = emitted
    progress.length[0] = length + len(emitted)
    if emitted[-1] in eos:
        progress.state[0] = EOS
    elif length + len(emitted) >= end:
        progress.state[0] = LENGTH
    record[Record.STATE] = progress.state[0]
    last = accepted[-1] if accepted else 0
    kept = [-1] if ended else reroot(tree, last, next_token).tolist()
    for cache in range(len(chain.cached_len)):
        _commit(chain, cache, length, accepted, kept)
    _set_reach(progress)


def verify(
    tree: Tree,
    rows: torch.Tensor,  # int32 [n], the nodes of the oracle's pass, root first, parents before children
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
    tree = in_numpy(tree)
    tokens, parents = tree.tokens, tree.parents
    drawn_at = dict(zip(rows.tolist(), drawn.tolist(), strict=True))
    child_of = {(int(parents[i]), int(tokens[i])): i for i in drawn_at if i != 0}
    node, accepted, ended = 0, [], False
    while len(accepted) < max_accepted and not ended:
        child = child_of.get((node, drawn_at[node]))
        if child is None:
            break
        node = child
        accepted.append(child)
        ended = int(tokens[child]) in eos_token_ids
    return torch.tensor(accepted, dtype=torch.int32), drawn_at[node], ended


def _record(tree: Tree, nodes, accepted: list[int], emitted: list[int], oracle: int, record) -> None:
    sources = tree.sources[nodes]
    source, parents = dict(zip(nodes.tolist(), sources.tolist(), strict=True)), tree.parents[nodes]
    record[Record.EMITTED] = len(emitted)
    np.add.at(record, Record.PROPOSED + sources, 1)
    origins = [source[node] for node in accepted] + [oracle]
    for i, (token, visited) in enumerate(zip(emitted, [0, *accepted], strict=False)):
        record[Record.TOKENS + i] = token
        record[Record.SOURCES + i] = origins[i]
        record[Record.TRIED + i] = sum(1 << stage for stage in set(sources[parents == visited].tolist()))


def _commit(chain: Chain, cache: int, length: int, accepted: list[int], kept: list[int]) -> None:
    """Link the path's K/V as far as this cache has it, rename the slots of the nodes that stay."""
    table, slots, cached = chain.page_tables[cache], chain.node_slots[cache], chain.cached[cache]
    stays = [node for node in kept if node >= 0]
    if chain.cached_len[cache] == length:
        position = length
        for node in [*accepted, *stays[:1]]:
            if not cached[node]:
                break
            table[position], slots[node] = slots[node], table[position]
            cached[node] = 0
            position += 1
        chain.cached_len[cache] = position
    inside = np.zeros(len(slots), dtype=bool)
    inside[stays] = True
    order = np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)])
    slots[:], cached[:] = slots[order], cached[order] * inside[order]


def _set_reach(progress: Progress) -> None:
    length = int(progress.length[0])
    running = progress.state[0] == RUNNING
    deepest = min(int(progress.max_depth[0]), int(progress.end[0]) - length - 1) if running else -1
    progress.reach[:-1, 0] = np.minimum(progress.contexts[:-1] - length, deepest - 1) if deepest >= 0 else -1
    progress.reach[-1, 0] = deepest
