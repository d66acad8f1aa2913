"""draft²: the Katz law against one written again in dictionaries and fractions, the baked table against the law."""

import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding import katz
from kernels.layout import SuccessorTable
from kernels.reference import gumbel_noise, lookup
from tests.laws import GREEDY, sampled

TOY = [0, 1, 2, 0, 1, 2, 0, 1, 3]


def chain(vocab_size: int, length: int, skew: float) -> tuple[np.ndarray, int]:
    """Token ids of a random first-order chain with a skewed law, so that bigrams and trigrams carry something."""
    rng = np.random.default_rng(length)
    law = (np.arange(vocab_size) + 1.0) ** -skew
    jumps = rng.choice(vocab_size, size=length, p=law / law.sum())
    return np.where(rng.random(length) < 0.3, np.roll(jumps, 1) * 3 % vocab_size, jumps), vocab_size


CORPORA = {
    "full": chain(3, 400, 0.0),  # every context was followed by every token
    "short": chain(7, 20, 0.0),  # too few counts for Good-Turing
    "sparse": chain(40, 150, 1.0),
    "zipf": chain(30, 3000, 1.3),  # Good-Turing holds
    # Nothing is discounted, so nothing is left for unseen tokens; after 1 3 all that P(. | 3) allows was seen.
    "certain": (np.array([0, 1, 2, 0, 2, 1, 3] * 60), 5),
    # The same after 9, where the float64 sum of what was seen is 1 + 2^-52.
    "rounded": (np.concatenate([[9, w] * n for w, n in enumerate([35, 42, 10, 6, 43, 13])]), 10),
}


@pytest.fixture(params=CORPORA)
def text(request):
    """(token ids, vocabulary size)."""
    return CORPORA[request.param]


# --- the same law again, for one token at a time


def ngram_counts(ids: list[int], order: int) -> Counter:
    return Counter(tuple(ids[i : i + order]) for i in range(len(ids) - order + 1))


def factors(counts: Counter, k: int = 5) -> list[Fraction]:
    """d(0..k): Good-Turing as Katz has it, or (r - 1/2) / r where that is no set of discounts."""
    num = Counter(counts.values())
    plain = [Fraction(1)] + [Fraction(2 * r - 1, 2 * r) for r in range(1, k + 1)]
    if any(num[r] == 0 for r in range(1, k + 2)):
        return plain
    unseen = Fraction((k + 1) * num[k + 1], num[1])
    if unseen == 1:
        return plain
    turing = [(Fraction((r + 1) * num[r + 1], num[r] * r) - unseen) / (1 - unseen) for r in range(1, k + 1)]
    return [Fraction(1), *turing] if all(0 < d <= 1 for d in turing) else plain


class SlowKatz:
    """P(w | context) by recursion on the context's length, in exact fractions."""

    def __init__(self, ids, vocab_size: int):
        ids = [int(token) for token in ids]
        self.vocab = range(vocab_size)
        self.counts = {order: ngram_counts(ids, order) for order in (1, 2, 3)}
        self.factors = {order: factors(self.counts[order]) for order in (2, 3)}

    def law(self, *context: int) -> list[Fraction]:
        if not context:
            total = sum(self.counts[1].values()) + Fraction(len(self.vocab), 2)
            return [(self.counts[1][(w,)] + Fraction(1, 2)) / total for w in self.vocab]
        order, lower = len(context) + 1, self.law(*context[1:])
        seen = {w: self.counts[order][(*context, w)] for w in self.vocab if (*context, w) in self.counts[order]}
        if not seen:
            return lower
        probs = {w: self.discounted(count, order) / sum(seen.values()) for w, count in seen.items()}
        below = sum(lower[w] for w in self.vocab if w not in seen)
        if below == 0:
            return [probs.get(w, 0) / sum(probs.values()) for w in self.vocab]
        alpha = (1 - sum(probs.values())) / below
        return [probs.get(w, alpha * lower[w]) for w in self.vocab]

    def discounted(self, count: int, order: int) -> Fraction:
        return count * (self.factors[order][count] if count <= 5 else 1)


# --- the law


def test_law_of_a_corpus_worked_by_hand():
    """Ids 0 1 2 0 1 2 0 1 3, vocabulary of 5, no count is common enough for Good-Turing: d(1) = 1/2, d(2) = 3/4.

    Unigrams with 1/2 added, over 11.5: 3.5, 3.5, 2.5, 1.5, 0.5.
    After 1: 2 twice, 3 once: P(2|1) = 3/4 * 2/3 = 1/2, P(3|1) = 1/2 * 1/3 = 1/6; 1/3 is left for 0, 1, 4 in proportion
    7 : 7 : 1. After 0: only 1, three times, P(1|0) = 5/6; 1/6 is left for 0, 2, 3, 4 in proportion 7 : 5 : 3 : 1. After
    2 0: only 1, twice, P(1|2 0) = 3/4; 1/4 is left, in the same proportions.
    """
    law = katz.KatzTrigram(np.array(TOY), 5)
    assert law.unigram == pytest.approx(np.array([3.5, 3.5, 2.5, 1.5, 0.5]) / 11.5)
    assert law.bigram(1) == pytest.approx([7 / 45, 7 / 45, 1 / 2, 1 / 6, 1 / 45])
    assert law.bigram(0) == pytest.approx([7 / 96, 5 / 6, 5 / 96, 3 / 96, 1 / 96])
    assert law.trigram(2, 0) == pytest.approx([7 / 64, 3 / 4, 5 / 64, 3 / 64, 1 / 64])
    assert law.bigram(3) == pytest.approx(law.unigram), "3 was never followed by anything"
    assert law.trigram(4, 1) == pytest.approx(law.bigram(1)), "4 1 never occurred"


def test_law_is_the_brute_force_one(text):
    """Every bigram context, and trigram contexts seen and unseen, to 1e-12."""
    law, slow, vocab_size = katz.KatzTrigram(*text), SlowKatz(*text), text[1]
    assert law.unigram == pytest.approx([float(p) for p in slow.law()], abs=1e-12)
    pairs = sorted({(int(u), int(v)) for u, v in zip(text[0], text[0][1:], strict=False)})[:60]
    rng = np.random.default_rng(0)
    pairs += [tuple(rng.integers(vocab_size, size=2).tolist()) for _ in range(20)]
    for last in range(vocab_size):
        assert law.bigram(last) == pytest.approx([float(p) for p in slow.law(last)], abs=1e-12)
    for previous, last in pairs:
        assert law.trigram(previous, last) == pytest.approx([float(p) for p in slow.law(previous, last)], abs=1e-12)


def test_every_context_sums_to_one(text):
    law, vocab_size = katz.KatzTrigram(*text), text[1]
    for last in range(vocab_size):
        laws = [law.bigram(last), *(law.trigram(previous, last) for previous in range(vocab_size))]
        assert np.min(laws) >= 0
        np.testing.assert_allclose(np.sum(laws, axis=1), 1.0, atol=1e-12)


def test_corpora_hold_the_cases_they_are_named_for():
    plain = [Fraction(1)] + [Fraction(2 * r - 1, 2 * r) for r in range(1, 6)]
    slow = {name: SlowKatz(*corpus) for name, corpus in CORPORA.items()}
    assert slow["zipf"].factors[3] != plain and slow["short"].factors[3] == plain
    assert len(slow["full"].counts[3]) == 27
    assert slow["certain"].law(3) == [1, 0, 0, 0, 0] == slow["certain"].law(1, 3)
    _, probs = katz.KatzTrigram(*CORPORA["rounded"])._bigrams.seen(9)
    assert probs.sum() > 1


# --- discounts


def test_good_turing_discounts_worked_by_hand():
    """40 n-grams seen once, 12 twice, 6 three, 4 four, 3 five and 2 six times.

    A = 6 * n6 / n1 = 12/40 = 0.3. r* / r = (r + 1) n(r+1) / (r n(r)):
    2*12/40 = 0.6, 3*6/24 = 0.75, 4*4/18 = 8/9, 5*3/16 = 15/16, 6*2/15 = 0.8, each minus 0.3, over 0.7.
    """
    counts = np.repeat([1, 2, 3, 4, 5, 6, 7, 900], [40, 12, 6, 4, 3, 2, 9, 1])
    expected = [1.0, 3 / 7, 4.5 / 7, (8 / 9 - 0.3) / 0.7, (15 / 16 - 0.3) / 0.7, 5 / 7]
    assert katz.discounts(counts) == pytest.approx(expected)


@pytest.mark.parametrize(
    "frequencies",
    [
        [40, 12, 6, 0, 3, 2],  # nothing was seen four times
        [40, 12, 6, 4, 3, 0],
        [12, 8, 6, 4, 3, 2],  # A = 1
        [40, 30, 16, 11, 7, 5],  # A = 0.75, d(1) = (1.5 - 0.75) / 0.25 = 3, all others in (0, 1]
        [40, 3, 6, 4, 3, 2],  # d(1) = (0.15 - 0.3) / 0.7 < 0
    ],
    ids=["gap", "no-six", "A=1", "above-1", "negative"],
)
def test_discounts_fall_back_where_good_turing_is_undefined(frequencies):
    counts = np.repeat(np.arange(1, 7), frequencies)
    assert katz.discounts(counts) == pytest.approx([1.0, 0.5, 0.75, 5 / 6, 7 / 8, 0.9])


@pytest.mark.parametrize(
    "ids, vocab_size, message",
    [([0, 1], 5, "at least 3 tokens"), ([0, 1, 5], 5, r"\[0, 5\)"), ([0, -1, 2], 5, r"\[0, 5\)")],
    ids=["too-short", "too-large", "negative"],
)
def test_bad_corpora_are_refused(ids, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        katz.KatzTrigram(np.array(ids), vocab_size)


# --- the table


def check_row(table: SuccessorTable, row: int, law: np.ndarray) -> None:
    """The row holds the m most probable successors, most probable first, and the mass of all others."""
    m = table.tokens.shape[1]
    tokens, probs = table.tokens[row].numpy(), table.log_probs[row].double().exp().numpy()
    assert len(set(tokens.tolist())) == m
    np.testing.assert_allclose(probs, law[tokens], rtol=1e-5)
    np.testing.assert_allclose(probs, np.sort(law)[::-1][:m], rtol=1e-5)
    assert math.exp(table.log_rest[row]) == pytest.approx(max(0.0, 1 - law[tokens].sum()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("m", [1, 4, 16], ids=lambda m: f"m={m}")
def test_table_rows_are_the_best_of_the_exact_law(text, m):
    law, vocab_size = katz.KatzTrigram(*text), text[1]
    table = law.bake(num_contexts=50, m=m)
    assert table.tokens.shape[1] == min(m, vocab_size)
    for last in range(vocab_size):
        check_row(table, last, law.bigram(last))
    held = table.keys >= 0
    for key, row in zip(table.keys[held].tolist(), table.rows[held].tolist(), strict=True):
        check_row(table, row, law.trigram(*divmod(key, vocab_size)))


def test_table_holds_the_most_frequent_contexts(text):
    ids, vocab_size = text
    pairs = ngram_counts(ids[:-1].tolist(), 2)
    table = katz.KatzTrigram(ids, vocab_size).bake(num_contexts=8)
    held = [divmod(key, vocab_size) for key in table.keys[table.keys >= 0].tolist()]
    counts = sorted((pairs[pair] for pair in held), reverse=True)
    assert counts == sorted(pairs.values(), reverse=True)[:8]
    assert katz.KatzTrigram(ids, vocab_size).bake(num_contexts=0).tokens.shape[0] == vocab_size


def reached_rows(table: SuccessorTable, previous: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The row that each look-up reaches: every row's only child is made the row's own number."""
    numbered = table._replace(tokens=torch.arange(len(table.tokens))[:, None])
    return lookup(numbered, previous.int(), last.int(), torch.zeros_like(last), GREEDY, 1)[0].squeeze(1)


def test_look_up_finds_every_baked_context_and_falls_back_for_all_others():
    """About 10,000 contexts of two tokens in one table, all 62,500 pairs looked up, and no previous token at all."""
    vocab_size = 250
    ids = np.random.default_rng(0).integers(vocab_size, size=11_000)
    table = katz.KatzTrigram(ids, vocab_size).bake(num_contexts=10**6, m=1)
    expected = torch.arange(vocab_size).repeat(vocab_size)  # pair (u, v) at u * V + v falls back to row v
    held = table.keys >= 0
    assert held.sum() > 9_000 and len(table.keys[held].unique()) == held.sum()
    expected[table.keys[held]] = table.rows[held].long()
    assert len(expected.unique()) == vocab_size + held.sum()
    pairs = torch.arange(vocab_size**2)
    assert torch.equal(reached_rows(table, pairs // vocab_size, pairs % vocab_size), expected)
    lasts = torch.arange(vocab_size)
    assert torch.equal(reached_rows(table, torch.full((vocab_size,), -1), lasts), lasts)


@pytest.mark.parametrize("sampling", [GREEDY, sampled(seed=9), sampled(seed=9, temperature=1.7)])
def test_look_up_scores_count_the_mass_outside_the_row(sampling):
    """log softmax over the row's perturbed scores and one competitor for the rest, in float64."""
    table = katz.KatzTrigram(*CORPORA["zipf"]).bake(num_contexts=50, m=6)
    last, tau = torch.arange(30, dtype=torch.int32), 0.85
    positions = last + 5
    children, edges = lookup(table, torch.full_like(last, -1), last, positions, sampling, 3, tau)
    scores = table.log_probs[:30].double() / sampling.temperature
    if sampling.noise:
        scores = scores + gumbel_noise(9, positions[:, None], table.tokens[:30])
    rest = table.log_rest[:30, None].double() / sampling.temperature
    every = (torch.cat([scores, rest], 1) / tau).log_softmax(1)[:, :-1]
    best, index = every.sort(descending=True, stable=True)  # of equal scores the first of the row
    assert torch.equal(children, table.tokens[:30].gather(1, index[:, :3]))
    torch.testing.assert_close(edges.double(), best[:, :3], atol=1e-5, rtol=0)


# --- on disk


@pytest.fixture
def saved(tmp_path):
    katz.save(katz.KatzTrigram(*CORPORA["zipf"]).bake(num_contexts=50, m=6), tmp_path)
    return tmp_path


def test_saved_table_is_loaded_again(saved):
    """Integers exactly, log-probabilities to half precision."""
    table, loaded = katz.KatzTrigram(*CORPORA["zipf"]).bake(num_contexts=50, m=6), katz.load(saved)
    for name in ("keys", "rows", "tokens"):
        before, after = getattr(table, name), getattr(loaded, name)
        assert torch.equal(before, after) and before.dtype == after.dtype
    for name in ("log_probs", "log_rest"):
        torch.testing.assert_close(getattr(loaded, name), getattr(table, name), rtol=1e-3, atol=1e-6)
    assert loaded.vocab_size == 30


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_ids_survive_on_both_sides_of_16_bits(tmp_path, vocab_size):
    keys, rows = katz._hash(torch.tensor([vocab_size**2 - 1]), first_row=vocab_size)
    tokens = torch.arange(-1, vocab_size, dtype=torch.int32).clamp(min=0)[:, None]
    table = SuccessorTable(keys, rows, tokens, -torch.ones(len(tokens), 1), -torch.ones(len(tokens)), vocab_size)
    katz.save(table, tmp_path)
    assert torch.equal(katz.load(tmp_path).tokens, tokens)


@pytest.mark.parametrize("file", ["table.json", "table.safetensors"])
@pytest.mark.parametrize("kept", [None, 0.0, 0.05, 0.5, 0.95], ids="{}".format)
def test_truncated_files_are_refused(saved, file, kept):
    content = (saved / file).read_bytes()
    (saved / file).unlink()
    if kept is not None:
        (saved / file).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="no draft2 table can be read from"):
        katz.load(saved)


WRONG_CARDS = {
    "other-format": ({"format": "katz-trigram-0"}, "format must be 'katz-trigram-1', got 'katz-trigram-0'"),
    "no-object": ([], "format must be"),
    "more-tokens": ({"vocab_size": 10**6}, "is a corrupted draft2 table: .* rows for 1000000 tokens"),
    "fewer-tokens": ({"vocab_size": 10}, "is a corrupted draft2 table: a token id is out of range"),
    "no-number": ({"vocab_size": "many"}, "is a corrupted draft2 table"),
}


@pytest.mark.parametrize("change, message", WRONG_CARDS.values(), ids=WRONG_CARDS.keys())
def test_wrong_cards_are_refused(saved, change, message):
    card = json.loads((saved / "table.json").read_text())
    (saved / "table.json").write_text(json.dumps(card | change if change else change))
    with pytest.raises(ValueError, match=message):
        katz.load(saved)


def with_first(value):
    """Overwrite the first entry of a tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.int() if tensor.dtype == torch.uint16 else tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


CORRUPTIONS = {
    "token-too-large": ("tokens", with_first(30), "a token id is out of range"),
    "token-negative": ("tokens", with_first(-2), "a token id is out of range"),
    "row-too-large": ("rows", with_first(10**6), "a row index is out of range"),
    "nan": ("log_probs", with_first(math.nan), "NaN or positive"),
    "positive": ("log_rest", with_first(0.5), "NaN or positive"),
    "fewer-buckets": ("keys", lambda keys: keys[:-1].clone(), "keys and rows"),
    "fewer-rows": ("log_rest", lambda rest: rest[:-1].clone(), "log_rest has shape"),
    "narrower": ("log_probs", lambda probs: probs[:, :-1].clone(), "log_probs has shape"),
    "flat": ("tokens", lambda tokens: tokens.flatten(), ""),
    "empty": ("tokens", lambda tokens: tokens[:0].clone(), "0 rows for 30 tokens"),
    "key-type": ("keys", lambda keys: keys.int(), "keys"),
    "absent": ("keys", lambda keys: None, "'keys'"),
}


@pytest.mark.parametrize("tensor, change, message", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_corrupted_tensors_are_refused(saved, tensor, change, message):
    tensors = load_file(saved / "table.safetensors")
    tensors[tensor] = change(tensors[tensor])
    save_file({k: v for k, v in tensors.items() if v is not None}, saved / "table.safetensors")
    with pytest.raises(ValueError, match=f"is a corrupted draft2 table: .*{message}"):
        katz.load(saved)
