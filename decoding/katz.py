"""draft²: a trigram model with Katz back-off (Katz 1987), estimated from token ids and baked into successor rows.

    P(w | u v) = d(c) c(u v w) / c(u v)     where c(u v w) = c > 0
               = alpha(u v) P(w | v)        otherwise, alpha such that the law sums to one; likewise P(w | v)

with Good-Turing discounts d(1..k). A row holds the m most probable successors of a context under the full law, back-off
included, and the mass left over, so that drafting is one probe per node.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kernels.layout import MAX_PROBES, SuccessorTable
from kernels.reference import hash_context
from model.files import written

FORMAT = "katz-trigram-1"


def discounts(counts: np.ndarray, max_discounted: int = 5) -> np.ndarray:
    """Katz's factors d(0..max_discounted) for n-gram ``counts``; larger counts are not discounted; d(0) is unused.

    d(r) = (r*/r - A) / (1 - A) with r* = (r + 1) n(r+1) / n(r) and A = (k + 1) n(k+1) / n(1) (Katz 1987, eq. 15).
    Where a count of counts is zero or a factor leaves (0, 1], all factors are (r - 1/2) / r instead.
    """
    k = max_discounted
    n = np.bincount(np.minimum(counts, k + 2), minlength=k + 3).astype(np.float64)
    r = np.arange(1, k + 1)
    if n[1 : k + 2].all():
        unseen = (k + 1) * n[k + 1] / n[1]
        factors = ((r + 1) * n[r + 1] / (n[r] * r) - unseen) / (1 - unseen) if unseen != 1 else np.zeros(k)
        if ((factors > 0) & (factors <= 1)).all():
            return np.concatenate([[1.0], factors])
    return np.concatenate([[1.0], (r - 0.5) / r])


class _Order:
    """The seen n-grams of one order, grouped by context: successors and discounted probabilities."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocab_size: int, max_discounted: int):
        contexts = keys // vocab_size
        self.words = keys % vocab_size
        self.contexts, self.starts, lengths = np.unique(contexts, return_index=True, return_counts=True)
        self.ends = self.starts + lengths
        self.totals = np.add.reduceat(counts, self.starts)
        factors = discounts(counts, max_discounted)
        discounted = counts * np.where(counts <= max_discounted, factors[np.minimum(counts, max_discounted)], 1.0)
        self.probs = discounted / np.repeat(self.totals, lengths)

    def seen(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Successors of ``context`` and their probabilities; empty arrays for a context that never occurred."""
        i = int(np.searchsorted(self.contexts, context))
        if i == len(self.contexts) or self.contexts[i] != context:
            return self.words[:0], self.probs[:0]
        return self.words[self.starts[i] : self.ends[i]], self.probs[self.starts[i] : self.ends[i]]


class KatzTrigram:
    """The exact law. ``ids`` is a flat array of token ids in [0, vocab_size)."""

    def __init__(self, ids: np.ndarray, vocab_size: int, max_discounted: int = 5):
        if len(ids) < 3:
            raise ValueError(f"at least 3 tokens are needed to estimate trigrams, got {len(ids)}")
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise ValueError(f"token ids must be in [0, {vocab_size}), got {int(ids.min())}..{int(ids.max())}")
        ids = ids.astype(np.int64)
        self.vocab_size = vocab_size
        counts = np.bincount(ids, minlength=vocab_size) + 0.5
        self.unigram = counts / counts.sum()  # [V], every token possible
        pairs = ids[:-1] * vocab_size + ids[1:]
        self._bigrams = _Order(*np.unique(pairs, return_counts=True), vocab_size, max_discounted)
        triples = pairs[:-1] * vocab_size + ids[2:]
        self._trigrams = _Order(*np.unique(triples, return_counts=True), vocab_size, max_discounted)

    def bigram(self, last: int) -> np.ndarray:
        """P(. | last), float64 [V]."""
        return _back_off(*self._bigrams.seen(last), self.unigram)

    def trigram(self, previous: int, last: int) -> np.ndarray:
        """P(. | previous last), float64 [V]."""
        return _back_off(*self._trigrams.seen(previous * self.vocab_size + last), self.bigram(last))

    def bake(self, num_contexts: int = 65536, m: int = 16) -> SuccessorTable:
        """The ``m`` best successors of every single token and of the ``num_contexts`` most frequent token pairs."""
        if m < 1 or num_contexts < 0:
            raise ValueError(f"m must be at least 1 and num_contexts at least 0, got {m} and {num_contexts}")
        order, size = self._trigrams, self.vocab_size
        chosen = np.argsort(-order.totals, kind="stable")[:num_contexts]
        chosen = chosen[np.argsort(order.contexts[chosen] % size, kind="stable")]  # by last token: one bigram law each
        groups = np.split(chosen, np.flatnonzero(np.diff(order.contexts[chosen] % size)) + 1) if len(chosen) else []
        of_last = {int(order.contexts[group[0]] % size): group for group in groups}
        by_unigram, seen = np.argsort(-self.unigram, kind="stable"), np.zeros(size, dtype=bool)
        unigram = self.unigram[by_unigram]
        singles, pairs, keys = [], [], []
        for last in range(size):
            group = of_last.get(last, chosen[:0])
            most = max((int(order.ends[i] - order.starts[i]) for i in group), default=0)
            words, probs = self._bigrams.seen(last)
            probs, rest = _share(probs, self.unigram[words])
            best = _best(words, probs, rest, by_unigram, unigram, m + most, seen)
            singles.append([column[:m] for column in best])
            for i in group:
                chosen_words = order.words[order.starts[i] : order.ends[i]]  # all of them follow ``last`` somewhere
                below = probs[np.searchsorted(words, chosen_words)]
                own, left = _share(order.probs[order.starts[i] : order.ends[i]], below)
                pairs.append(_best(chosen_words, own, left, *best, m, seen))
            keys.append(order.contexts[group])
        tokens, laws = (torch.from_numpy(np.stack(column)) for column in zip(*singles, *pairs, strict=True))
        log_rest = (1.0 - laws.sum(-1)).clamp(min=0.0).log().float()
        keys = torch.from_numpy(np.concatenate(keys))
        buckets, rows = _hash(keys, first_row=size)
        return SuccessorTable(buckets, rows, tokens.int(), laws.log().float(), log_rest, size)


def _share(probs: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, float]:
    """Probabilities of seen successors, and the factor that the lower law has for all others. ``below``: what the lower
    law gives those that were seen."""
    unseen_below = 1.0 - below.sum()
    if unseen_below < 1e-12:  # every token the lower law allows was seen: nothing to share with
        return probs / probs.sum(), 0.0
    return probs, max(0.0, 1.0 - probs.sum()) / unseen_below  # rounding must not make a back-off weight negative


def _best(
    words: np.ndarray,  # seen successors
    probs: np.ndarray,
    factor: float,
    lower_tokens: np.ndarray,  # best of the lower law, most probable first, at least ``count`` beside ``words``
    lower: np.ndarray,
    count: int,
    seen: np.ndarray,  # bool [V], scratch, all False
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` best tokens of a backed-off law, or all, and their probabilities, without forming the law."""
    seen[words] = True
    first = slice(0, count + len(words))
    others = np.flatnonzero(~seen[lower_tokens[first]])[:count]
    seen[words] = False
    tokens = np.concatenate([words, lower_tokens[others]])
    law = np.concatenate([probs, lower[others] * factor])
    order = np.argsort(-law, kind="stable")[:count]
    return tokens[order], law[order]


def _back_off(words: np.ndarray, probs: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Seen successors keep their discounted probability, the others share what is left in proportion to ``lower``."""
    probs, factor = _share(probs, lower[words])
    law = lower * factor
    law[words] = probs
    return law


def _hash(keys: torch.Tensor, first_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Open-addressed table of ``keys`` int64 [n], key i standing for row ``first_row`` + i: buckets and their rows."""
    num_buckets = max(16, 2 ** math.ceil(math.log2(2 * len(keys) + 1)))
    while True:
        buckets = torch.full((num_buckets,), -1, dtype=torch.int64)
        rows = torch.zeros(num_buckets, dtype=torch.int32)
        left = torch.arange(len(keys))
        place = hash_context(keys, num_buckets)
        for _ in range(MAX_PROBES):
            empty = buckets[place[left]] < 0
            buckets[place[left[empty]]] = keys[left[empty]]  # of several keys for one bucket, one stays
            rows[place[left[empty]]] = first_row + left[empty].int()
            taken = buckets[place[left]] == keys[left]
            rows[place[left[taken]]] = first_row + left[taken].int()
            left = left[~taken]
            place[left] = (place[left] + 1) % num_buckets
        if len(left) == 0:
            return buckets, rows
        num_buckets *= 2


def save(table: SuccessorTable, directory: Path, notes: dict | None = None) -> None:
    """Write ``table.safetensors`` and ``table.json``; ``notes`` say what the table was estimated from."""
    narrow = torch.uint16 if table.vocab_size <= 65536 else torch.int32
    tensors = {
        "keys": table.keys,
        "rows": table.rows,
        "tokens": table.tokens.to(narrow),
        "log_probs": table.log_probs.half(),
        "log_rest": table.log_rest.half(),
    }
    card = {"format": FORMAT, "vocab_size": table.vocab_size, "rows": table.tokens.shape[0], **(notes or {})}
    with written(directory) as folder:
        save_file(tensors, folder / "table.safetensors")
        (folder / "table.json").write_text(json.dumps(card, indent=1) + "\n")


def load(directory: str | Path) -> SuccessorTable:
    """Read what ``save`` wrote. Raises ValueError for a table that is missing, of another format or corrupted."""
    directory = Path(directory)
    try:
        card = json.loads((directory / "table.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "table.safetensors")
    except Exception as error:
        raise ValueError(f"no draft2 table can be read from {directory}: {error}") from error
    found = card.get("format") if isinstance(card, dict) else None
    if found != FORMAT:
        raise ValueError(f"{directory}: format must be {FORMAT!r}, got {found!r}")
    try:
        table = SuccessorTable(
            tensors["keys"],
            tensors["rows"],
            tensors["tokens"].int(),
            tensors["log_probs"].float(),
            tensors["log_rest"].float(),
            int(card["vocab_size"]),
        )
        _check(table)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{directory} is a corrupted draft2 table: {error}") from error
    return table


def _check(table: SuccessorTable) -> None:
    """Raise ValueError for the first thing that does not fit together."""

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise ValueError(problem)

    num_rows, width = table.tokens.shape
    size = table.vocab_size
    require(table.keys.shape == table.rows.shape, "keys and rows differ in length")
    require(table.keys.dtype == torch.int64, f"keys are {table.keys.dtype}, not int64")
    require(table.rows.dtype == torch.int32, f"rows are {table.rows.dtype}, not int32")
    require(len(table.keys).bit_count() == 1, f"{len(table.keys)} buckets are not a power of two")
    require(num_rows >= size, f"{num_rows} rows for {size} tokens")
    require(table.log_probs.shape == (num_rows, width), f"log_probs has shape {tuple(table.log_probs.shape)}")
    require(table.log_rest.shape == (num_rows,), f"log_rest has shape {tuple(table.log_rest.shape)}")
    require(int(table.tokens.min()) >= 0 and int(table.tokens.max()) < size, "a token id is out of range")
    require(int(table.rows.min()) >= 0 and int(table.rows.max()) < num_rows, "a row index is out of range")
    require(int(table.keys.max()) < size * size, f"a context is out of range for {size} tokens")
    for scores in (table.log_probs, table.log_rest):
        require(not scores.isnan().any(), "a log-probability is NaN or positive")
        require(float(scores.max()) <= 1e-3, "a log-probability is NaN or positive")
