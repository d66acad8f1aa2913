"""The exponential function in loops that are to fill vector units, which a call of the C library would not."""

import numpy as np

from kernels.reference.compiled import compiled


@compiled
def exp(x):
    """e^x of a float32, for x <= 0; below -87 it is e^-87, of NaN NaN.

    e^x = 2^k e^r, r at most log(2) / 2 from 0, and the polynomial of e^r is that of expf in Cephes (Moshier).
    """
    x = np.float32(-87) if x < np.float32(-87) else x  # NaN stays
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * (r * r) + r + np.float32(1)) * power


@compiled
def sum_of_exp(values, highest, tau):
    """Sum of exp((values - highest) / tau) over float32 [n]; halves are added up until one term is left."""
    terms, factor = np.empty(len(values), np.float32), np.float32(1) / tau
    for i in range(len(values)):
        terms[i] = exp((values[i] - highest) * factor)
    count = len(terms)
    while count > 1:
        half = (count + 1) // 2
        for i in range(count - half):
            terms[i] += terms[half + i]
        count = half
    return terms[0]
