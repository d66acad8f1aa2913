"""What the tests of randomness share: Hugging Face's filters and a chi-square test against an exact law."""

import numpy as np
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels.layout import Sampling
from kernels.reference import new_seed
from tests.interpreter import DEVICE

P_VALUE = 1e-4  # a right implementation fails a test of law about once in 10,000 choices of its fixed seed

GREEDY = Sampling(noise=False, seed=new_seed(0, DEVICE), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def sampled(
    seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sampling:
    """A sampled draw with every filter off unless named."""
    return Sampling(True, new_seed(seed, DEVICE), temperature, top_k, top_p, min_p)


def hugging_face_scores(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """``logits`` [N, V] after Hugging Face's own warpers in the order of its ``generate``; -inf = filtered."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits


def clear_rows(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Rows, bool [N], whose nucleus and floor are not within rounding of a border, so that any right sum agrees."""
    nearby = [
        sampling._replace(top_p=min(1.0, sampling.top_p * factor), min_p=sampling.min_p * factor)
        for factor in (1 - 1e-5, 1 + 1e-5)
        if sampling.top_p < 1.0 or 0.0 < sampling.min_p < 1.0
    ]
    kept = [hugging_face_scores(logits, one).isfinite() for one in nearby] or [torch.ones_like(logits).bool()] * 2
    return (kept[0] == kept[1]).all(1)


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of ``counts`` under the exact ``law`` (same shape); the rarest cells are merged until 5 are expected.

    A count where the law is zero gives p = 0.
    """
    counts, law = np.asarray(counts).ravel(), np.asarray(law, dtype=np.float64).ravel()
    if counts[law == 0].any():
        return 0.0
    expected = law / law.sum() * counts.sum()
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    num_merged = int(np.searchsorted(expected.cumsum(), 5)) + 1
    counts = np.append(counts[:num_merged].sum(), counts[num_merged:])
    expected = np.append(expected[:num_merged].sum(), expected[num_merged:])
    return float(stats.chisquare(counts, expected).pvalue)
