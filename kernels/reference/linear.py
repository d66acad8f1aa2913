"""Torch twins of the linear layers, bit-exact in the number of rows (``kernels.reference.matrices``)."""

import functools

import torch
import torch.nn.functional as F

from kernels.layout import ROW_BLOCK, VOCAB_TILE, Quantized
from kernels.reference.compiled import as_bits, compiled, kept_bits
from kernels.reference.epilogue import activated
from kernels.reference.matrices import Matrix, Packed, matrices_are_native
from kernels.reference.moments import write_moments
from kernels.reference.route import Route


def cheap_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows that a pass takes for little more than one: a matrix unit (AMX) takes a block as it takes a row, vector
    instructions for bfloat16 (AVX512-BF16) take longer and those for float32 longer still. There three quarters of a
    block, and half of one, were never far from the best.
    """
    if device.type != "cpu":
        return ROW_BLOCK
    if dtype == torch.bfloat16 and matrices_are_native(dtype):
        return ROW_BLOCK if torch.cpu._is_amx_tile_supported() else 3 * ROW_BLOCK // 4
    return ROW_BLOCK // 2


def pad_rows(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """``x`` [N, C] with rows of zeros below, as products with ``weight`` and its like want them, so that none pads it
    again."""
    return _with_rows(x, _enough_rows(x.shape[0], _row_counts(weight)))


def layer_norm_linear(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: Matrix,  # [M, C]
    bias: torch.Tensor | None,  # [M]
    activation: str | None = None,  # None, "gelu_tanh", "gelu"
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of x; the twin takes its own
) -> torch.Tensor:
    """activation(layer_norm(x) @ weight.T + bias) -> [N, M]."""
    return linear(torch.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias, activation)


def layer_norm_qkv(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: Matrix,  # [3 C, C], rows ordered query, key, value
    bias: torch.Tensor,  # [3 C]
    k_cache: torch.Tensor,  # [slots, H, D], written
    v_cache: torch.Tensor,  # [slots, H, D], written
    route: Route,
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of x; the twin takes its own
) -> torch.Tensor:
    """Project layer_norm(x); scatter keys and values into their slots; return queries [N, H, D]."""
    qkv = linear(torch.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias)
    _, heads, dim = k_cache.shape
    assert qkv.dtype == k_cache.dtype, f"a cache in {k_cache.dtype} for a model in {qkv.dtype}"
    if route.writes is not None:
        rows, slots = route.writes
        k_cache[slots], v_cache[slots] = qkv[rows, heads * dim :].unflatten(1, (2, heads, dim)).unbind(1)
    else:
        _scatter(route.slot_mapping, as_bits(qkv), *kept_bits(k_cache, v_cache))
    return qkv.as_strided((qkv.shape[0], heads, dim), (3 * heads * dim, dim, 1))


@compiled
def _scatter(slots, qkv, k_cache, v_cache):
    """Keys and values of the rows that have a slot, each in its own."""
    heads, dim = k_cache.shape[1:]
    for row in range(len(slots)):
        if slots[row] >= 0:
            for head in range(heads):
                key, value = (heads + head) * dim, (2 * heads + head) * dim
                k_cache[slots[row], head] = qkv[row, key : key + dim]
                v_cache[slots[row], head] = qkv[row, value : value + dim]


def linear_residual(
    x: torch.Tensor,  # [N, K]
    weight: Matrix,  # [M, K]
    bias: torch.Tensor,  # [M]
    residual: torch.Tensor,  # [N, M]
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of the result, written
) -> torch.Tensor:
    """residual + x @ weight.T + bias -> [N, M]."""
    y = linear(x, weight, bias, None, residual)
    if moments is not None:
        write_moments(y, moments)
    return y


def lm_head(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: Matrix,
    tile_maxima: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,  # int32 [N], rows of x; None = all of them, in order
    moments: torch.Tensor | None = None,  # float32 [R, 2, P], of x; the twin takes its own
) -> torch.Tensor:
    """Final layer norm and projection to the vocabulary: x [R, C], weight [V, C] -> logits [N, V] in x's dtype.

    ``tile_maxima`` float32 [N, cdiv(V, VOCAB_TILE)], if given, receives the largest logit of each tile of the row.
    """
    x = x if rows is None else x[rows]
    logits = linear(torch.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, None)
    if tile_maxima is not None:
        padded = F.pad(logits, (0, -logits.shape[1] % VOCAB_TILE), value=float("-inf"))
        tile_maxima.copy_(padded.unflatten(1, (-1, VOCAB_TILE)).amax(-1))
    return logits


def new_tile_maxima(num_rows: int, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    """What ``lm_head`` is to fill for ``draw``: None, for the twin of ``draw`` makes no use of it."""
    return None


def linear(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight.T + bias), or residual + x @ weight.T + bias, in products of rows that agree, padded with
    zeros where rows lack."""
    num_rows = x.shape[0]
    assert residual is None or (activation is None and residual.shape[0] == num_rows)
    if isinstance(weight, Packed):
        product, counts = weight.product, weight.row_counts(bias is not None, activation, residual is not None)
        if num_rows in counts:
            return product(x, bias, activation, residual)
    else:
        product, counts = functools.partial(_product, weight), _row_counts(weight)
    padded = _enough_rows(num_rows, counts)
    x, residual = (some if some is None else _with_rows(some, padded) for some in (x, residual))
    blocks = x.split(counts[-1])
    residuals = [None] * len(blocks) if residual is None else residual.split(counts[-1])
    parts = [product(block, bias, activation, of) for block, of in zip(blocks, residuals, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]


def _row_counts(weight: Matrix) -> tuple[int, ...]:
    """Numbers of rows, ascending, that a product with ``weight`` may take; the last may be taken block after block."""
    is_quantized = isinstance(weight, Quantized)  # bias and all else come after its product
    matrix = weight.values if is_quantized else weight
    return matrix.row_counts(not is_quantized, None, False) if isinstance(matrix, Packed) else (ROW_BLOCK,)


def _enough_rows(num_rows: int, counts: tuple[int, ...]) -> int:
    """The first of ``counts`` that holds so many rows, or as many blocks as do."""
    return next((count for count in counts if count >= num_rows), -(-num_rows // ROW_BLOCK) * ROW_BLOCK)


def _with_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``x`` [N, C] with rows of zeros below, [num_rows, C]."""
    return x if x.shape[0] == num_rows else F.pad(x, (0, 0, 0, num_rows - x.shape[0]))


def _product(
    weight: torch.Tensor | Quantized,
    block: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``Packed.product`` of a matrix that is not packed, or in 8 bits."""
    y = _quantized_product(block, weight, bias) if isinstance(weight, Quantized) else F.linear(block, weight, bias)
    y = activated(y, activation)
    return y if residual is None else residual + y


def _quantized_product(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None) -> torch.Tensor:
    """Sums of x times the integers, times the scales, plus the bias: each in float32 or wider, rounded to x's dtype."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    values, x = weight.values, x.to(wide)
    sums = values.product(x, None, None) if isinstance(values, Packed) else F.linear(x, values.to(wide))
    y = sums * weight.scales
    return (y if bias is None else y.add_(bias)).to(dtype)
