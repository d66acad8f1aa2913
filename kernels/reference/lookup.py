"""Torch twin of draft2: look-ups in a baked table of successors, and in what a higher stage drew in this generation."""

import math

import numpy as np
import torch

from kernels.layout import LEAST_REST, MAX_PROBES, Progress, RecentTable, Sampling, SuccessorTable, Tree
from kernels.reference.sampling import noise, seed_number
from kernels.reference.tree import in_numpy

_PROBES = np.arange(MAX_PROBES)


def new_recent(num_buckets: int, width: int, vocab_size: int, device: torch.device | str = "cpu") -> RecentTable:
    """An empty table for the ``width`` best successors of each context."""
    with torch.inference_mode(False):  # it outlives the generation that made it
        return RecentTable(
            keys=torch.full((num_buckets,), -1, dtype=torch.int64, device=device),
            tokens=torch.zeros(num_buckets, width, dtype=torch.int32, device=device),
            log_probs=torch.full((num_buckets, width), -math.inf, device=device),
            log_rest=torch.zeros(num_buckets, device=device),
            levels=torch.zeros(num_buckets, dtype=torch.int32, device=device),
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``lookup`` in the context of each node, or ``recent``'s row where it has one; and the level of that row, else 0.

    int32 [W, m], float32 [W, m], int32 [W].
    """
    previous, last = _contexts(tree, nodes, progress)
    positions = tree.depths.numpy()[nodes.numpy()] + progress.length.numpy()[0]
    recent = None if recent is None else in_numpy(recent)
    found = answers(in_numpy(table), recent, previous, last, positions, sampling, num_children, tau)
    return tuple(map(torch.from_numpy, found))


def answers(
    table: SuccessorTable, recent: RecentTable | None, previous, last, positions, sampling: Sampling, num_children, tau
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``lookup_nodes`` of contexts, all in numpy."""
    tokens, log_probs, log_rest = _rows(table, previous, last, sampling)
    levels = np.zeros(len(last), dtype=np.int32)
    if recent is not None:
        keys = previous * recent.vocab_size + last
        buckets = hash_context(keys, len(recent.keys))
        hit = np.flatnonzero((recent.keys[buckets] == keys) & (keys >= 0))
        width = min(tokens.shape[1], recent.tokens.shape[1])
        buckets = buckets[hit]
        log_probs[hit] = -math.inf
        tokens[hit, :width] = recent.tokens[buckets, :width]
        log_probs[hit, :width] = recent.log_probs[buckets, :width]
        log_rest[hit] = recent.log_rest[buckets]
        levels[hit] = recent.levels[buckets]
    children, scores = _best(tokens, log_probs, log_rest, positions, sampling, tau)
    return children[:, :num_children], scores[:, :num_children], levels


def learn(
    recent: RecentTable,
    tree: Tree,
    nodes: torch.Tensor,  # int32 [W], -1 = none
    progress: Progress,
    children: torch.Tensor,  # int32 [W, m]
    log_probs: torch.Tensor,  # float32 [W, m], of the children, at the generation's temperature, without noise
    level: int = 0,
) -> None:
    """Remember what a stage has just drawn at ``nodes``; of two nodes in one bucket the later one stays. A row of a
    higher ``level`` for the same context is kept."""
    previous, last = _contexts(tree, nodes, progress)
    recent, children, log_probs = in_numpy(recent), children.numpy(), log_probs.numpy()
    keys = previous * recent.vocab_size + last
    buckets = hash_context(keys, len(recent.keys))
    width = min(children.shape[1], recent.tokens.shape[1])
    best = log_probs[:, :width]
    better = (recent.keys[buckets] == keys) & (recent.levels[buckets] > level)
    row = np.flatnonzero((keys >= 0) & (best > -math.inf).any(1) & ~better)
    bucket, best = buckets[row], best[row]  # numpy keeps the last of equal indices
    recent.keys[bucket], recent.levels[bucket] = keys[row], level
    recent.tokens[bucket, :width] = children[row, :width]
    recent.log_probs[bucket] = -math.inf
    recent.log_probs[bucket, :width] = best
    recent.log_rest[bucket] = np.log(np.maximum(1 - np.exp(best).sum(1), np.float32(LEAST_REST)))


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
    contexts = previous.long().numpy(), last.long().numpy(), positions.numpy()
    children, scores, _ = answers(in_numpy(table), None, *contexts, sampling, num_children, tau)
    return torch.from_numpy(children), torch.from_numpy(scores)


def _rows(table: SuccessorTable, previous, last, sampling: Sampling) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The baked rows of contexts: tokens [N, m], log-probabilities [N, m] and of the mass outside [N], tempered."""
    row = _probe(table, previous, last)
    temperature = np.float32(sampling.temperature)
    return table.tokens[row], table.log_probs[row] / temperature, table.log_rest[row] / temperature


def _probe(table: SuccessorTable, previous: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Row of each context, by linear probing from ``hash_context``."""
    key, num_buckets = previous * table.vocab_size + last, len(table.keys)
    buckets = (hash_context(key, num_buckets)[:, None] + _PROBES) % num_buckets
    hit = table.keys[buckets] == key[:, None]
    found = table.rows[buckets[np.arange(len(key)), hit.argmax(1)]]
    return np.where(hit.any(1) & (previous >= 0), found, last)


def _best(tokens, log_probs, log_rest, positions, sampling: Sampling, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """A table's row [N, m] by falling score: tokens, and edge scores with the mass outside as one more competitor."""
    scores = log_probs
    if sampling.noise:
        scores = scores + noise(seed_number(sampling.seed), positions[:, None], tokens)
    scores, rest = scores / np.float32(tau), log_rest[:, None] / np.float32(tau)
    largest = np.maximum(scores.max(1, keepdims=True), rest)
    total = largest + np.log(np.exp(scores - largest).sum(1, keepdims=True) + np.exp(rest - largest))
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, 1), np.take_along_axis(scores, order, 1) - total


def hash_context(key: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """First bucket of int64 ``key`` in a table of ``num_buckets`` (a power of two): Fibonacci hashing, 32 bits."""
    return ((key * (0x9E3779B97F4A7C15 - 2**64) >> 32) & 0xFFFFFFFF) % num_buckets
