"""Torch twin of tree attention, bit-exact in the number of rows.

A row's scores are those of its own tail, then those of the windows that it shares, in position order; a dead lane has
weight zero. A softmax over more windows, dead for the row, adds whole vectors of zeros to the same sums. The weighted
sums are taken window by window, the tail last.
"""

import functools

import torch
import torch.nn.functional as F

from kernels.layout import ROW_BLOCK, SHARED_WINDOW, TAIL_LANES
from kernels.reference.linear import agreeing_multiple
from kernels.reference.route import Block, Route, one_shape


def tree_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    route: Route,
    scale: float,
) -> torch.Tensor:
    """Each row attends to its own path: softmax(scale q k) v -> [N, H * D], sums in float32. Padding rows give 0."""
    parts = [_attention_block(q[block.rows], k_cache, v_cache, block, scale) for block in route.blocks]
    return _padded(parts[0] if len(parts) == 1 else torch.cat(parts), len(q)).to(q.dtype)


def _attention_block(q, k_cache, v_cache, block: Block, scale: float) -> torch.Tensor:
    """At most ROW_BLOCK rows: float32 [N, H * D]."""
    num_rows, heads, dim = q.shape
    live = len(block.tail_slots)  # N, which is more than num_rows where all blocks have one shape
    tail_rows, window_rows = block.head_rows(heads)
    queries = _padded(q.float().transpose(0, 1) * scale, live).reshape(-1, 1, dim)  # [H * N, 1, D]
    scores = _each(queries, _gather(k_cache, tail_rows, TAIL_LANES).transpose(1, 2)).view(heads, live, TAIL_LANES)
    bias, windows = block.bias[:live], range(len(window_rows))
    if windows:
        multiple = ROW_BLOCK if one_shape(q.device) else agreeing_rows(heads, dim, torch.get_num_threads())
        rows = -(-live // multiple) * multiple
        by_head = _padded(queries.view(heads, live, dim), rows)
        keys = _gather(k_cache, window_rows.flatten(), SHARED_WINDOW).view(-1, heads, SHARED_WINDOW, dim)
        shared = [torch.bmm(by_head, keys[window].transpose(1, 2)) for window in windows]  # [H, R, SHARED_WINDOW]
        scores, bias = torch.cat([_padded(scores, rows), *shared], -1), _padded(block.bias, rows)
    weights = torch.softmax(scores.add_(bias), -1)  # [H, N or R, lanes]
    mixed = torch.zeros_like(queries)
    if windows:
        values = _gather(v_cache, window_rows.flatten(), SHARED_WINDOW).view_as(keys)
        shared = weights[..., TAIL_LANES:].split(SHARED_WINDOW, -1)
        mixed = torch.bmm(shared[0], values[0])
        for window in windows[1:]:
            mixed = mixed.baddbmm_(shared[window], values[window])
        mixed = mixed[:, :live].reshape(-1, 1, dim)
    weights = weights[:, :live, :TAIL_LANES].reshape(-1, 1, TAIL_LANES)
    mixed = mixed + _each(weights, _gather(v_cache, tail_rows, TAIL_LANES))
    return mixed.view(heads, live, dim).transpose(0, 1)[:num_rows].reshape(num_rows, -1)


def _gather(cache: torch.Tensor, rows: torch.Tensor, lanes: int) -> torch.Tensor:
    """``rows`` [B * lanes] of a cache [slots, H, D] seen as [slots * H, D]: float32 [B, lanes, D]."""
    return cache.flatten(0, 1).index_select(0, rows).float().view(-1, lanes, cache.shape[-1])


def _each(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``torch.bmm`` of rows [B, 1, K] and matrices; never of a batch of one, which may take a path of its own."""
    if len(rows) > 1:
        return torch.bmm(rows, matrices)
    return torch.bmm(rows.expand(2, -1, -1), matrices.expand(2, -1, -1))[:1]


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` [..., N, C] with zeros below, [..., rows, C]."""
    return x if x.shape[-2] == rows else F.pad(x, (0, 0, 0, rows - x.shape[-2]))


@functools.cache
def agreeing_rows(heads: int, dim: int, num_threads: int) -> int:
    """The products of a window agree bit for bit on any multiple of this many rows up to ROW_BLOCK."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(heads, n, dim, generator=generator) for n in (ROW_BLOCK, SHARED_WINDOW))
    weights = torch.rand(heads, ROW_BLOCK, SHARED_WINDOW, generator=generator)

    def products(rows: int) -> torch.Tensor:
        scores = torch.bmm(queries[:, :rows], keys.transpose(1, 2))
        return torch.cat([scores, torch.bmm(weights[:, :rows], keys)], -1).transpose(0, 1)

    return agreeing_multiple(products)
