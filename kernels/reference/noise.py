"""The noise of a draw: Gumbel numbers from Philox, a function of seed, position and token alone."""

import numpy as np
import torch

from kernels.reference.compiled import compiled

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
        flat = keyed_noise(*split_seed(seed), position.flatten().numpy(), token.flatten().numpy())
        return torch.from_numpy(flat).view(token.shape)
    zero = torch.zeros_like(token)
    word = philox(seed, (token, position, zero, zero))[0]
    uniform = (word.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform)).float()


def split_seed(seed: int) -> tuple[int, int]:
    """Its two words, low word first."""
    return seed & _MASK, (seed >> 32) & _MASK


def seed_number(words: torch.Tensor) -> int:
    """The 64-bit seed of which ``new_seed`` has made int32 [2]."""
    low, high = words.tolist()
    return (high & _MASK) << 32 | low & _MASK


@compiled
def noise_of(words):
    """Gumbel noise float32 of Philox words int64, both flat."""
    noise = np.empty(len(words), np.float32)
    for i in range(len(words)):
        noise[i] = -np.log(-np.log1p(-((words[i] + 0.5) * 2.0**-32)))
    return noise


@compiled
def keyed_noise(k0, k1, positions, tokens):
    """``gumbel_noise`` of flat arrays of integers."""
    words = np.empty(len(tokens), np.int64)
    for i in range(len(tokens)):
        words[i] = _compiled_rounds(k0, k1, int(tokens[i]), int(positions[i]), 0, 0, 10)[0]
    return noise_of(words)
