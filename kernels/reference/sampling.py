"""Torch twin of the sampler: one draw rule for every stage, greedy or not.

    token = argmax over the survivors of  logits / temperature + gumbel(seed, position, token),  lowest id on ties

The noise depends on nothing else, so every stage of a chain and plain decoding look at the same sample path. With the
noise fixed, sampling is greedy decoding of perturbed scores, and a node's children are scored by
``log softmax((logits / temperature + gumbel) / tau)``: the perturbed margin says how safe an edge is.
"""

import math

import numpy as np
import torch

from kernels.layout import Sampling
from kernels.reference.compiled import COMPILES
from kernels.reference.noise import gumbel_noise, seed_number, split_seed
from kernels.reference.sampling_rows import draw_rows


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
    if COMPILES and logits.device.type == "cpu":
        wanted = width > 0 or log_probs is not None
        tokens, children, edges, chosen = _by_loops(logits, positions, sampling, max(width, 1), tau, wanted)
    else:
        tokens, children, edges, chosen = by_torch(logits, positions, sampling, max(width, 1), tau)
    if log_probs is not None:
        log_probs.copy_(chosen[:, 0])
    if child_log_probs is not None:
        child_log_probs.copy_(chosen[:, :width])
    return tokens, children[:, :width], edges[:, :width]


def by_torch(
    logits: torch.Tensor, positions: torch.Tensor, sampling: Sampling, width: int, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification: tokens [N]; children, their edge scores and log-probabilities without noise [N, width]."""
    plain = scores = logits.float()
    if sampling.noise:
        plain = filtered(logits.float() / sampling.temperature, sampling)
        everyone = torch.arange(logits.shape[1], device=logits.device)
        scores = plain + gumbel_noise(seed_number(sampling.seed), positions[:, None], everyone)
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices[:, :width]  # NaN first, the first of equal ones
    tokens = ranked[:, :1].masked_fill(scores.gather(1, ranked[:, :1]).isnan(), -1).squeeze(1).int()
    edges = (scores / tau).log_softmax(-1).gather(1, ranked)
    return tokens, ranked.int(), edges, plain.log_softmax(-1).gather(1, ranked)


def filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores [N, V] after top-k, top-p and min-p, as Hugging Face defines and orders them, -inf = filtered.

    All that equal the k-th best survive top-k; in top-p equal scores are ordered by id. Masses are summed best token
    first, so that a row's result does not depend on how many filtered tokens follow.
    """
    if 0 < sampling.top_k < scores.shape[1]:
        kth = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
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


def exp(x: torch.Tensor) -> torch.Tensor:
    """``torch.exp``; on a CPU numpy's, for with several threads the first call in a process of MKL's, which torch's is,
    may be right to four digits only."""
    return torch.exp(x) if x.device.type != "cpu" else torch.from_numpy(np.exp(x.numpy()))


def _by_loops(logits: torch.Tensor, positions: torch.Tensor, sampling: Sampling, width: int, tau: float, wanted: bool):
    """``by_torch``, row by row in compiled loops; edge scores and log-probabilities only where wanted."""
    if logits.dtype == torch.bfloat16:
        bits, shift = logits.contiguous().view(torch.int16), 16
    else:
        bits, shift = logits.float().contiguous().view(torch.int32), 0
    k = sampling.top_k if 0 < sampling.top_k < logits.shape[1] else 0
    log_min_p = math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf
    rule = np.float32(sampling.temperature), k, np.float32(sampling.top_p), np.float32(log_min_p)
    words = split_seed(seed_number(sampling.seed))
    rows = bits.numpy(), np.int32(shift), positions.numpy()
    return tuple(map(torch.from_numpy, draw_rows(*rows, words, sampling.noise, *rule, width, np.float32(tau), wanted)))
