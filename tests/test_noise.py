"""Philox and the Gumbel noise made of it: known answers, the stated function, its law and its tails."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from kernels.reference import gumbel_noise, philox
from kernels.reference.noise import noise_of
from tests.laws import P_VALUE

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
EDGE_SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def integer_philox(seed: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 on Python's integers, straight from Salmon et al. (SC'11), figure 2."""
    key = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * counter[0], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def call_philox(seed: int, counter: list[int]) -> list[int]:
    return [int(word) for word in philox(seed, tuple(torch.tensor([word]) for word in counter))]


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(case):
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in KNOWN_ANSWERS[case])
    assert call_philox(key[0] + (key[1] << 32), counter) == answer


def test_philox_agrees_with_integers_for_any_64_bit_seed():
    """Products that wrap int64, high key words and full-range counters give the right 32 bits."""
    rng = random.Random(0)
    for seed in EDGE_SEEDS + [rng.getrandbits(64) for _ in range(50)]:
        counter = [rng.getrandbits(32) for _ in range(4)]
        assert call_philox(seed, counter) == integer_philox(seed, counter), f"seed {seed:#x}, counter {counter}"


def test_noise_is_the_stated_function_of_seed_position_and_token():
    """-log(-log(1 - u)) of the first word of counter (token, position, 0, 0), computed on Python's own numbers."""
    rng = random.Random(1)
    for seed in EDGE_SEEDS + [rng.getrandbits(64) for _ in range(20)]:
        position, token = rng.randrange(1024), rng.randrange(50257)
        uniform = (integer_philox(seed, [token, position, 0, 0])[0] + 0.5) / 2**32
        noise = gumbel_noise(seed, torch.tensor([position]), torch.tensor([token]))
        assert noise.item() == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-6, abs=1e-6)


def test_noise_does_not_depend_on_shape_order_or_company():
    """One noise per (seed, position, token), bit for bit, whatever else is asked for in the call."""
    tokens, positions = torch.arange(1009), torch.arange(61)
    grid = gumbel_noise(5, positions[:, None], tokens)
    shuffled_tokens, shuffled_positions = torch.randperm(1009), torch.randperm(61)
    shuffled = gumbel_noise(5, shuffled_positions[:, None].int(), shuffled_tokens.int())
    assert torch.equal(shuffled, grid[shuffled_positions][:, shuffled_tokens])
    assert torch.equal(gumbel_noise(5, positions, tokens[:61]), grid.diagonal())
    for position, token in ((0, 0), (60, 1008), (7, 511)):
        assert torch.equal(
            gumbel_noise(5, torch.tensor([position]), torch.tensor([token])), grid[position, token][None]
        )


@pytest.mark.parametrize("other", [6, 5 + 2**32, 5 + 2**63], ids=lambda seed: f"seed={seed:#x}")
def test_noise_of_another_seed_is_another(other):
    """Neighbouring seeds and seeds that differ in the high word alone share nothing."""
    positions, tokens = torch.arange(40)[:, None], torch.arange(40)
    assert (gumbel_noise(5, positions, tokens) == gumbel_noise(other, positions, tokens)).sum() <= 1


def test_position_and_token_are_not_interchangeable():
    noise = gumbel_noise(5, torch.arange(40)[:, None], torch.arange(40))
    assert (noise == noise.t()).sum() <= 40 + 2 and len(noise.unique()) >= 1600 - 2


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_noise_follows_the_gumbel_law(along):
    """Kolmogorov-Smirnov along each of the three arguments, the others fixed."""
    many, one = torch.arange(100_000), torch.tensor([3])
    if along == "seeds":
        noise = torch.cat([gumbel_noise(seed, torch.arange(50), one) for seed in range(1000)])
    else:
        noise = gumbel_noise(11, many, one) if along == "positions" else gumbel_noise(11, one, many)
    assert stats.kstest(noise.double().numpy(), stats.gumbel_r.cdf).pvalue > P_VALUE


@pytest.mark.parametrize("probability", [1e-3, 1e-6, 1e-8])
def test_rare_token_is_drawn_at_its_rate(probability):
    """A token of probability p beats one of probability 1 - p in p of all pairs of Philox words, within 5 %.

    Not a sample: the noise of every word is known. For 65,536 words of the sure token, evenly spaced over all 2^32, the
    words with which the rare one wins are counted exactly: the smallest words, for the noise falls as the word grows.
    Scores are float32, as in ``draw``.
    """
    sure, coarse = (np.arange(2**16) << 16) + 2**15, np.arange(2**16, 2**32, 2**12)  # coarse: every 2^12th of the rest
    sure = torch.from_numpy(noise_of(sure)) + math.log1p(-probability)
    rare = torch.from_numpy(noise_of(np.concatenate([np.arange(2**16), coarse]))) + math.log(probability)
    assert (rare.diff() <= 0).all()
    first_loser = torch.searchsorted(-rare, -sure)
    num_winners = torch.where(first_loser < 2**16, first_loser, (first_loser - 2**16) * 2**12 + 2**16)
    assert num_winners.double().mean().item() / 2**32 == pytest.approx(probability, rel=0.05)
