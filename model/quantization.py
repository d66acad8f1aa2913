"""Weights of a lower stage in 8 bits: half the bytes of bfloat16 that a pass streams, at the cost of a worse guess.

Weight-only and symmetric: a row of a matrix becomes integers in [-127, 127] and one float32 scale, its largest
magnitude over 127. Activations, biases, norms and embeddings keep the model's dtype. So does the look-up of tokens
where the head is tied to it: a pass reads one row of it for each of its own, so exact inputs cost next to nothing.
"""

import torch

from kernels.layout import Quantized
from model.weights import GPT2Weights

SCHEMES = ("int8",)
LARGEST = 127


def check_scheme(field: str, scheme: str | None) -> str | None:
    """``scheme`` itself. Raises ValueError, naming ``field``, for one that is unknown; None is no quantization."""
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"{field} must be None or one of {list(SCHEMES)}, got {scheme!r}")
    return scheme


def quantize(weights: GPT2Weights) -> GPT2Weights:
    """``weights`` with every matrix of a linear layer, the output head included, in 8 bits."""
    return weights.map_matrices(quantize_matrix)


def quantize_matrix(weight: torch.Tensor) -> Quantized:
    """``weight`` [M, K], each element rounded to the nearest integer times its row's scale."""
    rows = weight.float()
    scales = (rows.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return Quantized((rows / scales[:, None]).round().to(torch.int8), scales)


def is_quantized(weights: GPT2Weights) -> bool:
    """Whether any matrix of ``weights`` is in 8 bits."""
    return any(isinstance(tensor, Quantized) for tensor in weights.tensors())
