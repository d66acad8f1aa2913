"""Matrices in the form whose product is fastest on this CPU, and how many rows such a product may take.

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

from kernels.layout import MAX_ROWS, ROW_BLOCK, ROW_MULTIPLE, Quantized
from kernels.reference.compiled import COMPILES
from kernels.reference.epilogue import NO_RESIDUAL, activated, finish

if torch.backends.mkldnn.is_available():  # the operators themselves, without OpOverload's call, which is Python
    _pointwise, _pointwise_add = (
        getattr(overload, "_op", overload)
        for overload in (torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary)
    )
_LEAST_MULTIPLE = {"fbgemm": 1}  # of rows; oneDNN compiles a product for each number of them, and many take as long
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
        self._row_counts: dict[tuple, tuple[int, ...]] = {}
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
            y = activated(F.linear(x, self._parts[0], bias), activation)
        else:
            sums, scale = self._parts[0](x.float()), self._parts[1]
            if COMPILES and self.dtype == torch.float32 and bias is not None and activation in (None, "gelu_tanh"):
                added = NO_RESIDUAL if residual is None else residual.numpy()
                finish(sums.numpy(), np.float32(scale), bias.numpy(), activation is not None, added)
                return sums
            y = sums.mul_(scale) if bias is None else torch.add(bias, sums, alpha=scale)
            y = activated(y.to(self.dtype), activation)
        return y if residual is None else residual + y

    def row_counts(self, has_bias: bool, activation: str | None, has_residual: bool) -> tuple[int, ...]:
        """``agreeing_rows`` of products of this matrix with as many threads as there are."""
        how = has_bias, activation, has_residual, torch.get_num_threads()
        counts = self._row_counts.get(how)
        if counts is None:
            counts = self._row_counts[how] = agreeing_rows(self.library, self.shape, self.dtype, *how)
        return counts


Matrix = torch.Tensor | Packed | Quantized


def packed(weight: Matrix) -> Matrix:
    """``weight`` [M, K] as the linear layers read it fastest; integers of 8 bits as float32, packed in their turn."""
    if isinstance(weight, Quantized):
        is_ready = isinstance(weight.values, Packed) or weight.values.device.type != "cpu"
        return weight if is_ready else replace(weight, values=Packed(weight.values.float()))
    return weight if isinstance(weight, Packed) or weight.device.type != "cpu" else Packed(weight)


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


def agreeing_multiple(product: Callable[[int], torch.Tensor], least: int = ROW_MULTIPLE) -> int:
    """The first of ``least``, ROW_MULTIPLE and ROW_BLOCK such that ``product(n)`` has the bits of the first n rows of
    ``product(ROW_BLOCK)`` for each multiple n of it. The inputs must be random, so that no two orders of a sum give the
    same bits everywhere."""
    whole = product(ROW_BLOCK)
    for multiple in sorted({least, ROW_MULTIPLE}):
        if all(torch.equal(product(n), whole[:n]) for n in range(multiple, ROW_BLOCK, multiple)):
            return multiple
    return ROW_BLOCK


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
    multiple = agreeing_multiple(product, _LEAST_MULTIPLE.get(library, ROW_MULTIPLE))
    return *range(multiple, ROW_BLOCK, multiple), *range(ROW_BLOCK, most + 1, ROW_BLOCK)
