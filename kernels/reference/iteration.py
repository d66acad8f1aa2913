"""Torch twins of what surrounds the passes of an iteration: which rows a stage runs, and verification with commit.

All state is in ``Progress``, ``Tree`` and ``Chain``, changed in place. The twins work on the host in numpy and leave
dead rows out; their Triton counterparts return the full width with -1 in dead places.
"""

import math

import numpy as np
import torch

from kernels.layout import (
    EOS,
    LEAST_REST,
    LENGTH,
    RECORD,
    RUNNING,
    Chain,
    Progress,
    RecentTable,
    Record,
    Rows,
    Sampling,
    SuccessorTable,
    Tree,
)
from kernels.reference.sampling import best_of_row, hash_context, lookup
from kernels.reference.tree import reroot, verify


def new_progress(
    prompt: list[int],
    end: int,  # length at which the generation ends
    max_depth: int,
    contexts: list[int],  # positions that each stage can be fed, the oracle last
    eos_token_ids: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Progress:
    """The state before the first iteration."""

    def column(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    text = prompt + [0] * (max(end, len(prompt)) + 1 - len(prompt))
    deepest = min(max_depth, end - len(prompt) - 1)
    reach = [min(deepest - 1, context - len(prompt)) for context in contexts[:-1]] + [deepest]
    return Progress(
        text=column(text),
        length=column([len(prompt)]),
        end=column([end]),
        reach=column([[value, 0, 0, 0] for value in reach]),
        contexts=column(contexts),
        depths=column([max_depth]),
        eos=column(eos_token_ids or (-1,)),
        state=column([RUNNING]),
        record=column([0] * RECORD),
    )


def new_chain(
    tables: list[torch.Tensor], node_slots: list[torch.Tensor], cached_lens: list[int], device="cpu"
) -> Chain:
    """The caches of a generation from the slots that each stage leased: int32 [positions] and [M] per stage."""
    width = -(-max(len(table) for table in tables) // 16) * 16  # rows start at multiples of 16 bytes
    padded = torch.zeros(len(tables), width, dtype=torch.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    slots = torch.stack(node_slots)
    lens = torch.tensor(cached_lens, dtype=torch.int32)
    return Chain(*(column.to(device) for column in (padded, slots, torch.zeros_like(slots), lens)))


def state_device(device: torch.device) -> torch.device:
    """Where trees, progress and chains live for a model on ``device``: the twins keep them on the host."""
    return torch.device("cpu")


def new_recent(num_buckets: int, width: int, vocab_size: int, device: torch.device | str = "cpu") -> RecentTable:
    """An empty table for the ``width`` best successors of each context."""
    return RecentTable(
        keys=torch.full((num_buckets,), -1, dtype=torch.int64, device=device),
        tokens=torch.zeros(num_buckets, width, dtype=torch.int32, device=device),
        log_probs=torch.full((num_buckets, width), -math.inf, device=device),
        log_rest=torch.zeros(num_buckets, device=device),
        vocab_size=vocab_size,
    )


def _contexts(tree: Tree, nodes: torch.Tensor, progress: Progress) -> tuple[torch.Tensor, torch.Tensor]:
    """Each node's own token and the one before it, in the tree or in the text; -1 where there is none."""
    length, parents = int(progress.length), tree.parents[nodes]
    before_root = int(progress.text[length - 2]) if length > 1 else -1
    return torch.where(parents >= 0, tree.tokens[parents], before_root), tree.tokens[nodes]


def learn(
    recent: RecentTable,
    tree: Tree,
    nodes: torch.Tensor,  # int32 [W], -1 = none
    progress: Progress,
    children: torch.Tensor,  # int32 [W, m]
    log_probs: torch.Tensor,  # float32 [W, m], of the children, at the generation's temperature, without noise
) -> None:
    """Remember what a stage has just drawn at ``nodes``; of two nodes in one bucket the later one stays."""
    previous, last = _contexts(tree, nodes, progress)
    keys = previous.long() * recent.vocab_size + last
    buckets = hash_context(keys, len(recent.keys)).tolist()
    width = min(children.shape[1], recent.tokens.shape[1])
    for row, (bucket, key) in enumerate(zip(buckets, keys.tolist(), strict=True)):
        best = log_probs[row, :width]
        if key < 0 or not (best > -math.inf).any():
            continue
        recent.keys[bucket] = key
        recent.tokens[bucket, :width] = children[row, :width]
        recent.log_probs[bucket] = -math.inf
        recent.log_probs[bucket, :width] = best
        recent.log_rest[bucket] = math.log(max(1 - float(best.exp().sum()), LEAST_REST))


def lookup_nodes(
    table: SuccessorTable,
    tree: Tree,
    nodes: torch.Tensor,  # int32 [W], -1 = none
    progress: Progress,
    sampling: Sampling,
    num_children: int,
    tau: float,
    recent: RecentTable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``lookup`` in the context of each node, or ``recent``'s row where it has one."""
    previous, last = _contexts(tree, nodes, progress)
    positions = tree.depths[nodes] + int(progress.length)
    children, scores = lookup(table, previous, last, positions, sampling, num_children, tau)
    if recent is None:
        return children, scores
    keys = previous.long() * recent.vocab_size + last
    buckets = hash_context(keys, len(recent.keys))
    hit = (recent.keys[buckets] == keys) & (keys >= 0)
    if hit.any():
        rows = RecentTable(*(column[buckets[hit]] for column in recent[:-1]), recent.vocab_size)
        own, own_scores = best_of_row(rows.tokens, rows.log_probs, rows.log_rest, positions[hit], sampling, tau)
        width = min(children.shape[1], own.shape[1])
        scores[hit] = -math.inf
        children[hit, :width], scores[hit, :width] = own[:, :width], own_scores[:, :width]
    return children, scores


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
    record = progress.record
    record.zero_()
    record[Record.STATE] = progress.state[0]
    if int(progress.state) != RUNNING:
        return
    num_stages = len(progress.contexts)
    if int(tree.failed) or int(drawn.min()) < 0:
        progress.state[0] = record[Record.STATE] = -(int(tree.failed) or num_stages)
        progress.reach[:, 0] = -1
        return
    length, end, eos = int(progress.length), int(progress.end), progress.eos.tolist()
    accepted, next_token, ended = verify(tree, rows, drawn, end - length - 1, tuple(eos))
    emitted = tree.tokens[accepted].tolist() + ([] if ended else [next_token])
    _record(tree, rows.tolist(), accepted.tolist(), emitted, num_stages - 1, record)
    progress.text[length : length + len(emitted)] = torch.tensor(emitted, dtype=torch.int32)
    progress.length[0] = length + len(emitted)
    if emitted[-1] in eos:
        progress.state[0] = EOS
    elif length + len(emitted) >= end:
        progress.state[0] = LENGTH
    record[Record.STATE] = progress.state[0]
    last = accepted[-1].item() if len(accepted) else 0
    kept = torch.tensor([-1]) if ended else reroot(tree, last, next_token)
    for cache in range(len(chain.cached_len)):
        _commit(chain, cache, length, accepted.tolist(), kept.tolist())
    _set_reach(progress)


def _record(tree: Tree, rows: list[int], accepted: list[int], emitted: list[int], oracle: int, record) -> None:
    nodes, walk = rows[1:], [0, *accepted]
    source = dict(zip(nodes, tree.sources[nodes].tolist(), strict=True))
    parent = dict(zip(nodes, tree.parents[nodes].tolist(), strict=True))
    record[Record.EMITTED] = len(emitted)
    for node in nodes:
        record[Record.PROPOSED + source[node]] += 1
    sources = [source[node] for node in accepted] + [oracle]
    for i, (token, visited) in enumerate(zip(emitted, walk, strict=False)):
        record[Record.TOKENS + i] = token
        record[Record.SOURCES + i] = sources[i]
        for stage in {source[node] for node in nodes if parent[node] == visited}:
            record[Record.TRIED + i] += 1 << stage


def _commit(chain: Chain, cache: int, length: int, accepted: list[int], kept: list[int]) -> None:
    """Link the path's K/V as far as this cache has it, rename the slots of the nodes that stay."""
    table, slots = chain.page_tables[cache].numpy(), chain.node_slots[cache].numpy()
    cached = chain.cached[cache].numpy()
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
    length = int(progress.length)
    deepest = min(int(progress.depths), int(progress.end) - length - 1) if int(progress.state) == RUNNING else -1
    lower = (progress.contexts[:-1] - length).clamp(max=deepest - 1) if deepest >= 0 else -1
    progress.reach[:-1, 0] = lower
    progress.reach[-1, 0] = deepest
