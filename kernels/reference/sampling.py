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
    vocab_size = logits.shape[1]
    width = min(num_children, vocab_size)
    logits = logits.float()
    scores, ids = _candidates(logits, sampling, width)
    plain = scores
    if sampling.noise:
        scores = scores + gumbel_noise(seed_number(sampling.seed), positions[:, None], ids)
    ranked = _ranked(scores, width) if width else _argmax(scores)
    drawn = ranked[:, :1]
    if log_probs is not None:
        log_probs.copy_(plain.log_softmax(-1).gather(1, drawn).squeeze(1))
    ids = ids.expand_as(scores)
    tokens = ids.gather(1, drawn).masked_fill(scores.gather(1, drawn).isnan(), -1).int().squeeze(1)
    if width == 0:
        return tokens, tokens.new_empty(len(tokens), 0), scores.new_empty(len(tokens), 0)
    edges = (scores if tau == 1 else scores / tau).log_softmax(-1).gather(1, ranked)
    if child_log_probs is not None:
        are_edges = tau == 1 and not sampling.noise
        child_log_probs.copy_(edges if are_edges else plain.log_softmax(-1).gather(1, ranked))
    return tokens, ids.gather(1, ranked).int(), edges


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


def largest(scores: torch.Tensor, count: int, survivors: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest scores of each row [N, V], NaN above all, with those that equal the last of them, and their
    indices, int64: [N, W], by rising index, padded with -inf. Scores below the ``survivors``-th are -inf, too."""
    survivors = survivors or count
    if count > VOCAB_TILE or not COMPILES or scores.device.type != "cpu":
        return by_topk(scores, count, survivors)
    missing = -scores.shape[1] % VOCAB_TILE
    tiles = F.pad(scores, (0, missing), value=-math.inf) if missing else scores
    maxima = tiles.unflatten(1, (-1, VOCAB_TILE)).amax(-1)
    return tuple(map(torch.from_numpy, _largest(scores.numpy(), maxima.numpy(), count, survivors, VOCAB_TILE)))


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
def _largest(scores, maxima, count, survivors, tile_size):
    """``largest``: what is among the first ``count`` lies in one of the ``count`` best tiles. NaN is never less."""
    num_rows, size = scores.shape
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
                    if not scores[row, token] < least:
                        values[row, found], ids[row, found] = scores[row, token], token
                        found += 1
        rising = np.sort(values[row, :found])
        last, kth = rising[found - count], rising[found - survivors]
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
        return logits, everyone
    if not 0 < k < vocab_size:
        return _nucleus(logits / sampling.temperature, everyone, sampling), everyone
    scores, ids = largest(logits / sampling.temperature, max(k, at_least), k)
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
