"""Torch twin of tree attention, bit-exact in the number of rows.

A row's scores are those of its own tail, then those of the windows that it shares, in position order; a dead lane has
weight zero. A softmax over more windows, dead for the row, adds whole vectors of zeros to the same sums. The weighted
sums are taken window by window, the tail last.

The tails of a block hold mostly the same keys. Where a score was found not to depend on the column that its key stands
in, each of those keys is gathered once and multiplied with all rows, and every lane picks its score.
"""

import functools

import torch
import torch.nn.functional as F

from kernels.layout import ROW_BLOCK, SHARED_WINDOW, TAIL_LANES, TAIL_WINDOW
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
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(q.dtype)


def _attention_block(q, k_cache, v_cache, block: Block, scale: float) -> torch.Tensor:
    """At most ROW_BLOCK rows: float32 [N, H * D]."""
    num_rows, heads, dim = q.shape
    live = len(block.tail_slots)
    multiple, columns_agree = _agreeing(q)
    by_head = _padded(q.float().transpose(0, 1) * scale, -(-live // multiple) * multiple)  # [H, R, D]
    tail_rows, common_rows, window_rows = block.head_rows(heads)
    if columns_agree:
        products = [torch.bmm(by_head, keys) for keys in _transposed(k_cache, common_rows, TAIL_WINDOW)]
        scores = torch.cat(products, -1).gather(2, block.tail_columns.expand(heads, -1, -1))  # [H, N, TAIL_LANES]
    else:
        keys = _gather(k_cache, tail_rows, TAIL_LANES).transpose(1, 2)
        scores = _each(by_head[:, :live].reshape(-1, 1, dim), keys).view(heads, live, TAIL_LANES)
    has_windows = len(window_rows) > 0
    if has_windows:
        shared = [torch.bmm(by_head, keys) for keys in _transposed(k_cache, window_rows, SHARED_WINDOW)]
        scores = torch.cat([_padded(scores, by_head.shape[1]), *shared], -1)
    weights = torch.softmax(scores.add_(block.bias[: scores.shape[1]]), -1)  # [H, N or R, lanes]
    mixed = _tail_sums(v_cache, tail_rows, weights[:, :live, :TAIL_LANES].reshape(-1)).view(heads, live, dim)
    if has_windows:
        values = _gather(v_cache, window_rows, SHARED_WINDOW).view(-1, heads, SHARED_WINDOW, dim)
        shared = weights[..., TAIL_LANES:].split(SHARED_WINDOW, -1)
        sums = torch.bmm(shared[0], values[0])
        for weight, value in zip(shared[1:], values[1:], strict=True):
            sums = sums.baddbmm_(weight, value)
        mixed = sums[:, :live].add_(mixed)
    return _padded(mixed.transpose(0, 1).flatten(1), num_rows)


def _transposed(cache: torch.Tensor, rows: torch.Tensor, lanes: int) -> torch.Tensor:
    """Windows of keys as a product with all heads takes them: float32 [windows, H, D, lanes]."""
    return _gather(cache, rows, lanes).view(-1, cache.shape[1], lanes, cache.shape[2]).transpose(2, 3)


def _tail_sums(cache: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of TAIL_LANES ``rows`` [B * TAIL_LANES] of a cache seen as [slots * H, D]: float32 [B, D].

    Every sum is taken by itself, lane by lane.
    """
    if cache.dtype != torch.float32:
        return _each(weights.view(-1, 1, TAIL_LANES), _gather(cache, rows, TAIL_LANES)).squeeze(1)
    ends = torch.arange(0, len(rows) + 1, TAIL_LANES, device=rows.device)
    return torch.embedding_bag(cache.flatten(0, 1), rows, ends, False, 0, False, weights, True)[0]


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


def _agreeing(q: torch.Tensor) -> tuple[int, bool]:
    """``agreeing`` of queries [N, H, D] where they run; on a GPU nobody finds out."""
    return (ROW_BLOCK, False) if one_shape(q.device) else agreeing(*q.shape[1:], torch.get_num_threads())


@functools.cache
def agreeing(heads: int, dim: int, num_threads: int) -> tuple[int, bool]:
    """What leaves the bits of attention's products alone: any multiple of how many rows up to ROW_BLOCK; and whether
    the score of a key does not depend on its column."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(heads, n, dim, generator=generator) for n in (ROW_BLOCK, SHARED_WINDOW))
    weights = torch.rand(heads, ROW_BLOCK, SHARED_WINDOW, generator=generator)
    few = keys[:, :TAIL_WINDOW]

    def products(rows: int) -> torch.Tensor:
        several = [torch.bmm(queries[:, :rows], some.transpose(1, 2)) for some in (keys, few)]
        return torch.cat([*several, torch.bmm(weights[:, :rows], keys)], -1).transpose(0, 1)

    multiple = agreeing_multiple(products)
    orders = [torch.randperm(TAIL_WINDOW, generator=generator) for _ in range(4)]
    columns_agree = all(
        torch.equal(
            torch.bmm(queries[:, :rows], few[:, order].transpose(1, 2)),
            torch.bmm(queries[:, :rows], few.transpose(1, 2))[..., order],
        )
        for rows in range(multiple, ROW_BLOCK + 1, multiple)
        for order in orders
    )
    return multiple, columns_agree
