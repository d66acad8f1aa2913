"""The operations of a GPT-2 pass under the names and signatures of ``kernels.reference``, each one launch."""

from dataclasses import replace

import torch

from kernels.gpu import attention
from kernels.gpu.config import linear_tiles
from kernels.gpu.launch import FLOATS, architecture, cdiv, require
from kernels.gpu.linear import linear
from kernels.gpu.prefill import prefill_attention
from kernels.gpu.route import Route
from kernels.layout import VOCAB_TILE, Quantized

HEAD_DIMS = (64, 128)


def layer_norm_linear(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: torch.Tensor | Quantized,  # [M, C]
    bias: torch.Tensor | None,  # [M]
    activation: str | None = None,  # None, "gelu_tanh", "gelu"
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of x
) -> torch.Tensor:
    """activation(layer_norm(x) @ weight.T + bias) -> [N, M]. Without ``moments``, one launch more takes them."""
    out, norm = x.new_empty(len(x), weight.shape[0]), (norm_weight, norm_bias, eps)
    return linear(x, weight, out, bias=bias, norm=norm, moments=moments, activation=activation)


def layer_norm_qkv(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: torch.Tensor | Quantized,  # [3 C, C], rows ordered query, key, value
    bias: torch.Tensor,  # [3 C]
    k_cache: torch.Tensor,  # [slots, H, D], written
    v_cache: torch.Tensor,  # [slots, H, D], written
    route: Route,
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of x
) -> torch.Tensor:
    """Project layer_norm(x); scatter keys and values into their slots; return queries [N, H, D]."""
    num_rows, width = x.shape
    heads, dim = k_cache.shape[1:]
    if heads * dim != width or weight.shape[0] != 3 * width:
        raise ValueError(f"weight [{weight.shape[0]}, {width}] does not fit {heads} heads of {dim}")
    require("k_cache", k_cache, (None, heads, dim), x.dtype, x.device)
    require("v_cache", v_cache, tuple(k_cache.shape), x.dtype, x.device)
    if num_rows != len(route.slot_mapping):
        raise ValueError(f"x has {num_rows} rows, the route is for {len(route.slot_mapping)}")
    q = x.new_empty(num_rows, heads, dim)
    scatter = (k_cache, v_cache, route.slot_mapping)
    linear(x, weight, q, bias=bias, norm=(norm_weight, norm_bias, eps), moments=moments, scatter=scatter)
    return q


def tree_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    route: Route,
    scale: float,
) -> torch.Tensor:
    """Each row attends to its own path: softmax(scale q k) v -> [N, H * D], sums in float32.

    Raises ValueError for a head dimension other than 64 and 128, and for rows that ``route`` is not for.
    """
    num_rows, num_heads, dim = q.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"head dimension must be one of {HEAD_DIMS}, got {dim}")
    if num_rows != len(route.positions):
        raise ValueError(f"q has {num_rows} rows, the route is for {len(route.positions)}")
    require("q", q, (None, None, None), FLOATS, q.device)
    require("k_cache", k_cache, (None, num_heads, dim), q.dtype, q.device)
    require("v_cache", v_cache, tuple(k_cache.shape), q.dtype, q.device)
    out = q.new_empty(num_rows, num_heads * dim)
    if route.tail_slots is None:
        return prefill_attention(q, k_cache, v_cache, out, route, scale)
    return attention.tree_attention(q, k_cache, v_cache, out, route, scale)


def linear_residual(
    x: torch.Tensor,  # [N, K]
    weight: torch.Tensor | Quantized,  # [M, K]
    bias: torch.Tensor,  # [M]
    residual: torch.Tensor,  # [N, M]
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of the result, written
) -> torch.Tensor:
    """residual + x @ weight.T + bias -> [N, M]; leaves the moments that the next layer norm needs."""
    return linear(x, weight, torch.empty_like(residual), bias=bias, residual=residual, out_moments=moments)


def lm_head(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor | Quantized,
    tile_maxima: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,  # int32 [N], rows of x; None = all of them, in order
    moments: torch.Tensor | None = None,  # float32 [R, 2, P], of x
) -> torch.Tensor:
    """Final layer norm and projection to the vocabulary: x [R, C], weight [V, C] -> logits [N, V] in x's dtype.

    Without ``moments``, one launch more takes them.

    ``tile_maxima`` float32 [N, cdiv(V, VOCAB_TILE)], if given, receives the largest logit of each tile of the row.
    """
    vocab_size, depth = weight.shape
    tiles = linear_tiles(architecture(x.device), vocab_size, depth, x.dtype, isinstance(weight, Quantized))
    tiles = replace(tiles, outputs=VOCAB_TILE)
    padded = cdiv(vocab_size, VOCAB_TILE) * VOCAB_TILE  # rows start at multiples of 16 bytes
    out = x.new_empty(len(x if rows is None else rows), padded)[:, :vocab_size]
    norm = (norm_weight, norm_bias, eps)
    return linear(x, weight, out, rows=rows, norm=norm, moments=moments, tile_maxima=tile_maxima, tiles=tiles)


def new_tile_maxima(num_rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """What ``lm_head`` is to fill for ``draw``: float32 [N, cdiv(V, VOCAB_TILE)]."""
    return torch.empty(num_rows, cdiv(vocab_size, VOCAB_TILE), dtype=torch.float32, device=device)
