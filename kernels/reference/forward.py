"""Torch twins of the forward kernels, bit-exact in the number of rows.

Row r of every result depends on row r of the inputs alone, not on how many rows there are nor on what the others hold.
By construction: every matrix product runs on exactly ROW_BLOCK rows (the last block padded with zeros), every reduction
has a fixed width and order, and element-wise functions whose vector tails differ from their vector bodies (GELU) run on
pieces without tails. Dimension letters are explained in ``model/config.py``.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels.layout import NULL_PAGE, ROW_BLOCK, SHARED_WINDOW, TAIL_LANES, VOCAB_TILE, shared_end

# Below this many elements torch runs an element-wise call on one thread, without a tail at a thread's border.
_SERIAL_ELEMENTS = 32768
PREFILL_ROWS = 128  # rows of one pass of a long prompt: bounds the memory it takes
_TAIL_ROWS = 4  # the tail's batched products run on a multiple of this many rows, so never on a batch of one
_DEAD = float("-inf")
_ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}
_FUSED = {None: ("none", [], ""), "gelu_tanh": ("gelu", [], "tanh"), "gelu": ("gelu", [], "none")}  # names of oneDNN


def packed(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [M, C] as linear layers read it fastest: in oneDNN's own layout for ROW_BLOCK rows, where it has one.

    The sums are taken in another order than with the plain weight, the same for every row.
    """
    if weight.is_mkldnn or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight
    onednn = torch.ops.mkldnn
    supported = {torch.float32: True, torch.bfloat16: onednn._is_mkldnn_bf16_supported()}
    return onednn._reorder_linear_weight(weight, ROW_BLOCK) if supported.get(weight.dtype) else weight


def embed(
    tokens: torch.Tensor,  # int32 [N]
    positions: torch.Tensor,  # int32 [N]
    wte: torch.Tensor,  # [V, C]
    wpe: torch.Tensor,  # [P, C]
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of the result, written
) -> torch.Tensor:
    """Sum of token and position embeddings -> [N, C]."""
    return _with_moments(wte[tokens] + wpe[positions], moments)


def new_moments(num_rows: int, width: int, device: torch.device) -> torch.Tensor | None:
    """What ``embed`` and ``linear_residual`` are to fill for the next layer norm: None, the twin makes no use of it."""
    return None


def _with_moments(y: torch.Tensor, moments: torch.Tensor | None) -> torch.Tensor:
    """``y`` [N, C] itself; ``moments``, if given, receives mean and squared deviations of P equal parts of a row."""
    if moments is not None:
        parts = y.unflatten(1, (moments.shape[2], -1)).to(moments.dtype)
        mean = parts.mean(2)
        moments.copy_(torch.stack([mean, (parts - mean[..., None]).square().sum(2)], 1))
    return y


def layer_norm_linear(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: torch.Tensor,  # [M, C]
    bias: torch.Tensor | None,  # [M]
    activation: str | None = None,  # None, "gelu_tanh", "gelu"
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of x; the twin takes its own
) -> torch.Tensor:
    """activation(layer_norm(x) @ weight.T + bias) -> [N, M]."""
    return _linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias, activation)


class Block(NamedTuple):
    """What up to ROW_BLOCK rows read: W windows of SHARED_WINDOW consecutive positions, then each row's own tail."""

    rows: slice
    tail_slots: torch.Tensor  # int64 [R * TAIL_LANES], R the rows, made a multiple of _TAIL_ROWS
    tail_dead: torch.Tensor  # bool [R, 1, TAIL_LANES]
    window_slots: torch.Tensor  # int64 [W * SHARED_WINDOW], in position order
    window_dead: torch.Tensor  # bool [W, 1, ROW_BLOCK, SHARED_WINDOW]


class Route(NamedTuple):
    """Where the rows of one pass write and read; the same for every layer."""

    write_rows: torch.Tensor | None  # int64 [n], None = all rows
    write_slots: torch.Tensor  # int64 [n]
    blocks: list[Block]


def route(
    page_table: torch.Tensor,  # int32 [B, pages per sequence], NULL_PAGE beyond the last page
    page_size: int,
    committed: torch.Tensor,  # int32 [B], positions resolved by the page table, the root's included
    sequences: torch.Tensor,  # int32 [N], the sequence each row belongs to
    positions: torch.Tensor,  # int32 [N]
    paths: torch.Tensor,  # int32 [N, depth + 1], node ids, root first; [N, 1] where all rows are committed
    node_slots: torch.Tensor,  # int32 [nodes], where each node's K/V lies
    slot_mapping: torch.Tensor,  # int32 [N], where each row's K/V goes, -1 = nowhere
) -> Route:
    """Resolve positions and paths to slots, once per pass, for ``layer_norm_qkv`` and ``tree_attention``."""
    device = positions.device

    def put(array: np.ndarray, dtype: type) -> torch.Tensor:
        return torch.from_numpy(array.astype(dtype, copy=False)).to(device)

    arguments = (page_table, committed, sequences, positions, paths, node_slots, slot_mapping)
    page_table, committed, sequences, positions, paths, node_slots, slot_mapping = map(_on_host, arguments)
    tails = _path_slots(page_table, page_size, committed, sequences, positions, paths, node_slots)
    ends, blocks = shared_end(positions), []
    for start in range(0, len(positions), ROW_BLOCK):
        rows = slice(start, min(start + ROW_BLOCK, len(positions)))
        tail = np.full((-(-(rows.stop - start) // _TAIL_ROWS) * _TAIL_ROWS, TAIL_LANES), NULL_PAGE)
        tail[: rows.stop - start] = tails[rows]
        slots, dead = _windows(page_table, page_size, sequences[rows], ends[rows])
        masks = put((tail < page_size)[:, None], bool), put(dead, bool)
        blocks.append(Block(rows, put(tail.ravel(), np.int64), masks[0], put(slots, np.int64), masks[1]))
    write_rows = np.flatnonzero(slot_mapping >= 0)
    every = None if len(write_rows) == len(slot_mapping) else put(write_rows, np.int64)
    return Route(every, put(slot_mapping[write_rows], np.int64), blocks)


def path_slots(page_table, page_size, committed, sequences, positions, paths, node_slots) -> torch.Tensor:
    """Slot of each tail lane: int32 [N, TAIL_LANES]; dead lanes point into the null page. Arguments as ``route``.

    Lane j of a row at position p stands for position shared_end(p) + j. Committed positions are found through the page
    table, later ones through the row's path: position ``committed - 1 + d`` is its ancestor at depth d.
    """
    later = map(_on_host, (committed, sequences, positions, paths, node_slots))
    slots = _path_slots(_on_host(page_table), page_size, *later)
    return torch.from_numpy(slots.astype(np.int32)).to(positions.device)


def _path_slots(page_table, page_size, committed, sequences, positions, paths, node_slots) -> np.ndarray:
    lanes = shared_end(positions)[:, None] + np.arange(TAIL_LANES, dtype=np.int32)  # [N, TAIL_LANES]
    num_committed = committed[sequences][:, None]
    in_table = np.minimum(lanes, num_committed - 1)
    table = page_table[sequences[:, None], in_table // page_size] * page_size + in_table % page_size
    depth = (lanes - num_committed + 1).clip(0, paths.shape[1] - 1)
    nodes = np.take_along_axis(paths, depth, 1).clip(0)
    slots = np.where(lanes < num_committed, table, node_slots[nodes])
    return np.where((lanes <= positions[:, None]) & (slots >= 0), slots, NULL_PAGE)


def _windows(page_table, page_size, sequences, ends) -> tuple[np.ndarray, np.ndarray]:
    """Slots and dead lanes of the windows that a block's rows share; lanes dead for all rows read the null page."""
    slots, dead = [], []
    for sequence in range(len(page_table)):
        mine = np.zeros(ROW_BLOCK, dtype=np.int32)
        mine[: len(ends)] = ends * (sequences == sequence)
        end = mine.max()
        mine[len(ends) :] = end  # padding is alive, as exp(-inf) takes long
        lanes = np.arange(-(-end // SHARED_WINDOW) * SHARED_WINDOW, dtype=np.int32)
        pages = (lanes // page_size).clip(0, page_table.shape[1] - 1)
        found = page_table[sequence, pages] * page_size + lanes % page_size
        slots.append(np.where(lanes < end, found, NULL_PAGE))
        dead.append(lanes.reshape(-1, 1, 1, SHARED_WINDOW) >= mine[:, None])
    return np.concatenate(slots), np.concatenate(dead)


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def layer_norm_qkv(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: torch.Tensor,  # [3 C, C], rows ordered query, key, value
    bias: torch.Tensor,  # [3 C]
    k_cache: torch.Tensor,  # [slots, H, D], written
    v_cache: torch.Tensor,  # [slots, H, D], written
    route: Route,
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of x; the twin takes its own
) -> torch.Tensor:
    """Project layer_norm(x); scatter keys and values into their slots; return queries [N, H, D]."""
    qkv = layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias)
    q, k, v = qkv.view(x.shape[0], 3, *k_cache.shape[1:]).unbind(1)
    if route.write_rows is not None:
        k, v = k[route.write_rows], v[route.write_rows]
    k_cache.index_copy_(0, route.write_slots, k)
    v_cache.index_copy_(0, route.write_slots, v)
    return q


def tree_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    route: Route,
    scale: float,
) -> torch.Tensor:
    """Each row attends to its own path: softmax(scale q k) v -> [N, H * D], sums in float32.

    Work is cut into blocks of ROW_BLOCK rows. The maximum over all keys is exact in any order; the weighted sums are
    taken of the tail, then window by window in position order. A dead lane has weight zero and reads finite values.
    """
    parts = [_attention_block(q[block.rows], k_cache, v_cache, block, scale) for block in route.blocks]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1).to(q.dtype)


def _attention_block(q, k_cache, v_cache, block: Block, scale: float) -> torch.Tensor:
    """At most ROW_BLOCK rows: float32 [n, H, D]."""
    live, heads, dim = q.shape
    rows, num_windows = len(block.tail_dead), len(block.window_dead)
    queries = q.float() * scale
    if live < rows:
        queries = F.pad(queries, (0, 0, 0, 0, 0, rows - live))  # [rows, H, D]
    tail_rows = _head_rows(block.tail_slots, rows, heads)
    keys = _gather(k_cache, tail_rows)  # [rows * H, TAIL_LANES, D]
    tail = torch.bmm(queries.view(-1, 1, dim), keys.transpose(1, 2)).view(rows, heads, TAIL_LANES)
    tail = tail.masked_fill_(block.tail_dead, _DEAD)
    maximum = tail.amax(-1)  # [rows, H]
    if num_windows > 0:
        by_head = F.pad(queries, (0, 0, 0, 0, 0, ROW_BLOCK - rows)).transpose(0, 1)  # [H, ROW_BLOCK, D]
        by_head = by_head.expand(num_windows, -1, -1, -1).reshape(-1, ROW_BLOCK, dim)
        window_rows = _head_rows(block.window_slots, num_windows, heads)
        keys = _gather(k_cache, window_rows)  # [W * H, SHARED_WINDOW, D]
        scores = torch.bmm(by_head, keys.transpose(1, 2)).view(num_windows, heads, ROW_BLOCK, SHARED_WINDOW)
        scores = scores.masked_fill_(block.window_dead, _DEAD)
        maximum = torch.maximum(maximum, scores.amax(-1).amax(0).t()[:rows])

    weights = torch.exp(tail - maximum[..., None])
    total = weights.sum(-1)  # [rows, H]
    mixed = torch.bmm(weights.view(-1, 1, TAIL_LANES), _gather(v_cache, tail_rows)).view_as(queries)
    if num_windows > 0:
        weights = torch.exp_(scores - F.pad(maximum, (0, 0, 0, ROW_BLOCK - rows)).t()[..., None])
        products = torch.bmm(weights.view(-1, ROW_BLOCK, SHARED_WINDOW), _gather(v_cache, window_rows))
        sums, products = weights.sum(-1), products.view(num_windows, heads, ROW_BLOCK, dim)
        for window in range(num_windows):
            total = total + sums[window].t()[:rows]
            mixed = mixed + products[window].transpose(0, 1)[:rows]
    return (mixed / total[..., None])[:live]


def _head_rows(slots: torch.Tensor, groups: int, heads: int) -> torch.Tensor:
    """Rows of a cache seen as [slots * H, D] that hold ``slots`` [groups * n], head by head: [groups * H, n]."""
    head = torch.arange(heads, device=slots.device)[:, None]
    return (slots.view(groups, 1, -1) * heads + head).flatten(0, 1)


def _gather(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` [groups * H, n] of a cache [slots, H, D]: float32 [groups * H, n, D]."""
    return cache.flatten(0, 1).index_select(0, rows.flatten()).float().view(*rows.shape, -1)


def linear_residual(
    x: torch.Tensor,  # [N, K]
    weight: torch.Tensor,  # [M, K]
    bias: torch.Tensor,  # [M]
    residual: torch.Tensor,  # [N, M]
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of the result, written
) -> torch.Tensor:
    """residual + x @ weight.T + bias -> [N, M]."""
    return _with_moments(residual + _linear(x, weight, bias), moments)


def lm_head(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    tile_maxima: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final layer norm and projection to the vocabulary: x [N, C], weight [V, C] -> logits [N, V] in x's dtype.

    ``tile_maxima`` float32 [N, cdiv(V, VOCAB_TILE)], if given, receives the largest logit of each tile of the row.
    """
    logits = layer_norm_linear(x, norm_weight, norm_bias, eps, weight, None)
    if tile_maxima is not None:
        padded = F.pad(logits, (0, -logits.shape[1] % VOCAB_TILE), value=_DEAD)
        tile_maxima.copy_(padded.unflatten(1, (-1, VOCAB_TILE)).amax(-1))
    return logits


def new_tile_maxima(num_rows: int, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    """What ``lm_head`` is to fill for ``draw``: None, for the twin of ``draw`` makes no use of it."""
    return None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None = None):
    """activation(x @ weight.T + bias), ROW_BLOCK rows at a time; ``weight`` plain or ``packed``."""
    num_rows = x.shape[0]
    if num_rows == ROW_BLOCK:
        return _product(x, weight, bias, activation)
    x = F.pad(x, (0, 0, 0, -num_rows % ROW_BLOCK))
    if num_rows < ROW_BLOCK:
        return _product(x, weight, bias, activation)[:num_rows]
    return torch.cat([_product(block, weight, bias, activation) for block in x.split(ROW_BLOCK)])[:num_rows]


def _product(block: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None):
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.default(block, weight, bias, *_FUSED[activation])
    y = F.linear(block, weight, bias)
    return y if activation is None else _elementwise(_ACTIVATIONS[activation], y)


def _elementwise(function, x: torch.Tensor) -> torch.Tensor:
    """Apply ``function`` to pieces that torch runs on one thread and that hold no partial vector inside a row."""
    # torch takes two vectors at a time, 64 values of 16 bits with AVX-512, and the rest one by one
    rows = max(1, _SERIAL_ELEMENTS // x.shape[1]) if x.shape[1] % 64 == 0 else 1
    return torch.cat([function(piece) for piece in x.split(rows)]) if x.shape[0] > rows else function(x)
