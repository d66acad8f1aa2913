"""Torch twin of tree attention, bit-exact in the number of rows.

The keys of a few rows stand in columns: those of all tails, each once and in the order of positions, then the windows
that the rows share. One product gives the scores of all rows and columns; every row takes its softmax over its own
lanes, its tail's first, as many as its position says; the weights go back to the columns, zeros to the others, and the
weighted sums are taken tail first, then window by window.

That is exact where a score does not depend on the column that its key stands in, and where a product adds up its
columns one after the other, so that a zero weight changes no bit, between the others or after them. Where that was not
found, on a GPU, and without numba, tails are multiplied row by row.
"""

import functools
import itertools
import threading

import numpy as np
import torch
import torch.nn.functional as F

from kernels.layout import ROW_BLOCK, SHARED_WINDOW, TAIL_ALIGNMENT, TAIL_LANES, TAIL_WINDOW
from kernels.reference.compiled import COMPILES, as_bits, compiled, kept_bits
from kernels.reference.exponential import exp
from kernels.reference.matrices import agreeing_multiple
from kernels.reference.route import Block, Route

MOST_COLUMNS = TAIL_WINDOW + 8 * SHARED_WINDOW  # of a product, as many as are tried: GPT-2's context
_SHIFTS = {torch.float32: np.int32(0), torch.bfloat16: np.int32(16)}  # of the bits, to be those of float32
_PARTS = 16  # partial sums of a softmax; TAIL_LANES and what a row sees of windows are multiples of it


def tree_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    route: Route,
    scale: float,
) -> torch.Tensor:
    """Each row attends to its own path: softmax(scale q k) v -> [N, H * D], sums in float32. Padding gives 0, or NaN
    where a value is not finite."""
    _, heads, dim = q.shape
    if not route.parts:
        multiple, agree = ROW_BLOCK, False
        if not route.one_shape:
            multiple, agree = agreeing(heads, dim, torch.get_num_threads())
        how = _ByColumns if agree and COMPILES else _ByRows
        route.parts.extend(how(block, heads, dim, multiple) for block in route.blocks)
    mixed, end = q.new_empty(q.shape), 0
    for part in route.parts:
        end = part.attend(q, k_cache, v_cache, scale, mixed)
    if end < mixed.shape[0]:
        mixed[end:] = 0
    return mixed.view(-1, heads * dim)


class _Workspace:
    """What the products of a block read and write, float32, by head."""

    def __init__(self, num_rows: int, num_columns: int, heads: int, dim: int):
        self.by_head, self.mixed = torch.empty(heads, num_rows, dim), torch.empty(heads, num_rows, dim)
        keys, values = torch.empty(heads, num_columns, dim), torch.empty(heads, num_columns, dim)
        self.scores = torch.empty(heads, num_rows, num_columns)
        self.keys = [some.transpose(1, 2) for some in keys.split(MOST_COLUMNS, 1)]
        borders = [0, *range(TAIL_WINDOW, num_columns, SHARED_WINDOW), num_columns]
        self.windows = [(self.scores[..., i:j], values[:, i:j]) for i, j in itertools.pairwise(borders)]
        self.by_row = self.mixed.transpose(0, 1)
        self.gathered = [to.view(torch.int32).numpy() for to in (self.by_head, keys, values)]
        self.weighed = self.scores.numpy()


@functools.lru_cache(maxsize=8)
def _workspace(thread: int, *shape: int) -> _Workspace:
    """Blocks of one shape take turns with one, those of one thread, since each is done before the next begins. Eight
    are kept: of GPT-2 Large, at the end of its context, 13 MB each."""
    with torch.inference_mode(False):  # so that it is written to outside of inference mode, too
        return _Workspace(*shape)


class _ByColumns:
    """How the rows of a block attend in products over shared columns, the same in every layer."""

    def __init__(self, block: Block, heads: int, dim: int, multiple: int):
        self.block, self.num_rows = block, -(-len(block.ends) // multiple) * multiple
        self.space = _workspace(threading.get_ident(), self.num_rows, len(block.slots), heads, dim)
        self.to_gather = block.rows.start, len(block.ends), block.slots, *self.space.gathered
        self.to_weigh = self.space.weighed, block.columns, block.live, block.firsts, block.ends

    def attend(self, q, k_cache, v_cache, scale: float, mixed) -> int:
        """Write the rows of the block, and where the pass ends with them its padding: the first row not written."""
        space = self.space
        if q.dtype in _SHIFTS:
            _gather(as_bits(q), *kept_bits(k_cache, v_cache), _SHIFTS[q.dtype], *self.to_gather)
        else:
            _, count, slots, *gathered = self.to_gather
            some = [cache.index_select(0, torch.from_numpy(slots)) for cache in (k_cache, v_cache)]
            wide = [as_bits(each.float()) for each in (q[self.block.rows], *some)]
            _gather(*wide, _SHIFTS[torch.float32], 0, count, np.arange(len(slots)), *gathered)
        if len(space.keys) == 1:
            torch.bmm(space.by_head, space.keys[0], out=space.scores)
        else:
            torch.cat([torch.bmm(space.by_head, some) for some in space.keys], -1, out=space.scores)
        _weigh(*self.to_weigh, np.float32(scale))
        torch.bmm(*space.windows[0], out=space.mixed)
        for window in space.windows[1:]:
            space.mixed.baddbmm_(*window)
        rows = self.block.rows
        if rows.start == 0 and mixed.shape[0] == self.num_rows:
            mixed.copy_(space.by_row)
            return self.num_rows
        mixed[rows].copy_(space.by_row[: len(self.block.ends)])
        return rows.stop


@compiled
def _gather(q, k_cache, v_cache, shift, start, count, slots, by_head, keys, values):
    """Queries of ``count`` rows, the last repeated where rows lack, and the keys and values of ``slots``, by head."""
    heads, dim = q.shape[1], q.shape[2]
    for head in range(heads):
        for row in range(by_head.shape[1]):
            source = start + min(row, count - 1)
            for i in range(dim):
                by_head[head, row, i] = np.int32(q[source, head, i]) << shift
        for column in range(len(slots)):
            slot = slots[column]
            for i in range(dim):
                keys[head, column, i] = np.int32(k_cache[slot, head, i]) << shift
            for i in range(dim):
                values[head, column, i] = np.int32(v_cache[slot, head, i]) << shift


@compiled
def _weigh(scores, columns, live, firsts, ends, scale):
    """Scores [H, R, C] become weights, in place: of row r's lanes their softmax, of all other columns zero."""
    values = np.empty(TAIL_LANES + scores.shape[2], np.float32)
    parts = np.empty(_PARTS, np.float32)
    for head in range(scores.shape[0]):
        for row in range(scores.shape[1]):
            across = scores[head, row]
            if row >= len(columns):
                across[:] = 0
                continue
            first, end = TAIL_WINDOW + firsts[row], ends[row]
            column, alive = columns[row], live[row]
            for lane in range(TAIL_LANES):
                values[lane] = across[column[lane]] * scale if alive[lane] else np.float32(-np.inf)
            for lane in range(end):
                values[TAIL_LANES + lane] = across[first + lane] * scale
            _softmax(values, TAIL_LANES + end, parts)
            across[:] = 0
            for lane in range(TAIL_LANES):
                if alive[lane]:
                    across[column[lane]] = values[lane]
            for lane in range(end):
                across[first + lane] = values[TAIL_LANES + lane]


@compiled
def _softmax(values, count, parts):
    """In place, over ``count`` values, a multiple of _PARTS. Sums are taken part by part, so that they fill vectors."""
    parts[:] = -np.inf
    for start in range(0, count, _PARTS):
        for i in range(_PARTS):
            value, part = values[start + i], parts[i]
            parts[i] = value if value > part else part
    largest = parts.max()
    if largest == -np.inf:  # all lanes are dead or NaN
        largest = np.float32(0)
    for i in range(count):
        values[i] = exp(values[i] - largest)
    parts[:] = 0
    for start in range(0, count, _PARTS):
        for i in range(_PARTS):
            parts[i] += values[start + i]
    total = np.float32(0)
    for i in range(_PARTS):
        total += parts[i]
    for i in range(count):
        values[i] /= total


class _ByRows:
    """The same with tails row by row and windows in products of one shape."""

    def __init__(self, block: Block, heads: int, dim: int, multiple: int):
        self.rows, self.on_device = block.rows, block.on_device()
        self.num_rows = -(-len(block.ends) // multiple) * multiple

    def attend(self, q, k_cache, v_cache, scale: float, mixed) -> int:
        """Write the rows of the block: the first row not written."""
        (slots, columns, bias), q = self.on_device, q[self.rows]
        live, (_, heads, dim) = len(columns), q.shape
        by_head = _padded(q.float().transpose(0, 1).contiguous(), self.num_rows)
        keys, values = (cache.index_select(0, slots).float().transpose(0, 1) for cache in (k_cache, v_cache))
        each = _each(by_head[:, :live].reshape(-1, 1, dim), keys[:, columns].flatten(0, 1).transpose(1, 2))
        windows = [slice(start, start + SHARED_WINDOW) for start in range(TAIL_WINDOW, len(slots), SHARED_WINDOW)]
        shared = [torch.bmm(by_head, keys[:, window].transpose(1, 2))[:, :live] for window in windows]
        scores = torch.cat([each.view(heads, live, TAIL_LANES), *shared], -1)
        weights = torch.softmax(torch.add(bias, scores, alpha=scale), -1)  # [H, live, lanes]
        tails = weights[..., :TAIL_LANES].reshape(-1, 1, TAIL_LANES)
        sums = _padded(_each(tails, values[:, columns].flatten(0, 1)).view(heads, live, dim), self.num_rows)
        for window in windows:
            shift = TAIL_LANES - TAIL_WINDOW
            some = weights[..., window.start + shift : window.stop + shift]
            sums.baddbmm_(_padded(some, self.num_rows), values[:, window])
        mixed[self.rows].copy_(sums[:, : len(q)].transpose(0, 1))
        return self.rows.stop


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` [H, N, C] with zeros below, [H, rows, C]."""
    return x if x.shape[1] == rows else F.pad(x, (0, 0, 0, rows - x.shape[1]))


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
    queries = torch.randn(heads, ROW_BLOCK, dim, generator=generator)
    keys = torch.randn(heads, most, dim, generator=generator)
    weights = torch.rand(heads, ROW_BLOCK, most, generator=generator)
    parts = [slice(TAIL_WINDOW), slice(TAIL_WINDOW, TAIL_WINDOW + SHARED_WINDOW), slice(most)]

    def products(rows: int) -> torch.Tensor:
        scores = [torch.bmm(queries[:, :rows].contiguous(), keys[:, part].transpose(1, 2)) for part in parts]
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

    def window_sums(size: int, count: int, before: int, rows: int) -> torch.Tensor:
        """What ``size`` columns with a weight, of the ``count`` of a last window, add to other sums; ``before`` it
        stand others."""
        values, spread = keys[:, -before - count :].clone(), weights.new_zeros(heads, rows, before + count)
        values[:, before : before + size] = keys[:, :size]
        spread[..., before : before + size] = weights[:, :rows, :size]
        return queries[:, :rows].clone().baddbmm_(spread[..., before:], values[:, before:])

    wanted = sums_at(torch.arange(TAIL_LANES), ROW_BLOCK, most)
    sizes = range(TAIL_ALIGNMENT, SHARED_WINDOW + 1, TAIL_ALIGNMENT)
    alone = {size: window_sums(size, size, TAIL_WINDOW, ROW_BLOCK) for size in sizes}
    for rows in range(multiple, ROW_BLOCK + 1, multiple):
        for size, count in itertools.combinations_with_replacement(sizes, 2):
            for before in (TAIL_WINDOW, TAIL_WINDOW + 2 * SHARED_WINDOW):
                if not torch.equal(window_sums(size, count, before, rows), alone[size][:, :rows]):
                    return multiple, False
        for count in range(TAIL_ALIGNMENT, most + 1, TAIL_ALIGNMENT):
            some = order[:count]
            scores = torch.bmm(queries[:, :rows].contiguous(), keys[:, some].transpose(1, 2))
            if not torch.equal(scores, whole[:, :rows, some]):
                return multiple, False
        for count in range(TAIL_WINDOW, most + 1, TAIL_ALIGNMENT):
            columns = torch.randperm(TAIL_WINDOW, generator=generator)[:TAIL_LANES].sort().values
            if not torch.equal(sums_at(columns, rows, count), wanted[:, :rows]):
                return multiple, False
    return multiple, True
