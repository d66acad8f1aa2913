"""What follows the sums of a product in float32, as one loop over them."""

import numpy as np

from kernels.reference.compiled import compiled
from kernels.reference.exponential import exp

NO_RESIDUAL = np.empty((0, 0), np.float32)


@compiled
def finish(sums, scale, bias, is_gelu, residual):
    """``sums`` [N, M] become y = bias + scale * sums, or gelu(y), or residual + y, in place; bias [M], residual [N, M].

    The tanh form of gelu (Hendrycks and Gimpel 2016), x (1 + tanh(u)) / 2, is x / (1 + e^-2u): one exponential, and
    nothing cancels where x is far below zero.
    """
    for row in range(sums.shape[0]):
        y = sums[row]
        for i in range(len(y)):
            y[i] = bias[i] + scale * y[i]
        if is_gelu:
            for i in range(len(y)):
                x = y[i]
                u2 = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)  # 2 sqrt(2 / pi)
                e = exp(-abs(u2)) if abs(u2) < np.float32(87) else np.float32(0)
                y[i] = x * (np.float32(1) if u2 > np.float32(0) else e) / (np.float32(1) + e)
        elif len(residual):
            for i in range(len(y)):
                y[i] = residual[row, i] + y[i]
