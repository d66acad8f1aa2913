"""Torch twin of the sampler: one draw rule for every stage, greedy or not.

    token = argmax over the survivors of  logits / temperature + gumbel(seed, position, token),  lowest id on ties

The noise depends on nothing else, so every stage of a chain and plain decoding look at the same sample path. With the
noise fixed, sampling is greedy decoding of perturbed scores, and a node's children are scored by
``log softmax((logits / temperature + gumbel) / tau)``: the perturbed margin says how safe an edge is.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from kernels.layout import VOCAB_TILE, Sampling
from kernels.reference.compiled import COMPILES, compiled

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
FEW = 4 * VOCAB_TILE  # candidates of a row, of which one loop on a CPU takes the best


def philox(seed: int, counters: tuple[torch.Tensor, ...], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Philox4x32 (Salmon et al., SC'11): four counter words -> four random words, int64 tensors or numpy arrays.

    ``seed`` is the 64-bit key, low word first.
    """
    return _rounds(*split_seed(seed), *counters, rounds)


def _rounds(k0, k1, c0, c1, c2, c3, rounds):
    for _ in range(rounds):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B  # the low 64 bits are right even where int64 wraps
        c0, c1 = ((product_b >> 32) & _MASK) ^ c1 ^ k0, product_b & _MASK
        c2, c3 = ((product_a >> 32) & _MASK) ^ c3 ^ k1, product_a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


_compiled_rounds = compiled(_rounds)


def gumbel_noise(seed: int, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of drawing ``tokens`` at absolute ``positions`` (broadcast together): float32.

    With u the first Philox word of counter (token, position, 0, 0) over 2^32, the noise is -log(-log(1 - u)). Large
    noise comes from u near 0, where the words are 2^-32 apart, so that rare tokens are drawn at their rate.
    """
    token, position = torch.broadcast_tensors(tokens.long(), positions.long())
    if token.device.type == "cpu":
        flat = noise(seed, position.flatten().numpy(), token.flatten().numpy())
        return torch.from_numpy(flat).view(token.shape)
    zero = torch.zeros_like(token)
    word = philox(seed, (token, position, zero, zero))[0]
    uniform = (word.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform)).float()


def noise(seed: int, positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """``gumbel_noise`` of flat int64 arrays, in numpy."""
    return keyed_noise(*split_seed(seed), positions, tokens)


def split_seed(seed: int) -> tuple[int, int]:
    """Its two words, low word first."""
    return seed & _MASK, (seed >> 32) & _MASK


@compiled
def noise_of(words):
    """Gumbel noise float32 of Philox words int64, both flat."""
    return (-np.log(-np.log1p(-((words + 0.5) * 2.0**-32)))).astype(np.float32)


@compiled
def keyed_noise(k0, k1, positions, tokens):
    return noise_of(_compiled_rounds(k0, k1, tokens, positions, 0 * tokens, 0 * tokens, 10)[0])


def seed_number(words: torch.Tensor) -> int:
    """The 64-bit seed of which ``new_seed`` has made int32 [2]."""
    low, high = words.tolist()
    return (high & _MASK) << 32 | low & _MASK


def draw(
    logits: torch.Tensor,  # [N, V]
    positions: torch.Tensor,  # int32 [N], absolute position of the token being drawn
    sampling: Sampling,
    num_children: int = 0,
    tau: float = 1.0,
    tile_maxima: torch.Tensor | None = None,  # float32 [N, cdiv(V, VOCAB_TILE)] of these logits; a hint, unused here
    log_probs: torch.Tensor | None = None,  # float32 [N], written: of the drawn tokens, after temperature and filters
    child_log_probs: torch.Tensor | None = None,  # float32 [N, m], written: the same of the children, without noise
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw each row's token and, for the next tree, its best children.

    Returns tokens int32 [N], children int32 [N, m] by falling score with m = min(num_children, V), and their edge
    scores float32 [N, m] (nats; -inf for a child that no filter lets through). A row with a NaN logit gives token -1.

    Example: logits [0, 2, 1], greedy, two children, tau 1: token 1, children [1, 2], scores [-0.41, -1.41].
    """
    width = min(num_children, logits.shape[1])
    scores, ids = _candidates(logits, sampling, width)
    plain = scores
    if sampling.noise:
        scores = scores + gumbel_noise(seed_number(sampling.seed), positions[:, None], ids)
    if scores.shape[1] <= FEW and COMPILES and scores.device.type == "cpu":
        arrays = (scores.numpy(), plain.numpy(), ids.expand_as(scores).numpy())
        tokens, children, edges, chosen = map(torch.from_numpy, _finish(*arrays, max(width, 1), np.float32(tau)))
    else:
        wanted = width > 0 or log_probs is not None
        tokens, children, edges, chosen = _finish_many(scores, plain, ids.expand_as(scores), max(width, 1), tau, wanted)
    if log_probs is not None:
        log_probs.copy_(chosen[:, 0])
    if child_log_probs is not None:
        child_log_probs.copy_(chosen[:, :width])
    return tokens, children[:, :width], edges[:, :width]


@compiled
def _finish(scores, plain, ids, width, tau):
    """Rows [N, W] of candidates: the tokens drawn; of the best ``width``, by falling score, tokens, edge scores and
    log-probabilities without noise."""
    num_rows, count = scores.shape
    tokens, children = np.empty(num_rows, np.int32), np.empty((num_rows, width), np.int32)
    edges, chosen = np.empty((num_rows, width), np.float32), np.empty((num_rows, width), np.float32)
    for row in range(num_rows):
        (highest, total), (plain_highest, plain_total) = _log_sum(scores[row], tau), _log_sum(plain[row], np.float32(1))
        taken = np.zeros(count, np.bool_)
        for column in range(width):
            at = -1
            for i in range(count):  # NaN before all, the first of equal ones
                if not taken[i]:
                    more = at < 0 or scores[row, i] > scores[row, at]
                    if more or (np.isnan(scores[row, i]) and not np.isnan(scores[row, at])):
                        at = i
            taken[at] = True
            children[row, column] = ids[row, at]
            edges[row, column] = (scores[row, at] - highest) / tau - total
            chosen[row, column] = plain[row, at] - plain_highest - plain_total
            if column == 0:
                tokens[row] = -1 if np.isnan(scores[row, at]) else ids[row, at]
    return tokens, children, edges, chosen


@compiled
def _log_sum(values, tau):
    """The largest value, and log sum exp((values - largest) / tau)."""
    largest, total = np.float32(-np.inf), 0.0
    for value in values:
        if value > largest:
            largest = value
    for value in values:
        total += np.exp((value - largest) / tau)
    return largest, np.float32(np.log(total))


def _finish_many(scores, plain, ids, width: int, tau: float, scores_wanted: bool) -> tuple[torch.Tensor, ...]:
    """``_finish``, for any number of candidates and device; edge scores and log-probabilities only where wanted."""
    ranked = _ranked(scores, width) if width > 1 else _argmax(scores)
    drawn = ranked[:, :1]
    tokens = ids.gather(1, drawn).masked_fill(scores.gather(1, drawn).isnan(), -1).int().squeeze(1)
    if not scores_wanted:
        return tokens, ids.gather(1, ranked).int(), scores.new_empty(ranked.shape), scores.new_empty(ranked.shape)
    edges = (scores if tau == 1 else scores / tau).log_softmax(-1).gather(1, ranked)
    chosen = edges if tau == 1 and plain is scores else plain.log_softmax(-1).gather(1, ranked)
    return tokens, ids.gather(1, ranked).int(), edges, chosen


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """Index of the largest score of each row, the first of equal ones, of a NaN before all: int64 [N, 1]."""
    if scores.device.type != "cpu":
        return scores.argmax(-1, keepdim=True)
    return torch.from_numpy(scores.numpy().argmax(-1))[:, None]  # 10 times as fast as torch


def _ranked(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the ``width`` largest scores of each row, NaN before all, falling; equal ones by rising index: int64
    [N, width]."""
    among, ids = scores, None
    if scores.shape[1] > width * VOCAB_TILE:
        among, ids = largest(scores, width)
    order = among.sort(dim=-1, descending=True, stable=True).indices[:, :width]
    return order if ids is None else ids.gather(1, order)


def largest(
    logits: torch.Tensor, count: int, survivors: int | None = None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest scores of each row, logits [N, V] / temperature, NaN above all, with those that equal the
    last of them, and their indices, int64: [N, W], by rising index, padded with -inf. Scores below the
    ``survivors``-th are -inf, too."""
    survivors = survivors or count
    if count > VOCAB_TILE or not COMPILES or logits.device.type != "cpu":
        return by_topk(logits.float() / temperature, count, survivors)
    missing = -logits.shape[1] % VOCAB_TILE
    tiles = F.pad(logits, (0, missing), value=-math.inf) if missing else logits
    maxima = tiles.unflatten(1, (-1, VOCAB_TILE)).amax(-1).float() / temperature
    if logits.dtype == torch.bfloat16:
        bits, shift = logits.contiguous().view(torch.int16), 16
    else:
        bits, shift = logits.float().contiguous().view(torch.int32), 0
    arguments = bits.numpy(), np.int32(shift), np.float32(temperature), maxima.numpy(), count, survivors, VOCAB_TILE
    return tuple(map(torch.from_numpy, _largest(*arguments)))


def by_topk(scores: torch.Tensor, count: int, survivors: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``largest``, for any ``count`` and device."""
    top = scores.topk(count, dim=-1).values
    last, kth = top[:, -1:], top[:, survivors - 1 : survivors]
    wanted = ~(scores < last)
    width = max([count, *wanted.sum(1).tolist()])
    values = scores.new_full((len(scores), width), -math.inf)
    ids = torch.full_like(values, scores.shape[1] - 1, dtype=torch.int64)
    row, token = wanted.nonzero(as_tuple=True)
    place = wanted.cumsum(1)[row, token] - 1
    values[row, place], ids[row, place] = scores.masked_fill(scores < kth, -math.inf)[row, token], token
    return values, ids


@compiled
def _largest(bits, shift, temperature, maxima, count, survivors, tile_size):
    """``largest`` of logits given by float32's bits or, to be shifted, their upper halves: what is among the first
    ``count`` lies in one of the ``count`` best tiles. NaN is never less."""
    num_rows, size = bits.shape
    num_tiles = maxima.shape[1]
    values, ids = np.empty((num_rows, size), np.float32), np.empty((num_rows, size), np.int64)
    counts, width = np.zeros(num_rows, np.int64), count
    for row in range(num_rows):
        least = np.float32(-np.inf)
        if count <= num_tiles:
            least = np.partition(maxima[row], num_tiles - count)[num_tiles - count]
        found = 0
        for tile in range(num_tiles):
            if not maxima[row, tile] < least:
                for token in range(tile * tile_size, min(size, (tile + 1) * tile_size)):
                    score = np.int32(np.int32(bits[row, token]) << shift).view(np.float32)
                    if temperature != 1:
                        score = score / temperature
                    if not score < least:
                        values[row, found], ids[row, found] = score, token
                        found += 1
        last = np.partition(values[row, :found], found - count)[found - count]
        kth = np.partition(values[row, :found], found - survivors)[found - survivors]
        for i in range(found):
            score = values[row, i]
            if not score < last:
                values[row, counts[row]], ids[row, counts[row]] = -np.inf if score < kth else score, ids[row, i]
                counts[row] += 1
        width = max(width, counts[row])
    for row in range(num_rows):
        values[row, counts[row] : width], ids[row, counts[row] : width] = -np.inf, size - 1
    return values[:, :width].copy(), ids[:, :width].copy()


def _candidates(logits: torch.Tensor, sampling: Sampling, at_least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores after temperature and filters (-inf = filtered), with their token ids: the whole vocabulary, or the best
    ``at_least`` and more where top-k leaves few survivors. Ids are int64 [1 or N, W], rising along a row."""
    vocab_size, k = logits.shape[1], sampling.top_k
    everyone = torch.arange(vocab_size, device=logits.device)[None]
    if not sampling.noise:
        return logits.float(), everyone
    if not 0 < k < vocab_size:
        return _nucleus(logits.float() / sampling.temperature, everyone, sampling), everyone
    scores, ids = largest(logits, max(k, at_least), k, sampling.temperature)
    return _nucleus(scores, ids, sampling), ids


def exp(x: torch.Tensor) -> torch.Tensor:
    """``torch.exp``; on a CPU numpy's, for with several threads the first call in a process of MKL's, which torch's is,
    may be right to four digits only."""
    return torch.exp(x) if x.device.type != "cpu" else torch.from_numpy(np.exp(x.numpy()))


def _nucleus(scores: torch.Tensor, ids: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """top-p, then min-p, as Hugging Face defines them; equal scores are ordered by id: ``ids`` must rise along a row.

    Masses are summed best token first, so that a row's result does not depend on how many filtered tokens follow.
    """
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        mass = exp(ordered - ordered[:, :1])
        total = mass.cumsum(-1)
        drop = total - mass >= sampling.top_p * total[:, -1:]
        drop[:, 0] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -math.inf)
    if sampling.min_p > 0.0:
        floor = scores.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < floor, -math.inf)
    return scores
