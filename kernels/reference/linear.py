"""Torch twins of the linear layers, bit-exact in the number of rows.

Row r of a product must not depend on how many rows there are. A library may choose another algorithm for another number
of rows, so every product runs on a number of them that was found to agree, bit for bit, with all others that are used:
``agreeing_rows`` finds these out, on this machine, for matrices of this shape and this number of threads.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from kernels.layout import MAX_ROWS, ROW_BLOCK, ROW_MULTIPLE, VOCAB_TILE, Quantized
from kernels.reference.compiled import COMPILES, as_bits, compiled, kept_bits
from kernels.reference.epilogue import NO_RESIDUAL, finish
from kernels.reference.moments import write_moments
from kernels.reference.route import Route

# Below this many elements torch runs an element-wise call on one thread, without a tail at a thread's border.
_SERIAL_ELEMENTS = 32768
_ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}
if torch.backends.mkldnn.is_available():  # the operators themselves, without OpOverload's call, which is Python
    _pointwise, _pointwise_add = (
        getattr(overload, "_op", overload)
        for overload in (torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary)
    )
_FUSED = {None: ("none", [], ""), "gelu_tanh": ("gelu", [], "tanh"), "gelu": ("gelu", [], "none")}  # names of oneDNN


class Packed:
    """The matrix [M, K] of a linear layer, in the form whose product is fastest here.

    A matrix of which every element times one power of two is a 16-bit float, as where the checkpoint is in bfloat16, is
    read in 16 bits by FBGEMM: nothing is lost, the sums are in float32, and half the bytes of float32 are read. That is
    for float32, and for bfloat16 where the processor has no instructions for it. Otherwise oneDNN's own layout,
    otherwise the matrix as it is. Each takes a row's sum in an order of its own, the same for every row.
    """

    ndim = 2

    def __init__(self, weight: torch.Tensor):
        self.shape, self.dtype, self._size = weight.shape, weight.dtype, weight.element_size()
        self.known_counts: dict[tuple, tuple[int, ...]] = {}  # of ``row_counts``
        native = matrices_are_native(weight.dtype)
        halves = None if native and weight.dtype != torch.float32 else _in_halves(weight)
        if halves is not None:
            self.library, self._parts = "fbgemm", halves
        elif native:
            self.library, self._parts = "onednn", (torch.ops.mkldnn._reorder_linear_weight(weight, ROW_BLOCK),)
        else:
            self.library, self._parts = "torch", (weight,)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """In the model's dtype, whichever way it is kept here."""
        return self.numel() * self._size

    def product(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """activation(x @ weight.T + bias), or residual + x @ weight.T + bias."""
        if self.library == "onednn":
            if residual is None:
                return _pointwise(x, self._parts[0], bias, *_FUSED[activation])
            return _pointwise_add(x, residual, self._parts[0], bias, "add")
        if self.library == "torch":
            y = _activated(F.linear(x, self._parts[0], bias), activation)
        else:
            sums, scale = self._parts[0](x.float()), self._parts[1]
            if COMPILES and self.dtype == torch.float32 and bias is not None and activation in (None, "gelu_tanh"):
                added = NO_RESIDUAL if residual is None else residual.numpy()
                finish(sums.numpy(), np.float32(scale), bias.numpy(), activation is not None, added)
                return sums
            y = sums.mul_(scale) if bias is None else torch.add(bias, sums, alpha=scale)
            y = _activated(y.to(self.dtype), activation)
        return y if residual is None else residual + y

    def row_counts(self, *how) -> tuple[int, ...]:
        """``agreeing_rows`` of products of this matrix: with a bias or not, the activation, with a residual or not, and
        the number of threads."""
        counts = self.known_counts[how] = agreeing_rows(self.library, self.shape, self.dtype, *how)
        return counts


Matrix = torch.Tensor | Packed | Quantized


def packed(weight: Matrix) -> Matrix:
    """``weight`` [M, K] as the linear layers read it fastest; integers of 8 bits as float32, packed in their turn."""
    if isinstance(weight, Quantized):
        is_ready = isinstance(weight.values, Packed) or weight.values.device.type != "cpu"
        return weight if is_ready else replace(weight, values=Packed(weight.values.float()))
    return weight if isinstance(weight, Packed) or weight.device.type != "cpu" else Packed(weight)


def cheap_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows that a pass takes for little more than one: matrix instructions take a block as they take a row, vector
    units take longer, and half a block was never far from the best.
    """
    on_vectors = device.type == "cpu" and not (dtype == torch.bfloat16 and matrices_are_native(dtype))
    return ROW_BLOCK // 2 if on_vectors else ROW_BLOCK


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [N, C] with rows of zeros below, as products want them where few rows agree, so that none pads it again."""
    missing = -x.shape[0] % (ROW_MULTIPLE if x.shape[0] <= ROW_BLOCK else ROW_BLOCK)
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def matrices_are_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of ``dtype`` with instructions of this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _in_halves(weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], float] | None:
    """FBGEMM's product with ``weight`` times a power of two, kept in 16 bits, and the inverse of that power; None where
    a bit would be lost or FBGEMM is not what torch uses."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return None
    weight = weight.float()
    _, exponent = torch.frexp(weight.abs().amax())
    scale = 2.0 ** min(100, 15 - int(exponent))
    scaled = weight * scale  # below 2^15
    if not torch.equal(scaled.half().float(), scaled):
        return None
    product = getattr(torch, "fbgemm_linear_fp16_weight_fp32_activation", None)
    if product is None or torch.get_num_threads() > 1:
        shared = torch.ops.quantized.linear_prepack_fp16(scaled, None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, shared), 1.0 / scale
    with warnings.catch_warnings():  # on one thread: the same bits, and 16 microseconds less a call
        warnings.simplefilter("ignore")  # that it will be gone in a later torch
        halves = torch.fbgemm_pack_gemm_matrix_fp16(scaled)
        product(weight.new_zeros(1, weight.shape[1]), halves, None)
    return lambda x: product(x, halves, None), 1.0 / scale


def agreeing_multiple(product) -> int:
    """ROW_MULTIPLE if ``product(n)`` has the bits of the first n rows of ``product(ROW_BLOCK)`` for each multiple n of
    it, or else ROW_BLOCK. The inputs must be random, so that no two orders of a sum give the same bits everywhere."""
    whole = product(ROW_BLOCK)
    fewer = range(ROW_MULTIPLE, ROW_BLOCK, ROW_MULTIPLE)
    return ROW_MULTIPLE if all(torch.equal(product(n), whole[:n]) for n in fewer) else ROW_BLOCK


@functools.cache
def agreeing_rows(
    library: str,
    shape: torch.Size,
    dtype: torch.dtype,
    has_bias: bool,
    activation: str | None,
    has_residual: bool,
    num_threads: int,
) -> tuple[int, ...]:
    """Numbers of rows, ascending, whose products with a matrix [M, K] have the same bits: multiples of one number up to
    ROW_BLOCK, then multiples of ROW_BLOCK.

    Tried on numbers of which most of a sum cancels, so that its order shows in results of 16 bits, too.
    """
    generator, half = torch.Generator().manual_seed(0), shape[1] // 2

    def cancelling(count: int, sign: int, noise: float) -> torch.Tensor:
        values = torch.randn(count, shape[1], generator=generator)
        values[:, half : 2 * half] = sign * values[:, :half]
        return values + noise * torch.randn(count, shape[1], generator=generator)

    weight, x = cancelling(shape[0], -1, 2.0**-6), cancelling(MAX_ROWS, 1, 2.0**-9).to(dtype)
    matrix = Packed((weight.bfloat16() if library == "fbgemm" else weight).to(dtype))
    if matrix.library != library or library == "torch":
        return (ROW_BLOCK,)
    bias = torch.randn(shape[0], generator=generator).to(dtype) * 2.0**-4 if has_bias else None
    residual = torch.randn(MAX_ROWS, shape[0], generator=generator).to(dtype) * 2.0**-4 if has_residual else None

    def product(num_rows: int, first: int = 0) -> torch.Tensor:
        rows = slice(first, first + num_rows)
        return matrix.product(x[rows], bias, activation, None if residual is None else residual[rows])

    whole, most = torch.cat([product(ROW_BLOCK, first) for first in range(0, MAX_ROWS, ROW_BLOCK)]), ROW_BLOCK
    while most < MAX_ROWS and torch.equal(product(most + ROW_BLOCK), whole[: most + ROW_BLOCK]):
        most += ROW_BLOCK
    multiple = agreeing_multiple(product)
    return *range(multiple, ROW_BLOCK, multiple), *range(ROW_BLOCK, most + 1, ROW_BLOCK)


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
    if route.one_shape:
        rows = np.flatnonzero(route.slot_mapping >= 0)
        slots, rows = (torch.from_numpy(some).to(x.device) for some in (route.slot_mapping[rows], rows))
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
                for i in range(dim):
                    k_cache[slots[row], head, i] = qkv[row, (heads + head) * dim + i]
                    v_cache[slots[row], head, i] = qkv[row, (2 * heads + head) * dim + i]


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
) -> torch.Tensor:
    """Final layer norm and projection to the vocabulary: x [N, C], weight [V, C] -> logits [N, V] in x's dtype.

    ``tile_maxima`` float32 [N, cdiv(V, VOCAB_TILE)], if given, receives the largest logit of each tile of the row.
    """
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
    num_rows, counts = x.shape[0], (ROW_BLOCK,)
    if isinstance(weight, Packed):
        product = weight.product
        how = bias is not None, activation, residual is not None, torch.get_num_threads()
        counts = weight.known_counts.get(how) or weight.row_counts(*how)
        if num_rows in counts:
            return product(x, bias, activation, residual)
    else:
        product = functools.partial(_product, weight)
        if isinstance(weight, Quantized) and isinstance(weight.values, Packed):
            counts = weight.values.row_counts(False, None, False, torch.get_num_threads())  # all else comes after it
    padded = next((count for count in counts if count >= num_rows), -(-num_rows // ROW_BLOCK) * ROW_BLOCK)
    x, residual = (some if some is None else _with_rows(some, padded) for some in (x, residual))
    blocks = x.split(counts[-1])
    residuals = [None] * len(blocks) if residual is None else residual.split(counts[-1])
    parts = [product(block, bias, activation, of) for block, of in zip(blocks, residuals, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]


def _with_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``x`` [N, C] with rows of zeros below, [num_rows, C]."""
    return F.pad(x, (0, 0, 0, num_rows - x.shape[0]))


def _product(
    weight: torch.Tensor | Quantized,
    block: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``Packed.product`` of a matrix that is not packed, or in 8 bits."""
    y = _quantized_product(block, weight, bias) if isinstance(weight, Quantized) else F.linear(block, weight, bias)
    y = _activated(y, activation)
    return y if residual is None else residual + y


def _quantized_product(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None) -> torch.Tensor:
    """Sums of x times the integers, times the scales, plus the bias: each in float32 or wider, rounded to x's dtype."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    values, x = weight.values, x.to(wide)
    sums = values.product(x, None, None) if isinstance(values, Packed) else F.linear(x, values.to(wide))
    y = sums * weight.scales
    return (y if bias is None else y.add_(bias)).to(dtype)


def _activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return x if activation is None else _elementwise(_ACTIVATIONS[activation], x)


def _elementwise(function, x: torch.Tensor) -> torch.Tensor:
    """Apply ``function`` to pieces that torch runs on one thread and that hold no partial vector inside a row."""
    # torch takes two vectors at a time, 64 values of 16 bits with AVX-512, and the rest one by one
    rows = max(1, _SERIAL_ELEMENTS // x.shape[1]) if x.shape[1] % 64 == 0 else 1
    return torch.cat([function(piece) for piece in x.split(rows)]) if x.shape[0] > rows else function(x)
