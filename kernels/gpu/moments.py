"""Moments of a layer norm, left behind by whoever writes the rows: float32 [N, 2, P].

A layer norm needs mean and deviation of a whole row, which no program of the linear layer before it holds. Each leaves
the mean and the sum of squared deviations of the parts that it wrote; the layer that reads the row merges its P parts
(Chan, Golub & LeVeque 1983, pairwise update, equation 1.5) with one small load, where it would otherwise read every row
twice. Moments are of the rows as stored, rounded to their dtype.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import FLOATS, cdiv, launch, next_power_of_2, require
from kernels.layout import MOMENT_PART


def new_moments(num_rows: int, width: int, device: torch.device) -> torch.Tensor:
    """What ``embed`` and ``linear_residual`` are to fill for the next layer norm: float32 [N, 2, P], uninitialised."""
    return torch.empty(num_rows, 2, cdiv(width, MOMENT_PART), dtype=torch.float32, device=device)


@triton.jit
def store_moments(
    moments_ptr,  # float32 [N, 2, PARTS]
    y,  # float32 [ROWS, COUNT * PART], values as stored
    first,  # the first part of y
    offs_row,  # int64 [ROWS]
    mask_row,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Mean and sum of squared deviations of each part of ``y``; parts beyond the row are not stored."""
    ROWS: tl.constexpr = y.shape[0]
    COUNT: tl.constexpr = y.shape[1] // PART
    part = first + tl.arange(0, COUNT)
    count = tl.maximum(tl.minimum(WIDTH - part * PART, PART), 1)
    inside = tl.arange(0, PART)[None, :] < count[:, None]  # [COUNT, PART]
    values = tl.where(inside[None, :, :], tl.reshape(y, (ROWS, COUNT, PART)), 0.0)
    mean = tl.sum(values, 2) / count.to(tl.float32)[None, :]  # [ROWS, COUNT]
    centred = tl.where(inside[None, :, :], values - mean[:, :, None], 0.0)
    square = tl.sum(centred * centred, 2)
    offs = offs_row[:, None] * (2 * PARTS) + part[None, :]
    mask = mask_row[:, None] & (part < PARTS)[None, :]
    tl.store(moments_ptr + offs, mean, mask=mask)
    tl.store(moments_ptr + offs + PARTS, square, mask=mask)


@triton.jit
def load_moments(
    moments_ptr,  # float32 [N, 2, PARTS]
    offs_row,  # int64 [ROWS]
    mask_row,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    EPS: tl.constexpr,
):
    """Mean and 1 / standard deviation of each row: float32 [ROWS] twice."""
    part = tl.arange(0, BLOCK_PARTS)
    count = tl.maximum(tl.minimum(WIDTH - part * PART, PART), 0).to(tl.float32)[None, :]
    offs = offs_row[:, None] * (2 * PARTS) + part[None, :]
    mask = mask_row[:, None] & (part < PARTS)[None, :]
    part_mean = tl.load(moments_ptr + offs, mask=mask, other=0.0)
    square = tl.load(moments_ptr + offs + PARTS, mask=mask, other=0.0)
    mean = tl.sum(part_mean * count, 1) / WIDTH
    delta = part_mean - mean[:, None]
    variance = tl.sum(square + delta * delta * count, 1) / WIDTH
    return mean, tl.rsqrt(variance + EPS)


@triton.jit
def _row_moments_kernel(
    x_ptr,  # [N, WIDTH]
    moments_ptr,  # float32 [N, 2, PARTS]
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): one row."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row[:, None] * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    store_moments(moments_ptr, x, 0, row, row >= 0, WIDTH, PARTS, PART)


def row_moments(x: torch.Tensor) -> torch.Tensor:
    """Moments of ``x`` [N, C] that nobody left behind. One launch."""
    require("x", x, (None, None), FLOATS, x.device)
    num_rows, width = x.shape
    moments = new_moments(num_rows, width, x.device)
    launch(_row_moments_kernel, (num_rows,), {"x_ptr": x, "moments_ptr": moments}, constants(width))
    return moments


def constants(width: int) -> dict[str, int]:
    """The kernels' constants for rows of ``width``, a program that holds a whole row."""
    parts = cdiv(width, MOMENT_PART)
    return {"WIDTH": width, "PARTS": parts, "PART": MOMENT_PART, "BLOCK": MOMENT_PART * next_power_of_2(parts)}
