"""Torch twin of draft2: look-ups in a baked table of successors, and in what a higher stage drew in this generation."""

import math

import numpy as np
import torch

from kernels.layout import LEAST_REST, MAX_PROBES, Progress, RecentTable, Sampling, SuccessorTable, Tree
from kernels.reference.sampling import gumbel_noise, seed_number
from kernels.reference.tree import in_numpy


def new_recent(num_buckets: int, width: int, vocab_size: int, device: torch.device | str = "cpu") -> RecentTable:
    """An empty table for the ``width`` best successors of each context."""
    with torch.inference_mode(False):  # it outlives the generation that made it
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
    positions = torch.from_numpy(tree.depths.numpy()[nodes.numpy()] + progress.length.numpy()[0])
    tokens, log_probs, log_rest = _rows(table, previous, last, sampling)
    if recent is not None:
        columns = in_numpy(recent)
        keys = previous * recent.vocab_size + last
        buckets = hash_context(keys, len(columns.keys))
        hit = np.flatnonzero((columns.keys[buckets] == keys) & (keys >= 0))
        width = min(tokens.shape[1], columns.tokens.shape[1])
        log_probs[hit] = -math.inf
        tokens[hit, :width] = columns.tokens[buckets[hit], :width]
        log_probs[hit, :width] = columns.log_probs[buckets[hit], :width]
        log_rest[hit] = columns.log_rest[buckets[hit]]
    children, scores = _best(tokens, log_probs, log_rest, positions, sampling, tau)
    return children[:, :num_children], scores[:, :num_children]


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
    recent, children, log_probs = in_numpy(recent), children.numpy(), log_probs.numpy()
    keys = previous * recent.vocab_size + last
    buckets = hash_context(keys, len(recent.keys))
    width = min(children.shape[1], recent.tokens.shape[1])
    best = log_probs[:, :width]
    rest = np.log(np.maximum(1 - np.exp(best).sum(1), np.float32(LEAST_REST)))
    for row in np.flatnonzero((keys >= 0) & (best > -math.inf).any(1)):
        bucket = buckets[row]
        recent.keys[bucket] = keys[row]
        recent.tokens[bucket, :width] = children[row, :width]
        recent.log_probs[bucket] = -math.inf
        recent.log_probs[bucket, :width] = best[row]
        recent.log_rest[bucket] = rest[row]


def _contexts(tree: Tree, nodes: torch.Tensor, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Each node's own token and the one before it, in the tree or in the text, -1 where there is none: int64."""
    tree, nodes, length = in_numpy(tree), nodes.numpy(), progress.length.numpy()[0]
    parents, before_root = tree.parents[nodes], progress.text.numpy()[length - 2] if length > 1 else -1
    previous = np.where(parents >= 0, tree.tokens[parents], before_root)
    return previous.astype(np.int64), tree.tokens[nodes].astype(np.int64)


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
    columns = _rows(table, previous.long().numpy(), last.long().numpy(), sampling)
    children, scores = _best(*columns, positions, sampling, tau)
    return children[:, :num_children], scores[:, :num_children]


def _rows(table: SuccessorTable, previous, last, sampling: Sampling) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The baked rows of contexts: tokens [N, m], log-probabilities [N, m] and of the mass outside [N], tempered."""
    table = in_numpy(table)
    row = _probe(table, previous, last)
    temperature = np.float32(sampling.temperature)
    return table.tokens[row], table.log_probs[row] / temperature, table.log_rest[row] / temperature


def _probe(table: SuccessorTable, previous: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Row of each context, by linear probing from ``hash_context``."""
    row, key = last.copy(), previous * table.vocab_size + last
    bucket = hash_context(key, len(table.keys))
    searching = previous >= 0
    for _ in range(MAX_PROBES):
        found = searching & (table.keys[bucket] == key)
        row[found] = table.rows[bucket[found]]
        searching &= ~found
        if not searching.any():
            break
        bucket = (bucket + 1) % len(table.keys)
    return row


def _best(tokens, log_probs, log_rest, positions: torch.Tensor, sampling: Sampling, tau: float):
    """A table's row [N, m] by falling score: tokens, and edge scores with the mass outside as one more competitor."""
    tokens, scores = torch.from_numpy(tokens), torch.from_numpy(log_probs)
    if sampling.noise:
        scores = scores + gumbel_noise(seed_number(sampling.seed), positions[:, None], tokens)
    scaled = torch.cat([scores, torch.from_numpy(log_rest)[:, None]], 1) / tau
    top, index = scaled[:, :-1].sort(dim=-1, descending=True, stable=True)
    return tokens.gather(1, index), top - scaled.logsumexp(-1, keepdim=True)


def hash_context(key: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """First bucket of int64 ``key`` in a table of ``num_buckets`` (a power of two): Fibonacci hashing, 32 bits."""
    return ((key * (0x9E3779B97F4A7C15 - 2**64) >> 32) & 0xFFFFFFFF) % num_buckets
