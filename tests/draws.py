"""What the tests of sampling on the device share: rules, logits, and ``draw`` compared with its torch twin."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import gpu, reference
from kernels.layout import VOCAB_TILE, Sampling
from tests.interpreter import DEVICE
from tests.laws import GREEDY, sampled

TOLERANCE = 3e-5  # of edges and log-probabilities, nats
TAU = 0.85
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # half precision is only loaded: right in the interpreter too
RULES = {
    "greedy": GREEDY,
    "plain": sampled(seed=5),
    "top_k=1": sampled(seed=2**32, top_k=1),
    "top_k=2": sampled(seed=2**63 + 11, top_k=2, temperature=0.7),
    "top_k=20": sampled(seed=3, top_k=20, top_p=0.9),
    "top_k=50": sampled(seed=2**64 - 1, top_k=50, temperature=1.3),
    "top_k=64": sampled(seed=1, top_k=64, min_p=0.02),  # the last of the narrow kernel
    "top_k=65": sampled(seed=7, top_k=65),
    "top_k=300": sampled(seed=8, top_k=300, top_p=0.8, temperature=1.3),
    "top_k=1000": sampled(seed=9, top_k=1000),
    "top_k=V-and-more": sampled(seed=10, top_k=10_000, temperature=0.7),
    "top_p": sampled(seed=2**31, top_p=0.9),
    "top_p-tiny": sampled(seed=12, top_p=1e-3),
    "min_p": sampled(seed=13, min_p=0.1),
    "min_p=1": sampled(seed=14, min_p=1.0),
    "all": sampled(seed=15, temperature=0.8, top_k=20, top_p=0.8, min_p=0.05),
    "all-wide": sampled(seed=16, temperature=0.8, top_k=100, top_p=0.95, min_p=0.01),
}
PATHS = ["greedy", "plain", "top_k=2", "top_k=20", "all", "top_k=300"]  # one of each way through the kernels
each_path = pytest.mark.parametrize("rule", PATHS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """About as spread as a model's, and all of them negative, as GPT-2's are."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num_rows, vocab_size, generator=generator) - 40).to(DEVICE, dtype)


def positions_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(logits), dtype=torch.int32, device=logits.device) + 17


def maxima_of(logits: torch.Tensor) -> torch.Tensor:
    padded = F.pad(logits.float(), (0, -logits.shape[1] % VOCAB_TILE), value=-math.inf)
    return padded.unflatten(1, (-1, VOCAB_TILE)).amax(-1)


def results(
    ops, logits: torch.Tensor, sampling: Sampling, num_children: int = 4, tau: float = TAU, positions=None, maxima=None
) -> tuple[torch.Tensor, ...]:
    """Tokens, children, edges, log-probabilities of the tokens and of the children."""
    positions = positions_of(logits) if positions is None else positions
    log_probs = logits.new_full((len(logits),), 7.0, dtype=torch.float32)
    of_children = log_probs.new_full((len(logits), min(num_children, logits.shape[1])), 7.0)
    drawn = ops.draw(logits, positions, sampling, num_children, tau, maxima, log_probs, of_children)
    return *drawn, log_probs, of_children


def assert_values(actual: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    """Within the tolerance where ``expected`` is finite, the same infinity or NaN where it is not."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN at other places"
    assert torch.equal(actual == -math.inf, expected == -math.inf), f"{name}: -inf at other places"
    finite = expected.isfinite()
    error = (actual[finite] - expected[finite]).abs().max().item() if finite.any() else 0.0
    assert error <= tolerance, f"{name}: off by {error:.3g}"


def check(
    logits: torch.Tensor,
    sampling: Sampling,
    num_children: int = 4,
    maxima: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[torch.Tensor, ...]:
    """Assert that the kernel agrees with the twin; what the kernel gave, on the host."""
    if maxima is None and logits.shape[1] >= 8192:
        maxima = maxima_of(logits)
    actual = [column.cpu() for column in results(gpu, logits, sampling, num_children, maxima=maxima)]
    expected = results(reference, logits.cpu(), sampling, num_children)
    tokens, children, edges, log_probs, of_children = expected
    assert torch.equal(actual[0], tokens), f"tokens {actual[0].tolist()}, expected {tokens.tolist()}"
    assert_values(actual[2], edges, "edges", tolerance)
    live = edges > -math.inf
    assert torch.equal(actual[1][live], children[live])
    assert_values(actual[3], log_probs, "log_probs", tolerance)
    assert_values(actual[4], of_children, "child_log_probs", tolerance)
    return tuple(actual)
