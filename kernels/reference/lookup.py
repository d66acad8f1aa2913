"""Torch twin of draft2: look-ups in a baked table of successors, and before it in what is remembered of this
generation."""

import numpy as np
import torch

from kernels.layout import DEPTH_LIMIT, MAX_PROBES, Progress, RecentTable, Sampling, SuccessorTable, Tree
from kernels.reference.compiled import compiled, in_numpy
from kernels.reference.contexts import context_keys, hash_of, tokens_before
from kernels.reference.noise import keyed_noise, seed_number, split_seed
from kernels.reference.tree import insert, select


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
    """``lookup`` in the context of each node, or ``recent``'s row of the longest context where it has one; and the
    level of that row, else 0.

    int32 [W, m], float32 [W, m], int32 [W].
    """
    progress = in_numpy(progress)
    latest, counts = tokens_before(in_numpy(tree), nodes.numpy(), progress.text, progress.length)
    return _answers(table, recent, latest, counts, counts, sampling, num_children, tau)


def extend_tree(
    table: SuccessorTable,
    tree: Tree,
    progress: Progress,
    sampling: Sampling,
    rounds: int,
    width: int,
    num_children: int,
    tau: float,
    recent: RecentTable | None = None,
) -> int:
    """``select_nodes``, ``lookup_nodes`` and ``insert_children`` as stage 0, ``rounds`` times: nodes looked up.

    Looked up are the ``width`` best nodes within the stage's reach; children are inserted within the oracle's.
    """
    table, tree, progress = in_numpy(table), in_numpy(tree), in_numpy(progress)
    recent = None if recent is None else in_numpy(recent)
    words = split_seed(seed_number(sampling.seed))
    scale = np.float32(sampling.temperature), np.float32(tau)
    return _extend(table, tree, progress, recent, sampling.noise, words, *scale, rounds, width, num_children)


@compiled
def _extend(table, tree, progress, recent, noisy, words, temperature, tau, rounds, width, num_children):
    num_nodes, max_depth = 0, min(np.int64(progress.reach[-1, 0]), DEPTH_LIMIT)
    for _ in range(rounds):
        nodes = select(tree, 0, width, np.int64(progress.reach[0, 0]), np.float32(-np.inf))
        if len(nodes) == 0:
            break
        num_nodes += len(nodes)
        latest, counts = tokens_before(tree, nodes, progress.text, progress.length)
        tokens, log_probs, log_rest, levels = _rows(table, recent, latest, counts, temperature)
        if noisy:
            drawn = keyed_noise(words[0], words[1], np.repeat(counts, tokens.shape[1]), tokens.ravel())
            log_probs += drawn.reshape(tokens.shape)
        children, scores = _best(tokens, log_probs, log_rest, num_children, tau)
        insert(tree, 0, nodes, children, scores, levels, max_depth)
    return num_nodes


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
    latest, counts = torch.stack([last, previous], 1).long().numpy(), 1 + (previous >= 0).long().numpy()
    return _answers(table, None, latest, counts, positions.long().numpy(), sampling, num_children, tau)[:2]


def _answers(table: SuccessorTable, recent: RecentTable | None, latest, counts, positions, sampling, num_children, tau):
    """``lookup_nodes`` after ``tokens_before``: numpy arrays; ``positions`` [N] of the next tokens."""
    table = in_numpy(table)
    recent = None if recent is None else in_numpy(recent)
    temperature = np.float32(sampling.temperature)
    tokens, log_probs, log_rest, levels = _rows(table, recent, latest, counts, temperature)
    if sampling.noise:
        positions = np.repeat(positions, tokens.shape[1])
        words = split_seed(seed_number(sampling.seed))
        log_probs += keyed_noise(*words, positions, tokens.ravel()).reshape(tokens.shape)
    children, scores = _best(tokens, log_probs, log_rest, num_children, np.float32(tau))
    return torch.from_numpy(children), torch.from_numpy(scores), torch.from_numpy(levels)


@compiled
def baked_row(table, key, last, first):
    """The row of a context by linear probing from bucket ``first``, or else that of its last token."""
    for probe in range(MAX_PROBES if key >= 0 else 0):
        bucket = (first + probe) % len(table.keys)
        if table.keys[bucket] == key:
            return np.int64(table.rows[bucket])
    return np.int64(last)


@compiled
def _rows(table, recent, latest, counts, temperature):
    """What is known of contexts: tokens int64 [N, m], log-probabilities [N, m] and of the mass outside [N], tempered;
    and the level of a remembered row, else 0. A longer context of ``recent`` goes before a shorter one, and any before
    the baked rows."""
    shape = len(latest), table.tokens.shape[1]
    tokens, log_probs, log_rest = np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape[0], np.float32)
    levels = np.zeros(shape[0], np.int32)
    keys = np.where(counts >= 2, latest[:, 1] * table.vocab_size + latest[:, 0], -1)
    firsts = hash_of(keys, len(table.keys))
    for i in range(len(keys)):
        row = baked_row(table, keys[i], latest[i, 0], firsts[i])
        for column in range(shape[1]):
            tokens[i, column] = table.tokens[row, column]
            log_probs[i, column] = table.log_probs[row, column] / temperature
        log_rest[i] = table.log_rest[row] / temperature
    if recent is not None:
        width = min(shape[1], recent.tokens.shape[1])
        for keys in context_keys(latest, counts):
            buckets = hash_of(keys, len(recent.keys))
            for i in range(len(keys)):
                bucket = buckets[i]
                if keys[i] >= 0 and recent.keys[bucket] == keys[i]:
                    log_probs[i] = -np.inf
                    for column in range(width):
                        tokens[i, column] = recent.tokens[bucket, column]
                        log_probs[i, column] = recent.log_probs[bucket, column]
                    log_rest[i], levels[i] = recent.log_rest[bucket], recent.levels[bucket]
    return tokens, log_probs, log_rest, levels


@compiled
def _best(tokens, scores, log_rest, num_children, tau):
    """Rows [N, m] by falling score: the first tokens and their edge scores, with the mass outside as one more
    competitor; tokens under -inf mean nothing."""
    num_rows, width = tokens.shape
    count = min(num_children, width)
    children, edges = np.empty((num_rows, count), np.int32), np.empty((num_rows, count), np.float32)
    for i in range(num_rows):
        of_row, rest = scores[i] / tau, log_rest[i] / tau
        largest = max(of_row.max(), rest)
        total = largest + np.log(np.exp(of_row - largest).sum() + np.exp(rest - largest))
        for column in range(count):
            at = of_row.argmax()  # the first of equal ones
            children[i, column], edges[i, column] = tokens[i, at], of_row[at] - total
            of_row[at] = -np.inf
    return children, edges
