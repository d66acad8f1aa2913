"""Exact order statistics of a vector in registers, without sorting it: bisection on the bits of a float."""

import triton
import triton.language as tl


@triton.jit
def order(x):
    """int32 that orders as the float32 ``x`` does; the two zeros are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_largest(keys, k, BITS: tl.constexpr):
    """Largest int32 that at least ``k`` of ``keys`` reach, exact in its upper BITS bits."""
    found = tl.full((), -2147483648, tl.int32)
    for i in range(BITS):
        trial = found + (tl.full((), 1, tl.int32) << (31 - i))
        found = tl.where(tl.sum((keys >= trial).to(tl.int32)) >= k, trial, found)
    return found


@triton.jit
def best(keys, exists, k, BITS: tl.constexpr):
    """Which lanes hold the ``k`` largest keys, of equal ones the first; all that exist where they are fewer.

    Keys of lanes that do not exist must be the least int32, and keys zero below their upper BITS bits.
    """
    bound = kth_largest(keys, k, BITS)
    above = exists & (keys > bound)
    equal = exists & (keys == bound)
    room = k - tl.sum(above.to(tl.int32))
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def first(hit, lane, SIZE: tl.constexpr):
    """Lowest lane where ``hit`` holds; SIZE if there is none."""
    return tl.min(tl.where(hit, lane, SIZE))


@triton.jit
def nucleus_cut(keys, mass, wanted, BITS: tl.constexpr):
    """Smallest key that the nucleus may hold: the mass above it is below ``wanted``."""
    found = tl.full((), -2147483648, tl.int32)
    for i in range(BITS):
        trial = found + (tl.full((), 1, tl.int32) << (31 - i))
        found = tl.where(tl.sum(tl.where(keys > trial, mass, 0.0)) >= wanted, trial, found)
    return found + 1
