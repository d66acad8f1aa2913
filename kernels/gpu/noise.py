"""The noise of a draw: Philox words, and Gumbel noise made of them."""

import triton
import triton.language as tl


@triton.jit
def load_seed(seed_ptr):
    """The 64-bit seed from its words, int32 [2], low one first: uint64."""
    low, high = tl.load(seed_ptr).to(tl.uint32, bitcast=True), tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def philox_word(seed, token, position):
    """First word of Philox4x32-10 with key ``seed`` and counter (token, position, 0, 0): uint32."""
    zero = tl.zeros_like(token).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, token.to(tl.uint32), zero + position.to(tl.uint32), zero, zero)
    return word


@triton.jit
def gumbel(word):
    """-log(-log(1 - u)), u = (word + 1/2) / 2^32, to about float32's own precision.

    Large noise comes from small u, where 1 - u would lose it: there the inner logarithm is its series.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 9.0 * u + 0.125
    series = series * u + 1.0 / 7.0
    series = series * u + 1.0 / 6.0
    series = series * u + 0.2
    series = series * u + 0.25
    series = series * u + 1.0 / 3.0
    series = series * u + 0.5
    series = (series * u + 1.0) * u
    rest = ((0xFFFFFFFF - word).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u, exact in its fine end
    return -tl.log(tl.where(u < 0.125, series, -tl.log(rest)))
