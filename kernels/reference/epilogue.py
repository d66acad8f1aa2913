"""What follows the sums of a product: as one loop over them in float32, or element by element as torch does it."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from kernels.reference.compiled import compiled
from kernels.reference.exponential import exp

# Below this many elements torch runs an element-wise call on one thread, without a tail at a thread's border.
_SERIAL_ELEMENTS = 32768
ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}
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


def activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return x if activation is None else elementwise(ACTIVATIONS[activation], x)


def elementwise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply ``function`` to pieces that torch runs on one thread and that hold no partial vector inside a row."""
    # torch takes two vectors at a time, 64 values of 16 bits with AVX-512, and the rest one by one
    rows = max(1, _SERIAL_ELEMENTS // x.shape[1]) if x.shape[1] % 64 == 0 else 1
    return torch.cat([function(piece) for piece in x.split(rows)]) if x.shape[0] > rows else function(x)
