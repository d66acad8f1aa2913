"""Torch twin of draft2: look-ups in a baked table of successors, in what a higher stage drew in this generation, and in
what follows in the prompt."""

import math

import numpy as np
import torch

from kernels.layout import DEPTH_LIMIT, LEAST_REST, MAX_PROBES, Progress, RecentTable, Sampling, SuccessorTable, Tree
from kernels.reference.compiled import compiled, in_numpy
from kernels.reference.noise import keyed_noise, seed_number, split_seed
from kernels.reference.tree import insert, select


def hash_context(key: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """First bucket of int64 ``key`` in a table of ``num_buckets`` (a power of two): Fibonacci hashing, 32 bits."""
    return ((key * (0x9E3779B97F4A7C15 - 2**64) >> 32) & 0xFFFFFFFF) % num_buckets


_hash = compiled(hash_context)


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
    contexts = _contexts(tree, nodes, progress)
    return _answers(table, recent, contexts, sampling, num_children, tau)


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
        previous, last, positions = _contexts_of(tree, nodes, progress.text, progress.length)
        tokens, log_probs, log_rest, levels = _rows(table, recent, previous, last, temperature)
        if noisy:
            drawn = keyed_noise(words[0], words[1], np.repeat(positions, tokens.shape[1]), tokens.ravel())
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
    contexts = previous.long().numpy(), last.long().numpy(), positions.long().numpy()
    return _answers(table, None, contexts, sampling, num_children, tau)[:2]


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
    previous, last, _ = _contexts(tree, nodes, progress)
    _learn(in_numpy(recent), previous, last, children.numpy(), log_probs.numpy(), level)


@compiled
def _learn(recent, previous, last, children, log_probs, level):
    buckets = _hash(previous * recent.vocab_size + last, len(recent.keys))
    width, is_new = min(children.shape[1], recent.tokens.shape[1]), np.empty(len(buckets), np.bool_)
    for i in range(len(buckets)):  # before any of them is written
        key, bucket = previous[i] * recent.vocab_size + last[i], buckets[i]
        known = recent.keys[bucket] == key and recent.levels[bucket] > level
        is_new[i] = previous[i] >= 0 and not known and (log_probs[i, :width] > -np.inf).any()
    for i in np.flatnonzero(is_new):
        key, bucket = previous[i] * recent.vocab_size + last[i], buckets[i]
        recent.keys[bucket], recent.levels[bucket] = key, level
        recent.log_probs[bucket] = -np.inf
        rest = np.float32(1)
        for column in range(width):
            recent.tokens[bucket, column] = children[i, column]
            recent.log_probs[bucket, column] = log_probs[i, column]
            rest -= np.exp(log_probs[i, column])
        recent.log_rest[bucket] = np.log(max(rest, np.float32(LEAST_REST)))


def learn_text(recent: RecentTable, table: SuccessorTable, text: list[int]) -> None:
    """Remember what follows each two tokens of ``text``, until a stage draws something there.

    A context that occurs n times gives n / (n + 1) of the mass to what follows it, by frequency, and the rest to its
    baked row; at temperature 1, for the generation's is not known yet. Of two contexts in one bucket the one that comes
    last stays. ``table`` lies on the host, ``recent`` anywhere.
    """
    if len(text) > 2:
        shape = len(recent.keys), recent.tokens.shape[1]
        columns = _rows_of_text(in_numpy(table), np.array(text, dtype=np.int64), *shape)
        buckets, *rows = (torch.from_numpy(column).to(recent.keys.device) for column in columns)
        for column, values in zip(recent[:5], rows, strict=True):
            column.index_copy_(0, buckets, values)


@compiled
def _rows_of_text(table, text, num_buckets, width):
    """Buckets int64 [C], all different, and the first five columns of a ``RecentTable`` there."""
    keys = text[:-2] * table.vocab_size + text[1:-1]
    buckets, firsts = _hash(keys, num_buckets), _hash(keys, len(table.keys))
    order, newest = np.argsort(keys, kind="mergesort"), np.full(num_buckets, -1, np.int64)
    for i in range(len(keys)):
        newest[buckets[i]] = i
    num_kept, kept = 0, np.empty(len(keys), np.int64)
    tokens, log_probs = np.zeros((len(keys), width), np.int32), np.full((len(keys), width), -np.inf, np.float32)
    log_rest, baked = np.empty(len(keys), np.float32), table.tokens.shape[1]
    found, mass = np.empty(baked + len(keys), np.int64), np.empty(baked + len(keys), np.float32)
    start = 0
    while start < len(keys):
        end = start + 1
        while end < len(keys) and keys[order[end]] == keys[order[start]]:
            end += 1
        last, times, count = order[end - 1], end - start, baked
        if newest[buckets[last]] == last:
            row = _baked_row(table, keys[last], text[last + 1], firsts[last])
            found[:baked] = table.tokens[row]
            mass[:baked] = np.exp(table.log_probs[row]) / np.float32(times + 1)
            for i in order[start:end]:
                place = 0
                while place < count and found[place] != text[i + 2]:
                    place += 1
                if place == count:
                    found[place], mass[place] = text[i + 2], 0
                    count += 1
                mass[place] += np.float32(1) / np.float32(times + 1)
            rest = np.float32(1)
            for column in range(min(width, count)):
                best = mass[:count].argmax()
                if mass[best] > 0:
                    tokens[num_kept, column], log_probs[num_kept, column] = found[best], np.log(mass[best])
                    rest -= mass[best]
                    mass[best] = 0
            kept[num_kept], log_rest[num_kept] = last, np.log(max(rest, np.float32(LEAST_REST)))
            num_kept += 1
        start = end
    kept, tokens, log_probs, log_rest = kept[:num_kept], tokens[:num_kept], log_probs[:num_kept], log_rest[:num_kept]
    return buckets[kept], keys[kept], tokens, log_probs, log_rest, np.zeros(num_kept, np.int32)


def _contexts(tree: Tree, nodes: torch.Tensor, progress: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The token before each node's own, in the tree or in the text, -1 where there is none; its own; and the position
    of the token after it: int64 [W] each."""
    progress = in_numpy(progress)
    return _contexts_of(in_numpy(tree), nodes.numpy(), progress.text, progress.length)


@compiled
def _contexts_of(tree, nodes, text, length):
    previous, last, positions = np.zeros((3, len(nodes)), np.int64)
    for i in range(len(nodes)):
        if nodes[i] < 0:
            previous[i] = -1
            continue
        parent = tree.parents[nodes[i]]
        before_root = text[length[0] - 2] if length[0] > 1 else -1
        previous[i] = tree.tokens[parent] if parent >= 0 else before_root
        last[i], positions[i] = tree.tokens[nodes[i]], length[0] + tree.depths[nodes[i]]
    return previous, last, positions


def _answers(table: SuccessorTable, recent: RecentTable | None, contexts, sampling: Sampling, num_children, tau):
    """``lookup_nodes`` of contexts: numpy arrays [N] of the two tokens and of the position of the next."""
    table = in_numpy(table)
    recent = None if recent is None else in_numpy(recent)
    temperature = np.float32(sampling.temperature)
    tokens, log_probs, log_rest, levels = _rows(table, recent, *contexts[:2], temperature)
    if sampling.noise:
        positions = np.repeat(contexts[2], tokens.shape[1])
        words = split_seed(seed_number(sampling.seed))
        log_probs += keyed_noise(*words, positions, tokens.ravel()).reshape(tokens.shape)
    children, scores = _best(tokens, log_probs, log_rest, num_children, np.float32(tau))
    return torch.from_numpy(children), torch.from_numpy(scores), torch.from_numpy(levels)


@compiled
def _baked_row(table, key, last, first):
    """The row of a context by linear probing from bucket ``first``, or else that of its last token."""
    for probe in range(MAX_PROBES if key >= 0 else 0):
        bucket = (first + probe) % len(table.keys)
        if table.keys[bucket] == key:
            return np.int64(table.rows[bucket])
    return np.int64(last)


@compiled
def _rows(table, recent, previous, last, temperature):
    """What is known of contexts: tokens int64 [N, m], log-probabilities [N, m] and of the mass outside [N], tempered;
    and the level of a remembered row, else 0. ``recent`` goes before the baked rows."""
    shape = len(last), table.tokens.shape[1]
    tokens, log_probs, log_rest = np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape[0], np.float32)
    levels = np.zeros(shape[0], np.int32)
    keys = previous * table.vocab_size + last
    firsts = _hash(keys, len(table.keys))
    for i in range(len(keys)):
        row = _baked_row(table, keys[i] if previous[i] >= 0 else np.int64(-1), last[i], firsts[i])
        for column in range(shape[1]):
            tokens[i, column] = table.tokens[row, column]
            log_probs[i, column] = table.log_probs[row, column] / temperature
        log_rest[i] = table.log_rest[row] / temperature
    if recent is not None:
        buckets, width = _hash(keys, len(recent.keys)), min(shape[1], recent.tokens.shape[1])
        for i in range(len(keys)):
            bucket = buckets[i]
            if previous[i] >= 0 and recent.keys[bucket] == keys[i]:
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
