"""Torch twin of draft2's memory: what higher stages drew in this generation, and what follows in its prompt."""

import math

import numpy as np
import torch

from kernels.layout import LEAST_REST, LONGEST_CONTEXT, Progress, RecentTable, SuccessorTable, Tree
from kernels.reference.compiled import compiled, in_numpy
from kernels.reference.contexts import context_keys, hash_of, tokens_before
from kernels.reference.lookup import baked_row


def new_recent(num_buckets: int, width: int, device: torch.device | str = "cpu") -> RecentTable:
    """An empty table for the ``width`` best successors of each context."""
    with torch.inference_mode(False):  # it outlives the generation that made it
        return RecentTable(
            keys=torch.full((num_buckets,), -1, dtype=torch.int64, device=device),
            tokens=torch.zeros(num_buckets, width, dtype=torch.int32, device=device),
            log_probs=torch.full((num_buckets, width), -math.inf, device=device),
            log_rest=torch.zeros(num_buckets, device=device),
            levels=torch.zeros(num_buckets, dtype=torch.int32, device=device),
        )


def learn(
    recent: RecentTable,
    tree: Tree,
    nodes: torch.Tensor,  # int32 [W], -1 = none
    progress: Progress,
    children: torch.Tensor,  # int32 [W, m]
    log_probs: torch.Tensor,  # float32 [W, m], of the children, at the generation's temperature, without noise
    level: int = 0,
) -> None:
    """Remember what a stage has just drawn at ``nodes`` after 2, 4, ..., LONGEST_CONTEXT tokens, in this order; of two
    nodes in one bucket the later one stays. A row of a higher ``level`` for the same context is kept."""
    progress = in_numpy(progress)
    latest, counts = tokens_before(in_numpy(tree), nodes.numpy(), progress.text, progress.length)
    _learn(in_numpy(recent), latest, counts, children.numpy(), log_probs.numpy(), level)


@compiled
def _learn(recent, latest, counts, children, log_probs, level):
    width, keys = min(children.shape[1], recent.tokens.shape[1]), context_keys(latest, counts)
    buckets, is_new = hash_of(keys, len(recent.keys)), np.empty(keys.shape, np.bool_)
    for context in range(len(keys)):  # before any of them is written
        for i in range(len(counts)):
            key, bucket = keys[context, i], buckets[context, i]
            known = recent.keys[bucket] == key and recent.levels[bucket] > level
            is_new[context, i] = key >= 0 and not known and (log_probs[i, :width] > -np.inf).any()
    for context in range(len(keys)):
        for i in np.flatnonzero(is_new[context]):
            bucket, rest = buckets[context, i], np.float32(1)
            recent.keys[bucket], recent.levels[bucket] = keys[context, i], level
            recent.log_probs[bucket] = -np.inf
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
        for column, values in zip(recent, rows, strict=True):
            column.index_copy_(0, buckets, values)


@compiled
def _rows_of_text(table, text, num_buckets, width):
    """Buckets int64 [C], all different, and the columns of a ``RecentTable`` there."""
    latest = np.zeros((len(text) - 2, LONGEST_CONTEXT), np.int64)
    latest[:, 0], latest[:, 1] = text[1:-1], text[:-2]
    keys = context_keys(latest, np.full(len(latest), 2))[0]
    firsts = hash_of(text[:-2] * table.vocab_size + text[1:-1], len(table.keys))
    buckets, order = hash_of(keys, num_buckets), np.argsort(keys, kind="mergesort")
    newest = np.full(num_buckets, -1, np.int64)
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
            row = baked_row(table, text[last] * table.vocab_size + text[last + 1], text[last + 1], firsts[last])
            found[:baked] = table.tokens[row]
            mass[:baked] = np.exp(table.log_probs[row]) / np.float32(times + 1)
            for i in order[start:end]:
                place, following = 0, text[i + 2]
                while place < count and found[place] != following:
                    place += 1
                if place == count:
                    found[place], mass[place] = following, 0
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
