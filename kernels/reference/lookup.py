"""Torch twin of draft2: look-ups in a baked table of successors, and in what a higher stage drew in this generation."""

import math

import torch

from kernels.layout import LEAST_REST, MAX_PROBES, Progress, RecentTable, Sampling, SuccessorTable, Tree
from kernels.reference.sampling import gumbel_noise


def new_recent(num_buckets: int, width: int, vocab_size: int, device: torch.device | str = "cpu") -> RecentTable:
    """An empty table for the ``width`` best successors of each context."""
    return RecentTable(
        keys=torch.full((num_buckets,), -1, dtype=torch.int64, device=device),
        tokens=torch.zeros(num_buckets, width, dtype=torch.int32, device=device),
        log_probs=torch.full((num_buckets, width), -math.inf, device=device),
        log_rest=torch.zeros(num_buckets, device=device),
        vocab_size=vocab_size,
    )


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


def _contexts(tree: Tree, nodes: torch.Tensor, progress: Progress) -> tuple[torch.Tensor, torch.Tensor]:
    """Each node's own token and the one before it, in the tree or in the text; -1 where there is none."""
    length, parents = int(progress.length), tree.parents[nodes]
    before_root = int(progress.text[length - 2]) if length > 1 else -1
    return torch.where(parents >= 0, tree.tokens[parents], before_root), tree.tokens[nodes]


def lookup(
    table: SuccessorTable,
    previous: torch.Tensor,  # int32 [N], the token before the last, -1 where there is none
    last: torch.Tensor,  # int32 [N]
    positions: torch.Tensor,  # int32 [N], absolute position of the token being drawn
    sampling: Sampling,
    num_children: int,
    tau: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's best children of each context and their edge scores: int32 [N, m], float32 [N, m].

    A context of two tokens that the table does not hold falls back to the row of its last token. The scores are those
    of ``draw``, with the mass outside the row as one more competitor, so that edges are not overrated.
    """
    row = _probe(table, previous, last)
    log_probs, rest = table.log_probs[row] / sampling.temperature, table.log_rest[row] / sampling.temperature
    children, scores = best_of_row(table.tokens[row], log_probs, rest, positions, sampling, tau)
    return children[:, :num_children], scores[:, :num_children]


def best_of_row(tokens, log_probs, log_rest, positions, sampling: Sampling, tau: float):
    """A table's row [N, m] by falling score: tokens, and edge scores with the mass outside as one more competitor."""
    scores = log_probs
    if sampling.noise:
        scores = scores + gumbel_noise(sampling.seed, positions[:, None], tokens)
    scaled = torch.cat([scores, log_rest[:, None]], 1) / tau
    top, index = scaled[:, :-1].sort(dim=-1, descending=True, stable=True)
    return tokens.gather(1, index), top - scaled.logsumexp(-1, keepdim=True)


def _probe(table: SuccessorTable, previous: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Row of each context, by linear probing from ``hash_context``."""
    row = last.long()
    key = previous.long() * table.vocab_size + row
    bucket = hash_context(key, table.keys.shape[0])
    searching = previous >= 0
    for _ in range(MAX_PROBES):
        found = searching & (table.keys[bucket] == key)
        row = torch.where(found, table.rows[bucket].long(), row)
        searching = searching & ~found
        if not searching.any():
            break
        bucket = (bucket + 1) % table.keys.shape[0]
    return row


def hash_context(key: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """First bucket of int64 ``key`` in a table of ``num_buckets`` (a power of two): Fibonacci hashing, 32 bits."""
    return ((key * (0x9E3779B97F4A7C15 - 2**64) >> 32) & 0xFFFFFFFF) % num_buckets
