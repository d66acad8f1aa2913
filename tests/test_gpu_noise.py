"""The noise on the device is Philox and the twin's, a rare token is drawn at its rate, and draws follow the law."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import gpu, reference
from kernels.gpu.noise import gumbel, load_seed, philox_word
from kernels.layout import Sampling
from kernels.reference import gumbel_noise, new_seed
from tests.draws import TAU, assert_values
from tests.gpu_helpers import REAL_SHAPE
from tests.interpreter import DEVICE, INTERPRETING
from tests.laws import P_VALUE, chi_square, sampled
from tests.test_noise import EDGE_SEEDS, integer_philox

pytestmark = pytest.mark.usefixtures("hostile_scratch")


@triton.jit
def _gumbel_kernel(words_ptr, noise_ptr, SIZE: tl.constexpr):
    """Grid (any,): the noise of SIZE words, which come as int32 bits."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(noise_ptr + at, gumbel(tl.load(words_ptr + at).to(tl.uint32, bitcast=True)))


@triton.jit
def _philox_kernel(tokens_ptr, positions_ptr, seed_ptr, words_ptr, SIZE: tl.constexpr):
    """Grid (any,): the word of each token at its position, as int32 bits."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = philox_word(load_seed(seed_ptr), tl.load(tokens_ptr + at), tl.load(positions_ptr + at))
    tl.store(words_ptr + at, word.to(tl.int32, bitcast=True))


def _in_blocks(kernel, columns: list[torch.Tensor], dtype: torch.dtype, *shared: torch.Tensor) -> torch.Tensor:
    """What ``kernel`` gives for int32 ``columns``; padded to whole blocks, which are large where programs are slow."""
    count, size = len(columns[0]), 2**16 if INTERPRETING else 1024
    columns = [F.pad(column.to(DEVICE), (0, -count % size)) for column in columns]
    out = torch.empty(len(columns[0]), dtype=dtype, device=DEVICE)
    kernel[(len(out) // size,)](*columns, *shared, out, SIZE=size)
    return out[:count].cpu()


def noise_of(words: torch.Tensor) -> torch.Tensor:
    """The kernel's noise of int64 ``words``."""
    return _in_blocks(_gumbel_kernel, [as_int32(words)], torch.float32)


def words_of(seed: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The kernel's Philox words, int64."""
    columns = [tokens.int(), positions.int()]
    return _in_blocks(_philox_kernel, columns, torch.int32, new_seed(seed, DEVICE)).long() & 0xFFFFFFFF


def as_int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("seed", [*EDGE_SEEDS, 0x243F6A8885A308D3], ids=lambda seed: f"{seed:#x}")
def test_philox(seed):
    """The words of Python's integers and of the twin: whole vocabulary, every position, all 64 bits of the seed."""
    rng = random.Random(seed)
    tokens = torch.tensor([0, 50256, *(rng.randrange(50257) for _ in range(9998))])
    positions = torch.tensor([0, 2**20, *(rng.randrange(1025) for _ in range(9998))])
    words = words_of(seed, tokens, positions)
    zero = torch.zeros_like(tokens)
    assert torch.equal(words, reference.philox(seed, (tokens, positions, zero, zero))[0])
    for i in range(20):
        assert words[i] == integer_philox(seed, [int(tokens[i]), int(positions[i]), 0, 0])[0]


def test_noise():
    """Of 100,000 words, the ends, and both sides of where the series begins: -log(-log(1 - u)), computed in float64."""
    words = torch.cat(
        [
            torch.tensor([0, 1, 2, 2**32 - 1, 2**32 - 2, *range(2**29 - 40, 2**29 + 40)]),
            torch.randint(2**32, (80_000,)),
            2 ** (32 * torch.rand(20_000, dtype=torch.float64)).long(),
        ]
    ).clamp(max=2**32 - 1)
    uniform = (words.double() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-uniform))
    error = (noise_of(words).double() - exact).abs()
    assert (error <= 1e-6 + 1e-7 * exact.abs()).all(), f"off by {error.max():.3g} at word {words[error.argmax()]}"


@pytest.mark.parametrize("seed", [0, 2**63 + 5])
def test_noise_is_the_twins(seed):
    """Philox and logarithms together, over tokens and positions."""
    tokens, positions = torch.arange(300).repeat(40), torch.arange(40).repeat_interleave(300)
    mine, twins = noise_of(words_of(seed, tokens, positions)), gumbel_noise(seed, positions, tokens)
    assert ((mine - twins).abs() <= 1e-6 + 1e-7 * twins.abs()).all()


@pytest.mark.parametrize("probability", [1e-3, 1e-6, 1e-8])
def test_rare_token_is_drawn_at_its_rate(probability):
    """A token of probability p beats one of probability 1 - p in p of all pairs of words, within 5 %.

    Counted, not sampled, as for the twin: for words of the sure token evenly spaced over all 2^32, the words with which
    the rare one wins are the smallest ones, for the noise falls as the word grows.
    """
    sure = noise_of((torch.arange(2**16) << 16) + 2**15) + math.log1p(-probability)
    coarse = torch.arange(2**16, 2**32, 2**12)  # every word up to 2^16, then every 2^12th
    rare = noise_of(torch.cat([torch.arange(2**16), coarse])) + math.log(probability)
    rising = rare.diff().clamp(min=0)
    assert rising.max() < 1e-6, "only the border of the series may break the order, by a rounding"
    rare = rare.cummin(0).values
    first_loser = torch.searchsorted(-rare, -sure)
    num_winners = torch.where(first_loser < 2**16, first_loser, (first_loser - 2**16) * 2**12 + 2**16)
    assert num_winners.double().mean().item() / 2**32 == pytest.approx(probability, rel=0.05)


@pytest.mark.parametrize("ops", [gpu, reference], ids=["triton", "torch"])
@pytest.mark.parametrize("top_k", [0, 5, 4], ids=lambda k: f"top_k={k}")
@pytest.mark.parametrize("seed", [1, 2**64 - 7])
def test_noise_decides(seed, top_k, ops):
    """Logits that cancel the noise, worked out on Python's own numbers, leave the scores that are written here."""
    scores, temperature, position = [1.0, 3.0, 0.0, 2.0, 2.5], 0.7, 41
    logits = []
    for token, score in enumerate(scores):
        uniform = (integer_philox(seed, [token, position, 0, 0])[0] + 0.5) / 2**32
        logits.append((score + math.log(-math.log1p(-uniform))) * temperature)
    if top_k == 4:
        scores[min(range(5), key=logits.__getitem__)] = -math.inf
    ranked = sorted(range(5), key=lambda token: -scores[token])
    device = DEVICE if ops is gpu else "cpu"
    row, positions = (torch.tensor([column], device=device) for column in (logits, position))
    tokens, children, edges = ops.draw(row, positions.int(), sampled(seed, temperature, top_k), 5, TAU)
    num_live = sum(score > -math.inf for score in scores)
    assert tokens.tolist() == ranked[:1] and children[0, :num_live].tolist() == ranked[:num_live]
    law = (torch.tensor(scores, dtype=torch.float64)[ranked] / TAU).log_softmax(0)
    assert_values(edges[0].cpu().double(), law, "edges")


# --- the law

LAW = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.03, 0.0099, 1e-4], dtype=torch.float64)
NUM_DRAWS = 2**20


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_law_of_the_noise(along):
    """A million argmaxes of log-probabilities and the kernel's noise follow the law (chi-square), along positions and
    over a thousand seeds."""
    tokens = torch.arange(len(LAW))
    if along == "positions":
        positions = torch.arange(NUM_DRAWS)
        words = words_of(11, tokens.repeat(NUM_DRAWS), positions.repeat_interleave(len(LAW)))
    else:
        positions = torch.arange(1024)
        grid = (tokens.repeat(1024), positions.repeat_interleave(len(LAW)))
        words = torch.cat([words_of(seed * 2**40 + seed, *grid) for seed in range(64)])
    drawn = (noise_of(words).view(-1, len(LAW)) + LAW.log().float()).argmax(1)
    assert chi_square(torch.bincount(drawn, minlength=len(LAW)).numpy(), LAW.numpy()) > P_VALUE


def counts(ops, device: str, sampling: Sampling, num_draws: int) -> torch.Tensor:
    """How often each token is drawn, at ``num_draws`` positions."""
    logits = (LAW.log() * sampling.temperature).float().to(device)
    total = torch.zeros(len(LAW), dtype=torch.long)
    for positions in torch.arange(num_draws, dtype=torch.int32, device=device).split(2**18):
        drawn, _, _ = ops.draw(logits.expand(len(positions), -1).contiguous(), positions, sampling)
        total += torch.bincount(drawn.cpu(), minlength=len(LAW))
    return total


@pytest.mark.parametrize("top_k", [0, 3], ids=lambda k: f"top_k={k}")
@pytest.mark.parametrize(
    ("ops", "num_draws"),
    [
        pytest.param(reference, NUM_DRAWS, id="torch"),
        pytest.param(gpu, 200, id="triton"),
        pytest.param(gpu, NUM_DRAWS, id="triton-million", marks=REAL_SHAPE),
    ],
)
def test_law_of_draws(ops, num_draws, top_k):
    """Frequencies of ``draw`` itself are the law, and nothing outside top-k appears."""
    law = torch.where(torch.arange(len(LAW)) < (top_k or len(LAW)), LAW, 0.0)  # LAW falls
    drawn = counts(ops, DEVICE if ops is gpu else "cpu", sampled(17, 0.7, top_k), num_draws)
    assert drawn.sum() == num_draws
    assert chi_square(drawn.numpy(), law.numpy()) > P_VALUE
