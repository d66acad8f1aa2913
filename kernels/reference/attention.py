"""Torch twin of tree attention, bit-exact in the number of rows.

The keys of a few rows stand in columns: those of all tails, each once and in the order of positions, then the windows
that the rows share. Every row picks its lanes from the scores of all columns, its own tail's first; a dead lane has
weight zero. A softmax over more windows, dead for the row, adds whole vectors of zeros to the same sums. The weights go
back to the columns, and the weighted sums are taken tail first, then window by window.

That is exact where a score does not depend on the column that its key stands in, and where a product adds up its
columns one after the other, so that a zero weight changes no bit. Where that was not found, tails are multiplied row by
row.
"""

import functools

import torch
import torch.nn.functional as F

from kernels.layout import ROW_BLOCK, SHARED_WINDOW, TAIL_LANES, TAIL_WINDOW
from kernels.reference.linear import agreeing_multiple
from kernels.reference.route import Block, Route, one_shape

MOST_COLUMNS = TAIL_WINDOW + 8 * SHARED_WINDOW  # of a product, as many as are tried: GPT-2's context


def tree_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    route: Route,
    scale: float,
) -> torch.Tensor:
    """Each row attends to its own path: softmax(scale q k) v -> [N, H * D], sums in float32. Padding rows give 0."""
    parts = [_attention_block(q[block.rows].float(), k_cache, v_cache, block, scale) for block in route.blocks]
    mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
    missing = len(q) - len(mixed)  # padding beyond a last block that is full
    return (F.pad(mixed, (0, 0, 0, missing)) if missing else mixed).to(q.dtype)


def _attention_block(q, k_cache, v_cache, block: Block, scale: float) -> torch.Tensor:
    """At most ROW_BLOCK rows: float32 [N, H * D]."""
    num_rows, heads, dim = q.shape
    multiple, agree = (ROW_BLOCK, False) if one_shape(q.device) else agreeing(heads, dim, torch.get_num_threads())
    by_head = _padded(q.transpose(0, 1), -(-num_rows // multiple) * multiple)  # [H, R, D]
    rows = block.head_rows(heads)
    keys, values = (_gather(cache, rows).view(heads, -1, dim) for cache in (k_cache, v_cache))  # [H, C, D]
    if agree:
        products = [torch.bmm(by_head, some.transpose(1, 2)) for some in keys.split(MOST_COLUMNS, 1)]
        scores = products[0] if len(products) == 1 else torch.cat(products, -1)
        scores = scores.gather(2, block.columns.expand(heads, -1, -1))
    else:
        scores = _scores(by_head, keys, block)
    weights = torch.softmax(torch.add(block.bias, scores, alpha=scale), -1)  # [H, live, lanes]
    spread = keys.new_zeros(heads, by_head.shape[1], keys.shape[1])
    spread.scatter_(2, block.columns.expand(heads, -1, -1), weights)
    if agree:
        mixed = torch.bmm(spread[..., :TAIL_WINDOW], values[:, :TAIL_WINDOW])
    else:
        mixed = _padded(_tail_sums(weights[..., :TAIL_LANES], values, block), by_head.shape[1])
    for start in range(TAIL_WINDOW, keys.shape[1], SHARED_WINDOW):
        window = slice(start, start + SHARED_WINDOW)
        mixed.baddbmm_(spread[..., window], values[:, window])
    return mixed[:, :num_rows].transpose(0, 1).flatten(1)


def _gather(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` of a cache seen as [slots * H, D], in float32."""
    return cache.flatten(0, 1).index_select(0, rows).float()


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` [H, N, C] with zeros below, [H, rows, C]."""
    return x if x.shape[1] == rows else F.pad(x, (0, 0, 0, rows - x.shape[1]))


def _of_tails(x: torch.Tensor, block: Block) -> torch.Tensor:
    """What of ``x`` [H, C, D] each row's tail holds: [H * live, TAIL_LANES, D]."""
    return x[:, block.columns[:, :TAIL_LANES]].flatten(0, 1)


def _scores(by_head: torch.Tensor, keys: torch.Tensor, block: Block) -> torch.Tensor:
    """Scores of all lanes [H, live, lanes], tails row by row, windows in products of one shape."""
    heads, live, dim = len(by_head), len(block.columns), by_head.shape[2]
    each = _each(by_head[:, :live].reshape(-1, 1, dim), _of_tails(keys, block).transpose(1, 2))
    windows = keys[:, TAIL_WINDOW:].transpose(1, 2).split(SHARED_WINDOW, -1)
    shared = [torch.bmm(by_head, window)[:, :live] for window in windows if window.shape[2]]
    return torch.cat([each.view(heads, live, TAIL_LANES), *shared], -1)


def _tail_sums(weights: torch.Tensor, values: torch.Tensor, block: Block) -> torch.Tensor:
    """Weighted sums over tails, row by row: [H, live, D]."""
    heads, live, lanes = weights.shape
    return _each(weights.reshape(-1, 1, lanes), _of_tails(values, block)).view(heads, live, -1)


def _each(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``torch.bmm`` of rows [B, 1, K] and matrices; never of a batch of one, which may take a path of its own."""
    if len(rows) > 1:
        return torch.bmm(rows, matrices)
    return torch.bmm(rows.expand(2, -1, -1), matrices.expand(2, -1, -1))[:1]


@functools.cache
def agreeing(heads: int, dim: int, num_threads: int) -> tuple[int, bool]:
    """How many rows, and multiples of which up to ROW_BLOCK, give the bits that ROW_BLOCK of them give; and whether
    columns may be shared as the module says. Both are found out by trying, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    most = MOST_COLUMNS
    queries = torch.randn(ROW_BLOCK, 3, heads, dim, generator=generator)[:, 0].transpose(0, 1)  # strides as in a pass
    keys = torch.randn(heads, most, dim, generator=generator)
    weights = torch.rand(heads, ROW_BLOCK, most, generator=generator)
    parts = [slice(TAIL_WINDOW), slice(TAIL_WINDOW, TAIL_WINDOW + SHARED_WINDOW), slice(most)]

    def products(rows: int) -> torch.Tensor:
        scores = [torch.bmm(queries[:, :rows], keys[:, part].transpose(1, 2)) for part in parts]
        sums = torch.bmm(weights[:, :rows, parts[0]], keys[:, parts[0]])
        sums.baddbmm_(weights[:, :rows, parts[1]], keys[:, parts[1]])
        return torch.cat([*scores, sums], -1).transpose(0, 1)

    multiple = agreeing_multiple(products)
    whole, order = torch.bmm(queries, keys.transpose(1, 2)), torch.randperm(most, generator=generator)

    def sums_at(columns: torch.Tensor, rows: int, count: int) -> torch.Tensor:
        """The same values, under the same weights, in ``columns``; weights of zero and other values around them."""
        values, spread = keys[:, -count:].clone(), weights.new_zeros(heads, rows, count)
        values[:, columns] = keys[:, :TAIL_LANES]
        spread[..., columns] = weights[:, :rows, :TAIL_LANES]
        return torch.bmm(spread[..., :TAIL_WINDOW], values[:, :TAIL_WINDOW])

    wanted = sums_at(torch.arange(TAIL_LANES), ROW_BLOCK, most)
    for rows in range(multiple, ROW_BLOCK + 1, multiple):
        for count in range(TAIL_WINDOW, most + 1, TAIL_WINDOW):
            some = order[:count]
            scores = torch.bmm(queries[:, :rows], keys[:, some].transpose(1, 2))
            columns = torch.randperm(TAIL_WINDOW, generator=generator)[:TAIL_LANES].sort().values
            if not torch.equal(scores, whole[:, :rows, some]):
                return multiple, False
            if not torch.equal(sums_at(columns, rows, count), wanted[:, :rows]):
                return multiple, False
    return multiple, True
